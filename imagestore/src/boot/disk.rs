//! From a guest's disk to the kernel, initrd and command line that it would boot next.
//!
//! Every ext2/3/4 and FAT file system of the disk is looked at in the order of the partition table; the first configuration
//! found decides. Sizes are bounded before anything is loaded, since a sparse file may claim any.

use std::io;
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error};
use hutch_blockdev::Disk;

use super::fat::{Fat, Found};
use super::grub::{Choice, Environment};
use super::{BootEntry, BootError, MAX_CONFIG, bls, extlinux, grub};
use crate::partition::{Slice, partitions};

/// The largest kernel that is loaded, in bytes.
pub const MAX_KERNEL: usize = 128 << 20;
/// The most that all initrds of an entry may have together, in bytes.
pub const MAX_INITRD: usize = 512 << 20;

/// Where GRUB keeps its directory: with `/boot` on the root file system or on its own; Debian's and Fedora's name.
const GRUB: [&str; 4] = ["/boot/grub", "/grub", "/boot/grub2", "/grub2"];
/// Where Boot Loader Specification entries are.
const BLS: [&str; 2] = ["/boot/loader/entries", "/loader/entries"];
/// Where extlinux.conf is.
const EXTLINUX: [&str; 4] = ["/boot/extlinux", "/extlinux", "/boot", "/"];

/// What a guest boots, loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFiles {
    /// The entry as the guest's configuration has it.
    pub entry: BootEntry,
    /// The kernel image.
    pub kernel: Vec<u8>,
    /// The initrds one after the other, each padded to 4 bytes as the kernel's unpacker needs; empty for none.
    pub initrd: Vec<u8>,
}

/// Why nothing could be loaded off a disk.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk itself could not be read.
    #[error("cannot read the guest's disk")]
    Disk(#[from] io::Error),
    /// No file system has a configuration where one is looked for.
    #[error(
        "no boot configuration on any of the disk's {0} ext4 and FAT file systems (grub.cfg, loader entries, extlinux.conf); \
         install a boot loader in the guest, or name a kernel"
    )]
    NoConfig(usize),
    /// There may be a configuration where it cannot be read.
    #[error(
        "no boot configuration on an ext4 or FAT file system of the disk, and its {0} is not read: name a kernel and an \
         initrd, or give the image a /boot of its own with ext4"
    )]
    Unread(&'static str),
    /// The configuration was found but not understood.
    #[error("cannot boot by {path}")]
    Config {
        /// The configuration's path.
        path: String,
        /// What is wrong with it.
        #[source]
        source: BootError,
    },
    /// The configuration names a file system that the disk does not have.
    #[error(
        "the boot entry's files are on the file system {uuid}, which is no ext4 or FAT file system of this disk"
    )]
    NoFileSystem {
        /// The UUID that was looked for.
        uuid: String,
    },
    /// A file could not be read, or its file system is broken.
    #[error("cannot read {path} on the guest's disk; check its file system")]
    File {
        /// The file's path.
        path: String,
        /// What the file system's reader says.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file is larger than any real one.
    #[error("{path} on the guest's disk has {size} bytes, more than the {limit} that are loaded")]
    TooLarge {
        /// The file's path.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: usize,
    },
}

/// Loads what `disk` boots by default.
///
/// # Errors
/// Those of [`ReadError`]. A file system that cannot be opened is passed over.
pub fn read(disk: &Arc<dyn Disk>) -> Result<BootFiles, ReadError> {
    let (volumes, at, entry) = find(disk)?;
    load(&volumes, at, entry)
}

/// Which entry `disk` boots by default. Of its files, nothing is read.
///
/// # Errors
/// Those of [`read`].
pub fn entry(disk: &Arc<dyn Disk>) -> Result<BootEntry, ReadError> {
    find(disk).map(|(_, _, entry)| entry)
}

/// The file systems of `disk`, the number of the one whose configuration decides, and what that says.
fn find(disk: &Arc<dyn Disk>) -> Result<(Vec<Volume>, usize, BootEntry), ReadError> {
    let mut volumes = Vec::new();
    let mut unread = None;
    for slice in partitions(disk)? {
        if let Some(uuid) = probe(&slice)? {
            let fs = Ext4::load(Box::new(slice));
            volumes.extend(fs.map(|fs| Volume { uuid, fs: Fs::Ext4(fs) }));
        } else if let Some(fs) = Fat::probe(&slice)? {
            volumes.push(Volume { uuid: fs.uuid.clone(), fs: Fs::Fat(fs) });
        } else {
            unread = unread.or(other(&slice)?);
        }
    }
    for (at, volume) in volumes.iter().enumerate() {
        if let Some(entry) = volume.entry()? {
            return Ok((volumes, at, entry));
        }
    }
    Err(unread.map_or(ReadError::NoConfig(volumes.len()), ReadError::Unread))
}

/// The name of a file system that distributions boot from and nobody here reads, by its magic number.
fn other(slice: &Slice) -> io::Result<Option<&'static str>> {
    for (name, at, magic) in [("XFS", 0, &b"XFSB"[..]), ("btrfs", 0x1_0040, b"_BHRfS_M")] {
        let mut found = [0; 8];
        let found = &mut found[..magic.len()];
        match slice.read_exact_at(at, found) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
            result => {
                result?;
                if found == magic {
                    return Ok(Some(name));
                }
            }
        }
    }
    Ok(None)
}

fn load(volumes: &[Volume], found_on: usize, entry: BootEntry) -> Result<BootFiles, ReadError> {
    let volume = match &entry.fs_uuid {
        None => volumes.get(found_on),
        Some(uuid) => volumes.iter().find(|volume| volume.uuid.eq_ignore_ascii_case(uuid)),
    };
    let volume = volume.ok_or_else(|| {
        let uuid = entry.fs_uuid.clone().unwrap_or_default();
        ReadError::NoFileSystem { uuid }
    })?;
    let kernel = volume.read(&entry.kernel, MAX_KERNEL)?;
    let mut initrd = Vec::new();
    for path in &entry.initrds {
        initrd.append(&mut volume.read(path, MAX_INITRD - initrd.len())?);
        initrd.resize(initrd.len().next_multiple_of(4).min(MAX_INITRD), 0);
    }
    Ok(BootFiles { entry, kernel, initrd })
}

/// The UUID of the ext2/3/4 file system on this slice, if there is one that fits on it (kernel,
/// filesystems/ext4/super). ext4-view sizes its tables by these numbers, so they are checked before.
pub(super) fn probe(slice: &Slice) -> io::Result<Option<String>> {
    let mut superblock = [0; 1024];
    match slice.read_exact_at(1024, &mut superblock) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    Ok(probe_superblock(&superblock, slice.size()))
}

fn probe_superblock(superblock: &[u8], size: u64) -> Option<String> {
    let le32 = |at: usize| Some(u32::from_le_bytes(*superblock.get(at..)?.first_chunk()?));
    let magic = u16::from_le_bytes(*superblock.get(0x38..)?.first_chunk()?);
    let block_size = 1024_u64.checked_shl(le32(0x18)?).filter(|size| (1024..=65536).contains(size))?;
    let is_64bit = le32(0x60)? & 0x80 != 0;
    let high = if is_64bit { u64::from(le32(0x150)?) } else { 0 };
    let blocks = (high << 32) | u64::from(le32(0x04)?);
    let fits = blocks.checked_mul(block_size)? <= size;
    // mke2fs makes no smaller groups.
    let sane = magic == 0xef53 && fits && le32(0x20)? >= 256;
    sane.then_some(uuid::Uuid::from_bytes(*superblock.get(0x68..)?.first_chunk()?).to_string())
}

/// A file system of the disk.
struct Volume {
    uuid: String,
    fs: Fs,
}

enum Fs {
    Ext4(Ext4),
    Fat(Fat),
}

impl Volume {
    /// The default entry of the first configuration on this file system.
    fn entry(&self) -> Result<Option<BootEntry>, ReadError> {
        for directory in GRUB {
            let path = format!("{directory}/grub.cfg");
            if let Some(text) = self.text(&path)? {
                return self.grub_entry(directory, &text, &path).map(Some);
            }
        }
        if let Some(entry) = self.bls_entry(None, &Environment::new())? {
            return Ok(Some(entry));
        }
        for directory in EXTLINUX {
            let path = format!("{}/extlinux.conf", directory.trim_end_matches('/'));
            if let Some(text) = self.text(&path)? {
                let entry = extlinux::choose(&text, directory);
                return entry.map(Some).map_err(|source| ReadError::Config { path, source });
            }
        }
        Ok(None)
    }

    fn grub_entry(&self, directory: &str, text: &str, path: &str) -> Result<BootEntry, ReadError> {
        let block = self.text(&format!("{directory}/grubenv"))?.unwrap_or_default();
        let mut environment = grub::parse_environment(&block);
        // For one boot only, and nobody here could clear it afterwards.
        environment.remove("next_entry");
        let config = |source| ReadError::Config { path: path.to_owned(), source };
        match grub::choose(text, &environment).map_err(config)? {
            Choice::Entry(entry) => Ok(entry),
            Choice::Bls(variables) => {
                let default = variables.get("default").map(String::as_str);
                self.bls_entry(default, &variables)?.ok_or_else(|| config(BootError::NoEntry))
            }
        }
    }

    fn bls_entry(
        &self,
        default: Option<&str>,
        variables: &Environment,
    ) -> Result<Option<BootEntry>, ReadError> {
        for directory in BLS {
            let config = |source| ReadError::Config { path: directory.to_owned(), source };
            let Some(names) = self.list(directory)? else { continue };
            let mut entries = Vec::new();
            for name in names.iter().filter(|name| name.to_ascii_lowercase().ends_with(".conf")) {
                if entries.len() < bls::MAX_ENTRIES {
                    let text = self.text(&format!("{directory}/{name}"))?.unwrap_or_default();
                    entries.push(bls::parse(name, &text).map_err(config)?);
                }
            }
            if !entries.is_empty() {
                // Without GRUB, systemd-boot's own configuration has the say.
                let loader = format!("{}/loader.conf", directory.trim_end_matches("/entries"));
                let loader = if default.is_none() { self.text(&loader)? } else { None };
                let default = default.or_else(|| bls::loader_default(loader.as_deref()?));
                return bls::choose(entries, default, variables).map(Some).map_err(config);
            }
        }
        Ok(None)
    }

    /// A configuration's text; `None` if there is no such file. Bytes that are no UTF-8 are replaced.
    fn text(&self, path: &str) -> Result<Option<String>, ReadError> {
        Ok(self.find(path, MAX_CONFIG)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn read(&self, path: &str, limit: usize) -> Result<Vec<u8>, ReadError> {
        self.find(path, limit)?.ok_or_else(|| file_error(path, io::Error::from(io::ErrorKind::NotFound)))
    }

    /// A file's bytes; `None` if there is no such file.
    fn find(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, ReadError> {
        let too_large = |size| ReadError::TooLarge { path: path.to_owned(), size, limit };
        let fs = match &self.fs {
            Fs::Ext4(fs) => fs,
            Fs::Fat(fs) => {
                return match fs.read(path, limit).map_err(|source| file_error(path, source))? {
                    Found::Bytes(bytes) => Ok(Some(bytes)),
                    Found::TooLarge(size) => Err(too_large(size)),
                    Found::Nothing => Ok(None),
                };
            }
        };
        let mut file = match fs.open(path) {
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
            file => file.map_err(|source| file_error(path, source))?,
        };
        let size = file.metadata().len();
        let len = usize::try_from(size).ok().filter(|len| *len <= limit).ok_or_else(|| too_large(size))?;
        let mut bytes = vec![0; len];
        let mut rest = bytes.as_mut_slice();
        while !rest.is_empty() {
            let count = file.read_bytes(rest).map_err(|source| file_error(path, source))?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            (_, rest) = rest.split_at_mut(count);
        }
        Ok(Some(bytes))
    }

    /// The names in a directory; `None` if there is no such directory.
    fn list(&self, directory: &str) -> Result<Option<Vec<String>>, ReadError> {
        let most = 4 * bls::MAX_ENTRIES;
        match &self.fs {
            Fs::Fat(fs) => fs.list(directory, most).map_err(|source| file_error(directory, source)),
            Fs::Ext4(fs) => {
                let Ok(listing) = fs.read_dir(directory) else { return Ok(None) };
                let names = listing.take(most).map(|file| file.map(|f| f.file_name().display().to_string()));
                let names = names.collect::<Result<_, _>>();
                names.map(Some).map_err(|source| file_error(directory, source))
            }
        }
    }
}

fn file_error(path: &str, source: impl std::error::Error + Send + Sync + 'static) -> ReadError {
    ReadError::File { path: path.to_owned(), source: Box::new(source) }
}
