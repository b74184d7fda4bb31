//! A store that fails at a chosen call, as a host does: with ENOSPC, with EIO, after half of the bytes.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use hutch_blockdev::store::Store;
use libc::iovec;

/// When and how to fail; shared with the test, which sets it while the disk is open.
pub struct Plan {
    countdown: AtomicI64,
    errno: AtomicI64,
    calls: AtomicU64,
    once: AtomicBool,
}

impl Plan {
    pub fn new() -> Arc<Plan> {
        Arc::new(Plan { countdown: (-1).into(), errno: 0.into(), calls: 0.into(), once: false.into() })
    }
    /// Fails the `n`-th changing call from now (0: the next) and all after it, with `errno`, until `relent`.
    pub fn fail(&self, n: i64, errno: i32) {
        self.errno.store(errno.into(), Ordering::SeqCst);
        self.countdown.store(n, Ordering::SeqCst);
    }
    /// Fails only the `n`-th changing call from now.
    pub fn fail_once(&self, n: i64, errno: i32) {
        self.once.store(true, Ordering::SeqCst);
        self.fail(n, errno);
    }
    pub fn relent(&self) {
        self.once.store(false, Ordering::SeqCst);
        self.countdown.store(-1, Ordering::SeqCst);
    }
    /// Changing calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }
    /// The error for this call: `Some(true)` for the first, which may have half done its work.
    fn next(&self) -> Option<bool> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let left = self.countdown.load(Ordering::SeqCst);
        if left < 0 {
            return None;
        }
        if left > 0 {
            self.countdown.store(left - 1, Ordering::SeqCst);
            return None;
        }
        if self.once.load(Ordering::SeqCst) {
            self.countdown.store(-1, Ordering::SeqCst);
        }
        Some(true)
    }
    fn error(&self) -> io::Error {
        io::Error::from_raw_os_error(self.errno.load(Ordering::SeqCst) as i32)
    }
}

pub struct Faulty(pub File, pub Arc<Plan>);

impl Store for Faulty {
    unsafe fn read(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.read(offset, bufs) }
    }
    unsafe fn write(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        if self.1.next().is_none() {
            // SAFETY: the caller's promise.
            return unsafe { self.0.write(offset, bufs) };
        }
        // A short write in whole sectors, then the error: half of the first buffer gets there.
        if let Some(first) = bufs.first() {
            let half = iovec { iov_base: first.iov_base, iov_len: first.iov_len / 1024 * 512 };
            // SAFETY: a part of the caller's first buffer.
            unsafe { self.0.write(offset, &[half]) }?;
        }
        Err(self.1.error())
    }
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        match self.1.next() {
            None => self.0.zero(offset, len, punch),
            Some(_) => Err(self.1.error()),
        }
    }
    fn sync(&self) -> io::Result<()> {
        match self.1.next() {
            None => self.0.sync(),
            Some(_) => Err(self.1.error()),
        }
    }
    fn size(&self) -> io::Result<u64> {
        Store::size(&self.0)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.1.next() {
            None => Store::set_len(&self.0, len),
            Some(_) => Err(self.1.error()),
        }
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
}
