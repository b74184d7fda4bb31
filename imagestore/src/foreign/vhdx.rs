//! VHDX (Microsoft, MS-VHDX): a header, regions, a table of the disk's blocks. What a log would still have to write is not
//! written here: such a disk was not closed, and is refused.

use uuid::{Uuid, uuid};

use super::{Bytes, Content, Result, bad, by_units, disk_size, le16, le32, le64};

/// 2.2: the copies of the header, and those of the region table, in bytes.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
/// 2.2.3.2
const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");
/// 2.6.2
const FILE_PARAMETERS: Uuid = uuid!("caa16737-fa36-4d43-b3b6-33f0aa44e76b");
const DISK_SIZE: Uuid = uuid!("2fa54224-cd1b-4876-b211-5dbed83bf4b8");
const SECTOR_SIZE: Uuid = uuid!("8141bf1d-a96f-4709-ba47-f233a8faab5f");
/// Items that say nothing about where bytes are: page 83, the physical sector's size, the parent's locator.
const OTHERS: [Uuid; 3] = [
    uuid!("beca12ab-b2e6-4523-93ef-c309e000c746"),
    uuid!("cda348c7-445d-4471-9cc9-e9885251c556"),
    uuid!("a8d35f2d-b30b-454d-abf7-d3d84834ab0c"),
];
/// 2.2.3 and 2.6.1: the most entries of either table.
const MAX_ENTRIES: u32 = 2047;
/// 2.6.2.1: a block's size in bytes.
const BLOCKS: std::ops::RangeInclusive<u64> = 1 << 20..=256 << 20;
/// 2.5.1.1: of an entry, its state and its place.
const STATE: u64 = 7;
const PLACE: u64 = !0xf_ffff;
/// Blocks that are whole in the file; in part, which only a disk with a parent has.
const PRESENT: u64 = 6;
const IN_PART: u64 = 7;

/// A disk of one file.
pub struct Vhdx {
    bytes: Bytes,
    size: u64,
    block: u64,
    /// Blocks between two entries of the table that are of bitmaps.
    chunk: u64,
    /// The table's offset and size in bytes.
    table: (u64, u64),
}

/// CRC-32C, which all structures of the format bear at their fourth byte, counted as zero.
fn is_whole(bytes: &[u8]) -> bool {
    let own = 4..8;
    let all = bytes.iter().enumerate().map(|(at, byte)| if own.contains(&at) { 0 } else { *byte });
    let step = |crc: u32, byte: u8| {
        let low = |crc: u32| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        (0..8).fold(crc ^ u32::from(byte), |crc, _| low(crc))
    };
    !all.fold(u32::MAX, step) == le32(bytes, 4)
}

fn guid(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(super::field(bytes, at))
}

pub fn open(bytes: Bytes) -> Result<Vhdx> {
    let mut header: Option<[u8; 4096]> = None;
    for at in HEADERS {
        let found: [u8; 4096] = bytes.array(at, "its header")?;
        let newer = header.is_none_or(|header| le64(&found, 8) > le64(&header, 8));
        if found.starts_with(b"head") && is_whole(&found) && newer {
            header = Some(found);
        }
    }
    let Some(header) = header else { return bad("both copies of its header are damaged") };
    if le16(&header, 66) != 1 {
        return bad(format!("it is of VHDX version {}", le16(&header, 66)));
    }
    if !guid(&header, 48).is_nil() {
        return bad(
            "it was not closed: what its log has is missing in it; open and close it where it was made",
        );
    }
    let (bat, metadata) = regions(&bytes)?;
    let (block, size, sector) = metadata_of(&bytes, metadata)?;
    if !BLOCKS.contains(&block) || !block.is_power_of_two() || ![512, 4096].contains(&sector) {
        return bad(format!("its blocks of {block} bytes, sectors of {sector}, cannot be"));
    }
    let (size, chunk) = (disk_size(size)?, (sector << 23) / block);
    let vhdx = Vhdx { bytes, size, block, chunk, table: bat };
    match vhdx.entry(size.div_ceil(block).saturating_sub(1)) {
        Some(at) if at + 8 <= bat.0 + bat.1 => Ok(vhdx),
        _ => bad("its table is too short for its size"),
    }
}

/// Where its table of blocks and its metadata are: offset and size in bytes.
fn regions(bytes: &Bytes) -> Result<((u64, u64), (u64, u64))> {
    let mut table = vec![0; 64 << 10];
    for at in REGIONS {
        bytes.fill(at, &mut table, "its region table")?;
        if table.starts_with(b"regi") && is_whole(&table) {
            break;
        }
        table.fill(0);
    }
    let (mut bat, mut metadata) = (None, None);
    for entry in
        table.get(16..).unwrap_or_default().chunks_exact(32).take(le32(&table, 8).min(MAX_ENTRIES) as usize)
    {
        let place = (le64(entry, 16), u64::from(le32(entry, 24)));
        if place.0.checked_add(place.1).is_none_or(|end| end > bytes.len) {
            return bad("a region is past the end of the file; the image was cut off");
        }
        match guid(entry, 0) {
            BAT => bat = Some(place),
            METADATA => metadata = Some(place),
            _ if le32(entry, 28) & 1 == 0 => {}
            other => return bad(format!("it needs a region that is not known ({other})")),
        }
    }
    match (bat, metadata) {
        (Some(bat), Some(metadata)) => Ok((bat, metadata)),
        _ => bad("its region tables are damaged"),
    }
}

/// The sizes of a block, of the disk and of a sector, in bytes.
fn metadata_of(bytes: &Bytes, (start, len): (u64, u64)) -> Result<(u64, u64, u64)> {
    let mut table = vec![0; 64 << 10];
    bytes.fill(start, &mut table, "its metadata")?;
    if !table.starts_with(b"metadata") {
        return bad("its metadata are damaged");
    }
    let (mut block, mut size, mut sector) = (0, 0, 0);
    let count = u32::from(le16(&table, 10)).min(MAX_ENTRIES) as usize;
    for entry in table.get(32..).unwrap_or_default().chunks_exact(32).take(count) {
        let (id, offset) = (guid(entry, 0), u64::from(le32(entry, 16)));
        let known = [FILE_PARAMETERS, DISK_SIZE, SECTOR_SIZE].contains(&id);
        if !known {
            // Bit 2: who does not know it may not read the disk.
            if le32(entry, 24) & 4 != 0 && !OTHERS.contains(&id) {
                return bad(format!("it needs an item that is not known ({id})"));
            }
            continue;
        }
        if offset.checked_add(8).is_none_or(|end| end > len) {
            return bad("its metadata are damaged");
        }
        let item: [u8; 8] = bytes.array(start + offset, "its metadata")?;
        match id {
            FILE_PARAMETERS if le32(&item, 4) & 2 != 0 => {
                return bad("it lies on another VHDX disk (a snapshot's); merge it first");
            }
            FILE_PARAMETERS => block = u64::from(le32(&item, 0)),
            DISK_SIZE => size = le64(&item, 0),
            _ => sector = u64::from(le32(&item, 0)),
        }
    }
    Ok((block, size, sector))
}

impl Vhdx {
    /// Where the entry of a block is, in bytes: behind each chunk is one of its bitmap.
    fn entry(&self, number: u64) -> Option<u64> {
        let index = number.checked_add(number.checked_div(self.chunk)?)?;
        index.checked_mul(8)?.checked_add(self.table.0)
    }
}

impl Content for Vhdx {
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = buf.len();
        for (number, offset, part) in by_units(at, buf, self.block) {
            let Some(entry) = self.entry(number) else { return bad("its table cannot be") };
            let entry = u64::from_le_bytes(self.bytes.array(entry, "its table")?);
            match entry & STATE {
                PRESENT => {
                    let Some(at) = (entry & PLACE).checked_add(offset) else {
                        return bad("its table cannot be");
                    };
                    self.bytes.fill(at, part, "a block")?;
                }
                IN_PART => return bad("it lies on another VHDX disk (a snapshot's); merge it first"),
                // Not present, undefined, zero, unmapped: nothing was written there, or it is gone.
                _ => part.fill(0),
            }
        }
        Ok(len)
    }
}
