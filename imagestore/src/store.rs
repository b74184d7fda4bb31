//! Where templates are kept, each a directory that nobody can write:
//!
//! ```text
//!   <state>/images/
//!     .lock                      taken for every change, for moments only
//!     .new-ami-…/                an import under way (locked by it), or what a crash left of one
//!     .gone-ami-…/               a removal under way, or what a crash left of one
//!     ami-0123456789abcdef0/     mode 0555
//!       disk.raw                 mode 0444; sparse, zeros are holes
//!       record.json              mode 0444; a `Record`
//! ```
//!
//! A template appears and goes by one rename, so that there is never half of one. What a crash left is taken away by
//! the next [`Store::open`].

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The disk's file in a template's directory.
const DISK: &str = "disk.raw";
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
    /// `ami-` and 17 hexadecimal digits.
    pub id: String,
    /// The name, unique in its store.
    pub name: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The format of the file that it was made from. The template itself is always raw.
    pub source_format: Format,
    /// SHA-256 of the file that it was made from, in lower-case hexadecimal.
    pub source_sha256: String,
    /// The disk's size in bytes; a multiple of 512.
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
    /// The raw disk, for reading only: the base of overlays.
    pub fn disk(&self) -> PathBuf {
        self.directory.join(DISK)
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
            if !is_id(&name) {
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

    /// The image with this id, this name, or the only one whose id begins so (`ami-` and at least one digit).
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`], and those of [`Store::list`].
    pub fn get(&self, id_or_name: &str) -> Result<Image, StoreError> {
        let images = self.list()?;
        let is_it = |image: &&Image| image.record.id == id_or_name || image.record.name == id_or_name;
        if let Some(image) = images.iter().find(is_it) {
            return Ok(image.clone());
        }
        let prefix = id_or_name.strip_prefix("ami-").is_some_and(|digits| !digits.is_empty());
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

    /// Begins an image of this name: an empty disk for [`Pending::disk`] to be filled and then committed. Dropped
    /// before that, nothing is left of it.
    ///
    /// # Errors
    /// [`StoreError::BadName`], [`StoreError::NameTaken`], [`StoreError::Io`].
    pub fn begin(&self, name: &str) -> Result<Pending, StoreError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "()[] ./-'@_".contains(c);
        if !NAME_LEN.contains(&name.len()) || !name.chars().all(allowed) || name.starts_with("ami-") {
            return Err(StoreError::BadName(name.to_owned()));
        }
        let _lock = self.lock()?;
        self.check_free(name)?;
        let id = new_id();
        let directory = self.root.join(format!("{NEW}{id}"));
        fs::DirBuilder::new().mode(0o700).create(&directory).map_err(io_error("make", &directory))?;
        let path = directory.join(DISK);
        let disk = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
        let pending = disk.and_then(|disk| disk.try_lock().map_err(io::Error::from).map(|()| disk));
        match pending {
            Ok(disk) => Ok(Pending {
                store: self.clone(),
                id,
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
                let dead = match File::open(directory.join(DISK)) {
                    Ok(disk) => disk.try_lock().is_ok(),
                    Err(error) => error.kind() == io::ErrorKind::NotFound,
                };
                if !dead {
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
    name: String,
    directory: PathBuf,
    disk: File,
    committed: bool,
}

impl Pending {
    /// The disk to be filled: raw. Its length becomes the virtual size.
    pub fn disk(&self) -> &File {
        &self.disk
    }

    /// Makes it an image: durable, unwritable, and there for everybody, all by one rename.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`] where another was quicker, [`StoreError::Io`]. Nothing is left then.
    pub fn commit(mut self, origin: Origin) -> Result<Image, StoreError> {
        let path = self.directory.join(DISK);
        let virtual_size = self.disk.metadata().map_err(io_error("read", &path))?.len();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = Record {
            id: self.id.clone(),
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
        let directory = self.store.root.join(&self.id);
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
            for file in [DISK, RECORD] {
                // What stays is in the way of the next step, which says so.
                let _ = fs::remove_file(directory.join(file));
            }
            fs::remove_dir(directory).or_else(|_| fs::remove_dir_all(directory))
        })
        .map_err(io_error("remove", directory))
}

fn is_id(name: &str) -> bool {
    let digit = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    name.strip_prefix("ami-").is_some_and(|digits| digits.len() == 17 && digits.bytes().all(digit))
}

/// A new id. Two UUIDs, because digits 13 and 17 of one are not random.
fn new_id() -> String {
    let digits = || uuid::Uuid::new_v4().simple().to_string();
    format!("ami-{:.12}{:.5}", digits(), digits())
}

#[cfg(test)]
mod tests;
