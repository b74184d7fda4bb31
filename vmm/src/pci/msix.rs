//! MSI-X (PCI 3.0, 6.8.2): a table of messages the guest wrote, and the bits of those that wait for it to unmask them.

use std::sync::Arc;

use super::Vm;

/// The capability's id.
pub const CAPABILITY: u8 = 0x11;
/// Bits of message control: all of them on, all of them masked.
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;
/// A table entry: address, data, vector control.
const ENTRY: usize = 16;
/// What a driver writes for "no vector" (virtio 1.2, 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

#[derive(Clone, Copy)]
struct Entry {
    bytes: [u8; ENTRY],
    pending: bool,
}

impl Entry {
    fn dword(&self, at: usize) -> u32 {
        self.bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
    }
    fn masked(&self) -> bool {
        self.dword(12) & 1 != 0
    }
}

/// One function's MSI-X.
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
    vm: Arc<dyn Vm>,
}

impl Msix {
    /// `vectors` messages (2048 at most), all masked as after a reset.
    pub fn new(vectors: u16, vm: Arc<dyn Vm>) -> Msix {
        let mut bytes = [0; ENTRY];
        bytes[12] = 1;
        Msix { entries: vec![Entry { bytes, pending: false }; vectors.into()], control: 0, vm }
    }

    /// The capability's body: table at `table`, pending bits at `pending`, both in BAR 0. Its writable mask comes second.
    pub fn capability(vectors: u16, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        let (size, rest) = body.split_at_mut(2);
        size.copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
        rest[..4].copy_from_slice(&table.to_le_bytes());
        rest[4..].copy_from_slice(&pending.to_le_bytes());
        (body, (ENABLE | MASK_ALL).to_le_bytes())
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Takes over message control after the guest wrote it.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (ENABLE | MASK_ALL);
        for vector in 0..self.entries.len() {
            self.deliver(vector);
        }
    }

    /// Raises `vector`; lost when MSI-X is off or there is no such vector, held while it is masked.
    pub fn trigger(&mut self, vector: u16) {
        if let Some(entry) = self.entries.get_mut(usize::from(vector)) {
            entry.pending = self.control & ENABLE != 0;
            self.deliver(vector.into());
        }
    }

    fn deliver(&mut self, vector: usize) {
        let open = self.control & (ENABLE | MASK_ALL) == ENABLE;
        if let Some(entry) = self.entries.get_mut(vector)
            && open
            && entry.pending
            && !entry.masked()
        {
            entry.pending = false;
            let address = u64::from(entry.dword(4)) << 32 | u64::from(entry.dword(0));
            self.vm.signal_msi(address, entry.dword(8));
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i;
            let entry = self.entries.get(at / ENTRY);
            *byte = entry.and_then(|e| e.bytes.get(at % ENTRY)).copied().unwrap_or(0);
        }
    }

    /// Writes the table; a message that waited is sent once it is unmasked.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            let at = offset + i;
            if let Some(byte) = self.entries.get_mut(at / ENTRY).and_then(|e| e.bytes.get_mut(at % ENTRY)) {
                *byte = *value;
            }
        }
        self.deliver(offset / ENTRY);
    }

    /// Reads the pending bits, one a vector.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let eight = self.entries.iter().skip((offset + i) * 8).take(8).enumerate();
            *byte = eight.fold(0, |bits, (n, entry)| bits | u8::from(entry.pending) << n);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io;
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    /// Remembers what was asked of it.
    #[derive(Default)]
    pub(crate) struct FakeVm {
        pub(crate) messages: Mutex<Vec<(u64, u32)>>,
        pub(crate) doorbells: Mutex<Vec<u64>>,
        pub(crate) lines: Mutex<Vec<(u32, bool)>>,
    }

    impl Vm for FakeVm {
        fn signal_msi(&self, address: u64, data: u32) {
            self.messages.lock().unwrap().push((address, data));
        }
        fn attach_doorbell(&self, _: &EventFd, address: u64) -> io::Result<()> {
            self.doorbells.lock().unwrap().push(address);
            Ok(())
        }
        fn detach_doorbell(&self, _: &EventFd, address: u64) {
            self.doorbells.lock().unwrap().retain(|a| *a != address);
        }
        fn set_line(&self, gsi: u32, high: bool) {
            self.lines.lock().unwrap().push((gsi, high));
        }
    }

    #[test]
    fn a_masked_message_waits_and_is_sent_once() {
        let vm = Arc::new(FakeVm::default());
        let mut msix = Msix::new(3, vm.clone());
        let sent = || std::mem::take(&mut *vm.messages.lock().unwrap());
        msix.trigger(1);
        assert!(sent().is_empty(), "off");
        msix.write_table(16, &0xfee0_1000_u64.to_le_bytes());
        msix.write_table(24, &0x4021_u32.to_le_bytes());
        msix.set_control(ENABLE);
        assert!(sent().is_empty(), "what came while it was off is lost");

        msix.trigger(1);
        let mut bits = [0; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!((sent(), bits[0]), (vec![], 2));
        msix.write_table(28, &[0; 4]);
        assert_eq!(sent(), [(0xfee0_1000, 0x4021)]);
        msix.set_control(ENABLE | MASK_ALL);
        msix.trigger(1);
        msix.trigger(1);
        assert!(sent().is_empty());
        msix.set_control(ENABLE);
        assert_eq!(sent(), [(0xfee0_1000, 0x4021)]);
        msix.set_control(ENABLE);
        msix.trigger(3);
        msix.trigger(NO_VECTOR);
        assert!(sent().is_empty());
    }

    #[test]
    fn accesses_outside_the_table_do_nothing() {
        let mut msix = Msix::new(1, Arc::new(FakeVm::default()));
        msix.write_table(8, &[0xff; 64]);
        msix.write_table(usize::MAX / 2, &[0xff; 8]);
        let mut data = [7; 24];
        msix.read_table(8, &mut data);
        assert_eq!((data[0], data[8]), (0xff, 0));
        msix.read_pending(1 << 40, &mut data);
        assert_eq!(data, [0; 24]);
    }
}
