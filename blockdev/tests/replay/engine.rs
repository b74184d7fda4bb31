//! A volume and its layers, what they have to hold, and power that fails at any event. What is done is told by bytes, so that
//! a seed or a fuzzer can tell it.
//!
//! ```text
//!   bytes ─► an operation ─► the volume, and what it has to hold
//!                └─► at one of the operation's events, power fails: each file has what was synced and some of the rest
//!                      └─► every file is whole; the volume opens, and holds in each sector what it may
//! ```

#![allow(dead_code, reason = "each program uses a part")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Chain, Sealed, check, commit, pull};
use hutch_blockdev::stack::{Stack, cut};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskErrorKind, Key, Qcow2Disk, RawDisk};

use super::world::{Content, File, Mem, Random, World};

const SIZE: u64 = 640 << 10;
/// The most layers, and the largest disk.
const LAYERS: usize = 5;
const LARGEST: u64 = 1 << 20;
/// Sectors of the base: it ends within a cluster.
const BASE: u64 = 301;
/// How many events of an operation power may fail after. Most have fewer.
const EVENTS: u64 = 14;

/// What a run came across.
#[derive(Default, Debug, Clone, Copy)]
pub struct Seen {
    pub steps: u64,
    pub crashes: u64,
    /// Crashes that left clusters which nothing linked to.
    pub leaks: u64,
}

/// How a sequence is run.
pub struct Run<'a> {
    /// The most operations.
    pub steps: usize,
    /// Whether power fails at each.
    pub crash_always: bool,
    /// Looks at some of the files, too: one that a crash left (leaks may be in it), or one that was closed.
    pub judge: &'a mut dyn FnMut(&Content, bool),
}

/// What each sector holds, and what else it may hold after power failed.
#[derive(Clone, Default)]
pub struct Model {
    pub holds: Vec<u64>,
    pub since: Vec<Vec<u64>>,
    changed: Vec<usize>,
}

impl Model {
    pub fn size(&self) -> u64 {
        self.holds.len() as u64 * 512
    }

    pub fn becomes(&mut self, sector: usize, value: u64) {
        if self.since[sector].is_empty() {
            self.changed.push(sector);
        }
        self.since[sector].push(std::mem::replace(&mut self.holds[sector], value));
    }

    pub fn flushed(&mut self) {
        for sector in std::mem::take(&mut self.changed) {
            if let Some(since) = self.since.get_mut(sector) {
                since.clear();
            }
        }
    }

    pub fn resize(&mut self, size: u64) {
        self.holds.resize((size / 512) as usize, 0);
        self.since.resize((size / 512) as usize, Vec::new());
    }

    /// `found` is all of it, exactly.
    pub fn assert_holds(&self, found: &[u64], when: &str) {
        let wrong = found.iter().zip(&self.holds).position(|(is, want)| is != want);
        assert!(found.len() == self.holds.len() && wrong.is_none(), "{when}: sector {wrong:?} is wrong");
    }

    /// After power failed, `found` is what may be there.
    pub fn assert_may_hold(&self, found: &[u64]) {
        for (sector, value) in found.iter().enumerate() {
            let held = self.holds.get(sector).is_some_and(|held| held == value);
            let may = held || self.since.get(sector).is_some_and(|since| since.contains(value));
            let past = sector >= self.holds.len() && *value == 0;
            assert!(may || past, "sector {sector} holds {value:#x}, which it never held");
        }
    }
}

/// What a sector holds that was written by step `number`: no other write of any sector has the same.
pub fn value(number: usize, sector: u64) -> u64 {
    (number as u64 + 1) << 32 | (sector + 1)
}

pub fn bytes_of(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(|value| [value.to_le_bytes(); 64]).flatten().collect()
}

/// What the sectors from `at` on hold; none is torn.
pub fn read(disk: &dyn Disk, at: u64, len: u64) -> Vec<u64> {
    let mut bytes = vec![0xee; len as usize];
    disk.read_at(at, &mut bytes).expect("it can be read");
    let sector = |(i, bytes): (usize, &[u8])| {
        let words = bytes.as_chunks::<8>().0;
        let first = words[0];
        assert!(words.iter().all(|word| *word == first), "sector {} is torn", at / 512 + i as u64);
        u64::from_le_bytes(first)
    };
    bytes.chunks_exact(512).enumerate().map(sector).collect()
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
        // Long ones by the high bits, with ends at clusters often.
        let (at, len) = match len {
            0..=159 => (at, len / 8 + 1),
            160..=219 => (at, (len - 159) * 5),
            _ => (at / 128 * 128, (len - 219) / 12 * 128 + 128),
        };
        Some((at * 512, len.min(sectors - at) * 512))
    }
}

/// A layer that is kept, by its file's number, and what the disk held when it was cut off.
pub type Kept = (usize, Vec<u64>);

struct Volume {
    world: World,
    /// The top one first, by their files' numbers.
    layers: Vec<usize>,
    key: Option<Key>,
    base: Option<Arc<dyn Disk>>,
    disk: Stack,
    model: Model,
    /// The layer that was cut off last and is to be kept, until it is sealed.
    keeping: Option<Kept>,
    kept: Vec<Kept>,
    /// Files that were found whole, as they were then.
    whole: RefCell<HashMap<usize, Arc<Content>>>,
    seen: Seen,
}

/// A new layer, durable, as whoever is told of it makes it.
fn layer(world: &World, size: u64, key: Option<&Key>) -> Mem {
    let store = world.make();
    match key {
        Some(key) => qcow2::create_encrypted(&store, size, key),
        None => qcow2::create(&store, size),
    }
    .expect("a layer can be made");
    store.sync().expect("it is durable");
    store
}

fn sealed(world: &World, layers: &[usize], key: Option<&Key>) -> Vec<Arc<Sealed>> {
    let open = |layer: &usize| {
        let sealed = Sealed::open(Arc::new(world.file(*layer)), key);
        Arc::new(sealed.expect("a layer can be opened").expect("it is one of ours"))
    };
    layers.iter().map(open).collect()
}

/// What lies on these layers, read only.
pub fn beneath(
    world: &World,
    layers: &[usize],
    key: Option<&Key>,
    base: Option<&Arc<dyn Disk>>,
) -> Option<Arc<dyn Disk>> {
    match layers.is_empty() {
        true => base.cloned(),
        false => {
            let chain = Chain::new(sealed(world, layers, key), base.cloned());
            Some(Arc::new(chain.expect("they fit")))
        }
    }
}

pub fn open(world: &World, layers: &[usize], key: Option<&Key>, base: Option<&Arc<dyn Disk>>) -> Stack {
    let (top, rest) = layers.split_first().expect("a layer");
    let opened =
        Stack::with_key(Arc::new(world.file(*top)), key.cloned(), sealed(world, rest, key), base.cloned());
    opened.expect("it can be opened")
}

impl Volume {
    fn new(first: u64) -> Volume {
        let world = World::default();
        let key: Vec<u8> = (0..64).collect();
        let key = Key::new(&key).filter(|_| first.is_multiple_of(4));
        let mut model = Model::default();
        let mut base = None;
        if (first / 4).is_multiple_of(2) {
            model.holds = (0..BASE).map(|sector| value(u32::MAX as usize - 1, sector)).collect();
            let file = World::of(vec![Arc::new(Content::of(&bytes_of(model.holds.iter().copied())))]).file(0);
            base = Some(Arc::new(RawDisk::on(file, true).expect("the base")) as Arc<dyn Disk>);
        }
        model.resize(SIZE);
        let top = layer(&world, SIZE, key.as_ref()).number();
        let disk = open(&world, &[top], key.as_ref(), base.as_ref());
        let (keeping, kept, whole, seen) = Default::default();
        Volume { world, layers: vec![top], key, base, disk, model, keeping, kept, whole, seen }
    }

    fn reopen(&mut self) {
        self.seal();
        // The old one is closed before, as a machine that ends.
        let other = World::default();
        let none = layer(&other, SIZE, None).number();
        self.disk = open(&other, &[none], None, None);
        self.disk = open(&self.world, &self.layers, self.key.as_ref(), self.base.as_ref());
    }

    fn seal(&mut self) {
        self.disk.seal().expect("it is sealed");
        self.kept.extend(self.keeping.take());
    }

    fn beneath(&self, from: usize) -> Option<Arc<dyn Disk>> {
        beneath(&self.world, &self.layers[from..], self.key.as_ref(), self.base.as_ref())
    }

    fn write(&mut self, number: usize, (at, len): (u64, u64)) {
        let sectors = at / 512..(at + len) / 512;
        for sector in sectors.clone() {
            self.model.becomes(sector as usize, value(number, sector));
        }
        let bytes = bytes_of(sectors.map(|sector| value(number, sector)));
        self.disk.write_at(at, &bytes).expect("it is written");
    }

    /// Two sealed layers of which nobody keeps the lower one become one.
    fn merge(&mut self, upper: usize, down: bool) {
        let (above, below) = (self.layers[upper], self.layers[upper + 1]);
        if self.kept.iter().any(|(kept, _)| *kept == below) {
            return;
        }
        let open = |layer: usize, base, read_only| {
            let store = Arc::new(self.world.file(layer));
            Qcow2Disk::with_key(store, base, self.key.as_ref(), read_only).expect("a layer can be opened")
        };
        let go_on = &mut |_| Ok(());
        if down {
            let into = open(below, self.beneath(upper + 2), false);
            commit(&open(above, None, true), &into, go_on).expect("it is merged");
        } else {
            let into = open(above, self.beneath(upper + 1), false);
            pull(&into, &open(below, None, true), go_on).expect("it is merged");
        }
        self.model.assert_holds(&self.read(), "before the disk is told");
        self.layers.remove(if down { upper } else { upper + 1 });
        for (kept, _) in self.kept.iter_mut().filter(|(kept, _)| down && *kept == above) {
            *kept = below;
        }
        let under = sealed(&self.world, &self.layers[1..], self.key.as_ref());
        self.disk.rebase_on(under, self.base.clone()).expect("the disk is told");
    }

    fn read(&self) -> Vec<u64> {
        read(&self.disk, 0, self.disk.size())
    }

    /// One operation. `None` where the input has ended.
    fn step(&mut self, input: &mut Input<'_>, number: usize) -> Option<Done> {
        let size = self.model.size();
        match input.byte()? % 20 {
            0..=5 => {
                let span = input.span(size)?;
                self.write(number, span);
            }
            6 => {
                let (at, len) = input.span(size)?;
                let found = read(&self.disk, at, len);
                let want = &self.model.holds[(at / 512) as usize..((at + len) / 512) as usize];
                assert!(found == want, "{len} bytes at {at} are wrong");
            }
            kind @ (7 | 8) => {
                let (at, len) = input.span(size)?;
                (at / 512..(at + len) / 512).for_each(|sector| self.model.becomes(sector as usize, 0));
                self.disk.write_zeroes(at, len, kind == 8).expect("it is zeroed");
            }
            9 | 10 => {
                let (at, len) = input.span(size)?;
                let sectors = (at / 512) as usize..((at + len) / 512) as usize;
                sectors.clone().for_each(|sector| self.model.becomes(sector, 0));
                self.disk.discard(at, len).expect("it is discarded");
                for (sector, now) in sectors.zip(read(&self.disk, at, len)) {
                    let was = self.model.since[sector].last().copied();
                    assert!(now == 0 || Some(now) == was, "a discard shows something else");
                    self.model.becomes(sector, now);
                }
            }
            11 | 12 => {
                self.disk.flush().expect("it is flushed");
                return Some(Done::Flushed);
            }
            13 if size < LARGEST => {
                let new = (size + (input.byte()? % 64 + 1) * 512).min(LARGEST);
                self.disk.grow(new).expect("it grows");
                return Some(Done::Grown(new));
            }
            kind @ (14 | 15) if self.layers.len() < LAYERS => {
                self.seal();
                let new = layer(&self.world, size, self.key.as_ref());
                cut(vec![(&self.disk, Arc::new(new.clone()))]).expect("it can be cut");
                self.keeping = (kind == 14).then(|| (self.layers[0], self.model.holds.clone()));
                self.layers.insert(0, new.number());
            }
            16 => {
                let (which, down) = (input.byte()?, input.byte()? % 2 == 0);
                if self.layers.len() > 2 && self.disk.is_sealed() {
                    self.merge(1 + which as usize % (self.layers.len() - 2), down);
                }
            }
            17 => self.reopen(),
            18 => return Some(Done::Crashed),
            _ => match input.byte()? as usize {
                which if which % 2 == 0 && !self.kept.is_empty() => {
                    self.kept.remove(which / 2 % self.kept.len());
                }
                which if which % 4 == 1 => {
                    let refused = self.disk.write_at(size, &[0; 512]).expect_err("it is past the end");
                    assert_eq!(refused.kind, DiskErrorKind::OutOfRange);
                }
                _ => self.seal(),
            },
        }
        Some(Done::Changed)
    }
}

/// What a step did, where more than sectors changed.
enum Done {
    Changed,
    Flushed,
    Grown(u64),
    /// Power failed, and what is left goes on.
    Crashed,
}

impl Volume {
    /// What a crash at `files` leaves, opened again. `layers` is what their owner knows of.
    fn survive(
        &mut self,
        files: &[File],
        (layers, kept): (Vec<usize>, Vec<Kept>),
        sizes: [u64; 2],
        random: &mut Random,
        run: &mut Run<'_>,
    ) -> Volume {
        self.seen.crashes += 1;
        let world = World::of(files.iter().map(|file| file.survive(random)).collect());
        let after = world.files();
        let mut leaked = 0;
        for layer in &layers {
            let content = after[*layer].settled().expect("it is all there is");
            let known = self.whole.borrow().get(layer).is_some_and(|whole| Arc::ptr_eq(whole, content));
            if known {
                continue;
            }
            let found = check(&world.file(*layer), &(0..=u64::MAX))
                .expect("it can be checked")
                .expect("it is one of ours");
            assert_eq!(found.wrong, 0, "after the crash: {found:?}");
            leaked += found.leaked;
            (run.judge)(content, true);
            self.whole.borrow_mut().insert(*layer, content.clone());
        }
        self.seen.leaks += u64::from(leaked > 0);
        let (key, base) = (self.key.clone(), self.base.clone());
        let disk = open(&world, &layers, key.as_ref(), base.as_ref());
        assert!(sizes.contains(&disk.size()), "a disk of {} bytes, not {sizes:?}", disk.size());
        let found = read(&disk, 0, disk.size());
        self.model.assert_may_hold(&found);
        let mut model = Model { holds: found, ..Model::default() };
        model.resize(disk.size());
        let whole = RefCell::new(self.whole.borrow().clone());
        let (keeping, seen) = (None, self.seen);
        let mut left = Volume { world, layers, key, base, disk, model, keeping, kept, whole, seen };
        // Now and then it is used, and then no leak is left either.
        if random.one_in(4) {
            let at = random.below(left.model.size() / 512);
            left.write(usize::MAX >> 33, (at * 512, 512));
            left.disk.flush().expect("it is flushed");
            left.model.flushed();
            left.model.assert_holds(&left.read(), "used after the crash");
            left.check_closed(run);
        }
        if random.one_in(16) {
            left.check_kept();
        }
        left
    }

    /// All layers are whole, and the top one, once it is closed, has no leaks.
    fn check_closed(&mut self, run: &mut Run<'_>) {
        self.reopen();
        for (depth, layer) in self.layers.iter().enumerate() {
            let found = check(&self.world.file(*layer), &(0..=u64::MAX))
                .expect("it can be checked")
                .expect("it is one of ours");
            assert!(found.wrong == 0 && (depth > 0 || found.leaked == 0), "closed: {found:?}");
        }
        if let Some(content) = self.world.files()[self.layers[0]].settled() {
            (run.judge)(content, false);
        }
    }

    fn check_kept(&self) {
        for (kept, held) in &self.kept {
            let at = self.layers.iter().position(|layer| layer == kept).expect("it is one of the layers");
            let disk = self.beneath(at).expect("there is one");
            assert!(read(&*disk, 0, disk.size()) == *held, "a layer that was cut off has changed");
            let zeros = disk.zeros_at(0).expect("it can be asked") as usize / 512;
            assert!(held.iter().take(zeros).all(|value| *value == 0), "{zeros} sectors are no zeros");
        }
    }
}

/// Does what `bytes` say.
pub fn run(bytes: &[u8], mut run: Run<'_>) -> Seen {
    let mut input = Input(bytes);
    let Some(first) = input.byte() else { return Seen::default() };
    let mut volume = Volume::new(first);
    let seed = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    for number in 0..run.steps {
        let mut random = Random::new(seed.wrapping_add(number as u64));
        if run.crash_always || input.0.first().is_some_and(|byte| byte % 20 == 18) {
            let most = if random.one_in(2) { EVENTS } else { 3 };
            volume.world.fail_after(random.below(most));
        }
        let before = (volume.layers.clone(), volume.kept.clone());
        let size = volume.model.size();
        let Some(done) = volume.step(&mut input, number) else { break };
        volume.seen.steps += 1;
        // What there was when power failed within the operation: its end was not told to anybody then.
        let within = volume.world.failed();
        let mut sizes = [size; 2];
        match &done {
            Done::Flushed if within.is_none() => volume.model.flushed(),
            Done::Grown(new) => {
                sizes = if within.is_some() { [size, *new] } else { [*new; 2] };
                volume.model.resize(*new);
            }
            _ => {}
        }
        let known = if within.is_some() { before } else { (volume.layers.clone(), volume.kept.clone()) };
        let crashed = matches!(done, Done::Crashed);
        if run.crash_always || crashed {
            let files = within.unwrap_or_else(|| volume.world.files());
            let left = volume.survive(&files, known, sizes, &mut random, &mut run);
            if crashed {
                volume = left;
            }
        }
        if matches!(done, Done::Flushed) {
            volume.model.flushed();
        }
    }
    volume.seal();
    volume.model.assert_holds(&volume.read(), "at the end");
    volume.check_closed(&mut run);
    volume.model.assert_holds(&volume.read(), "opened again");
    volume.check_kept();
    volume.seen
}
