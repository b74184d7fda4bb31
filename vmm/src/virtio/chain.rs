//! A request's memory: the buffers of a descriptor chain, checked against guest memory once, then used safely.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use super::Memory;

/// What is wrong with a chain; the driver broke the rules, so the device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor points outside guest memory.
    #[error("a buffer lies outside guest memory")]
    Outside,
    /// The chain loops, leaves its table, or nests tables (virtio 1.2, 2.7.5).
    #[error("a descriptor chain does not end")]
    Endless,
    /// A buffer that the device reads comes after one it writes (virtio 1.2, 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// The chain is too short for its request.
    #[error("a request is too short")]
    Short,
}

/// Pieces of guest memory, one after the other.
#[derive(Default)]
pub struct Buffers<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a piece.
    fn push(&mut self, piece: VolatileSlice<'a>) {
        if !piece.is_empty() {
            self.len += piece.len();
            self.pieces.push(piece);
        }
    }

    /// Takes the first `count` bytes off; `None` if there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Buffers<'a>> {
        let left = self.len.checked_sub(count)?;
        let (mut whole, mut before) = (0, 0);
        while let Some(piece) = self.pieces.get(whole)
            && before + piece.len() <= count
        {
            (whole, before) = (whole + 1, before + piece.len());
        }
        let rest = self.pieces.split_off(whole);
        let mut taken = Buffers { pieces: std::mem::replace(&mut self.pieces, rest), len: before };
        if before < count {
            let piece = self.pieces.first_mut()?;
            let (first, second) = piece.split_at(count - before).ok()?;
            *piece = second;
            taken.push(first);
        }
        self.len = left;
        Some(taken)
    }

    /// Copies the first bytes into `to`; returns how many there were.
    pub fn read(&self, mut to: &mut [u8]) -> usize {
        let room = to.len();
        for piece in &self.pieces {
            let count = piece.copy_to(to);
            to = to.split_at_mut(count).1;
        }
        room - to.len()
    }

    /// Copies `from` to the first bytes; returns how many fitted.
    pub fn write(&self, mut from: &[u8]) -> usize {
        let all = from.len();
        for piece in &self.pieces {
            let count = from.len().min(piece.len());
            let (now, later) = from.split_at(count);
            piece.copy_from(now);
            from = later;
        }
        all - from.len()
    }

    /// The same pieces as the kernel wants them. They stay mapped as long as the guest memory they are of.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |p: &VolatileSlice<'_>| libc::iovec {
            iov_base: p.ptr_guard_mut().as_ptr().cast(),
            iov_len: p.len(),
        };
        self.pieces.iter().map(iovec).collect()
    }
}

/// A descriptor's flags (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of a descriptor: address, length, flags, next.
const DESCRIPTOR: usize = 16;
/// The longest table that a descriptor may name, in descriptors: more than any queue here has.
const TABLE_MAX: usize = 4096;

/// A request that the driver made available.
#[derive(Debug, Clone, Copy)]
pub struct Chain {
    /// Its first descriptor, by which it is handed back.
    pub head: u16,
    table: GuestAddress,
    size: u16,
}

/// The next request of a queue, if there is one.
///
/// # Errors
/// The rings are wrong.
pub fn next(queue: &mut Queue, memory: &Memory) -> Result<Option<Chain>, virtio_queue::Error> {
    let (table, size) = (GuestAddress(queue.desc_table()), queue.size());
    let found = queue.iter(memory)?.next();
    Ok(found.map(|chain| Chain { head: chain.head_index(), table, size }))
}

/// One descriptor, as the driver wrote it.
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// `None`: the table has no such descriptor.
    fn at(table: &[u8], index: u16) -> Option<Descriptor> {
        let bytes: &[u8; DESCRIPTOR] = table.as_chunks().0.get(usize::from(index))?;
        let [a, b, c, d, e, f, g, h, len @ .., i, j, k, l] = *bytes;
        Some(Descriptor {
            address: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            len: u32::from_le_bytes(len),
            flags: u16::from_le_bytes([i, j]),
            next: u16::from_le_bytes([k, l]),
        })
    }
}

/// The two halves of a chain: what the device reads, then what it writes.
///
/// A table is copied once and looked at then: a request of 1 MiB has 256 pages, and asking guest memory for each of their
/// descriptors costs more than all else that is done for it beside its bytes.
pub fn split<'a>(memory: &'a Memory, chain: Chain) -> Result<(Buffers<'a>, Buffers<'a>), ChainError> {
    let mut halves =
        Halves { memory, region: None, readable: Buffers::default(), writable: Buffers::default() };
    let (mut index, mut steps) = (chain.head, 0);
    loop {
        steps += 1;
        if index >= chain.size || steps > chain.size {
            return Err(ChainError::Endless);
        }
        let mut bytes = [0; DESCRIPTOR];
        let at = chain.table.checked_add(u64::from(index) * DESCRIPTOR as u64).ok_or(ChainError::Outside)?;
        memory.read_slice(&mut bytes, at).map_err(|_| ChainError::Outside)?;
        let descriptor = Descriptor::at(&bytes, 0).ok_or(ChainError::Endless)?;
        if descriptor.flags & INDIRECT != 0 {
            // It ends the chain (2.7.5.3.1).
            halves.table(&descriptor)?;
            break;
        }
        halves.push(&descriptor)?;
        if descriptor.flags & NEXT == 0 {
            break;
        }
        index = descriptor.next;
    }
    Ok((halves.readable, halves.writable))
}

/// A chain, as far as it was looked at.
struct Halves<'a> {
    memory: &'a Memory,
    /// Where the last buffer was: the next one is mostly there too.
    region: Option<&'a GuestRegionMmap<()>>,
    readable: Buffers<'a>,
    writable: Buffers<'a>,
}

impl Halves<'_> {
    /// The chain in a table of its own.
    fn table(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let len = descriptor.len as usize;
        let count = len / DESCRIPTOR;
        if !len.is_multiple_of(DESCRIPTOR) || count > TABLE_MAX {
            return Err(ChainError::Endless);
        }
        let mut table = vec![0; len];
        self.memory
            .read_slice(&mut table, GuestAddress(descriptor.address))
            .map_err(|_| ChainError::Outside)?;
        self.writable.pieces.reserve(count);
        let mut index = 0;
        for _ in 0..count {
            let descriptor = Descriptor::at(&table, index).ok_or(ChainError::Endless)?;
            if descriptor.flags & INDIRECT != 0 {
                return Err(ChainError::Endless);
            }
            self.push(&descriptor)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next;
        }
        Err(ChainError::Endless)
    }

    fn push(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let to = match (descriptor.flags & WRITE != 0, self.writable.pieces.is_empty()) {
            (true, _) => &mut self.writable,
            (false, true) => &mut self.readable,
            (false, false) => return Err(ChainError::Order),
        };
        let (address, len) = (GuestAddress(descriptor.address), descriptor.len as usize);
        let near = |region: &'_ &GuestRegionMmap<()>| {
            let offset = address.checked_offset_from(region.start_addr())?;
            let end = offset.checked_add(len as u64)?;
            (end <= region.len()).then_some(MemoryRegionAddress(offset))
        };
        self.region = self.region.filter(|region| near(region).is_some());
        if self.region.is_none() {
            self.region = self.memory.find_region(address);
        }
        if let Some(region) = self.region
            && let Some(offset) = near(&region)
        {
            to.push(region.get_slice(offset, len).map_err(|_| ChainError::Outside)?);
            return Ok(());
        }
        // Over the end of one region into the next, or outside.
        for piece in self.memory.get_slices(address, len) {
            to.push(piece.map_err(|_| ChainError::Outside)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = 0x1000;

    /// The halves of a chain whose queue has one descriptor, naming a table of these, in memory of two regions.
    fn halves(table: &[(u64, u32, u16, u16)], len: u32) -> Result<(Vec<usize>, Vec<usize>), ChainError> {
        let regions = [(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)];
        let memory = Memory::from_ranges(&regions).unwrap();
        let put = |at: u64, (address, len, flags, next): (u64, u32, u16, u16)| {
            memory.write_obj(address, GuestAddress(at)).unwrap();
            memory.write_obj(len, GuestAddress(at + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        };
        put(0, (TABLE, len, INDIRECT, 0));
        table.iter().enumerate().for_each(|(i, descriptor)| put(TABLE + i as u64 * 16, *descriptor));
        let (readable, writable) = split(&memory, Chain { head: 0, table: GuestAddress(0), size: 1 })?;
        let lens = |buffers: Buffers<'_>| buffers.pieces.iter().map(VolatileSlice::len).collect();
        Ok((lens(readable), lens(writable)))
    }

    #[test]
    fn a_table_is_followed_by_its_links() {
        let table = [(0x2000, 16, NEXT, 2), (0x3000, 1, WRITE, 0), (0x4000, 512, NEXT | WRITE, 1)];
        assert_eq!(halves(&table, 48), Ok((vec![16], vec![512, 1])));
        let across = [(0xff00, 0x200, NEXT, 1), (0x1ff00, 0x100, 0, 0)];
        assert_eq!(
            halves(&across, 32),
            Ok((vec![0x100, 0x100, 0x100], vec![])),
            "from one region into the next"
        );
    }

    #[test]
    fn a_hostile_table_is_refused() {
        let one = (0x2000, 16, NEXT, 0);
        for (table, len, why) in [
            (vec![one], 16, ChainError::Endless),
            (vec![(0x2000, 16, NEXT, 7)], 16, ChainError::Endless),
            (vec![one], 15, ChainError::Endless),
            (vec![one], 0, ChainError::Endless),
            (vec![(0x2000, 16, INDIRECT, 0)], 16, ChainError::Endless),
            (vec![one], !15, ChainError::Endless),
            (vec![one], 0xfff0, ChainError::Endless),
            (vec![(0x2000, 16, NEXT | WRITE, 1), one], 32, ChainError::Order),
            (vec![(0x1fff0, 17, 0, 0)], 16, ChainError::Outside),
            (vec![(u64::MAX, 2, 0, 0)], 16, ChainError::Outside),
            (vec![(0x2000, u32::MAX, 0, 0)], 16, ChainError::Outside),
        ] {
            assert_eq!(halves(&table, len).unwrap_err(), why, "{table:x?} {len}");
        }
    }
}
