//! Opening a volume: all of its metadata is read, and what no crash can have left so is refused.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::OFFSET;
use super::super::header::Header;
use super::super::layout::{CLUSTER, CLUSTER_BITS, COUNTS, ENTRIES, L2_REACH, is_ours};
use super::{GROUP, Volume, damaged};
use crate::store::Store;
use crate::{DiskError, Result, SECTOR};

impl Volume {
    /// Reads all metadata of a volume, frees what a crash left behind, and refuses what it did not make.
    pub(in crate::qcow2) fn open(store: &dyn Store, header: &Header, l1: &[u64]) -> Result<Volume> {
        Volume::read(store, header, l1, true, true)
    }

    /// As [`open`](Volume::open), for a repair: what links to a cluster is right, and counts are not. Only where `free` says so
    /// is the room freed that nothing links to.
    pub(in crate::qcow2) fn recount(
        store: &dyn Store,
        header: &Header,
        l1: &[u64],
        free: bool,
    ) -> Result<Volume> {
        Volume::read(store, header, l1, false, free)
    }

    fn read(store: &dyn Store, header: &Header, l1: &[u64], counted: bool, free: bool) -> Result<Volume> {
        let io = |e| DiskError::io("read the volume's metadata", e);
        if header.cluster_bits != CLUSTER_BITS || header.refcount_order != 4 || header.version != 3 {
            let why =
                "the image was not made by hutch, so it is only read; import it, then make a volume of it";
            return Err(DiskError::format(why));
        }
        let len = store.size().map_err(io)?;
        let mut volume = Volume {
            blocks: Vec::new(),
            taken: Vec::new(),
            fresh: 0,
            free: BTreeMap::new(),
            leaving: Vec::new(),
            resting: VecDeque::new(),
            counts: BTreeSet::new(),
            len,
        };
        let mut table = vec![0; header.reftable_clusters as usize * CLUSTER as usize];
        store.read_bytes(header.reftable_offset, &mut table).map_err(io)?;
        let mut entries = table.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b));
        volume.blocks = entries.by_ref().take_while(|b| *b != 0).collect();
        // Growth that a crash cut off may have left some, without those before.
        let stale = entries.any(|b| b != 0);

        let own = 1 + u64::from(header.reftable_clusters) + u64::from(header.l1_entries).div_ceil(ENTRIES);
        let tables = header.size.div_ceil(L2_REACH) as usize;
        if l1.iter().take(tables).any(|offset| *offset == 0) {
            let why =
                "the image was not made by hutch, so it is only read; import it, then make a volume of it";
            return Err(DiskError::format(why));
        }
        let parts = [
            (0..1).map(|c| c * CLUSTER).collect::<Vec<_>>(),
            (0..u64::from(header.reftable_clusters)).map(|c| header.reftable_offset + c * CLUSTER).collect(),
            (0..own - 1 - u64::from(header.reftable_clusters))
                .map(|c| header.l1_offset + c * CLUSTER)
                .collect(),
            volume.blocks.clone(),
            l1.iter().copied().filter(|offset| *offset != 0).collect(),
        ];
        for offset in parts.into_iter().flatten() {
            volume.claim(offset)?;
        }
        for &offset in l1.iter().filter(|offset| **offset != 0) {
            volume.claim_data(store, offset)?;
        }
        volume.settle(store, counted, free)?;
        if stale {
            let list = volume.blocks.len() * 8;
            let none = vec![0; table.len() - list];
            store.write_bytes(header.reftable_offset + list as u64, &none).map_err(io)?;
        }
        Ok(volume)
    }

    /// Marks the cluster at `offset` as taken; nothing else may have it.
    fn claim(&mut self, offset: u64) -> Result<()> {
        let cluster = offset / CLUSTER;
        if !offset.is_multiple_of(CLUSTER) || offset >= self.len || cluster >= self.limit() {
            return damaged(format!("something is said to be at {offset:#x}, where nothing can be"));
        }
        if self.is_taken(cluster) {
            return damaged(format!("the cluster at {offset:#x} is used twice"));
        }
        self.set_taken(cluster, true);
        Ok(())
    }

    /// Claims what the L2 table at `offset` links to. Holes of it are empty entries, and cost nothing.
    fn claim_data(&mut self, store: &dyn Store, offset: u64) -> Result<()> {
        let io = |e| DiskError::io("read the volume's metadata", e);
        let mut at = offset;
        let mut bytes = vec![0; 4096];
        while let Some(data) = store.next_data(at).map_err(io)?.filter(|data| *data < offset + CLUSTER) {
            at = data.max(offset) / 4096 * 4096;
            store.read_bytes(at, &mut bytes).map_err(io)?;
            for entry in bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b)) {
                if !is_ours(entry) {
                    return damaged(format!("an L2 entry is {entry:#x}"));
                }
                if entry & OFFSET != 0 {
                    self.claim(entry & OFFSET)?;
                }
            }
            at += 4096;
        }
        Ok(())
    }

    /// After everything is claimed: counts that differ are marked to be written, the file ends behind the last cluster in use,
    /// and what is free before that is given back to the host.
    fn settle(&mut self, store: &dyn Store, counted: bool, free: bool) -> Result<()> {
        let io = |e| DiskError::io("prepare the volume", e);
        let last = self.taken.iter().rposition(|word| *word != 0).map_or(0, |i| {
            let top = self.taken.get(i).map_or(0, |word| 63 - word.leading_zeros());
            i as u64 * 64 + u64::from(top)
        });
        self.fresh = last + 1;
        // Only what differs has to be written.
        self.counts.clear();
        let mut bytes = vec![0; SECTOR as usize];
        let mut group = 0;
        while let Some(at) = self.group_offset(group) {
            // Behind the last cluster all counts are 0, as in the holes of the blocks: those are passed over.
            if group * GROUP >= self.fresh {
                let left = (COUNTS - group * GROUP % COUNTS) * 2;
                let data = store.next_data(at).map_err(io)?.map_or(left, |data| data.saturating_sub(at));
                if data >= SECTOR {
                    group += data.min(left) / SECTOR;
                    continue;
                }
            }
            store.read_bytes(at, &mut bytes).map_err(io)?;
            if bytes != self.group_bytes(group) {
                if counted {
                    self.all_counted(group, &bytes)?;
                }
                self.counts.insert(group);
            }
            group += 1;
        }
        if !free {
            return Ok(());
        }
        if self.len > self.fresh * CLUSTER {
            store.set_len(self.fresh * CLUSTER).map_err(io)?;
        }
        self.len = self.fresh * CLUSTER;
        let mut start = None;
        for cluster in 0..=self.fresh {
            match (self.is_taken(cluster) || cluster == self.fresh, start) {
                (false, None) => start = Some(cluster),
                (true, Some(first)) => {
                    self.free.insert(first, cluster - first);
                    start = None;
                }
                _ => {}
            }
        }
        for (first, count) in &self.free {
            store.zero(first * CLUSTER, count * CLUSTER, true).map_err(io)?;
        }
        Ok(())
    }

    /// Counts are durable before anything links to what they count: a link to what is not counted is no crash's work.
    fn all_counted(&self, group: u64, counts: &[u8]) -> Result<()> {
        let clusters = group * GROUP..;
        let lost =
            clusters.zip(counts.as_chunks().0).find(|(n, count)| self.is_taken(*n) && **count == [0, 0]);
        lost.map_or(Ok(()), |(cluster, _)| {
            damaged(format!("the cluster at {:#x} is used and not counted", cluster * CLUSTER))
        })
    }
}
