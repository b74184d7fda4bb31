//! Where the file systems of a disk are: GPT (UEFI 2.10, 5.3), MBR (UEFI 2.10, 5.2.1), or the whole disk.
//!
//! A [`Slice`] is a window on a disk that cannot be left, whatever a table or a file system claims.

use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use gptman::GPTHeader;
use hutch_blockdev::Disk;
use hutch_blockdev::disk::SECTOR;

/// The most entries of a GPT that are looked at. Tables are made with 128.
const MAX_ENTRIES: u32 = 1024;
/// The size of a GPT entry in bytes, and the largest step between two that is believed.
const ENTRY_SIZES: std::ops::RangeInclusive<u32> = 128..=4096;
/// Where the MBR keeps its four entries, and the size of one, in bytes.
const MBR_TABLE: usize = 446;
const MBR_ENTRY: usize = 16;
/// MBR type: the disk has a GPT.
const MBR_PROTECTIVE: u8 = 0xee;

/// A part of a disk. Reads need no alignment.
#[derive(Clone)]
pub struct Slice {
    disk: Arc<dyn Disk>,
    start: u64,
    len: u64,
    position: u64,
    number: Option<u32>,
}

impl Slice {
    /// The whole of `disk`.
    pub fn whole(disk: Arc<dyn Disk>) -> Self {
        let len = disk.size();
        Slice { disk, start: 0, len, position: 0, number: None }
    }

    /// The partition of this number: `len` bytes of the disk from `start`, both in bytes; `None` if that is empty or not
    /// wholly on this slice.
    fn part(&self, number: u32, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        if len == 0 || end > self.len {
            return None;
        }
        let (disk, start) = (Arc::clone(&self.disk), self.start.checked_add(start)?);
        Some(Slice { disk, start, len, position: 0, number: Some(number) })
    }

    /// Where on the disk this begins, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its number in the table, from 1, as kernels count partitions; the whole disk has none.
    pub fn number(&self) -> Option<u32> {
        self.number
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` where that reaches past the end; what the disk says, otherwise.
    pub fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // No overflow: the end is on the disk, whose size is a multiple of the sector.
        let (start, end) = (self.start + offset, self.start + offset + len);
        if start.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            return self.disk.read_at(start, buf).map_err(io::Error::other);
        }
        let (first, last) = (start / SECTOR * SECTOR, end.div_ceil(SECTOR) * SECTOR);
        let mut sectors = vec![0; (last - first) as usize];
        self.disk.read_at(first, &mut sectors).map_err(io::Error::other)?;
        let wanted = sectors.iter().skip((start - first) as usize);
        buf.iter_mut().zip(wanted).for_each(|(to, from)| *to = *from);
        Ok(())
    }
}

impl Read for Slice {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.len.saturating_sub(self.position)).unwrap_or(usize::MAX);
        let count = buf.len().min(left);
        let (buf, _) = buf.split_at_mut(count);
        self.read_exact_at(self.position.min(self.len), buf)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ext4_view::Ext4Read for Slice {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.read_exact_at(start_byte, dst)?)
    }
}

/// The partitions of a disk in the order of its table; the whole disk where there is no table. Entries that are
/// empty or reach past the disk are left out, and so are an MBR's logical partitions.
///
/// # Errors
/// The disk's, where it cannot be read. A broken table is not an error: it has no partitions.
pub fn partitions(disk: &Arc<dyn Disk>) -> io::Result<Vec<Slice>> {
    let whole = Slice::whole(Arc::clone(disk));
    let mut sector = [0; SECTOR as usize];
    if whole.len < SECTOR {
        return Ok(Vec::new());
    }
    whole.read_exact_at(0, &mut sector)?;
    let entries = mbr_entries(&sector);
    if entries.is_empty() {
        return Ok(vec![whole]);
    }
    if entries.iter().any(|entry| entry.kind == MBR_PROTECTIVE) {
        return gpt(&whole);
    }
    let parts = entries.iter().filter_map(|entry| {
        let (first, count) = (u64::from(entry.first), u64::from(entry.count));
        whole.part(entry.number, first.checked_mul(SECTOR)?, count.checked_mul(SECTOR)?)
    });
    Ok(parts.collect())
}

/// A used entry of an MBR.
struct MbrEntry {
    number: u32,
    kind: u8,
    first: u32,
    count: u32,
}

/// The entries of an MBR. A boot sector without a table has other bytes there: one entry with a status that is
/// neither 0 nor 0x80 tells, and then there is none.
fn mbr_entries(sector: &[u8]) -> Vec<MbrEntry> {
    let Some((table, [0x55, 0xaa])) = sector.get(MBR_TABLE..).and_then(|tail| tail.split_at_checked(64))
    else {
        return Vec::new();
    };
    let mut entries = Vec::new();
    for (number, entry) in (1..).zip(table.chunks_exact(MBR_ENTRY)) {
        let &[status, _, _, _, kind, _, _, _, a, b, c, d, e, f, g, h] = entry else { return Vec::new() };
        if status & 0x7f != 0 {
            return Vec::new();
        }
        if kind != 0 {
            let (first, count) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
            entries.push(MbrEntry { number, kind, first, count });
        }
    }
    entries
}

/// The partitions of a GPT: of the primary table, else of the backup in the last sector.
///
/// gptman reads a header and checks its sum. It is not asked for the entries: it would allocate for
/// any number of them, and panic on sizes other than its own.
fn gpt(whole: &Slice) -> io::Result<Vec<Slice>> {
    let mut reader = whole.clone();
    for header_at in [SECTOR, whole.len.saturating_sub(SECTOR)] {
        reader.seek(SeekFrom::Start(header_at))?;
        match GPTHeader::read_from(&mut reader) {
            Ok(header) => return gpt_entries(whole, &header),
            Err(gptman::Error::Io(error)) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(error);
            }
            Err(_) => {}
        }
    }
    Ok(Vec::new())
}

fn gpt_entries(whole: &Slice, header: &GPTHeader) -> io::Result<Vec<Slice>> {
    let step = header.size_of_partition_entry;
    let table = header.partition_entry_lba.checked_mul(SECTOR);
    let Some(table) = table.filter(|_| ENTRY_SIZES.contains(&step)) else { return Ok(Vec::new()) };

    let mut parts = Vec::new();
    for index in 0..header.number_of_partition_entries.min(MAX_ENTRIES) {
        let mut bytes = [0; 128];
        let Some(at) = table.checked_add(u64::from(index) * u64::from(step)) else { break };
        match whole.read_exact_at(at, &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            result => result?,
        }
        parts.extend(gpt_entry(whole, index + 1, &bytes));
    }
    Ok(parts)
}

/// The partition of one entry (UEFI 2.10, table 5-6): its type, all zeros where unused, then at byte 32 its first
/// and its last block.
fn gpt_entry(whole: &Slice, number: u32, bytes: &[u8; 128]) -> Option<Slice> {
    let le64 = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let kind: &[u8; 16] = bytes.first_chunk()?;
    if *kind == [0; 16] {
        return None;
    }
    let (first, last) = (le64(32)?, le64(40)?);
    let sectors = last.checked_add(1)?.checked_sub(first)?;
    whole.part(number, first.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?)
}
