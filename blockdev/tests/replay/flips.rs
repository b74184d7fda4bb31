//! Every bit of every table, turned over: the volume is refused, or holds what it held; or `check` says that it is damaged.

use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Chain, Header, Sealed, check, repair};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, Key, Qcow2Disk, RawDisk, Result};

use super::world::{Content, Mem, World};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

struct Flips {
    key: Option<Key>,
    base: Arc<dyn Disk>,
    /// The volume's file, in two ways.
    file: Vec<u8>,
    whole: Content,
    holds: Vec<u8>,
}

/// What came of a flip.
#[derive(Default, Debug)]
struct Found {
    refused: u32,
    same: u32,
    told: u32,
}

impl Flips {
    /// A volume with data, zeros and holes on a base, all of it on the disk.
    fn new(key: Option<Key>) -> Flips {
        let base: Vec<u8> = (0..SIZE as u32 / 2).map(|i| (i / 512 % 251 + 1) as u8).collect();
        let base = World::of(vec![Arc::new(Content::of(&base))]).file(0);
        let base = Arc::new(RawDisk::on(base, true).expect("the base"));
        let store = World::default().make();
        match &key {
            Some(key) => qcow2::create_encrypted(&store, SIZE, key),
            None => qcow2::create(&store, SIZE),
        }
        .expect("it is made");
        let mut made =
            Flips { key, base, file: Vec::new(), whole: Content::default(), holds: vec![0; SIZE as usize] };
        let disk = made.writable(&store).expect("it can be opened");
        for (at, byte) in [(0, 1), (CLUSTER * 2 + 512, 2), (CLUSTER * 9, 3), (CLUSTER * 12, 4)] {
            disk.write_at(at, &vec![byte; CLUSTER as usize]).expect("it is written");
        }
        disk.write_zeroes(CLUSTER * 5, CLUSTER, true).expect("it is zeroed");
        disk.discard(CLUSTER * 12, CLUSTER).expect("it is discarded");
        disk.flush().expect("it is flushed");
        disk.read_at(0, &mut made.holds).expect("it is read");
        drop(disk);
        // Which gives back what was set aside for growth.
        made.writable(&store).expect("it can be opened again");
        made.file = content(&store);
        made.whole = Content::of(&made.file);
        let found = check(&store, &(0..=u64::MAX)).expect("it can be checked").expect("it is ours");
        assert_eq!((found.wrong, found.leaked), (0, 0), "whole at first");
        made
    }

    fn base(&self) -> Option<Arc<dyn Disk>> {
        Some(self.base.clone())
    }

    fn writable(&self, store: &Mem) -> Result<Qcow2Disk> {
        Qcow2Disk::with_key(Arc::new(store.clone()), self.base(), self.key.as_ref(), false)
    }

    fn read(&self, disk: &dyn Disk) -> Result<Vec<u8>> {
        let mut bytes = vec![0; disk.size().min(2 * SIZE) as usize];
        disk.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    /// The bit of this number in the file, turned over.
    fn flip(&self, bit: u64, what: &str, found: &mut Found) {
        let (at, mask) = ((bit / 8) as usize, 1 << (bit % 8));
        let mut file = self.whole.clone();
        file.write(at as u64, &[self.file[at] ^ mask]);
        let when = format!("{what}: bit {} of byte {at:#x}", bit % 8);
        let fresh = || World::of(vec![Arc::new(file.clone())]).file(0);
        let checked = check(&fresh(), &(0..=u64::MAX));
        let told = !matches!(&checked, Ok(Some(found)) if found.wrong == 0 && found.leaked == 0);

        // Whoever writes: it would be whole from then on, so nothing may be wrong.
        let store = fresh();
        match self.writable(&store).and_then(|disk| self.read(&disk)) {
            Err(_) => found.refused += 1,
            Ok(bytes) => {
                assert!(bytes == self.holds, "{when}: to be written, it holds something else ({checked:?})");
                found.same += 1;
                let after = check(&store, &(0..=u64::MAX)).expect("it can be checked").expect("it is ours");
                // A mark of a table that nobody goes by is left to `repair`.
                let mended = repair(&store, false, &(0..=u64::MAX), u64::MAX)
                    .expect("it can be repaired")
                    .expect("it is ours");
                assert!(after.wrong == 0 && after.leaked == 0 || told && mended.done, "{when}: {after:?}");
            }
        }
        // Whoever reads, through layers or as a file of others.
        let store: Arc<dyn Store> = Arc::new(fresh());
        let chain = Sealed::open(store.clone(), self.key.as_ref()).and_then(|sealed| match sealed {
            Some(sealed) => self.read(&Chain::new(vec![Arc::new(sealed)], self.base())?),
            None => Ok(self.holds.clone()),
        });
        let alone = Qcow2Disk::with_key(store, self.base(), self.key.as_ref(), true)
            .and_then(|disk| self.read(&disk));
        for bytes in [chain, alone] {
            match bytes {
                Err(_) => found.refused += 1,
                Ok(bytes) if bytes == self.holds => found.same += 1,
                Ok(_) => {
                    assert!(told, "{when}: other bytes, and check says nothing");
                    found.told += 1;
                }
            }
        }
    }
}

fn content(store: &Mem) -> Vec<u8> {
    let mut bytes = vec![0; store.size().expect("its size") as usize];
    store.read_bytes(0, &mut bytes).expect("it is read");
    bytes
}

fn flips(key: Option<Key>) {
    let volume = Flips::new(key);
    let store = World::of(vec![Arc::new(Content::of(&volume.file))]).file(0);
    let header = Header::read(&store).expect("a header");
    let number = |at: u64| {
        let bytes = volume.file[at as usize..].first_chunk().expect("eight bytes");
        u64::from_be_bytes(*bytes)
    };
    let block = number(header.reftable_offset);
    let table = number(header.l1_offset) & 0x00ff_ffff_ffff_fe00;
    let mut found = Found::default();
    // The size is its record's affair, and told from it: all else of the header, and of what follows it.
    let bits = |bytes: std::ops::Range<u64>| bytes.start * 8..bytes.end * 8;
    for bit in bits(0..24).chain(bits(32..160)) {
        volume.flip(bit, "the header", &mut found);
    }
    for (what, at) in [("the L1 table", header.l1_offset), ("the refcount table", header.reftable_offset)] {
        for bit in
            bits(at..at + 32).chain(bits(at + 4096..at + 4104)).chain(bits(at + CLUSTER - 8..at + CLUSTER))
        {
            volume.flip(bit, what, &mut found);
        }
    }
    let clusters = volume.file.len() as u64 / CLUSTER;
    for bit in bits(block..block + clusters * 2 + 16).chain(bits(block + CLUSTER - 8..block + CLUSTER)) {
        volume.flip(bit, "a refcount block", &mut found);
    }
    for entry in (0..SIZE / CLUSTER + 2).chain([100, CLUSTER / 8 - 1]) {
        let at = table + entry * 8;
        // An empty entry and one of zeros differ in this bit alone, and both may be.
        let either = (number(at) & !1 == 0).then_some(at * 8 + 7 * 8);
        for bit in bits(at..at + 8).filter(|bit| Some(*bit) != either) {
            volume.flip(bit, "an L2 table", &mut found);
        }
    }
    println!("encrypted: {}, {found:?}", volume.key.is_some());
    assert!(found.refused > 3000 && found.same > 300, "{found:?}");
}

#[test]
fn a_bit_of_a_table_that_turns_over_is_refused_or_repaired() {
    flips(None);
}

#[test]
fn a_bit_of_an_encrypted_volumes_table_that_turns_over_is_refused_or_repaired() {
    let bytes: Vec<u8> = (0..64).collect();
    flips(Key::new(&bytes));
}
