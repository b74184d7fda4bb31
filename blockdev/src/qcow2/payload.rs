//! The guest's bytes in a layer's file: as they are, or encrypted. Metadata does not come here.
//!
//! A guest may change its memory while it is read, and look at it while it is written. So what is encrypted or decrypted
//! lies in a buffer of ours: the guest's memory is copied from once, and only ever gets plain bytes.

use std::io;
use std::sync::Arc;

use crate::crypt::Cipher;
use crate::cursor::{self, Cursor};
use crate::later::{self, Later, Moving, Room};
use crate::raw::total;
use crate::store::Store;
use crate::{IoBuf, IoBufMut, SECTOR};

/// The most bytes that a request has in our buffer at a time.
const BOUNCE: u64 = 256 << 10;

/// Where the guest's bytes of one layer are.
#[derive(Clone)]
pub(super) struct Payload {
    store: Arc<dyn Store>,
    cipher: Option<Arc<Cipher>>,
}

impl Payload {
    pub(super) fn new(store: Arc<dyn Store>, cipher: Option<Arc<Cipher>>) -> Payload {
        Payload { store, cipher }
    }

    /// Whether zeros in the file are something else to the guest.
    pub(super) fn encrypted(&self) -> bool {
        self.cipher.is_some()
    }

    /// Reads what lies at `host` in the file, and is the guest's at `guest`: at once, or by way of `room` what the host's
    /// memory does not hold. Whole sectors in all.
    ///
    /// # Safety
    /// As [`crate::Disk::read_or_later`].
    pub(super) unsafe fn read(
        &self,
        host: u64,
        guest: u64,
        bufs: &[IoBufMut],
        mut room: Room<'_>,
        moving: Option<&Moving>,
    ) -> io::Result<()> {
        let Some(cipher) = &self.cipher else {
            // SAFETY: the caller's promise.
            return unsafe { later::read(&self.store, host, bufs, room, moving) };
        };
        let mut cursor = Cursor::new(bufs);
        bounce(total(bufs), |done, bytes| {
            let (part, sector) = (cursor.take(bytes.len() as u64), (guest + done) / SECTOR);
            match room.as_deref_mut().filter(|_| self.store.file().is_some()) {
                None => self.store.read_bytes(host + done, bytes)?,
                Some(room) => {
                    if self.store.read_bytes_now(host + done, bytes) < bytes.len() {
                        let key = (cipher.clone(), sector);
                        room.push(Later::encrypted(&self.store, host + done, key, &part, moving));
                        return Ok(());
                    }
                }
            }
            cipher.decrypt(sector, bytes);
            // SAFETY: the caller's promise; the bytes are ours, so they do not overlap.
            unsafe { cursor::copy(bytes, &part) };
            Ok(())
        })
    }

    /// Writes the guest's bytes at `guest` to `host` in the file. Whole sectors in all.
    ///
    /// # Safety
    /// As [`crate::Disk::write_vectored`].
    pub(super) unsafe fn write(&self, host: u64, guest: u64, bufs: &[IoBuf]) -> io::Result<()> {
        let Some(cipher) = &self.cipher else {
            // SAFETY: the caller's promise.
            return unsafe { self.store.write(host, bufs) };
        };
        let mut cursor = Cursor::new(bufs);
        bounce(total(bufs), |done, bytes| {
            // SAFETY: the caller's promise; the bytes are ours, so they do not overlap.
            unsafe { cursor::gather(&cursor.take(bytes.len() as u64), bytes) };
            cipher.encrypt((guest + done) / SECTOR, bytes);
            self.store.write_bytes(host + done, bytes)
        })
    }

    /// Makes what lies at `host`, and is the guest's at `guest`, read as zeros, in the place that it has.
    pub(super) fn zero(&self, host: u64, guest: u64, len: u64) -> io::Result<()> {
        let Some(cipher) = &self.cipher else { return self.store.zero(host, len, false) };
        bounce(len, |done, bytes| {
            bytes.fill(0);
            cipher.encrypt((guest + done) / SECTOR, bytes);
            self.store.write_bytes(host + done, bytes)
        })
    }
}

/// Does `len` bytes in pieces of a buffer: what is done already, and the piece.
fn bounce(len: u64, mut job: impl FnMut(u64, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; len.min(BOUNCE) as usize];
    let mut done = 0;
    while done < len {
        let count = (len - done).min(BOUNCE);
        job(done, buffer.get_mut(..count as usize).unwrap_or_default())?;
        done += count;
    }
    Ok(())
}
