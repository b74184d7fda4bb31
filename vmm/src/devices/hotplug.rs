//! PCI slots that are filled and emptied while the machine runs, by the names of ACPI (6.5, 5.6.6): the guest's kernel is
//! told by an interrupt of the generic event device, asks here which slots are meant, and says here that it let one go.
//!
//! ```text
//!   plug   ── slot filled ── bit of FILLED ── interrupt ─► \_SB.PCI0.PCNT ── Notify (slot, 1) ─► the kernel looks at it
//!   unplug ── bit of LEAVING ─────────────── interrupt ─► \_SB.PCI0.PCNT ── Notify (slot, 3) ─► its driver leaves, _EJ0
//!             slot emptied ◄── EJECT ◄──────────────────────────────────────────────────────────┘
//! ```
//! Any stock kernel with ACPI hotplug of PCI knows these (Linux: acpiphp, built in).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::Registers;

/// First port of the registers, which are 32 bits each, one bit a slot.
pub const PORT: u64 = 0x610;
/// Ports in the block.
pub const LEN: u64 = 12;
/// Offset of the slots that were filled since it was last read; reading clears it.
const FILLED: u64 = 0;
/// Offset of the slots that the guest is asked to let go of since it was last read; reading clears it.
const LEAVING: u64 = 4;
/// Offset of the slots that the guest lets go of, written.
const EJECT: u64 = 8;

/// What is to be told to the guest of one run.
pub struct Hotplug {
    filled: AtomicU32,
    leaving: AtomicU32,
    line: EventFd,
}

impl Hotplug {
    /// Nothing to tell.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn new() -> io::Result<Hotplug> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Hotplug { filled: AtomicU32::new(0), leaving: AtomicU32::new(0), line })
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

    fn tell(&self, bits: &AtomicU32, slot: usize) {
        bits.fetch_or(bit(slot), Ordering::AcqRel);
        self.remind();
    }

    /// Raises the interrupt again where the guest has not looked yet: one that came before its kernel listened is lost.
    pub fn remind(&self) {
        if self.filled.load(Ordering::Acquire) | self.leaving.load(Ordering::Acquire) != 0 {
            // It fails only when the counter is full, and then it is raised already.
            let _ = self.line.write(1);
        }
    }
}

fn bit(slot: usize) -> u32 {
    u32::try_from(slot).ok().and_then(|slot| 1u32.checked_shl(slot)).unwrap_or(0)
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
        let bits = match (offset, data.len()) {
            (FILLED, 4) => self.hotplug.filled.swap(0, Ordering::AcqRel),
            (LEAVING, 4) => self.hotplug.leaving.swap(0, Ordering::AcqRel),
            _ => 0,
        };
        data.iter_mut().zip(bits.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (EJECT, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) else { return };
        let bits = u32::from_le_bytes(bytes);
        (0..32).filter(|slot| bits & bit(*slot) != 0).for_each(&mut self.eject);
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
        hotplug.ask(64);
        assert!(hotplug.line.read().is_ok());
        hotplug.remind();
        assert!(hotplug.line.read().is_ok(), "nobody has looked");
        assert_eq!((word(FILLED), word(FILLED)), (1 << 31 | 1 << 3, 0));
        hotplug.remind();
        assert!(hotplug.line.read().is_ok());
        assert_eq!((word(LEAVING), word(LEAVING), word(EJECT)), (1 << 5, 0, 0));
        hotplug.remind();
        assert!(hotplug.line.read().is_err());

        ports.write(EJECT, &(1u32 << 5 | 1).to_le_bytes());
        ports.write(EJECT, &[0xff; 2]);
        ports.write(FILLED, &[0xff; 4]);
        ports.read(99, &mut [0; 1]);
        assert_eq!(gone, [0, 5]);
    }
}
