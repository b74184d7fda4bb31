//! PCI (PCI Local Bus 3.0, PCIe 5.0): root buses, configured through ECAM, every device with one memory BAR and MSI-X, or a
//! line where a guest has no vectors for so many.
//!
//! ```text
//!   guest ─┬─ ECAM ───────► config space of a slot ─► the device's header, BAR, MSI-X control
//!          └─ a bus's window ─► the slot on it whose BAR decodes the address
//! ```

pub mod config;
pub mod intx;
pub mod msix;

use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::Registers;
use crate::plan::{ALL_SLOTS, PCI_BUSES, PCI_SLOTS, Region, bus_window};

/// What PCI devices need of the hypervisor.
pub trait Vm: Send + Sync {
    /// Delivers a message-signalled interrupt: `data` written to `address`.
    fn signal_msi(&self, address: u64, data: u32);
    /// From now on a guest's write at `address` only signals `doorbell`, without an exit to user space.
    fn attach_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
    /// Undoes [`Vm::attach_doorbell`].
    fn detach_doorbell(&self, doorbell: &EventFd, address: u64);
    /// Sets the level of the interrupt line `gsi`.
    fn set_line(&self, gsi: u32, high: bool);
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

/// All buses, shared by all that hold them: slot 0 is the host bridge, devices come and go in the others. Slots are
/// numbered over all buses.
#[derive(Clone)]
pub struct PciBuses(Arc<RwLock<[Option<Slot>; ALL_SLOTS]>>);

impl Default for PciBuses {
    fn default() -> PciBuses {
        PciBuses::new()
    }
}

impl PciBuses {
    /// Buses with their host bridge: one, on the first of them.
    pub fn new() -> PciBuses {
        let mut slots = [const { None }; ALL_SLOTS];
        slots[0] = Some(Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge()))) as Slot);
        PciBuses(Arc::new(RwLock::new(slots)))
    }

    /// A free slot of the first bus that has one, for which `other` does not hold while there are others: the first behind
    /// the slot of that bus that `last` tells, or before it.
    pub fn free(
        &self,
        last: impl Fn(usize) -> Option<usize>,
        other: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let slots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let in_turn = (0..PCI_BUSES).flat_map(|bus| {
            let from = last(bus).map_or(0, |slot| slot % PCI_SLOTS + 1);
            (from..PCI_SLOTS).chain(0..from).map(move |slot| bus * PCI_SLOTS + slot)
        });
        let mut free: Vec<_> = in_turn.filter(|slot| slots.get(*slot).is_some_and(Option::is_none)).collect();
        free.sort_by_key(|slot| other(*slot));
        free.first().copied()
    }

    /// Whether there is a device on another bus than the first.
    pub fn spread(&self) -> bool {
        let slots = self.0.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().skip(PCI_SLOTS).any(Option::is_some)
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

    /// The config space of all buses, as memory-mapped registers.
    pub fn ecam(&self) -> Ecam {
        Ecam(self.clone())
    }

    /// The window that the BARs of a bus lie in, as memory-mapped registers.
    pub fn window(&self, bus: usize) -> Window {
        Window { buses: self.clone(), bus, start: bus_window(bus).start }
    }
}

/// ECAM (PCIe 5.0, 7.2.2): 4 KiB for each of 32 devices × 8 functions of each bus.
pub struct Ecam(PciBuses);

impl Ecam {
    /// The slot and register; conventional functions have 256 bytes, and only function 0 is there.
    fn find(offset: u64, len: usize) -> Option<(usize, usize)> {
        let (slot, function, register) = (offset >> 15, offset >> 12 & 7, (offset & 0xfff) as usize);
        (function == 0 && register + len <= config::SIZE).then_some((usize::try_from(slot).ok()?, register))
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

/// The memory window of a bus: hands an access to the device on it that decodes it.
pub struct Window {
    buses: PciBuses,
    bus: usize,
    start: u64,
}

impl Window {
    fn with(&self, offset: u64, len: usize, act: impl FnOnce(&mut dyn PciDevice, u64)) -> bool {
        let Some(first) = self.start.checked_add(offset) else { return false };
        let Some(end) = first.checked_add(len as u64) else { return false };
        let slots = self.buses.0.read().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.iter().skip(self.bus * PCI_SLOTS).take(PCI_SLOTS).flatten() {
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

/// The bridge between the processors and the first bus, others need none to be found: a header and nothing else.
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
    use crate::plan::{BUS_ECAM, ECAM};

    #[test]
    fn only_filled_slots_answer() {
        let mut ecam = PciBuses::new().ecam();
        let mut word = [0; 4];
        ecam.read(0, &mut word);
        assert_eq!(word, [0x86, 0x80, 0x57, 0x0d]);
        for absent in [1 << 15, 1 << 12, 0x100, 0xfe, BUS_ECAM, ECAM.len - 4, ECAM.len, u64::MAX] {
            ecam.read(absent, &mut word);
            assert_eq!(word, [0xff; 4], "{absent:#x}");
        }
        ecam.write(0, &[0; 4]);
        ecam.read(0, &mut word);
        assert_eq!(word, [0x86, 0x80, 0x57, 0x0d], "ids cannot be written");
    }

    fn bridge() -> Slot {
        Arc::new(Mutex::new(HostBridge(config::ConfigSpace::host_bridge())))
    }

    #[test]
    fn devices_come_and_go_in_the_slots_of_all_buses() {
        let buses = PciBuses::new();
        let mut ecam = buses.ecam();
        let mut id = |slot: u64| {
            let mut word = [0; 4];
            ecam.read(slot << 15, &mut word);
            word
        };
        let next = || buses.free(|_| None, |_| false);
        let mut count = 0;
        while let Some(slot) = next() {
            assert_eq!((slot, buses.spread()), (count + 1, slot > PCI_SLOTS), "one bus after the other");
            assert!(buses.put(slot, bridge()).is_ok());
            assert!(buses.put(slot, bridge()).is_err(), "it is taken");
            count += 1;
        }
        assert_eq!(count, ALL_SLOTS - 1);
        assert!(buses.put(ALL_SLOTS, bridge()).is_err());
        for slot in [7, 9, 33] {
            assert_eq!(id(slot as u64), [0x86, 0x80, 0x57, 0x0d]);
            assert!(buses.take(slot).is_some() && buses.take(slot).is_none());
            assert_eq!(id(slot as u64), [0xff; 4]);
        }
        assert_eq!(next(), Some(7));
        assert_eq!(buses.free(|bus| (bus == 0).then_some(7), |_| false), Some(9), "in turn");
        assert_eq!(buses.free(|bus| (bus == 0).then_some(31), |slot| slot == 7), Some(9));
        assert_eq!(buses.free(|_| None, |slot| slot < 32), Some(33));
        assert_eq!(buses.free(|_| None, |_| true), Some(7), "rather that one than none");
        assert!(buses.take(0).is_none() && buses.take(999).is_none(), "the bridge stays");
    }

    /// A function whose BAR 0 decodes 16 bytes at an address, and reads as a byte of it.
    struct At(u64);

    impl PciDevice for At {
        fn config_read(&mut self, _: usize, _: &mut [u8]) {}
        fn config_write(&mut self, _: usize, _: &[u8]) {}
        fn bar(&self) -> Option<Region> {
            Some(Region { start: self.0, len: 16 })
        }
        fn bar_read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn bar_write(&mut self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn a_window_leads_to_the_devices_of_its_bus() {
        let buses = PciBuses::new();
        let [first, third] = [0, 2].map(|bus| bus_window(bus).start);
        // One of the first bus decodes in the window of the third: what is asked of that does not meet it.
        for (slot, at) in [(1, first), (2, third + 32), (2 * PCI_SLOTS, third)] {
            assert!(buses.put(slot, Arc::new(Mutex::new(At(at)))).is_ok());
        }
        let read = |bus, offset| {
            let mut byte = [0xaa];
            buses.window(bus).read(offset, &mut byte);
            byte[0]
        };
        assert_eq!([read(0, 5), read(2, 6), read(1, 5), read(2, 34), read(4, 0)], [5, 6, 0xff, 0xff, 0xff]);
    }
}
