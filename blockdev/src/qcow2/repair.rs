//! Makes a volume's file whole again.
//!
//! ```text
//!   what leads nowhere, and marks of entries ─► sync
//!   room behind the file's end: tables and counts that are missing, copies of what two have ─► sync ─► links to it ─► sync
//!   reference counts, as the tables say ─► sync ─► no dirty or corrupt marks
//! ```
//! Each step leaves a file in which less is wrong: after a crash it is repaired like any other.

use super::check::{Checked, Findings, cluster, entries, look};
use super::layout::{CLUSTER, COPIED, COUNTS, ENTRIES};
use super::volume::Volume;
use super::{Header, ZERO, read_l1};
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

/// Repairs a file that nobody else has. Leaked clusters are freed and wrong counts corrected always. What of the guest's bytes is
/// lost stops it unless `discard` says not to: then that reads as zeros, and what several entries share becomes a copy for
/// each. `None` when hutch did not lay it out.
///
/// # Errors
/// `Format`: its header cannot be. `Io`, `NoSpace`: what is done counts; it may be tried again.
pub fn repair(store: &dyn Store, discard: bool) -> Result<Option<Repaired>> {
    let Some(findings) = look(store)? else { return Ok(None) };
    let done = discard || findings.found.keeps_all();
    if done {
        findings.mend(store)?;
    }
    Ok(Some(Repaired { found: findings.found, done }))
}

fn failed(e: std::io::Error) -> DiskError {
    DiskError::io("repair the volume", e)
}

/// Room behind the end of a file.
struct Behind(u64);

impl Behind {
    /// The next cluster: it reads as zeros once the file is as long.
    fn next(&mut self) -> u64 {
        self.0 += 1;
        (self.0 - 1) * CLUSTER
    }
}

impl Findings {
    fn mend(&self, store: &dyn Store) -> Result<()> {
        if self.found.wrong > 0 {
            self.cut_off(store)?;
            self.link_anew(store)?;
        }
        if self.found.wrong > 0 || self.found.leaked > 0 {
            // Opened, it has the counts that it should have, and what nothing links to is free.
            let (header, _) = Header::read_marked(store)?;
            let mut volume = Volume::recount(store, &header, &read_l1(store, &header)?)?;
            volume.write_counts(store).and_then(|()| store.sync()).map_err(failed)?;
        }
        if self.marked {
            Header::unmark(store).and_then(|()| store.sync()).map_err(failed)?;
        }
        Ok(())
    }

    fn entry(&self, (table, at): (usize, u64)) -> Option<u64> {
        self.l1.get(table).map(|l2| l2 + at * 8)
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
        // A table of two is the first's; the other's will be a copy.
        for (place, value) in self.set.iter().filter(|((table, _), _)| !self.same_table.contains(table)) {
            if let Some(at) = self.entry(*place) {
                put(at, *value)?;
            }
        }
        store.sync().map_err(failed)
    }

    fn link_anew(&self, store: &dyn Store) -> Result<()> {
        let put = |at: u64, value: u64| store.write_bytes(at, &value.to_be_bytes()).map_err(failed);
        let mut behind = Behind(self.clusters);
        let copies: Vec<_> = self.same.iter().map(|(place, from)| (*place, *from, behind.next())).collect();
        let lost: Vec<_> = self.no_table.iter().map(|index| (*index, behind.next())).collect();
        let same: Vec<_> = self.same_table.iter().map(|index| (*index, behind.next())).collect();
        // Each block counts itself and what else is new.
        let (mut blocks, mut links) = (self.blocks.clone(), Vec::new());
        let mut index = 0;
        while index < blocks.len() || behind.0 > blocks.len() as u64 * COUNTS {
            if index == blocks.len() {
                blocks.push(0);
            }
            if let Some(block) = blocks.get_mut(index).filter(|block| **block == 0) {
                *block = behind.next();
                links.push((index, *block));
            }
            index += 1;
        }
        if blocks.len() as u64 > u64::from(self.header.reftable_clusters) * ENTRIES {
            let context = "the volume's refcount table is full; restore it from a snapshot".to_owned();
            return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
        }
        if behind.0 == self.clusters {
            return Ok(());
        }
        store.set_len(behind.0 * CLUSTER).map_err(failed)?;
        // What a crash left there, and the last cluster of a file that was cut off within it.
        store.zero(self.clusters * CLUSTER, (behind.0 - self.clusters) * CLUSTER, true).map_err(failed)?;
        let mut bytes = vec![0; CLUSTER as usize];
        for (_, from, to) in &copies {
            store
                .read_bytes(*from, &mut bytes)
                .and_then(|()| store.write_bytes(*to, &bytes))
                .map_err(failed)?;
        }
        let zeros: Vec<u8> = (0..ENTRIES).flat_map(|_| ZERO.to_be_bytes()).collect();
        for (_, to) in &lost {
            store.write_bytes(*to, &zeros).map_err(failed)?;
        }
        for (index, to) in &same {
            let table = self.l1.get(*index).copied().unwrap_or(0);
            let mut table: Vec<u64> = match cluster(store, table)? {
                Some(bytes) => entries(&bytes).collect(),
                None => continue,
            };
            let of = |(table, at): &(usize, u64)| (table == index).then_some(*at as usize);
            let set = self.set.iter().filter_map(|(place, value)| Some((of(place)?, *value)));
            let copied = copies.iter().filter_map(|(place, _, to)| Some((of(place)?, to | COPIED)));
            for (at, value) in set.chain(copied) {
                if let Some(entry) = table.get_mut(at) {
                    *entry = value;
                }
            }
            let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            store.write_bytes(*to, &bytes).map_err(failed)?;
        }
        store.sync().map_err(failed)?;
        for (place, _, to) in copies.iter().filter(|((of, _), _, _)| !self.same_table.contains(of)) {
            if let Some(at) = self.entry(*place) {
                put(at, to | COPIED)?;
            }
        }
        for (index, to) in lost.iter().chain(&same) {
            put(self.header.l1_offset + *index as u64 * 8, to | COPIED)?;
        }
        for (index, to) in &links {
            put(self.header.reftable_offset + *index as u64 * 8, *to)?;
        }
        store.sync().map_err(failed)
    }
}
