//! Where the metadata of a volume lies: all of it is laid out at creation, as holes, so that a running guest only
//! ever allocates data.
//!
//! ```text
//!   header │ refcount table │ L1 table │ refcount blocks … │ L2 tables … │ data, as it is written
//!   └──────────────── some KiB written, the rest holes ────────────────┘
//! ```

use super::header::{Header, MAX_SIZE};
use super::{OFFSET, ZERO};
use crate::crypt::Cipher;
use crate::store::Store;
use crate::{DiskError, DiskErrorKind, Key, Result, SECTOR};

/// Volumes have clusters of 64 KiB and reference counts of 16 bits, QEMU's defaults.
pub(super) const CLUSTER_BITS: u32 = 16;
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of a table of one cluster.
pub(super) const ENTRIES: u64 = CLUSTER / 8;
/// Counts in a refcount block.
pub(super) const COUNTS: u64 = CLUSTER / 2;
/// Guest bytes that one L2 table maps.
pub(super) const L2_REACH: u64 = ENTRIES * CLUSTER;
/// An entry's cluster has a reference count of exactly one.
pub(super) const COPIED: u64 = 1 << 63;

/// Whether an L2 entry is one that we write: empty, zeros without a cluster, or a cluster that nothing else links to.
pub(super) fn is_ours(entry: u64) -> bool {
    matches!(entry, 0 | ZERO) || entry & !OFFSET == COPIED && entry & OFFSET != 0
}

/// Data clusters that may be taken beyond those of a full disk before freed ones have to be given back.
const SLACK: u64 = 4096;

/// Refcount blocks for `clusters` clusters of other things, themselves included.
fn blocks_for(clusters: u64) -> u64 {
    // A block holds its own count too.
    clusters.div_ceil(COUNTS - 1)
}

/// Refcount blocks that a volume of this header has at least.
pub(super) fn blocks_of(header: &Header) -> u64 {
    let tables = header.size.div_ceil(L2_REACH);
    let l1_clusters = u64::from(header.l1_entries).div_ceil(ENTRIES);
    let data = header.size.div_ceil(CLUSTER) + SLACK;
    blocks_for(1 + u64::from(header.reftable_clusters) + l1_clusters + tables + data)
}

/// Makes `store`, an empty file, a volume of `size` bytes that holds nothing yet. Constant time, whatever the size:
/// some KiB are written, none of them durable before the volume's first flush.
///
/// # Errors
/// `OutOfRange` for a size that is no multiple of 512, 0, or more than 64 TiB; `NoSpace` or `Io` from the host.
pub fn create(store: &dyn Store, size: u64) -> Result<()> {
    lay_out(store, size, None)
}

/// As [`create`], for a volume whose guest's bytes are encrypted with `key`: it is only opened with that.
///
/// # Errors
/// As [`create`].
pub fn create_encrypted(store: &dyn Store, size: u64, key: &Key) -> Result<()> {
    lay_out(store, size, Some(Cipher::new(key).check()))
}

fn lay_out(store: &dyn Store, size: u64, key_check: Option<[u8; 16]>) -> Result<()> {
    if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX_SIZE {
        let context = format!("a volume cannot have {size} bytes; give a multiple of 512 up to 64 TiB");
        return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
    }
    let tables = size.div_ceil(L2_REACH);
    // Room for the largest growth: the L1 table of a cluster maps 4 TiB.
    let l1_clusters = tables.div_ceil(ENTRIES);
    let data = size.div_ceil(CLUSTER) + SLACK;
    let mut blocks = blocks_for(2 + l1_clusters + tables + data);
    let reftable_clusters = blocks.div_ceil(ENTRIES);
    blocks = blocks_for(1 + reftable_clusters + l1_clusters + tables + data);

    let reftable_offset = CLUSTER;
    let l1_offset = reftable_offset + reftable_clusters * CLUSTER;
    let blocks_at = l1_offset + l1_clusters * CLUSTER;
    let tables_at = blocks_at + blocks * CLUSTER;
    let end = tables_at + tables * CLUSTER;
    let header = Header {
        version: 3,
        cluster_bits: CLUSTER_BITS,
        size,
        l1_entries: (l1_clusters * ENTRIES) as u32,
        l1_offset,
        reftable_offset,
        reftable_clusters: reftable_clusters as u32,
        refcount_order: 4,
        compression: super::header::Compression::Deflate,
        key_check,
    };
    let list = |start: u64, count: u64, mark: u64| -> Vec<u8> {
        (0..count).flat_map(|i| ((start + i * CLUSTER) | mark).to_be_bytes()).collect()
    };
    let counts = [0, 1].repeat((end / CLUSTER) as usize);
    let write =
        |at, bytes: &[u8]| store.write_bytes(at, bytes).map_err(|e| DiskError::io("create a volume", e));
    store.set_len(end).map_err(|e| DiskError::io("create a volume", e))?;
    write(reftable_offset, &list(blocks_at, blocks, 0))?;
    write(l1_offset, &list(tables_at, tables, COPIED))?;
    // The blocks lie one after the other, so the counts do too.
    write(blocks_at, &counts)?;
    // Last, so that half a volume is none.
    write(0, &header.to_bytes())
}
