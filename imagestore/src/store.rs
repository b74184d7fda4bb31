//! Where templates are kept, and the kernels and RAM disks that machines can be started with, each a directory that
//! nobody can write:
//!
//! ```text
//!   <state>/images/
//!     .lock                      taken for every change, for moments only
//!     .new-ami-…/                an import under way (locked by it), or what a crash left of one
//!     .gone-ami-…/               a removal under way, or what a crash left of one
//!     ami-0123456789abcdef0/     mode 0555
//!       disk.raw                 mode 0444; sparse, zeros are holes
//!       record.json              mode 0444; a `Record`
//!     aki-0123456789abcdef0/     likewise, with kernel.raw
//!     ari-0123456789abcdef0/     likewise, with ramdisk.raw
//! ```
//! The id of a kernel or a RAM disk says its name and its content: it is the same wherever and whenever that is imported.
//!
//! A template appears and goes by one rename, so that there is never half of one. What a crash left is taken away by
//! the next [`Store::open`].

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The record's file in a template's directory.
const RECORD: &str = "record.json";
const NEW: &str = ".new-";
const GONE: &str = ".gone-";
/// The longest name of an image, in bytes (EC2, RegisterImage: 3 to 128 characters).
const NAME_LEN: std::ops::RangeInclusive<usize> = 3..=128;
/// The largest record that is read, in bytes.
const MAX_RECORD: u64 = 64 << 10;

/// The format of a file that holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU's qcow2, version 2 or 3.
    Qcow2,
    /// A raw disk, compressed by gzip.
    #[serde(rename = "raw.gz")]
    RawGz,
    /// A raw disk, compressed by xz.
    #[serde(rename = "raw.xz")]
    RawXz,
    /// A raw disk, compressed by zstd.
    #[serde(rename = "raw.zst")]
    RawZst,
    /// VMware's, in one file.
    Vmdk,
    /// Microsoft's first, fixed or dynamic.
    Vhd,
    /// Microsoft's second.
    Vhdx,
}

/// What an image is, spelt as EC2's image types are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A disk.
    #[default]
    Machine,
    /// A kernel, as `hutch-vmm` loads it.
    Kernel,
    /// What a kernel unpacks as its first file system.
    Ramdisk,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Machine, Kind::Kernel, Kind::Ramdisk];

    /// What its ids begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Kind::Machine => "ami",
            Kind::Kernel => "aki",
            Kind::Ramdisk => "ari",
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Machine => "machine",
            Kind::Kernel => "kernel",
            Kind::Ramdisk => "ramdisk",
        }
    }

    /// Its content's file in an image's directory.
    fn file(self) -> &'static str {
        match self {
            Kind::Machine => "disk.raw",
            Kind::Kernel => "kernel.raw",
            Kind::Ramdisk => "ramdisk.raw",
        }
    }

    /// Of which kind a well-formed id is: its prefix and 17 hexadecimal digits.
    pub fn of_id(id: &str) -> Option<Kind> {
        let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
        let (kind, digits) = Kind::ALL.into_iter().find_map(|kind| Some((kind, kind.digits_of(id)?)))?;
        (digits.len() == 17 && digits.bytes().all(digit)).then_some(kind)
    }

    /// What is behind its prefix.
    fn digits_of(self, id: &str) -> Option<&str> {
        id.strip_prefix(self.prefix())?.strip_prefix('-')
    }

    /// Whether a text begins as an id does.
    fn begins(text: &str) -> bool {
        Kind::ALL.into_iter().any(|kind| kind.digits_of(text).is_some())
    }
}

/// The processor that an image is for, spelt as EC2 does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// 64-bit x86.
    X86_64,
}

/// What is known of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `ami-`, `aki-` or `ari-`, and 17 hexadecimal digits.
    pub id: String,
    /// What it is.
    #[serde(default)]
    pub kind: Kind,
    /// The name, unique in its store.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The format of the file that it was made from. The template itself is always raw.
    pub source_format: Format,
    /// SHA-256 of the file that it was made from, in lower-case hexadecimal.
    pub source_sha256: String,
    /// Its size in bytes; a disk's is a multiple of 512.
    pub virtual_size: u64,
    /// The processor it is for.
    pub architecture: Architecture,
}

/// A template in its store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// What is known of it.
    pub record: Record,
    directory: PathBuf,
}

impl Image {
    /// Its content, for reading only: a raw disk, the base of overlays; or a kernel, or a RAM disk.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(self.record.kind.file())
    }
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host's file system failed.
    #[error("cannot {what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// No image goes by this.
    #[error("no image '{0}'; see which there are with `hutch image ls`")]
    NotFound(String),
    /// Several images' ids begin with this.
    #[error("'{prefix}' could be any of {}; give more of the id", ids.join(", "))]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// The ids that begin so.
        ids: Vec<String>,
    },
    /// The name is in use.
    #[error("the name '{name}' is {id}'s; choose another, or remove that image first")]
    NameTaken {
        /// The name.
        name: String,
        /// The image that has it.
        id: String,
    },
    /// The name is no name.
    #[error(
        "'{0}' is no name for an image: 3 to 128 letters, digits, spaces or any of ()[]./-'@_ as EC2 has it, not \
         in the form of an id"
    )]
    BadName(String),
    /// A record that this store did not write, or that was damaged.
    #[error("the record {path} is broken; remove the image and import it again")]
    BadRecord {
        /// The record's path.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Io { what, path: path.to_owned(), source }
}

/// The templates of one host.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store in `<state>/images`, makes it where there is none, and takes away what a crash left.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(state: &Path) -> Result<Store, StoreError> {
        let root = state.join("images");
        fs::create_dir_all(&root).map_err(io_error("make", &root))?;
        let store = Store { root };
        let _lock = store.lock()?;
        store.clean()?;
        Ok(store)
    }

    /// Where the templates are.
    pub fn directory(&self) -> &Path {
        &self.root
    }

    /// All images, the oldest first.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::BadRecord`].
    pub fn list(&self) -> Result<Vec<Image>, StoreError> {
        let mut images = Vec::new();
        for name in self.names()? {
            if Kind::of_id(&name).is_none() {
                continue;
            }
            match self.load(&name) {
                // Removed since the directory was listed.
                Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                image => images.push(image?),
            }
        }
        images.sort_by(|a, b| (a.record.created, &a.record.id).cmp(&(b.record.created, &b.record.id)));
        Ok(images)
    }

    /// The image with this id, this name, or the only one whose id begins so (as `ami-` and at least one digit).
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], and those of [`Store::list`].
    pub fn get(&self, id_or_name: &str) -> Result<Image, StoreError> {
        let images = self.list()?;
        let is_it = |image: &&Image| image.record.id == id_or_name || image.record.name == id_or_name;
        if let Some(image) = images.iter().find(is_it) {
            return Ok(image.clone());
        }
        let prefix = Kind::begins(id_or_name) && !id_or_name.ends_with('-');
        let fits = |image: &&Image| prefix && image.record.id.starts_with(id_or_name);
        let found: Vec<_> = images.iter().filter(fits).collect();
        match found.as_slice() {
            [] => Err(StoreError::NotFound(id_or_name.to_owned())),
            [image] => Ok((*image).clone()),
            several => Err(StoreError::Ambiguous {
                prefix: id_or_name.to_owned(),
                ids: several.iter().map(|image| image.record.id.clone()).collect(),
            }),
        }
    }

    /// Removes an image, named as for [`Store::get`]. Who has its disk open keeps it until it is closed.
    ///
    /// # Errors
    /// Those of [`Store::get`].
    pub fn remove(&self, id_or_name: &str) -> Result<Record, StoreError> {
        let _lock = self.lock()?;
        let image = self.get(id_or_name)?;
        let gone = self.root.join(format!("{GONE}{}", image.record.id));
        fs::rename(&image.directory, &gone).map_err(io_error("remove", &image.directory))?;
        sync(&self.root)?;
        delete(&gone)?;
        Ok(image.record)
    }

    /// Begins an image of this kind and name: an empty disk for [`Pending::disk`] to be filled and then committed. Dropped
    /// before that, nothing is left of it.
    ///
    /// # Errors
    /// [`StoreError::BadName`], [`StoreError::NameTaken`], [`StoreError::Io`].
    pub fn begin(&self, kind: Kind, name: &str) -> Result<Pending, StoreError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
        if !NAME_LEN.contains(&name.len()) || !name.chars().all(allowed) || Kind::begins(name) {
            return Err(StoreError::BadName(name.to_owned()));
        }
        let _lock = self.lock()?;
        self.check_free(name)?;
        let id = new_id(kind);
        let directory = self.root.join(format!("{NEW}{id}"));
        fs::DirBuilder::new().mode(0o700).create(&directory).map_err(io_error("make", &directory))?;
        let path = directory.join(kind.file());
        let disk = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let pending = disk.and_then(|disk| disk.try_lock().map_err(io::Error::from).map(|()| disk));
        match pending {
            Ok(disk) => Ok(Pending {
                store: self.clone(),
                id,
                kind,
                name: name.to_owned(),
                directory,
                disk,
                committed: false,
            }),
            Err(error) => {
                let _ = delete(&directory);
                Err(io_error("make", &path)(error))
            }
        }
    }

    fn check_free(&self, name: &str) -> Result<(), StoreError> {
        match self.list()?.into_iter().find(|image| image.record.name == name) {
            Some(image) => Err(StoreError::NameTaken { name: name.to_owned(), id: image.record.id }),
            None => Ok(()),
        }
    }

    /// Held for every change of which directories there are.
    fn lock(&self) -> Result<File, StoreError> {
        let path = self.root.join(".lock");
        let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let locked = open.and_then(|file| file.lock().map(|()| file));
        locked.map_err(io_error("lock", &path))
    }

    /// Deletes what imports and removals left that were cut off. An import that is alive holds its disk's lock.
    fn clean(&self) -> Result<(), StoreError> {
        for name in self.names()? {
            let directory = self.root.join(&name);
            if name.starts_with(NEW) {
                // One that cannot be looked at may be alive.
                let dead = |kind: Kind| match File::open(directory.join(kind.file())) {
                    Ok(disk) => disk.try_lock().is_ok(),
                    Err(error) => error.kind() == io::ErrorKind::NotFound,
                };
                if !Kind::ALL.into_iter().all(dead) {
                    continue;
                }
            } else if !name.starts_with(GONE) {
                continue;
            }
            delete(&directory)?;
        }
        Ok(())
    }

    fn names(&self) -> Result<Vec<String>, StoreError> {
        let read = || -> io::Result<Vec<String>> {
            let entries = fs::read_dir(&self.root)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
            Ok(entries.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
        };
        read().map_err(io_error("list", &self.root))
    }

    fn load(&self, id: &str) -> Result<Image, StoreError> {
        let directory = self.root.join(id);
        let path = directory.join(RECORD);
        let file = File::open(&path).map_err(io_error("open", &path))?;
        let record: Record = serde_json::from_reader(io::Read::take(file, MAX_RECORD))
            .map_err(|source| StoreError::BadRecord { path: path.clone(), source })?;
        Ok(Image { record, directory })
    }
}

/// What a finished disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The format of the file it was made from.
    pub format: Format,
    /// SHA-256 of that file.
    pub sha256: String,
    /// The processor it is for.
    pub architecture: Architecture,
}

/// An image in the making.
#[derive(Debug)]
pub struct Pending {
    store: Store,
    id: String,
    kind: Kind,
    name: String,
    directory: PathBuf,
    disk: File,
    committed: bool,
}

impl Pending {
    /// The disk to be filled: raw; or what else it is. Its length becomes the virtual size.
    pub fn disk(&self) -> &File {
        &self.disk
    }

    /// Makes it an image: durable, unwritable, and there for everybody, all by one rename.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`] where another was quicker, [`StoreError::Io`]. Nothing is left then.
    pub fn commit(mut self, origin: Origin) -> Result<Image, StoreError> {
        let path = self.directory.join(self.kind.file());
        let virtual_size = self.disk.metadata().map_err(io_error("read", &path))?.len();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let id = match self.kind {
            Kind::Machine => self.id.clone(),
            kind => id_of(kind, &self.name, &origin.sha256),
        };
        let record = Record {
            id: id.clone(),
            kind: self.kind,
            name: self.name.clone(),
            created,
            source_format: origin.format,
            source_sha256: origin.sha256,
            virtual_size,
            architecture: origin.architecture,
        };
        self.disk
            .set_permissions(Permissions::from_mode(0o444))
            .and_then(|()| self.disk.sync_all())
            .map_err(io_error("write", &path))?;
        self.write_record(&record)?;
        let directory = self.store.root.join(&id);
        fs::set_permissions(&self.directory, Permissions::from_mode(0o555))
            .map_err(io_error("write", &self.directory))?;
        sync(&self.directory)?;
        {
            let _lock = self.store.lock()?;
            self.store.check_free(&self.name)?;
            fs::rename(&self.directory, &directory).map_err(io_error("make", &directory))?;
            self.committed = true;
        }
        sync(&self.store.root)?;
        Ok(Image { record, directory })
    }

    fn write_record(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.directory.join(RECORD);
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(record)?;
            text.push(b'\n');
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path)?;
            file.write_all(&text)?;
            file.set_permissions(Permissions::from_mode(0o444))?;
            file.sync_all()
        };
        write().map_err(io_error("write", &path))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.committed {
            // What fails here is taken away by the next start.
            let _ = delete(&self.directory);
        }
    }
}

/// Makes the names in a directory durable.
fn sync(directory: &Path) -> Result<(), StoreError> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(io_error("write", directory))
}

/// Deletes a directory of ours, unwritable as it may be; without a descriptor, since there may be none left.
fn delete(directory: &Path) -> Result<(), StoreError> {
    fs::set_permissions(directory, Permissions::from_mode(0o700))
        .and_then(|()| {
            for file in Kind::ALL.map(Kind::file).into_iter().chain([RECORD]) {
                // What stays is in the way of the next step, which says so.
                let _ = fs::remove_file(directory.join(file));
            }
            fs::remove_dir(directory).or_else(|_| fs::remove_dir_all(directory))
        })
        .map_err(io_error("remove", directory))
}

/// A new id. Two UUIDs, because digits 13 and 17 of one are not random.
fn new_id(kind: Kind) -> String {
    let digits = || uuid::Uuid::new_v4().simple().to_string();
    format!("{}-{:.12}{:.5}", kind.prefix(), digits(), digits())
}

/// The id of this content under this name.
fn id_of(kind: Kind, name: &str, sha256: &str) -> String {
    let digest = format!("{:x}", Sha256::digest(format!("{name}/{sha256}")));
    format!("{}-0{digest:.16}", kind.prefix())
}

#[cfg(test)]
mod tests;
