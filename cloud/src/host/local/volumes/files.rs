//! Files that are whole or not there, and what is said when one cannot be had.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hutch_blockdev::{Disk, DiskError, DiskErrorKind};

use super::super::super::{HostError, Result};

/// Names that end so are of files that are being written.
const NEW: &str = "new";
/// A disk is copied in steps of this many bytes.
const STEP: u64 = 1 << 20;
/// Zeros of this many bytes become a hole of the copy.
const HOLE: usize = 64 << 10;

static ZEROS: [u8; HOLE] = [0; HOLE];

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

/// Hands on, piece by piece, what of a disk is not zero.
pub(super) fn each_piece(
    from: &dyn Disk,
    mut job: impl FnMut(u64, &[u8]) -> std::result::Result<(), DiskError>,
) -> std::result::Result<(), DiskError> {
    let mut buffer = vec![0; STEP as usize];
    let mut at = 0;
    while at < from.size() {
        let zeros = from.zeros_at(at)?;
        if zeros > 0 {
            at += zeros;
            continue;
        }
        let count = STEP.min(from.size() - at);
        let part = buffer.get_mut(..count as usize).unwrap_or_default();
        from.read_at(at, part)?;
        for (index, piece) in part.chunks(HOLE).enumerate() {
            if ZEROS.get(..piece.len()) != Some(piece) {
                job(at + (index * HOLE) as u64, piece)?;
            }
        }
        at += count;
    }
    Ok(())
}

/// Copies what is not zero into a raw file.
pub(super) fn copy(from: &dyn Disk, to: &File) -> std::result::Result<(), DiskError> {
    let write_failed = |e| DiskError::io("write the snapshot", e);
    to.set_len(from.size()).map_err(write_failed)?;
    each_piece(from, |at, piece| to.write_all_at(piece, at).map_err(write_failed))
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
