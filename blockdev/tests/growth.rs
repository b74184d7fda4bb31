//! A volume that becomes larger than its tables reach, with the power cut at every moment of it.

mod support;

use hutch_blockdev::{Disk, Key, Qcow2Disk, qcow2};
use std::sync::Arc;
use support::{Event, MemStore, Random, State, key, qemu_check};

const MIB: u64 = 1 << 20;
const OLD: u64 = 500 * MIB;
/// More than one more L2 table.
const NEW: u64 = 1700 * MIB;

fn open(store: &MemStore, key: Option<&Key>) -> Qcow2Disk {
    Qcow2Disk::with_key(Arc::new(store.clone()), None, key, false).expect("open the volume")
}

/// A volume with something in it, synced, and the events of its growth.
fn grown(key: Option<&Key>) -> (Vec<u8>, Vec<Event>) {
    let store = MemStore::default();
    let created = match key {
        Some(key) => qcow2::create_encrypted(&store, OLD, key),
        None => qcow2::create(&store, OLD),
    };
    created.expect("create");
    let disk = open(&store, key);
    disk.write_at(0, &[1; 100 << 10]).expect("write");
    disk.write_at(OLD - 512, &[2; 512]).expect("write");
    disk.flush().expect("flush");
    let start = {
        let mut state = store.0.lock().expect("the store");
        state.record = true;
        state.log.clear();
        state.bytes.clone()
    };
    disk.grow(NEW).expect("grow");
    disk.write_at(NEW - 512, &[3; 512]).expect("write behind the old end");
    disk.flush().expect("flush");
    drop(disk);
    let state = store.0.lock().expect("the store");
    (start, state.log.clone())
}

#[test]
fn power_cuts_during_growth_leave_the_old_or_the_new_disk() {
    power_cuts(None);
}

#[test]
fn power_cuts_during_growth_leave_the_old_or_the_new_encrypted_disk() {
    power_cuts(Some(&key(1)));
}

fn power_cuts(key: Option<&Key>) {
    let (start, events) = grown(key);
    assert!(events.len() > 6, "{} events are no growth", events.len());
    let mut random = Random(77);
    for end in 0..=events.len() {
        // Nothing, all, and any part of what was not synced.
        for keep in [0, 4, 1, 2, 3] {
            let mut state = State { bytes: start.clone(), ..State::default() };
            let happened = &events[..end];
            let synced = happened.iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
            for (i, event) in happened.iter().enumerate() {
                match event {
                    _ if i < synced || keep == 4 => state.apply(event),
                    Event::Write(at, bytes) => {
                        for (n, sector) in bytes.chunks(512).enumerate().filter(|_| random.below(4) < keep) {
                            state.apply(&Event::Write(at + n as u64 * 512, sector.to_vec()));
                        }
                    }
                    _ if random.below(4) < keep => state.apply(event),
                    _ => {}
                }
            }
            let when = format!("power cut after event {end} of {}, part {keep}", events.len());
            if let Some((code, said)) = qemu_check(&state.bytes) {
                assert!(code == 0 || code == 3, "{when}: {said}");
            }
            let survivor = MemStore::default();
            survivor.0.lock().expect("the store").bytes = state.bytes;
            let disk = open(&survivor, key);
            assert!([OLD, NEW].contains(&disk.size()), "{when}: {} bytes", disk.size());
            let mut sector = [0; 512];
            for (at, want) in [(0, 1), (99 << 10, 1), (MIB, 0), (OLD - 512, 2)] {
                disk.read_at(at, &mut sector).expect("read");
                assert_eq!(sector, [want; 512], "{when}: at {at}");
            }
            // It can be made larger again, whatever was left.
            disk.grow(NEW).unwrap_or_else(|e| panic!("{when}: grow again: {e:?}"));
            disk.write_at(NEW - MIB, &[4; 512]).expect("write");
            disk.flush().expect("flush");
            drop(disk);
            if keep == 2
                && let Some((code, said)) = qemu_check(&survivor.0.lock().expect("the store").bytes)
            {
                assert_eq!(code, 0, "{when}, grown again: {said}");
            }
        }
    }
}
