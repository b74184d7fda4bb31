//! PCI (PCI Local Bus 3.0, PCIe 5.0): one bus, configured through ECAM, every device with one memory BAR and MSI-X.
//!
//! ```text
//!   guest ─┬─ ECAM ────► config space of a slot ─► the device's header, BAR, MSI-X control
//!          └─ window ──► the slot whose BAR decodes the address
//! ```

pub mod config;
pub mod msix;

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

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

/// The bus, shared by all that hold it: slot 0 is the host bridge, devices come and go in the others.
#[derive(Clone)]
pub struct PciBus(Arc<RwLock<[Option<Slot>; PCI_SLOTS]>>);

impl Default for PciBus {
    fn default() -> PciBus {
        PciBus::new()
    }
}

impl PciBus {
    /// A bus with its host bridge.
    pub fn new() -> PciBus {
        let mut slots: [Option<Slot>; PCI_SLOTS] = Default::default();
        slots[0] = Some(Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge()))));
        PciBus(Arc::new(RwLock::new(slots)))
    }

    /// The first free slot from `from` on, or before it.
    pub fn free(&self, from: usize) -> Option<usize> {
        let slots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let free = |slot: &usize| slots.get(*slot).is_some_and(Option::is_none);
        (from..PCI_SLOTS).chain(0..from).find(free)
    }

    /// Puts a device into a slot that is free; else it is handed back.
    pub fn put(&self, slot: usize, device: Slot) -> Result<(), Slot> {
        let mut slots = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match slots.get_mut(slot) {
            Some(place @ None) => *place = Some(device),
            _ => return Err(device),
        }
        Ok(())
    }

    /// Takes a device out of its slot. When this returns, no access of the guest reaches it any more.
    pub fn take(&self, slot: usize) -> Option<Slot> {
        let mut slots = self.0.write().unwrap_or_else(PoisonError::into_inner);
        // The bridge stays.
        slots.get_mut(slot).filter(|_| slot > 0)?.take()
    }

    /// Does `act` with the device in a slot, if there is one.
    fn with<R>(&self, slot: usize, act: impl FnOnce(&mut dyn PciDevice) -> R) -> Option<R> {
        let slots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut device = slots.get(slot)?.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        Some(act(&mut *device))
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
    fn find(offset: u64, len: usize) -> Option<(usize, usize)> {
        let (slot, function, register) = (offset >> 15 & 0x1f, offset >> 12 & 7, (offset & 0xfff) as usize);
        (function == 0 && register + len <= config::SIZE).then_some((slot as usize, register))
    }
}

impl Registers for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let found = Ecam::find(offset, data.len());
        let read =
            found.and_then(|(slot, register)| self.0.with(slot, |device| device.config_read(register, data)));
        if read.is_none() {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = Ecam::find(offset, data.len()) {
            self.0.with(slot, |device| device.config_write(register, data));
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
        let slots = self.bus.0.read().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.iter().flatten() {
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
    fn devices_come_and_go_in_31_slots() {
        let (bus, bridge) =
            (PciBus::new(), || Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge()))));
        let mut ecam = bus.ecam();
        while let Some(slot) = bus.free(3) {
            assert!(bus.put(slot, bridge()).is_ok());
            assert!(bus.put(slot, bridge()).is_err(), "it is taken");
        }
        assert!(bus.put(PCI_SLOTS, bridge()).is_err());
        let mut word = [0; 4];
        ecam.read(7 << 15, &mut word);
        assert_eq!(word, [0x86, 0x80, 0x57, 0x0d]);
        assert!(bus.take(7).is_some() && bus.take(7).is_none());
        ecam.read(7 << 15, &mut word);
        assert_eq!((word, bus.free(0), bus.free(8), bus.free(99)), ([0xff; 4], Some(7), Some(7), Some(7)));
        assert!(bus.take(0).is_none() && bus.take(99).is_none(), "the bridge stays");
    }
}
