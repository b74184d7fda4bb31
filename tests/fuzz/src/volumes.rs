//! A volume, its layers, and what they have to hold.

use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Chain, Sealed, commit, pull};
use hutch_blockdev::stack::{Stack, cut};
use hutch_blockdev::{Disk, DiskErrorKind, Key, Qcow2Disk};

use crate::store::Memory;

const SIZE: u64 = 640 << 10;
/// The most that is done by one input, the most layers, and the largest disk.
const STEPS: usize = 200;
const LAYERS: usize = 6;
const LARGEST: u64 = 1 << 20;

struct Volume {
    /// The top one first.
    layers: Vec<Memory>,
    key: Option<Key>,
    disk: Stack,
    holds: Vec<u8>,
    /// Layers that are kept, by what they held when they were cut off.
    kept: Vec<(Memory, Vec<u8>)>,
}

/// What is left of an input.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u64> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(u64::from(*first))
    }

    /// Whole sectors within `size`.
    fn span(&mut self, size: u64) -> Option<(u64, u64)> {
        let sectors = size / 512;
        let at = (self.byte()? << 8 | self.byte()?) % sectors;
        let len = self.byte()?;
        // Long ones by the high bit.
        let len = if len >= 128 { (len - 127) * 8 } else { len + 1 };
        Some((at * 512, len.min(sectors - at) * 512))
    }
}

fn layer(size: u64, key: Option<&Key>) -> Memory {
    let store = Memory::default();
    match key {
        Some(key) => qcow2::create_encrypted(&store, size, key),
        None => qcow2::create(&store, size),
    }
    .expect("a layer can be made");
    store
}

impl Volume {
    fn sealed(&self, from: usize) -> Vec<Arc<Sealed>> {
        let open = |store: &Memory| {
            let sealed = Sealed::open(Arc::new(store.clone()), self.key.as_ref());
            Arc::new(sealed.expect("a layer can be opened").expect("it is one of ours"))
        };
        self.layers.get(from..).unwrap_or_default().iter().map(open).collect()
    }

    fn beneath(&self, from: usize) -> Option<Arc<dyn Disk>> {
        let sealed = self.sealed(from);
        let chain = |sealed| Arc::new(Chain::new(sealed, None).expect("they fit")) as Arc<dyn Disk>;
        (!sealed.is_empty()).then(|| chain(sealed))
    }

    fn reopen(&mut self) {
        let top = Arc::new(self.layers.first().cloned().unwrap_or_default());
        // The old one is closed before, as a machine that ends.
        self.disk = {
            let other = layer(SIZE, None);
            Stack::on(Arc::new(other), Vec::new(), None).expect("an empty one")
        };
        let opened = Stack::with_key(top, self.key.clone(), self.sealed(1), None);
        self.disk = opened.expect("it can be opened again");
    }

    fn cut(&mut self, keep: bool) {
        let new = layer(self.disk.size(), self.key.as_ref());
        cut(vec![(&self.disk, Arc::new(new.clone()))]).expect("it can be cut");
        if let Some(old) = self.layers.first().filter(|_| keep) {
            self.kept.push((old.clone(), self.holds.clone()));
        }
        self.layers.insert(0, new);
    }

    /// Two sealed layers of which nobody keeps the lower one become one.
    fn merge(&mut self, upper: usize, down: bool) {
        let (Some(above), Some(below)) =
            (self.layers.get(upper).cloned(), self.layers.get(upper + 1).cloned())
        else {
            return;
        };
        if self.kept.iter().any(|(kept, _)| kept.is(&below)) {
            return;
        }
        let open = |store: &Memory, base, read_only| {
            let disk = Qcow2Disk::with_key(Arc::new(store.clone()), base, self.key.as_ref(), read_only);
            disk.expect("a layer can be opened")
        };
        let go_on = &mut |_| Ok(());
        if down {
            let into = open(&below, self.beneath(upper + 2), false);
            commit(&open(&above, None, true), &into, go_on).expect("it is merged");
        } else {
            let into = open(&above, self.beneath(upper + 1), false);
            pull(&into, &open(&below, None, true), go_on).expect("it is merged");
        }
        self.check("before the disk is told");
        self.layers.remove(if down { upper } else { upper + 1 });
        for (kept, _) in self.kept.iter_mut().filter(|(kept, _)| down && kept.is(&above)) {
            *kept = below.clone();
        }
        self.disk.rebase_on(self.sealed(1), None).expect("the disk is told");
    }

    fn check(&self, when: &str) {
        let mut found = vec![0xee; self.holds.len()];
        self.disk.read_at(0, &mut found).expect("it can be read");
        let wrong = found.iter().zip(&self.holds).position(|(is, want)| is != want);
        assert!(wrong.is_none(), "{when}: byte {wrong:?} is wrong");
    }

    fn step(&mut self, input: &mut Input<'_>, number: u8) -> Option<()> {
        let size = self.disk.size();
        let kind = input.byte()? % 16;
        match kind {
            0..=4 => {
                let (at, len) = input.span(size)?;
                let bytes: Vec<u8> = (0..len).map(|i| number.wrapping_add((i / 512) as u8) | 1).collect();
                self.disk.write_at(at, &bytes).expect("it is written");
                self.holds[at as usize..(at + len) as usize].copy_from_slice(&bytes);
            }
            5 => {
                let (at, len) = input.span(size)?;
                let mut found = vec![0xee; len as usize];
                self.disk.read_at(at, &mut found).expect("it is read");
                assert!(found == self.holds[at as usize..(at + len) as usize], "{len} bytes at {at}");
            }
            6 | 7 => {
                let (at, len) = input.span(size)?;
                self.disk.write_zeroes(at, len, kind == 7).expect("it is zeroed");
                self.holds[at as usize..(at + len) as usize].fill(0);
            }
            8 => {
                let (at, len) = input.span(size)?;
                self.disk.discard(at, len).expect("it is discarded");
                let mut now = vec![0; len as usize];
                self.disk.read_at(at, &mut now).expect("it is read");
                let held = &mut self.holds[at as usize..(at + len) as usize];
                for (now, was) in now.chunks(512).zip(held.chunks(512)) {
                    assert!(
                        now == was || now.iter().all(|byte| *byte == 0),
                        "a discard shows something else"
                    );
                }
                held.copy_from_slice(&now);
            }
            9 => self.disk.flush().expect("it is flushed"),
            10 if size < LARGEST => {
                let more = input.byte()? % 64 + 1;
                let new = (size + more * 512).min(LARGEST);
                self.disk.grow(new).expect("it grows");
                self.holds.resize(new as usize, 0);
            }
            11 | 12 if self.layers.len() < LAYERS => {
                self.cut(kind == 11);
                // Some of it is written before what is beneath is sealed.
                if input.byte()? % 2 == 0 {
                    let (at, len) = input.span(self.disk.size())?;
                    self.disk.write_at(at, &vec![number | 1; len as usize]).expect("it is written");
                    self.holds[at as usize..(at + len) as usize].fill(number | 1);
                }
                self.disk.seal().expect("it is sealed");
            }
            13 => {
                let (which, down) = (input.byte()?, input.byte()? % 2 == 0);
                if self.layers.len() > 2 {
                    self.merge(1 + which as usize % (self.layers.len() - 2), down);
                }
            }
            14 => self.reopen(),
            15 if !self.kept.is_empty() => {
                let which = input.byte()? as usize % self.kept.len();
                self.kept.remove(which);
            }
            _ => {
                let refused = self.disk.write_at(size, &[0; 512]).expect_err("it is past the end");
                assert_eq!(refused.kind, DiskErrorKind::OutOfRange);
            }
        }
        Some(())
    }
}

pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(first) = input.byte() else { return };
    let key: Vec<u8> = (0..64).collect();
    let key = Key::new(&key).filter(|_| first % 4 == 0);
    let top = layer(SIZE, key.as_ref());
    let disk = Stack::with_key(Arc::new(top.clone()), key.clone(), Vec::new(), None).expect("an empty one");
    let holds = vec![0; SIZE as usize];
    let mut volume = Volume { layers: vec![top], key, disk, holds, kept: Vec::new() };
    for number in 0..STEPS {
        if volume.step(&mut input, number as u8).is_none() {
            break;
        }
    }
    // What was cut off last may not be sealed yet, where the input ended.
    volume.disk.seal().expect("it is sealed");
    volume.check("at the end");
    volume.reopen();
    volume.check("opened again");
    for (kept, held) in &volume.kept {
        let at = volume.layers.iter().position(|layer| layer.is(kept)).expect("a kept layer is one of them");
        let disk = volume.beneath(at).expect("there is one");
        let mut found = vec![0; held.len()];
        disk.read_at(0, &mut found).expect("it can be read");
        assert!(found == *held, "a layer that was cut off has changed");
    }
}
