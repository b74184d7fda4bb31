//! Port and memory-mapped I/O: which device answers at an address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A device's registers. Offsets are from the start of the range it was put at; accesses are 1, 2, 4 or 8 bytes.
/// Whatever a guest does, neither method may panic.
pub trait Registers: Send {
    /// Reads `data.len()` bytes.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Writes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device, shared between the bus and whoever else needs it.
pub type Shared = Arc<Mutex<dyn Registers>>;

/// The range asked for is already another device's, or empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the I/O range {start:#x}+{len:#x} is empty or overlaps another device's")]
pub struct Overlap {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// One address space: ports, or memory.
#[derive(Default, Clone)]
pub struct Bus {
    ranges: BTreeMap<u64, (u64, Shared)>,
}

impl Bus {
    /// Puts `device` at `start`, `len` bytes long.
    pub fn insert(&mut self, start: u64, len: u64, device: Shared) -> Result<(), Overlap> {
        let end = start.checked_add(len).filter(|_| len > 0).ok_or(Overlap { start, len })?;
        let before = self.ranges.range(..end).next_back();
        if before.is_some_and(|(&s, &(l, _))| s + l > start) {
            return Err(Overlap { start, len });
        }
        self.ranges.insert(start, (len, device));
        Ok(())
    }

    /// Reads; where nothing answers, all ones, as an empty bus does.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where nothing answers, the write is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// An access that leaves its device's range is nobody's.
    fn find(&self, address: u64, size: usize) -> Option<(u64, &Shared)> {
        let (&start, (len, device)) = self.ranges.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(size as u64)?;
        (end <= *len).then_some((offset, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);
    impl Registers for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn byte(bus: &Bus, address: u64) -> u8 {
        let mut b = [0];
        bus.read(address, &mut b);
        b[0]
    }

    #[test]
    fn the_device_at_the_address_answers() {
        let mut bus = Bus::default();
        let device = Arc::new(Mutex::new(Echo(vec![])));
        bus.insert(0x3f8, 8, device.clone()).unwrap();
        assert_eq!((byte(&bus, 0x3f8), byte(&bus, 0x3ff)), (0, 7));
        assert_eq!((byte(&bus, 0x3f7), byte(&bus, 0x400)), (0xff, 0xff));
        bus.write(0x3f9, &[5]);
        bus.write(0x3ff, &[1, 2]);
        bus.write(u64::MAX, &[1, 2]);
        assert_eq!(device.lock().unwrap().0, [(1, vec![5])], "an access across the end is nobody's");
    }

    #[test]
    fn ranges_never_overlap() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Echo(vec![])));
        bus.insert(100, 10, device()).unwrap();
        for (start, len) in [(95, 6), (100, 10), (109, 1), (90, 100), (200, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, len, device()), Err(Overlap { start, len }));
        }
        bus.insert(110, 1, device()).unwrap();
        bus.insert(99, 1, device()).unwrap();
    }
}
