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
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
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
/// them one by one. It is told of the last in the queue, and of one that took long, at once.
const TOGETHER: u32 = 16;
const LONG: Duration = Duration::from_millis(1);

/// Answers every available chain by `answer`, which returns the number of bytes it wrote, and tells the driver where it
/// wants to know. Returns when the queue is empty and the driver will ring for the next one. An answer that waits for
/// something tells the driver itself before: it may wait for those that came earlier.
///
/// # Errors
/// What is wrong with a chain or with the rings themselves.
fn drain(
    active: &mut ActiveQueue,
    memory: &Memory,
    notify: &dyn Notify,
    mut answer: impl FnMut(DescriptorChain<&Memory>) -> Result<u32, chain::ChainError>,
) -> Result<(), Broken> {
    let queue = &mut active.queue;
    loop {
        queue.disable_notification(memory)?;
        let mut untold = 0;
        while let Some(chain) = queue.iter(memory)?.next() {
            let head = chain.head_index();
            let begun = Instant::now();
            let written = answer(chain)?;
            queue.add_used(memory, head, written)?;
            untold += 1;
            if untold >= TOGETHER || begun.elapsed() >= LONG {
                untold = 0;
                if queue.needs_notification(memory)? {
                    notify.used(active.index);
                }
            }
        }
        if untold > 0 && queue.needs_notification(memory)? {
            notify.used(active.index);
        }
        if !queue.enable_notification(memory)? {
            return Ok(());
        }
    }
}

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Chain(#[from] chain::ChainError),
    #[error("a queue's rings are wrong: {0}")]
    Rings(#[from] virtio_queue::Error),
}
