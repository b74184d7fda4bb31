//! Walking over a list of buffers.

use libc::iovec;

/// What is left of a list of buffers.
pub(crate) struct Cursor<'a> {
    bufs: &'a [iovec],
    /// Bytes of the first buffer that are taken already.
    skip: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bufs: &'a [iovec]) -> Self {
        Cursor { bufs, skip: 0 }
    }

    /// Takes the next `len` bytes off, or what there is.
    pub(crate) fn take(&mut self, len: u64) -> Vec<iovec> {
        let mut wanted = usize::try_from(len).unwrap_or(usize::MAX);
        let mut taken = Vec::new();
        while let Some((first, rest)) = self.bufs.split_first().filter(|_| wanted > 0) {
            let have = first.iov_len - self.skip;
            let count = have.min(wanted);
            if count > 0 {
                // Within the buffer: `skip + count` is at most its length.
                taken.push(iovec { iov_base: first.iov_base.wrapping_byte_add(self.skip), iov_len: count });
            }
            wanted -= count;
            if count == have {
                (self.bufs, self.skip) = (rest, 0);
            } else {
                self.skip += count;
            }
        }
        taken
    }

    /// All that is left.
    pub(crate) fn rest(mut self) -> Vec<iovec> {
        self.take(u64::MAX)
    }
}

/// Fills `bufs` with zeros.
///
/// # Safety
/// Each buffer is mapped and writable.
pub(crate) unsafe fn zero(bufs: &[iovec]) {
    for buf in bufs {
        // SAFETY: the caller's promise.
        unsafe { buf.iov_base.cast::<u8>().write_bytes(0, buf.iov_len) };
    }
}

/// Copies `from` into `bufs`, as far as both reach.
///
/// # Safety
/// Each buffer is mapped and writable, and none overlaps `from`.
pub(crate) unsafe fn copy(mut from: &[u8], bufs: &[iovec]) {
    for buf in bufs {
        let (now, later) = from.split_at(from.len().min(buf.iov_len));
        // SAFETY: the caller's promise; `now` is no longer than the buffer.
        unsafe { now.as_ptr().copy_to_nonoverlapping(buf.iov_base.cast(), now.len()) };
        from = later;
    }
}

/// Copies `bufs` into `to`, as far as both reach.
///
/// # Safety
/// Each buffer is mapped and readable, and none overlaps `to`.
pub(crate) unsafe fn gather(bufs: &[iovec], mut to: &mut [u8]) {
    for buf in bufs {
        let (now, later) = to.split_at_mut(to.len().min(buf.iov_len));
        // SAFETY: the caller's promise; `now` is no longer than the buffer.
        unsafe { now.as_mut_ptr().copy_from_nonoverlapping(buf.iov_base.cast(), now.len()) };
        to = later;
    }
}

/// A slice as a buffer to write from, or to read into if it was borrowed so.
pub(crate) fn buffer(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}
