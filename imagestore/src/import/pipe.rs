//! A disk as it comes through a pipe from a worker, to be encrypted before any of it lies on the host's disk.
//!
//! ```text
//!   at, length (64 bits each, little endian), so many bytes      a piece that is not all zeros, behind those before it
//!   size, 0                                                      once: before the first piece, or behind the last
//! ```
//! The worker is believed nothing: pieces are small, in order and within the disk.

use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use super::{CHUNK, ImportError, Limits, io_error, is_full};

/// A disk is whole sectors, of so many bytes.
const SECTOR: u64 = 512;

/// What takes a disk, in order.
pub trait Sink: Send {
    /// The disk has so many bytes. That is said once: before all else, or after it.
    ///
    /// # Errors
    /// The host's.
    fn size(&mut self, bytes: u64) -> io::Result<()>;

    /// Takes whole sectors.
    ///
    /// # Errors
    /// The host's.
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Says the disk's size.
pub(super) fn say_size(pipe: &mut impl Write, size: u64) -> io::Result<()> {
    piece(pipe, size, &[])
}

/// Hands a piece over.
pub(super) fn piece(pipe: &mut impl Write, at: u64, bytes: &[u8]) -> io::Result<()> {
    pipe.write_all(&at.to_le_bytes())?;
    pipe.write_all(&(bytes.len() as u64).to_le_bytes())?;
    pipe.write_all(bytes)
}

/// Fills `buf`; `false` where the pipe ends: its worker was ended.
fn fill(pipe: &mut impl Read, buf: &mut [u8]) -> Result<bool, ImportError> {
    match pipe.read_exact(buf) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true).map_err(io_error("listen to its worker")),
    }
}

/// Takes what a worker says until it ends; tells the disk's size. What was cut off has none: that is 0, and the worker says why.
pub(super) fn take(
    mut pipe: impl Read,
    sink: &mut dyn Sink,
    limits: &Limits,
    directory: &Path,
) -> Result<u64, ImportError> {
    let unwritten = |error: io::Error| match is_full(&error) {
        true => ImportError::Full(directory.to_owned()),
        false => io_error("write the disk")(error),
    };
    let refused = |why: &str| ImportError::Refused(format!("its worker says {why}"));
    let (mut size, mut end, mut data) = (None, 0_u64, 0_u64);
    let mut head = [0; 16];
    let mut bytes = Vec::new();
    while fill(&mut pipe, &mut head)? {
        let word = |at: usize| {
            head.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |w| u64::from_le_bytes(*w))
        };
        let (at, len) = (word(0), word(8));
        if len == 0 {
            if size.is_some()
                || at < end
                || at == 0
                || !at.is_multiple_of(SECTOR)
                || at > limits.virtual_bytes
            {
                return Err(refused(&format!("that its disk has {at} bytes")));
            }
            sink.size(at).map_err(unwritten)?;
            size = Some(at);
            continue;
        }
        let whole = usize::try_from(len).ok().filter(|len| *len <= CHUNK);
        let (Some(whole), true) = (whole, at >= end && at.is_multiple_of(SECTOR)) else {
            return Err(refused(&format!("{len} bytes at {at} behind {end}")));
        };
        let behind = at.checked_add(len).and_then(|end| end.checked_next_multiple_of(SECTOR));
        end = behind.unwrap_or(u64::MAX);
        if end > size.unwrap_or(limits.virtual_bytes) {
            return Err(refused(&format!("{len} bytes at {at} of fewer")));
        }
        data += len;
        if data > limits.data_bytes {
            return Err(ImportError::Limit(format!("{} bytes of data", limits.data_bytes)));
        }
        bytes.resize(whole, 0);
        if !fill(&mut pipe, &mut bytes)? {
            return Ok(0);
        }
        // The end of a disk that was cut short: it is refused in the end.
        bytes.resize(whole.next_multiple_of(SECTOR as usize), 0);
        sink.write(at, &bytes).map_err(unwritten)?;
    }
    Ok(size.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Kept(Vec<(u64, usize)>, Vec<u64>);

    impl Sink for Kept {
        fn size(&mut self, bytes: u64) -> io::Result<()> {
            self.1.push(bytes);
            Ok(())
        }
        fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
            self.0.push((at, bytes.len()));
            Ok(())
        }
    }

    fn taken(pieces: &[(u64, usize)]) -> (Result<u64, ImportError>, Kept) {
        let mut pipe = Vec::new();
        for (at, len) in pieces {
            piece(&mut pipe, *at, &vec![1; *len]).unwrap();
        }
        let mut kept = Kept::default();
        let limits = Limits { virtual_bytes: 1 << 30, data_bytes: 1 << 20, ..Limits::default() };
        let size = take(&*pipe, &mut kept, &limits, Path::new("/"));
        (size, kept)
    }

    #[test]
    fn a_disk_is_taken_in_order_and_its_size_before_or_behind() {
        for pieces in [[(4096, 0), (0, 512), (1024, 512)], [(0, 512), (1024, 512), (4096, 0)]] {
            let (size, kept) = taken(&pieces);
            assert_eq!((size.unwrap(), kept.0, kept.1), (4096, vec![(0, 512), (1024, 512)], vec![4096]));
        }
        let (size, kept) = taken(&[(0, 700)]);
        assert_eq!(
            (size.unwrap(), kept.0),
            (0, vec![(0, 1024)]),
            "whole sectors; without an end it has no size"
        );
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            &[(4096, 0), (4096, 512)][..],
            &[(4096, 0), (4096, 0)],
            &[(0, 0)],
            &[(5, 0)],
            &[(1 << 40, 0)],
            &[(1 << 40, 512)],
            &[(u64::MAX - 511, 512)],
            &[(3, 512)],
            &[(0, CHUNK + 1)],
            &[(1024, 512), (0, 512)],
            &[(0, 1024), (512, 0)],
        ] {
            assert!(matches!(taken(bad).0, Err(ImportError::Refused(_))), "{bad:?}");
        }
        let much: Vec<_> = (0..2).map(|i| (i * CHUNK as u64, CHUNK)).collect();
        assert!(matches!(taken(&much).0, Err(ImportError::Limit(_))));
    }
}
