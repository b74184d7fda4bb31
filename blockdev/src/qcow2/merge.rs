//! Two layers become one. Whoever reads them through the upper one sees the same bytes at every moment, so either
//! may be done beneath machines that run, and again after it was cut off.

use super::layout::{CLUSTER, CLUSTER_BITS};
use super::{Mapping, Qcow2Disk};
use crate::{Disk, DiskError, Result};

/// How much is done before somebody may end it.
const REACH: u64 = 16 << 20;

/// What a layer says of a range by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Own {
    Nothing,
    Zeros,
    Bytes,
}

impl Qcow2Disk {
    /// What this layer itself has at `at`, and how far that goes; at most to `end`.
    fn own(&self, at: u64, end: u64) -> Result<(Own, u64)> {
        let mut inner = self.lock();
        let (mapping, len) = inner.run(at, end.min(at.saturating_add(REACH)))?;
        Ok(match mapping {
            Mapping::Hole => (Own::Nothing, len),
            Mapping::Zero(_) => (Own::Zeros, len),
            Mapping::Data(_) | Mapping::Compressed(_) => (Own::Bytes, len),
        })
    }
}

/// Writes what `upper` has by itself into `lower`, which only `upper` lies on: `lower` holds all of both then, durably.
/// `progress` is told of each byte that was looked at, and may end it by an error.
///
/// # Errors
/// `Key`: what is encrypted would become plain; nothing is done. Those of reading and writing; what is done counts.
pub fn commit(
    upper: &Qcow2Disk,
    lower: &Qcow2Disk,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    whole(upper)?;
    whole(lower)?;
    not_plain(upper, lower)?;
    if upper.size() > lower.size() {
        lower.grow(upper.size())?;
    }
    let mut buffer = vec![0; CLUSTER as usize];
    each(upper, progress, |at, len, own| match own {
        Own::Nothing => Ok(()),
        Own::Zeros => lower.write_zeroes(at, len, true),
        Own::Bytes => pieces(at, len, |at, len| {
            let part = buffer.get_mut(..len as usize).unwrap_or_default();
            upper.read_at(at, part)?;
            lower.write_at(at, part)
        }),
    })?;
    lower.flush()
}

/// Writes what `lower` has by itself, and `upper` does not hide, into `upper`, whose base still is `lower` on what lies
/// below: it does not need `lower` then, durably. `progress` as of [`commit`].
///
/// # Errors
/// `Key`: what is encrypted would become plain; nothing is done. Those of reading and writing; what is done counts.
pub fn pull(upper: &Qcow2Disk, lower: &Qcow2Disk, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<()> {
    whole(upper)?;
    whole(lower)?;
    not_plain(lower, upper)?;
    let mut buffer = vec![0; CLUSTER as usize];
    each(lower, progress, |at, len, own| {
        if own == Own::Nothing {
            return Ok(());
        }
        let (mut at, end) = (at, at + len);
        while at < end {
            let (have, len) = upper.own(at, end)?;
            match (have, own) {
                (Own::Nothing, Own::Zeros) => upper.write_zeroes(at, len, true)?,
                (Own::Nothing, _) => pieces(at, len, |at, len| {
                    let part = buffer.get_mut(..len as usize).unwrap_or_default();
                    lower.read_at(at, part)?;
                    upper.write_at(at, part)
                })?,
                _ => {}
            }
            at += len;
        }
        Ok(())
    })?;
    upper.flush()
}

/// What is encrypted never becomes plain.
fn not_plain(from: &Qcow2Disk, to: &Qcow2Disk) -> Result<()> {
    match from.payload.encrypted() && !to.payload.encrypted() {
        true => Err(DiskError::key("a layer that is encrypted is not merged into a plain one")),
        false => Ok(()),
    }
}

fn whole(layer: &Qcow2Disk) -> Result<()> {
    match layer.lock().header.cluster_bits {
        CLUSTER_BITS => Ok(()),
        _ => Err(DiskError::format("the image was not made by hutch, so it is not merged")),
    }
}

/// All of a layer, piece by piece as it lies.
fn each(
    layer: &Qcow2Disk,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    mut job: impl FnMut(u64, u64, Own) -> Result<()>,
) -> Result<()> {
    let mut at = 0;
    while at < layer.size() {
        let (own, len) = layer.own(at, layer.size())?;
        job(at, len, own)?;
        progress(len)?;
        at += len;
    }
    Ok(())
}

/// Cluster by cluster.
fn pieces(at: u64, len: u64, mut job: impl FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let (mut at, end) = (at, at + len);
    while at < end {
        let len = ((at / CLUSTER + 1) * CLUSTER).min(end) - at;
        job(at, len)?;
        at += len;
    }
    Ok(())
}
