//! Reads that have to wait for the host's disk: what a disk found out about one, so that whoever has many of them under way
//! can have the kernel do them beside each other.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::crypt::Cipher;
use crate::cursor;
use crate::raw::total;
use crate::store::{PIECES, Store, advance};
use crate::{DiskError, IoBufMut, Result};

/// Where the parts of a read go that have to wait; `None`: whoever asks waits for them himself.
pub(crate) type Room<'a> = Option<&'a mut Vec<Later>>;

/// One piece of a read: so many bytes of a file, and where they go. All of it stays in its place while this lives: the file
/// is open, and what lies there is not overwritten by something else of the disk's.
///
/// The buffers that it names have to stay mapped and writable until it is done, as the caller of
/// [`Disk::read_or_later`](crate::Disk::read_or_later) promised.
pub struct Later {
    store: Arc<dyn Store>,
    offset: u64,
    /// Where the kernel puts the bytes.
    bufs: Vec<IoBufMut>,
    encrypted: Option<Encrypted>,
    /// Keeps the cluster from being used anew.
    _moving: Option<Moving>,
    /// Tells that it was asked for before a cut.
    asked: Option<Moving>,
}

/// Held by whoever moves bytes of mapped clusters.
pub(crate) type Moving = Arc<()>;

/// What comes from the file is not yet the guest's.
struct Encrypted {
    cipher: Arc<Cipher>,
    sector: u64,
    /// What `bufs` points to, never touched while the kernel may write there.
    bytes: Vec<u8>,
    to: Vec<IoBufMut>,
}

// SAFETY: the pointers are to memory that may be used from any thread, as `read_or_later`'s caller promised, or to the
// bytes beside them.
unsafe impl Send for Later {}

impl Later {
    /// What is left of `bufs` after `done` bytes that were read already.
    fn plain(
        store: &Arc<dyn Store>,
        (offset, bufs): (u64, &[IoBufMut]),
        done: usize,
        moving: Option<&Moving>,
    ) -> Later {
        let mut bufs = bufs.to_vec();
        advance(&mut bufs, done);
        let offset = offset + done as u64;
        Later { store: store.clone(), offset, bufs, encrypted: None, _moving: moving.cloned(), asked: None }
    }

    /// The sectors from the guest's `sector` on, which are encrypted in the file.
    pub(crate) fn encrypted(
        store: &Arc<dyn Store>,
        offset: u64,
        (cipher, sector): (Arc<Cipher>, u64),
        to: &[IoBufMut],
        moving: Option<&Moving>,
    ) -> Later {
        let mut bytes = vec![0; total(to) as usize];
        let bufs = vec![libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        let encrypted = Some(Encrypted { cipher, sector, bytes, to: to.to_vec() });
        Later { store: store.clone(), offset, bufs, encrypted, _moving: moving.cloned(), asked: None }
    }

    /// Holds this too until it is done.
    pub(crate) fn hold(&mut self, asked: &Moving) {
        self.asked = Some(asked.clone());
    }

    /// Bytes of memory that it takes beside the buffers it was given.
    pub fn weight(&self) -> usize {
        self.encrypted.as_ref().map_or(0, |encrypted| encrypted.bytes.len())
    }

    /// The file; `None` only of a store that is none, which has nothing to wait for.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.store.file().map(AsFd::as_fd)
    }

    /// Where in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the kernel is to put what it reads there.
    pub fn bufs(&self) -> &[IoBufMut] {
        &self.bufs
    }

    /// Ends it: `read` bytes of it, from its beginning, are in their place. The rest is read now, past the end of the file
    /// zeros.
    ///
    /// # Errors
    /// As [`Disk::read_vectored`](crate::Disk::read_vectored).
    ///
    /// # Safety
    /// The buffers are still mapped and writable, and the kernel does not read into them any more.
    pub unsafe fn finish(mut self, read: usize) -> Result<()> {
        if (read as u64) < total(&self.bufs) {
            advance(&mut self.bufs, read);
            // SAFETY: the caller's promise.
            let rest = unsafe { self.store.read(self.offset + read as u64, &self.bufs) };
            rest.map_err(|e| DiskError::io("read the disk", e))?;
        }
        if let Some(Encrypted { cipher, sector, mut bytes, to }) = self.encrypted {
            cipher.decrypt(sector, &mut bytes);
            // SAFETY: the caller's promise; the bytes are ours, so they do not overlap.
            unsafe { cursor::copy(&bytes, &to) };
        }
        Ok(())
    }
}

/// Reads a piece of a file that is the guest's as it is: at once what is in the host's memory, the rest by way of `room`.
///
/// # Errors
/// The host's.
///
/// # Safety
/// As [`Disk::read_or_later`](crate::Disk::read_or_later).
pub(crate) unsafe fn read(
    store: &Arc<dyn Store>,
    offset: u64,
    bufs: &[IoBufMut],
    room: Room<'_>,
    moving: Option<&Moving>,
) -> io::Result<()> {
    // What has more pieces than the kernel takes at once is read in several steps.
    let Some(room) = room.filter(|_| store.file().is_some() && bufs.len() <= PIECES) else {
        // SAFETY: the caller's promise.
        return unsafe { store.read(offset, bufs) };
    };
    // SAFETY: the caller's promise.
    let done = unsafe { store.read_now(offset, bufs) };
    if (done as u64) < total(bufs) {
        room.push(Later::plain(store, (offset, bufs), done, moving));
    }
    Ok(())
}
