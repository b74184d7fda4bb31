//! Files that are whole or not there, and what is said when one cannot be had.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hutch_blockdev::{Disk, DiskError, DiskErrorKind};

use super::super::super::{HostError, Result};
use crate::export::each_piece;

/// Names that end so are of files that are being written.
const NEW: &str = "new";

/// `dir/id.extension`.
pub(super) fn path(dir: &Path, id: &str, extension: &str) -> Result<PathBuf> {
    let plain = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if id.is_empty() || !plain {
        return Err(HostError::Failed(format!("{id:?} is no id; one has letters, digits and -")));
    }
    Ok(dir.join(format!("{id}.{extension}")))
}

/// Makes a file that is whole and durable once it has its name.
pub fn write(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(NEW);
    let new = PathBuf::from(name);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&new);
    let file = file.map_err(|e| failed(&new, e))?;
    let done = fill(&file)
        .and_then(|()| file.sync_all().and_then(|()| fs::rename(&new, path)).map_err(|e| failed(path, e)));
    if done.is_err() {
        // It takes room that is needed; at the next start it would be removed too.
        let _ = fs::remove_file(&new);
    }
    done?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    }
}

/// Gives a file one more name, if it has not that one already.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    match fs::hard_link(from, to) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked.map_err(|e| cannot_link(from, to, e)),
    }
}

/// The host's error with one more name of a file.
pub fn cannot_link(from: &Path, to: &Path, error: io::Error) -> HostError {
    if error.kind() == io::ErrorKind::CrossesDevices {
        let (from, to) = (from.display(), to.display());
        return HostError::Failed(format!("{from} and {to} are on two file systems; keep both on one"));
    }
    failed(to, error)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed(dir, e))
}

/// What is in a directory.
///
/// # Errors
/// It cannot be read.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(|e| failed(dir, e))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(|e| failed(dir, e))).collect()
}

/// Whether a file's name ends so.
pub fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// Removes what is half written, and what `orphan` says.
pub(super) fn sweep(dir: &Path, orphan: impl Fn(&Path) -> bool) -> Result<()> {
    for path in files(dir)? {
        if has_extension(&path, NEW) || orphan(&path) {
            tracing::info!(path = %path.display(), "removing what was half done");
            remove(&path)?;
        }
    }
    Ok(())
}

/// Copies what is not zero into a raw file.
pub(super) fn copy(from: &dyn Disk, to: &File) -> std::result::Result<(), DiskError> {
    let write_failed = |e| DiskError::io("write the snapshot", e);
    to.set_len(from.size()).map_err(write_failed)?;
    each_piece(from, |_| Ok(()), |at, piece| to.write_all_at(piece, at).map_err(write_failed))
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// The host's error with a file.
pub fn failed(path: &Path, error: io::Error) -> HostError {
    let text = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HostError::NoRoom(text),
        _ => HostError::Failed(text),
    }
}

pub(super) fn disk_failed(volume: &str, error: &DiskError) -> HostError {
    let text = format!("the volume {volume}: {}", chain(error));
    match error.kind {
        DiskErrorKind::NoSpace => HostError::NoRoom(text),
        DiskErrorKind::Key => HostError::Key(text),
        _ => HostError::Failed(text),
    }
}
