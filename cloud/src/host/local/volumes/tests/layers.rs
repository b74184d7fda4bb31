//! Layers that come with snapshots, and become fewer.

use super::*;

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

/// Two volumes on two layers that only they have, of which the lower one may be in a small file.
fn two_on_two(volumes: &Volumes, size: u64) {
    volumes.create("vol-a", 8 * MIB, &Source::Empty, None).unwrap();
    put(&*disk(volumes, "vol-a"), b"lower");
    volumes.create_snapshots(&[("snap-l", "vol-a")], &[]).unwrap();
    volumes.create("vol-m", size, &Source::Snapshot("snap-l".into()), None).unwrap();
    disk(volumes, "vol-m").write_at(MIB, &[5; 512]).unwrap();
    volumes.create_snapshots(&[("snap-u", "vol-m")], &[]).unwrap();
    for id in ["vol-b", "vol-c"] {
        volumes.create(id, size, &Source::Snapshot("snap-u".into()), None).unwrap();
    }
    volumes.delete("vol-a").unwrap();
    volumes.delete("vol-m").unwrap();
    volumes.delete_snapshot("snap-u").unwrap();
    volumes.delete_snapshot("snap-l").unwrap();
}

fn lengths(volumes: &Volumes) -> Vec<usize> {
    ["vol-b", "vol-c"].map(|id| volumes.record(id).unwrap().layers.len()).to_vec()
}

fn hold_both(volumes: &Volumes) {
    for id in ["vol-b", "vol-c"] {
        let disk = disk(volumes, id);
        let mut sector = vec![0; 512];
        disk.read_at(MIB, &mut sector).unwrap();
        assert_eq!((start_of(&*disk), sector), ("lower".into(), vec![5; 512]));
    }
}

#[test]
fn a_merge_that_was_broken_off_between_records_is_carried_on() {
    let home = home();
    let volumes = open(&home);
    two_on_two(&volumes, 8 * MIB);
    assert_eq!(lengths(&volumes), [3, 3]);
    volumes.tidy(&|volume, job| match volume {
        "vol-c" => Err(HostError::Failed("the daemon is killed".into())),
        _ => job(None),
    });
    assert_eq!(lengths(&volumes), [2, 3], "one has heard of it");
    drop(volumes);
    let volumes = open(&home);
    hold_both(&volumes);
    tidy(&volumes, None);
    assert_eq!(lengths(&volumes), [2, 2]);
    assert_eq!(names(&home, "layers").len(), 3, "two tops, and what they lie on");
    assert!(!home.path().join("merging.json").exists());
    hold_both(&volumes);
}

#[test]
fn a_layer_that_cannot_be_large_enough_is_written_into_the_larger_one() {
    let home = home();
    let volumes = open(&home);
    // More than the tables of the lower one were made for.
    two_on_two(&volumes, 5 << 40);
    tidy(&volumes, None);
    assert_eq!(lengths(&volumes), [2, 2]);
    hold_both(&volumes);
}

#[test]
fn a_copy_that_fails_leaves_no_names_of_layers() {
    let home = home();
    let volumes = open(&home);
    two_on_two(&volumes, 8 * MIB);
    volumes.create_snapshots(&[("snap-b", "vol-b")], &[]).unwrap();
    let Content::Layers { size, mut layers, .. } =
        volumes.content(&Source::Snapshot("snap-b".into())).unwrap()
    else {
        panic!("it has layers")
    };
    let other = home_of("other");
    let there = open(&other);
    // The last one is there, and cannot be given one more name.
    let last = layers.last_mut().unwrap();
    last.path = home.path().to_owned();
    last.name = "last.qcow2".into();
    there.copy_snapshot("snap-x", &Content::Layers { size, layers, reading: None }, None).unwrap_err();
    assert_eq!(names(&other, "layers"), Vec::<String>::new());
}
