//! The file under a disk: whole reads and writes, holes, durability, the lock. Nothing above calls the kernel.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use libc::iovec;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};

use crate::{DiskError, DiskErrorKind, Result};

/// What a backend asks of its file. All transfers are whole; offsets are the file's.
pub trait Store: Send + Sync {
    /// Reads `bufs`; past the end of the file, zeros.
    ///
    /// # Safety
    /// Each buffer stays mapped and writable until the call returns.
    unsafe fn read(&self, offset: u64, bufs: &[iovec]) -> io::Result<()>;
    /// Reads as much of `bufs`, from their beginning, as the host has in memory; returns how many bytes.
    ///
    /// # Safety
    /// As [`read`](Store::read).
    unsafe fn read_now(&self, _offset: u64, _bufs: &[iovec]) -> usize {
        0
    }
    /// The file, for reads that the kernel does meanwhile. `None`: reads are done by [`read`](Store::read) only.
    fn file(&self) -> Option<&File> {
        None
    }
    /// Writes `bufs`, growing the file where needed.
    ///
    /// # Safety
    /// Each buffer stays mapped and readable until the call returns.
    unsafe fn write(&self, offset: u64, bufs: &[iovec]) -> io::Result<()>;
    /// Makes a range read as zeros; `punch` gives its space back to the host.
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()>;
    /// Makes everything written so far survive loss of power (fdatasync).
    fn sync(&self) -> io::Result<()>;
    /// The file's size.
    fn size(&self) -> io::Result<u64>;
    /// Sets the file's size.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Where the first byte of data at or after `offset` lies; `None` when only holes follow.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// Who had the file to write lets others read it from now on.
    ///
    /// # Errors
    /// `Io`: the lock cannot be changed.
    fn share(&self) -> Result<()> {
        Ok(())
    }

    /// Reads into ordinary memory.
    fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let buf = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the slice is exclusively borrowed until the call returns.
        unsafe { self.read(offset, &[buf]) }
    }
    /// Reads into ordinary memory what the host has in its own; returns how many bytes.
    fn read_bytes_now(&self, offset: u64, bytes: &mut [u8]) -> usize {
        let buf = iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the slice is exclusively borrowed until the call returns.
        unsafe { self.read_now(offset, &[buf]) }
    }
    /// Writes from ordinary memory.
    fn write_bytes(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let buf = iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        // SAFETY: the slice is borrowed until the call returns, and a write only reads it.
        unsafe { self.write(offset, &[buf]) }
    }
}

/// The most pieces the kernel takes at once (UIO_MAXIOV).
pub(crate) const PIECES: usize = 1024;
/// Zeros are written in steps of this where the file system has no holes.
const ZEROS: usize = 1 << 20;

/// Drops the first `count` bytes of `bufs`.
pub(crate) fn advance(bufs: &mut Vec<iovec>, mut count: usize) {
    let mut whole = 0;
    for buf in bufs.iter_mut() {
        if count < buf.iov_len {
            // Within the buffer, so still inside what it points to.
            buf.iov_base = buf.iov_base.wrapping_byte_add(count);
            buf.iov_len -= count;
            break;
        }
        count -= buf.iov_len;
        whole += 1;
    }
    bufs.drain(..whole);
}

type Transfer = unsafe extern "C" fn(libc::c_int, *const iovec, libc::c_int, libc::off_t) -> libc::ssize_t;

/// Repeats `transfer` until all of `bufs` is done; returns what was left when it made no progress.
///
/// # Safety
/// As `transfer` needs of `bufs`.
unsafe fn whole(file: &File, mut offset: u64, bufs: &[iovec], transfer: Transfer) -> io::Result<Vec<iovec>> {
    let mut left: Vec<iovec> = bufs.iter().filter(|b| b.iov_len > 0).copied().collect();
    while !left.is_empty() {
        let at = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        let pieces = left.len().min(PIECES) as libc::c_int;
        // SAFETY: the caller's promise; `advance` stays inside each buffer.
        let done = unsafe { transfer(file.as_raw_fd(), left.as_ptr(), pieces, at) };
        if done < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if done == 0 {
            break;
        }
        advance(&mut left, done as usize);
        offset += done as u64;
    }
    Ok(left)
}

impl Store for File {
    unsafe fn read(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        for rest in unsafe { whole(self, offset, bufs, libc::preadv) }? {
            // SAFETY: the caller's promise: mapped and writable, `iov_len` bytes.
            unsafe { rest.iov_base.cast::<u8>().write_bytes(0, rest.iov_len) };
        }
        Ok(())
    }

    unsafe fn read_now(&self, offset: u64, bufs: &[iovec]) -> usize {
        let Ok(at) = libc::off_t::try_from(offset) else { return 0 };
        let pieces = bufs.len().min(PIECES) as libc::c_int;
        // SAFETY: the caller's promise.
        let done = unsafe { libc::preadv2(self.as_raw_fd(), bufs.as_ptr(), pieces, at, libc::RWF_NOWAIT) };
        // Also where the file system knows no such thing.
        usize::try_from(done).unwrap_or(0)
    }

    fn file(&self) -> Option<&File> {
        Some(self)
    }

    unsafe fn write(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        let left = unsafe { whole(self, offset, bufs, libc::pwritev) }?;
        if left.is_empty() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        let (Ok(at), Ok(count)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len)) else {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        };
        if len == 0 {
            return Ok(());
        }
        let mode = match punch {
            true => FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            false => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        loop {
            match fallocate(self.as_fd(), mode, at, count) {
                Ok(()) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => break,
                Err(e) => return Err(e.into()),
            }
        }
        // The file system has none of that: zeros it is.
        let zeros = vec![0; ZEROS.min(len as usize)];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(ZEROS as u64);
            self.write_bytes(offset + done, zeros.get(..step as usize).unwrap_or(&zeros))?;
            done += step;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn size(&self) -> io::Result<u64> {
        use std::os::unix::fs::FileTypeExt;
        let meta = self.metadata()?;
        if meta.file_type().is_block_device() {
            use std::io::{Seek, SeekFrom};
            return (&*self).seek(SeekFrom::End(0));
        }
        Ok(meta.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        use nix::unistd::{Whence, lseek};
        let Ok(at) = libc::off_t::try_from(offset) else { return Ok(None) };
        match lseek(self.as_fd(), at, Whence::SeekData) {
            Ok(found) => Ok(Some(found as u64)),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            // Without holes, everything is data.
            Err(nix::errno::Errno::EINVAL) => Ok((offset < self.size()?).then_some(offset)),
            Err(e) => Err(e.into()),
        }
    }

    fn share(&self) -> Result<()> {
        lock(self, true)
    }
}

/// Takes the file for this process: alone to write, with other readers to read (an open file description's lock, so
/// that it is gone with the last descriptor, however the process ends).
///
/// # Errors
/// `Busy` when another machine has it, and still has it a fifth of a second later.
pub fn lock(file: &File, read_only: bool) -> Result<()> {
    // SAFETY: all zeros is a valid flock.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if read_only { libc::F_RDLCK } else { libc::F_WRLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // A child that was being forked when its owner let the disk go has it until it becomes another program.
    let mut patience = 20;
    let locked = loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
            Err(Errno::EAGAIN | Errno::EACCES) if patience > 0 => {
                patience -= 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            locked => break locked,
        }
    };
    match locked {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(DiskError {
            kind: DiskErrorKind::Busy,
            context: "the disk is in use by another machine; stop that one first, or make a copy".into(),
            source: None,
        }),
        Err(e) => Err(DiskError::io("lock the disk", e.into())),
    }
}
