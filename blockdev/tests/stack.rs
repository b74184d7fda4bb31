//! Layers: cut while requests go on, sealed, merged beneath a disk in use; what was cut off never changes.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use hutch_blockdev::qcow2::{self, Chain, Sealed, commit, pull};
use hutch_blockdev::stack::{Stack, cut};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskErrorKind, Qcow2Disk, RawDisk};
use support::{Event, Fault, MemStore, Oracle, Random, key, qemu_check, step};

const SIZE: u64 = 3 << 20;

/// A layer, encrypted with the key that is made of `seed`.
fn layer_of(size: u64, seed: Option<u8>) -> MemStore {
    let store = MemStore::default();
    match seed {
        Some(seed) => qcow2::create_encrypted(&store, size, &key(seed)).unwrap(),
        None => qcow2::create(&store, size).unwrap(),
    }
    store
}

fn layer(size: u64) -> MemStore {
    layer_of(size, None)
}

fn sealed_of(store: &MemStore, seed: Option<u8>) -> Arc<Sealed> {
    let opened = Sealed::open(Arc::new(store.clone()), seed.map(key).as_ref());
    Arc::new(opened.unwrap().expect("hutch made it"))
}

fn sealed(store: &MemStore) -> Arc<Sealed> {
    sealed_of(store, None)
}

/// Layers of one volume, the top one first, on a bottom of half its size.
struct Volume {
    layers: Vec<MemStore>,
    bottom: Vec<u8>,
    /// Of what their key is made.
    seed: Option<u8>,
}

impl Volume {
    fn new() -> (Volume, Oracle) {
        Volume::encrypted(None)
    }

    fn encrypted(seed: Option<u8>) -> (Volume, Oracle) {
        let bottom: Vec<u8> = (0..(SIZE as u32 / 2 + 512)).map(|i| (i / 512 % 255 + 1) as u8).collect();
        let mut bytes = bottom.clone();
        bytes.resize(SIZE as usize, 0);
        (Volume { layers: vec![layer_of(SIZE, seed)], bottom, seed }, Oracle::new(bytes))
    }

    fn layer(&self, size: u64) -> MemStore {
        layer_of(size, self.seed)
    }

    fn sealed(&self, from: usize) -> Vec<Arc<Sealed>> {
        self.layers[from..].iter().map(|layer| sealed_of(layer, self.seed)).collect()
    }

    fn bottom(&self) -> Option<Arc<dyn Disk>> {
        let store = MemStore::default();
        store.0.lock().unwrap().bytes = self.bottom.clone();
        Some(Arc::new(RawDisk::on(store, true).unwrap()))
    }

    /// What lies from layer `from` on, read only.
    fn beneath(&self, from: usize) -> Arc<dyn Disk> {
        let layers = self.sealed(from);
        match layers.is_empty() {
            true => self.bottom().unwrap(),
            false => Arc::new(Chain::new(layers, self.bottom()).unwrap()),
        }
    }

    fn open(&self) -> Stack {
        let top = Arc::new(self.layers[0].clone());
        Stack::with_key(top, self.seed.map(key), self.sealed(1), self.bottom()).unwrap()
    }

    /// Merges layer `upper` with the one beneath, one way or the other.
    fn merge(&mut self, upper: usize, down: bool) {
        let lower = upper + 1;
        let base = |n| Some(self.beneath(n));
        let of = |n: usize| Arc::new(self.layers[n].clone()) as Arc<dyn Store>;
        let key = self.seed.map(key);
        let mut go_on = |_| Ok(());
        if down {
            let into = Qcow2Disk::with_key(of(lower), base(lower + 1), key.as_ref(), false).unwrap();
            commit(&Qcow2Disk::with_key(of(upper), None, key.as_ref(), true).unwrap(), &into, &mut go_on)
                .unwrap();
            drop(into);
            self.layers.remove(upper);
        } else {
            let into = Qcow2Disk::with_key(of(upper), base(lower), key.as_ref(), false).unwrap();
            pull(&into, &Qcow2Disk::with_key(of(lower), None, key.as_ref(), true).unwrap(), &mut go_on)
                .unwrap();
            drop(into);
            self.layers.remove(lower);
        }
    }
}

fn whole(store: &MemStore) {
    if let Some((code, text)) = qemu_check(&store.0.lock().unwrap().bytes) {
        assert_eq!(code, 0, "qemu-img check: {text}");
    }
}

/// A layer that is kept, and what the disk held when it was cut off.
struct Kept(MemStore, Vec<u8>);

#[test]
fn snapshots_keep_what_they_are_of_whatever_is_done_above_and_beneath() {
    for seed in 1..=4 {
        let mut random = Random(seed * 0x9e37_79b9);
        let (mut volume, mut oracle) = Volume::encrypted((seed % 2 == 0).then_some(1));
        let mut disk = volume.open();
        let mut kept: Vec<Kept> = Vec::new();
        let same = |a: &MemStore, b: &MemStore| Arc::ptr_eq(&a.0, &b.0);
        for stamp in 0..500 {
            step(&mut random, &disk, &mut oracle, stamp).unwrap();
            if random.one_in(12) && volume.layers.len() < 12 {
                let new = volume.layer(disk.size());
                cut(vec![(&disk, Arc::new(new.clone()))]).unwrap();
                if random.one_in(2) {
                    kept.push(Kept(volume.layers[0].clone(), oracle.bytes.clone()));
                }
                volume.layers.insert(0, new);
                // Some requests find the old layer as it was left.
                for stamp in 1000..1000 + random.below(6) as u32 {
                    step(&mut random, &disk, &mut oracle, stamp).unwrap();
                }
                let again = cut(vec![(&disk, Arc::new(volume.layer(disk.size())) as Arc<dyn Store>)]);
                assert_eq!(again.unwrap_err().kind, DiskErrorKind::Busy);
                disk.seal().unwrap();
            }
            if random.one_in(25) && !kept.is_empty() {
                kept.remove(random.below(kept.len() as u64) as usize);
            }
            // Two sealed layers of which the lower one is nobody's.
            let upper = 1 + random.below(volume.layers.len() as u64) as usize;
            let free = volume.layers.get(upper + 1).is_some_and(|l| !kept.iter().any(|k| same(&k.0, l)));
            if free && random.one_in(8) {
                let (down, was) = (random.one_in(2), volume.layers.clone());
                volume.merge(upper, down);
                for kept in kept.iter_mut().filter(|k| down && same(&k.0, &was[upper])) {
                    kept.0 = was[upper + 1].clone();
                }
                // The disk goes on with the old ones a while, and then with the new.
                oracle.check(&disk);
                step(&mut random, &disk, &mut oracle, stamp).unwrap();
                disk.rebase_on(volume.sealed(1), volume.bottom()).unwrap();
            }
            if random.one_in(60) {
                drop(disk);
                disk = volume.open();
            }
            if random.one_in(90) && oracle.bytes.len() < 6 << 20 {
                let size = oracle.bytes.len() as u64 + 512 * (1 + random.below(1000));
                disk.grow(size).unwrap();
                oracle.grown(size);
            }
        }
        oracle.check(&disk);
        drop(disk);
        volume.layers.iter().for_each(whole);
        for Kept(store, bytes) in &kept {
            let at = volume.layers.iter().position(|l| same(l, store)).unwrap();
            let chain = volume.beneath(at);
            Oracle::new(bytes.clone()).check(&*chain);
            for at in (0..bytes.len()).step_by(4096) {
                let zeros = chain.zeros_at(at as u64).unwrap() as usize;
                assert!(bytes[at..(at + zeros).min(bytes.len())].iter().all(|b| *b == 0));
            }
        }
    }
}

/// Whoever looks through both layers sees the same bytes wherever a merge is cut off; done again, it is done.
#[test]
fn a_merge_that_is_cut_off_changes_nothing_and_is_done_again() {
    let content =
        |random: &mut Random, disk: &dyn Disk, oracle: &mut Oracle, stamps: std::ops::Range<u32>| {
            for stamp in stamps {
                step(random, disk, oracle, stamp).unwrap();
            }
            disk.flush().unwrap();
        };
    for (seed, down) in (1..=2).flat_map(|seed| [(seed, true), (seed, false)]) {
        let mut random = Random(seed * 0x51ed_2701);
        let (mut volume, mut oracle) = Volume::encrypted((seed % 2 == 0).then_some(1));
        for _ in 0..3 {
            let disk = volume.open();
            content(&mut random, &disk, &mut oracle, 0..60);
            drop(disk);
            volume.layers.insert(0, volume.layer(SIZE));
        }
        let (mut cut_off, key) = (0, volume.seed.map(key));
        for n in (0..60).step_by(4) {
            let into = &volume.layers[if down { 2 } else { 1 }];
            let other = &volume.layers[if down { 1 } else { 2 }];
            let fault = if random.one_in(2) { Fault::Errno(libc::ENOSPC) } else { Fault::Short };
            let base = volume.beneath(if down { 3 } else { 2 });
            into.0.lock().unwrap().fault = Some((n, fault, true));
            // Also opening it may meet the fault.
            let merged = Qcow2Disk::with_key(Arc::new(into.clone()), Some(base), key.as_ref(), false)
                .and_then(|into| {
                    let other =
                        Qcow2Disk::with_key(Arc::new(other.clone()), None, key.as_ref(), true).unwrap();
                    let go_on = &mut |_| Ok(());
                    if down { commit(&other, &into, go_on) } else { pull(&into, &other, go_on) }
                });
            cut_off += u64::from(merged.is_err());
            into.0.lock().unwrap().fault = None;
            oracle.check(&*volume.beneath(1));
        }
        assert!(cut_off > 0, "no fault was met");
        volume.merge(1, down);
        oracle.check(&*volume.beneath(1));
        volume.layers.iter().for_each(whole);
    }
}

/// Power fails after a cut: what was flushed is there, in whichever layer, and the layer beneath is one that can be read.
#[test]
fn power_cuts_around_a_cut_lose_nothing_that_was_flushed() {
    for seed in 1..=20 {
        let mut random = Random(seed * 0x2545_f491);
        let (mut volume, mut oracle) = Volume::encrypted((seed % 2 == 0).then_some(1));
        let disk = volume.open();
        let start = volume.layers[0].0.lock().unwrap().bytes.clone();
        volume.layers[0].0.lock().unwrap().record = true;
        for stamp in 0..30 {
            step(&mut random, &disk, &mut oracle, stamp).unwrap();
        }
        let new = volume.layer(SIZE);
        let new_start = new.0.lock().unwrap().bytes.clone();
        new.0.lock().unwrap().record = true;
        cut(vec![(&disk, Arc::new(new.clone()))]).unwrap();
        volume.layers.insert(0, new);
        for stamp in 100..100 + random.below(20) as u32 {
            step(&mut random, &disk, &mut oracle, stamp).unwrap();
        }
        // Each file loses what it was not told to keep.
        let survive = |store: &MemStore, start: &[u8]| {
            let log = store.0.lock().unwrap().log.clone();
            let synced = log.iter().rposition(|e| matches!(e, Event::Sync)).map_or(0, |at| at + 1);
            let survivor = MemStore::default();
            survivor.0.lock().unwrap().bytes = start.to_vec();
            log[..synced].iter().for_each(|event| survivor.0.lock().unwrap().apply(event));
            survivor
        };
        let layers = vec![survive(&volume.layers[0], &new_start), survive(&volume.layers[1], &start)];
        let after = Volume { layers, bottom: volume.bottom.clone(), seed: volume.seed };
        oracle.check_survivors(&after.open());
    }
}

/// Somebody writes a number to one disk and then to the other, over and over. No cut of both has the second without the first.
#[test]
fn a_cut_of_several_disks_falls_between_requests() {
    let stores = [layer(SIZE), layer(SIZE)];
    let disks = stores.each_ref().map(|s| Stack::on(Arc::new(s.clone()), Vec::new(), None).unwrap());
    let chains = stores.map(|store| Mutex::new(vec![store]));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                let sector = number.to_le_bytes().repeat(64);
                for disk in &disks {
                    disk.write_at(number % 8 * 512, &sector).unwrap();
                    disk.write_at(1 << 20, &sector).unwrap();
                }
            }
        });
        for _ in 0..40 {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let new = [layer(SIZE), layer(SIZE)];
            let cuts = disks.iter().zip(&new).map(|(disk, new)| (disk, Arc::new(new.clone()) as _));
            cut(cuts.collect()).unwrap();
            let numbers = [0, 1].map(|i| {
                disks[i].seal().unwrap();
                let mut chain = chains[i].lock().unwrap();
                let below = Chain::new(chain.iter().map(sealed).collect(), None).unwrap();
                chain.insert(0, new[i].clone());
                let mut sector = [0; 512];
                below.read_at(1 << 20, &mut sector).unwrap();
                u64::from_le_bytes(sector[..8].try_into().unwrap())
            });
            assert!(numbers[0] == numbers[1] || numbers[0] == numbers[1] + 1, "{numbers:?}");
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_cut_that_cannot_be_changes_nothing() {
    let (volume, mut oracle) = Volume::new();
    let (other, _) = Volume::new();
    let (disk, other) = (volume.open(), other.open());
    step(&mut Random(5), &disk, &mut oracle, 1).unwrap();
    let cuts: Vec<(&Stack, Arc<dyn Store>)> =
        vec![(&other, Arc::new(layer(SIZE))), (&disk, Arc::new(MemStore::default()))];
    assert_eq!(cut(cuts).unwrap_err().kind, DiskErrorKind::Format);
    assert!(disk.is_sealed() && other.is_sealed());
    oracle.check(&disk);
    // One that is too small is made large enough.
    cut(vec![(&disk, Arc::new(layer(SIZE / 2)) as Arc<dyn Store>)]).unwrap();
    oracle.check(&disk);
    let wrong = Chain::new(vec![sealed(&layer(SIZE / 4))], volume.bottom()).err().unwrap();
    assert_eq!(wrong.kind, DiskErrorKind::Format);
}

/// A new top layer is encrypted as the one before it, and what is encrypted is never merged into a plain layer.
#[test]
fn what_is_encrypted_stays_so() {
    let (volume, mut oracle) = Volume::encrypted(Some(1));
    let disk = volume.open();
    step(&mut Random(5), &disk, &mut oracle, 1).unwrap();
    for seed in [None, Some(2)] {
        let refused = cut(vec![(&disk, Arc::new(layer_of(SIZE, seed)))]).unwrap_err();
        assert_eq!(refused.kind, DiskErrorKind::Key);
    }
    cut(vec![(&disk, Arc::new(volume.layer(SIZE)))]).unwrap();
    disk.seal().unwrap();
    oracle.check(&disk);
    drop(disk);
    let of = |seed: Option<u8>| {
        let disk = Qcow2Disk::with_key(Arc::new(layer_of(SIZE, seed)), None, seed.map(key).as_ref(), false);
        let disk = disk.unwrap();
        disk.write_at(0, &[seed.unwrap_or(9); 512]).unwrap();
        disk
    };
    let go_on = &mut |_| Ok(());
    assert_eq!(commit(&of(Some(1)), &of(None), go_on).unwrap_err().kind, DiskErrorKind::Key);
    assert_eq!(pull(&of(None), &of(Some(1)), go_on).unwrap_err().kind, DiskErrorKind::Key);
    let (into, mut sector) = (of(Some(2)), [0; 512]);
    commit(&of(None), &into, go_on).unwrap();
    into.read_at(0, &mut sector).unwrap();
    assert_eq!(sector, [9; 512]);
    commit(&of(Some(1)), &into, go_on).unwrap();
    into.read_at(0, &mut sector).unwrap();
    assert_eq!(sector, [1; 512]);
}
