//! Reads that wait for the host's disk, many beside each other by io_uring, while their queue is served on.
//!
//! What the host has in memory never comes here: that is copied at once, by one call. Nor do writes, which go to its
//! memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Once;

use hutch_blockdev::{DiskError, Later};
use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::worker::bell;
use crate::complaint::complain;

/// Pieces that the kernel is given at a time.
const ENTRIES: u32 = 256;
/// Pieces that are under way at most: as many as it has room to answer. Who asks for more waits.
const MOST: u32 = 4 * ENTRIES;
/// Bytes of our own that reads under way may take, beside those of the last one.
const WEIGHT: usize = 8 << 20;

/// The reads of one queue. `R` is what a request is answered with when it is done.
///
/// Whoever drops it waits for all of them, since the kernel writes to their memory until then.
pub(super) struct Reads<R> {
    /// Made when it is first needed; `Some(None)`: this kernel has none.
    ring: Option<Option<Ring>>,
    requests: Slab<Request<R>>,
    /// What the kernel was given, or is about to be.
    pieces: Slab<(usize, Later)>,
    /// Bytes of our own that these take.
    weight: usize,
    /// Requests that are done, and not yet answered.
    done: Vec<(R, Option<DiskError>)>,
}

struct Ring {
    uring: IoUring,
    bell: EventFd,
}

/// A request of which pieces are still to come.
struct Request<R> {
    answer: R,
    left: usize,
    failed: Option<DiskError>,
}

impl<R> Default for Reads<R> {
    fn default() -> Self {
        let (requests, pieces) = (Slab::default(), Slab::default());
        Reads { ring: None, requests, pieces, weight: 0, done: Vec::new() }
    }
}

impl<R> Reads<R> {
    /// Requests that are not answered.
    pub(super) fn under_way(&self) -> bool {
        self.requests.used > 0 || !self.done.is_empty()
    }

    /// Readable when a piece is done; `None` while there never was one.
    pub(super) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref()?.as_ref().map(|ring| bell(&ring.bell))
    }

    /// Begins to read all `pieces` of a request; [`submit`](Reads::submit) tells the kernel. Where this kernel cannot read
    /// meanwhile it waits for them here.
    ///
    /// # Errors
    /// The ring cannot be used any more.
    ///
    /// # Safety
    /// The buffers of the pieces stay mapped and writable until the request is done.
    pub(super) unsafe fn begin(&mut self, answer: R, pieces: Vec<Later>) -> io::Result<()> {
        let possible = self.ring.get_or_insert_with(ring).is_some() && pieces.len() <= MOST as usize;
        if !possible {
            let mut failed = None;
            for piece in pieces {
                // SAFETY: the caller's promise.
                failed = unsafe { piece.finish(0) }.err().or(failed);
            }
            self.done.push((answer, failed));
            return Ok(());
        }
        while self.pieces.used + pieces.len() > MOST as usize || self.weight > WEIGHT {
            self.enter(1)?;
            self.take();
        }
        let request = self.requests.add(Request { answer, left: pieces.len(), failed: None });
        for piece in pieces {
            self.weight += piece.weight();
            let place = self.pieces.add((request, piece));
            self.push(place)?;
        }
        Ok(())
    }

    /// Puts a piece on the ring.
    fn push(&mut self, place: usize) -> io::Result<()> {
        let Some((_, piece)) = self.pieces.get(place) else { return Ok(()) };
        // A store without a file leaves nothing for later.
        let fd = piece.file().map_or(-1, |file| file.as_raw_fd());
        let bufs = piece.bufs();
        let read = opcode::Readv::new(types::Fd(fd), bufs.as_ptr(), u32::try_from(bufs.len()).unwrap_or(0));
        let entry = read.offset(piece.offset()).build().user_data(place as u64);
        loop {
            let Some(Some(ring)) = &mut self.ring else { return Ok(()) };
            // SAFETY: the buffers stay mapped by the promise made to `begin`; they and the list of them stay in their place
            // in the piece, which is kept until the kernel is done.
            if unsafe { ring.uring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Tells the kernel what to read.
    ///
    /// # Errors
    /// The ring cannot be used any more.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Tells the kernel what to read, all of it, and waits until so many are done.
    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        let Some(Some(ring)) = &mut self.ring else { return Ok(()) };
        let mut waits = wanted > 0;
        while waits || !ring.uring.submission().is_empty() {
            match ring.uring.submit_and_wait(wanted) {
                // It may have taken only some of them.
                Ok(_) => waits = false,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has no memory at the moment.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether there is something to [`reap`](Reads::reap).
    pub(super) fn some_done(&mut self) -> bool {
        let ready = |ring: &mut Ring| !ring.uring.completion().is_empty();
        !self.done.is_empty() || self.ring.as_mut().and_then(Option::as_mut).is_some_and(ready)
    }

    /// The requests that are done, with how they went.
    pub(super) fn reap(&mut self) -> Vec<(R, Option<DiskError>)> {
        self.take();
        std::mem::take(&mut self.done)
    }

    /// Takes what is done off the ring.
    fn take(&mut self) {
        let Some(Some(ring)) = &mut self.ring else { return };
        let _ = ring.bell.read();
        while let Some((place, result)) = ring.uring.completion().next().map(|c| (c.user_data(), c.result()))
        {
            let Some((request, piece)) = usize::try_from(place).ok().and_then(|at| self.pieces.take(at))
            else {
                continue;
            };
            self.weight -= piece.weight();
            // What the kernel could not read is read once more by the piece, which tells the error: it may only have wanted
            // a short read, a file's end, or to be asked again.
            let read = usize::try_from(result).unwrap_or(0);
            // SAFETY: the kernel is done with it, and `begin` was promised that the buffers are there until then.
            let failed = unsafe { piece.finish(read) }.err();
            let Some(open) = self.requests.get_mut(request) else { continue };
            open.failed = failed.or(open.failed.take());
            open.left -= 1;
            if open.left == 0
                && let Some(whole) = self.requests.take(request)
            {
                self.done.push((whole.answer, whole.failed));
            }
        }
    }

    /// Waits for all that is under way, and returns it as [`reap`](Reads::reap) does.
    ///
    /// # Errors
    /// The ring cannot be used any more.
    pub(super) fn settle(&mut self) -> io::Result<Vec<(R, Option<DiskError>)>> {
        while self.pieces.used > 0 {
            self.enter(1)?;
            self.take();
        }
        Ok(self.reap())
    }
}

impl<R> Drop for Reads<R> {
    fn drop(&mut self) {
        if let Err(e) = self.settle() {
            // The kernel may still write to memory that is about to be somebody else's.
            complain(format_args!("io_uring failed with reads under way ({e}); the machine ends here"));
            std::process::abort();
        }
    }
}

/// A ring with a bell; `None` where the kernel has none, or forbids it.
fn ring() -> Option<Ring> {
    let made = || {
        let uring = IoUring::builder().setup_cqsize(MOST).build(ENTRIES)?;
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        uring.submitter().register_eventfd(bell.as_raw_fd())?;
        io::Result::Ok(Ring { uring, bell })
    };
    made().inspect_err(without).ok()
}

/// Says once that reads wait for each other.
fn without(e: &io::Error) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        complain(format_args!(
            "no io_uring ({e}): reads of a queue that the host's disk has to answer wait for each other. Where it is \
             forbidden, allow it (sysctl kernel.io_uring_disabled=0)"
        ));
    });
}

/// Things in numbered places, which are used again.
struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<usize>,
    used: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Slab { places: Vec::new(), free: Vec::new(), used: 0 }
    }
}

impl<T> Slab<T> {
    fn add(&mut self, thing: T) -> usize {
        self.used += 1;
        match self.free.pop() {
            Some(place) => {
                if let Some(empty) = self.places.get_mut(place) {
                    *empty = Some(thing);
                }
                place
            }
            None => {
                self.places.push(Some(thing));
                self.places.len() - 1
            }
        }
    }

    fn get(&self, place: usize) -> Option<&T> {
        self.places.get(place)?.as_ref()
    }

    fn get_mut(&mut self, place: usize) -> Option<&mut T> {
        self.places.get_mut(place)?.as_mut()
    }

    fn take(&mut self, place: usize) -> Option<T> {
        let thing = self.places.get_mut(place)?.take()?;
        self.free.push(place);
        self.used -= 1;
        Some(thing)
    }
}

#[cfg(test)]
#[path = "reads_tests.rs"]
mod tests;
