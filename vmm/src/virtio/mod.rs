//! virtio 1.2 devices: cores that know nothing of PCI or KVM, and the one transport around them.
//!
//! ```text
//!   guest ── PCI BAR ── pci.rs (transport: negotiation, queue registers, MSI-X)
//!                          │ start(Start { memory, features, queues, notify }) / stop()
//!              ┌───────────┼────────────┐
//!            blk.rs      net.rs       rng.rs      (cores: plain functions over a queue; workers: threads around them)
//! ```

pub mod blk;
pub mod chain;
pub mod net;
pub mod pci;
mod reads;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory as devices see it.
pub type Memory = GuestMemoryMmap<()>;

/// How a device gets the guest's attention. Every method may be called from any thread and never blocks.
pub trait Notify: Send + Sync {
    /// Used buffers are ready in queue `index` (virtio 1.2, 4.1.4.5); the caller has checked that the driver wants to know.
    fn used(&self, index: u16);
    /// The device's configuration changed.
    fn config_changed(&self);
    /// The driver broke the rules: sets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.1). Devices call this instead of panicking,
    /// then leave their queues alone until they are stopped.
    fn needs_reset(&self, why: &str);
}

/// A queue that the driver enabled, with its registers frozen at DRIVER_OK.
pub struct ActiveQueue {
    /// Its number among the device's queues.
    pub index: u16,
    /// The rings.
    pub queue: Queue,
    /// Signalled (by KVM's ioeventfd) when the driver made buffers available.
    pub kick: EventFd,
}

/// Everything a device needs to run, handed over when the driver sets DRIVER_OK.
pub struct Start {
    /// The guest's memory.
    pub memory: Arc<Memory>,
    /// The features both sides agreed on.
    pub features: u64,
    /// The enabled queues, in order of their index.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the guest.
    pub notify: Arc<dyn Notify>,
}

/// A virtio device behind a transport.
///
/// The transport calls `start` once at DRIVER_OK and `stop` on reset or when the machine ends; after `stop` returns, no
/// thread of the device touches guest memory any more, every taken request is completed or dropped whole, and `start` may come again.
/// Nothing a guest writes may make a method panic or allocate without bound.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.2, section 5): 1 net, 2 block, 4 entropy.
    fn device_type(&self) -> u32;
    /// The feature bits offered, without the transport's VIRTIO_F_VERSION_1 (added by the transport).
    fn features(&self) -> u64;
    /// The largest size of each queue, a power of two; its length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads the device's configuration; bytes past its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's configuration; what is not writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    /// Takes note of what has changed behind it; whether that shows in its configuration.
    fn refresh(&mut self) -> bool {
        false
    }
    /// Begins to serve the queues.
    fn start(&mut self, start: Start) -> io::Result<()>;
    /// Stops serving and gives up guest memory.
    fn stop(&mut self);
    /// Holds every request taken until `resume` (the machine is paused); the default suits devices that only answer a kick.
    fn pause(&mut self) {}
    /// Undoes `pause`.
    fn resume(&mut self) {}
}

/// Answers that a driver is told of at once, at most: an interrupt each makes a guest with many requests under way handle
/// them one by one. It is told of the last in the queue at once, and when the first one it was not told of is so old.
const TOGETHER: u32 = 16;
const LONG: Duration = Duration::from_millis(1);

/// Answers of one visit to a queue, at most: who serves it has to look up now and then, whatever the driver does.
const VISIT: u32 = 4096;

/// Answers every available chain by `answer`, which returns the number of bytes it wrote, or `None` where it will answer
/// later by itself; and tells the driver where it wants to know. Returns how many it took when the queue is empty and the
/// driver will ring for the next one, or after many, with the bell rung for the rest. An answer that waits for something tells
/// the driver itself before: it may wait for those that came earlier. `long` is how old an answer may become before the driver
/// is told.
///
/// # Errors
/// What is wrong with a chain or with the rings themselves, or with `answer`.
fn drain(
    active: &mut ActiveQueue,
    memory: &Memory,
    notify: &dyn Notify,
    long: Duration,
    mut answer: impl FnMut(&mut ActiveQueue, chain::Chain) -> Result<Option<u32>, Broken>,
) -> Result<u32, Broken> {
    let (mut taken, mut untold, mut told) = (0, 0, Instant::now());
    loop {
        active.queue.disable_notification(memory)?;
        while taken < VISIT
            && let Some(chain) = chain::next(&mut active.queue, memory)?
        {
            taken += 1;
            if let Some(written) = answer(active, chain)? {
                active.queue.add_used(memory, chain.head, written)?;
                untold += 1;
            }
            if untold >= TOGETHER || untold > 0 && told.elapsed() >= long {
                (untold, told) = (0, Instant::now());
                active.tell(memory, notify)?;
            }
        }
        if untold > 0 {
            untold = 0;
            active.tell(memory, notify)?;
        }
        if taken >= VISIT {
            // It fails only when the counter is full, and then the bell rings already.
            let _ = active.kick.write(1);
            return Ok(taken);
        }
        if !active.queue.enable_notification(memory)? {
            return Ok(taken);
        }
    }
}

impl ActiveQueue {
    /// Tells the driver of what was answered, if it wants to know.
    fn tell(&mut self, memory: &Memory, notify: &dyn Notify) -> Result<(), virtio_queue::Error> {
        if self.queue.needs_notification(memory)? {
            notify.used(self.index);
        }
        Ok(())
    }
}

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A chain is wrong.
    #[error(transparent)]
    Chain(#[from] chain::ChainError),
    /// The rings are.
    #[error("a queue's rings are wrong: {0}")]
    Rings(#[from] virtio_queue::Error),
    /// The host does not do what the device needs.
    #[error("the host's io_uring failed: {0}")]
    Reads(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use super::testing::Driver;
    use super::*;

    /// A device that only keeps what it is started with.
    #[derive(Default)]
    struct Kept(Option<Start>);

    impl VirtioDevice for Kept {
        fn device_type(&self) -> u32 {
            4
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> Vec<u16> {
            vec![testing::SIZE]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn start(&mut self, start: Start) -> io::Result<()> {
            self.0 = Some(start);
            Ok(())
        }
        fn stop(&mut self) {}
    }

    #[test]
    fn a_driver_that_never_stops_does_not_hold_the_device() {
        let (mut driver, mut kept) = (Driver::new(1), Kept::default());
        driver.start(&mut kept);
        let mut start = kept.0.unwrap();
        let active = &mut start.queues[0];
        driver.offer_writable(0, 1);
        let answers = drain(active, &start.memory, &*start.notify, LONG, |_, _| {
            driver.offer_again(0, 1);
            let _ = driver.bell(0).read();
            Ok(Some(0))
        });
        assert_eq!(answers.unwrap(), VISIT);
        assert!(active.kick.read().is_ok(), "the bell rings for what is left");
    }
}
