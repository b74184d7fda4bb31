//! Packed clusters: read only; a volume never has any.

use std::io::Read;

use super::header::{Compression, Header};
use crate::store::Store;
use crate::{DiskError, Result};

/// The bytes of the cluster that `entry`, an L2 entry, describes.
pub(super) fn unpack(store: &dyn Store, header: &Header, entry: u64) -> Result<Vec<u8>> {
    let damaged = |why: &str| DiskError::format(format!("a compressed cluster {why}; the image is damaged"));
    // The offset takes the lower bits, then comes the number of further sectors (specification, "Compressed Clusters
    // Descriptor").
    let bits = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << bits) - 1);
    let sectors = entry >> bits & ((1 << (header.cluster_bits - 8)) - 1);
    let len = (sectors + 1) * 512 - offset % 512;
    let file = store.size().map_err(|e| DiskError::io("find the image's size", e))?;
    if offset >= file {
        return Err(damaged("lies past the end of the file"));
    }
    let mut packed = vec![0; len.min(file - offset) as usize];
    store.read_bytes(offset, &mut packed).map_err(|e| DiskError::io("read the image", e))?;

    let mut bytes = vec![0; header.cluster() as usize];
    match header.compression {
        Compression::Deflate => {
            let mut inflate = flate2::Decompress::new(false);
            let done = inflate.decompress(&packed, &mut bytes, flate2::FlushDecompress::Finish);
            if done.is_err() || inflate.total_out() != header.cluster() {
                return Err(damaged("does not unpack (deflate)"));
            }
        }
        Compression::Zstd => {
            let unpacked = zstd::stream::read::Decoder::with_buffer(&packed[..])
                .and_then(|decoder| decoder.single_frame().read_exact(&mut bytes));
            if unpacked.is_err() {
                return Err(damaged("does not unpack (zstd)"));
            }
        }
    }
    Ok(bytes)
}
