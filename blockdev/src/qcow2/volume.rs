//! Writing: which clusters are taken, and in which order metadata reaches the disk.
//!
//! ```text
//!   write    data into fresh clusters ─► entries in memory
//!   flush    counts of the fresh ones ─► sync ─► entries ─► sync ─► old clusters are punched, counted down, reusable
//! ```
//! A crash between any two steps leaves at worst counted clusters that nothing links to; the next opening frees them.

mod grow;
mod open;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::cache::Slice;
use super::layout::{CLUSTER, COPIED, COUNTS};
use super::{Inner, Mapping, ZERO};
use crate::cursor::{Cursor, buffer};
use crate::later::Moving;
use crate::store::Store;
use crate::{DiskError, DiskErrorKind, IoBuf, Result};

/// Counts are written by sectors of so many.
const GROUP: u64 = 256;
/// The file grows by this much at a time.
const STEP: u64 = 16 << 20;

/// The clusters of a volume's file.
pub(super) struct Volume {
    /// Where each refcount block lies.
    blocks: Vec<u64>,
    /// One bit a cluster: taken.
    taken: Vec<u64>,
    /// From here on no cluster was ever used: they read as zeros.
    fresh: u64,
    /// Runs of clusters below that can be used again: first and number.
    free: BTreeMap<u64, u64>,
    /// Clusters that no entry in memory links to any more, but an entry on the disk may.
    leaving: Vec<u64>,
    /// Those that no entry on the disk links to either, with what whoever may still move bytes of them holds; the oldest first.
    resting: VecDeque<(Moving, Vec<u64>)>,
    /// Groups of counts that are not on the disk as they are here.
    counts: BTreeSet<u64>,
    /// The file's size.
    len: u64,
}

/// Clusters for new data.
struct Fresh {
    first: u64,
    count: u64,
    /// They read as zeros.
    zero: bool,
}

fn damaged<T>(why: String) -> Result<T> {
    Err(DiskError::format(format!(
        "{why}; the volume is damaged: repair it (hutch volume repair), or restore it from a snapshot"
    )))
}

impl Volume {
    /// Clusters that can be counted.
    fn limit(&self) -> u64 {
        self.blocks.len() as u64 * COUNTS
    }

    fn is_taken(&self, cluster: u64) -> bool {
        self.taken.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 == 1)
    }

    fn set_taken(&mut self, cluster: u64, taken: bool) {
        let word = (cluster / 64) as usize;
        if word >= self.taken.len() {
            self.taken.resize(word + 1, 0);
        }
        if let Some(word) = self.taken.get_mut(word) {
            let bit = 1 << (cluster % 64);
            *word = if taken { *word | bit } else { *word & !bit };
        }
        self.counts.insert(cluster / GROUP);
    }

    fn group_offset(&self, group: u64) -> Option<u64> {
        let count = group * GROUP;
        let block = self.blocks.get((count / COUNTS) as usize)?;
        Some(block + count % COUNTS * 2)
    }

    fn group_bytes(&self, group: u64) -> Vec<u8> {
        (group * GROUP..(group + 1) * GROUP).flat_map(|c| [0, u8::from(self.is_taken(c))]).collect()
    }

    /// Up to `wanted` clusters that lie together; `None` when all that can be counted are taken.
    fn take(&mut self, wanted: u64) -> Option<Fresh> {
        // One that holds it all keeps the guest's run in one piece; the search for it is short.
        let fits = self.free.iter().take(64).find(|(_, count)| **count >= wanted).map(|(first, _)| *first);
        let run = match fits {
            Some(first) => self.free.remove_entry(&first),
            None => self.free.pop_first(),
        };
        let fresh = match run {
            Some((first, count)) => {
                if count > wanted {
                    self.free.insert(first + wanted, count - wanted);
                }
                Fresh { first, count: count.min(wanted), zero: false }
            }
            None => {
                let count = wanted.min(self.limit().saturating_sub(self.fresh));
                self.fresh += count;
                Fresh { first: self.fresh - count, count, zero: true }
            }
        };
        for cluster in fresh.first..fresh.first + fresh.count {
            self.set_taken(cluster, true);
        }
        (fresh.count > 0).then_some(fresh)
    }

    /// Clusters that nothing ever linked to can be used again at once.
    fn give_back(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            self.set_taken(cluster, false);
        }
        if count == 0 {
            return;
        }
        let (mut first, mut count) = (first, count);
        if let Some((&before, &len)) = self.free.range(..first).next_back()
            && before + len == first
        {
            (first, count) = (before, len + count);
        }
        if let Some(after) = self.free.remove(&(first + count)) {
            count += after;
        }
        self.free.insert(first, count);
    }

    /// Writes the counts that changed.
    pub(super) fn write_counts(&mut self, store: &dyn Store) -> std::io::Result<()> {
        let mut groups = std::mem::take(&mut self.counts).into_iter().peekable();
        while let Some(first) = groups.next() {
            let Some(at) = self.group_offset(first) else { continue };
            let mut bytes = self.group_bytes(first);
            let mut last = first;
            // Groups that lie together are written together; blocks may lie apart.
            while groups.peek() == Some(&(last + 1)) && !((last + 1) * GROUP).is_multiple_of(COUNTS) {
                last += 1;
                groups.next();
                bytes.extend(self.group_bytes(last));
            }
            if let Err(e) = store.write_bytes(at, &bytes) {
                self.counts.extend(first..=last);
                self.counts.extend(groups);
                return Err(e);
            }
        }
        Ok(())
    }
}

impl Inner {
    fn volume(&mut self) -> Result<&mut Volume> {
        self.volume.as_mut().ok_or_else(|| DiskError {
            kind: DiskErrorKind::ReadOnly,
            context: "the disk is read-only".into(),
            source: None,
        })
    }

    /// A failed metadata write: when the host is full it may be tried again, else the disk is in doubt.
    fn metadata_error(&mut self, e: std::io::Error) -> DiskError {
        let error = DiskError::io("write the volume's metadata", e);
        self.failed |= error.kind != DiskErrorKind::NoSpace;
        error
    }

    /// The L2 entry of guest cluster `index`, whose table exists.
    pub(super) fn entry(&mut self, index: u64) -> Result<u64> {
        self.load(index)?;
        Ok(self.cache.find(index).and_then(|(slice, at)| slice.entries.get(at).copied()).unwrap_or(0))
    }

    fn set_entry(&mut self, index: u64, value: u64) -> Result<()> {
        self.load(index)?;
        if let Some((slice, at)) = self.cache.find(index)
            && let Some(entry) = slice.entries.get_mut(at)
        {
            slice.dirty |= *entry != value;
            *entry = value;
        }
        Ok(())
    }

    /// Brings the slice with guest cluster `index` into the cache.
    fn load(&mut self, index: u64) -> Result<()> {
        if self.cache.find(index).is_some() {
            return Ok(());
        }
        if !self.cache.has_room() {
            self.commit()?;
            self.cache.has_room();
        }
        let (table, at) = self.place(index);
        let width = self.cache.width();
        let offset = self.l1.get(table).copied().unwrap_or(0) + at / width * width * 8;
        let mut bytes = vec![0; width as usize * 8];
        self.store.read_bytes(offset, &mut bytes).map_err(|e| DiskError::io("read an L2 table", e))?;
        self.cache.put(index, Slice::new(offset, &bytes));
        Ok(())
    }

    /// Makes all metadata durable, in the order that keeps the image whole at every step.
    pub(super) fn commit(&mut self) -> Result<()> {
        let Some(volume) = self.volume.as_mut() else { return Ok(()) };
        let dirty = !self.cache.dirty().is_empty();
        if !dirty && volume.counts.is_empty() && volume.leaving.is_empty() {
            return self.reclaim().map(|_| ());
        }
        if let Err(e) = volume.write_counts(&*self.store) {
            return Err(self.metadata_error(e));
        }
        // Data and counts are on the disk before anything links to them.
        self.sync()?;
        if dirty {
            let mut written = Ok(());
            for slice in self.cache.dirty() {
                written = self.store.write_bytes(slice.offset, &slice.to_bytes());
                if written.is_err() {
                    break;
                }
                slice.dirty = false;
            }
            if let Err(e) = written {
                return Err(self.metadata_error(e));
            }
            self.sync()?;
        }
        let Some(volume) = self.volume.as_mut() else { return Ok(()) };
        if !volume.leaving.is_empty() {
            // Nothing on the disk links to these any more, and whoever looks from now on does not find them.
            let moving = std::mem::take(&mut self.moving);
            volume.resting.push_back((moving, std::mem::take(&mut volume.leaving)));
        }
        self.reclaim().map(|_| ())
    }

    /// Gives the clusters back that nothing links to, and of which nobody moves bytes any more; whether that is all of them.
    pub(super) fn reclaim(&mut self) -> Result<bool> {
        let Some(volume) = self.volume.as_mut() else { return Ok(true) };
        let mut changed = false;
        while let Some((moving, _)) = volume.resting.front_mut()
            && Moving::get_mut(moving).is_some()
            && let Some((_, mut clusters)) = volume.resting.pop_front()
        {
            clusters.sort_unstable();
            for run in clusters.chunk_by(|a, b| a + 1 == *b) {
                let (first, count) = (run.first().copied().unwrap_or(0), run.len() as u64);
                // Space that the host does not take back is only that: the cluster is filled whole when it is used again.
                let _ = self.store.zero(first * CLUSTER, count * CLUSTER, true);
                volume.give_back(first, count);
            }
            changed = true;
        }
        let all = volume.resting.is_empty();
        // Durable with the next sync; until then they are counted, but not linked.
        if changed && let Err(e) = volume.write_counts(&*self.store) {
            return Err(self.metadata_error(e));
        }
        Ok(all)
    }

    pub(super) fn sync(&mut self) -> Result<()> {
        self.syncs.sync().inspect_err(|_| self.failed = true)
    }

    /// Writes up to `len` bytes at `at` into clusters of their own; returns how many. What the first and the last of
    /// them held before is kept.
    ///
    /// # Safety
    /// As [`crate::Disk::write_vectored`], for what the cursor holds.
    pub(super) unsafe fn write_fresh(&mut self, at: u64, len: u64, cursor: &mut Cursor<'_>) -> Result<u64> {
        let index = at / CLUSTER;
        let wanted = (at + len).div_ceil(CLUSTER) - index;
        let fresh = match self.volume()?.take(wanted) {
            Some(fresh) => fresh,
            None => {
                // Freed clusters become usable once that is durable, and nobody reads them any more.
                self.commit()?;
                let volume = self.volume()?;
                match volume.take(wanted) {
                    Some(fresh) => fresh,
                    None if volume.resting.is_empty() => {
                        let why = "the volume has no cluster left to count; it is damaged";
                        return Err(DiskError::format(why));
                    }
                    None => {
                        let context = "all free clusters are still being read".into();
                        return Err(DiskError { kind: DiskErrorKind::NoSpace, context, source: None });
                    }
                }
            }
        };
        let (start, stop) = (index * CLUSTER, (index + fresh.count) * CLUSTER);
        let len = len.min(stop - at);
        // SAFETY: the part is of the caller's buffers.
        let done = unsafe { self.fill(&fresh, start, (at, len), &cursor.take(len), stop) };
        let mut linked = 0;
        let result = done.and_then(|()| {
            for i in 0..fresh.count {
                let old = self.mapping(index + i)?;
                self.set_entry(index + i, ((fresh.first + i) * CLUSTER) | COPIED)?;
                linked = i + 1;
                self.leave(old)?;
            }
            Ok(len)
        });
        if result.is_err() {
            self.volume()?.give_back(fresh.first + linked, fresh.count - linked);
        }
        result
    }

    /// Writes fresh clusters whole: what guest range `start..stop` holds, with `part` in the place of `at, len`.
    ///
    /// # Safety
    /// As [`crate::Disk::write_vectored`], for `part`.
    unsafe fn fill(
        &mut self,
        fresh: &Fresh,
        start: u64,
        (at, len): (u64, u64),
        part: &[IoBuf],
        stop: u64,
    ) -> Result<()> {
        let size = self.header.size;
        // Encrypted, zeros are to be written like anything else.
        let zero = fresh.zero && !self.payload.encrypted();
        let before = self.old_bytes(start, at, zero)?;
        // The guest's disk may end within its last cluster.
        let after = self.old_bytes(at + len, stop.min(size.next_multiple_of(CLUSTER)), zero)?;
        let mut bufs = Vec::with_capacity(part.len() + 2);
        bufs.extend(before.as_deref().map(buffer));
        bufs.extend_from_slice(part);
        bufs.extend(after.as_deref().map(buffer));
        let host = fresh.first * CLUSTER;
        let skip = if before.is_some() { 0 } else { at - start };
        let end = host + fresh.count * CLUSTER;
        let volume = self.volume()?;
        if end > volume.len {
            let len = end.next_multiple_of(STEP);
            self.store.set_len(len).map_err(|e| DiskError::io("grow the volume's file", e))?;
            self.volume()?.len = len;
        }
        // SAFETY: the caller's promise for `part`; the rest is ours and outlives the call.
        unsafe { self.payload.write(host + skip, start + skip, &bufs) }
            .map_err(|e| DiskError::io("write the disk", e))
    }

    /// What guest range `from..to`, within one cluster that is not in the file, holds now. `None` when there is nothing
    /// to write: the range is empty, or it is zeros and `zero` says that so is the cluster.
    fn old_bytes(&mut self, from: u64, to: u64, zero: bool) -> Result<Option<Vec<u8>>> {
        if from >= to {
            return Ok(None);
        }
        let base = self.base.size();
        let hole = self.mapping(from / CLUSTER)? == Mapping::Hole;
        if zero && !(hole && from < base) {
            return Ok(None);
        }
        let mut bytes = vec![0; (to - from) as usize];
        if hole && from < base {
            // SAFETY: the buffer is ours.
            unsafe {
                super::read_base(
                    self.base.get().as_ref(),
                    from,
                    &[libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }],
                    None,
                )
            }?;
        }
        Ok(Some(bytes))
    }

    /// The whole clusters of guest range `at..end` read as zeros from now on. Returns where they begin and end: the rest is
    /// left to be done.
    pub(super) fn write_zero_clusters(&mut self, at: u64, end: u64, unmap: bool) -> Result<(u64, u64)> {
        let from = at.next_multiple_of(CLUSTER).min(end);
        // The disk's last cluster is whole where the disk ends.
        let to = if end == self.header.size { end } else { end / CLUSTER * CLUSTER }.max(from);
        let mut index = from.div_ceil(CLUSTER);
        while index * CLUSTER < to {
            match self.mapping(index)? {
                Mapping::Data(host) if !unmap => {
                    let zero = self.payload.zero(host, index * CLUSTER, CLUSTER);
                    zero.map_err(|e| DiskError::io("zero a part of the disk", e))?;
                }
                _ => self.unlink(index)?,
            }
            index += 1;
        }
        Ok((from, to))
    }

    /// Whether the guest's cluster at `at` is known to be zeros from there on.
    pub(super) fn is_zero(&mut self, at: u64) -> Result<bool> {
        Ok(match self.mapping(at / CLUSTER)? {
            Mapping::Zero(_) => true,
            Mapping::Hole => at >= self.base.size(),
            _ => false,
        })
    }

    /// Guest cluster `index` reads as zeros and takes no room.
    fn unlink(&mut self, index: u64) -> Result<()> {
        // Without a base an empty entry is zeros too.
        let empty = if self.base.get().is_some() { ZERO } else { 0 };
        let old = self.mapping(index)?;
        self.set_entry(index, empty)?;
        self.leave(old)
    }

    /// The cluster of a mapping that no entry in memory has any more will be free once that is durable.
    fn leave(&mut self, old: Mapping) -> Result<()> {
        if let Mapping::Data(host) | Mapping::Zero(host) = old
            && host != 0
        {
            self.volume()?.leaving.push(host / CLUSTER);
        }
        Ok(())
    }

    /// The guest does not need this range any more; parts of clusters are kept.
    pub(super) fn discard(&mut self, at: u64, len: u64) -> Result<()> {
        let end = at + len;
        let last = if end == self.header.size { end.div_ceil(CLUSTER) } else { end / CLUSTER };
        for index in at.div_ceil(CLUSTER)..last {
            if !matches!(self.mapping(index)?, Mapping::Zero(0)) {
                self.unlink(index)?;
            }
        }
        Ok(())
    }
}
