use std::os::unix::fs::MetadataExt;

use hutch_blockdev::open_layers;
use hutch_imagestore::store::{Architecture, Format, Kind, Origin};
use hutch_vmm::config::Flow;

use super::*;

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

fn open(home: &tempfile::TempDir) -> Volumes {
    Volumes::open(home.path(), Store::open(home.path()).unwrap()).unwrap()
}

fn disk(volumes: &Volumes, id: &str) -> Arc<dyn Disk> {
    let files = volumes.files(id).unwrap();
    let top = File::options().read(true).write(true).open(&files.top).unwrap();
    let mut layers = vec![(top, hutch_blockdev::Format::Qcow2)];
    layers.extend(files.base.map(|path| (File::open(path).unwrap(), hutch_blockdev::Format::Raw)));
    open_layers(layers, false).unwrap()
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
    volumes.create("vol-a", 8 * MIB, &source).unwrap();
    let a = disk(&volumes, "vol-a");
    assert_eq!((a.size(), start_of(&*a)), (8 * MIB, "template".into()));
    put(&*a, b"written");
    drop(a);
    volumes.create("vol-a", 8 * MIB, &source).unwrap();
    drop(volumes);
    assert_eq!(start_of(&*disk(&open(&home), "vol-a")), "written");
    // At least its source's size.
    open(&home).create("vol-b", MIB, &source).unwrap();
    assert_eq!(disk(&open(&home), "vol-b").size(), 4 * MIB);
}

#[test]
fn what_is_not_there_is_missing_and_leaves_nothing() {
    let home = home();
    let volumes = open(&home);
    for source in [Source::Template("none".into()), Source::Snapshot("snap-none".into())] {
        let made = volumes.create("vol-a", MIB, &source);
        assert!(matches!(made, Err(HostError::Missing(_))), "{made:?}");
    }
    assert!(matches!(volumes.files("vol-a"), Err(HostError::Missing(_))));
    assert!(matches!(volumes.create_snapshots(&[("snap-a", "vol-a")]), Err(HostError::Missing(_))));
    assert!(volumes.create("../vol", MIB, &Source::Empty).is_err());
    volumes.delete("vol-a").unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    assert_eq!((names(&home, "volumes"), names(&home, "snapshots")), (vec![], vec![]));
}

#[test]
fn a_snapshot_holds_what_the_volume_held_with_holes() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Template("micro".into())).unwrap();
    let a = disk(&volumes, "vol-a");
    put(&*a, b"before");
    // The volume is open for writing here, as a paused machine has it.
    volumes.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    put(&*a, b"after");
    volumes.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    let size = fs::metadata(home.path().join("snapshots/snap-a.raw")).unwrap();
    assert_eq!(size.len(), 64 * MIB);
    assert!(size.blocks() * 512 <= MIB, "{} blocks", size.blocks());
    volumes.create("vol-b", 0, &Source::Snapshot("snap-a".into())).unwrap();
    assert_eq!(start_of(&*disk(&volumes, "vol-b")), "before");
}

#[test]
fn a_volume_outlives_what_it_was_made_of() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 0, &Source::Template("micro".into())).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    volumes.create("vol-b", 0, &Source::Snapshot("snap-a".into())).unwrap();
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
    let steps: [&[&str]; 5] = [
        &["vol-a.base"],
        &["vol-a.base", "vol-a.qcow2.new"],
        &["vol-a.base", "vol-a.qcow2"],
        &["vol-a.base", "vol-a.qcow2", "vol-a.json.new"],
        &["vol-a.qcow2"],
    ];
    for left in steps {
        let home = home();
        let volumes = open(&home);
        volumes.create("vol-kept", MIB, &Source::Empty).unwrap();
        for name in left {
            fs::write(home.path().join("volumes").join(name), "half").unwrap();
        }
        // Asked again by the same process (an error in between), and by the next one.
        let source = Source::Template("micro".into());
        assert!(volumes.files("vol-a").is_err(), "{left:?}");
        volumes.create("vol-a", 0, &source).unwrap();
        assert_eq!(start_of(&*disk(&volumes, "vol-a")), "template", "{left:?}");
        volumes.delete("vol-a").unwrap();
        for name in left {
            fs::write(home.path().join("volumes").join(name), "half").unwrap();
        }
        let volumes = open(&home);
        assert_eq!(names(&home, "volumes"), ["vol-kept.json", "vol-kept.qcow2"], "{left:?}");
        volumes.create("vol-a", 0, &source).unwrap();
        assert_eq!(start_of(&*disk(&volumes, "vol-a")), "template", "{left:?}");
    }
}

#[test]
fn a_copy_of_a_snapshot_is_whole_without_it() {
    let (home, other) = (home(), home_of("elsewhere"));
    let (volumes, elsewhere) = (open(&home), open(&other));
    volumes.create("vol-a", 4 * MIB, &Source::Empty).unwrap();
    put(&*disk(&volumes, "vol-a"), b"kept");
    volumes.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    let content = volumes.content(&Source::Snapshot("snap-a".into())).unwrap();
    for place in [&volumes, &elsewhere] {
        place.copy_snapshot("snap-b", &content).unwrap();
        place.copy_snapshot("snap-b", &content).unwrap();
    }
    elsewhere.copy_snapshot("snap-t", &volumes.content(&Source::Template("micro".into())).unwrap()).unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    assert!(matches!(volumes.content(&Source::Snapshot("snap-a".into())), Err(HostError::Missing(_))));
    for (place, snapshot, holds) in
        [(&volumes, "snap-b", "kept"), (&elsewhere, "snap-b", "kept"), (&elsewhere, "snap-t", "template")]
    {
        let id = format!("vol-{snapshot}");
        place.create(&id, 4 * MIB, &Source::Snapshot(snapshot.into())).unwrap();
        let disk = disk(place, &id);
        assert_eq!(start_of(&*disk), holds);
        put(&*disk, b"changed");
    }
    // What a volume writes is its own.
    volumes.create("vol-c", 4 * MIB, &Source::Snapshot("snap-b".into())).unwrap();
    assert_eq!(start_of(&*disk(&volumes, "vol-c")), "kept");
    let gone = home.path().join("snapshots/gone.raw");
    assert!(volumes.copy_snapshot("snap-c", &Content::File(gone)).is_err());
    assert_eq!(names(&home, "snapshots"), ["snap-b.raw"], "nothing is left of it");
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
    volumes.create("vol-a", 4 * MIB, &Source::Template("micro".into())).unwrap();
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
    volumes.create("vol-a", 4 * MIB, &Source::Empty).unwrap();
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
    volumes.create("vol-a", 4 * MIB, &Source::Empty).unwrap();
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
        volumes.create(id, 4 * MIB, &Source::Empty).unwrap();
        put(&*disk(&volumes, id), b"first");
    }
    let both = [("snap-a", "vol-a"), ("snap-b", "vol-b")];
    let none = volumes.create_snapshots(&[("snap-a", "vol-a"), ("snap-b", "vol-none")]);
    assert!(matches!(none, Err(HostError::Missing(_))), "{none:?}");
    assert_eq!(names(&home, "snapshots"), Vec::<String>::new());
    volumes.create_snapshots(&both).unwrap();
    // Killed between the two: what was taken is of another instant.
    volumes.delete_snapshot("snap-b").unwrap();
    for id in ["vol-a", "vol-b"] {
        put(&*disk(&volumes, id), b"later");
    }
    for _ in 0..2 {
        open(&home).create_snapshots(&both).unwrap();
        put(&*disk(&volumes, "vol-a"), b"last");
    }
    for (snapshot, _) in both {
        let id = format!("vol-{snapshot}");
        volumes.create(&id, 0, &Source::Snapshot(snapshot.into())).unwrap();
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
