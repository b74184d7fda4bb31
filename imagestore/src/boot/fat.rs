//! FAT file systems, as EFI system partitions and extended boot loader partitions have: read by `fatfs`, behind bounds.
//!
//! The crate trusts what it reads. So the numbers that it computes with are checked before, it reads through a window
//! that runs dry (a directory or a file whose clusters form a ring would never end), and should it panic all the same,
//! that is an error of this disk.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use fatfs::{Dir, DirEntry, FileSystem, FsOptions};

use crate::partition::Slice;

/// What may be read to find a file or to list a directory, in bytes: real ones take some KiB.
const SEARCH: u64 = 8 << 20;

/// A FAT file system.
pub struct Fat {
    slice: Slice,
    /// Its serial number as Linux writes it, such as `4F1C-A051`.
    pub uuid: String,
}

/// What there is at a path.
pub enum Found {
    /// A file's content.
    Bytes(Vec<u8>),
    /// A file of so many bytes, more than were allowed.
    TooLarge(u64),
    /// No file.
    Nothing,
}

impl Fat {
    /// The file system on this slice, if there is one that fits on it (Microsoft, FAT32 File System Specification, "Boot
    /// Sector and BPB").
    ///
    /// # Errors
    /// The disk's.
    pub fn probe(slice: &Slice) -> io::Result<Option<Fat>> {
        let mut sector = [0; 512];
        match slice.read_exact_at(0, &mut sector) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        Ok(serial(&sector, slice.size()).map(|uuid| Fat { slice: slice.clone(), uuid }))
    }

    /// The file at `path`, if it has no more than `limit` bytes.
    ///
    /// # Errors
    /// A broken file system, or the disk's.
    pub fn read(&self, path: &str, limit: usize) -> io::Result<Found> {
        // Each cluster costs a look into the table.
        let budget = SEARCH + 2 * limit as u64;
        self.with(budget, |root| {
            let Some(entry) = find(root, path)?.filter(DirEntry::is_file) else { return Ok(Found::Nothing) };
            if entry.len() > limit as u64 {
                return Ok(Found::TooLarge(entry.len()));
            }
            let mut bytes = Vec::new();
            entry.to_file().take(limit as u64).read_to_end(&mut bytes)?;
            if bytes.len() as u64 != entry.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok(Found::Bytes(bytes))
        })
    }

    /// Up to `most` names in the directory at `path`; `None` where there is no such directory.
    ///
    /// # Errors
    /// A broken file system, or the disk's.
    pub fn list(&self, path: &str, most: usize) -> io::Result<Option<Vec<String>>> {
        self.with(SEARCH, |root| {
            let Some(entry) = find(root, path)?.filter(DirEntry::is_dir) else { return Ok(None) };
            let names = entry.to_dir().iter().take(most).map(|entry| entry.map(|e| e.file_name()));
            names.collect::<io::Result<_>>().map(Some)
        })
    }

    /// Runs `work` on the root directory; all its reads together get `budget` bytes.
    fn with<T>(&self, budget: u64, work: impl FnOnce(Dir<'_, Window>) -> io::Result<T>) -> io::Result<T> {
        let window = Window { slice: self.slice.clone(), left: budget };
        let run = || {
            let fs = FileSystem::new(window, FsOptions::new())?;
            work(fs.root_dir())
        };
        // Nothing of ours is touched but the window, which goes.
        catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(io::Error::other("the file system is broken")))
    }
}

/// The entry at `path`; letters' case does not matter.
fn find<'a>(root: Dir<'a, Window>, path: &str) -> io::Result<Option<DirEntry<'a, Window>>> {
    let mut dir = root;
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    while let Some(part) = parts.next() {
        let mut entries = dir.iter();
        let entry = loop {
            match entries.next().transpose()? {
                Some(entry) if is_named(&entry, part) => break entry,
                Some(_) => {}
                None => return Ok(None),
            }
        };
        if parts.peek().is_none() {
            return Ok(Some(entry));
        }
        if !entry.is_dir() {
            return Ok(None);
        }
        dir = entry.to_dir();
    }
    Ok(None)
}

fn is_named(entry: &DirEntry<'_, Window>, name: &str) -> bool {
    let same = |other: String| other.to_lowercase() == name.to_lowercase();
    same(entry.file_name()) || same(entry.short_file_name())
}

/// The serial number in a boot sector whose numbers hold together on a partition of `size` bytes.
fn serial(sector: &[u8; 512], size: u64) -> Option<String> {
    let le16 = |at: usize| Some(u64::from(u16::from_le_bytes(*sector.get(at..)?.first_chunk()?)));
    let le32 = |at: usize| Some(u64::from(u32::from_le_bytes(*sector.get(at..)?.first_chunk()?)));
    let (bytes, per_cluster, fats) = (le16(11)?, u64::from(sector[13]), u64::from(sector[16]));
    let (reserved, root_entries, fat16) = (le16(14)?, le16(17)?, le16(22)?);
    let sectors = if le16(19)? != 0 { le16(19)? } else { le32(32)? };
    let is_fat32 = fat16 == 0;
    let fat = if is_fat32 { le32(36)? } else { fat16 };
    let jumps = matches!(sector[0], 0xe9 | 0xeb) && sector.ends_with(&[0x55, 0xaa]);
    let sizes = [512, 1024, 2048, 4096].contains(&bytes) && per_cluster.is_power_of_two();
    let tables = reserved >= 1 && (1..=2).contains(&fats) && fat >= 1 && is_fat32 == (root_entries == 0);
    if !jumps || !sizes || !tables || sectors * bytes > size {
        return None;
    }
    // No overflow: each factor has at most 32 bits, and their sum is a sector of the disk.
    let data = reserved + fats * fat + (root_entries * 32).div_ceil(bytes);
    let clusters = sectors.checked_sub(data)? / per_cluster;
    let kind = if is_fat32 {
        32
    } else if clusters < 4085 {
        12
    } else {
        16
    };
    // The kind follows from the number of clusters alone; the table has an entry for each, and FAT32's root is one.
    let is_kind = if is_fat32 { (65_525..0x0fff_fff5).contains(&clusters) } else { clusters < 65_525 };
    let fits = (clusters + 2) * kind <= fat * bytes * 8;
    let root = !is_fat32 || (2..clusters + 2).contains(&le32(44)?);
    let info = !is_fat32 || le16(48)? < reserved;
    if clusters == 0 || !is_kind || !fits || !root || !info {
        return None;
    }
    let id = le32(if is_fat32 { 67 } else { 39 })?;
    Some(format!("{:04X}-{:04X}", id >> 16, id & 0xffff))
}

/// A slice that is read only, and only so much.
struct Window {
    slice: Slice,
    left: u64,
}

impl Read for Window {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Every look costs, however small.
        self.left = self.left.checked_sub(buf.len().max(16) as u64).ok_or_else(|| {
            io::Error::other("the file system has the reader look at more than it should need; do its clusters form a ring?")
        })?;
        self.slice.read(buf)
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.slice.seek(to)
    }
}

impl Write for Window {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
