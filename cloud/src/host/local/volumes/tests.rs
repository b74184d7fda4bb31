use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use hutch_blockdev::stack::{self, Stack};
use hutch_blockdev::{Disk, open_layers};
use hutch_imagestore::store::{Architecture, Format, Kind, Origin};
use hutch_vmm::config::Flow;

use super::*;
use crate::host::{Content, Layer};

mod encrypted;
mod exported;
mod repaired;

const MIB: u64 = 1 << 20;

/// A directory with one template, `micro`: 4 MiB that begin with `template`.
fn home() -> tempfile::TempDir {
    home_of("template")
}

/// A directory whose template begins with `text`.
fn home_of(text: &str) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let pending = Store::open(home.path()).unwrap().begin(Kind::Machine, "micro").unwrap();
    pending.disk().set_len(4 * MIB).unwrap();
    pending.disk().write_all_at(text.as_bytes(), 0).unwrap();
    let origin = Origin { format: Format::Raw, sha256: "0".repeat(64), architecture: Architecture::X86_64 };
    pending.commit(origin).unwrap();
    home
}

fn keyring(state: &Path) -> Keyring {
    Keyring::open(&state.join("wrapping")).unwrap()
}

fn open(home: &tempfile::TempDir) -> Volumes {
    Volumes::open(home.path(), Store::open(home.path()).unwrap(), keyring(home.path())).unwrap()
}

fn disk(volumes: &Volumes, id: &str) -> Arc<dyn Disk> {
    open_layers(volumes.files(id).unwrap().open().unwrap(), false).unwrap()
}

/// What a volume of a snapshot begins with.
fn of_snapshot(volumes: &Volumes, snapshot: &str) -> String {
    let id = format!("vol-of-{snapshot}");
    volumes.create(&id, 0, &Source::Snapshot(snapshot.into()), None).unwrap();
    let start = start_of(&*disk(volumes, &id));
    volumes.delete(&id).unwrap();
    start
}

/// A machine, without one.
struct Fake {
    disks: Mutex<Vec<(String, String, Arc<Stack>)>>,
    /// It does not answer any more.
    dead: Mutex<bool>,
}

impl Fake {
    fn start(volumes: &Volumes, ids: &[&str]) -> Fake {
        let open = |id: &&str| {
            let (files, _) = volumes.ready(id).unwrap();
            let layers = files.open().unwrap();
            let opened = hutch_blockdev::layers::open(layers, false).unwrap();
            (serial(id), files.top, opened.stack.unwrap())
        };
        Fake { disks: Mutex::new(ids.iter().map(open).collect()), dead: Mutex::new(false) }
    }

    fn stack(&self, volume: &str) -> Arc<Stack> {
        let disks = self.disks.lock().unwrap();
        disks.iter().find(|(have, _, _)| *have == serial(volume)).unwrap().2.clone()
    }

    fn answers(&self) -> Result<()> {
        let silent = || HostError::Failed("it does not answer".into());
        (!*self.dead.lock().unwrap()).then_some(()).ok_or_else(silent)
    }
}

impl Running for Fake {
    fn cut(&self, cuts: &[(String, String, File)]) -> Result<()> {
        self.answers()?;
        let mut disks = self.disks.lock().unwrap();
        let mut stacks = Vec::new();
        for (serial, top, file) in cuts {
            let (_, had, stack) = disks.iter_mut().find(|(have, _, _)| have == serial).unwrap();
            if had != top {
                let file = file.try_clone().unwrap();
                lock(&file, false).unwrap();
                stacks.push((stack.clone(), Arc::new(file) as Arc<dyn hutch_blockdev::store::Store>));
                had.clone_from(top);
            }
        }
        stack::cut(stacks.iter().map(|(stack, file)| (&**stack, file.clone())).collect()).unwrap();
        Ok(())
    }

    fn seal(&self, volume: &str) -> Result<()> {
        self.answers()?;
        self.stack(volume).seal().map_err(|e| disk_failed(volume, &e))
    }

    fn rebase(
        &self,
        volume: &str,
        layers: &[hutch_blockdev::Layer],
    ) -> std::result::Result<(), hutch_vmm::launch::LaunchError> {
        self.answers().map_err(|e| hutch_vmm::launch::LaunchError::Refused(e.to_string()))?;
        let layers = layers.iter().map(|layer| layer.try_clone().unwrap()).collect();
        self.stack(volume).rebase(layers).unwrap();
        Ok(())
    }
}

/// Makes layers fewer, with this machine or none.
fn tidy(volumes: &Volumes, machine: Option<&Fake>) {
    volumes.tidy(&|volume, job| {
        let _held = volumes.hold([volume]);
        let has =
            |fake: &&Fake| fake.disks.lock().unwrap().iter().any(|(have, _, _)| *have == serial(volume));
        job(machine.filter(has).map(|fake| fake as &dyn Running))
    });
}

/// Bytes that all layers take.
fn room(home: &tempfile::TempDir) -> u64 {
    let layers = files(&home.path().join("layers")).unwrap();
    layers.iter().map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
}

fn start_of(disk: &dyn Disk) -> String {
    let mut sector = [0; SECTOR as usize];
    disk.read_at(0, &mut sector).unwrap();
    String::from_utf8_lossy(&sector).trim_end_matches('\0').to_owned()
}

fn put(disk: &dyn Disk, text: &[u8]) {
    let mut sector = [0; SECTOR as usize];
    sector[..text.len()].copy_from_slice(text);
    disk.write_at(0, &sector).unwrap();
    disk.flush().unwrap();
}

fn names(home: &tempfile::TempDir, dir: &str) -> Vec<String> {
    let mut names: Vec<_> = files(&home.path().join(dir))
        .unwrap()
        .iter()
        .map(|path| path.file_name().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn a_volume_of_a_template_is_made_once_and_keeps_what_was_written() {
    let home = home();
    let volumes = open(&home);
    let source = Source::Template("micro".into());
    volumes.create("vol-a", 8 * MIB, &source, None).unwrap();
    let a = disk(&volumes, "vol-a");
    assert_eq!((a.size(), start_of(&*a)), (8 * MIB, "template".into()));
    put(&*a, b"written");
    drop(a);
    volumes.create("vol-a", 8 * MIB, &source, None).unwrap();
    drop(volumes);
    assert_eq!(start_of(&*disk(&open(&home), "vol-a")), "written");
    // At least its source's size.
    open(&home).create("vol-b", MIB, &source, None).unwrap();
    assert_eq!(disk(&open(&home), "vol-b").size(), 4 * MIB);
}

#[test]
fn what_is_not_there_is_missing_and_leaves_nothing() {
    let home = home();
    let volumes = open(&home);
    for source in [Source::Template("none".into()), Source::Snapshot("snap-none".into())] {
        let made = volumes.create("vol-a", MIB, &source, None);
        assert!(matches!(made, Err(HostError::Missing(_))), "{made:?}");
    }
    assert!(matches!(volumes.files("vol-a"), Err(HostError::Missing(_))));
    assert!(matches!(volumes.create_snapshots(&[("snap-a", "vol-a")], &[]), Err(HostError::Missing(_))));
    assert!(volumes.create("../vol", MIB, &Source::Empty, None).is_err());
    volumes.delete("vol-a").unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    for dir in ["volumes", "snapshots", "layers"] {
        assert_eq!(names(&home, dir), Vec::<String>::new());
    }
}

#[test]
fn a_snapshot_of_a_machine_that_goes_on_takes_no_room_but_what_changed() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 1 << 40, &Source::Template("micro".into()), None).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    let users = |machine| [(machine as &dyn Running, vec!["vol-a".to_owned()])];
    let stack = machine.stack("vol-a");
    stack.write_at(64 * MIB, &vec![1; 16 << 20]).unwrap();
    put(&*stack, b"before");
    // Not flushed: it is in the snapshot all the same.
    stack.write_at(SECTOR, &[7; 512]).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")], &users(&machine)).unwrap();
    let had = room(&home);
    put(&*stack, b"after");
    volumes.create_snapshots(&[("snap-b", "vol-a")], &users(&machine)).unwrap();
    volumes.create_snapshots(&[("snap-b", "vol-a")], &users(&machine)).unwrap();
    stack.write_at(64 * MIB, &vec![2; 1 << 20]).unwrap();
    volumes.create_snapshots(&[("snap-c", "vol-a")], &users(&machine)).unwrap();
    let more = room(&home) - had;
    assert!((MIB..3 * MIB).contains(&more), "{more} bytes for 1 MiB and one sector, and three empty layers");
    let usage = volumes.usage().unwrap();
    assert_eq!(usage.used, room(&home));
    let [a, c, own] = ["snap-a", "snap-c", "vol-a"].map(|id| usage.of[id]);
    assert_eq!((a.layers, c.layers, own.layers), (2, 4, 5));
    // Others have all of what a snapshot has; the top layer is the volume's own.
    assert!(a.alone == 0 && a.shared > 16 * MIB && (1..MIB).contains(&own.alone), "{usage:?}");
    for (snapshot, holds) in [("snap-a", "before"), ("snap-b", "after")] {
        assert_eq!(of_snapshot(&volumes, snapshot), holds);
    }
    volumes.create("vol-b", 0, &Source::Snapshot("snap-a".into()), None).unwrap();
    let mut sector = [0; 512];
    disk(&volumes, "vol-b").read_at(SECTOR, &mut sector).unwrap();
    assert_eq!(sector, [7; 512]);
    // Its process has it, until it ends.
    assert!(!volumes.is_free("vol-a").unwrap() && volumes.is_free("vol-b").unwrap());
    assert!(volumes.files("vol-a").unwrap().open().is_err(), "two writers");
    drop((machine, stack));
    assert_eq!(start_of(&*disk(&volumes, "vol-a")), "after");
}

/// The machine hears of a cut, or it does not, and hutchd or the machine goes on without the other.
#[test]
fn a_cut_that_was_broken_off_is_carried_on() {
    for heard in [false, true] {
        for lives in [false, true] {
            let home = home();
            let volumes = open(&home);
            volumes.create("vol-a", 8 * MIB, &Source::Empty, None).unwrap();
            let machine = Fake::start(&volumes, &["vol-a"]);
            let stack = machine.stack("vol-a");
            put(&*stack, b"first");
            // The record is written; then hutchd is killed, before or after the machine heard of it.
            let record = volumes.record("vol-a").unwrap();
            volumes.create_layer("vol-a.2.qcow2", record.size).unwrap();
            let layers = ["vol-a.2.qcow2".to_owned()].into_iter().chain(record.layers.clone()).collect();
            volumes.put("vol-a", &Record { layers, cut: true, ..record }).unwrap();
            if heard {
                let path = home.path().join("layers/vol-a.2.qcow2");
                let file = File::options().read(true).write(true).open(path).unwrap();
                machine.cut(&[(serial("vol-a"), "vol-a.2.qcow2".into(), file)]).unwrap();
            }
            put(&*stack, b"second");
            let volumes = open(&home);
            tidy(&volumes, Some(&machine));
            assert_eq!(volumes.record("vol-a").unwrap().layers.len(), 2, "nobody knows yet what is sealed");
            let take = [("snap-a", "vol-a")];
            if lives {
                *machine.dead.lock().unwrap() = true;
                let users = [(&machine as &dyn Running, vec!["vol-a".to_owned()])];
                assert!(volumes.create_snapshots(&take, &users).is_err());
                assert_eq!(names(&home, "snapshots"), Vec::<String>::new());
                *machine.dead.lock().unwrap() = false;
                volumes.create_snapshots(&take, &users).unwrap();
                put(&*stack, b"third");
            } else {
                let busy = volumes.create_snapshots(&take, &[]);
                assert!(matches!(busy, Err(HostError::Busy(_))), "its process is there still: {busy:?}");
                drop((machine, stack));
                volumes.create_snapshots(&take, &[]).unwrap();
                put(&*disk(&volumes, "vol-a"), b"third");
            }
            assert_eq!(of_snapshot(&volumes, "snap-a"), "second", "heard: {heard}, lives: {lives}");
        }
    }
}

#[test]
fn what_is_deleted_gives_back_exactly_its_room() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Template("micro".into()), None).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    let stack = machine.stack("vol-a");
    let users = [(&machine as &dyn Running, vec!["vol-a".to_owned()])];
    // Each snapshot has 2 MiB of its own: the first is overwritten by the next.
    for n in 0..5_u8 {
        stack.write_at(0, &vec![n + 1; 1 << 20]).unwrap();
        stack.write_at(u64::from(n + 1) * 4 * MIB, &vec![n + 1; 1 << 20]).unwrap();
        volumes.create_snapshots(&[(&format!("snap-{n}"), "vol-a")], &users).unwrap();
    }
    let holds = |disk: &dyn Disk, last: u8| {
        let mut bytes = vec![0; 1 << 20];
        for (at, byte) in (1..=last).map(|n| (u64::from(n) * 4 * MIB, n)).chain([(0, last)]) {
            disk.read_at(at, &mut bytes).unwrap();
            assert!(bytes.iter().all(|b| *b == byte), "{at} of {last}");
        }
    };
    let all = room(&home);
    tidy(&volumes, Some(&machine));
    assert_eq!(room(&home), all, "all of it is needed");
    // In any order; what one had alone goes, what others need stays.
    for (n, alone) in [(1, MIB), (4, 0), (0, MIB), (3, MIB)] {
        let before = room(&home);
        volumes.delete_snapshot(&format!("snap-{n}")).unwrap();
        tidy(&volumes, Some(&machine));
        let freed = before as i64 - room(&home) as i64;
        // Tables and headers of a layer come and go, too.
        let off = freed - alone as i64;
        assert!(off.abs() < 512 << 10, "snap-{n} freed {freed}");
        holds(&*stack, 5);
    }
    volumes.create("vol-b", 0, &Source::Snapshot("snap-2".into()), None).unwrap();
    holds(&*disk(&volumes, "vol-b"), 3);
    volumes.delete_snapshot("snap-2").unwrap();
    tidy(&volumes, Some(&machine));
    holds(&*disk(&volumes, "vol-b"), 3);
    volumes.delete("vol-b").unwrap();
    tidy(&volumes, Some(&machine));
    holds(&*stack, 5);
    drop((stack, machine));
    volumes.settle(&["vol-a".into()]);
    tidy(&volumes, None);
    assert_eq!(volumes.record("vol-a").unwrap().layers.len(), 2, "its own, and the template");
    holds(&*disk(&volumes, "vol-a"), 5);
    assert!((6 * MIB..7 * MIB).contains(&(room(&home) - room_of_template(&home))), "{}", room(&home));
    volumes.delete("vol-a").unwrap();
    assert_eq!(names(&home, "layers"), Vec::<String>::new());
}

fn room_of_template(home: &tempfile::TempDir) -> u64 {
    let raw =
        files(&home.path().join("layers")).unwrap().into_iter().filter(|path| has_extension(path, "raw"));
    raw.map(|path| fs::metadata(path).unwrap().blocks() * 512).sum()
}

#[test]
fn a_chain_that_is_long_is_made_short_while_its_machine_runs() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 16 * MIB, &Source::Template("micro".into()), None).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    let stack = machine.stack("vol-a");
    let users = [(&machine as &dyn Running, vec!["vol-a".to_owned()])];
    let text = |n: u64| format!("write {n}");
    for n in 0..50 {
        put(&*stack, text(n).as_bytes());
        stack.write_at((n % 16) * MIB + SECTOR, &[n as u8 + 1; 512]).unwrap();
        volumes.create_snapshots(&[(&format!("snap-{n}"), "vol-a")], &users).unwrap();
        if n % 10 == 9 {
            tidy(&volumes, Some(&machine));
        }
    }
    assert!(volumes.record("vol-a").unwrap().layers.len() < 30);
    for n in [0, 20, 41, 42, 43, 49] {
        assert_eq!(of_snapshot(&volumes, &format!("snap-{n}")), text(n));
    }
    assert_eq!(start_of(&*stack), text(49));
    let mut sector = [0; 512];
    stack.read_at(15 * MIB + SECTOR, &mut sector).unwrap();
    assert_eq!(sector, [48; 512]);
    // What it was flattened to becomes its top when it stops; what it is given then is nobody's.
    drop((stack, machine));
    volumes.settle(&["vol-a".into()]);
    tidy(&volumes, None);
    for n in 50..52 {
        put(&*disk(&volumes, "vol-a"), text(n).as_bytes());
        volumes.create_snapshots(&[(&format!("snap-{n}"), "vol-a")], &[]).unwrap();
    }
    for n in 0..52 {
        assert_eq!(of_snapshot(&volumes, &format!("snap-{n}")), text(n));
    }
    (0..52).for_each(|n| volumes.delete_snapshot(&format!("snap-{n}")).unwrap());
    volumes.settle(&["vol-a".into()]);
    tidy(&volumes, None);
    assert!(volumes.record("vol-a").unwrap().layers.len() <= 2);
    assert_eq!(start_of(&*disk(&volumes, "vol-a")), text(51));
}

/// A chain that grows faster than it is made short is not made longer than a machine can open.
#[test]
fn a_volume_has_no_more_layers_than_can_be_opened() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", MIB, &Source::Empty, None).unwrap();
    let mut taken = 0;
    let refused = loop {
        match volumes.create_snapshots(&[(&format!("snap-{taken}"), "vol-a")], &[]) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
    };
    assert!((50..64).contains(&taken) && refused.to_string().contains("layers"), "{taken}: {refused}");
    put(&*disk(&volumes, "vol-a"), b"it is opened");
    tidy(&volumes, None);
    volumes.create_snapshots(&[("snap-last", "vol-a")], &[]).unwrap();
    assert_eq!(of_snapshot(&volumes, "snap-last"), "it is opened");
}

/// Layers that a machine could not be told of are on record until it was.
#[test]
fn a_machine_that_does_not_take_new_layers_keeps_the_old_ones() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Empty, None).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    let stack = machine.stack("vol-a");
    let users = [(&machine as &dyn Running, vec!["vol-a".to_owned()])];
    // The upper one is larger, so that the lower is pulled into it, behind the end that the machine knows of.
    for (n, much) in [(0, 20), (1, 30), (2, 1)] {
        stack.write_at(n * 20 * MIB, &vec![n as u8 + 1; much << 20]).unwrap();
        volumes.create_snapshots(&[(&format!("snap-{n}"), "vol-a")], &users).unwrap();
    }
    let holds = || {
        let mut byte = [0; 512];
        for (at, is) in [(0, 1), (19 * MIB, 1), (30 * MIB, 2), (40 * MIB, 3), (49 * MIB, 2)] {
            stack.read_at(at, &mut byte).unwrap();
            assert_eq!(byte, [is; 512], "at {at}");
        }
    };
    let was = volumes.record("vol-a").unwrap();
    *machine.dead.lock().unwrap() = true;
    volumes.delete_snapshot("snap-0").unwrap();
    tidy(&volumes, Some(&machine));
    assert_eq!(volumes.record("vol-a").unwrap(), was, "it reads them still");
    holds();
    *machine.dead.lock().unwrap() = false;
    volumes.tidying.wake();
    tidy(&volumes, Some(&machine));
    assert_eq!(volumes.record("vol-a").unwrap().layers.len(), was.layers.len() - 1);
    holds();
}

#[test]
fn what_is_being_copied_stays_as_it_is() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    for text in ["first", "second"] {
        put(&*disk(&volumes, "vol-a"), text.as_bytes());
        volumes.create_snapshots(&[(&format!("snap-{text}"), "vol-a")], &[]).unwrap();
    }
    let content = volumes.content(&Source::Snapshot("snap-first".into())).unwrap();
    volumes.delete_snapshot("snap-first").unwrap();
    tidy(&volumes, None);
    volumes.copy_snapshot("snap-copy", &content, None).unwrap();
    drop(content);
    tidy(&volumes, None);
    assert_eq!(of_snapshot(&volumes, "snap-copy"), "first");
    volumes.delete_snapshot("snap-copy").unwrap();
    tidy(&volumes, None);
    assert_eq!(volumes.record("vol-a").unwrap().layers.len(), 2, "nobody reads it any more");
}

#[test]
fn no_layer_changes_while_it_is_kept_still() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    for n in 0..2 {
        put(&*disk(&volumes, "vol-a"), b"something");
        volumes.create_snapshots(&[(&format!("snap-{n}"), "vol-a")], &[]).unwrap();
    }
    volumes.keep_still();
    volumes.delete_snapshot("snap-0").unwrap();
    tidy(&volumes, None);
    assert_eq!(volumes.record("vol-a").unwrap().layers.len(), 3);
    volumes.release();
    tidy(&volumes, None);
    assert_eq!(volumes.record("vol-a").unwrap().layers.len(), 2);
    assert_eq!(of_snapshot(&volumes, "snap-1"), "something");
}

#[test]
fn what_earlier_versions_kept_is_taken_over() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 8 * MIB, &Source::Template("micro".into()), None).unwrap();
    let a = disk(&volumes, "vol-a");
    a.write_at(SECTOR, &[3; 512]).unwrap();
    let top = volumes.record("vol-a").unwrap().layers.remove(0);
    drop((a, volumes));
    let (layers, old) = (home.path().join("layers"), home.path().join("volumes"));
    fs::rename(layers.join(&top), old.join("vol-a.qcow2")).unwrap();
    let base = files(&layers).unwrap().remove(0);
    fs::rename(&base, old.join("vol-a.base")).unwrap();
    fs::write(home.path().join("snapshots/snap-a.raw"), [b"kept\0".as_slice(), &[0; 507]].concat()).unwrap();
    let record = r#"{"size":8388608,"source":{"template":"micro"},"based":true}"#;
    fs::write(old.join("vol-a.json"), record).unwrap();
    for _ in 0..2 {
        let volumes = open(&home);
        let a = disk(&volumes, "vol-a");
        let mut sector = [0; 512];
        a.read_at(SECTOR, &mut sector).unwrap();
        assert_eq!((start_of(&*a), sector), ("template".into(), [3; 512]));
        assert_eq!(of_snapshot(&volumes, "snap-a"), "kept");
        assert_eq!(
            (names(&home, "volumes"), names(&home, "snapshots")),
            (vec!["vol-a.json".into()], vec!["snap-a.json".into()])
        );
    }
}

#[test]
fn a_volume_outlives_what_it_was_made_of() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 0, &Source::Template("micro".into()), None).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    volumes.create("vol-b", 0, &Source::Snapshot("snap-a".into()), None).unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    Store::open(home.path()).unwrap().remove("micro").unwrap();
    let volumes = open(&home);
    for id in ["vol-a", "vol-b"] {
        assert_eq!(start_of(&*disk(&volumes, id)), "template");
        volumes.delete(id).unwrap();
    }
    assert_eq!(names(&home, "volumes"), Vec::<String>::new());
}

/// Every state that a crash in the middle of making or deleting a volume can leave is one where it was never made.
#[test]
fn a_crash_at_any_step_leaves_a_volume_or_none() {
    let steps: [&[&str]; 4] = [
        &["layers/vol-a.1.qcow2.new"],
        &["layers/vol-a.1.qcow2"],
        &["layers/vol-a.1.qcow2", "volumes/vol-a.json.new"],
        &["layers/ami-x.raw"],
    ];
    for left in steps {
        let home = home();
        let volumes = open(&home);
        volumes.create("vol-kept", MIB, &Source::Empty, None).unwrap();
        let leave = || left.iter().for_each(|name| fs::write(home.path().join(name), "half").unwrap());
        leave();
        // Asked again by the same process (an error in between), and by the next one.
        let source = Source::Template("micro".into());
        assert!(volumes.files("vol-a").is_err(), "{left:?}");
        volumes.create("vol-a", 0, &source, None).unwrap();
        assert_eq!(start_of(&*disk(&volumes, "vol-a")), "template", "{left:?}");
        volumes.delete("vol-a").unwrap();
        leave();
        let volumes = open(&home);
        assert_eq!(
            (names(&home, "volumes"), names(&home, "layers")),
            (vec!["vol-kept.json".into()], vec![volumes.record("vol-kept").unwrap().layers.remove(0)]),
            "{left:?}"
        );
        volumes.create("vol-a", 0, &source, None).unwrap();
        assert_eq!(start_of(&*disk(&volumes, "vol-a")), "template", "{left:?}");
    }
}

#[test]
fn a_copy_of_a_snapshot_is_whole_without_it() {
    let (home, other) = (home(), home_of("elsewhere"));
    let (volumes, elsewhere) = (open(&home), open(&other));
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    put(&*disk(&volumes, "vol-a"), b"kept");
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    let content = volumes.content(&Source::Snapshot("snap-a".into())).unwrap();
    for place in [&volumes, &elsewhere] {
        place.copy_snapshot("snap-b", &content, None).unwrap();
        place.copy_snapshot("snap-b", &content, None).unwrap();
    }
    elsewhere
        .copy_snapshot("snap-t", &volumes.content(&Source::Template("micro".into())).unwrap(), None)
        .unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    assert!(matches!(volumes.content(&Source::Snapshot("snap-a".into())), Err(HostError::Missing(_))));
    for (place, snapshot, holds) in
        [(&volumes, "snap-b", "kept"), (&elsewhere, "snap-b", "kept"), (&elsewhere, "snap-t", "template")]
    {
        let id = format!("vol-{snapshot}");
        place.create(&id, 4 * MIB, &Source::Snapshot(snapshot.into()), None).unwrap();
        let disk = disk(place, &id);
        assert_eq!(start_of(&*disk), holds);
        put(&*disk, b"changed");
    }
    // What a volume writes is its own.
    volumes.create("vol-c", 4 * MIB, &Source::Snapshot("snap-b".into()), None).unwrap();
    assert_eq!(start_of(&*disk(&volumes, "vol-c")), "kept");
    let layer = Layer {
        name: "gone.raw".into(),
        path: home.path().join("gone.raw"),
        format: hutch_blockdev::Format::Raw,
        key: None,
    };
    assert!(
        volumes
            .copy_snapshot("snap-c", &Content::Layers { size: MIB, layers: vec![layer], reading: None }, None)
            .is_err()
    );
    assert_eq!(names(&home, "snapshots"), ["snap-b.json"], "nothing is left of it");
}

fn rate(per_second: u64) -> Rate {
    Rate { ops: vec![Flow { per_second, burst: 1 }], bytes: vec![] }
}

fn record(home: &tempfile::TempDir, id: &str) -> Record {
    serde_json::from_slice(&fs::read(home.path().join(format!("volumes/{id}.json"))).unwrap()).unwrap()
}

#[test]
fn a_volume_grows_where_it_lies_and_keeps_what_it_may_do() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Template("micro".into()), None).unwrap();
    assert_eq!(volumes.ready("vol-a").unwrap().1, Rate::default());
    for bytes in [8 * MIB, 8 * MIB, MIB] {
        volumes.modify("vol-a", bytes, &rate(5), None).unwrap();
        let disk = disk(&volumes, "vol-a");
        assert_eq!((disk.size(), start_of(&*disk)), (8 * MIB, "template".into()));
    }
    assert_eq!(open(&home).ready("vol-a").unwrap().1, rate(5));
    assert_eq!(record(&home, "vol-a").growing, None);
    assert!(matches!(volumes.modify("vol-none", MIB, &rate(1), None), Err(HostError::Missing(_))));
    // Larger than its tables reach: it is as it was.
    let huge = volumes.modify("vol-a", 1 << 50, &rate(6), None);
    assert!(matches!(huge, Err(HostError::NoRoom(_))), "{huge:?}");
    let kept = record(&home, "vol-a");
    assert_eq!((kept.size, kept.growing, kept.rate), (8 * MIB, None, rate(5)));
    assert_eq!(disk(&volumes, "vol-a").size(), 8 * MIB);
}

#[test]
fn a_growth_that_was_cut_short_goes_on() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    let half = Record { size: 8 * MIB, growing: Some(4 * MIB), ..record(&home, "vol-a") };
    for finish in [0, 1] {
        // The record was written, and then the process was killed.
        volumes.put("vol-a", &Record { size: half.size << finish, ..half.clone() }).unwrap();
        let volumes = open(&home);
        match finish {
            0 => volumes.modify("vol-a", 8 * MIB, &Rate::default(), None).unwrap(),
            _ => drop(volumes.ready("vol-a").unwrap()),
        }
        assert_eq!(disk(&volumes, "vol-a").size(), (8 * MIB) << finish);
        assert_eq!(record(&home, "vol-a").growing, None);
    }
}

#[test]
fn a_machine_that_has_the_volume_is_told_once_and_does_it_itself() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 4 * MIB, &Source::Empty, None).unwrap();
    let asked = Mutex::new(Vec::new());
    let obeys = |size: u64, rate: &Rate| {
        asked.lock().unwrap().push((size, rate.clone()));
        Ok(())
    };
    let silent = |_: u64, _: &Rate| Err(HostError::Failed("it does not answer".into()));
    let refuses = |_: u64, _: &Rate| Err(HostError::NoRoom("it refuses".into()));
    // While it does not answer, what is meant stays recorded.
    assert!(volumes.modify("vol-a", 8 * MIB, &rate(5), Some(&silent)).is_err());
    assert_eq!(record(&home, "vol-a").growing, Some(4 * MIB));
    for _ in 0..2 {
        volumes.modify("vol-a", 8 * MIB, &rate(5), Some(&obeys)).unwrap();
    }
    volumes.modify("vol-a", 8 * MIB, &rate(6), Some(&obeys)).unwrap();
    // The next daemon cannot know whether it was told.
    for _ in 0..2 {
        open(&home).modify("vol-a", 8 * MIB, &rate(6), Some(&obeys)).unwrap();
    }
    let told = [(8 * MIB, rate(5)), (8 * MIB, rate(6)), (8 * MIB, rate(6)), (8 * MIB, rate(6))];
    assert_eq!(*asked.lock().unwrap(), told);
    assert!(volumes.modify("vol-a", 16 * MIB, &rate(7), Some(&refuses)).is_err());
    let kept = record(&home, "vol-a");
    assert_eq!((kept.size, kept.growing, kept.rate), (8 * MIB, None, rate(6)), "as it was");
    assert_eq!(disk(&volumes, "vol-a").size(), 4 * MIB, "only the machine writes to it");
}

#[test]
fn snapshots_of_one_instant_are_all_there_or_made_anew() {
    let home = home();
    let volumes = open(&home);
    for id in ["vol-a", "vol-b"] {
        volumes.create(id, 4 * MIB, &Source::Empty, None).unwrap();
        put(&*disk(&volumes, id), b"first");
    }
    let both = [("snap-a", "vol-a"), ("snap-b", "vol-b")];
    let none = volumes.create_snapshots(&[("snap-a", "vol-a"), ("snap-b", "vol-none")], &[]);
    assert!(matches!(none, Err(HostError::Missing(_))), "{none:?}");
    assert_eq!(names(&home, "snapshots"), Vec::<String>::new());
    volumes.create_snapshots(&both, &[]).unwrap();
    // Killed between the two: what was taken is of another instant.
    volumes.delete_snapshot("snap-b").unwrap();
    for id in ["vol-a", "vol-b"] {
        put(&*disk(&volumes, id), b"later");
    }
    drop(volumes);
    for _ in 0..2 {
        let volumes = open(&home);
        volumes.create_snapshots(&both, &[]).unwrap();
        put(&*disk(&volumes, "vol-a"), b"last");
    }
    let volumes = open(&home);
    for (snapshot, _) in both {
        let id = format!("vol-{snapshot}");
        volumes.create(&id, 0, &Source::Snapshot(snapshot.into()), None).unwrap();
        assert_eq!(start_of(&*disk(&volumes, &id)), "later");
    }
}

#[test]
fn who_holds_a_volume_has_it_alone() {
    let home = home();
    let volumes = open(&home);
    let order = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let both = volumes.hold(["vol-a", "vol-b"]);
        let waits = scope.spawn(|| {
            let _held = volumes.hold(["vol-b", "vol-c"]);
            order.lock().unwrap().push("second");
        });
        drop(volumes.hold(["vol-c", "vol-d"]));
        order.lock().unwrap().push("first");
        drop(both);
        waits.join().unwrap();
    });
    assert_eq!(*order.lock().unwrap(), ["first", "second"]);
    drop(volumes.hold(["vol-a", "vol-b", "vol-c"]));
}
