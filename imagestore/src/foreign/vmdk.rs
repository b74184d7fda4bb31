//! VMDK (VMware, "Virtual Disk Format 5.0"): one file that is sparse (`monolithicSparse`), or made to be read as a
//! stream, its grains compressed (`streamOptimized`, as in an OVA). A grain directory leads to tables, and those to grains.

use flate2::{Decompress, FlushDecompress, Status};

use super::{Bytes, Content, Result, SECTOR, bad, by_units, disk_size, le16, le32, le64};

const MAGIC: &[u8] = b"KDMV";
/// The directory's place is told by a copy of the header near the end of the file.
const AT_END: u64 = u64::MAX;
/// A copy of the header there, and the marker of the stream's end, in bytes.
const FOOTER: u64 = 2 * SECTOR;
/// Flags: an entry of 1 is a grain of zeros; grains are compressed.
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
/// The one method there is: zlib (RFC 1950).
const DEFLATE: u16 = 1;
/// A compressed grain's own header: its first sector, and how many bytes follow.
const MARKER: u64 = 12;
/// Sizes of a grain in sectors, and entries of a table, that are believed.
const GRAINS: std::ops::RangeInclusive<u64> = 8..=4096;
const ENTRIES: std::ops::RangeInclusive<u32> = 1..=4096;
/// The largest descriptor that is read, in sectors. It is a page of text.
const DESCRIPTOR: u64 = 128;

/// A grain of one file.
pub struct Vmdk {
    bytes: Bytes,
    flags: u32,
    size: u64,
    /// In bytes.
    grain: u64,
    /// Entries of a table.
    entries: u32,
    /// The directory's offset in bytes.
    directory: u64,
    /// The table that was read last: its offset in bytes, and what it says.
    table: (u64, Vec<u8>),
}

pub fn open(bytes: Bytes) -> Result<Vmdk> {
    let mut header: [u8; 512] = bytes.array(0, "its header")?;
    let descriptor = (le64(&header, 28), le64(&header, 36));
    check_descriptor(&bytes, descriptor)?;
    if le64(&header, 56) == AT_END {
        header = bytes.array(bytes.len.saturating_sub(FOOTER), "its footer")?;
    }
    if !header.starts_with(MAGIC) {
        return bad("it has no VMDK header");
    }
    let (version, flags) = (le32(&header, 4), le32(&header, 8));
    if !(1..=3).contains(&version) {
        return bad(format!("it is of VMDK version {version}"));
    }
    let compressed = flags & COMPRESSED != 0;
    if compressed && le16(&header, 77) != DEFLATE {
        return bad("its grains are compressed by a method that is not known");
    }
    let (grain, entries) = (le64(&header, 20), le32(&header, 44));
    if !GRAINS.contains(&grain) || !grain.is_power_of_two() || !ENTRIES.contains(&entries) {
        return bad(format!("its grains of {grain} sectors, {entries} a table, cannot be"));
    }
    let (size, directory) = (le64(&header, 12).checked_mul(SECTOR), le64(&header, 56).checked_mul(SECTOR));
    let (Some(size), Some(directory)) = (size, directory) else { return bad("its header cannot be") };
    let (size, grain) = (disk_size(size)?, grain * SECTOR);
    Ok(Vmdk { bytes, flags, size, grain, entries, directory, table: (0, Vec::new()) })
}

/// The text that says of which files the disk is made: it has to be this one alone.
fn check_descriptor(bytes: &Bytes, (at, len): (u64, u64)) -> Result<()> {
    let one_of_several =
        || bad("it is one of several files of a VMDK disk; `qemu-img convert` makes one of them");
    if at == 0 || len == 0 {
        return one_of_several();
    }
    if len > DESCRIPTOR {
        return bad(format!("its descriptor of {len} sectors cannot be"));
    }
    let mut text = vec![0; (len * SECTOR) as usize];
    bytes.fill(at.saturating_mul(SECTOR), &mut text, "its descriptor")?;
    let text = String::from_utf8_lossy(&text).to_ascii_lowercase();
    let value = |name: &str| {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        let mut values = lines.filter(|(have, _)| have.trim() == name);
        values.next().map(|(_, value)| value.trim().trim_matches('"').to_owned()).unwrap_or_default()
    };
    let kind = value("createtype");
    if kind.is_empty() {
        return one_of_several();
    }
    if !matches!(&*kind, "monolithicsparse" | "streamoptimized") {
        return bad(format!(
            "it is a VMDK disk of the type '{kind}'; convert it by `qemu-img convert -O qcow2`"
        ));
    }
    if !matches!(&*value("parentcid"), "" | "ffffffff") {
        return bad("it lies on another VMDK disk (a snapshot's); flatten it first");
    }
    Ok(())
}

impl Vmdk {
    /// Where the grain of this number is, in bytes; `None` is a grain of zeros.
    fn place(&mut self, number: u64) -> Result<Option<u64>> {
        let entries = u64::from(self.entries);
        let (Some(table), Some(entry)) = (number.checked_div(entries), number.checked_rem(entries)) else {
            return bad("its tables are empty");
        };
        let at = table.checked_mul(4).and_then(|at| at.checked_add(self.directory));
        let Some(at) = at else { return bad("its directory cannot be") };
        let table = u64::from(u32::from_le_bytes(self.bytes.array(at, "its grain directory")?)) * SECTOR;
        if table == 0 {
            return Ok(None);
        }
        if self.table.0 != table {
            let mut entries = vec![0; self.entries as usize * 4];
            self.bytes.fill(table, &mut entries, "a grain table")?;
            self.table = (table, entries);
        }
        let entry = usize::try_from(entry).unwrap_or(usize::MAX).saturating_mul(4);
        Ok(match le32(&self.table.1, entry) {
            0 => None,
            1 if self.flags & ZERO_GRAINS != 0 => None,
            sector => Some(u64::from(sector) * SECTOR),
        })
    }

    /// A grain's bytes, unpacked.
    fn unpacked(&self, at: u64, first: u64) -> Result<Vec<u8>> {
        let marker: [u8; MARKER as usize] = self.bytes.array(at, "a grain")?;
        let (sector, len) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        if sector != first / SECTOR || len > 2 * self.grain + SECTOR {
            return bad(format!("the grain of sector {} is another's", first / SECTOR));
        }
        let mut packed = vec![0; len as usize];
        self.bytes.fill(at + MARKER, &mut packed, "a grain")?;
        let mut grain = vec![0; self.grain as usize];
        let ended = Decompress::new(true).decompress(&packed, &mut grain, FlushDecompress::Finish);
        match ended {
            Ok(Status::StreamEnd) => Ok(grain),
            _ => bad(format!("the grain of sector {sector} cannot be unpacked")),
        }
    }
}

impl Content for Vmdk {
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = buf.len();
        for (number, offset, part) in by_units(at, buf, self.grain) {
            match self.place(number)? {
                None => part.fill(0),
                Some(place) if self.flags & COMPRESSED == 0 => {
                    self.bytes.fill(place + offset, part, "a grain")?;
                }
                Some(place) => {
                    let grain = self.unpacked(place, number * self.grain)?;
                    part.iter_mut()
                        .zip(grain.iter().skip(offset as usize))
                        .for_each(|(to, from)| *to = *from);
                }
            }
        }
        Ok(len)
    }
}
