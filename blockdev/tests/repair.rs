//! Volumes that are damaged in every way there is, and repaired: what of them is kept, what not, and what a crash in the middle leaves.

mod support;

use std::ops::Range;
use std::sync::Arc;

use hutch_blockdev::qcow2::{Header, check, create, create_encrypted, repair};
use hutch_blockdev::{Disk, Qcow2Disk};
use support::{Event, MemStore, Random, key, qemu_check};

const CLUSTER: u64 = 65536;
const MIB: u64 = 1 << 20;
/// Two L2 tables, the second of which reaches past the disk's end.
const SIZE: u64 = 600 * MIB;
/// Guest clusters that hold data.
const HELD: [u64; 7] = [0, 1, 2, 5, 8191, 8192, 8195];

fn bytes_of(index: u64) -> Vec<u8> {
    vec![(index * 13 + 1) as u8; CLUSTER as usize]
}

fn open(store: &MemStore) -> Qcow2Disk {
    Qcow2Disk::on(Arc::new(store.clone()), None, false).unwrap()
}

fn volume() -> MemStore {
    let store = MemStore::default();
    create(&store, SIZE).unwrap();
    let disk = open(&store);
    for index in HELD {
        disk.write_at(index * CLUSTER, &bytes_of(index)).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    store
}

fn get(store: &MemStore, at: u64) -> u64 {
    let state = store.0.lock().unwrap();
    u64::from_be_bytes(state.bytes[at as usize..at as usize + 8].try_into().unwrap())
}

fn put(store: &MemStore, at: u64, value: u64) {
    store.0.lock().unwrap().apply(&Event::Write(at, value.to_be_bytes().to_vec()));
}

/// Where things of a volume are.
struct At(Header);

impl At {
    fn l1(&self, index: u64) -> u64 {
        self.0.l1_offset + index * 8
    }
    fn table(&self, store: &MemStore, index: u64) -> u64 {
        get(store, self.l1(index)) & 0x00ff_ffff_ffff_fe00
    }
    fn entry(&self, store: &MemStore, guest: u64) -> u64 {
        self.table(store, guest / 8192) + guest % 8192 * 8
    }
    fn host(&self, store: &MemStore, guest: u64) -> u64 {
        get(store, self.entry(store, guest)) & 0x00ff_ffff_ffff_fe00
    }
    fn block(&self, store: &MemStore) -> u64 {
        get(store, self.0.reftable_offset)
    }
}

type Damage = fn(&MemStore, &At);
type Case = (&'static str, Damage, Vec<Range<u64>>, Vec<Range<u64>>);

fn clusters(first: u64, end: u64) -> Range<u64> {
    first * CLUSTER..(end * CLUSTER).min(SIZE)
}

/// Each damage, what is lost by it, and what is shared.
fn cases() -> Vec<Case> {
    const COPIED: u64 = 1 << 63;
    let one = |first| vec![clusters(first, first + 1)];
    vec![
        ("a leak", |s, at| put(s, at.entry(s, 5), 0), vec![], vec![]),
        ("wrong counts", |s, at| put(s, at.block(s) + 8, 0x0002_0000_0001_0007), vec![], vec![]),
        ("no counts", |s, at| (0..64).for_each(|i| put(s, at.block(s) + i * 8, 0)), vec![], vec![]),
        ("no refcount block", |s, at| put(s, at.0.reftable_offset, 0), vec![], vec![]),
        ("a block outside", |s, at| put(s, at.0.reftable_offset, 1 << 40), vec![], vec![]),
        ("an unaligned block", |s, at| put(s, at.0.reftable_offset, 3 * CLUSTER + 512), vec![], vec![]),
        ("a block that is a table", |s, at| put(s, at.0.reftable_offset, at.table(s, 1)), vec![], vec![]),
        ("a block that is data", |s, at| put(s, at.0.reftable_offset, at.host(s, 2)), vec![], one(2)),
        ("dirty", |s, _| put(s, 72, 1), vec![], vec![]),
        ("corrupt", |s, _| put(s, 72, 2), vec![], vec![]),
        ("not its own", |s, at| put(s, at.entry(s, 1), at.host(s, 1)), vec![], vec![]),
        ("a table not its own", |s, at| put(s, at.l1(1), at.table(s, 1)), vec![], vec![]),
        ("outside", |s, at| put(s, at.entry(s, 1), COPIED | 1 << 40), one(1), vec![]),
        (
            "just outside",
            |s, at| {
                let end = s.0.lock().unwrap().bytes.len() as u64;
                put(s, at.entry(s, 1), COPIED | end);
            },
            one(1),
            vec![],
        ),
        ("unaligned", |s, at| put(s, at.entry(s, 2), COPIED | at.host(s, 2) | 512), one(2), vec![]),
        ("compressed", |s, at| put(s, at.entry(s, 0), 1 << 62 | 0x1234), one(0), vec![]),
        ("bits that mean nothing", |s, at| put(s, at.entry(s, 0), 1 << 60 | at.host(s, 0)), one(0), vec![]),
        ("data that is a block", |s, at| put(s, at.entry(s, 7), COPIED | at.block(s)), vec![], one(7)),
        ("data that is counts", |s, at| put(s, at.entry(s, 7), COPIED | CLUSTER), one(7), vec![]),
        ("data that is a table", |s, at| put(s, at.entry(s, 7), COPIED | at.table(s, 0)), one(7), vec![]),
        (
            "data of two",
            |s, at| put(s, at.entry(s, 8195), COPIED | at.host(s, 1)),
            vec![],
            vec![clusters(1, 2), clusters(8195, 8196)],
        ),
        (
            "data of three",
            |s, at| {
                put(s, at.entry(s, 1), COPIED | at.host(s, 0));
                put(s, at.entry(s, 7), COPIED | at.host(s, 0));
            },
            vec![],
            vec![clusters(0, 2), clusters(7, 8)],
        ),
        (
            "past the disk's end",
            |s, at| {
                put(s, at.table(s, 1) + 8191 * 8, COPIED | at.host(s, 0));
                put(s, at.table(s, 1) + 8190 * 8, 1 << 60);
            },
            vec![],
            vec![],
        ),
        ("a table outside", |s, at| put(s, at.l1(1), COPIED | 1 << 40), vec![clusters(8192, 9600)], vec![]),
        ("no table", |s, at| put(s, at.l1(0), 0), vec![clusters(0, 8192)], vec![]),
        (
            "a table that is the L1 table",
            |s, at| put(s, at.l1(0), COPIED | at.0.l1_offset),
            vec![clusters(0, 8192)],
            vec![],
        ),
        ("a table that is data", |s, at| put(s, at.l1(1), COPIED | at.host(s, 0)), vec![], vec![]),
        (
            "one table for two",
            |s, at| put(s, at.l1(1), COPIED | at.table(s, 0)),
            vec![],
            vec![clusters(0, 3), clusters(5, 6), clusters(8192, 8195), clusters(8197, 8198)],
        ),
        ("tables behind the disk's", |s, at| put(s, at.l1(2), 5), vec![], vec![]),
        (
            "cut off",
            |s, at| {
                let end = at.host(s, 8192) as usize + 1000;
                s.0.lock().unwrap().bytes.truncate(end);
            },
            one(8195),
            vec![],
        ),
    ]
}

/// QEMU finds nothing, too.
fn assert_clean(name: &str, store: &MemStore) {
    if let Some((status, text)) = qemu_check(&store.0.lock().unwrap().bytes) {
        assert_eq!(status, 0, "{name}: {text}");
    }
}

fn content(disk: &dyn Disk, index: u64) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTER as usize];
    disk.read_at(index * CLUSTER, &mut bytes).unwrap();
    bytes
}

/// What is whole is as it was, what was lost is zeros; the file is clean for us and for QEMU, and can be written.
fn assert_repaired(name: &str, store: &MemStore, lost: &[Range<u64>], shared: &[Range<u64>]) {
    let odd = odd(name);
    let found = check(store).unwrap().unwrap();
    assert_eq!((found.wrong, found.leaked, &found.faults[..]), (0, 0, &[][..]), "{name}");
    let disk = open(store);
    let within = |of: &[Range<u64>], index: u64| of.iter().any(|range| range.contains(&(index * CLUSTER)));
    for index in (0..10).chain(8190..8200).filter(|index| !odd.contains(index)) {
        let bytes = content(&disk, index);
        if within(lost, index) {
            assert!(bytes == vec![0; CLUSTER as usize], "{name}: {index}");
        } else if within(shared, index) {
            let of_counts = name == "data that is a block";
            assert!(of_counts || HELD.iter().any(|held| bytes == bytes_of(*held)), "{name}: {index}");
        } else if HELD.contains(&index) {
            assert!(bytes == bytes_of(index), "{name}: {index}");
        }
    }
    if let Some((first, others)) = shared.split_first() {
        disk.write_at(first.start, &bytes_of(99)).unwrap();
        for other in others {
            assert!(content(&disk, other.start / CLUSTER) != bytes_of(99), "{name}: a copy each");
        }
    }
    drop(disk);
}

/// Guest clusters of which nothing can be said: a table that never was one, a cluster cut through.
fn odd(name: &str) -> Vec<u64> {
    match name {
        "a table that is data" => vec![0, 8192, 8193, 8194, 8195, 8196, 8197, 8198, 8199],
        "a leak" => vec![5],
        "one table for two" => vec![8195],
        "cut off" => vec![8192],
        _ => vec![],
    }
}

#[test]
fn what_is_damaged_is_repaired_and_what_would_be_lost_is_asked_for() {
    for (name, damage, lost, shared) in cases() {
        let store = volume();
        damage(&store, &At(Header::read(&store).unwrap()));
        let before = store.0.lock().unwrap().bytes.clone();
        let found = check(&store).unwrap().unwrap();
        assert!(found.wrong + found.leaked > 0, "{name}");
        if name != "a table that is data" {
            assert_eq!((&found.lost, &found.shared), (&lost, &shared), "{name}");
        }
        let tried = repair(&store, false).unwrap().unwrap();
        assert_eq!(tried.found, found, "{name}");
        assert_eq!(tried.done, found.keeps_all(), "{name}");
        if !tried.done {
            assert!(store.0.lock().unwrap().bytes == before, "{name}: nothing is written");
            assert!(repair(&store, true).unwrap().unwrap().done, "{name}");
        }
        assert_clean(name, &store);
        assert_repaired(name, &store, &found.lost, &found.shared);
        // Whole, it stays as it is.
        let whole = store.0.lock().unwrap().bytes.clone();
        let again = repair(&store, false).unwrap().unwrap();
        assert!(again.done && again.found.wrong == 0 && store.0.lock().unwrap().bytes == whole, "{name}");
    }
}

#[test]
fn a_crash_at_any_step_leaves_what_can_be_repaired() {
    let mut random = Random(7);
    for (case, (name, damage, _, _)) in cases().into_iter().enumerate() {
        let store = volume();
        damage(&store, &At(Header::read(&store).unwrap()));
        let found = check(&store).unwrap().unwrap();
        let before = store.0.lock().unwrap().bytes.clone();
        store.0.lock().unwrap().record = true;
        repair(&store, true).unwrap();
        let log = store.0.lock().unwrap().log.clone();
        // Among the cases each step comes.
        for end in (0..log.len()).filter(|end| end % 4 == case % 4) {
            let synced = log[..end].iter().rposition(|event| matches!(event, Event::Sync)).unwrap_or(0);
            for lose in [false, true] {
                let crashed = MemStore::default();
                {
                    let mut state = crashed.0.lock().unwrap();
                    state.bytes = before.clone();
                    for (at, event) in log[..end].iter().enumerate() {
                        // What was not synced may be there or not.
                        if !lose || at < synced || random.one_in(2) {
                            state.apply(event);
                        }
                    }
                }
                let done = repair(&crashed, true).unwrap().unwrap();
                assert!(done.done, "{name}");
                // A range whose table is nowhere is asked for again; nothing else is.
                let covered = |range: &Range<u64>, of: &[Range<u64>]| {
                    of.iter().any(|have| have.start <= range.start && range.end <= have.end)
                };
                assert!(done.found.lost.iter().all(|range| covered(range, &found.lost)), "{name}, {end}");
                let file = crashed.0.lock().unwrap().bytes.len() as u64;
                assert!(file <= before.len() as u64 + 20 * CLUSTER, "{name}: it does not grow each time");
                assert_repaired(name, &crashed, &found.lost, &found.shared);
                if lose && random.one_in(10) {
                    assert_clean(name, &crashed);
                }
            }
        }
    }
}

#[test]
fn a_full_host_stops_a_repair_which_is_done_later() {
    let (name, damage, ..) = cases().into_iter().find(|case| case.0 == "one table for two").unwrap();
    for after in 0.. {
        let store = volume();
        damage(&store, &At(Header::read(&store).unwrap()));
        let found = check(&store).unwrap().unwrap();
        store.0.lock().unwrap().fault = Some((after, support::Fault::Short, false));
        let tried = repair(&store, true);
        let failed = store.0.lock().unwrap().faults > 0;
        assert_eq!(tried.is_err(), failed, "{name}, {after}");
        store.0.lock().unwrap().fault = None;
        assert!(repair(&store, true).unwrap().unwrap().done);
        assert_repaired(name, &store, &found.lost, &found.shared);
        if !failed {
            break;
        }
    }
}

#[test]
fn an_encrypted_volume_needs_no_key_to_be_repaired() {
    let store = MemStore::default();
    create_encrypted(&store, SIZE, &key(1)).unwrap();
    let open = || Qcow2Disk::with_key(Arc::new(store.clone()), None, Some(&key(1)), false).unwrap();
    let disk = open();
    HELD.iter().for_each(|index| disk.write_at(index * CLUSTER, &bytes_of(*index)).unwrap());
    drop(disk);
    let at = At(Header::read(&store).unwrap());
    put(&store, at.entry(&store, 1), 1 << 63 | at.host(&store, 0));
    let done = repair(&store, true).unwrap().unwrap();
    assert_eq!((done.done, &done.found.shared[..]), (true, &[clusters(0, 2)][..]));
    let disk = open();
    assert!(content(&disk, 0) == bytes_of(0), "whose it is has it");
    assert!(content(&disk, 1) != bytes_of(0), "to the other it is noise");
    assert!(content(&disk, 5) == bytes_of(5));
}

#[test]
fn what_has_no_header_or_is_not_ours_is_left_alone() {
    let store = volume();
    put(&store, 40, 1 << 50);
    let before = store.0.lock().unwrap().bytes.clone();
    repair(&store, true).unwrap_err();
    put(&store, 40, CLUSTER);
    assert!(
        repair(&store, true).unwrap_err().to_string().contains("restore"),
        "L1 and refcount table are one"
    );
    put(&store, 40, 1 << 50);
    assert!(store.0.lock().unwrap().bytes == before);
}
