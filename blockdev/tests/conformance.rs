//! Every backend keeps the contract of `Disk`: random work against a full oracle, faults, and loss of power.

mod support;

use std::sync::Arc;

use hutch_blockdev::{Disk, DiskErrorKind, Qcow2Disk, RawDisk, qcow2};
use support::{Event, Fault, MemStore, Oracle, Random, State, key, qemu_check, step};

const SIZE: u64 = 3 << 20;

fn base_bytes() -> Vec<u8> {
    // Not a whole number of clusters, and smaller than the disk on it.
    (0..(2 << 20) + 5 * 512_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect()
}

/// A backend to be tested: how to make one on a store, and how to open it again.
struct Backend {
    name: &'static str,
    base: bool,
    qcow2: bool,
    /// Of what its key is made; what lies below has another.
    key: Option<u8>,
}

const BACKENDS: [Backend; 5] = [
    Backend { name: "raw", base: false, qcow2: false, key: None },
    Backend { name: "qcow2", base: false, qcow2: true, key: None },
    Backend { name: "qcow2 on a base", base: true, qcow2: true, key: None },
    Backend { name: "encrypted qcow2", base: false, qcow2: true, key: Some(1) },
    Backend { name: "encrypted qcow2 on a base", base: true, qcow2: true, key: Some(1) },
];

impl Backend {
    fn base(&self) -> Option<Arc<dyn Disk>> {
        let store = MemStore::default();
        store.0.lock().unwrap().bytes = base_bytes();
        self.base.then(|| Arc::new(RawDisk::on(store, true).unwrap()) as Arc<dyn Disk>)
    }
    fn make(&self) -> (MemStore, Oracle) {
        let store = MemStore::default();
        match self.key {
            Some(seed) => qcow2::create_encrypted(&store, SIZE, &key(seed)).unwrap(),
            None if self.qcow2 => qcow2::create(&store, SIZE).unwrap(),
            None => store.0.lock().unwrap().bytes = vec![0; SIZE as usize],
        }
        let mut bytes = if self.base { base_bytes() } else { vec![] };
        bytes.resize(SIZE as usize, 0);
        (store, Oracle::new(bytes))
    }
    fn open(&self, store: &MemStore) -> Box<dyn Disk> {
        match self.qcow2 {
            true => {
                let key = self.key.map(key);
                let disk = Qcow2Disk::with_key(Arc::new(store.clone()), self.base(), key.as_ref(), false);
                Box::new(disk.unwrap())
            }
            false => Box::new(RawDisk::on(store.clone(), false).unwrap()),
        }
    }
    fn whole(&self, state: &State, leaks: bool) {
        if self.qcow2
            && let Some((code, text)) = qemu_check(&state.bytes)
        {
            assert!(code == 0 || leaks && code == 3, "{}: qemu-img check says {code}: {text}", self.name);
        }
    }
}

#[test]
fn random_work_agrees_with_the_oracle() {
    for backend in &BACKENDS {
        for seed in 1..=6 {
            let mut random = Random(seed * 0x9e37_79b9);
            let (store, mut oracle) = backend.make();
            let mut disk = backend.open(&store);
            for stamp in 0..400 {
                step(&mut random, &*disk, &mut oracle, stamp).unwrap();
                if random.one_in(60) {
                    // Closed and opened again: nothing is lost, flushed or not.
                    drop(disk);
                    disk = backend.open(&store);
                }
                if random.one_in(100) && oracle.bytes.len() < 6 << 20 {
                    let size = oracle.bytes.len() as u64 + 512 * (1 + random.below(1000));
                    disk.grow(size).unwrap();
                    oracle.grown(size);
                    let smaller = disk.grow(size - 512).unwrap_err();
                    assert_eq!(smaller.kind, DiskErrorKind::OutOfRange);
                }
            }
            oracle.check(&*disk);
            drop(disk);
            let state = store.0.lock().unwrap();
            backend.whole(&state, false);
        }
    }
}

/// The footprint of a disk that is written and discarded over and over does not grow.
#[test]
fn space_is_given_back_and_used_again() {
    for backend in [&BACKENDS[1], &BACKENDS[3]] {
        let (store, _) = backend.make();
        let disk = backend.open(&store);
        let mut sizes = Vec::new();
        for round in 0..20 {
            disk.write_at(0, &vec![round + 1; SIZE as usize]).unwrap();
            disk.flush().unwrap();
            disk.discard(0, SIZE).unwrap();
            disk.flush().unwrap();
            sizes.push(store.0.lock().unwrap().bytes.len());
        }
        assert_eq!(sizes.first(), sizes.last());
        let taken = store.0.lock().unwrap().bytes.iter().filter(|b| **b != 0).count();
        assert!(taken < 64 << 10, "{taken} bytes are left of a disk that holds nothing");
    }
}

/// The n-th change of the file fails. The request says so, the disk is as before or after, and the image stays whole.
#[test]
fn faults_are_reported_and_break_nothing() {
    for backend in &BACKENDS {
        for (kind, fault) in [
            ("ENOSPC", Fault::Errno(libc::ENOSPC)),
            ("EIO", Fault::Errno(libc::EIO)),
            ("short", Fault::Short),
        ] {
            let mut hit = 0;
            for n in (0..48).step_by(3) {
                let mut random = Random(7 + n);
                let (store, mut oracle) = backend.make();
                let disk = backend.open(&store);
                store.0.lock().unwrap().fault = Some((n, fault, false));
                let mut failures = Vec::new();
                for stamp in 0..60 {
                    if let Err(e) = step(&mut random, &*disk, &mut oracle, stamp) {
                        failures.push(e);
                    }
                    if failures.last() == Some(&DiskErrorKind::Failed) {
                        break;
                    }
                }
                hit += u64::from(!failures.is_empty());
                let expected =
                    if fault == Fault::Errno(libc::EIO) { DiskErrorKind::Io } else { DiskErrorKind::NoSpace };
                if let Some(first) = failures.first() {
                    // A failed sync is never tried again, whatever its cause.
                    assert!(
                        *first == expected || *first == DiskErrorKind::Io,
                        "{} {kind} {n}: {first:?}",
                        backend.name
                    );
                }
                store.0.lock().unwrap().fault = None;
                if failures.iter().all(|kind| *kind == DiskErrorKind::NoSpace) {
                    disk.flush().expect("with room again everything goes on");
                    oracle.flushed();
                    oracle.check(&*disk);
                }
                drop(disk);
                let state = store.0.lock().unwrap().clone();
                backend.whole(&state, true);
                oracle.check_survivors(&*backend.open(&store));
                let state = store.0.lock().unwrap().clone();
                backend.whole(&state, false);
            }
            assert!(hit > 4, "{} {kind}: the faults were never met", backend.name);
        }
    }
}

/// A host that stays full: writes fail, what was written is read, and when there is room everything goes on.
#[test]
fn a_full_host_is_survived() {
    survives_a_full_host(&BACKENDS[2]);
    survives_a_full_host(&BACKENDS[4]);
}

fn survives_a_full_host(backend: &Backend) {
    let (store, mut oracle) = backend.make();
    let disk = backend.open(&store);
    disk.write_at(0, &[7; 512]).unwrap();
    oracle.written(0, &[7; 512]);
    store.0.lock().unwrap().fault = Some((0, Fault::Errno(libc::ENOSPC), true));
    for at in [1 << 20, 2 << 20] {
        assert_eq!(disk.write_at(at, &[8; 4096]).unwrap_err().kind, DiskErrorKind::NoSpace);
    }
    assert_eq!(disk.flush().unwrap_err().kind, DiskErrorKind::NoSpace);
    oracle.check(&*disk);
    store.0.lock().unwrap().fault = None;
    disk.write_at(1 << 20, &[8; 4096]).unwrap();
    oracle.written(1 << 20, &[8; 4096]);
    disk.flush().unwrap();
    oracle.check(&*disk);
    drop(disk);
    backend.whole(&store.0.lock().unwrap(), false);
}

/// What reaches the medium when power fails after `events`: all up to the last sync; of the rest any sectors, in order.
fn power_cut(start: &[u8], events: &[Event], random: &mut Random) -> State {
    let mut state = State { bytes: start.to_vec(), ..State::default() };
    let synced = events.iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
    for (i, event) in events.iter().enumerate() {
        if i <= synced {
            state.apply(event);
            continue;
        }
        match event {
            Event::Write(at, bytes) if !random.one_in(3) => {
                let whole = random.one_in(2);
                for (n, sector) in bytes.chunks(512).enumerate() {
                    if whole || random.one_in(2) {
                        state.apply(&Event::Write(at + n as u64 * 512, sector.to_vec()));
                    }
                }
            }
            Event::Zero(..) | Event::Size(_) if random.one_in(2) => state.apply(event),
            _ => {}
        }
    }
    state
}

#[test]
fn power_cuts_lose_nothing_that_was_flushed() {
    for backend in BACKENDS.iter().filter(|b| b.qcow2) {
        let mut leaks = 0;
        for seed in 1..=5 {
            let mut random = Random(seed * 0x51ed_2701);
            let (store, mut oracle) = backend.make();
            let start = store.0.lock().unwrap().bytes.clone();
            store.0.lock().unwrap().record = true;
            let disk = backend.open(&store);
            for stamp in 0..60 {
                step(&mut random, &*disk, &mut oracle, stamp).unwrap();
                if !random.one_in(4) {
                    continue;
                }
                let log = store.0.lock().unwrap().log.clone();
                let state = power_cut(&start, &log, &mut random);
                let survivor = MemStore::default();
                survivor.0.lock().unwrap().bytes = state.bytes.clone();
                if random.one_in(4)
                    && let Some((code, text)) = qemu_check(&state.bytes)
                {
                    assert!(code == 0 || code == 3, "{} seed {seed} step {stamp}: {text}", backend.name);
                    leaks += u64::from(code == 3);
                }
                // The next start frees what was left, finds what was flushed, and goes on.
                let again = backend.open(&survivor);
                oracle.check_survivors(&*again);
                again.write_at(0, &[1; 512]).unwrap();
                drop(again);
                if random.one_in(4) {
                    backend.whole(&survivor.0.lock().unwrap(), false);
                }
            }
        }
        println!("{}: {leaks} images had leaks before the next start", backend.name);
    }
}
