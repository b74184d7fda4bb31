use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hutch_blockdev::RawDisk;
use hutch_blockdev::store::Store;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::VirtioDevice;
use crate::virtio::blk::Blk;
use crate::virtio::testing::{Driver, place};

/// A host's disk that answers when the test says so, and never from memory.
struct Slow(File);

impl Store for Slow {
    unsafe fn read(&self, _: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        for buf in bufs {
            let mut bytes = vec![0; buf.iov_len];
            (&self.0).read_exact(&mut bytes)?;
            // SAFETY: the caller promises a mapped buffer of so many bytes.
            unsafe { bytes.as_ptr().copy_to(buf.iov_base.cast(), bytes.len()) };
        }
        Ok(())
    }
    fn file(&self) -> Option<&File> {
        Some(&self.0)
    }
    unsafe fn write(&self, _: u64, _: &[libc::iovec]) -> io::Result<()> {
        Ok(())
    }
    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
    fn size(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }
    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
}

const READ: [u8; 16] = [0; 16];
const GET_ID: [u8; 16] = [8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const MOMENT: Duration = Duration::from_millis(100);

fn slow() -> (Driver, Blk, File) {
    let (from, to) = nix::unistd::pipe().unwrap();
    let file = |end: OwnedFd| File::from(end);
    let disk = RawDisk::on(Slow(file(from)), false).unwrap();
    let mut blk = Blk::new(Arc::new(disk), "vol1", 1, Arc::default(), Default::default());
    let mut driver = Driver::new(1);
    driver.start(&mut blk);
    (driver, blk, file(to))
}

/// Offers a read, and waits until the device has looked at it: the next request uses the same memory.
fn offer(driver: &mut Driver) {
    driver.offer_pages(0, &READ, 1, true);
    std::thread::sleep(MOMENT);
}

/// Whether this kernel lets us; where it does not, reads wait for each other, and there is nothing to see here.
fn possible() -> bool {
    IoUring::new(1).inspect_err(|e| eprintln!("no io_uring here: {e}")).is_ok()
}

#[test]
fn others_are_answered_while_a_read_waits() {
    if !possible() {
        return;
    }
    let (mut driver, mut blk, mut host) = slow();
    for byte in [1, 2] {
        offer(&mut driver);
        let id = driver.request(0, &GET_ID, 21).unwrap();
        assert_eq!((id.len, &id.bytes[..4]), (21, &b"vol1"[..]));
        host.write_all(&[byte; 4096]).unwrap();
        assert_eq!(driver.wait_used(0), Some(4097));
        let mut page = [0; 4096];
        driver.memory.read_slice(&mut page, GuestAddress(place(0)[3] + 0x2_0000)).unwrap();
        assert_eq!(page, [byte; 4096]);
    }
    // More than are given to the kernel at a time.
    driver.offer_pages(0, &READ, 1, true);
    driver.offer_again(0, 199);
    let feed = std::thread::spawn(move || {
        (0..200).for_each(|_| host.write_all(&[3; 4096]).unwrap());
        host
    });
    (0..200).for_each(|_| assert_eq!(driver.wait_used(0), Some(4097)));
    drop(feed.join().unwrap());
    blk.stop();
}

#[test]
fn a_pause_and_a_stop_wait_for_reads_that_write_to_the_guest() {
    if !possible() {
        return;
    }
    for stop in [false, true] {
        let (mut driver, mut blk, mut host) = slow();
        offer(&mut driver);
        driver.request(0, &GET_ID, 21).unwrap();
        let still = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            let (still, blk) = (still.clone(), &mut blk);
            let held = still.clone();
            scope.spawn(move || {
                if stop {
                    blk.stop()
                } else {
                    blk.pause()
                }
                still.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(MOMENT);
            assert!(!held.load(Ordering::SeqCst), "the kernel may still write to the guest's memory");
            host.write_all(&[7; 4096]).unwrap();
        });
        assert!(still.load(Ordering::SeqCst));
        assert_eq!(driver.wait_used(0), Some(4097), "it was answered before");
        blk.resume();
    }
}

#[test]
fn what_the_host_cannot_read_is_an_error_of_that_request() {
    if !possible() {
        return;
    }
    let (mut driver, _blk, host) = slow();
    // Its disk is gone: nothing comes, and asked again it says why.
    drop(host);
    driver.offer_pages(0, &READ, 1, true);
    assert_eq!(driver.wait_used(0), Some(1));
    let mut status = [0xff];
    driver.memory.read_slice(&mut status, GuestAddress(place(0)[3] + 0x100)).unwrap();
    assert_eq!(status, [1]);
    assert_eq!(driver.request(0, &GET_ID, 21).unwrap().len, 21);
}
