//! Growth: tables for what is new come behind everything else, and are counted before anything links to them.

use super::super::MAX_SIZE;
use super::super::layout::{CLUSTER, COPIED, COUNTS, ENTRIES, L2_REACH};
use super::super::{Inner, Mapping};
use crate::{DiskError, DiskErrorKind, Result, SECTOR};

impl Inner {
    /// The disk has `size` bytes from now on. Tables that are missing are put behind everything else; the header, which
    /// makes it true, is written last.
    pub(in crate::qcow2) fn grow(&mut self, size: u64) -> Result<()> {
        let refuse = |context: String| DiskError { kind: DiskErrorKind::OutOfRange, context, source: None };
        let old = self.header.size;
        let most = (u64::from(self.header.l1_entries) * L2_REACH).min(MAX_SIZE);
        if size < old || size > most || !size.is_multiple_of(SECTOR) {
            let why = format!(
                "the volume has {old} bytes and cannot become {size}; at most {most}, in steps of 512"
            );
            return Err(refuse(why));
        }
        // What the last cluster holds past the old end must be zeros when it comes into view.
        let hidden = old.next_multiple_of(CLUSTER).min(size);
        self.commit()?;
        self.sync()?;
        let missing: Vec<usize> =
            (0..size.div_ceil(L2_REACH) as usize).filter(|i| self.l1.get(*i) == Some(&0)).collect();
        let data = size.div_ceil(CLUSTER) - old.div_ceil(CLUSTER);
        self.add_tables(&missing, data)?;
        self.header.size = size;
        if hidden > old
            && let Err(e) = self.clear_tail(old, hidden)
        {
            self.header.size = old;
            return Err(e);
        }
        let written = self.store.write_bytes(0, &self.header.to_bytes());
        if let Err(e) = written {
            self.header.size = old;
            return Err(self.metadata_error(e));
        }
        self.sync()
    }

    /// The disk has only `size` bytes from now on; nothing was ever written behind them.
    pub(in crate::qcow2) fn shrink(&mut self, size: u64) -> Result<()> {
        let old = self.header.size;
        if size == 0 || size > old || !size.is_multiple_of(SECTOR) {
            let context = format!("the volume has {old} bytes and cannot become {size}");
            return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
        }
        self.commit()?;
        self.sync()?;
        self.header.size = size;
        let written = self.store.write_bytes(0, &self.header.to_bytes());
        written.map_err(|e| self.metadata_error(e))?;
        self.sync()
    }

    fn clear_tail(&mut self, from: u64, to: u64) -> Result<()> {
        if let Mapping::Data(host) = self.mapping(from / CLUSTER)? {
            let zero = self.payload.zero(host + from % CLUSTER, from, to - from);
            zero.map_err(|e| DiskError::io("grow the volume", e))?;
        }
        Ok(())
    }

    /// Adds L2 tables for the L1 entries `missing`, and refcount blocks for them and `data` more clusters.
    fn add_tables(&mut self, missing: &[usize], data: u64) -> Result<()> {
        let reftable = (self.header.reftable_offset, u64::from(self.header.reftable_clusters) * ENTRIES);
        let volume = self.volume()?;
        let tables = missing.len() as u64;
        let had = volume.blocks.len() as u64;
        // Every block counts itself too.
        let blocks = (tables + data).div_ceil(COUNTS - 1);
        if had + blocks > reftable.1 {
            let context = "the volume's refcount table is full; make a larger volume and copy".to_owned();
            return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
        }
        let first = volume.fresh;
        let end = (first + blocks + tables) * CLUSTER;
        let new_blocks: Vec<u64> = (0..blocks).map(|i| (first + i) * CLUSTER).collect();
        volume.blocks.extend(&new_blocks);
        volume.fresh += blocks + tables;
        for cluster in first..volume.fresh {
            volume.set_taken(cluster, true);
        }
        let len = end.max(volume.len);
        volume.len = len;
        let list: Vec<u8> = new_blocks.iter().flat_map(|b| b.to_be_bytes()).collect();
        // The new blocks' counts first, their own among them: a block that is linked counts itself.
        let counted = self.store.set_len(len).and_then(|()| match self.volume.as_mut() {
            Some(volume) => volume.write_counts(&*self.store),
            None => Ok(()),
        });
        if let Err(e) = counted {
            self.drop_tables(first, had as usize);
            return Err(self.metadata_error(e));
        }
        let result = (|| {
            self.syncs.try_sync()?;
            self.store.write_bytes(reftable.0 + had * 8, &list)?;
            self.syncs.try_sync()?;
            for (i, index) in missing.iter().enumerate() {
                let offset = (first + blocks + i as u64) * CLUSTER;
                let at = self.header.l1_offset + *index as u64 * 8;
                self.store.write_bytes(at, &(offset | COPIED).to_be_bytes())?;
                if let Some(entry) = self.l1.get_mut(*index) {
                    *entry = offset;
                }
            }
            self.syncs.try_sync()
        })();
        result.map_err(|e| {
            // Half grown: what was written is consistent, but not known exactly.
            self.failed = true;
            DiskError::io("grow the volume", e)
        })
    }
    /// Takes back what a growth set aside from cluster `first` on, while nothing links to it yet.
    fn drop_tables(&mut self, first: u64, blocks: usize) {
        let Some(volume) = self.volume.as_mut() else { return };
        for cluster in first..volume.fresh {
            volume.set_taken(cluster, false);
        }
        volume.blocks.truncate(blocks);
        volume.fresh = first;
        volume.len = first * CLUSTER;
        // Cut off, so that the clusters read as zeros when they are taken again.
        self.failed |= self.store.set_len(first * CLUSTER).is_err();
    }
}
