//! The header, and the gate that every image passes before anything else of it is believed (qcow2 specification,
//! docs/interop/qcow2.txt of QEMU).

use crate::store::Store;
use crate::{DiskError, Result, SECTOR};

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of a version 2 header.
const V2_LEN: usize = 72;
/// A header extension of ours (its type, then its length; QEMU passes over what it does not know): the guest's bytes are
/// encrypted, and this is what tells the key. It comes first, and the end of extensions after it.
const KEY_CHECK: [u8; 8] = *b"hKey\0\0\0\x10";
/// Where extensions begin in headers that we write, and how much of ours there is to write and to read.
const EXTENSIONS: usize = 104;
const WHOLE_LEN: usize = EXTENSIONS + 8 + 16 + 8;
/// Where the incompatible feature bits are, and which there are.
const FEATURES: u64 = 72;
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
/// The largest virtual disk, in bytes: 64 TiB, EBS's own limit.
pub const MAX_SIZE: u64 = 64 << 40;
/// The largest L1 table, in bytes (QEMU's limit too).
const MAX_L1: u64 = 32 << 20;
/// The largest refcount table, in bytes (QEMU's limit).
const MAX_REFTABLE: u64 = 8 << 20;

/// How compressed clusters are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Deflate,
    Zstd,
}

/// What an image's header says, checked.
#[derive(Debug, Clone)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// The virtual size in bytes.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table lies in the file.
    pub l1_offset: u64,
    /// Where the refcount table lies in the file.
    pub reftable_offset: u64,
    /// Its size in clusters.
    pub reftable_clusters: u32,
    /// log2 of a reference count's size in bits.
    pub refcount_order: u32,
    pub(super) compression: Compression,
    /// What tells the key that the guest's bytes are encrypted with; `None`: they are plain.
    pub(super) key_check: Option<[u8; 16]>,
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        self.0.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_be_bytes(*b))
    }
    fn u64(&self, at: usize) -> u64 {
        self.0.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
    }
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(DiskError::format(why))
}

impl Header {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_reach(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// Reads and checks the header of `store`.
    ///
    /// # Errors
    /// `Format`, with the reason: no qcow2 at all; a backing file or data file by name; encryption; internal snapshots;
    /// dirty or corrupt marks; unknown incompatible features; sizes and places that cannot be.
    pub fn read(store: &dyn Store) -> Result<Header> {
        let (header, marks) = Header::read_marked(store)?;
        for (bit, why) in [(DIRTY, "was not closed properly (dirty)"), (CORRUPT, "is marked corrupt")] {
            if marks & bit != 0 {
                return refuse(format!("the image {why}; repair it first (qemu-img check -r all)"));
            }
        }
        Ok(header)
    }

    /// Likewise of an image that is to be checked: with its dirty and corrupt marks, which do not stop that.
    pub(super) fn read_marked(store: &dyn Store) -> Result<(Header, u64)> {
        let len = store.size().map_err(|e| DiskError::io("find the image's size", e))?;
        let mut bytes = [0; WHOLE_LEN];
        store.read_bytes(0, &mut bytes).map_err(|e| DiskError::io("read the image's header", e))?;
        let f = Fields(&bytes);
        if !bytes.starts_with(MAGIC) {
            return refuse("the image is not a qcow2; state its real format");
        }
        if len < V2_LEN as u64 {
            return refuse("the image ends within its header; it was cut off, copy it again");
        }
        let version = f.u32(4);
        if !(2..=3).contains(&version) {
            return refuse(format!("the image is qcow2 version {version}; versions 2 and 3 are read"));
        }
        if f.u64(8) != 0 || f.u32(16) != 0 {
            return refuse("the image names a backing file; flatten it first (qemu-img convert)");
        }
        if f.u32(32) != 0 {
            return refuse("the image is encrypted; decrypt it first (qemu-img convert)");
        }
        if f.u32(60) != 0 {
            return refuse("the image has internal snapshots; flatten it first (qemu-img convert)");
        }
        let mut header = Header {
            version,
            cluster_bits: f.u32(20),
            size: f.u64(24),
            l1_entries: f.u32(36),
            l1_offset: f.u64(40),
            reftable_offset: f.u64(48),
            reftable_clusters: f.u32(56),
            refcount_order: 4,
            compression: Compression::Deflate,
            key_check: None,
        };
        if version == 3 {
            header.features(&f)?;
        }
        header.places(len)?;
        let marks = if version == 3 { f.u64(FEATURES as usize) & (DIRTY | CORRUPT) } else { 0 };
        Ok((header, marks))
    }

    /// Takes the dirty and corrupt marks away.
    pub(super) fn unmark(store: &dyn Store) -> std::io::Result<()> {
        let mut bytes = [0; 8];
        store.read_bytes(FEATURES, &mut bytes)?;
        store.write_bytes(FEATURES, &(u64::from_be_bytes(bytes) & !(DIRTY | CORRUPT)).to_be_bytes())
    }

    fn features(&mut self, f: &Fields<'_>) -> Result<()> {
        let incompatible = f.u64(FEATURES as usize);
        for (bit, why) in [
            (EXTERNAL_DATA, "keeps its data in another file; convert it first (qemu-img convert)"),
            (EXTENDED_L2, "has extended L2 entries; convert it first (qemu-img convert)"),
        ] {
            if incompatible & bit != 0 {
                return refuse(format!("the image {why}"));
            }
        }
        let unknown = incompatible & !(COMPRESSION_TYPE | DIRTY | CORRUPT);
        if unknown != 0 {
            return refuse(format!(
                "the image needs features that are not known here ({unknown:#x}); convert it (qemu-img convert)"
            ));
        }
        let (order, header_len) = (f.u32(96), f.u32(100));
        if order > 6 {
            return refuse(format!(
                "the image's reference counts have 2^{order} bits; at most 64 are possible"
            ));
        }
        if header_len < 104 || u64::from(header_len) > self.cluster_checked()? {
            return refuse(format!("the image's header claims {header_len} bytes"));
        }
        self.refcount_order = order;
        let extension = f.0.get(header_len as usize..).and_then(|rest| rest.strip_prefix(&KEY_CHECK));
        self.key_check = extension.and_then(|check| check.first_chunk().copied());
        if incompatible & COMPRESSION_TYPE != 0 {
            self.compression = match f.0.get(104) {
                Some(0) => Compression::Deflate,
                Some(1) => Compression::Zstd,
                kind => return refuse(format!("the image is compressed in an unknown way ({kind:?})")),
            };
        }
        Ok(())
    }

    fn cluster_checked(&self) -> Result<u64> {
        match self.cluster_bits {
            9..=21 => Ok(1 << self.cluster_bits),
            bits => refuse(format!("the image's clusters have 2^{bits} bytes; 2^9 to 2^21 are possible")),
        }
    }

    /// Sizes and places, against each other and against the file.
    fn places(&self, len: u64) -> Result<()> {
        let cluster = self.cluster_checked()?;
        if self.size > MAX_SIZE {
            return refuse(format!("the image claims {} bytes; disks have at most 64 TiB", self.size));
        }
        if !self.size.is_multiple_of(SECTOR) {
            return refuse(format!("the image's size, {} bytes, is no multiple of 512", self.size));
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if u64::from(self.l1_entries) < self.size.div_ceil(self.l2_reach()) || l1_bytes > MAX_L1 {
            return refuse(format!(
                "the image's L1 table of {} entries does not fit a disk of {} bytes; get it again",
                self.l1_entries, self.size
            ));
        }
        let inside = |offset: u64, bytes: u64| offset.checked_add(bytes).is_some_and(|end| end <= len);
        let table = |name: &str, offset: u64, bytes: u64| {
            if !offset.is_multiple_of(cluster) || (bytes > 0 && offset < cluster) {
                return refuse(format!("the image's {name} is at {offset:#x}, where none can be"));
            }
            if !inside(offset, bytes) {
                return refuse(format!(
                    "the image's {name} reaches past the end of the file; it was cut off"
                ));
            }
            Ok(())
        };
        table("L1 table", self.l1_offset, l1_bytes)?;
        let reftable = u64::from(self.reftable_clusters) * cluster;
        if reftable > MAX_REFTABLE.max(cluster) {
            return refuse("the image's refcount table is larger than any real one; get it again");
        }
        table("refcount table", self.reftable_offset, reftable)
    }

    /// The header's bytes, as version 3 without extensions but ours.
    pub(super) fn to_bytes(&self) -> [u8; WHOLE_LEN] {
        let mut bytes = [0; WHOLE_LEN];
        let mut put = |at: usize, value: &[u8]| {
            bytes.iter_mut().skip(at).zip(value).for_each(|(to, from)| *to = *from);
        };
        put(0, MAGIC);
        put(4, &3u32.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &self.l1_entries.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.reftable_offset.to_be_bytes());
        put(56, &self.reftable_clusters.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &(EXTENSIONS as u32).to_be_bytes());
        if let Some(check) = &self.key_check {
            put(EXTENSIONS, &KEY_CHECK);
            put(EXTENSIONS + KEY_CHECK.len(), check);
        }
        bytes
    }
}
