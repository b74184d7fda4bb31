//! A disk of several files: each reads what it does not hold from the next.

use std::fs::File;
use std::sync::Arc;

use crate::{Disk, DiskError, Qcow2Disk, RawDisk, Result};

/// The most files of a disk.
pub const MAX_LAYERS: usize = 16;

/// What a file's bytes mean. It is from records, never probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2.
    Qcow2,
}

/// Opens a disk from its files, the top one first. Only the top one is ever written, unless `read_only`.
///
/// # Errors
/// `Format` when there is no layer, more than [`MAX_LAYERS`], or a raw one on another; else those of the layer.
pub fn open_layers(layers: Vec<(File, Format)>, read_only: bool) -> Result<Arc<dyn Disk>> {
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let count = layers.len();
        return Err(DiskError::format(format!("a disk has 1 to {MAX_LAYERS} layers, not {count}")));
    }
    let mut disk: Option<Arc<dyn Disk>> = None;
    let count = layers.len();
    for (depth, (file, format)) in layers.into_iter().enumerate().rev() {
        let read_only = read_only || depth > 0;
        disk = Some(match format {
            Format::Qcow2 => Arc::new(Qcow2Disk::open(file, disk, read_only)?),
            Format::Raw if disk.is_none() => Arc::new(RawDisk::open(file, read_only)?),
            Format::Raw => {
                let why = format!("layer {depth} of {count} is raw, so it cannot lie on another");
                return Err(DiskError::format(why));
            }
        });
    }
    disk.ok_or_else(|| DiskError::format("a disk has at least one layer"))
}
