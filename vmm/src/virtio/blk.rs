//! The block device (virtio 1.2, 5.2): requests of a queue become calls of a [`Disk`], one thread a queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use hutch_blockdev::disk::SECTOR;
use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Later};
use virtio_queue::QueueT;

use super::chain::{self, Buffers, Chain, ChainError};
use super::pci::{EVENT_IDX, INDIRECT_DESC};
use super::reads::Reads;
use super::worker::{Control, Manners, Wake, Worker, bell};
use super::{ActiveQueue, Broken, Memory, Notify, Start, VirtioDevice};
use crate::complaint::complain;
use crate::rate::Limiter;

/// Feature bits (5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Request types (5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
/// Status bytes (5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;
/// The header before a request's data: type, reserved, sector.
const HEADER: usize = 16;
/// Entries of a queue; a request may have so many segments less its header and status. So 1 MiB is one request also where
/// the guest has no two of its pages beside each other, which would need 258 of them.
const QUEUE_SIZE: u16 = 512;
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// One discard or write-zeroes request: ranges, and sectors a range (2 GiB).
const RANGES_MAX: u32 = 64;
const RANGE: usize = 16;
const RANGE_SECTORS_MAX: u32 = 4 << 20;
const FLAG_UNMAP: u32 = 1;
/// So many bytes of a read or a write are one operation (EC2 counts those of its SSDs so).
const OPERATION: usize = 256 << 10;
/// A read of more than this waits by itself: what it takes meanwhile is bounded, whatever a guest asks for.
const LATER_MAX: usize = 4 << 20;
/// How long a guest's write waits for room on the host before it is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// What is counted of one disk since the machine was built.
#[derive(Default)]
pub struct DiskCounts {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Bytes the guest read and wrote.
    pub bytes: [AtomicU64; 2],
    /// Requests that failed.
    pub errors: AtomicU64,
    /// A write waits for room on the host at present.
    pub no_space: AtomicBool,
}

/// The device.
pub struct Blk {
    core: Arc<Core>,
    queues: u16,
    /// In sectors, as the driver is told.
    capacity: u64,
    workers: Vec<Worker>,
}

/// What the threads share.
struct Core {
    id: String,
    disk: Arc<dyn Disk>,
    serial: [u8; 20],
    counts: Arc<DiskCounts>,
    limits: [Arc<Limiter>; 2],
}

impl Blk {
    /// A device on `disk`; `serial` is what the guest reads as its id (at most 20 bytes), `queues` how many it is
    /// offered, `counts` where it counts. It holds to both of `limits`: its own, and that of all disks together.
    pub fn new(
        disk: Arc<dyn Disk>,
        serial: &str,
        queues: u16,
        counts: Arc<DiskCounts>,
        limits: [Arc<Limiter>; 2],
    ) -> Blk {
        let mut bytes = [0; 20];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let queues = queues.clamp(1, disk.parallelism().clamp(1, 32) as u16);
        let capacity = disk.size() / SECTOR;
        let core = Core { id: serial.to_owned(), disk, serial: bytes, counts, limits };
        Blk { core: Arc::new(core), queues, capacity, workers: Vec::new() }
    }

    /// Answers what is in a queue, once, on the caller's thread: what the device's own threads do each time that the bell
    /// rings. What would have to wait for the limits or for room fails.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn visit(
        &self,
        active: &mut ActiveQueue,
        memory: &Memory,
        notify: &dyn Notify,
    ) -> Result<u32, Broken> {
        let control = Control::stopped()?;
        let mut server = Server::new(&self.core, memory, notify, false, &control);
        let found = server.visit(active, super::LONG)?;
        server.settle(active)?;
        Ok(found)
    }

    /// The device's configuration (5.2.4), as far as features here fill it.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            config.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        put(0, &self.capacity.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: physical blocks of 4 KiB (2^3 sectors), best used by 4 KiB and by 64 KiB.
        put(24, &[3, 0]);
        put(26, &8u16.to_le_bytes());
        put(28, &128u32.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        for at in [36, 48] {
            put(at, &RANGE_SECTORS_MAX.to_le_bytes());
            put(at + 4, &RANGES_MAX.to_le_bytes());
        }
        put(44, &8u32.to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let common = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | INDIRECT_DESC | EVENT_IDX;
        let many = if self.queues > 1 { F_MQ } else { 0 };
        common | many | if self.core.disk.read_only() { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.iter_mut().zip(self.config().iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn refresh(&mut self) -> bool {
        let now = self.core.disk.size() / SECTOR;
        std::mem::replace(&mut self.capacity, now) != now
    }

    fn start(&mut self, start: Start) -> io::Result<()> {
        let through = start.features & F_FLUSH == 0;
        for queue in start.queues {
            let (core, memory, notify) = (self.core.clone(), start.memory.clone(), start.notify.clone());
            let name = format!("blk{}", queue.index);
            let serve = move |control: &Control| core.serve(queue, &memory, &*notify, through, control);
            self.workers.push(Worker::spawn(name, serve)?);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.workers.clear();
    }
    fn pause(&mut self) {
        self.workers.iter().for_each(Worker::pause);
    }
    fn resume(&mut self) {
        self.workers.iter().for_each(Worker::resume);
    }
}

/// How a request went wrong, other than by the disk.
enum Refusal {
    Unsupported,
    Invalid,
    Disk(DiskError),
}

impl From<DiskError> for Refusal {
    fn from(e: DiskError) -> Self {
        Refusal::Disk(e)
    }
}

/// What answers a read that waits for the host's disk.
struct Answer<'a> {
    head: u16,
    status: Buffers<'a>,
    /// Bytes of its data.
    len: usize,
}

impl Answer<'_> {
    /// The bytes that the driver is told were written.
    fn told(&self, status: u8) -> u32 {
        let all = u32::try_from(self.len).unwrap_or(u32::MAX).saturating_add(1);
        if status == S_OK { all } else { 1 }
    }
}

/// Who serves one queue.
struct Server<'a> {
    core: &'a Core,
    memory: &'a Memory,
    notify: &'a dyn Notify,
    control: &'a Control,
    /// The driver cannot flush, so every write is durable at once (5.2.5.2).
    through: bool,
    reads: Reads<Answer<'a>>,
}

impl<'a> Server<'a> {
    fn new(
        core: &'a Core,
        memory: &'a Memory,
        notify: &'a dyn Notify,
        through: bool,
        control: &'a Control,
    ) -> Server<'a> {
        Server { core, memory, notify, control, through, reads: Reads::default() }
    }

    /// Serves the queue until it is stopped.
    ///
    /// # Errors
    /// The driver broke the rules, or the host's ring is broken.
    fn serve(&mut self, active: &mut ActiveQueue) -> Result<(), Broken> {
        let mut manners = Manners::new(Instant::now());
        while let Wake::Ready(_) = self.wait(active, true, None)? {
            let _ = active.kick.read();
            let found = self.visit(active, manners.long())?;
            manners.visited(found, Instant::now());
        }
        self.settle(active)
    }

    /// Answers what is in the queue, and returns how many requests that were.
    fn visit(&mut self, active: &mut ActiveQueue, long: Duration) -> Result<u32, Broken> {
        let (memory, notify) = (self.memory, self.notify);
        super::drain(active, memory, notify, long, |active, chain| self.answer(active, chain))
    }

    /// Waits until the driver rang, if that is asked for, the time is over, or the thread is to leave. Reads that the host's
    /// disk has answered meanwhile are answered to the driver.
    fn wait(
        &mut self,
        active: &mut ActiveQueue,
        ring: bool,
        limit: Option<Duration>,
    ) -> Result<Wake, Broken> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            self.reads.submit()?;
            if self.reads.some_done() {
                self.reap(active)?;
            }
            let busy = self.reads.under_way();
            let mut fds = Vec::with_capacity(2);
            fds.extend(self.reads.bell().filter(|_| busy));
            fds.extend(ring.then(|| bell(&active.kick)));
            let left = deadline.map(|until| until.saturating_duration_since(Instant::now()));
            match self.control.wait_with(&fds, left, busy) {
                Wake::Ready(ready) => {
                    let rang = ring && ready.last() == Some(&true);
                    if busy {
                        self.reap(active)?;
                    }
                    if rang {
                        return Ok(Wake::Ready(ready));
                    }
                }
                Wake::Pause => self.settle(active)?,
                wake => return Ok(wake),
            }
        }
    }

    /// Answers the reads that are done.
    fn reap(&mut self, active: &mut ActiveQueue) -> Result<(), Broken> {
        let done = self.reads.reap();
        self.give(active, done)
    }

    /// Waits for all reads that are under way, and answers them.
    fn settle(&mut self, active: &mut ActiveQueue) -> Result<(), Broken> {
        let done = self.reads.settle()?;
        self.give(active, done)
    }

    fn give(
        &self,
        active: &mut ActiveQueue,
        done: Vec<(Answer<'a>, Option<DiskError>)>,
    ) -> Result<(), Broken> {
        if done.is_empty() {
            return Ok(());
        }
        for (answer, failed) in done {
            let status = failed.map_or(S_OK, |e| self.core.failed(e.into()));
            answer.status.write(&[status]);
            active.queue.add_used(self.memory, answer.head, answer.told(status))?;
        }
        Ok(active.tell(self.memory, self.notify)?)
    }

    /// Carries one request out; `None`: it will be answered when the host's disk has.
    fn answer(&mut self, active: &mut ActiveQueue, chain: Chain) -> Result<Option<u32>, Broken> {
        let (mut readable, mut writable) = chain::split(self.memory, chain)?;
        let header = readable.take(HEADER).ok_or(ChainError::Short)?;
        let data = writable.len().checked_sub(1).ok_or(ChainError::Short)?;
        let into = writable.take(data).ok_or(ChainError::Short)?;
        let mut bytes = [0; HEADER];
        header.read(&mut bytes);
        let answer = Answer { head: chain.head, status: writable, len: into.len() };
        if !bytes.starts_with(&T_IN.to_le_bytes()) {
            // It may take a while.
            self.reads.submit()?;
        }
        if self.reads.some_done() {
            self.reap(active)?;
        }
        let status = match self.rest(active, bytes, &readable, &into)? {
            Wake::Stop => S_IOERR,
            _ => {
                let mut later = Vec::new();
                let status = self.request(active, bytes, &readable, &into, &mut later)?;
                if status == S_OK && !later.is_empty() {
                    // SAFETY: the buffers are of guest memory, which is mapped until this thread has been joined, and it
                    // waits for the reads before it ends.
                    unsafe { self.reads.begin(answer, later) }?;
                    return Ok(None);
                }
                status
            }
        };
        answer.status.write(&[status]);
        Ok(Some(answer.told(status)))
    }

    /// Waits until a request may begin, and takes what it costs out of the limits. The driver is told before of what was
    /// answered; the queue's other requests wait behind this one.
    fn rest(
        &mut self,
        active: &mut ActiveQueue,
        header: [u8; HEADER],
        from: &Buffers<'_>,
        into: &Buffers<'_>,
    ) -> Result<Wake, Broken> {
        let [a, b, c, d, ..] = header;
        let (ops, bytes) = match u32::from_le_bytes([a, b, c, d]) {
            T_IN => (into.len().div_ceil(OPERATION).max(1), into.len()),
            T_OUT => (from.len().div_ceil(OPERATION).max(1), from.len()),
            T_DISCARD | T_WRITE_ZEROES => ((from.len() / RANGE).max(1), 0),
            _ => return Ok(Wake::Timeout),
        };
        let (core, mut told) = (self.core, false);
        while let Some(rest) = core.limits.iter().filter_map(|limit| limit.rest(Instant::now)).max() {
            if !std::mem::replace(&mut told, true) {
                self.notify.used(active.index);
            }
            if self.wait(active, false, Some(rest))? == Wake::Stop {
                return Ok(Wake::Stop);
            }
        }
        core.limits.iter().for_each(|limit| limit.charge(ops as u64, bytes as u64));
        Ok(Wake::Timeout)
    }

    /// Carries one request out and returns its status; what is added to `later` is left to be read. A write that finds no room
    /// on the host is held and tried again until there is room or the device is stopped: the guest sees a slow disk, not a
    /// broken one.
    fn request(
        &mut self,
        active: &mut ActiveQueue,
        header: [u8; HEADER],
        from: &Buffers<'_>,
        into: &Buffers<'_>,
        later: &mut Vec<Later>,
    ) -> Result<u8, Broken> {
        let core = self.core;
        core.counts.requests.fetch_add(1, Relaxed);
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
        loop {
            let done = core.try_request(kind, sector, from, into, self.through, later);
            if done.is_err() {
                later.clear();
            }
            match done {
                Ok(()) => {
                    core.counts.no_space.store(false, Relaxed);
                    return Ok(S_OK);
                }
                Err(Refusal::Disk(e)) if e.kind == DiskErrorKind::NoSpace => {
                    if !core.counts.no_space.swap(true, Relaxed) {
                        complain(format_args!(
                            "{}: {e}; the guest's write waits: make room on the host and it goes on",
                            core.id
                        ));
                    }
                    self.notify.used(active.index);
                    if self.wait(active, false, Some(RETRY))? == Wake::Stop {
                        return Ok(S_IOERR);
                    }
                }
                Err(refusal) => return Ok(core.failed(refusal)),
            }
        }
    }
}

impl Core {
    fn serve(
        &self,
        mut active: ActiveQueue,
        memory: &Memory,
        notify: &dyn Notify,
        through: bool,
        control: &Control,
    ) {
        let mut server = Server::new(self, memory, notify, through, control);
        if let Err(e) = server.serve(&mut active) {
            notify.needs_reset(&e.to_string());
        }
    }

    /// The status of a request that failed.
    fn failed(&self, refusal: Refusal) -> u8 {
        if let Refusal::Unsupported = refusal {
            return S_UNSUPP;
        }
        // A failing disk says so once, a wrong request of the guest is the guest's affair.
        if self.counts.errors.fetch_add(1, Relaxed) == 0
            && let Refusal::Disk(e) = refusal
        {
            let cause = e.source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
            complain(format_args!("{}: {e}{cause}; the guest sees an I/O error", self.id));
        }
        S_IOERR
    }

    fn try_request(
        &self,
        kind: u32,
        sector: u64,
        from: &Buffers<'_>,
        into: &Buffers<'_>,
        through: bool,
        later: &mut Vec<Later>,
    ) -> Result<(), Refusal> {
        let at = sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)?;
        let disk = &*self.disk;
        match kind {
            T_IN => {
                self.check(at, into.len() as u64)?;
                self.counts.bytes[0].fetch_add(into.len() as u64, Relaxed);
                // SAFETY: the pieces are of guest memory, which the worker keeps mapped until it has been joined.
                unsafe {
                    match into.len() > LATER_MAX {
                        true => disk.read_vectored(at, &into.iovecs()),
                        false => disk.read_or_later(at, &into.iovecs(), later),
                    }
                }?;
            }
            T_OUT => {
                self.check(at, from.len() as u64)?;
                // SAFETY: as above.
                unsafe { disk.write_vectored(at, &from.iovecs()) }?;
                self.counts.bytes[1].fetch_add(from.len() as u64, Relaxed);
                if through {
                    disk.flush()?;
                }
            }
            T_FLUSH => disk.flush()?,
            T_GET_ID => {
                into.write(&self.serial);
            }
            T_DISCARD | T_WRITE_ZEROES => {
                let ranges = self.ranges(kind, from)?;
                for (at, len, unmap) in ranges {
                    match kind {
                        T_DISCARD => disk.discard(at, len)?,
                        _ => disk.write_zeroes(at, len, unmap)?,
                    }
                }
                if through {
                    disk.flush()?;
                }
            }
            _ => return Err(Refusal::Unsupported),
        }
        Ok(())
    }

    /// Requests are whole sectors within the disk (5.2.6.1); the rest is refused before the disk sees it.
    fn check(&self, at: u64, len: u64) -> Result<(), Refusal> {
        let good =
            len.is_multiple_of(SECTOR) && at.checked_add(len).is_some_and(|end| end <= self.disk.size());
        if good { Ok(()) } else { Err(Refusal::Invalid) }
    }

    /// The ranges of a discard or write-zeroes request, all checked before the first is touched (5.2.6.2).
    fn ranges(&self, kind: u32, from: &Buffers<'_>) -> Result<Vec<(u64, u64, bool)>, Refusal> {
        if from.is_empty() || !from.len().is_multiple_of(RANGE) || from.len() / RANGE > RANGES_MAX as usize {
            return Err(Refusal::Invalid);
        }
        let mut bytes = vec![0; from.len()];
        from.read(&mut bytes);
        let mut ranges = Vec::new();
        for range in bytes.chunks_exact(RANGE) {
            let Some((sector, rest)) = range.split_first_chunk() else { return Err(Refusal::Invalid) };
            let Some((count, flags)) = rest.split_first_chunk() else { return Err(Refusal::Invalid) };
            let flags = flags.first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
            let (sector, count) = (u64::from_le_bytes(*sector), u32::from_le_bytes(*count));
            // Discard knows no flag, write-zeroes the one; others are answered as unsupported (5.2.6.2).
            let known = if kind == T_WRITE_ZEROES { FLAG_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(Refusal::Unsupported);
            }
            if count > RANGE_SECTORS_MAX {
                return Err(Refusal::Invalid);
            }
            let (at, len) = (sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)?, u64::from(count) * SECTOR);
            self.check(at, len)?;
            ranges.push((at, len, flags & FLAG_UNMAP != 0));
        }
        Ok(ranges)
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
