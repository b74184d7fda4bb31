//! PCI slots that are filled and emptied while the machine runs, by the names of ACPI (6.5, 5.6.6): the guest's kernel is
//! told by an interrupt of the generic event device, asks here which slots are meant, and says here that it let one go.
//!
//! ```text
//!   plug   ── slot filled ── bit of FILLED ── interrupt ─► \_SB.PCIn.PCNT ── Notify (slot, 1) ─► the kernel looks at it
//!   unplug ── bit of LEAVING ─────────────── interrupt ─► \_SB.PCIn.PCNT ── Notify (slot, 3) ─► its driver leaves, _EJ0
//!             slot emptied ◄── EJECT ◄──────────────────────────────────────────────────────────┘
//! ```
//! Any stock kernel with ACPI hotplug of PCI knows these (Linux: acpiphp, built in).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::Registers;
use crate::plan::{PCI_BUSES, PCI_SLOTS};

/// First port of the registers, which are 32 bits each: a block for each bus, with one bit a slot, and [`BUSES`].
pub const PORT: u64 = 0x610;
/// Ports of a bus's block.
pub const BLOCK: u64 = 12;
/// Offset of the buses of whose slots there is something to tell, one bit each.
pub const BUSES: u64 = PCI_BUSES as u64 * BLOCK;
/// Ports in all.
pub const LEN: u64 = BUSES + 4;
/// Offset in a block of the slots that were filled since it was last read; reading clears it.
const FILLED: u64 = 0;
/// Offset in a block of the slots that the guest is asked to let go of since it was last read; reading clears it.
const LEAVING: u64 = 4;
/// Offset in a block of the slots that the guest lets go of, written.
const EJECT: u64 = 8;

/// What is to be told to the guest of one run.
pub struct Hotplug {
    filled: [AtomicU32; PCI_BUSES],
    leaving: [AtomicU32; PCI_BUSES],
    line: EventFd,
}

impl Hotplug {
    /// Nothing to tell.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new() -> io::Result<Hotplug> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (filled, leaving) = Default::default();
        Ok(Hotplug { filled, leaving, line })
    }

    /// What raises its interrupt.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Tells of a slot that was filled.
    pub fn fill(&self, slot: usize) {
        self.tell(&self.filled, slot);
    }

    /// Asks for a slot to be let go of.
    pub fn ask(&self, slot: usize) {
        self.tell(&self.leaving, slot);
    }

    /// Tells nothing more of a slot that was emptied.
    pub fn forget(&self, slot: usize) {
        for buses in [&self.filled, &self.leaving] {
            if let Some(bits) = buses.get(slot / PCI_SLOTS) {
                bits.fetch_and(!(1 << (slot % PCI_SLOTS)), Ordering::AcqRel);
            }
        }
    }

    fn tell(&self, buses: &[AtomicU32; PCI_BUSES], slot: usize) {
        if let Some(bits) = buses.get(slot / PCI_SLOTS) {
            bits.fetch_or(1 << (slot % PCI_SLOTS), Ordering::AcqRel);
        }
        self.remind();
    }

    /// The buses of whose slots there is something to tell, a bit each.
    fn buses(&self) -> u32 {
        let words = self.filled.iter().zip(&self.leaving).enumerate();
        words.fold(0, |buses, (bus, (filled, leaving))| {
            let told = filled.load(Ordering::Acquire) | leaving.load(Ordering::Acquire) == 0;
            buses | u32::from(!told) << bus
        })
    }

    /// Raises the interrupt again where the guest has not looked yet: one that came before its kernel listened is lost.
    pub fn remind(&self) {
        if self.buses() != 0 {
            // It fails only when the counter is full, and then it is raised already.
            let _ = self.line.write(1);
        }
    }
}

/// The registers of one run.
pub struct Ports<F> {
    /// What is to be told.
    pub hotplug: Arc<Hotplug>,
    /// What is done with a slot that the guest let go of.
    pub eject: F,
}

impl<F: FnMut(usize) + Send> Registers for Ports<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let take = |buses: &[AtomicU32; PCI_BUSES]| {
            let bits = usize::try_from(offset / BLOCK).ok().and_then(|bus| buses.get(bus));
            bits.map_or(0, |bits| bits.swap(0, Ordering::AcqRel))
        };
        let bits = match (offset, offset % BLOCK, data.len()) {
            (BUSES, _, 4) => self.hotplug.buses(),
            (_, FILLED, 4) => take(&self.hotplug.filled),
            (_, LEAVING, 4) => take(&self.hotplug.leaving),
            _ => 0,
        };
        data.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (EJECT, Ok(bytes)) = (offset % BLOCK, <[u8; 4]>::try_from(data)) else { return };
        let Ok(bus) = usize::try_from(offset / BLOCK) else { return };
        let bits = u32::from_le_bytes(bytes);
        let slots = (0..PCI_SLOTS).filter(|slot| bits & 1 << slot != 0);
        slots.map(|slot| bus * PCI_SLOTS + slot).for_each(&mut self.eject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_is_told_once_and_reminded_of_until_then() {
        let hotplug = Arc::new(Hotplug::new().unwrap());
        let mut gone = Vec::new();
        let mut ports = Ports { hotplug: hotplug.clone(), eject: |slot| gone.push(slot) };
        let mut word = |offset: u64| {
            let mut data = [0xff; 4];
            ports.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        hotplug.remind();
        assert!(hotplug.line.read().is_err(), "there is nothing to tell");
        hotplug.fill(3);
        hotplug.fill(31);
        hotplug.ask(5);
        hotplug.ask(999);
        assert!(hotplug.line.read().is_ok());
        hotplug.remind();
        assert!(hotplug.line.read().is_ok(), "nobody has looked");
        assert_eq!((word(FILLED), word(FILLED)), (1 << 31 | 1 << 3, 0));
        hotplug.remind();
        assert!(hotplug.line.read().is_ok());
        assert_eq!((word(LEAVING), word(LEAVING), word(EJECT)), (1 << 5, 0, 0));
        hotplug.remind();
        assert!(hotplug.line.read().is_err());

        // Slots of another bus are in its block.
        hotplug.fill(2 * 32 + 7);
        hotplug.ask(4 * 32);
        assert_eq!((word(BUSES), word(BUSES), word(FILLED)), (1 << 2 | 1 << 4, 1 << 2 | 1 << 4, 0));
        assert_eq!((word(2 * BLOCK + FILLED), word(4 * BLOCK + LEAVING), word(BUSES)), (1 << 7, 1, 0));
        assert_eq!((word(BUSES + 4), word(u64::MAX / BLOCK * BLOCK)), (0, 0));

        // What was emptied is not told of any more: the next one there is another.
        hotplug.ask(9);
        hotplug.fill(9);
        hotplug.forget(9);
        assert_eq!((word(BUSES), word(LEAVING), word(FILLED)), (0, 0, 0));

        ports.write(EJECT, &(1u32 << 5 | 1).to_le_bytes());
        ports.write(3 * BLOCK + EJECT, &(1u32 << 31).to_le_bytes());
        ports.write(EJECT, &[0xff; 2]);
        ports.write(FILLED, &[0xff; 4]);
        ports.read(99, &mut [0; 1]);
        assert_eq!(gone, [0, 5, 127]);
    }
}
