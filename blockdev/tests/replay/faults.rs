//! A day of a volume (it is made, written, cut, sealed, merged, made larger, exported) in which one call to the host fails: each of
//! them in turn, in each way. What fails says so and changes nothing but what it was about; done again, it is done.

use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Chain, Sealed, check, commit, pull};
use hutch_blockdev::stack::{Stack, cut};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Key, Qcow2Disk, Result};

use super::engine::{Kept, Model, beneath, bytes_of, open, read, value};
use super::world::{Call, Fault, Mem, Random, World};

const SIZE: u64 = (512 << 10) + 1024;
const GROWN: u64 = SIZE + (70 << 10);
const KIB: u64 = 1 << 10;

/// What is done, in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Create,
    Write(u64, u64),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Cut { keep: bool },
    Seal,
    Merge,
    Grow,
    Export,
}

use Step::{Create, Cut, Discard, Export, Flush, Grow, Merge, Seal, Write, Zero};

const DAY: [Step; 22] = [
    Create,
    Write(0, 100 * KIB),
    Write(300 * KIB + 512, 140 * KIB),
    Flush,
    Write(2 * KIB, 70 * KIB),
    Discard(64 * KIB, 64 * KIB),
    Cut { keep: false },
    Write(KIB, 512),
    Zero(3 * KIB, 512, false),
    Seal,
    Zero(320 * KIB, 100 * KIB, true),
    Flush,
    Cut { keep: true },
    Write(SIZE - 1024, 1024),
    Seal,
    Flush,
    Merge,
    Write(200 * KIB, 5 * KIB),
    Grow,
    Write(GROWN - 3 * KIB, 2 * KIB),
    Flush,
    Export,
];

struct Day {
    world: World,
    layers: Vec<usize>,
    key: Option<Key>,
    /// Merged into the lower layer, or into the upper one.
    down: bool,
    disk: Option<Stack>,
    model: Model,
    keeping: Option<Kept>,
    kept: Vec<Kept>,
}

fn missing() -> DiskError {
    DiskError::format("there is no disk")
}

impl Day {
    fn layer(&self, size: u64) -> Result<Mem> {
        let store = self.world.make();
        match &self.key {
            Some(key) => qcow2::create_encrypted(&store, size, key)?,
            None => qcow2::create(&store, size)?,
        }
        store.sync().map_err(|e| DiskError::io("make it durable", e))?;
        Ok(store)
    }

    fn sealed(&self, layers: &[usize]) -> Result<Vec<Arc<Sealed>>> {
        let open = |layer: &usize| {
            let sealed = Sealed::open(Arc::new(self.world.file(*layer)), self.key.as_ref())?;
            Ok(Arc::new(sealed.ok_or_else(missing)?))
        };
        layers.iter().map(open).collect()
    }

    fn under(&self, from: usize) -> Result<Option<Arc<dyn Disk>>> {
        match self.layers.get(from..).filter(|layers| !layers.is_empty()) {
            None => Ok(None),
            Some(layers) => Ok(Some(Arc::new(Chain::new(self.sealed(layers)?, None)?))),
        }
    }

    /// Does a step of this number. What the owner keeps of it is changed when it is done.
    fn step(&mut self, step: Step, number: usize) -> Result<()> {
        if step == Create {
            let top = self.layer(SIZE)?;
            self.disk = Some(Stack::with_key(Arc::new(top.clone()), self.key.clone(), Vec::new(), None)?);
            self.layers.push(top.number());
            self.model.resize(SIZE);
            return Ok(());
        }
        let disk = self.disk.as_ref().ok_or_else(missing)?;
        match step {
            Create => {}
            Write(at, len) => {
                let sectors = at / 512..(at + len) / 512;
                let bytes = bytes_of(sectors.clone().map(|sector| value(number, sector)));
                sectors.for_each(|sector| self.model.becomes(sector as usize, value(number, sector)));
                disk.write_at(at, &bytes)?;
            }
            Zero(at, len, unmap) => {
                (at / 512..(at + len) / 512).for_each(|sector| self.model.becomes(sector as usize, 0));
                disk.write_zeroes(at, len, unmap)?;
            }
            Discard(at, len) => {
                (at / 512..(at + len) / 512).for_each(|sector| self.model.becomes(sector as usize, 0));
                disk.discard(at, len)?;
            }
            Flush => {
                disk.flush()?;
                self.model.flushed();
            }
            Cut { keep } => {
                let new = self.layer(disk.size())?;
                cut(vec![(disk, Arc::new(new.clone()) as Arc<dyn Store>)])?;
                self.keeping = keep.then(|| (self.layers[0], self.model.holds.clone()));
                self.layers.insert(0, new.number());
            }
            Seal => {
                disk.seal()?;
                self.kept.extend(self.keeping.take());
            }
            Merge => self.merge()?,
            Grow => {
                disk.grow(GROWN)?;
                self.model.resize(GROWN);
            }
            Export => {
                let to = self.world.make();
                qcow2::create(&to, disk.size())?;
                let into = Qcow2Disk::on(Arc::new(to.clone()), None, false)?;
                let mut piece = vec![0; 48 << 10];
                for at in (0..disk.size()).step_by(piece.len()) {
                    let len = (piece.len() as u64).min(disk.size() - at) as usize;
                    disk.read_at(at, &mut piece[..len])?;
                    into.write_at(at, &piece[..len])?;
                }
                into.flush()?;
                drop(into);
                let exported = Qcow2Disk::on(Arc::new(to), None, true)?;
                let mut bytes = vec![0; disk.size() as usize];
                exported.read_at(0, &mut bytes)?;
                assert!(bytes == bytes_of(self.model.holds.iter().copied()), "exported as it is");
            }
        }
        Ok(())
    }

    fn merge(&mut self) -> Result<()> {
        let open = |layer: usize, base, read_only| {
            Qcow2Disk::with_key(Arc::new(self.world.file(layer)), base, self.key.as_ref(), read_only)
        };
        let (above, below) = (self.layers[1], self.layers[2]);
        let go_on = &mut |_| Ok(());
        if self.down {
            commit(&open(above, None, true)?, &open(below, self.under(3)?, false)?, go_on)?;
        } else {
            pull(&open(above, self.under(2)?, false)?, &open(below, None, true)?, go_on)?;
        }
        let mut layers = self.layers.clone();
        layers.remove(if self.down { 1 } else { 2 });
        let under = self.sealed(&layers[1..])?;
        self.disk.as_ref().ok_or_else(missing)?.rebase_on(under, None)?;
        self.layers = layers;
        for (kept, _) in self.kept.iter_mut().filter(|(kept, _)| self.down && *kept == above) {
            *kept = below;
        }
        Ok(())
    }

    /// All files are whole, and each snapshot is what it was.
    fn check(&self, when: &str) {
        for layer in &self.layers {
            let found = check(&self.world.file(*layer), &(0..=u64::MAX))
                .expect("it can be checked")
                .expect("it is ours");
            assert_eq!(found.wrong, 0, "{when}: {found:?}");
        }
        for (kept, held) in &self.kept {
            let at = self.layers.iter().position(|layer| layer == kept).expect("one of the layers");
            let disk = beneath(&self.world, &self.layers[at..], self.key.as_ref(), None).expect("a disk");
            assert!(read(&*disk, 0, disk.size()) == *held, "{when}: a snapshot has changed");
        }
    }

    /// The program ends, and starts again; where `power` fails too, what was not synced may be lost.
    fn restart(&mut self, power: Option<&mut Random>, when: &str) {
        self.disk = None;
        if let Some(random) = power {
            let files = self.world.files();
            self.world = World::of(files.iter().map(|file| file.survive(random)).collect());
        }
        self.keeping = None;
        self.check(when);
        if self.layers.is_empty() {
            return;
        }
        let disk = open(&self.world, &self.layers, self.key.as_ref(), None);
        let found = read(&disk, 0, disk.size());
        self.model.assert_may_hold(&found);
        self.model.resize(disk.size());
        self.model.holds = found;
        self.disk = Some(disk);
    }
}

/// A day in which the call number `n` fails. Whether there was one.
fn day(n: u64, fault: Fault, stays: bool, down: bool, key: Option<Key>) -> bool {
    let when =
        format!("call {n} fails by {fault:?}, stays: {stays}, down: {down}, encrypted: {}", key.is_some());
    let mut random = Random::new(n);
    let (world, layers, model, kept) = Default::default();
    let mut day = Day { world, layers, key, down, disk: None, model, keeping: None, kept };
    day.world.plan(n, fault, stays);
    let mut met = None;
    for (number, step) in DAY.into_iter().enumerate() {
        let mut tries = 0;
        loop {
            let before = day.model.holds.clone();
            let Err(e) = day.step(step, number) else { break };
            let when = format!("{when}, {step:?}: {e}");
            let kinds = match fault {
                Fault::Errno(libc::ENOSPC) | Fault::Short => [DiskErrorKind::NoSpace, DiskErrorKind::Io],
                _ => [DiskErrorKind::Io, DiskErrorKind::Failed],
            };
            assert!(kinds.contains(&e.kind), "{when}: {:?}", e.kind);
            tries += 1;
            assert!(tries < 4, "{when}: it fails though no call does");
            met = met.or(day.world.met());
            day.world.relent();
            let Some(disk) = &day.disk else { continue };
            // Each sector is as it was, or as it was to be; a cluster that is not written is not half written.
            let found = read(disk, 0, disk.size());
            for (sector, is) in found.iter().enumerate() {
                let was = before.get(sector).copied().unwrap_or(0);
                let wanted = day.model.holds.get(sector).copied().unwrap_or(0);
                assert!(*is == was || *is == wanted, "{when}: sector {sector} is {is:#x}");
            }
            day.check(&when);
            // What a failed sync was to make durable may never be: nobody goes on with that.
            let lost = day.layers.iter().any(|layer| day.world.is_doubtful(*layer));
            let goes_on = disk.flush();
            match &goes_on {
                Ok(()) => {
                    day.model.holds = found;
                    day.model.flushed();
                }
                Err(again) => {
                    assert_eq!(again.kind, DiskErrorKind::Failed, "{when}");
                    // What was cut off may have failed beneath a top layer that has not.
                    if disk.is_sealed() {
                        let write = disk.write_at(400 * KIB, &[1; 512]).expect_err("it stays so");
                        assert_eq!(write.kind, DiskErrorKind::Failed, "{when}");
                    }
                    let full = matches!(fault, Fault::Errno(libc::ENOSPC) | Fault::Short);
                    // A failed sync has no second try, nor has growth that is half done.
                    let synced = day.world.met() == Some(Call::Sync);
                    assert!(!full || synced || step == Grow, "{when}: it is only full, and gives up");
                }
            }
            if lost || goes_on.is_err() {
                let power = (lost || random.one_in(2)).then_some(&mut random);
                day.restart(power, &when);
            }
        }
    }
    met = met.or(day.world.met());
    day.world.relent();
    let (found, when) = (read(day.disk.as_ref().expect("a disk"), 0, GROWN), format!("{when}, at the end"));
    day.model.assert_may_hold(&found);
    day.check(&when);
    day.restart(None, &when);
    day.restart(Some(&mut random), &when);
    day.disk = None;
    let top = check(&day.world.file(day.layers[0]), &(0..=u64::MAX))
        .expect("it can be checked")
        .expect("it is ours");
    assert_eq!((top.wrong, top.leaked), (0, 0), "{when}: {top:?}");
    met.is_some()
}

#[test]
fn whatever_call_fails_is_reported_and_done_again() {
    let faults = [
        (Fault::Errno(libc::ENOSPC), false),
        (Fault::Errno(libc::ENOSPC), true),
        (Fault::Errno(libc::EIO), false),
        (Fault::Errno(libc::EIO), true),
        (Fault::Short, false),
        (Fault::Sync, false),
        (Fault::Read, false),
    ];
    let mut key = [7; 64];
    key[0] = 1;
    for (fault, stays) in faults {
        for (down, key) in [(true, None), (false, Key::new(&key))] {
            let calls = (0..).take_while(|n| day(*n, fault, stays, down, key.clone())).count();
            println!("{fault:?}, stays: {stays}, down: {down}: each of {calls} calls");
            let least = if fault == Fault::Sync { 20 } else { 60 };
            assert!(calls > least, "only {calls} calls for {fault:?}");
        }
    }
}
