//! Whether a volume's file is whole: what its tables say, against its reference counts. Nothing is repaired; the next opening frees
//! what nothing links to.

use super::layout::{CLUSTER, CLUSTER_BITS, COUNTS, ENTRIES};
use super::{COMPRESSED, Header, OFFSET, read_l1};
use crate::store::Store;
use crate::{DiskError, Result};

/// The most faults that are told one by one.
const TOLD: usize = 20;

/// What was found in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checked {
    /// Clusters that hold the guest's bytes.
    pub data: u64,
    /// Clusters that are counted and that nothing links to: room that is lost until the next opening.
    pub leaked: u64,
    /// What is wrong, the first of it.
    pub faults: Vec<String>,
    /// How much is wrong in all.
    pub wrong: u64,
}

impl Checked {
    fn fault(&mut self, what: String) {
        self.wrong += 1;
        if self.faults.len() < TOLD {
            self.faults.push(what);
        }
    }
}

/// Which clusters of the file something links to.
struct Linked {
    bits: Vec<u64>,
    clusters: u64,
}

impl Linked {
    /// Notes a link; says what is wrong with it.
    fn add(&mut self, offset: u64, what: &str, found: &mut Checked) -> bool {
        let number = offset / CLUSTER;
        let bit = 1_u64 << (number % 64);
        if !offset.is_multiple_of(CLUSTER) || number >= self.clusters {
            found.fault(format!("{what} at {offset:#x} is outside of the file"));
            return false;
        }
        match self.bits.get_mut((number / 64) as usize) {
            Some(word) if *word & bit == 0 => *word |= bit,
            _ => found.fault(format!("{what} at {offset:#x} is another's, too")),
        }
        true
    }

    fn has(&self, number: u64) -> bool {
        self.bits.get((number / 64) as usize).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }
}

/// Reads a cluster of entries; `None` where there are only holes.
fn cluster(store: &dyn Store, offset: u64) -> Result<Option<Vec<u8>>> {
    let failed = |e| DiskError::io("read a table", e);
    if store.next_data(offset).map_err(failed)?.is_none_or(|at| at >= offset + CLUSTER) {
        return Ok(None);
    }
    let mut bytes = vec![0; CLUSTER as usize];
    store.read_bytes(offset, &mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|entry| entry.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
}

/// Checks a file that nobody writes to; `None` when it is a qcow2 that hutch did not lay out.
///
/// # Errors
/// `Format`: its header or its tables of tables cannot be; `Io`.
pub fn check(store: &dyn Store) -> Result<Option<Checked>> {
    let header = Header::read(store)?;
    if header.cluster_bits != CLUSTER_BITS || header.refcount_order != 4 {
        return Ok(None);
    }
    let size = store.size().map_err(|e| DiskError::io("find the file's size", e))?;
    let clusters = size.div_ceil(CLUSTER);
    let mut linked = Linked { bits: vec![0; clusters.div_ceil(64) as usize], clusters };
    let mut found = Checked::default();
    linked.add(0, "the header", &mut found);
    let table = |offset: u64, bytes: u64| (0..bytes.div_ceil(CLUSTER)).map(move |i| offset + i * CLUSTER);
    for at in table(header.l1_offset, u64::from(header.l1_entries) * 8) {
        linked.add(at, "the L1 table", &mut found);
    }
    let mut blocks = Vec::new();
    for at in table(header.reftable_offset, u64::from(header.reftable_clusters) * CLUSTER) {
        if !linked.add(at, "the refcount table", &mut found) {
            continue;
        }
        match cluster(store, at)? {
            Some(bytes) => blocks.extend(entries(&bytes)),
            None => blocks.extend((0..ENTRIES).map(|_| 0)),
        }
    }
    for block in &mut blocks {
        if *block != 0 && !linked.add(*block, "a refcount block", &mut found) {
            *block = 0;
        }
    }
    for l2 in read_l1(store, &header)? {
        let l2 = l2 & OFFSET;
        if l2 == 0 || !linked.add(l2, "an L2 table", &mut found) {
            continue;
        }
        for entry in cluster(store, l2)?.iter().flat_map(|bytes| entries(bytes)) {
            if entry & COMPRESSED != 0 {
                found.fault(format!("an entry of the L2 table at {l2:#x} is of a compressed cluster"));
            } else if entry & OFFSET != 0 && linked.add(entry & OFFSET, "a cluster", &mut found) {
                found.data += 1;
            }
        }
    }
    counts(store, &blocks, &linked, &mut found)?;
    Ok(Some(found))
}

/// Compares the reference counts with the links.
fn counts(store: &dyn Store, blocks: &[u64], linked: &Linked, found: &mut Checked) -> Result<()> {
    let mut last = (u64::MAX, None);
    for number in 0..linked.clusters {
        let index = number / COUNTS;
        if last.0 != index {
            let block = blocks.get(index as usize).copied().unwrap_or(0);
            last = (index, if block == 0 { None } else { cluster(store, block)? });
        }
        let at = (number % COUNTS) as usize * 2;
        let count = last.1.as_ref().and_then(|bytes| bytes.get(at..)?.first_chunk().copied());
        match (count.map_or(0, u16::from_be_bytes), linked.has(number)) {
            (0, false) | (1, true) => {}
            (_, false) => found.leaked += 1,
            (count, true) => {
                found.fault(format!("the cluster at {:#x} is counted {count} times", number * CLUSTER));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::{Qcow2Disk, create};
    use super::*;
    use crate::Disk;

    /// A volume of 1 GiB with some data, closed.
    fn volume() -> File {
        let file = tempfile::tempfile().unwrap();
        create(&file, 1 << 30).unwrap();
        let disk = Qcow2Disk::open(file.try_clone().unwrap(), None, false).unwrap();
        for at in [0, 1 << 20, 700 << 20, (1 << 30) - 65536] {
            disk.write_at(at, &[7; 65536]).unwrap();
        }
        disk.discard(0, 65536).unwrap();
        disk.flush().unwrap();
        file
    }

    #[test]
    fn a_whole_volume_has_no_faults_and_what_is_damaged_is_named() {
        let file = volume();
        let whole = check(&file).unwrap().unwrap();
        assert_eq!((whole.data, whole.leaked, whole.wrong), (3, 0, 0), "{whole:?}");
        let header = Header::read(&file).unwrap();
        let l2 = read_l1(&file, &header).unwrap()[0] & OFFSET;
        let table = cluster(&file, l2).unwrap().unwrap();
        let place = entries(&table).position(|entry| entry & OFFSET != 0).unwrap() as u64;
        let entry = entries(&table).find(|entry| entry & OFFSET != 0).unwrap();
        for (value, words) in [
            (entry & !OFFSET | (1 << 50), "outside of the file"),
            (entry & !OFFSET | l2, "is another's, too"),
            (entry | COMPRESSED, "compressed"),
        ] {
            file.write_bytes(l2 + place * 8, &value.to_be_bytes()).unwrap();
            let found = check(&file).unwrap().unwrap();
            assert!(found.wrong > 0 && found.faults.concat().contains(words), "{found:?}");
        }
        file.write_bytes(l2 + place * 8, &[0; 8]).unwrap();
        let found = check(&file).unwrap().unwrap();
        assert_eq!((found.data, found.leaked, found.wrong), (2, 1, 0), "nothing links to it");
        file.write_bytes(l2 + place * 8, &entry.to_be_bytes()).unwrap();
        assert_eq!(check(&file).unwrap().unwrap(), whole);
        let mut block = [0; 8];
        file.read_bytes(header.reftable_offset, &mut block).unwrap();
        let count = u64::from_be_bytes(block) + (entry & OFFSET) / CLUSTER * 2;
        for wrong in [0_u16, 2] {
            file.write_bytes(count, &wrong.to_be_bytes()).unwrap();
            let found = check(&file).unwrap().unwrap();
            assert!(found.faults.concat().contains(&format!("counted {wrong} times")), "{found:?}");
        }
    }
}
