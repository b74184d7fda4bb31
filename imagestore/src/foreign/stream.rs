//! A raw disk that was compressed as a stream: gzip (RFC 1952), xz, zstd (RFC 8878). Its size shows at its end.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::rc::Rc;

use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;

use super::{Bytes, Content, Fault, Result, bad};
use crate::store::Format;

/// The most memory that an xz stream's dictionary may need, in KiB.
const XZ_KIB: u32 = 512 << 10;
/// The largest window of a zstd stream, as a power of two: 512 MiB.
const ZSTD_WINDOW: u32 = 29;
/// How much is read of the file at once, in bytes.
const BUFFER: usize = 256 << 10;
/// How formats begin that are no raw disk.
const OTHERS: [(&[u8], &str); 5] = [
    (b"QFI\xfb", "a qcow2 image"),
    (b"KDMV", "a VMDK image"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"QED\0", "a QED image"),
];

/// The file, which counts what is read of it.
struct Counted(File, Rc<Cell<u64>>);

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buf)?;
        self.1.set(self.1.get() + count as u64);
        Ok(count)
    }
}

/// A stream, unpacked.
pub struct Stream {
    from: Box<dyn Read>,
    taken: Rc<Cell<u64>>,
    len: u64,
    at: u64,
}

pub fn open(file: File, format: Format) -> Result<Stream> {
    let Bytes { mut file, len } = Bytes::new(file)?;
    let cannot = |error: io::Error| Fault::Host(format!("cannot read it: {error}"));
    io::Seek::rewind(&mut file).map_err(cannot)?;
    let taken = Rc::new(Cell::new(0));
    let packed = BufReader::with_capacity(BUFFER, Counted(file, taken.clone()));
    let from: Box<dyn Read> = match format {
        Format::RawGz => Box::new(MultiGzDecoder::new(packed)),
        Format::RawXz => Box::new(XzReader::new_mem_limit(packed, true, XZ_KIB)),
        _ => {
            let mut from = zstd::Decoder::with_buffer(packed).map_err(cannot)?;
            from.window_log_max(ZSTD_WINDOW).map_err(cannot)?;
            Box::new(from)
        }
    };
    Ok(Stream { from, taken, len, at: 0 })
}

impl Content for Stream {
    fn size(&self) -> Option<u64> {
        None
    }

    fn read(&mut self, at: u64, buf: &mut [u8]) -> Result<usize> {
        if at != self.at {
            return bad("a stream is read in order");
        }
        let mut count = 0;
        while let Some(rest) = buf.get_mut(count..).filter(|rest| !rest.is_empty()) {
            match self.from.read(rest) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // An error of the host comes through the decoder with its number.
                Err(e) => {
                    return Err(super::fault(&e, "it cannot be unpacked; it is damaged, or was cut off"));
                }
            }
        }
        let head = buf.get(..count).unwrap_or_default();
        if at == 0
            && let Some((_, what)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic))
        {
            return bad(format!("it is {what} that was compressed; unpack it first"));
        }
        self.at += count as u64;
        Ok(count)
    }

    fn taken(&self) -> Option<(u64, u64)> {
        Some((self.taken.get().min(self.len), self.len))
    }
}
