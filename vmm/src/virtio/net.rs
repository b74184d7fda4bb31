//! The network device (virtio 1.2, 5.1) on a tap: frames go between the guest's buffers and the tap without a copy of ours.
//!
//! ```text
//!   queue 2n   receive  ◄── readv ── tap n     each frame behind its 12-byte header (virtio_net_hdr_v1),
//!   queue 2n+1 transmit ── writev ─► tap n     which the kernel reads and writes itself (IFF_VNET_HDR)
//!   queue 2N   control                         how many pairs the driver uses
//! ```

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Buffers, ChainError};
use super::pci::{EVENT_IDX, INDIRECT_DESC};
use super::worker::{Control, Wake, Worker, bell};
use super::{ActiveQueue, Broken, Memory, Notify, Start, VirtioDevice};
use crate::rate::Limiter;

/// Feature bits (5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
/// Bytes of the header before each frame (5.1.6), and where the number of buffers stands in it.
const HEADER: usize = 12;
const NUM_BUFFERS: usize = 10;
/// The largest frame that a tap hands over with segmentation offload, with its header and a VLAN tag.
const FRAME_MAX: usize = 65550 + HEADER + 4;
const QUEUE_SIZE: u16 = 256;
/// Control queue (5.1.6.5): class, command, and its answers.
const CTRL_MQ: u8 = 4;
const CTRL_MQ_PAIRS_SET: u8 = 0;
const CTRL_OK: u8 = 0;
const CTRL_ERR: u8 = 1;
/// linux/if_tun.h.
const TUN_F_CSUM: libc::c_uint = 1;
const TUN_F_TSO4: libc::c_uint = 2;
const TUN_F_TSO6: libc::c_uint = 4;
const TUN_F_TSO_ECN: libc::c_uint = 8;
const IFF_ATTACH_QUEUE: libc::c_short = 0x200;
const IFF_DETACH_QUEUE: libc::c_short = 0x400;
/// The tap's own limit of receives before the transmit side and others get their turn.
const BURST: usize = 256;

mod tun {
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_write_ptr!(set_vnet_header_size, b'T', 216, libc::c_int);
    // TUNSETQUEUE is declared with an int, and takes an ifreq (linux/if_tun.h).
    nix::ioctl_write_ptr_bad!(
        set_queue,
        nix::request_code_write!(b'T', 217, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// What is counted of one interface since the machine was built.
#[derive(Default)]
pub struct NetCounts {
    /// Frames to and from the guest.
    pub frames: [AtomicU64; 2],
    /// Bytes to and from the guest, headers included.
    pub bytes: [AtomicU64; 2],
    /// Frames that the guest sent and the tap did not take.
    pub dropped: AtomicU64,
}

/// The device.
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    taps: Vec<Arc<File>>,
    pairs: Arc<Mutex<Pairs>>,
    counts: Arc<NetCounts>,
    limits: [Arc<Limiter>; 2],
    workers: Vec<Worker>,
}

/// Which queues of the tap take part: what the kernel puts into one that the driver does not use would be lost.
struct Pairs {
    taps: Vec<Arc<File>>,
    /// The first so many are attached.
    used: usize,
    /// Doorbells of the receive queues, by which their threads learn that the tap's queue is there again.
    kicks: Vec<EventFd>,
}

impl Pairs {
    /// Attaches the first `count` and detaches the others.
    fn set(&mut self, count: usize) -> io::Result<()> {
        while self.used != count {
            let (index, flags, next) = match self.used < count {
                true => (self.used, IFF_ATTACH_QUEUE, self.used + 1),
                false => (self.used - 1, IFF_DETACH_QUEUE, self.used - 1),
            };
            if let Some(tap) = self.taps.get(index) {
                // SAFETY: all zeros is a valid ifreq.
                let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
                request.ifr_ifru.ifru_flags = flags;
                // SAFETY: the descriptor is open and the request is a valid ifreq.
                unsafe { tun::set_queue(tap.as_raw_fd(), &request) }?;
            }
            self.used = next;
            if let Some(kick) = self.kicks.get(index) {
                // It fails only when the counter is full, and then it rings already.
                let _ = kick.write(1);
            }
        }
        Ok(())
    }
}

impl Net {
    /// A device on the tap whose queues are `taps` (1 to 8, opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR). The guest
    /// receives as fast as the first of `limits` lets it, and sends by the second.
    ///
    /// # Errors
    /// The tap's, when it takes no header of 12 bytes or cannot be read without blocking.
    pub fn new(
        mac: [u8; 6],
        mtu: u16,
        taps: Vec<File>,
        counts: Arc<NetCounts>,
        limits: [Arc<Limiter>; 2],
    ) -> io::Result<Net> {
        for tap in &taps {
            use nix::fcntl::{FcntlArg, OFlag, fcntl};
            fcntl(tap, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK))?;
            let size = HEADER as libc::c_int;
            // SAFETY: the descriptor is open and the pointer is to an int, as TUNSETVNETHDRSZ reads.
            unsafe { tun::set_vnet_header_size(tap.as_raw_fd(), &size) }?;
        }
        let taps: Vec<_> = taps.into_iter().map(Arc::new).collect();
        let pairs = Pairs { taps: taps.clone(), used: taps.len(), kicks: Vec::new() };
        Ok(Net { mac, mtu, taps, pairs: Arc::new(Mutex::new(pairs)), counts, limits, workers: Vec::new() })
    }

    /// Tells the tap which frames the guest takes (linux/if_tun.h, TUNSETOFFLOAD).
    fn set_offload(&self, features: u64) -> io::Result<()> {
        // Segments need checksums, and ECN needs segments (5.1.3.1); the tap refuses one without the other.
        let mut offload = 0;
        if features & F_GUEST_CSUM != 0 {
            let flag = |feature: u64, flag| if features & feature != 0 { flag } else { 0 };
            let segments = flag(F_GUEST_TSO4, TUN_F_TSO4) | flag(F_GUEST_TSO6, TUN_F_TSO6);
            let ecn = if segments != 0 { flag(F_GUEST_ECN, TUN_F_TSO_ECN) } else { 0 };
            offload = TUN_F_CSUM | segments | ecn;
        }
        if let Some(tap) = self.taps.first() {
            // SAFETY: the descriptor is open; TUNSETOFFLOAD takes its argument by value.
            unsafe { tun::set_offload(tap.as_raw_fd(), offload.into()) }?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        let offloads = F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;
        let offloads = offloads | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_MRG_RXBUF;
        let many = if self.taps.len() > 1 { F_CTRL_VQ | F_MQ } else { 0 };
        offloads | many | F_MAC | F_MTU | F_STATUS | INDIRECT_DESC | EVENT_IDX
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let control = usize::from(self.taps.len() > 1);
        vec![QUEUE_SIZE; self.taps.len() * 2 + control]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        let mtu = self.mtu.to_le_bytes();
        // MAC, status (link up), pairs, MTU (5.1.4).
        let middle = [1, 0, self.taps.len() as u8, 0];
        let fields = self.mac.iter().chain(&middle).chain(&mtu);
        config.iter_mut().zip(fields).for_each(|(to, from)| *to = *from);
        data.fill(0);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        data.iter_mut().zip(config.iter().skip(offset)).for_each(|(to, from)| *to = *from);
    }

    fn start(&mut self, start: Start) -> io::Result<()> {
        self.set_offload(start.features)?;
        let mergeable = start.features & F_MRG_RXBUF != 0;
        let large = start.features & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0;
        let enough = if large { FRAME_MAX } else { usize::from(self.mtu) + 18 + HEADER };
        let receivers = start.queues.iter().filter(|q| q.index.is_multiple_of(2));
        let receivers = receivers.filter(|q| usize::from(q.index / 2) < self.taps.len());
        let kicks = receivers.map(|q| q.kick.try_clone()).collect::<io::Result<_>>()?;
        {
            // One, until the driver asks for more (5.1.6.5.5).
            let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
            pairs.kicks = kicks;
            pairs.set(1)?;
        }
        for queue in start.queues {
            let (memory, notify) = (start.memory.clone(), start.notify.clone());
            let (name, counts) = (format!("net{}", queue.index), self.counts.clone());
            let Some(tap) = self.taps.get(usize::from(queue.index / 2)).cloned() else {
                let pairs = self.pairs.clone();
                let run = move |control: &Control| serve_control(queue, &memory, &*notify, &pairs, control);
                self.workers.push(Worker::spawn(name, run)?);
                continue;
            };
            let receives = queue.index.is_multiple_of(2);
            let [receiving, sending] = &self.limits;
            let limit = if receives { receiving } else { sending }.clone();
            let end = Port { tap, counts, limit, mergeable, enough };
            let run = move |control: &Control| {
                let ended = match receives {
                    true => end.receive(queue, &memory, &*notify, control),
                    false => end.transmit(queue, &memory, &*notify, control),
                };
                if let Err(e) = ended {
                    notify.needs_reset(&e.to_string());
                }
            };
            self.workers.push(Worker::spawn(name, run)?);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.workers.clear();
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        pairs.kicks.clear();
        // All as they were given; it fails only when the tap is gone.
        let _ = pairs.set(self.taps.len());
    }
    fn pause(&mut self) {
        self.workers.iter().for_each(Worker::pause);
    }
    fn resume(&mut self) {
        self.workers.iter().for_each(Worker::resume);
    }
}

/// One queue of the tap, as its threads see it.
struct Port {
    tap: Arc<File>,
    counts: Arc<NetCounts>,
    limit: Arc<Limiter>,
    mergeable: bool,
    /// The room that any frame fits in.
    enough: usize,
}

/// A receive buffer the driver gave and no frame has used yet.
struct Room<'a> {
    head: u16,
    buffers: Buffers<'a>,
}

impl Port {
    fn receive(
        &self,
        active: ActiveQueue,
        memory: &Memory,
        notify: &dyn Notify,
        control: &Control,
    ) -> Result<(), Broken> {
        let ActiveQueue { index, mut queue, kick } = active;
        let mut rooms = VecDeque::new();
        let mut detached = false;
        loop {
            // The doorbell matters only while there is no room or no tap, the tap only while there are both.
            let ready = self.gather(&mut queue, memory, &mut rooms)? && !detached;
            let fd = if ready { self.tap.as_fd() } else { bell(&kick) };
            let Wake::Ready(_) = control.wait(&[fd], None) else { return Ok(()) };
            if !ready {
                let _ = kick.read();
                detached = false;
                continue;
            }
            let (mut told, mut rest) = (false, None);
            for _ in 0..BURST {
                rest = self.limit.rest(Instant::now);
                if rest.is_some() || !self.gather(&mut queue, memory, &mut rooms)? {
                    break;
                }
                let count = match self.read_frame(&rooms) {
                    Ok(count) if count >= HEADER => count,
                    Err(e) if e.raw_os_error() == Some(libc::EBADFD) => {
                        detached = true;
                        break;
                    }
                    _ => break,
                };
                self.limit.charge(1, (count - HEADER) as u64);
                self.counts.frames[0].fetch_add(1, Relaxed);
                self.counts.bytes[0].fetch_add(count as u64, Relaxed);
                deliver(&mut queue, memory, &mut rooms, count)?;
                told |= queue.needs_notification(memory)?;
            }
            if told {
                notify.used(index);
            }
            // What comes meanwhile waits in the tap, as far as it has room.
            if rest.is_some() && control.wait(&[], rest) == Wake::Stop {
                return Ok(());
            }
        }
    }

    /// Takes buffers until any frame fits; false when the driver has to give more, and then it will ring.
    fn gather<'a>(
        &self,
        queue: &mut Queue,
        memory: &'a Memory,
        rooms: &mut VecDeque<Room<'a>>,
    ) -> Result<bool, Broken> {
        loop {
            let mut have: usize = rooms.iter().map(|r| r.buffers.len()).sum();
            // Without mergeable buffers a frame has one, whatever its size (5.1.6.3.1).
            while have < self.enough && (self.mergeable || rooms.is_empty()) {
                let Some(chain) = chain::next(queue, memory)? else { break };
                let (_, buffers) = chain::split(memory, chain)?;
                if buffers.len() < HEADER {
                    return Err(ChainError::Short.into());
                }
                have += buffers.len();
                rooms.push_back(Room { head: chain.head, buffers });
            }
            if have >= self.enough || !self.mergeable && !rooms.is_empty() {
                queue.disable_notification(memory)?;
                return Ok(true);
            }
            if !queue.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    /// One frame off the tap into the rooms, with its header; EBADFD while this queue of the tap takes no part.
    fn read_frame(&self, rooms: &VecDeque<Room<'_>>) -> io::Result<usize> {
        let mut iovecs: Vec<_> = rooms.iter().flat_map(|r| r.buffers.iovecs()).collect();
        iovecs.truncate(libc::UIO_MAXIOV as usize);
        // SAFETY: the pieces are of guest memory, which the worker keeps mapped until it has been joined.
        let got = unsafe { libc::readv(self.tap.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Waits until the next frame may be sent; the driver is told before of those that were.
    fn rest(&self, notify: &dyn Notify, index: u16, control: &Control) -> Wake {
        let mut told = false;
        while let Some(rest) = self.limit.rest(Instant::now) {
            if !std::mem::replace(&mut told, true) {
                notify.used(index);
            }
            if control.wait(&[], Some(rest)) == Wake::Stop {
                return Wake::Stop;
            }
        }
        Wake::Timeout
    }

    fn transmit(
        &self,
        mut active: ActiveQueue,
        memory: &Memory,
        notify: &dyn Notify,
        control: &Control,
    ) -> Result<(), Broken> {
        let index = active.index;
        while let Wake::Ready(_) = control.wait(&[bell(&active.kick)], None) {
            let _ = active.kick.read();
            super::drain(&mut active, memory, notify, super::LONG, |_, chain| {
                let (frame, _) = chain::split(memory, chain)?;
                if frame.len() < HEADER {
                    return Err(ChainError::Short.into());
                }
                if self.rest(notify, index, control) == Wake::Stop {
                    self.counts.dropped.fetch_add(1, Relaxed);
                    return Ok(Some(0));
                }
                self.limit.charge(1, (frame.len() - HEADER) as u64);
                let mut iovecs = frame.iovecs();
                iovecs.truncate(libc::UIO_MAXIOV as usize);
                // SAFETY: as above; the kernel checks the header that the guest wrote.
                let sent = unsafe {
                    libc::writev(self.tap.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int)
                };
                // A frame that the tap refuses is lost, as on any wire.
                if sent < 0 {
                    self.counts.dropped.fetch_add(1, Relaxed);
                } else {
                    self.counts.frames[1].fetch_add(1, Relaxed);
                    self.counts.bytes[1].fetch_add(sent as u64, Relaxed);
                }
                Ok(Some(0))
            })?;
        }
        Ok(())
    }
}

/// Hands the rooms that `count` bytes fill back to the driver, the first one with their number.
fn deliver(
    queue: &mut Queue,
    memory: &Memory,
    rooms: &mut VecDeque<Room<'_>>,
    count: usize,
) -> Result<(), Broken> {
    let mut used = 0;
    let mut left = count;
    for room in rooms.iter() {
        used += 1;
        left = left.saturating_sub(room.buffers.len());
        if left == 0 {
            break;
        }
    }
    let mut left = count;
    let mut first = true;
    for Room { head, mut buffers } in rooms.drain(..used) {
        let len = left.min(buffers.len());
        left -= len;
        if std::mem::take(&mut first)
            && let Some(mut header) = buffers.take(HEADER)
            && header.take(NUM_BUFFERS).is_some()
        {
            header.write(&(used as u16).to_le_bytes());
        }
        queue.add_used(memory, head, len as u32)?;
    }
    Ok(())
}

/// The control queue: the driver says how many pairs it uses.
fn serve_control(
    mut active: ActiveQueue,
    memory: &Memory,
    notify: &dyn Notify,
    pairs: &Mutex<Pairs>,
    control: &Control,
) {
    while let Wake::Ready(_) = control.wait(&[bell(&active.kick)], None) {
        let _ = active.kick.read();
        let served = super::drain(&mut active, memory, notify, super::LONG, |_, chain| {
            let (readable, writable) = chain::split(memory, chain)?;
            let mut command = [0; 4];
            let known = readable.read(&mut command) == 4 && command[..2] == [CTRL_MQ, CTRL_MQ_PAIRS_SET];
            let mut pairs = pairs.lock().unwrap_or_else(PoisonError::into_inner);
            let count = usize::from(u16::from_le_bytes([command[2], command[3]]));
            let good = known && (1..=pairs.taps.len()).contains(&count) && pairs.set(count).is_ok();
            writable.write(&[if good { CTRL_OK } else { CTRL_ERR }]);
            Ok(Some(1))
        });
        if let Err(e) = served {
            return notify.needs_reset(&e.to_string());
        }
    }
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
