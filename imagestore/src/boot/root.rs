//! Which part of a disk is the root file system, for those who mount it without the image's own boot.

use std::io;
use std::sync::Arc;

use hutch_blockdev::Disk;

use super::disk::probe;
use crate::partition::{Slice, partitions};

/// Where the root file system begins on `disk`, in bytes: the ext4 file system that `cmdline` names (`root=UUID=…`), else
/// the largest one, else the largest partition; `None` on an empty disk.
///
/// # Errors
/// The disk's, where it cannot be read.
pub fn root(disk: &Arc<dyn Disk>, cmdline: &str) -> io::Result<Option<u64>> {
    Ok(root_slice(disk, cmdline)?.map(|slice| slice.start()))
}

/// Likewise, as a part of the disk.
pub(super) fn root_slice(disk: &Arc<dyn Disk>, cmdline: &str) -> io::Result<Option<Slice>> {
    let named = cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix("root=UUID="));
    let mut best = None;
    for slice in partitions(disk)? {
        let uuid = probe(&slice)?;
        let is_named =
            uuid.as_deref().is_some_and(|uuid| named.is_some_and(|n| n.eq_ignore_ascii_case(uuid)));
        let rank = (is_named, uuid.is_some(), slice.size());
        if best.as_ref().is_none_or(|(other, _)| rank > *other) {
            best = Some((rank, slice));
        }
    }
    Ok(best.map(|(_, slice)| slice))
}
