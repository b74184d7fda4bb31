//! Whether a volume's file is whole: what its tables say, against each other and its reference counts. Nothing is changed
//! here; `repair` does with what is found what can be done.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};

use super::layout::{CLUSTER, CLUSTER_BITS, COPIED, COUNTS, ENTRIES, L2_REACH, blocks_of};
use super::linked::{Link, Linked};
use super::{COMPRESSED, Header, OFFSET, ZERO};
use crate::store::Store;
use crate::{DiskError, Result};

/// The most faults that are told one by one.
const TOLD: usize = 20;
/// The most of one kind that is kept in memory: a file that somebody made up may have any number.
const MOST: usize = 1 << 20;

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
    /// Of the guest's bytes, which may be something else's: at most one of them is right.
    pub shared: Vec<Range<u64>>,
}

impl Checked {
    pub(super) fn fault(&mut self, what: String) {
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
    pub(super) same_table: BTreeSet<usize>,
    /// Tables of which it is in doubt whether they are the right ones.
    doubted: BTreeSet<usize>,
    /// What has a cluster for itself.
    pub(super) linked: Linked,
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
fn note(ranges: &mut Vec<Range<u64>>, range: Range<u64>) -> Result<()> {
    match ranges.last_mut() {
        _ if range.is_empty() => {}
        Some(last) if last.end == range.start => last.end = range.end,
        _ => keep(ranges, range)?,
    }
    Ok(())
}

fn keep<T>(list: &mut Vec<T>, one: T) -> Result<()> {
    if list.len() >= MOST {
        return Err(DiskError::format(
            "more of the volume's file is damaged than can be repaired; restore it from a snapshot",
        ));
    }
    list.push(one);
    Ok(())
}

/// Ranges in their order, each place once.
fn in_order(ranges: &mut Vec<Range<u64>>) {
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let touch = next.start <= last.end;
        if touch {
            last.end = last.end.max(next.end);
        }
        touch
    });
}

/// Whether a cluster can be nothing but a table that links to something.
fn is_table(store: &dyn Store, offset: u64, clusters: u64) -> Result<bool> {
    let Some(bytes) = cluster(store, offset)? else { return Ok(false) };
    let mut links = false;
    for entry in entries(&bytes) {
        let at = entry & OFFSET;
        if entry & !(OFFSET | COPIED | ZERO) != 0 || !at.is_multiple_of(CLUSTER) || at / CLUSTER >= clusters {
            return Ok(false);
        }
        links |= at != 0 && entry & COPIED != 0;
    }
    Ok(links)
}

/// Checks a file that nobody writes to; `None` when it is a qcow2 that hutch did not lay out. `sizes` are those that its disk can
/// have.
///
/// # Errors
/// `Format`: its header cannot be, or there is no end to what is wrong; `Io`.
pub fn check(store: &dyn Store, sizes: &RangeInclusive<u64>) -> Result<Option<Checked>> {
    Ok(look(store, sizes)?.map(|findings| findings.found))
}

/// What is wrong with a file, and what is to be done about it.
pub(super) fn look(store: &dyn Store, sizes: &RangeInclusive<u64>) -> Result<Option<Findings>> {
    let (header, marks) = Header::read_marked(store)?;
    if header.cluster_bits != CLUSTER_BITS || header.refcount_order != 4 || header.version != 3 {
        return Ok(None);
    }
    if !sizes.contains(&header.size) {
        let (size, least, most) = (header.size, sizes.start(), sizes.end());
        return Err(DiskError::format(format!(
            "the file says that its disk has {size} bytes, and its record {least} to {most}; restore the volume from a snapshot"
        )));
    }
    let size = store.size().map_err(|e| DiskError::io("find the file's size", e))?;
    // One that the file ends within is none. Where nothing can be counted, nothing can be.
    let clusters = (size / CLUSTER).min(u64::from(header.reftable_clusters) * ENTRIES * COUNTS);
    let mut linked = Linked::new(clusters, size);
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
        same_table: BTreeSet::new(),
        doubted: BTreeSet::new(),
        linked,
        set_l1: Vec::new(),
        set: Vec::new(),
        same: Vec::new(),
        blocks: table(store, header.reftable_offset, u64::from(header.reftable_clusters) * ENTRIES)?,
        bad_blocks: Vec::new(),
        header,
    };
    findings.tables(store)?;
    findings.data(store)?;
    let mut same = findings.blocks();
    findings.counts(store, &mut same)?;
    findings.shared(store, same)?;
    in_order(&mut findings.found.lost);
    in_order(&mut findings.found.shared);
    Ok(Some(findings))
}

impl Findings {
    /// Which of the guest's bytes a table is of.
    fn reach(&self, index: usize) -> Range<u64> {
        let start = (index as u64 * L2_REACH).min(self.header.size);
        start..(start + L2_REACH).min(self.header.size)
    }

    /// The L2 tables. They come before what else is said to be there: counts can be had anew.
    fn tables(&mut self, store: &dyn Store) -> Result<()> {
        let disk = self.header.size.div_ceil(L2_REACH) as usize;
        let blocks: BTreeSet<u64> = self.blocks.iter().copied().collect();
        let mut first = BTreeMap::new();
        for (index, raw) in std::mem::take(&mut self.l1).into_iter().enumerate() {
            self.l1.push(0);
            let offset = raw & OFFSET;
            if raw == 0 && index >= disk {
                continue;
            }
            let known = raw & !(OFFSET | COPIED) == 0 && offset != 0;
            let link = if !known {
                self.found.fault(format!("the entry {index} of the L1 table is {raw:#x}"));
                Link::Outside
            } else if blocks.contains(&offset) && !is_table(store, offset, self.clusters)? {
                self.found.fault(format!("the L2 table at {offset:#x} is a refcount block"));
                Link::Outside
            } else {
                self.linked.add(offset, "an L2 table", &mut self.found)
            };
            let have = first.get(&offset).copied();
            match (link, have) {
                (Link::Good, _) => {
                    self.l1.last_mut().into_iter().for_each(|entry| *entry = offset);
                    first.insert(offset, index);
                    if raw & COPIED == 0 {
                        self.found
                            .fault(format!("the entry {index} of the L1 table is not marked as its own"));
                        self.set_l1.push((index, offset | COPIED));
                    }
                }
                // Nothing of the disk is there.
                _ if index >= disk => self.set_l1.push((index, 0)),
                // Which of them it is of nobody knows, though it may have no entries; the other's is somewhere.
                (Link::Taken, Some(have)) => {
                    self.l1.last_mut().into_iter().for_each(|entry| *entry = offset);
                    self.same_table.insert(index);
                    self.doubted.extend([have, index]);
                }
                _ => self.lose_table(index)?,
            }
        }
        Ok(())
    }

    fn lose_table(&mut self, index: usize) -> Result<()> {
        let reach = self.reach(index);
        self.no_table.push(index);
        note(&mut self.found.lost, reach)
    }

    /// The refcount blocks, which can be had anew. Tells those that are something else's, too.
    fn blocks(&mut self) -> BTreeSet<u64> {
        let mut same = BTreeSet::new();
        let last = self.blocks.iter().rposition(|block| *block != 0).map_or(0, |last| last + 1);
        let all = blocks_of(&self.header).max(last as u64).max(self.linked.end().div_ceil(COUNTS)) as usize;
        self.blocks.truncate(all);
        for (index, block) in self.blocks.iter_mut().enumerate() {
            let offset = std::mem::take(block);
            if offset == 0 {
                self.found.fault(format!("the refcount block {index} is missing"));
                continue;
            }
            match self.linked.add(offset, "a refcount block", &mut self.found) {
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
    fn data(&mut self, store: &dyn Store) -> Result<()> {
        let size = self.header.size;
        let tables = self.linked.clone();
        let own = |(index, l2): &(usize, &u64)| **l2 != 0 && !self.same_table.contains(index);
        for (index, l2) in self.l1.iter().enumerate().filter(own) {
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
                    0 => self.linked.add(offset, "a cluster", &mut self.found),
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
                            keep(&mut self.set, (place, offset | COPIED))?;
                        } else if entry & COPIED == 0 {
                            let why = format!("the cluster at {offset:#x} is not marked as its entry's own");
                            self.found.fault(why);
                            keep(&mut self.set, (place, entry | COPIED))?;
                        }
                    }
                    // Past the disk's end there is nothing to lose.
                    _ if range.is_empty() => keep(&mut self.set, (place, 0))?,
                    // It reads as zeros, and does so without a cluster.
                    _ if entry & !(OFFSET | COPIED) == ZERO => keep(&mut self.set, (place, ZERO))?,
                    Link::Taken if !tables.has(offset / CLUSTER) => keep(&mut self.same, (place, offset))?,
                    Link::Taken | Link::Outside => {
                        note(&mut self.found.lost, range)?;
                        keep(&mut self.set, (place, ZERO))?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares the reference counts with the links. Into `same` comes what is linked and counted as free: counts reach the disk
    /// before links do, so no crash makes that, and a wrong link does.
    fn counts(&mut self, store: &dyn Store, same: &mut BTreeSet<u64>) -> Result<()> {
        let (homes, mut free) = (self.homes(), BTreeSet::new());
        for (index, block) in (0..).zip(&mut self.blocks).filter(|(_, block)| **block != 0) {
            let numbers = index * COUNTS..((index + 1) * COUNTS).min(self.clusters);
            let bytes = cluster(store, *block)?.filter(|bytes| bytes.iter().any(|byte| *byte != 0));
            let Some(bytes) = bytes else {
                if numbers.clone().step_by(64).any(|number| self.linked.word(number / 64) != 0) {
                    // There will be another, whole as soon as it is linked.
                    self.found.fault(format!("the refcount block at {block:#x} holds no counts"));
                    *block = 0;
                }
                continue;
            };
            let mut word = 0;
            for (number, count) in numbers.zip(bytes.as_chunks().0) {
                if number.is_multiple_of(64) {
                    word = self.linked.word(number / 64);
                }
                let offset = number * CLUSTER;
                match (u16::from_be_bytes(*count), word >> (number % 64) & 1 == 1) {
                    (0, false) | (1, true) => {}
                    (_, false) => {
                        self.found.leaked += 1;
                        if let Some(table) = homes.get(&offset)
                            && is_table(store, offset, self.clusters)?
                        {
                            self.found.fault(format!("nothing links to the L2 table at {offset:#x}"));
                            self.doubted.insert(*table);
                        }
                    }
                    (count, true) => {
                        self.found.fault(format!("the cluster at {offset:#x} is counted {count} times"));
                        if count == 0 {
                            free.insert(offset);
                        }
                    }
                }
            }
        }
        for index in 0..self.l1.len() {
            let offset = self.l1.get(index).copied().filter(|l2| free.contains(l2));
            let Some(offset) = offset else { continue };
            self.doubted.insert(index);
            if !self.same_table.contains(&index) && !is_table(store, offset, self.clusters)? {
                self.l1.get_mut(index).into_iter().for_each(|entry| *entry = 0);
                self.lose_table(index)?;
            }
        }
        same.append(&mut free);
        Ok(())
    }

    /// Where tables would be that are elsewhere: each is laid out behind the one before it, the first behind the blocks.
    fn homes(&self) -> BTreeMap<u64, usize> {
        let mut homes = BTreeMap::new();
        let l1_end =
            self.header.l1_offset + (u64::from(self.header.l1_entries) * 8).next_multiple_of(CLUSTER);
        let blocks = (0..).zip(&self.blocks).take_while(|(i, block)| **block == l1_end + i * CLUSTER).count();
        let mut next = (blocks > 0).then_some(l1_end + blocks as u64 * CLUSTER);
        let disk = self.header.size.div_ceil(L2_REACH) as usize;
        let mut elsewhere = Vec::new();
        for (index, l2) in self.l1.iter().copied().enumerate().take(disk) {
            if next != Some(l2) {
                elsewhere.push(index);
                homes.extend(next.map(|at| (at, index)));
            }
            next = if l2 != 0 { Some(l2) } else { next }.map(|at| at + CLUSTER);
        }
        // One that lies where it should says nothing of the one before it.
        let mut next = None;
        for index in elsewhere.into_iter().rev() {
            let after = self.l1.get(index + 1).copied().filter(|after| *after != 0 && index + 1 < disk);
            next = after.or(next).and_then(|at: u64| at.checked_sub(CLUSTER));
            if let Some(at) = next {
                homes.entry(at).or_insert(index);
            }
        }
        homes
    }

    /// Which of the guest's clusters are another's, or in `same`.
    fn shared(&mut self, store: &dyn Store, mut same: BTreeSet<u64>) -> Result<()> {
        same.extend(self.same.iter().map(|(_, offset)| *offset));
        let size = self.header.size;
        for (index, l2) in self.l1.iter().enumerate().filter(|(_, l2)| **l2 != 0) {
            if self.doubted.contains(&index) {
                let reach = self.reach(index);
                note(&mut self.found.shared, reach)?;
                continue;
            }
            if same.is_empty() {
                continue;
            }
            for (at, entry) in (0..).zip(cluster(store, *l2)?.iter().flat_map(|bytes| entries(bytes))) {
                let known = entry & !(OFFSET | COPIED) == 0;
                if known && same.contains(&(entry & OFFSET)) {
                    note(&mut self.found.shared, range_of((index, at), size))?;
                }
            }
        }
        Ok(())
    }
}

/// What of the guest's bytes an entry is of: nothing, past the end of the disk.
pub(super) fn range_of((table, at): Place, size: u64) -> Range<u64> {
    let start = (table as u64 * L2_REACH).saturating_add(at * CLUSTER).min(size);
    start..start.saturating_add(CLUSTER).min(size)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::{MAX_SIZE, Qcow2Disk, create, read_l1};
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
        let whole = check(&file, &(0..=MAX_SIZE)).unwrap().unwrap();
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
            let found = check(&file, &(0..=MAX_SIZE)).unwrap().unwrap();
            assert!(found.wrong > 0 && found.faults.concat().contains(words), "{found:?}");
        }
        file.write_bytes(l2 + place * 8, &[0; 8]).unwrap();
        let found = check(&file, &(0..=MAX_SIZE)).unwrap().unwrap();
        assert_eq!((found.data, found.leaked, found.wrong), (2, 1, 0), "nothing links to it");
        file.write_bytes(l2 + place * 8, &entry.to_be_bytes()).unwrap();
        assert_eq!(check(&file, &(0..=MAX_SIZE)).unwrap().unwrap(), whole);
        let mut block = [0; 8];
        file.read_bytes(header.reftable_offset, &mut block).unwrap();
        let count = u64::from_be_bytes(block) + (entry & OFFSET) / CLUSTER * 2;
        for wrong in [0_u16, 2] {
            file.write_bytes(count, &wrong.to_be_bytes()).unwrap();
            let found = check(&file, &(0..=MAX_SIZE)).unwrap().unwrap();
            assert!(found.faults.concat().contains(&format!("counted {wrong} times")), "{found:?}");
        }
    }
}
