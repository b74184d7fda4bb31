//! A copy of all that a daemon keeps, made while it serves, and a state made of such a copy.
//!
//! ```text
//!   no verb is done: stores copied, files of hosts pinned ──► files copied (target.rs), a guest held while its disks are
//!                    ──► all made durable and digested ──► manifest.json (manifest.rs), written last
//!   restore.rs: the manifest is checked against all files ──► a new directory ──► renamed
//! ```
//! A backup is a directory: `manifest.json`, and below `state/` what a state holds, by the same names. Without a manifest it
//! is none: it was cut off.

mod manifest;
mod restore;
mod target;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use jiff::Timestamp;

use crate::host::HostError;
use crate::model::{Instance, Volume};
use crate::region::Region;
use crate::store::{self, StoreError};

pub use manifest::{Entry, FORMAT, MANIFEST, Manifest, RegionEntry};
pub use restore::{check, restore};
pub use target::{Target, allocated};

/// Where the files of a state are, below a backup.
const STATE: &str = "state";

/// Why there is no backup, or no state of it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file system's.
    #[error("cannot {what} {path}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// There is something already.
    #[error("{0} is not empty; name a directory that is not there yet")]
    NotEmpty(PathBuf),
    /// A file system's own directory.
    #[error("{0} is a mount point, and no other directory can be put in its place; name one below it")]
    Mounted(PathBuf),
    /// A backup within what it is of.
    #[error("{0} lies in the state that is backed up; name a directory outside of it")]
    Inside(PathBuf),
    /// No manifest.
    #[error("{0} has no manifest.json: it is no backup, or one that was cut off; take another one")]
    NoManifest(PathBuf),
    /// A manifest that is none.
    #[error("the manifest {path} cannot be read; take another backup")]
    BadManifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A manifest that names files outside of the backup.
    #[error("the manifest {path} names {name:?}, which is no file of a backup; take another backup")]
    BadName {
        /// The manifest.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// A newer program's.
    #[error("{path} was made by hutch {program}, whose backups or stores are newer; use that hutch")]
    Newer {
        /// The backup.
        path: PathBuf,
        /// The program's version.
        program: String,
    },
    /// Files that are not as the manifest has them.
    #[error("{path} is damaged, nothing is restored; take another backup. Not as they were: {}", files.join(", "))]
    Damaged {
        /// The backup.
        path: PathBuf,
        /// What is wrong with which files.
        files: Vec<String>,
    },
    /// Somebody does the same just now.
    #[error("{0} is being made by another hutch; wait for it")]
    Busy(PathBuf),
    /// It was told to end.
    #[error("it was stopped before it was done")]
    Stopped,
    /// The store's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host's.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The records cannot be read.
    #[error("{0}")]
    Records(String),
}

/// What this module's functions return.
pub type Result<T> = std::result::Result<T, BackupError>;

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BackupError + use<'a> {
    move |source| BackupError::Io { what, path: path.to_owned(), source }
}

/// How far it is: bytes that are looked at, once to be copied and once to be digested.
#[derive(Debug, Default)]
pub struct Progress {
    total: AtomicU64,
    done: AtomicU64,
    stopped: AtomicBool,
}

impl Progress {
    /// Bytes that are done, and all of them.
    pub fn figures(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
    }

    /// Has it end soon, with [`BackupError::Stopped`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, bytes: u64) -> Result<()> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        match self.stopped.load(Ordering::Relaxed) {
            true => Err(BackupError::Stopped),
            false => Ok(()),
        }
    }
}

/// What a host has at one moment, to be copied while it goes on: what is removed meanwhile can be copied all the same.
pub trait Captured: Send {
    /// Bytes that will be copied, about, and digested.
    fn bytes(&self) -> u64;

    /// Copies it to `dir` of the target as a host would find it that went down at that moment: its machines have ended so.
    /// A volume is as it was at some moment since, all those of a machine at the same one.
    ///
    /// # Errors
    /// The target's; a machine that cannot be held.
    fn copy(&self, target: &mut Target<'_>, dir: &str) -> Result<()>;
}

/// Makes a backup of these regions, and of the files that their owner keeps in `state`, in the new directory `to`.
///
/// # Errors
/// What failed; nothing is left in `to` then.
pub fn run(
    regions: &BTreeMap<String, Arc<Region>>,
    state: &Path,
    to: &Path,
    progress: &Progress,
) -> Result<Manifest> {
    begin(state, to)?;
    let made = make(regions, state, to, progress);
    if made.is_err() {
        // What stays has no manifest, and so is no backup.
        let _ = fs::remove_dir_all(to.join(STATE));
        let _ = fs::remove_dir(to);
    }
    made
}

/// Makes the directory; nothing is in it.
fn begin(state: &Path, to: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(to).map_err(io_error("make", to))?;
    if fs::read_dir(to).map_err(io_error("read", to))?.next().is_some() {
        return Err(BackupError::NotEmpty(to.to_owned()));
    }
    let real = |path: &Path| path.canonicalize().map_err(io_error("find", path));
    if real(to)?.starts_with(real(state)?) {
        let _ = fs::remove_dir(to);
        return Err(BackupError::Inside(to.to_owned()));
    }
    Ok(())
}

fn make(
    regions: &BTreeMap<String, Arc<Region>>,
    state: &Path,
    to: &Path,
    progress: &Progress,
) -> Result<Manifest> {
    let mut target = Target::new(to.join(STATE), progress)?;
    for path in owned(state)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        target.file(&path, &name, false)?;
    }
    let mut stores = Vec::new();
    for name in regions.keys() {
        stores.push((name, target.place(&format!("{name}/store.db"))?));
    }
    // Records and files of one moment: what a record points to is pinned before any verb can remove it.
    let captured = Region::at_rest(regions, || -> Result<Vec<_>> {
        for (region, (_, path)) in regions.values().zip(&stores) {
            region.store().backup(path)?;
        }
        regions.iter().map(|(name, region)| Ok((name, region.host().capture()?))).collect()
    })?;
    for (name, _) in &stores {
        target.made(&format!("{name}/store.db"))?;
    }
    captured.iter().for_each(|(_, captured)| progress.expect(captured.bytes()));
    for (name, captured) in &captured {
        captured.copy(&mut target, &format!("{name}/host"))?;
    }
    drop(captured);

    let mut told = Vec::new();
    for (name, path) in &stores {
        told.push(records(name, path)?);
    }
    let (files, directories) = target.seal()?;
    let manifest = Manifest {
        format: FORMAT,
        program: env!("CARGO_PKG_VERSION").into(),
        created: Timestamp::now(),
        regions: told,
        directories,
        files,
    };
    manifest.write(to)?;
    Ok(manifest)
}

/// The files of a state that are its owner's: keys, limits, types, prices.
fn owned(state: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(state).map_err(io_error("read", state))? {
        let path = entry.map_err(io_error("read", state))?.path();
        let kind = path.extension().is_some_and(|kind| kind == "toml" || kind == "json");
        if kind && fs::symlink_metadata(&path).map_err(io_error("read", &path))?.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// What a person is told of a region's copied store.
fn records(name: &str, path: &Path) -> Result<RegionEntry> {
    let store = store::Sqlite::open(path)?;
    let count = |found: std::result::Result<usize, crate::fault::Fault>| {
        found.map_err(|fault| BackupError::Records(fault.to_string()))
    };
    Ok(RegionEntry {
        name: name.into(),
        store: store::VERSION,
        instances: count(crate::region::count(&store, |i: &Instance| !i.state.is_over()))?,
        volumes: count(crate::region::count(&store, |_: &Volume| true))?,
    })
}

#[cfg(test)]
mod tests;
