//! A request's memory: the buffers of a descriptor chain, checked against guest memory once, then used safely.

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

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
        if count > self.len {
            return None;
        }
        let mut taken = Buffers::default();
        let mut rest = Buffers::default();
        for piece in self.pieces.drain(..) {
            let (first, second) = piece.split_at((count - taken.len).min(piece.len())).ok()?;
            taken.push(first);
            rest.push(second);
        }
        *self = rest;
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

/// The two halves of a chain: what the device reads, then what it writes.
pub fn split<'a>(
    memory: &'a Memory,
    mut chain: DescriptorChain<&Memory>,
) -> Result<(Buffers<'a>, Buffers<'a>), ChainError> {
    let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
    let mut open = true;
    for descriptor in chain.by_ref() {
        let to = match (descriptor.is_write_only(), writable.pieces.is_empty()) {
            (true, _) => &mut writable,
            (false, true) => &mut readable,
            (false, false) => return Err(ChainError::Order),
        };
        for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            to.push(piece.map_err(|_| ChainError::Outside)?);
        }
        open = descriptor.has_next();
    }
    // The iterator ends without a word where it cannot go on.
    if open { Err(ChainError::Endless) } else { Ok((readable, writable)) }
}
