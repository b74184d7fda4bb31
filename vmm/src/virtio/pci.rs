//! virtio over PCI, modern only (virtio 1.2, 4.1): negotiation, queue registers, interrupts. Devices see none of it.
//!
//! ```text
//!   BAR 0   0x0000 common configuration   0x1000 doorbells, 4 bytes a queue   0x3000 MSI-X pending bits
//!           0x0400 ISR status             0x2000 MSI-X table
//!           0x0800 the device's configuration
//! ```
//! Where the device has a pin, there is no MSI-X: the ISR status asserts it, until it is read.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Memory, Notify, Start, VirtioDevice};
use crate::complaint::complain;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::intx::Pin;
use crate::pci::msix::{self, Msix, NO_VECTOR};
use crate::pci::{PciDevice, Vm};
use crate::plan::Region;

/// The size of BAR 0.
pub const BAR_SIZE: u32 = 0x4000;
const COMMON: u64 = 0x0000;
const COMMON_LEN: usize = 0x40;
const ISR: u64 = 0x0400;
const DEVICE: u64 = 0x0800;
const DEVICE_LEN: u64 = 0x0800;
const DOORBELLS: u64 = 0x1000;
const DOORBELL_STEP: u64 = 4;
const DOORBELLS_LEN: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;

/// Device status (2.1).
const ACKNOWLEDGE_TO_FEATURES_OK: u8 = 0x0b;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
/// Feature bits of every device here (6).
pub const VERSION_1: u64 = 1 << 32;
/// Buffers may be described by a table of their own.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Both sides say from which buffer on they want to be notified.
pub const EVENT_IDX: u64 = 1 << 29;

/// Vendor-specific capability (PCI 3.0, appendix H) and its kinds (4.1.4).
const VENDOR_CAPABILITY: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// What devices may reach of the transport from their threads.
struct Interrupts {
    id: String,
    /// Without vectors where there is a pin.
    msix: Mutex<Msix>,
    pin: Option<Pin>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    /// Changes with the device's configuration (4.1.4.3.1), so that a driver knows that it has read halves of two.
    generation: AtomicU8,
    broken: AtomicBool,
}

impl Interrupts {
    fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a bit of the ISR status and raises a vector, or the line.
    fn raise(&self, bit: u8, vector: u16) {
        let told = || {
            self.isr.fetch_or(bit, Ordering::AcqRel);
            true
        };
        match &self.pin {
            Some(pin) => pin.pend(told),
            None => {
                told();
                self.msix().trigger(vector);
            }
        }
    }

    /// The ISR status, which is clear then.
    fn take_status(&self) -> u8 {
        let mut status = 0;
        let mut take = || {
            status = self.isr.swap(0, Ordering::AcqRel);
            false
        };
        match &self.pin {
            Some(pin) => pin.pend(take),
            None => drop(take()),
        }
        status
    }
}

impl Notify for Interrupts {
    fn used(&self, index: u16) {
        if let Some(vector) = self.queue_vectors.get(usize::from(index)) {
            self.raise(1, vector.load(Ordering::Acquire));
        }
    }

    fn config_changed(&self) {
        self.raise(2, self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self, why: &str) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            complain(format_args!(
                "{}: the guest's driver broke the rules: {why}; the device needs a reset",
                self.id
            ));
            self.config_changed();
        }
    }
}

/// A queue's registers until DRIVER_OK.
struct QueueRegisters {
    max: u16,
    size: u16,
    enabled: bool,
    /// Descriptor table, driver (available) ring, device (used) ring.
    addresses: [u64; 3],
    doorbell: EventFd,
}

impl QueueRegisters {
    fn reset(&mut self) {
        (self.size, self.enabled, self.addresses) = (self.max, false, [0; 3]);
        // It fails only when nobody rang.
        let _ = self.doorbell.read();
    }

    fn build(&self, event_idx: bool, memory: &Memory) -> Option<Queue> {
        let mut queue = Queue::new(self.max).ok()?;
        let [descriptors, driver, device] = self.addresses.map(vm_memory::GuestAddress);
        queue.try_set_size(self.size).ok()?;
        queue.try_set_desc_table_address(descriptors).ok()?;
        queue.try_set_avail_ring_address(driver).ok()?;
        queue.try_set_used_ring_address(device).ok()?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue.is_valid(memory).then_some(queue)
    }
}

/// A device on the PCI bus.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix_at: Option<usize>,
    window_at: usize,
    interrupts: Arc<Interrupts>,
    vm: Arc<dyn Vm>,
    memory: Arc<Memory>,
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    status: u8,
    running: bool,
    queues: Vec<QueueRegisters>,
    /// Where the doorbells are attached, while they are.
    attached: Option<u64>,
}

impl VirtioPci {
    /// Puts `device` behind a transport whose BAR begins at `bar`, and that interrupts by `pin`, or else by messages. `id`
    /// names it in messages.
    pub fn new(
        id: String,
        device: Box<dyn VirtioDevice>,
        bar: u32,
        pin: Option<Pin>,
        memory: Arc<Memory>,
        vm: Arc<dyn Vm>,
    ) -> io::Result<VirtioPci> {
        let doorbell = |max| {
            let doorbell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            Ok(QueueRegisters { max, size: max, enabled: false, addresses: [0; 3], doorbell })
        };
        let queues = device.queue_sizes().into_iter().map(doorbell).collect::<io::Result<Vec<_>>>()?;
        // One for each queue, and one for changes of the configuration.
        let vectors = if pin.is_some() { 0 } else { queues.len() as u16 + 1 };
        let kind = device.device_type();
        let class = match kind {
            1 => [0x02, 0x00, 0],
            2 => [0x01, 0x80, 0],
            _ => [0x00, 0xff, 0],
        };
        let number = 0x1040 + kind as u16;
        let mut config = ConfigSpace::new(Identity {
            vendor: (0x1af4, number),
            subsystem: (0x1af4, number),
            class,
            revision: 1,
        });
        config.set_bar(bar, BAR_SIZE);
        let msix_at = match &pin {
            Some(_) => {
                config.set_pin();
                None
            }
            None => {
                let (body, writable) = Msix::capability(vectors, TABLE as u32, PENDING as u32);
                Some(config.add_capability(msix::CAPABILITY, &body, &writable))
            }
        };
        let region = |kind, at: u64, len: u64| {
            let [a, b, c, d] = (at as u32).to_le_bytes();
            let [e, f, g, h] = (len as u32).to_le_bytes();
            [16, kind, 0, 0, 0, 0, a, b, c, d, e, f, g, h]
        };
        config.add_capability(VENDOR_CAPABILITY, &region(CFG_COMMON, COMMON, COMMON_LEN as u64), &[]);
        config.add_capability(VENDOR_CAPABILITY, &region(CFG_ISR, ISR, 1), &[]);
        config.add_capability(VENDOR_CAPABILITY, &region(CFG_DEVICE, DEVICE, DEVICE_LEN), &[]);
        let mut notify = region(CFG_NOTIFY, DOORBELLS, DOORBELLS_LEN).to_vec();
        notify[0] = 20;
        notify.extend((DOORBELL_STEP as u32).to_le_bytes());
        config.add_capability(VENDOR_CAPABILITY, &notify, &[]);
        // A window on the BAR for those who cannot map it (4.1.4.9): bar, offset, length, then the data.
        let mut window = region(CFG_PCI, 0, 0).to_vec();
        window[0] = 20;
        window.extend([0; 4]);
        let mut mask = [0xff; 18];
        (mask[0], mask[1], mask[3], mask[4], mask[5]) = (0, 0, 0, 0, 0);
        let window_at = config.add_capability(VENDOR_CAPABILITY, &window, &mask);

        let interrupts = Interrupts {
            id,
            msix: Mutex::new(Msix::new(vectors, vm.clone())),
            pin,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: queues.iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
        };
        Ok(VirtioPci {
            offered: device.features() | VERSION_1,
            device,
            config,
            msix_at,
            window_at,
            interrupts: Arc::new(interrupts),
            vm,
            memory,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            status: 0,
            running: false,
            queues,
            attached: None,
        })
    }

    /// Stops the device for good: no thread of it touches guest memory afterwards.
    pub fn stop(&mut self) {
        if self.running {
            self.device.stop();
            self.running = false;
        }
        self.detach();
    }

    /// Has the device take note of what has changed behind it, and tells the driver.
    pub fn refresh(&mut self) {
        if self.device.refresh() {
            self.interrupts.generation.fetch_add(1, Ordering::AcqRel);
            if self.running {
                self.interrupts.config_changed();
            }
        }
    }

    /// The device behind the transport.
    pub fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut *self.device
    }

    /// The device's registers back as they were at power-on (2.4). The config space keeps its content.
    fn reset(&mut self) {
        self.stop();
        self.accepted = 0;
        (self.device_feature_select, self.driver_feature_select) = (0, 0);
        self.queue_select = 0;
        self.status = 0;
        self.queues.iter_mut().for_each(QueueRegisters::reset);
        self.interrupts.broken.store(false, Ordering::Release);
        self.interrupts.take_status();
        self.interrupts.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.interrupts.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        let new = status & !self.status & !NEEDS_RESET;
        self.status |= new;
        // The driver asks whether its features are good: the bit stays clear when they are not (3.1.1, step 5).
        if new & FEATURES_OK != 0 && (self.accepted & !self.offered != 0 || self.accepted & VERSION_1 == 0) {
            self.status &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && !self.running {
            self.start();
        }
    }

    fn start(&mut self) {
        if self.status & ACKNOWLEDGE_TO_FEATURES_OK != ACKNOWLEDGE_TO_FEATURES_OK {
            return self.interrupts.needs_reset("DRIVER_OK came before the features were agreed");
        }
        let event_idx = self.accepted & EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (index, registers) in self.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let built = registers.build(event_idx, &self.memory);
            let (Some(queue), Ok(kick)) = (built, registers.doorbell.try_clone()) else {
                return self.interrupts.needs_reset("a queue's size or addresses are wrong");
            };
            queues.push(ActiveQueue { index: index as u16, queue, kick });
        }
        let start = Start {
            memory: self.memory.clone(),
            features: self.accepted,
            queues,
            notify: self.interrupts.clone(),
        };
        self.running = true;
        self.attach();
        if let Err(e) = self.device.start(start) {
            self.stop();
            self.interrupts.needs_reset(&format!("the device could not start: {e}"));
        }
    }

    fn doorbells(&self, bar: u64) -> impl Iterator<Item = (&EventFd, u64)> {
        let enabled = self.queues.iter().enumerate().filter(|(_, q)| q.enabled);
        enabled.map(move |(i, q)| (&q.doorbell, bar + DOORBELLS + i as u64 * DOORBELL_STEP))
    }

    /// Lets the guest ring without an exit, where its BAR is now. Without that, [`PciDevice::bar_write`] rings.
    fn attach(&mut self) {
        let Some(bar) = self.config.bar() else { return };
        for (doorbell, address) in self.doorbells(bar.start) {
            if let Err(e) = self.vm.attach_doorbell(doorbell, address) {
                complain(format_args!(
                    "{}: doorbell at {address:#x}: {e}; it costs exits",
                    self.interrupts.id
                ));
            }
        }
        self.attached = Some(bar.start);
    }

    fn detach(&mut self) {
        if let Some(bar) = self.attached.take() {
            for (doorbell, address) in self.doorbells(bar) {
                self.vm.detach_doorbell(doorbell, address);
            }
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn common(&self) -> [u8; COMMON_LEN] {
        let mut image = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            image.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let broken = self.interrupts.broken.load(Ordering::Acquire);
        put(0, &self.device_feature_select.to_le_bytes());
        put(4, &half(self.offered, self.device_feature_select).to_le_bytes());
        put(8, &self.driver_feature_select.to_le_bytes());
        put(12, &half(self.accepted, self.driver_feature_select).to_le_bytes());
        put(16, &self.interrupts.config_vector.load(Ordering::Acquire).to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[self.status | if broken { NEEDS_RESET } else { 0 }]);
        put(21, &[self.interrupts.generation.load(Ordering::Acquire)]);
        put(22, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.selected() {
            put(24, &queue.size.to_le_bytes());
            let vector = self.interrupts.queue_vectors.get(usize::from(self.queue_select));
            put(26, &vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire)).to_le_bytes());
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &self.queue_select.to_le_bytes());
            for (at, address) in [32, 40, 48].into_iter().zip(queue.addresses) {
                put(at, &address.to_le_bytes());
            }
        }
        image
    }

    /// Fields are written whole, 64-bit ones also by halves (4.1.3.1).
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let value = match *data {
            [a] => u64::from(a),
            [a, b] => u64::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => return,
        };
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            // Features are agreed once (3.1.1).
            (12, 4) if self.status & FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.accepted = self.accepted & !0xffff_ffff | value,
                1 => self.accepted = self.accepted & 0xffff_ffff | value << 32,
                _ => {}
            },
            (16, 2) => {
                let vector = self.known_vector(value as u16);
                self.interrupts.config_vector.store(vector, Ordering::Release);
            }
            (20, 1) => self.set_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (26, 2) => {
                let vector = self.known_vector(value as u16);
                if let Some(slot) = self.interrupts.queue_vectors.get(usize::from(self.queue_select)) {
                    slot.store(vector, Ordering::Release);
                }
            }
            _ if self.status & DRIVER_OK == 0 => self.write_queue(offset, data.len(), value),
            _ => {}
        }
    }

    /// A vector that does not exist reads back as none, which tells the driver (4.1.5.1.2).
    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.interrupts.msix().vectors() { vector } else { NO_VECTOR }
    }

    /// The selected queue's registers, which freeze when it is enabled and at DRIVER_OK.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        if queue.enabled {
            return;
        }
        match (offset, len) {
            (24, 2) if value <= u64::from(queue.max) && value.is_power_of_two() => queue.size = value as u16,
            (28, 2) if value == 1 => queue.enabled = true,
            (32..56, 4 | 8) if offset.is_multiple_of(4) => {
                let Some(address) = queue.addresses.get_mut((offset as usize - 32) / 8) else { return };
                *address = match (offset % 8, len) {
                    (0, 8) => value,
                    (0, _) => *address & !0xffff_ffff | value,
                    (_, 4) => *address & 0xffff_ffff | value << 32,
                    _ => return,
                };
            }
            _ => {}
        }
    }

    /// The access that the PCI configuration window names: offset in the BAR and length.
    fn window(&self) -> Option<(u64, usize)> {
        let bar = self.config.word(self.window_at + 4) & 0xff;
        let offset = self.config.dword(self.window_at + 8);
        let len = self.config.dword(self.window_at + 12);
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset <= BAR_SIZE - len)
            .then_some((offset.into(), len as usize))
    }
}

impl PciDevice for VirtioPci {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        if offset == self.window_at + 16
            && let Some((at, len)) = self.window()
        {
            let mut bytes = [0; 4];
            if let Some(bytes) = bytes.get_mut(..len) {
                self.bar_read(at, bytes);
            }
            self.config.put(offset, &bytes);
        }
        if let Some(pin) = &self.interrupts.pin {
            self.config.set_pending(pin.pending());
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        let before = self.config.bar();
        self.config.write(offset, data);
        if self.config.bar() != before && self.running {
            self.detach();
            self.attach();
        }
        if let Some(at) = self.msix_at
            && offset < at + 4
            && at < offset + data.len()
        {
            let control = self.config.word(at + 2);
            self.interrupts.msix().set_control(control);
        }
        if let Some(pin) = &self.interrupts.pin {
            pin.switch(self.config.pin_is_off());
        }
        if offset == self.window_at + 16
            && let Some((at, len)) = self.window()
            && let Some(bytes) = data.get(..len)
        {
            self.bar_write(at, bytes);
        }
    }

    fn bar(&self) -> Option<Region> {
        self.config.bar()
    }

    fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => {
                let image = self.common();
                data.iter_mut().zip(image.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
            }
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupts.take_status();
                }
            }
            DEVICE..DOORBELLS => self.device.read_config(offset - DEVICE, data),
            TABLE..PENDING => self.interrupts.msix().read_table((offset - TABLE) as usize, data),
            PENDING.. => self.interrupts.msix().read_pending((offset - PENDING) as usize, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset, data),
            DEVICE..DOORBELLS => self.device.write_config(offset - DEVICE, data),
            DOORBELLS..TABLE if self.running => {
                let index = (offset - DOORBELLS) / DOORBELL_STEP;
                if let Some(queue) = self.queues.get(index as usize) {
                    // It fails only when the counter is full, and then the device has been told.
                    let _ = queue.doorbell.write(1);
                }
            }
            TABLE..PENDING => self.interrupts.msix().write_table((offset - TABLE) as usize, data),
            _ => {}
        }
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
