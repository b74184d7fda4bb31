//! PCI (PCI Local Bus 3.0, PCIe 5.0): one bus, configured through ECAM, every device with one memory BAR and MSI-X.
//!
//! ```text
//!   guest ─┬─ ECAM ────► config space of a slot ─► the device's header, BAR, MSI-X control
//!          └─ window ──► the slot whose BAR decodes the address
//! ```

pub mod config;
pub mod msix;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::Registers;
use crate::plan::{PCI_SLOTS, Region};

/// What PCI devices need of the hypervisor.
pub trait Vm: Send + Sync {
    /// Delivers a message-signalled interrupt: `data` written to `address`.
    fn signal_msi(&self, address: u64, data: u32);
    /// From now on a guest's write at `address` only signals `doorbell`, without an exit to user space.
    fn attach_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
    /// Undoes [`Vm::attach_doorbell`].
    fn detach_doorbell(&self, doorbell: &EventFd, address: u64);
}

/// A function on the bus. Whatever a guest does, no method may panic.
pub trait PciDevice: Send {
    /// Reads the config space; `offset` and the length stay within 256 bytes.
    fn config_read(&mut self, offset: usize, data: &mut [u8]);
    /// Writes the config space; `offset` and the length stay within 256 bytes.
    fn config_write(&mut self, offset: usize, data: &[u8]);
    /// The addresses that BAR 0 decodes at present.
    fn bar(&self) -> Option<Region>;
    /// Reads BAR 0.
    fn bar_read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0.
    fn bar_write(&mut self, offset: u64, data: &[u8]);
}

/// A device in its slot.
pub type Slot = Arc<Mutex<dyn PciDevice>>;

/// The bus: slot 0 is the host bridge.
#[derive(Clone, Default)]
pub struct PciBus {
    slots: Vec<Slot>,
}

impl PciBus {
    /// A bus with its host bridge.
    pub fn new() -> PciBus {
        PciBus { slots: vec![Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge())))] }
    }

    /// The number of the next free slot; [`PCI_SLOTS`] when all are taken.
    pub fn next(&self) -> usize {
        self.slots.len()
    }

    /// Puts a device into the next slot; it is handed back when there is none.
    pub fn add(&mut self, device: Slot) -> Result<(), Slot> {
        if self.slots.len() >= PCI_SLOTS {
            return Err(device);
        }
        self.slots.push(device);
        Ok(())
    }

    /// The bus's config space, as memory-mapped registers.
    pub fn ecam(&self) -> Ecam {
        Ecam(self.clone())
    }

    /// The window that BARs lie in, as memory-mapped registers; `start` is its address.
    pub fn window(&self, start: u64) -> Window {
        Window { bus: self.clone(), start }
    }
}

/// ECAM of one bus (PCIe 5.0, 7.2.2): 4 KiB for each of 32 devices × 8 functions.
pub struct Ecam(PciBus);

impl Ecam {
    /// The slot and register; conventional functions have 256 bytes, and only function 0 is there.
    fn find(&self, offset: u64, len: usize) -> Option<(&Slot, usize)> {
        let (slot, function, register) = (offset >> 15 & 0x1f, offset >> 12 & 7, (offset & 0xfff) as usize);
        (function == 0 && register + len <= config::SIZE).then_some(())?;
        Some((self.0.slots.get(slot as usize)?, register))
    }
}

impl Registers for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match self.find(offset, data.len()) {
            Some((slot, register)) => {
                slot.lock().unwrap_or_else(PoisonError::into_inner).config_read(register, data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = self.find(offset, data.len()) {
            slot.lock().unwrap_or_else(PoisonError::into_inner).config_write(register, data);
        }
    }
}

/// The memory window of the bus: hands an access to the device that decodes it.
pub struct Window {
    bus: PciBus,
    start: u64,
}

impl Window {
    fn with(&self, offset: u64, len: usize, act: impl FnOnce(&mut dyn PciDevice, u64)) -> bool {
        let Some(first) = self.start.checked_add(offset) else { return false };
        let Some(end) = first.checked_add(len as u64) else { return false };
        for slot in &self.bus.slots {
            let mut device = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(bar) = device.bar()
                && bar.start <= first
                && end <= bar.end()
            {
                act(&mut *device, first - bar.start);
                return true;
            }
        }
        false
    }
}

impl Registers for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !self.with(offset, data.len(), |device, at| device.bar_read(at, data)) {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.with(offset, data.len(), |device, at| device.bar_write(at, data));
    }
}

/// The bridge between the processors and the bus: a header and nothing else.
struct HostBridge(config::ConfigSpace);

impl PciDevice for HostBridge {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        self.0.read(offset, data);
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.0.write(offset, data);
    }
    fn bar(&self) -> Option<Region> {
        None
    }
    fn bar_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&mut self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_filled_slots_answer() {
        let mut ecam = PciBus::new().ecam();
        let mut word = [0; 4];
        ecam.read(0, &mut word);
        assert_eq!(word, [0x86, 0x80, 0x57, 0x0d]);
        for absent in [1 << 15, 1 << 12, 0x100, 0xfe] {
            ecam.read(absent, &mut word);
            assert_eq!(word, [0xff; 4], "{absent:#x}");
        }
        ecam.write(0, &[0; 4]);
        ecam.read(0, &mut word);
        assert_eq!(word, [0x86, 0x80, 0x57, 0x0d], "ids cannot be written");
    }

    #[test]
    fn the_bus_ends_at_32_slots() {
        let mut bus = PciBus::new();
        let bridge = || Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge())));
        while bus.next() < PCI_SLOTS {
            assert!(bus.add(bridge()).is_ok());
        }
        assert!(bus.add(bridge()).is_err());
    }
}
