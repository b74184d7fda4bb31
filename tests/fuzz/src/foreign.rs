//! Disks as other programs keep them: a small one of each format, some of whose numbers become others, with its checksums made
//! right again. It is read or refused, and alike however it is read.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use hutch_imagestore::foreign::{self, Content};
use hutch_imagestore::store::Format;

/// Of a disk, so much is read.
const LOOK: u64 = 4 << 20;
const SECTOR: usize = 512;

/// A file, and the structures whose checksums are looked at: where each begins, its length, where its sum is.
struct Made {
    bytes: Vec<u8>,
    format: Format,
    /// Where there is something to change.
    places: Vec<(usize, usize)>,
    sums: fn(&mut [u8]),
    disk: u64,
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + what.len()) {
        to.copy_from_slice(what);
    }
}

/// A dynamic VHD of four blocks of 8 KiB, two of which are there.
fn vhd() -> Made {
    let mut bytes = vec![0; 512 + 1024 + 512 + 2 * (512 + 8192) + 512];
    let mut footer = [0; SECTOR];
    put(&mut footer, 0, b"conectix");
    put(&mut footer, 12, &0x10000_u32.to_be_bytes());
    put(&mut footer, 16, &512_u64.to_be_bytes());
    put(&mut footer, 40, &(32_u64 << 10).to_be_bytes());
    put(&mut footer, 48, &(32_u64 << 10).to_be_bytes());
    put(&mut footer, 60, &3_u32.to_be_bytes());
    put(&mut bytes, 0, &footer);
    put(&mut bytes, 512, b"cxsparse");
    put(&mut bytes, 512 + 16, &1536_u64.to_be_bytes());
    put(&mut bytes, 512 + 28, &4_u32.to_be_bytes());
    put(&mut bytes, 512 + 32, &8192_u32.to_be_bytes());
    for (entry, sector) in [4_u32, u32::MAX, 4 + 17, u32::MAX].iter().enumerate() {
        put(&mut bytes, 1536 + entry * 4, &sector.to_be_bytes());
    }
    for block in [2048, 2048 + 17 * 512] {
        put(&mut bytes, block, &[0xff, 0xf0]);
        put(&mut bytes, block + 512, &[7; 12 * 512]);
    }
    let end = bytes.len() - 512;
    put(&mut bytes, end, &footer);
    let sums = |bytes: &mut [u8]| {
        let end = bytes.len().saturating_sub(512);
        for (start, len, sum) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
            let Some(part) = bytes.get_mut(start..start + len) else { continue };
            put(part, sum, &[0; 4]);
            let all = !part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
            put(part, sum, &all.to_be_bytes());
        }
    };
    let places = vec![(end, 84), (512, 64), (1536, 16), (2048, 16), (2048 + 17 * 512, 16)];
    Made { bytes, format: Format::Vhd, places, sums, disk: 32 << 10 }
}

/// A VHDX of two blocks of 1 MiB, the second of which is there.
fn vhdx() -> Made {
    let guid = |text: u128| {
        let mut bytes = text.to_be_bytes();
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        bytes
    };
    let mut bytes = vec![0; 4 << 20];
    put(&mut bytes, 0, b"vhdxfile");
    for (copy, at) in [64 << 10, 128 << 10].into_iter().enumerate() {
        put(&mut bytes, at, b"head");
        put(&mut bytes, at + 8, &(copy as u64 + 1).to_le_bytes());
        put(&mut bytes, at + 66, &[1, 0]);
    }
    for at in [192 << 10, 256 << 10] {
        put(&mut bytes, at, b"regi");
        put(&mut bytes, at + 8, &2_u32.to_le_bytes());
        for (entry, id, place, len) in [
            (0, 0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08, 1_u64 << 20, 1_u32 << 20),
            (1, 0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e, 2 << 20, 1 << 20),
        ] {
            let at = at + 16 + entry * 32;
            put(&mut bytes, at, &guid(id));
            put(&mut bytes, at + 16, &place.to_le_bytes());
            put(&mut bytes, at + 24, &len.to_le_bytes());
            put(&mut bytes, at + 28, &[1]);
        }
    }
    // The table, whose second block is at 3 MiB.
    put(&mut bytes, (1 << 20) + 8, &((3_u64 << 20) | 6).to_le_bytes());
    let meta = 2 << 20;
    put(&mut bytes, meta, b"metadata");
    put(&mut bytes, meta + 10, &[3]);
    for (entry, id, value) in [
        (0, 0xcaa1_6737_fa36_4d43_b3b6_33f0_aa44_e76b, 1_u64 << 20),
        (1, 0x2fa5_4224_cd1b_4876_b211_5dbe_d83b_f4b8, 2 << 20),
        (2, 0x8141_bf1d_a96f_4709_ba47_f233_a8fa_ab5f, 512),
    ] {
        let at = meta + 32 + entry * 32;
        put(&mut bytes, at, &guid(id));
        put(&mut bytes, at + 16, &(65536 + entry as u32 * 8).to_le_bytes());
        put(&mut bytes, at + 20, &8_u32.to_le_bytes());
        put(&mut bytes, at + 24, &[4]);
        put(&mut bytes, meta + 65536 + entry * 8, &value.to_le_bytes());
    }
    put(&mut bytes, (3 << 20) + 5000, &[9; 700]);
    let sums = |bytes: &mut [u8]| {
        for (start, len) in
            [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 64 << 10), (256 << 10, 64 << 10)]
        {
            let Some(part) = bytes.get_mut(start..start + len) else { continue };
            put(part, 4, &[0; 4]);
            let sum = crc32c(part);
            put(part, 4, &sum.to_le_bytes());
        }
    };
    let places = vec![
        (64 << 10, 80),
        (128 << 10, 80),
        (192 << 10, 80),
        (256 << 10, 80),
        (1 << 20, 24),
        (meta, 128),
        (meta + 65536, 24),
    ];
    Made { bytes, format: Format::Vhdx, places, sums, disk: 2 << 20 }
}

fn crc32c(bytes: &[u8]) -> u32 {
    // By nibbles: 64 KiB four times an input.
    const TABLE: [u32; 16] = {
        let (mut table, mut i) = ([0; 16], 0);
        while i < 16 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 4 {
                crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    let nibble = |crc: u32| (crc >> 4) ^ TABLE[(crc & 15) as usize];
    !bytes.iter().fold(u32::MAX, |crc, byte| nibble(nibble(crc ^ u32::from(*byte))))
}

/// A sparse VMDK of eight grains of 4 KiB, two of which are there; or one for streams, whose grains are compressed.
fn vmdk(stream: bool) -> Made {
    let mut bytes = vec![0; 4 * SECTOR];
    put(&mut bytes, 0, b"KDMV");
    put(&mut bytes, 4, &(if stream { 3_u32 } else { 1 }).to_le_bytes());
    put(&mut bytes, 8, &(if stream { 0x3_0001_u32 } else { 7 }).to_le_bytes());
    put(&mut bytes, 12, &64_u64.to_le_bytes());
    put(&mut bytes, 20, &8_u64.to_le_bytes());
    put(&mut bytes, 28, &1_u64.to_le_bytes());
    put(&mut bytes, 36, &1_u64.to_le_bytes());
    put(&mut bytes, 44, &4_u32.to_le_bytes());
    put(&mut bytes, 56, &2_u64.to_le_bytes());
    put(&mut bytes, 77, &[u8::from(stream)]);
    let kind = if stream { "streamOptimized" } else { "monolithicSparse" };
    put(&mut bytes, SECTOR, format!("CID=1\nparentCID=ffffffff\ncreateType=\"{kind}\"\n").as_bytes());
    // The directory of two tables, and both of those, in the fourth sector.
    put(&mut bytes, 2 * SECTOR, &3_u32.to_le_bytes());
    put(&mut bytes, 2 * SECTOR + 4, &3_u32.to_le_bytes());
    for (entry, number) in [(1, 1_u64), (3, 3)] {
        let at = bytes.len();
        put(&mut bytes, 3 * SECTOR + entry * 4, &((at / SECTOR) as u32).to_le_bytes());
        let grain = [number as u8; 4096];
        if stream {
            let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            let _ = packed.write_all(&grain);
            let packed = packed.finish().unwrap_or_default();
            bytes.extend((number * 8).to_le_bytes());
            bytes.extend((packed.len() as u32).to_le_bytes());
            bytes.extend(packed);
        } else {
            bytes.extend(grain);
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    }
    // The second table is another, with nothing in it, or one that leads to the same grains would be refused for a stream.
    put(&mut bytes, 2 * SECTOR + 4, &[0; 4]);
    let places = vec![(0, 80), (SECTOR, 70), (2 * SECTOR, 8), (3 * SECTOR, 16), (4 * SECTOR, 32)];
    Made { bytes, format: Format::Vmdk, places, sums: |_| {}, disk: 32 << 10 }
}

/// What a file holds, read in steps.
fn read(content: &mut dyn Content, size: u64, step: usize) -> Option<Vec<u8>> {
    let mut disk = vec![0xee; size.min(LOOK) as usize];
    for (index, part) in disk.chunks_mut(step).enumerate() {
        let len = part.len();
        let count = content.read((index * step) as u64, part).ok()?;
        assert_eq!(count, len, "a read within the disk is whole");
    }
    Some(disk)
}

pub fn run(bytes: &[u8]) {
    thread_local! {
        static FILE: File = tempfile::tempfile().expect("a file");
    }
    let Some((&first, mut rest)) = bytes.split_first() else { return };
    let mut made = match first % 4 {
        0 => vhd(),
        1 => vhdx(),
        2 => vmdk(false),
        _ => vmdk(true),
    };
    let sums = first & 0x80 == 0;
    let whole = rest.is_empty() && sums;
    while let Some((&[place, at, kind, a, b, c], more)) = rest.split_first_chunk() {
        rest = more;
        let (start, len) = made.places[usize::from(place) % made.places.len()];
        let at = start + usize::from(at) % len;
        let number = u32::from_le_bytes([a, b, c, 0]);
        match kind % 8 {
            0 => put(&mut made.bytes, at, &[a]),
            1 => put(&mut made.bytes, at / 4 * 4, &number.to_le_bytes()),
            2 => put(&mut made.bytes, at / 4 * 4, &number.to_be_bytes()),
            3 => put(&mut made.bytes, at / 8 * 8, &(u64::from(number) << (b % 48)).to_le_bytes()),
            4 => put(&mut made.bytes, at / 8 * 8, &(u64::from(number) << (b % 48)).to_be_bytes()),
            5 => put(&mut made.bytes, at / 8 * 8, &[0xff; 8]),
            6 => put(&mut made.bytes, at, &[0; 4]),
            _ => {
                let len = (made.bytes.len() as u32).max(1);
                made.bytes.truncate(if a % 8 == 0 { number % len } else { len } as usize);
            }
        }
    }
    if sums {
        (made.sums)(&mut made.bytes);
    }
    FILE.with(|file| {
        file.set_len(0).and_then(|()| file.write_all_at(&made.bytes, 0)).expect("the file");
        let open = || foreign::open(file.try_clone().expect("the file"), made.format);
        let Ok(mut content) = open() else {
            assert!(!whole, "{:?} is refused as it was made", made.format);
            return;
        };
        let size = content.size().expect("these formats say how large the disk is");
        let once = read(&mut *content, size, 1 << 20);
        let again = open().ok().and_then(|mut other| read(&mut *other, size, 5 * SECTOR + 100));
        if let (Some(once), Some(again)) = (&once, &again) {
            assert!(once == again, "{:?} holds something else when it is read otherwise", made.format);
        }
        assert_eq!(once.is_some(), again.is_some(), "{:?} can only be read one way", made.format);
        if whole {
            let data = once.expect("it is read").iter().filter(|byte| **byte != 0).count();
            assert!(size == made.disk && data > 0, "{:?}: {size} bytes, {data} of data", made.format);
        }
    });
}
