//! VHD (Microsoft, "Virtual Hard Disk Image Format Specification", 1.0): fixed, which is a raw disk with a footer, or
//! dynamic, whose table leads to blocks, each with a bitmap of the sectors that were written.

use super::{Bytes, Content, Result, SECTOR, bad, be32, be64, by_units, disk_size};

const COOKIE: &[u8] = b"conectix";
const HEADER: &[u8] = b"cxsparse";
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
/// An entry of the table that leads nowhere.
const NONE: u32 = u32::MAX;
/// Sizes of a block in bytes that are believed.
const BLOCKS: std::ops::RangeInclusive<u32> = 4096..=256 << 20;

/// A disk of one file.
pub struct Vhd {
    bytes: Bytes,
    size: u64,
    blocks: Option<Blocks>,
}

/// Where a dynamic disk's blocks are.
struct Blocks {
    /// The table's offset in bytes, and its entries.
    table: u64,
    entries: u32,
    /// A block's size in bytes, and that of the bitmap before it.
    block: u64,
    bitmap: u64,
    /// The bitmap that was read last, by its offset in bytes.
    last: Option<(u64, Vec<u8>)>,
}

/// Whether a structure's checksum, at `at`, is its own: the complement of the sum of all its other bytes.
fn is_whole(bytes: &[u8], at: usize) -> bool {
    let own = bytes.iter().skip(at).take(4).map(|byte| u32::from(*byte)).sum::<u32>();
    let all = bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    !all.wrapping_sub(own) == be32(bytes, at)
}

pub fn open(bytes: Bytes) -> Result<Vhd> {
    // The footer is last; a dynamic disk has a copy in front, which is the one that a cut off file still has.
    let footer: [u8; 512] = bytes.array(bytes.len.saturating_sub(SECTOR), "its footer")?;
    if !footer.starts_with(COOKIE) {
        return bad("it has no VHD footer at its end; the image was cut off");
    }
    if !is_whole(&footer, 64) {
        return bad("its footer is damaged");
    }
    let size = disk_size(be64(&footer, 48))?;
    let blocks = match be32(&footer, 60) {
        FIXED if size <= bytes.len - SECTOR => None,
        FIXED => return bad("it is shorter than its footer says; the image was cut off"),
        DYNAMIC => Some(blocks(&bytes, be64(&footer, 16))?),
        4 => return bad("it lies on another VHD disk (a snapshot's); merge it first"),
        kind => return bad(format!("it is a VHD of the type {kind}")),
    };
    if let Some(blocks) = &blocks
        && u64::from(blocks.entries) < size.div_ceil(blocks.block)
    {
        return bad(format!("its table of {} blocks is too short for its size", blocks.entries));
    }
    Ok(Vhd { bytes, size, blocks })
}

fn blocks(bytes: &Bytes, at: u64) -> Result<Blocks> {
    let header: [u8; 1024] = bytes.array(at, "its header")?;
    if !header.starts_with(HEADER) || !is_whole(&header, 36) {
        return bad("its header is damaged");
    }
    let (table, entries, block) = (be64(&header, 16), be32(&header, 28), be32(&header, 32));
    if !BLOCKS.contains(&block) || !block.is_power_of_two() {
        return bad(format!("its blocks of {block} bytes cannot be"));
    }
    let block = u64::from(block);
    // A bit a sector, in whole sectors.
    let bitmap = (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR);
    Ok(Blocks { table, entries, block, bitmap, last: None })
}

impl Blocks {
    /// Fills `part`, which is `offset` bytes behind the begin of a block.
    fn read(&mut self, bytes: &Bytes, number: u64, offset: u64, part: &mut [u8]) -> Result<()> {
        let at = number.checked_mul(4).and_then(|at| at.checked_add(self.table));
        let Some(at) = at else { return bad("its table cannot be") };
        let sector = u32::from_be_bytes(bytes.array(at, "its table")?);
        if sector == NONE {
            part.fill(0);
            return Ok(());
        }
        let place = u64::from(sector) * SECTOR;
        let bitmap = match self.last.take() {
            Some((at, bitmap)) if at == place => bitmap,
            _ => {
                let mut bitmap = vec![0; self.bitmap as usize];
                bytes.fill(place, &mut bitmap, "a block")?;
                bitmap
            }
        };
        let (_, bitmap) = self.last.insert((place, bitmap));
        let data = place + self.bitmap;
        let written = |sector: u64| {
            let byte = bitmap.get((sector / 8) as usize).copied().unwrap_or(0);
            byte & (0x80 >> (sector % 8)) != 0
        };
        // All of them, mostly.
        if (offset / SECTOR..(offset + part.len() as u64).div_ceil(SECTOR)).all(written) {
            return bytes.fill(data + offset, part, "a block");
        }
        for (sector, skip, part) in by_units(offset, part, SECTOR) {
            match written(sector) {
                true => bytes.fill(data + sector * SECTOR + skip, part, "a block")?,
                false => part.fill(0),
            }
        }
        Ok(())
    }
}

impl Content for Vhd {
    fn size(&self) -> Option<u64> {
        Some(self.size)
    }

    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = buf.len();
        match &mut self.blocks {
            None => self.bytes.fill(at, buf, "the disk")?,
            Some(blocks) => {
                for (number, offset, part) in by_units(at, buf, blocks.block) {
                    blocks.read(&self.bytes, number, offset, part)?;
                }
            }
        }
        Ok(len)
    }
}
