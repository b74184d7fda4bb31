//! What a backup says of itself.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{BackupError, Result, io_error};
use crate::store;

/// The manifest's name in a backup.
pub const MANIFEST: &str = "manifest.json";
/// How this program writes manifests. Another meaning is another number.
pub const FORMAT: u32 = 1;

/// What is in a backup. It is written when everything else is durable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`] of the program that made it.
    pub format: u32,
    /// The version of that program.
    pub program: String,
    /// When it was done.
    pub created: Timestamp,
    /// The regions.
    pub regions: Vec<RegionEntry>,
    /// The directories below `state/`, with their modes.
    pub directories: BTreeMap<String, u32>,
    /// The files below `state/`.
    pub files: BTreeMap<String, Entry>,
}

/// A region of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionEntry {
    /// Its name.
    pub name: String,
    /// The version of its store.
    pub store: i64,
    /// How many instances it has, terminated ones aside.
    pub instances: usize,
    /// How many volumes it has.
    pub volumes: usize,
}

/// A file of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Bytes.
    pub size: u64,
    /// Its permissions.
    pub mode: u32,
    /// SHA-256 of its bytes, in hexadecimal.
    pub sha256: String,
    /// It never changes: two names may share its bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fixed: bool,
    /// It is another name of this file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
}

impl Manifest {
    /// How many keys of encrypted volumes are in it, wrapped. What wraps them is not in it.
    pub fn keys(&self) -> usize {
        self.files.keys().filter(|name| name.contains("/host/keys/")).count()
    }

    /// Bytes of all files, each counted once.
    pub fn bytes(&self) -> u64 {
        self.files.values().filter(|entry| entry.link.is_none()).map(|entry| entry.size).sum()
    }

    /// Writes it into a backup that is otherwise complete.
    pub(super) fn write(&self, backup: &Path) -> Result<()> {
        let path = backup.join(MANIFEST);
        let new = backup.join(format!("{MANIFEST}.new"));
        let write = || -> io::Result<()> {
            let mut file = File::options().create_new(true).write(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&new, &path)?;
            File::open(backup)?.sync_all()
        };
        write().map_err(io_error("write", &path))
    }

    /// Reads a backup's. Its names lie below the backup, and this program knows what it holds.
    ///
    /// # Errors
    /// [`BackupError::NoManifest`], [`BackupError::BadManifest`], [`BackupError::BadName`], [`BackupError::Newer`].
    pub fn read(backup: &Path) -> Result<Manifest> {
        let path = backup.join(MANIFEST);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(BackupError::NoManifest(backup.to_owned()));
            }
            text => text.map_err(io_error("read", &path))?,
        };
        let bad = |source| BackupError::BadManifest { path: path.clone(), source };
        // The format first: what else there is depends on it.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
            program: String,
        }
        let Head { format, program } = serde_json::from_slice(&text).map_err(bad)?;
        let newer = BackupError::Newer { path: backup.to_owned(), program };
        if format > FORMAT {
            return Err(newer);
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(bad)?;
        if manifest.regions.iter().any(|region| region.store > store::VERSION) {
            return Err(newer);
        }
        let links = manifest.files.values().filter_map(|entry| entry.link.as_ref());
        let names = manifest.files.keys().chain(manifest.directories.keys()).chain(links);
        if let Some(name) = names.into_iter().find(|name| !is_below(name)) {
            return Err(BackupError::BadName { path, name: name.clone() });
        }
        Ok(manifest)
    }
}

/// Whether a name is of something below the directory it is joined to.
fn is_below(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}
