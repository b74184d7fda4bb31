//! Disks as other programs keep them, read from the first byte to the last by an import's worker.
//!
//! ```text
//!   stream   a raw disk, compressed by gzip, xz or zstd          ┐
//!   vmdk     VMware's: sparse in one file, or for streams (OVA)  ├─► Content: what is at an offset
//!   vhd      Microsoft's first format: fixed or dynamic          │
//!   vhdx     Microsoft's second                                  ┘
//! ```
//! What a file says of itself is bounded before it is believed, and no name in it is ever opened: a disk that needs another
//! file is refused. Tables are read where they are needed, so that none is ever as large as a file claims.

mod stream;
mod vhd;
mod vhdx;
mod vmdk;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Format as DiskFormat, open_layers};

use crate::store::Format;

/// A sector of every format here, in bytes.
const SECTOR: u64 = 512;

/// Why a disk cannot be read.
#[derive(Debug)]
pub enum Fault {
    /// It is bad; in words that follow "the image is refused:".
    Bad(String),
    /// The host cannot read the file.
    Host(String),
}

type Result<T> = std::result::Result<T, Fault>;

fn bad<T>(why: impl Into<String>) -> Result<T> {
    Err(Fault::Bad(why.into()))
}

/// The host's own errors have a number; a file that ends too soon is a bad image.
fn fault(error: &io::Error, what: &str) -> Fault {
    match error.raw_os_error() {
        Some(_) => Fault::Host(format!("{what}: {error}")),
        None => Fault::Bad(format!("{what}: {error}")),
    }
}

/// What a file holds of a disk. It is read in order.
pub trait Content {
    /// The disk's size in bytes, where the file says it beforehand.
    fn size(&self) -> Option<u64>;

    /// Fills `buf` with what is at `at`; tells how many bytes that were, fewer only at the disk's end.
    ///
    /// # Errors
    /// [`Fault`].
    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// How much of the file was read, and its size, where that is what is known of the progress.
    fn taken(&self) -> Option<(u64, u64)> {
        None
    }
}

/// What `file`, of this format, holds.
///
/// # Errors
/// [`Fault`].
pub fn open(file: File, format: Format) -> Result<Box<dyn Content>> {
    Ok(match format {
        Format::Raw => Box::new(Own(layers(file, DiskFormat::Raw)?)),
        Format::Qcow2 => Box::new(Own(layers(file, DiskFormat::Qcow2)?)),
        Format::RawGz | Format::RawXz | Format::RawZst => Box::new(stream::open(file, format)?),
        Format::Vmdk => Box::new(vmdk::open(Bytes::new(file)?)?),
        Format::Vhd => Box::new(vhd::open(Bytes::new(file)?)?),
        Format::Vhdx => Box::new(vhdx::open(Bytes::new(file)?)?),
    })
}

/// A disk that `blockdev` reads.
struct Own(std::sync::Arc<dyn Disk>);

fn layers(file: File, format: DiskFormat) -> Result<std::sync::Arc<dyn Disk>> {
    open_layers(vec![(file, format)], true).map_err(|e| disk_fault(&e))
}

fn disk_fault(error: &DiskError) -> Fault {
    let why = match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    let host = error.source.as_ref().is_some_and(|cause| cause.raw_os_error().is_some());
    if host && error.kind == DiskErrorKind::Io { Fault::Host(why) } else { Fault::Bad(why) }
}

impl Content for Own {
    fn size(&self) -> Option<u64> {
        Some(self.0.size())
    }

    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.read_at(at, buf).map_err(|e| disk_fault(&e))?;
        Ok(buf.len())
    }
}

/// A file that is read at any place, and has an end.
struct Bytes {
    file: File,
    len: u64,
}

impl Bytes {
    fn new(mut file: File) -> Result<Bytes> {
        // A block device's metadata has no size.
        let len =
            io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(|e| fault(&e, "cannot measure it"))?;
        Ok(Bytes { file, len })
    }

    /// Fills `buf` from `at`.
    fn fill(&self, at: u64, buf: &mut [u8], what: &str) -> Result<()> {
        if at.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return bad(format!("{what} is past the end of the file; the image was cut off"));
        }
        self.file.read_exact_at(buf, at).map_err(|e| fault(&e, &format!("cannot read {what}")))
    }

    fn array<const N: usize>(&self, at: u64, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(at, &mut bytes, what)?;
        Ok(bytes)
    }
}

/// The bytes at an offset of a structure that is large enough; zeros past its end.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

/// The parts of `buf`, which begins at `at`, that lie each in one unit of `unit` bytes: the unit's number, the offset in it,
/// and the part.
fn by_units(at: u64, buf: &mut [u8], unit: u64) -> impl Iterator<Item = (u64, u64, &mut [u8])> {
    let (mut at, mut rest) = (at, buf);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (number, offset) = (at.checked_div(unit)?, at.checked_rem(unit)?);
        let count = usize::try_from(unit - offset).unwrap_or(usize::MAX).min(rest.len());
        let (part, left) = std::mem::take(&mut rest).split_at_mut_checked(count)?;
        (at, rest) = (at + count as u64, left);
        Some((number, offset, part))
    })
}

/// A size in bytes that is a disk's.
fn disk_size(bytes: u64) -> Result<u64> {
    match bytes.is_multiple_of(SECTOR) && bytes <= i64::MAX as u64 {
        true => Ok(bytes),
        false => bad(format!("it says that its disk has {bytes} bytes")),
    }
}

#[cfg(test)]
mod tests;
