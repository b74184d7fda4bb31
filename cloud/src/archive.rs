//! Disks in one stream of bytes, and what is said of them: what a stored image and a bundle are made of.
//!
//! ```text
//!   "hutch disks 1\n"   length, what is said of them (JSON: {"disks": [bytes of each], "of": …})   sum
//!   of each disk: pieces (where it lies, its length, its bytes), the end (where the disk ends, 0)  sum
//! ```
//! Numbers are little-endian: lengths have 32 bits, places 64. A sum is the SHA-256 of all that lies before it. What is not among
//! the pieces is zeros. Whoever wrote a stream is not trusted: it is of those limits, in order, and of its sums, or it is refused.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use hutch_blockdev::{Disk, DiskError, SECTOR};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::export::each_piece;

/// How a stream begins.
const MAGIC: &[u8] = b"hutch disks 1\n";
/// The most bytes that are said of disks.
const SAID: u32 = 1 << 20;
/// The most disks: an instance has no more.
pub const DISKS: usize = 128;
/// The largest disk: EC2's largest volume.
pub const DISK: u64 = 64 << 40;
/// The longest piece.
const PIECE: u32 = 1 << 20;
/// What stands before a piece.
const HEAD: u64 = 12;

/// Why a stream was not written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It cannot be written, or read.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A disk cannot be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It cannot be written to the host's disk.
    #[error("cannot write the disk: {0}")]
    Write(io::Error),
    /// It is no such stream, or not whole.
    #[error("it is refused: {0}")]
    Bad(String),
    /// It was not to go on.
    #[error("it was stopped before it was done")]
    Stopped,
}

type Result<T> = std::result::Result<T, ArchiveError>;

/// Is told how many more bytes are done, and says whether to go on.
pub type GoOn<'a> = dyn FnMut(u64) -> bool + 'a;

#[derive(Serialize, Deserialize)]
struct Said<T> {
    disks: Vec<u64>,
    of: T,
}

/// How many bytes a stream of these disks has at most.
///
/// # Errors
/// A disk cannot be read.
pub fn most(disks: &[&dyn Disk]) -> std::result::Result<u64, DiskError> {
    let mut bytes = u64::from(SAID);
    for disk in disks {
        let mut at = 0;
        while at < disk.size() {
            match disk.zeros_at(at)?.min(disk.size() - at) {
                0 => {
                    // Zeros that nobody knows of are found when they are read.
                    let count = u64::from(PIECE).min(disk.size() - at);
                    // Pieces are of 64 KiB at least, but for the last.
                    bytes += count + (count / (64 << 10) + 1) * HEAD;
                    at += count;
                }
                zeros => at += zeros,
            }
        }
    }
    Ok(bytes)
}

/// Whatever passes is added to the sum.
struct Summed<S> {
    stream: S,
    sum: Sha256,
}

impl<W: Write> Summed<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.sum.update(bytes);
        Ok(self.stream.write_all(bytes)?)
    }

    /// Writes the sum of all that was before.
    fn seal(&mut self) -> Result<()> {
        let sum = self.sum.clone().finalize();
        self.put(&sum)
    }
}

impl<R: Read> Summed<R> {
    fn get<'a>(&mut self, bytes: &'a mut [u8]) -> Result<&'a [u8]> {
        self.stream.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => ArchiveError::Bad("it ends too soon".into()),
            _ => e.into(),
        })?;
        self.sum.update(&*bytes);
        Ok(bytes)
    }

    fn number<const N: usize>(&mut self) -> Result<u64> {
        let (mut bytes, mut number) = ([0; N], [0; 8]);
        self.get(&mut bytes)?;
        number.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Ok(u64::from_le_bytes(number))
    }

    fn check(&mut self) -> Result<()> {
        let sum = self.sum.clone().finalize();
        match self.get(&mut [0; 32])? == &*sum {
            true => Ok(()),
            false => Err(ArchiveError::Bad("its checksum is wrong: it is damaged, or was changed".into())),
        }
    }
}

/// Writes disks, and what is said of them.
///
/// # Errors
/// [`ArchiveError`].
pub fn write<T: Serialize>(to: impl Write, of: &T, disks: &[&dyn Disk], go_on: &mut GoOn<'_>) -> Result<()> {
    let mut to = Summed { stream: to, sum: Sha256::new() };
    let said = Said { disks: disks.iter().map(|disk| disk.size()).collect(), of };
    let said = serde_json::to_vec(&said).map_err(io::Error::from)?;
    let length = u32::try_from(said.len()).ok().filter(|length| *length <= SAID);
    let length = length.ok_or_else(|| ArchiveError::Bad("too much is said of it".into()))?;
    to.put(MAGIC)?;
    to.put(&length.to_le_bytes())?;
    to.put(&said)?;
    to.seal()?;
    for disk in disks {
        each_piece(
            *disk,
            |bytes| if go_on(bytes) { Ok(()) } else { Err(ArchiveError::Stopped) },
            |at, piece| {
                to.put(&at.to_le_bytes())?;
                to.put(&(piece.len() as u32).to_le_bytes())?;
                to.put(piece)
            },
        )?;
        to.put(&disk.size().to_le_bytes())?;
        to.put(&0_u32.to_le_bytes())?;
        to.seal()?;
    }
    Ok(())
}

/// A stream that is read.
pub struct Archive<R> {
    from: Summed<R>,
    /// The sizes of its disks in bytes.
    pub disks: Vec<u64>,
    next: usize,
}

impl<R: Read> Archive<R> {
    /// Reads what is said of the disks.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn open<T: DeserializeOwned>(from: R) -> Result<(Archive<R>, T)> {
        let bad = |why: &str| ArchiveError::Bad(why.into());
        let mut from = Summed { stream: from, sum: Sha256::new() };
        if from.get(&mut [0; MAGIC.len()])? != MAGIC {
            return Err(bad("it is none that hutch wrote"));
        }
        let length = from.number::<4>()?;
        if length > u64::from(SAID) {
            return Err(bad("it says too much of its disks"));
        }
        let mut said = vec![0; length as usize];
        from.get(&mut said)?;
        from.check()?;
        let said: Said<T> =
            serde_json::from_slice(&said).map_err(|e| ArchiveError::Bad(format!("what it says: {e}")))?;
        let fits = |size: &u64| (1..=DISK).contains(size) && size.is_multiple_of(SECTOR);
        if said.disks.is_empty() || said.disks.len() > DISKS || !said.disks.iter().all(fits) {
            return Err(bad("it has no disk, too many, or one of a size that none has"));
        }
        Ok((Archive { from, disks: said.disks, next: 0 }, said.of))
    }

    /// Reads the next disk into a file, which is empty, or past it. Returns the disk's size.
    ///
    /// # Errors
    /// [`ArchiveError`]: what is in the file is nothing then.
    pub fn disk(&mut self, to: Option<&File>, go_on: &mut GoOn<'_>) -> Result<u64> {
        let bad = |why: &str| ArchiveError::Bad(why.into());
        let size = *self.disks.get(self.next).ok_or_else(|| bad("it has no more disks"))?;
        if let Some(file) = to {
            file.set_len(size).map_err(ArchiveError::Write)?;
        }
        let (mut end, mut buffer) = (0, vec![0; PIECE as usize]);
        loop {
            let (at, length) = (self.from.number::<8>()?, self.from.number::<4>()?);
            let beyond = at.checked_add(length).filter(|beyond| *beyond <= size);
            let beyond = beyond.filter(|_| at >= end && length <= u64::from(PIECE));
            let beyond = beyond.ok_or_else(|| bad("a piece of a disk lies where none may"))?;
            if !go_on(beyond - end) {
                return Err(ArchiveError::Stopped);
            }
            if length == 0 {
                if at != size {
                    return Err(bad("a disk ends where it may not"));
                }
                break;
            }
            let piece = self.from.get(buffer.get_mut(..length as usize).unwrap_or_default())?;
            if let Some(file) = to {
                file.write_all_at(piece, at).map_err(ArchiveError::Write)?;
            }
            end = beyond;
        }
        self.from.check()?;
        self.next += 1;
        Ok(size)
    }

    /// Whether nothing follows the last disk.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn end(mut self) -> Result<()> {
        match self.from.stream.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(ArchiveError::Bad("something follows its last disk".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hutch_blockdev::{Format, open_layers};
    use proptest::prelude::*;

    use super::*;

    /// A disk with these bytes at these places, and its file.
    fn disk(size: u64, pieces: &[(u64, &[u8])]) -> (Arc<dyn Disk>, File) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        pieces.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        let clone = file.try_clone().unwrap();
        (open_layers(vec![(clone, Format::Raw)], true).unwrap(), file)
    }

    fn written() -> (Vec<u8>, [File; 2]) {
        let (first, first_file) =
            disk(5 << 20, &[(0, b"begin"), (3 << 20, &[7; 100_000]), ((5 << 20) - 4, b"last")]);
        let (second, second_file) = disk(512, &[]);
        let (mut bytes, mut done) = (Vec::new(), 0);
        let disks: [&dyn Disk; 2] = [&*first, &*second];
        let mut go_on = |more| {
            done += more;
            true
        };
        write(&mut bytes, &"what is said", &disks, &mut go_on).unwrap();
        assert_eq!(done, (5 << 20) + 512);
        assert!(bytes.len() as u64 <= most(&disks).unwrap() && bytes.len() < 400_000, "zeros are left out");
        (bytes, [first_file, second_file])
    }

    fn read(bytes: &[u8]) -> Result<(String, Vec<File>)> {
        let (mut archive, said) = Archive::open::<String>(bytes)?;
        let mut files = Vec::new();
        for size in archive.disks.clone() {
            let (file, mut done) = (tempfile::tempfile().unwrap(), 0);
            let mut go_on = |more| {
                done += more;
                true
            };
            assert_eq!(archive.disk(Some(&file), &mut go_on)?, size);
            assert_eq!(done, size);
            files.push(file);
        }
        archive.end()?;
        Ok((said, files))
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn disks_come_back_as_they_went() {
        let (bytes, before) = written();
        let (said, after) = read(&bytes).unwrap();
        assert_eq!(said, "what is said");
        for (before, after) in before.iter().zip(&after) {
            assert!(content(before) == content(after));
        }
        let (mut archive, _) = Archive::open::<String>(&*bytes).unwrap();
        archive.disk(None, &mut |_| true).unwrap();
        assert!(matches!(archive.disk(None, &mut |_| false), Err(ArchiveError::Stopped)));
        let (first, _file) = disk(1 << 20, &[]);
        let stopped = write(io::sink(), &(), &[&*first], &mut |_| false);
        assert!(matches!(stopped, Err(ArchiveError::Stopped)));
    }

    /// A stream of anybody's, with right sums.
    fn forged(said: &str, pieces: &[(u64, u32)]) -> Vec<u8> {
        let mut to = Summed { stream: Vec::new(), sum: Sha256::new() };
        to.put(MAGIC).unwrap();
        to.put(&(said.len() as u32).to_le_bytes()).unwrap();
        to.put(said.as_bytes()).unwrap();
        to.seal().unwrap();
        for (at, length) in pieces {
            to.put(&at.to_le_bytes()).unwrap();
            to.put(&length.to_le_bytes()).unwrap();
            to.put(&vec![1; *length as usize]).unwrap();
        }
        to.seal().unwrap();
        to.stream
    }

    #[test]
    fn what_was_forged_is_refused() {
        let small = r#"{"disks":[4096],"of":"x"}"#;
        read(&forged(small, &[(0, 512), (1024, 512), (4096, 0)])).unwrap();
        for (said, pieces) in [
            (small, &[(512, 512), (0, 512), (4096, 0)][..]),
            (small, &[(0, 512), (256, 512), (4096, 0)]),
            (small, &[(4000, 512), (4096, 0)]),
            (small, &[(u64::MAX - 1, 512), (4096, 0)]),
            (small, &[(0, 512), (512, 0)]),
            (small, &[(0, PIECE + 1)]),
            (small, &[]),
            (r#"{"disks":[],"of":"x"}"#, &[]),
            (r#"{"disks":[0],"of":"x"}"#, &[(0, 0)]),
            (r#"{"disks":[513],"of":"x"}"#, &[(513, 0)]),
            (r#"{"disks":[18446744073709551104],"of":"x"}"#, &[]),
            (r#"{"disks":[512]}"#, &[(512, 0)]),
            ("no json", &[(512, 0)]),
        ] {
            assert!(matches!(read(&forged(said, pieces)), Err(ArchiveError::Bad(_))), "{said} {pieces:?}");
        }
        let long = [MAGIC, &u32::MAX.to_le_bytes(), &[0; 100]].concat();
        assert!(matches!(read(&long), Err(ArchiveError::Bad(_))));
        let more = [forged(small, &[(4096, 0)]), vec![0]].concat();
        assert!(matches!(read(&more), Err(ArchiveError::Bad(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_damaged_or_cut_off_is_refused(at in 0_usize..100_000, bit in 0_u32..8, cut in any::<bool>()) {
            let (mut bytes, _) = written();
            let at = at % bytes.len();
            match cut {
                true => bytes.truncate(at),
                false => bytes[at] ^= 1 << bit,
            }
            prop_assert!(matches!(read(&bytes), Err(ArchiveError::Bad(_))));
        }
    }
}
