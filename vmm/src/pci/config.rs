//! A function's config space: a type 0 header and a list of capabilities (PCI 3.0, chapter 6).

use crate::plan::Region;

/// Bytes of a conventional function's config space.
pub const SIZE: usize = 256;
/// The command register and its bit that lets BARs decode (6.2.2).
const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_INTX: u16 = 1 << 10;
/// The status register's bit for an interrupt that pends, whether or not the line may be asserted.
const STATUS_INTERRUPT: u8 = 1 << 3;
/// The status register's bit for a capability list (6.2.3).
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// Who a function is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Vendor and device.
    pub vendor: (u16, u16),
    /// Subsystem vendor and device.
    pub subsystem: (u16, u16),
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
}

/// The registers, and which of their bits the guest may change.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bar_size: u32,
    next: usize,
    last_link: usize,
}

impl ConfigSpace {
    /// A header without BAR and capabilities.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bar_size: 0,
            next: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
        };
        let [class, subclass, interface] = identity.class;
        space.put(0, &identity.vendor.0.to_le_bytes());
        space.put(2, &identity.vendor.1.to_le_bytes());
        space.put(8, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem.0.to_le_bytes());
        space.put(0x2e, &identity.subsystem.1.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_INTX;
        space.allow(COMMAND, &command.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// The host bridge that cloud-hypervisor and Firecracker present, so that kernels know it.
    pub fn host_bridge() -> ConfigSpace {
        let vendor = (0x8086, 0x0d57);
        ConfigSpace::new(Identity { vendor, subsystem: (0, 0), class: [6, 0, 0], revision: 0 })
    }

    /// Gives the function BAR 0: 32-bit memory, `size` bytes (a power of two, 16 at least), at `address` to begin with.
    pub fn set_bar(&mut self, address: u32, size: u32) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        self.bar_size = size;
        self.put(BAR0, &address.to_le_bytes());
        self.allow(BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Gives the function the interrupt pin A.
    pub fn set_pin(&mut self) {
        self.put(INTERRUPT_PIN, &[1]);
    }

    /// Whether the guest wants no interrupt of the pin.
    pub fn pin_is_off(&self) -> bool {
        self.word(COMMAND) & COMMAND_NO_INTX != 0
    }

    /// Tells whether an interrupt of the pin pends.
    pub fn set_pending(&mut self, pending: bool) {
        let status = self.word(STATUS).to_le_bytes()[0] & !STATUS_INTERRUPT;
        self.put(STATUS, &[status | if pending { STATUS_INTERRUPT } else { 0 }]);
    }

    /// Appends a capability and returns its offset. `body` begins after the id and the link; `writable` says which of
    /// its bits the guest may change.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        debug_assert!(at + 2 + body.len() <= SIZE);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.last_link, &[at as u8]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads; past the end, ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0xff);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, mask), new) in registers.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Sets registers whether or not the guest may write them.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes.iter_mut().skip(offset).zip(data).for_each(|(to, from)| *to = *from);
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable.iter_mut().skip(offset).zip(mask).for_each(|(to, from)| *to = *from);
    }

    /// The 16-bit register at `offset`.
    pub fn word(&self, offset: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// The 32-bit register at `offset`.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// What BAR 0 decodes, when the guest lets it.
    pub fn bar(&self) -> Option<Region> {
        let on = self.word(COMMAND) & COMMAND_MEMORY != 0 && self.bar_size != 0;
        on.then(|| Region { start: u64::from(self.dword(BAR0)), len: u64::from(self.bar_size) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: (0x1af4, 0x1042),
            subsystem: (0x1af4, 0x1042),
            class: [1, 0x80, 0],
            revision: 1,
        });
        space.set_bar(0xc000_4000, 0x4000);
        space
    }

    #[test]
    fn a_bar_is_sized_and_moved_as_the_specification_says() {
        let mut space = space();
        assert_eq!(space.bar(), None, "nothing decodes before the guest says so");
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.dword(BAR0), 0xffff_c000, "the size, as a mask");
        space.write(BAR0, &0xc123_4567_u32.to_le_bytes());
        space.write(COMMAND, &2u16.to_le_bytes());
        assert_eq!(space.bar(), Some(Region { start: 0xc123_4000, len: 0x4000 }));
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.dword(BAR0 + 4), 0, "a BAR that is not there reads as 0");
    }

    #[test]
    fn capabilities_are_linked_and_only_their_writable_bits_change() {
        let mut space = space();
        let first = space.add_capability(0x11, &[1, 2, 3, 4], &[0, 0xc0]);
        let second = space.add_capability(0x09, &[9], &[]);
        let mut link = [0; 2];
        space.read(CAPABILITIES, &mut link[..1]);
        assert_eq!(usize::from(link[0]), first);
        space.read(first, &mut link);
        assert_eq!((link[0], usize::from(link[1])), (0x11, second));
        space.read(second, &mut link);
        assert_eq!(link, [0x09, 0]);
        space.write(first + 2, &[0xff; 4]);
        assert_eq!(space.dword(first + 2), u32::from_le_bytes([1, 0xc2, 3, 4]));
        assert_eq!(space.word(STATUS) & 0x10, 0x10);
    }
}
