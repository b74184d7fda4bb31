//! The guest's bytes as they are, in a file or on a block device.

use std::fs::File;
use std::sync::Arc;

use crate::disk::{check_range, check_write};
use crate::later::{self, Later, Room};
use crate::store::{Store, lock};
use crate::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Result, SECTOR};

/// A raw disk.
pub struct RawDisk {
    store: Arc<dyn Store>,
    size: std::sync::atomic::AtomicU64,
    read_only: bool,
}

impl RawDisk {
    /// A disk on an open file (or block device), which it locks. A last part of less than a sector is left out.
    ///
    /// # Errors
    /// `Busy` when another machine has it, `Io` when it cannot be read.
    pub fn open(file: File, read_only: bool) -> Result<RawDisk> {
        lock(&file, read_only)?;
        RawDisk::on(file, read_only)
    }

    /// A disk on any store.
    ///
    /// # Errors
    /// `Io` when the store does not tell its size.
    pub fn on(store: impl Store + 'static, read_only: bool) -> Result<RawDisk> {
        let len = store.size().map_err(|e| DiskError::io("find the disk's size", e))?;
        Ok(RawDisk { store: Arc::new(store), size: (len / SECTOR * SECTOR).into(), read_only })
    }

    /// # Safety
    /// As [`Disk::read_or_later`].
    unsafe fn read(&self, offset: u64, bufs: &[IoBufMut], room: Room<'_>) -> Result<()> {
        check_range(offset, total(bufs), self.size())?;
        // SAFETY: the caller's promise.
        let read = unsafe { later::read(&self.store, offset, bufs, room, None) };
        read.map_err(|e| DiskError::io("read the disk", e))
    }

    fn writable(&self, offset: u64, len: u64) -> Result<()> {
        check_write(self.read_only)?;
        check_range(offset, len, self.size())
    }
}

impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.size.load(std::sync::atomic::Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn parallelism(&self) -> usize {
        8
    }

    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.read(offset, bufs, None) }
    }

    unsafe fn read_or_later(&self, offset: u64, bufs: &[IoBufMut], later: &mut Vec<Later>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.read(offset, bufs, Some(later)) }
    }

    unsafe fn write_vectored(&self, offset: u64, bufs: &[IoBuf]) -> Result<()> {
        self.writable(offset, total(bufs))?;
        // SAFETY: the caller's promise.
        unsafe { self.store.write(offset, bufs) }.map_err(|e| DiskError::io("write the disk", e))
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.writable(offset, len)?;
        self.store.zero(offset, len, unmap).map_err(|e| DiskError::io("zero a part of the disk", e))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.store.sync().map_err(|e| DiskError::io("flush the disk", e))
    }

    fn zeros_at(&self, offset: u64) -> Result<u64> {
        check_range(offset, 0, self.size())?;
        let next = self.store.next_data(offset).map_err(|e| DiskError::io("find the disk's next data", e))?;
        let end = next.unwrap_or(u64::MAX).min(self.size());
        Ok(end.saturating_sub(offset) / SECTOR * SECTOR)
    }

    fn grow(&self, new_size: u64) -> Result<()> {
        check_write(self.read_only)?;
        let possible = new_size <= i64::MAX as u64 && new_size.is_multiple_of(SECTOR);
        if !possible || new_size < self.size() {
            let context = format!("the disk has {} bytes and cannot become {new_size}", self.size());
            return Err(DiskError { kind: DiskErrorKind::OutOfRange, context, source: None });
        }
        let failed = |e| DiskError::io("grow the disk", e);
        let had = self.store.size().map_err(failed)?;
        // A block device, made larger before us, or a file's last bytes that were less than a sector: not the guest's.
        let foreign = had.min(new_size).saturating_sub(self.size());
        self.store.zero(self.size(), foreign, false).map_err(failed)?;
        if had < new_size {
            self.store.set_len(new_size).map_err(failed)?;
        }
        self.size.store(new_size, std::sync::atomic::Ordering::Release);
        Ok(())
    }
}

/// The bytes of a list of buffers.
pub(crate) fn total(bufs: &[libc::iovec]) -> u64 {
    bufs.iter().fold(0, |sum: u64, b| sum.saturating_add(b.iov_len as u64))
}
