//! Volumes that are damaged in every way there is, and repaired: what of them is kept, what not, and what a crash in the middle leaves.

mod support;

use std::ops::Range;
use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Checked, Header, Repaired, create, create_encrypted};
use hutch_blockdev::{Disk, Qcow2Disk, Result};
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

fn check(store: &MemStore) -> Result<Option<Checked>> {
    qcow2::check(store, &(0..=u64::MAX))
}

fn repair(store: &MemStore, discard: bool) -> Result<Option<Repaired>> {
    qcow2::repair(store, discard, &(0..=u64::MAX), u64::MAX)
}

fn open(store: &MemStore) -> Qcow2Disk {
    Qcow2Disk::on(Arc::new(store.clone()), None, false).unwrap()
}

fn volume() -> MemStore {
    volume_of(SIZE, &HELD)
}

fn volume_of(size: u64, held: &[u64]) -> MemStore {
    let store = MemStore::default();
    create(&store, size).unwrap();
    let disk = open(&store);
    for index in held {
        disk.write_at(index * CLUSTER, &bytes_of(*index)).unwrap();
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

fn count(store: &MemStore, at: &At, host: u64, count: u16) {
    let at = at.block(store) + host / CLUSTER * 2;
    store.0.lock().unwrap().apply(&Event::Write(at, count.to_be_bytes().to_vec()));
}

fn clusters(first: u64, end: u64) -> Range<u64> {
    first * CLUSTER..(end * CLUSTER).min(SIZE)
}

/// Each damage, what is lost by it, and what is shared.
fn cases() -> Vec<Case> {
    const COPIED: u64 = 1 << 63;
    let one = |first| vec![clusters(first, first + 1)];
    vec![
        ("a leak", |s, at| put(s, at.entry(s, 5), 0), vec![], vec![]),
        ("wrong counts", |s, at| put(s, at.block(s) + 8, 0x0002_0003_0001_0007), vec![], vec![]),
        (
            "a table counted as free",
            |s, at| count(s, at, at.table(s, 1), 0),
            vec![],
            vec![clusters(8192, 9600)],
        ),
        ("data counted as free", |s, at| count(s, at, at.host(s, 5), 0), vec![], one(5)),
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
        (
            "a table that is data",
            |s, at| put(s, at.l1(1), COPIED | at.host(s, 0)),
            vec![clusters(0, 1), clusters(8192, 9600)],
            // Its own is there, too, and nothing leads to it.
            vec![clusters(8192, 9600)],
        ),
        (
            "one table for two",
            |s, at| put(s, at.l1(1), COPIED | at.table(s, 0)),
            vec![],
            vec![clusters(0, 9600)],
        ),
        ("tables behind the disk's", |s, at| put(s, at.l1(2), 5), vec![], vec![]),
        (
            "cut off",
            |s, at| {
                let end = at.host(s, 8192) as usize + 1000;
                s.0.lock().unwrap().bytes.truncate(end);
            },
            vec![clusters(8192, 8193), clusters(8195, 8196)],
            vec![],
        ),
        (
            "cut off in a table",
            |s, at| {
                let end = at.table(s, 1) as usize + 1000;
                s.0.lock().unwrap().bytes.truncate(end);
            },
            vec![clusters(0, 3), clusters(5, 6), clusters(8191, 9600)],
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
    let found = check(store).unwrap().unwrap();
    assert_eq!((found.wrong, found.leaked, &found.faults[..]), (0, 0, &[][..]), "{name}");
    let disk = open(store);
    let within = |of: &[Range<u64>], index: u64| of.iter().any(|range| range.contains(&(index * CLUSTER)));
    for index in (0..10).chain(8190..8200) {
        let bytes = content(&disk, index);
        if within(lost, index) {
            assert!(bytes == vec![0; CLUSTER as usize], "{name}: {index}");
        } else if within(shared, index) {
            // What the first has of what two share is the others', too.
            let first = match (name, index) {
                ("one table for two", index) => index % 8192,
                ("data of three", 7) => 0,
                _ => index,
            };
            let right = match HELD.contains(&first) {
                true => HELD.iter().any(|held| bytes == bytes_of(*held)),
                false => bytes == vec![0; CLUSTER as usize],
            };
            assert!(name == "data that is a block" || right, "{name}: {index}");
        } else if HELD.contains(&index) && !(name == "a leak" && index == 5) {
            assert!(bytes == bytes_of(index), "{name}: {index}");
        } else {
            assert!(bytes == vec![0; CLUSTER as usize], "{name}: {index}");
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

#[test]
fn what_is_damaged_is_repaired_and_what_would_be_lost_is_asked_for() {
    for (name, damage, lost, shared) in cases() {
        let store = volume();
        damage(&store, &At(Header::read(&store).unwrap()));
        let before = store.0.lock().unwrap().bytes.clone();
        let found = check(&store).unwrap().unwrap();
        assert!(found.wrong + found.leaked > 0, "{name}");
        assert_eq!((&found.lost, &found.shared), (&lost, &shared), "{name}");
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
fn a_repair_that_fails_again_and_again_takes_no_more_room() {
    for (name, discard) in
        [("one table for two", true), ("data of three", true), ("no refcount block", false)]
    {
        let (_, damage, ..) = cases().into_iter().find(|case| case.0 == name).unwrap();
        for after in 0.. {
            let store = volume();
            damage(&store, &At(Header::read(&store).unwrap()));
            let mut lens = Vec::new();
            let mut failed = true;
            for _ in 0..4 {
                let mut state = store.0.lock().unwrap();
                (state.fault, state.faults) = (Some((after, support::Fault::Short, true)), 0);
                drop(state);
                failed &= repair(&store, discard).is_err();
                lens.push(store.0.lock().unwrap().bytes.len());
            }
            assert!(lens.iter().all(|len| *len <= lens[0]), "{name}, {after}: {lens:?}");
            store.0.lock().unwrap().fault = None;
            if !failed {
                break;
            }
            assert!(repair(&store, true).unwrap().unwrap().done, "{name}, {after}");
            assert_eq!(check(&store).unwrap().unwrap().wrong, 0, "{name}, {after}");
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

/// What leads to a table of nothing lost the one that it should lead to: that is told, and its data kept until it is given up.
#[test]
fn a_table_that_an_empty_one_stands_for_is_lost_and_not_freed() {
    const REACH: u64 = 8192;
    let size = 8 * REACH * CLUSTER;
    let held = [0, REACH, REACH + 3, 2 * REACH, 7 * REACH];
    let reach = |index: u64| index * REACH * CLUSTER..(index + 1) * REACH * CLUSTER;
    /// Where the entry leads, what is lost by it, and what in doubt.
    type Wrong = (&'static str, fn(&MemStore, &At) -> u64, Vec<Range<u64>>, Vec<Range<u64>>);
    let cases: [Wrong; 5] = [
        ("another's", |s, at| at.table(s, 5), vec![], vec![reach(1), reach(5)]),
        // The second block counts nothing yet.
        ("a refcount block", |s, at| get(s, at.0.reftable_offset + 8), vec![reach(1)], vec![]),
        ("counts", |s, at| at.block(s), vec![reach(1)], vec![]),
        (
            "what is free",
            |s, _| {
                let mut state = s.0.lock().unwrap();
                let end = state.bytes.len() as u64;
                state.bytes.resize((end + 2 * CLUSTER) as usize, 0);
                end + CLUSTER
            },
            vec![reach(1)],
            vec![],
        ),
        (
            "what leaked",
            |s, at| {
                let leaked = at.host(s, 0);
                put(s, at.entry(s, 0), 0);
                s.0.lock().unwrap().bytes[leaked as usize..(leaked + CLUSTER) as usize].fill(0);
                leaked
            },
            vec![],
            vec![reach(1)],
        ),
    ];
    for (name, wrong, lost, shared) in cases {
        let store = volume_of(size, &held);
        let at = At(Header::read(&store).unwrap());
        let right = at.table(&store, 1);
        let to = wrong(&store, &at);
        put(&store, at.l1(1), 1 << 63 | to);
        let before = store.0.lock().unwrap().bytes.clone();
        let tried = repair(&store, false).unwrap().unwrap();
        assert_eq!((&tried.found.lost, &tried.found.shared), (&lost, &shared), "{name}");
        assert!(!tried.done && store.0.lock().unwrap().bytes == before, "{name}: nothing is written");
        // Somebody who knows better has all of it back.
        put(&store, at.l1(1), 1 << 63 | right);
        for index in held.into_iter().filter(|index| *index != 0) {
            assert!(content(&open(&store), index) == bytes_of(index), "{name}: {index}");
        }
        put(&store, at.l1(1), 1 << 63 | to);
        store.0.lock().unwrap().bytes = before;
        assert!(repair(&store, true).unwrap().unwrap().done, "{name}");
        let found = check(&store).unwrap().unwrap();
        assert_eq!((found.wrong, found.leaked), (0, 0), "{name}: {found:?}");
        assert_clean(name, &store);
        let disk = open(&store);
        for index in [2 * REACH, 7 * REACH] {
            assert!(content(&disk, index) == bytes_of(index), "{name}: {index}");
        }
        assert!(content(&disk, REACH) == vec![0; CLUSTER as usize], "{name}: it is another's, or gone");
        disk.write_at(REACH * CLUSTER, &bytes_of(1)).unwrap();
        assert!(content(&disk, 5 * REACH) == vec![0; CLUSTER as usize], "{name}: a table each");
    }
}

#[test]
fn an_entry_that_leads_to_what_is_free_is_in_doubt() {
    let store = volume();
    let at = At(Header::read(&store).unwrap());
    let right = at.host(&store, 1);
    let free = {
        let mut state = store.0.lock().unwrap();
        let end = state.bytes.len();
        state.bytes.resize(end + 2 * CLUSTER as usize, 0);
        end as u64
    };
    put(&store, at.entry(&store, 1), 1 << 63 | free);
    let tried = repair(&store, false).unwrap().unwrap();
    assert_eq!((tried.done, &tried.found.shared[..]), (false, &[clusters(1, 2)][..]));
    put(&store, at.entry(&store, 1), 1 << 63 | right);
    assert!(content(&open(&store), 1) == bytes_of(1));
}

/// What nothing links to may be what something that is wrong should lead to.
#[test]
fn where_anything_is_wrong_nothing_is_freed_unasked() {
    let store = volume();
    let at = At(Header::read(&store).unwrap());
    // The last of the file, and one in the middle of it.
    let leaks = [8195, 2].map(|guest| (at.host(&store, guest), guest));
    leaks.iter().for_each(|(_, guest)| put(&store, at.entry(&store, *guest), 0));
    put(&store, 72, 1);
    let held = |store: &MemStore, host: u64, guest: u64| {
        let state = store.0.lock().unwrap();
        state.bytes.get(host as usize..(host + CLUSTER) as usize) == Some(&bytes_of(guest)[..])
    };
    put(&store, at.0.reftable_offset, 0);
    assert!(repair(&store, false).unwrap().unwrap().done);
    assert!(leaks.iter().all(|(host, guest)| held(&store, *host, *guest)));
    assert_eq!(check(&store).unwrap().unwrap().wrong, 0);
    drop(open(&store));
    assert!(!leaks.iter().any(|(host, guest)| held(&store, *host, *guest)), "an opening frees it");
    assert_clean("leaks", &store);
}
