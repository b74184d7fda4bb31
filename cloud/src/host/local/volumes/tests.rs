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
mod growth;
mod layers;
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
