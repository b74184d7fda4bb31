//! Whether a volume's file is whole: what its tables say, against each other and its reference counts. Nothing is changed
//! here; `repair` does with what is found what can be done.

use std::collections::BTreeSet;
use std::ops::Range;

use super::layout::{CLUSTER, CLUSTER_BITS, COPIED, COUNTS, ENTRIES, L2_REACH, blocks_of};
use super::{COMPRESSED, Header, OFFSET, ZERO};
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
    /// Of the guest's bytes, which nobody can find any more.
    pub lost: Vec<Range<u64>>,
    /// Of the guest's bytes, which are something else's, too: at most one of them is right.
    pub shared: Vec<Range<u64>>,
}

impl Checked {
    fn fault(&mut self, what: String) {
        self.wrong += 1;
        if self.faults.len() < TOLD {
            self.faults.push(what);
        }
    }

    /// Whether all of it can be repaired, and no byte of the guest's is lost.
    pub fn keeps_all(&self) -> bool {
        self.lost.is_empty() && self.shared.is_empty()
    }
}

/// Which clusters of the file something links to.
struct Linked {
    bits: Vec<u64>,
    clusters: u64,
}

/// What a link is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Link {
    Good,
    /// Where nothing can be.
    Outside,
    /// Something else's, too.
    Taken,
}

impl Linked {
    /// Notes a link; says what is wrong with it.
    fn add(&mut self, offset: u64, what: &str, found: &mut Checked) -> Link {
        let number = offset / CLUSTER;
        let bit = 1_u64 << (number % 64);
        if !offset.is_multiple_of(CLUSTER) || number >= self.clusters {
            found.fault(format!("{what} at {offset:#x} is outside of the file"));
            return Link::Outside;
        }
        match self.bits.get_mut((number / 64) as usize) {
            Some(word) if *word & bit == 0 => {
                *word |= bit;
                Link::Good
            }
            _ => {
                found.fault(format!("{what} at {offset:#x} is another's, too"));
                Link::Taken
            }
        }
    }

    fn has(&self, number: u64) -> bool {
        self.bits.get((number / 64) as usize).is_some_and(|word| word & (1 << (number % 64)) != 0)
    }
}

/// An entry of an L2 table: the index of the table in L1, and its own.
pub(super) type Place = (usize, u64);

/// What is to be done about a file.
pub(super) struct Findings {
    pub(super) found: Checked,
    pub(super) header: Header,
    /// It has dirty or corrupt marks.
    pub(super) marked: bool,
    /// Clusters of the file.
    pub(super) clusters: u64,
    /// Where the L2 tables are; 0: nowhere.
    pub(super) l1: Vec<u64>,
    /// Tables of the disk's that are nowhere.
    pub(super) no_table: Vec<usize>,
    /// Tables that are an earlier one's.
    pub(super) same_table: Vec<usize>,
    /// Links to tables that are right but for a mark of theirs, or beyond the disk.
    pub(super) set_l1: Vec<(usize, u64)>,
    /// What entries are to be.
    pub(super) set: Vec<(Place, u64)>,
    /// Entries whose cluster is an earlier one's.
    pub(super) same: Vec<(Place, u64)>,
    /// Where the refcount blocks are; 0: nowhere.
    pub(super) blocks: Vec<u64>,
    /// Links to refcount blocks that lead nowhere.
    pub(super) bad_blocks: Vec<usize>,
}

/// Reads a cluster of entries; `None` where there are only holes.
pub(super) fn cluster(store: &dyn Store, offset: u64) -> Result<Option<Vec<u8>>> {
    let failed = |e| DiskError::io("read a table", e);
    if store.next_data(offset).map_err(failed)?.is_none_or(|at| at >= offset + CLUSTER) {
        return Ok(None);
    }
    let mut bytes = vec![0; CLUSTER as usize];
    store.read_bytes(offset, &mut bytes).map_err(failed)?;
    Ok(Some(bytes))
}

pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(8).map(|entry| entry.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
}

/// A table of `count` entries.
fn table(store: &dyn Store, offset: u64, count: u64) -> Result<Vec<u64>> {
    let mut bytes = vec![0; count as usize * 8];
    store.read_bytes(offset, &mut bytes).map_err(|e| DiskError::io("read a table", e))?;
    Ok(entries(&bytes).collect())
}

/// Notes a range, as one with the last where they touch.
fn note(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Checks a file that nobody writes to; `None` when it is a qcow2 that hutch did not lay out.
///
/// # Errors
/// `Format`: its header cannot be; `Io`.
pub fn check(store: &dyn Store) -> Result<Option<Checked>> {
    Ok(look(store)?.map(|findings| findings.found))
}

/// What is wrong with a file, and what is to be done about it.
pub(super) fn look(store: &dyn Store) -> Result<Option<Findings>> {
    let (header, marks) = Header::read_marked(store)?;
    if header.cluster_bits != CLUSTER_BITS || header.refcount_order != 4 || header.version != 3 {
        return Ok(None);
    }
    let size = store.size().map_err(|e| DiskError::io("find the file's size", e))?;
    let clusters = size.div_ceil(CLUSTER);
    let mut linked = Linked { bits: vec![0; clusters.div_ceil(64) as usize], clusters };
    let mut found = Checked::default();
    if marks != 0 {
        found.fault("the file is marked as not closed properly, or as corrupt".into());
    }
    let fixed = [
        ("the header", 0, 1),
        ("the L1 table", header.l1_offset, (u64::from(header.l1_entries) * 8).div_ceil(CLUSTER)),
        ("the refcount table", header.reftable_offset, u64::from(header.reftable_clusters)),
    ];
    for (what, offset, count) in fixed {
        for at in (0..count).map(|i| offset + i * CLUSTER) {
            if linked.add(at, what, &mut found) != Link::Good {
                let why = format!("{what} cannot be at {at:#x}; restore the volume from a snapshot");
                return Err(DiskError::format(why));
            }
        }
    }
    let mut findings = Findings {
        found,
        marked: marks != 0,
        clusters,
        l1: table(store, header.l1_offset, u64::from(header.l1_entries))?,
        no_table: Vec::new(),
        same_table: Vec::new(),
        set_l1: Vec::new(),
        set: Vec::new(),
        same: Vec::new(),
        blocks: table(store, header.reftable_offset, u64::from(header.reftable_clusters) * ENTRIES)?,
        bad_blocks: Vec::new(),
        header,
    };
    findings.tables(&mut linked);
    findings.data(store, &mut linked)?;
    let same = findings.blocks(&mut linked);
    findings.shared(store, same)?;
    findings.counts(store, &linked)?;
    Ok(Some(findings))
}

impl Findings {
    /// The L2 tables. They come before what else is said to be there: counts can be had anew.
    fn tables(&mut self, linked: &mut Linked) {
        let disk = self.header.size.div_ceil(L2_REACH) as usize;
        let mut seen = BTreeSet::new();
        for (index, entry) in self.l1.iter_mut().enumerate() {
            let (raw, offset) = (*entry, *entry & OFFSET);
            *entry = 0;
            if raw == 0 && index >= disk {
                continue;
            }
            let known = raw & !(OFFSET | COPIED) == 0 && offset != 0;
            let link = match known {
                true => linked.add(offset, "an L2 table", &mut self.found),
                false => {
                    self.found.fault(format!("the entry {index} of the L1 table is {raw:#x}"));
                    Link::Outside
                }
            };
            match link {
                Link::Good => {
                    *entry = offset;
                    seen.insert(offset);
                    if raw & COPIED == 0 {
                        self.found
                            .fault(format!("the entry {index} of the L1 table is not marked as its own"));
                        self.set_l1.push((index, offset | COPIED));
                    }
                }
                // Nothing of the disk is there.
                _ if index >= disk => self.set_l1.push((index, 0)),
                Link::Taken if seen.contains(&offset) => {
                    *entry = offset;
                    self.same_table.push(index);
                }
                Link::Taken | Link::Outside => {
                    let start = index as u64 * L2_REACH;
                    note(&mut self.found.lost, start..(start + L2_REACH).min(self.header.size));
                    self.no_table.push(index);
                }
            }
        }
    }

    /// The refcount blocks, which can be had anew. Tells those that are something else's, too.
    fn blocks(&mut self, linked: &mut Linked) -> BTreeSet<u64> {
        let mut same = BTreeSet::new();
        let last = self.blocks.iter().rposition(|block| *block != 0).map_or(0, |last| last + 1);
        let all = blocks_of(&self.header).max(last as u64).max(self.clusters.div_ceil(COUNTS)) as usize;
        self.blocks.truncate(all);
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let offset = std::mem::take(block);
            if offset == 0 {
                self.found.fault(format!("the refcount block {index} is missing"));
                continue;
            }
            match linked.add(offset, "a refcount block", &mut self.found) {
                Link::Good => *block = offset,
                link => {
                    self.bad_blocks.push(index);
                    same.extend((link == Link::Taken).then_some(offset));
                }
            }
        }
        same
    }

    /// What the L2 tables say.
    fn data(&mut self, store: &dyn Store, linked: &mut Linked) -> Result<()> {
        let size = self.header.size;
        let tables = Linked { bits: linked.bits.clone(), clusters: linked.clusters };
        for (index, l2) in self.l1.iter().enumerate().filter(|(_, l2)| **l2 != 0) {
            let Some(bytes) = cluster(store, *l2)? else { continue };
            for (at, entry) in (0..).zip(entries(&bytes)).filter(|(_, entry)| *entry != 0) {
                let (place, offset) = ((index, at), entry & OFFSET);
                let range = range_of(place, size);
                let link = match entry & !(OFFSET | COPIED | ZERO) {
                    0 if entry == ZERO => continue,
                    0 if offset == 0 => {
                        self.found.fault(format!(
                            "an entry of the L2 table at {l2:#x}, {entry:#x}, has no cluster"
                        ));
                        Link::Outside
                    }
                    0 => linked.add(offset, "a cluster", &mut self.found),
                    bits => {
                        let what =
                            if bits & COMPRESSED != 0 { "is of a compressed cluster" } else { "is none" };
                        self.found.fault(format!("an entry of the L2 table at {l2:#x}, {entry:#x}, {what}"));
                        Link::Outside
                    }
                };
                match link {
                    Link::Good => {
                        self.found.data += 1;
                        // Our zeros have none.
                        if entry & ZERO != 0 {
                            self.found.fault(format!("the cluster at {offset:#x} is said to be zeros"));
                            self.set.push((place, offset | COPIED));
                        } else if entry & COPIED == 0 {
                            let why = format!("the cluster at {offset:#x} is not marked as its entry's own");
                            self.found.fault(why);
                            self.set.push((place, entry | COPIED));
                        }
                    }
                    // Past the disk's end there is nothing to lose.
                    _ if range.is_empty() => self.set.push((place, 0)),
                    // It reads as zeros, and does so without a cluster.
                    _ if entry & !(OFFSET | COPIED) == ZERO => self.set.push((place, ZERO)),
                    Link::Taken if !tables.has(offset / CLUSTER) => self.same.push((place, offset)),
                    Link::Taken | Link::Outside => {
                        note(&mut self.found.lost, range);
                        self.set.push((place, ZERO));
                    }
                }
            }
        }
        Ok(())
    }

    /// Which of the guest's clusters are another's, or in `same`.
    fn shared(&mut self, store: &dyn Store, mut same: BTreeSet<u64>) -> Result<()> {
        same.extend(self.same.iter().map(|(_, offset)| *offset));
        if same.is_empty() {
            return Ok(());
        }
        let size = self.header.size;
        for (index, l2) in self.l1.iter().enumerate().filter(|(_, l2)| **l2 != 0) {
            for (at, entry) in (0..).zip(cluster(store, *l2)?.iter().flat_map(|bytes| entries(bytes))) {
                let known = entry & !(OFFSET | COPIED) == 0;
                if known && same.contains(&(entry & OFFSET)) {
                    note(&mut self.found.shared, range_of((index, at), size));
                }
            }
        }
        Ok(())
    }

    /// Compares the reference counts with the links.
    fn counts(&mut self, store: &dyn Store, linked: &Linked) -> Result<()> {
        let mut last = (u64::MAX, None);
        for number in 0..linked.clusters {
            let index = number / COUNTS;
            let block = self.blocks.get(index as usize).copied().unwrap_or(0);
            if block == 0 {
                // That was told already.
                continue;
            }
            if last.0 != index {
                last = (index, cluster(store, block)?);
            }
            let at = (number % COUNTS) as usize * 2;
            let count = last.1.as_ref().and_then(|bytes| bytes.get(at..)?.first_chunk().copied());
            match (count.map_or(0, u16::from_be_bytes), linked.has(number)) {
                (0, false) | (1, true) => {}
                (_, false) => self.found.leaked += 1,
                (count, true) => {
                    let why = format!("the cluster at {:#x} is counted {count} times", number * CLUSTER);
                    self.found.fault(why);
                }
            }
        }
        Ok(())
    }
}

/// What of the guest's bytes an entry is of: nothing, past the end of the disk.
fn range_of((table, at): Place, size: u64) -> Range<u64> {
    let start = (table as u64 * L2_REACH).saturating_add(at * CLUSTER).min(size);
    start..start.saturating_add(CLUSTER).min(size)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::{Qcow2Disk, create, read_l1};
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
