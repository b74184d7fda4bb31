//! Makes a volume's file whole again.
//!
//! ```text
//!   what leads nowhere, and marks of entries ─► sync
//!   room behind all that is in use: tables and counts that are missing, copies of what two have, all counted
//!                                                                                          ─► sync ─► links to it ─► sync
//!   reference counts, as the tables say ─► sync ─► no dirty or corrupt marks
//! ```
//! Each step leaves a file in which less is wrong: after a crash it is repaired like any other.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::check::{Checked, Findings, Place, cluster, entries, look, range_of};
use super::layout::{CLUSTER, COPIED, COUNTS, ENTRIES};
use super::volume::Volume;
use super::{Header, OFFSET, ZERO, read_l1};
use crate::store::Store;
use crate::{DiskError, DiskErrorKind, Result};

/// What came of a repair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// What was found.
    pub found: Checked,
    /// Whether the file is whole now. If not, nothing was written: it could not be done without loss.
    pub done: bool,
}

/// Repairs a file that nobody else has, of a disk that has one of `sizes`, with up to `room` more bytes of the host's. Wrong counts
/// are corrected always; leaked clusters are freed where nothing else is wrong, for else they may be what something should lead
/// to. What of the guest's bytes is lost or in doubt stops it unless `discard` says not to: then what is lost reads as zeros, and
/// what several entries share becomes a copy for each. `None` when hutch did not lay it out.
///
/// # Errors
/// `Format`: its header cannot be, or there is no end to what is wrong. `OutOfRange`, `NoSpace` for want of `room`: nothing was
/// written. `Io`, `NoSpace`: what is done counts; it may be tried again.
pub fn repair(
    store: &dyn Store,
    discard: bool,
    sizes: &RangeInclusive<u64>,
    room: u64,
) -> Result<Option<Repaired>> {
    let Some(findings) = look(store, sizes)? else { return Ok(None) };
    let done = discard || findings.found.keeps_all();
    if done {
        findings.mend(store, discard, room)?;
    }
    Ok(Some(Repaired { found: findings.found, done }))
}

fn failed(e: std::io::Error) -> DiskError {
    DiskError::io("repair the volume", e)
}

/// Room behind all that is in use.
struct Behind(u64);

impl Behind {
    /// The next cluster: it reads as zeros once the file is as long.
    fn next(&mut self) -> u64 {
        self.0 += 1;
        (self.0 - 1) * CLUSTER
    }
}

impl Findings {
    fn mend(&self, store: &dyn Store, discard: bool, room: u64) -> Result<()> {
        if self.found.wrong > 0 {
            let end = self.end(store, discard)?;
            let new = self.new_clusters(store, end, room)?;
            self.cut_off(store)?;
            if new > 0 {
                self.link_anew(store, end)?;
            }
        }
        if self.found.wrong > 0 || self.found.leaked > 0 {
            // Opened, it has the counts that it should have.
            let (header, _) = Header::read_marked(store)?;
            let free = discard || self.found.wrong == 0;
            let mut volume = Volume::recount(store, &header, &read_l1(store, &header)?, free)?;
            volume.write_counts(store).and_then(|()| store.sync()).map_err(failed)?;
        }
        if self.marked {
            Header::unmark(store).and_then(|()| store.sync()).map_err(failed)?;
        }
        Ok(())
    }

    /// Behind which cluster room is taken: behind the last that is in use, so that what an earlier repair could not link is taken
    /// again. Unasked, behind all that somebody may miss; such a repair only makes counts.
    fn end(&self, store: &dyn Store, discard: bool) -> Result<u64> {
        let (mut end, mut next) = (self.linked.end(), self.linked.end());
        while !discard && let Some(data) = store.next_data(next * CLUSTER).map_err(failed)? {
            next = data / CLUSTER + 1;
            let bytes = cluster(store, data / CLUSTER * CLUSTER)?.unwrap_or_default();
            if !bytes.as_chunks().0.iter().all(|count| u16::from_be_bytes(*count) <= 1) {
                end = next;
            }
        }
        Ok(end)
    }

    /// How many clusters there will be behind `end`, at most.
    fn new_clusters(&self, store: &dyn Store, end: u64, room: u64) -> Result<u64> {
        let mut held = BTreeMap::new();
        let mut new = (self.same.len() + self.no_table.len() + self.same_table.len()) as u64;
        for l2 in self.same_table.iter().filter_map(|index| self.l1.get(*index).copied()) {
            let count = match held.get(&l2) {
                Some(count) => *count,
                None => {
                    let bytes = cluster(store, l2)?.unwrap_or_default();
                    let count = entries(&bytes).filter(|entry| entry & OFFSET != 0).count() as u64;
                    held.insert(l2, count);
                    count
                }
            };
            new += count;
        }
        // Each block counts itself and what else is new.
        new += self.blocks.iter().filter(|block| **block == 0).count() as u64;
        let mut blocks = self.blocks.len() as u64;
        let most = u64::from(self.header.reftable_clusters) * ENTRIES;
        while end + new > blocks * COUNTS && blocks <= most {
            blocks += 1;
            new += 1;
        }
        if blocks > most {
            let context = "the volume's refcount table is full; restore it from a snapshot".to_owned();
            return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
        }
        let bytes = new.saturating_mul(CLUSTER);
        if bytes > room {
            let context = format!(
                "the repair takes {bytes} bytes, and the host has {room}; make room, or restore the volume from a snapshot"
            );
            return Err(DiskError { kind: DiskErrorKind::NoSpace, context, source: None });
        }
        Ok(new)
    }

    /// Where an entry is whose table stays.
    fn entry(&self, (table, at): Place) -> Option<u64> {
        self.l1.get(table).filter(|l2| **l2 != 0).map(|l2| l2 + at * 8)
    }

    /// Before there is anything new in the file, nothing leads to where it will be.
    fn cut_off(&self, store: &dyn Store) -> Result<()> {
        let put = |at: u64, value: u64| store.write_bytes(at, &value.to_be_bytes()).map_err(failed);
        for (index, value) in &self.set_l1 {
            put(self.header.l1_offset + *index as u64 * 8, *value)?;
        }
        for index in &self.no_table {
            put(self.header.l1_offset + *index as u64 * 8, 0)?;
        }
        for index in &self.bad_blocks {
            put(self.header.reftable_offset + *index as u64 * 8, 0)?;
        }
        for (place, value) in &self.set {
            if let Some(at) = self.entry(*place) {
                put(at, *value)?;
            }
        }
        store.sync().map_err(failed)
    }

    fn link_anew(&self, store: &dyn Store, end: u64) -> Result<()> {
        let put = |at: u64, value: u64| store.write_bytes(at, &value.to_be_bytes()).map_err(failed);
        let put_table = |at: u64, table: &[u64]| {
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            store.write_bytes(at, &bytes).map_err(failed)
        };
        let mut cluster_bytes = vec![0; CLUSTER as usize];
        let mut copy = |from: u64, to: u64| {
            let copied = store.read_bytes(from, &mut cluster_bytes);
            copied.and_then(|()| store.write_bytes(to, &cluster_bytes)).map_err(failed)
        };
        // From there on all reads as zeros.
        store.set_len(end * CLUSTER).map_err(failed)?;
        let mut behind = Behind(end);
        let (mut entries_to, mut tables_to) = (Vec::new(), Vec::new());
        for (place, from) in &self.same {
            if let Some(at) = self.entry(*place) {
                let to = behind.next();
                copy(*from, to)?;
                entries_to.push((at, to));
            }
        }
        for index in &self.no_table {
            let to = behind.next();
            put_table(to, &[ZERO; ENTRIES as usize])?;
            tables_to.push((*index, to));
        }
        // A table of two is the first's; the other's is a copy, and so is what it leads to.
        for index in &self.same_table {
            let to = behind.next();
            let bytes = cluster(store, self.l1.get(*index).copied().unwrap_or(0))?;
            let mut table: Vec<u64> = bytes.iter().flat_map(|bytes| entries(bytes)).collect();
            for (at, entry) in (0..).zip(&mut table).filter(|(_, entry)| **entry & OFFSET != 0) {
                *entry = match *entry & ZERO {
                    _ if range_of((*index, at), self.header.size).is_empty() => 0,
                    0 => {
                        let to = behind.next();
                        copy(*entry & OFFSET, to)?;
                        to | COPIED
                    }
                    zero => zero,
                };
            }
            put_table(to, &table)?;
            tables_to.push((*index, to));
        }
        let blocks_to = self.count_new(store, &mut behind, end)?;
        store.set_len(behind.0 * CLUSTER).and_then(|()| store.sync()).map_err(failed)?;
        for (at, to) in entries_to {
            put(at, to | COPIED)?;
        }
        for (index, to) in tables_to {
            put(self.header.l1_offset + index as u64 * 8, to | COPIED)?;
        }
        for (index, to) in blocks_to {
            put(self.header.reftable_offset + index * 8, to)?;
        }
        store.sync().map_err(failed)
    }

    /// Counts what is new before anything links to it, and all there is in the blocks that are new; returns these.
    fn count_new(&self, store: &dyn Store, behind: &mut Behind, end: u64) -> Result<Vec<(u64, u64)>> {
        let (mut blocks, mut new, mut index) = (self.blocks.clone(), Vec::new(), 0);
        while index < blocks.len() || behind.0 > blocks.len() as u64 * COUNTS {
            if index == blocks.len() {
                blocks.push(0);
            }
            if let Some(block) = blocks.get_mut(index).filter(|block| **block == 0) {
                *block = behind.next();
                new.push((index as u64, *block));
            }
            index += 1;
        }
        let added = end..behind.0;
        for (index, block) in &new {
            let numbers = index * COUNTS..(index + 1) * COUNTS;
            let counted = |number: u64| added.contains(&number) || self.linked.has(number);
            let bytes: Vec<u8> = numbers.flat_map(|number| [0, u8::from(counted(number))]).collect();
            if bytes.iter().any(|byte| *byte != 0) {
                store.write_bytes(*block, &bytes).map_err(failed)?;
            }
        }
        for (index, block) in (0..).zip(&self.blocks).filter(|(_, block)| **block != 0) {
            let first = added.start.max(index * COUNTS);
            let count = added.end.min((index + 1) * COUNTS).saturating_sub(first);
            if count > 0 {
                let at = block + first % COUNTS * 2;
                store.write_bytes(at, &[0, 1].repeat(count as usize)).map_err(failed)?;
            }
        }
        Ok(new)
    }
}
