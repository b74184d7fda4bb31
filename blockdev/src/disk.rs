//! The contract every disk backend keeps.

use std::io;

use crate::Later;

/// The result of a disk operation.
pub type Result<T> = std::result::Result<T, DiskError>;

/// What kind of failure a [`DiskError`] is; small and stable, so that callers can match on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskErrorKind {
    /// The request reaches past the end of the disk, or is not aligned to [`SECTOR`].
    OutOfRange,
    /// The disk is read-only.
    ReadOnly,
    /// The host has no room left (ENOSPC, EDQUOT). The image is whole; the request may be tried again.
    NoSpace,
    /// The host failed to read or write (EIO and all else). The disk may have failed for good.
    Io,
    /// The image breaks the rules of its format, or carries a feature that is refused.
    Format,
    /// The image is encrypted and the key is missing or another's, or it is not and there is one.
    Key,
    /// Another process holds the disk (OFD lock).
    Busy,
    /// An earlier error made the disk unusable until it is checked; nothing was written since.
    Failed,
}

/// A failed disk operation: what kind, on what, and the cause.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct DiskError {
    /// The kind, for callers that decide.
    pub kind: DiskErrorKind,
    /// What was being done, on what, and what to do next, for people.
    pub context: String,
    /// The host's error, where there was one.
    #[source]
    pub source: Option<io::Error>,
}

impl DiskError {
    /// The host's error `source` while doing `what` ("read the disk").
    pub fn io(what: &str, source: io::Error) -> DiskError {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => DiskErrorKind::NoSpace,
            _ => DiskErrorKind::Io,
        };
        DiskError { kind, context: format!("cannot {what}"), source: Some(source) }
    }

    /// What is wrong with the key: `why`.
    pub(crate) fn key(why: impl Into<String>) -> DiskError {
        DiskError { kind: DiskErrorKind::Key, context: why.into(), source: None }
    }

    /// The image is not what its format says: `why`.
    pub fn format(why: impl Into<String>) -> DiskError {
        DiskError { kind: DiskErrorKind::Format, context: why.into(), source: None }
    }
}

/// Refuses what is not whole sectors within the disk.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    let whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
    if whole && offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok(());
    }
    let context = format!("{len} bytes at {offset} are not whole sectors of a disk of {size} bytes");
    Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None })
}

/// Refuses to change a disk that is only read.
pub(crate) fn check_write(read_only: bool) -> Result<()> {
    let context = "the disk is read-only";
    match read_only {
        true => Err(DiskError { kind: DiskErrorKind::ReadOnly, context: context.into(), source: None }),
        false => Ok(()),
    }
}

/// The unit of every request: 512 bytes (virtio 1.2, 5.2.4: sectors are 512 bytes whatever the block size).
pub const SECTOR: u64 = 512;

/// One contiguous piece of memory to write from. The memory may be a guest's: it can change while it is read,
/// so it is only ever handed to the kernel or copied, never looked at twice.
pub type IoBuf = libc::iovec;
/// One contiguous piece of memory to read into.
pub type IoBufMut = libc::iovec;

/// A guest's disk.
///
/// **Callers** may call any method from any thread at any time. Offsets and lengths are in bytes and multiples of
/// [`SECTOR`]. The memory a buffer points to stays valid and mapped until the call returns (the call is
/// synchronous; a request owns its buffer until then).
///
/// **Implementers** complete a request wholly or return an error; there are no short reads or writes. What was
/// never written reads as the base's bytes, or zeros where there is no base or past the base's end. Two requests in
/// flight that overlap may be ordered either way, sector by sector; requests that do not overlap never disturb each
/// other. After `flush` returns `Ok`, every write that completed before `flush` was called survives loss of power.
/// Without a flush, a completed write may be lost by a crash, but nothing else may: never does a sector then hold
/// what was neither its old nor a newly written content, and never does the image's metadata break.
///
/// **Errors** leave the disk's metadata whole. `NoSpace` may be tried again; `OutOfRange` and `ReadOnly` changed
/// nothing; after `Io` on a metadata write every later call that would write answers `Failed`.
pub trait Disk: Send + Sync {
    /// The virtual size in bytes; a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// How many requests may usefully be in flight at once (1: one owner of the metadata; more: independent).
    fn parallelism(&self) -> usize {
        1
    }

    /// Reads `bufs` from `offset`.
    ///
    /// # Safety
    /// Each buffer must point to memory that stays mapped and writable until the call returns. It may be shared
    /// with a running guest.
    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> Result<()>;

    /// Reads `bufs` from `offset` as far as that needs no waiting for the host's disk; what does is added to `later`, and the
    /// read is done when all of that [is finished](Later::finish). What is read in pieces is ordered with requests that
    /// overlap as if each piece were a request.
    ///
    /// # Errors
    /// The read failed; what is in `later` then has still to be waited for, if the kernel was given it, and else dropped.
    ///
    /// # Safety
    /// Each buffer must point to memory that stays mapped and writable until the read is done. It may be shared with a
    /// running guest.
    unsafe fn read_or_later(&self, offset: u64, bufs: &[IoBufMut], _later: &mut Vec<Later>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.read_vectored(offset, bufs) }
    }

    /// Writes `bufs` at `offset`.
    ///
    /// # Safety
    /// Each buffer must point to memory that stays mapped and readable until the call returns. It may be shared
    /// with a running guest.
    unsafe fn write_vectored(&self, offset: u64, bufs: &[IoBuf]) -> Result<()>;

    /// Makes `len` bytes at `offset` read as zeros. With `unmap` the space may be given back to the host.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Tells that the guest does not need `len` bytes at `offset` any more: they read as zeros or as their old
    /// content until written again, never as anything else's content. Space is given back to the host where possible.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes everything completed so far survive loss of power. Flush is a flush.
    fn flush(&self) -> Result<()>;

    /// Makes the disk `new_size` bytes large; the new part reads as zeros. Shrinking is refused (`OutOfRange`).
    fn grow(&self, new_size: u64) -> Result<()>;

    /// How many bytes from `offset` (a multiple of [`SECTOR`] within the disk) on are known to read as zeros without
    /// being read; 0 where nothing is known. What is being written meanwhile may already not be zeros.
    fn zeros_at(&self, _offset: u64) -> Result<u64> {
        Ok(0)
    }

    /// Reads `buf.len()` bytes at `offset` into ordinary memory.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: the slice is exclusively borrowed, so mapped and writable, until the call returns.
        unsafe { self.read_vectored(offset, &[iov]) }
    }

    /// Writes `buf` at `offset` from ordinary memory.
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let iov = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        // SAFETY: the slice is borrowed, so mapped and readable, until the call returns; a write only reads it.
        unsafe { self.write_vectored(offset, &[iov]) }
    }
}
