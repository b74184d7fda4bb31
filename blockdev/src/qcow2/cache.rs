//! L2 tables in memory, in slices of 4 KiB, so that a large disk's map costs no more than a small one's.

use std::collections::HashMap;

/// Bytes of a slice, and how many are kept: 2 MiB, which map 16 GiB with clusters of 64 KiB.
const SLICE: u64 = 4096;
const SLICES: usize = 512;

/// A part of an L2 table.
pub(super) struct Slice {
    /// Where it lies in the file.
    pub(super) offset: u64,
    pub(super) entries: Vec<u64>,
    pub(super) dirty: bool,
    used: u64,
}

impl Slice {
    pub(super) fn new(offset: u64, bytes: &[u8]) -> Slice {
        let entries = bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)).collect();
        Slice { offset, entries, dirty: false, used: 0 }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|e| e.to_be_bytes()).collect()
    }
}

/// The slices, by the number of their first entry over all tables.
pub(super) struct Cache {
    slices: HashMap<u64, Slice>,
    entries: u64,
    clock: u64,
}

impl Cache {
    pub(super) fn new(cluster_bits: u32) -> Cache {
        Cache { slices: HashMap::new(), entries: (1_u64 << cluster_bits).min(SLICE) / 8, clock: 0 }
    }

    /// Entries of a slice.
    pub(super) fn width(&self) -> u64 {
        self.entries
    }

    /// The slice that holds guest cluster `index`, and the entry's place in it.
    pub(super) fn find(&mut self, index: u64) -> Option<(&mut Slice, usize)> {
        let slice = self.slices.get_mut(&(index / self.entries))?;
        self.clock += 1;
        slice.used = self.clock;
        Some((slice, (index % self.entries) as usize))
    }

    /// Whether a slice may be put in; else dirty ones have to be written first.
    pub(super) fn has_room(&mut self) -> bool {
        if self.slices.len() < SLICES {
            return true;
        }
        let oldest =
            self.slices.iter().filter(|(_, s)| !s.dirty).min_by_key(|(_, s)| s.used).map(|(k, _)| *k);
        oldest.is_some_and(|key| self.slices.remove(&key).is_some())
    }

    pub(super) fn put(&mut self, index: u64, slice: Slice) {
        self.slices.insert(index / self.entries, slice);
    }

    /// The slices that are not on the disk as they are here, in the order of the file.
    pub(super) fn dirty(&mut self) -> Vec<&mut Slice> {
        let mut dirty: Vec<_> = self.slices.values_mut().filter(|s| s.dirty).collect();
        dirty.sort_by_key(|s| s.offset);
        dirty
    }
}
