//! A driver without a guest: rings in ordinary memory, for tests of device cores.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Memory, Notify, Start, VirtioDevice};

/// Entries of every ring.
pub(crate) const SIZE: u16 = 256;
const LIMIT: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(crate) struct Told {
    pub(crate) used: AtomicU64,
    broken: Mutex<Vec<String>>,
}

impl Told {
    /// Waits until the driver was told so often: the rings are filled a moment before.
    pub(crate) fn wait(&self, times: u64) {
        let until = Instant::now() + LIMIT;
        while self.used.load(Ordering::SeqCst) < times {
            assert!(Instant::now() < until, "the driver was not told");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Notify for Told {
    fn used(&self, _: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &str) {
        self.broken.lock().unwrap().push(why.to_owned());
    }
}

struct Ring {
    kick: EventFd,
    next: u16,
    seen: u16,
}

/// Where a queue's rings and data lie.
pub(crate) const fn place(queue: u16) -> [u64; 4] {
    let base = (queue as u64 + 1) << 20;
    [base, base + 0x2000, base + 0x4000, base + 0x1_0000]
}

pub(crate) struct Driver {
    pub(crate) memory: Arc<Memory>,
    pub(crate) told: Arc<Told>,
    rings: Vec<Ring>,
}

/// What a device wrote: the whole writable buffer, and how much of it the device says it used.
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    pub(crate) len: u32,
}

impl Driver {
    pub(crate) fn new(queues: u16) -> Driver {
        let bytes = (usize::from(queues) + 1) << 20;
        let memory = Memory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let ring = |_| Ring { kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap(), next: 0, seen: 0 };
        Driver { memory: Arc::new(memory), told: Arc::default(), rings: (0..queues).map(ring).collect() }
    }

    pub(crate) fn start(&mut self, device: &mut dyn VirtioDevice) {
        let features = device.features();
        self.start_with(device, features);
    }

    pub(crate) fn start_with(&mut self, device: &mut dyn VirtioDevice, features: u64) {
        let queues = self.rings.iter().enumerate().map(|(index, ring)| {
            let [descriptors, avail, used, _] = place(index as u16).map(GuestAddress);
            let mut queue = Queue::new(SIZE).unwrap();
            queue.try_set_desc_table_address(descriptors).unwrap();
            queue.try_set_avail_ring_address(avail).unwrap();
            queue.try_set_used_ring_address(used).unwrap();
            queue.set_ready(true);
            ActiveQueue { index: index as u16, queue, kick: ring.kick.try_clone().unwrap() }
        });
        let queues = queues.collect();
        let start = Start { memory: self.memory.clone(), features, queues, notify: self.told.clone() };
        device.start(start).unwrap();
    }

    fn put<T: vm_memory::ByteValued>(&self, value: T, at: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn descriptor(&self, queue: u16, index: u16, buffer: (u64, u32), flags: u16) {
        let at = place(queue)[0] + u64::from(index) * 16;
        self.put(buffer.0, at);
        self.put(buffer.1, at + 8);
        self.put(flags, at + 12);
        self.put(index + 1, at + 14);
    }

    /// Makes the chain that begins at descriptor 0 available and rings.
    fn offer(&mut self, queue: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = u64::from(ring.next % SIZE);
        ring.next = ring.next.wrapping_add(1);
        let next = ring.next;
        let avail = place(queue)[1];
        self.put(0u16, avail + 4 + slot * 2);
        self.put(next, avail + 2);
        self.rings[usize::from(queue)].kick.write(1).unwrap();
    }

    /// One request by a table of its own: `header`, then so many pages (the same one each time), then a byte for the status.
    pub(crate) fn offer_pages(&mut self, queue: u16, header: &[u8], pages: u16, writable: bool) {
        let [_, _, _, data] = place(queue);
        self.memory.write_slice(header, GuestAddress(data)).unwrap();
        let (table, page, status) = (data + 0x1_0000, data + 0x2_0000, data + 0x100);
        let flag = if writable { 2 } else { 0 };
        let page = (0..pages).map(|_| ((page, 4096), flag));
        let parts = std::iter::once(((data, header.len() as u32), 0)).chain(page).chain([((status, 1), 2)]);
        let last = pages + 1;
        for (i, (buffer, flag)) in parts.enumerate() {
            let (at, i) = (table + i as u64 * 16, i as u16);
            self.put(buffer.0, at);
            self.put(buffer.1, at + 8);
            self.put(flag | u16::from(i < last), at + 12);
            self.put(i + 1, at + 14);
        }
        self.descriptor(queue, 0, (table, (u32::from(pages) + 2) * 16), 4);
        self.offer(queue);
    }

    /// Makes the last request's chain available again, so many times.
    pub(crate) fn offer_again(&mut self, queue: u16, times: u16) {
        (0..times).for_each(|_| self.offer(queue));
    }

    /// One request: `readable`, then room for `writable` bytes, in pieces of odd sizes. `None` when nothing comes back.
    pub(crate) fn request(&mut self, queue: u16, readable: &[u8], writable: usize) -> Option<Answer> {
        let [_, _, _, data] = place(queue);
        self.memory.write_slice(readable, GuestAddress(data)).unwrap();
        let from = data + readable.len() as u64;
        self.memory.write_slice(&vec![0xa5; writable], GuestAddress(from)).unwrap();
        let mut pieces = Vec::new();
        for (mut at, mut len, flag) in [(data, readable.len(), 0u16), (from, writable, 2)] {
            while len > 0 {
                // Seven first: headers and status bytes do not lie in one piece with the rest.
                let piece = if pieces.len() % 2 == 0 { len.min(7) } else { len.min(100_003) };
                pieces.push(((at, piece as u32), flag));
                at += piece as u64;
                len -= piece;
            }
        }
        let last = pieces.len() - 1;
        for (i, (buffer, flag)) in pieces.into_iter().enumerate() {
            self.descriptor(queue, i as u16, buffer, flag | u16::from(i < last));
        }
        self.offer(queue);
        let len = self.wait_used(queue)?;
        let mut bytes = vec![0; writable];
        self.memory.read_slice(&mut bytes, GuestAddress(from)).unwrap();
        Some(Answer { bytes, len })
    }

    pub(crate) fn wait_used(&mut self, queue: u16) -> Option<u32> {
        let until = Instant::now() + LIMIT;
        let used = place(queue)[2];
        loop {
            let index: u16 = self.memory.read_obj(GuestAddress(used + 2)).unwrap();
            let ring = &mut self.rings[usize::from(queue)];
            if index != ring.seen {
                let slot = u64::from(ring.seen % SIZE);
                ring.seen = ring.seen.wrapping_add(1);
                return Some(self.memory.read_obj(GuestAddress(used + 4 + slot * 8 + 4)).unwrap());
            }
            if Instant::now() > until || !self.broken().is_empty() {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Offers one writable buffer of `len` bytes at the queue's data area, without waiting.
    pub(crate) fn offer_writable(&mut self, queue: u16, len: u32) -> u64 {
        let at = place(queue)[3];
        self.descriptor(queue, 0, (at, len), 2);
        self.offer(queue);
        at
    }

    pub(crate) fn bell(&self, queue: u16) -> &EventFd {
        &self.rings[usize::from(queue)].kick
    }

    pub(crate) fn offer_outside(&mut self, queue: u16) {
        self.descriptor(queue, 0, (u64::MAX - 100, 64), 2);
        self.offer(queue);
    }

    pub(crate) fn offer_loop(&mut self, queue: u16) {
        self.descriptor(queue, 0, (place(queue)[3], 64), 1);
        self.put(0u16, place(queue)[0] + 14);
        self.offer(queue);
    }

    pub(crate) fn broken(&self) -> Vec<String> {
        self.told.broken.lock().unwrap().clone()
    }

    pub(crate) fn wait_broken(&self) {
        let until = Instant::now() + LIMIT;
        while self.broken().is_empty() {
            assert!(Instant::now() < until, "the device did not notice");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
