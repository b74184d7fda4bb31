//! A snapshot as a file for other machines, and whether it is whole.
//!
//! A file is written under another name, made durable, digested as it lies there, and renamed; its checksum is beside it,
//! for `sha256sum -c`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hutch_blockdev::qcow2::{self, Checked};
use hutch_blockdev::{Disk, DiskError, Format, open_layers};
use sha2::{Digest, Sha256};

use crate::backup::{BackupError, Progress};
use crate::host::{HostError, Reader};

/// A disk is read in steps of this many bytes.
const STEP: u64 = 1 << 20;
/// Zeros of this many bytes are left out of the file.
const HOLE: usize = 64 << 10;

static ZEROS: [u8; HOLE] = [0; HOLE];

/// Why nothing came of it. Nothing is left of a file that was begun.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The host's file system.
    #[error("cannot {what} {path}")]
    Io {
        /// What was done.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk cannot be read, or the file not written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The host's.
    #[error(transparent)]
    Host(#[from] HostError),
    /// There is one already.
    #[error("{0} is there already; choose another name, or remove it")]
    Exists(PathBuf),
    /// It was told to end.
    #[error("it was stopped before it was done")]
    Stopped,
}

impl From<BackupError> for ExportError {
    fn from(_: BackupError) -> ExportError {
        // All that a progress says.
        ExportError::Stopped
    }
}

type Result<T> = std::result::Result<T, ExportError>;

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ExportError + use<'a> {
    move |source| ExportError::Io { what, path: path.to_owned(), source }
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The file's size in bytes.
    pub bytes: u64,
    /// The disk's.
    pub size: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
}

/// A layer that was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its name.
    pub name: String,
    /// What was found; `None`: it has no tables that could be wrong.
    pub found: Option<Checked>,
}

fn step(progress: &Progress) -> impl FnMut(u64) -> Result<()> {
    |bytes| Ok(progress.advance(bytes)?)
}

/// Hands on, piece by piece, what of a disk is not zeros, and tells how many bytes are done.
pub(crate) fn each_piece<E: From<DiskError>>(
    from: &dyn Disk,
    mut advance: impl FnMut(u64) -> std::result::Result<(), E>,
    mut job: impl FnMut(u64, &[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let (mut buffer, mut at) = (vec![0; STEP as usize], 0);
    while at < from.size() {
        let zeros = from.zeros_at(at)?.min(from.size() - at);
        if zeros > 0 {
            advance(zeros)?;
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
        advance(count)?;
        at += count;
    }
    Ok(())
}

/// Removes a file that did not become what it was to be.
struct Begun(Option<PathBuf>);

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = fs::remove_file(path);
        }
    }
}

fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Removes what exports left that were cut off: those that are noted in this directory.
///
/// # Errors
/// [`ExportError::Io`].
pub fn tidy(notes: &Path) -> Result<()> {
    let entries = match fs::read_dir(notes) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(io_error("read", notes))?,
    };
    for entry in entries {
        let note = entry.map_err(io_error("read", notes))?.path();
        let name = fs::read(&note).map_err(io_error("read", &note))?;
        let to = PathBuf::from(OsString::from_vec(name));
        // What has its name is whole, and so is its checksum.
        let sum = (!to.exists()).then(|| beside(&to, ".sha256"));
        for path in [Some(beside(&to, ".part")), sum].into_iter().flatten() {
            match fs::remove_file(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removing what was half exported"),
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                Err(e) => tracing::warn!(path = %path.display(), error = %e, "what was half exported stays"),
            }
        }
        fs::remove_file(&note).map_err(io_error("remove", &note))?;
    }
    Ok(())
}

/// Notes that a file is being written, for [`tidy`].
fn note(notes: &Path, to: &Path) -> Result<Begun> {
    fs::create_dir_all(notes).map_err(io_error("make", notes))?;
    let path = notes.join(uuid::Uuid::new_v4().simple().to_string());
    let begun = Begun(Some(path.clone()));
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
    let noted = file.and_then(|mut file| {
        file.write_all(to.as_os_str().as_bytes())?;
        file.sync_all()
    });
    noted.and_then(|()| File::open(notes)?.sync_all()).map_err(io_error("write", &path))?;
    Ok(begun)
}

/// Writes what a snapshot holds to the file `to`, which is new: of this format, with holes. In `notes`, a directory, it is noted
/// as long as it is under way.
///
/// # Errors
/// [`ExportError`].
pub fn export(
    reader: &Reader,
    format: Format,
    to: &Path,
    notes: Option<&Path>,
    progress: &Progress,
) -> Result<Exported> {
    let sum = beside(to, ".sha256");
    let new = beside(to, ".part");
    // One that is half written is somebody's, or a crash's.
    if let Some(there) = [to, &*sum, &*new].into_iter().find(|path| path.symlink_metadata().is_ok()) {
        return Err(ExportError::Exists(there.to_owned()));
    }
    // It goes last.
    let _noted = notes.map(|notes| note(notes, to)).transpose()?;
    let disk = &*reader.disk;
    progress.expect(disk.size());
    let mut how = File::options();
    let file = how.read(true).write(true).create_new(true).mode(0o600).open(&new);
    let file = file.map_err(io_error("make", &new))?;
    let begun = Begun(Some(new.clone()));
    write(disk, &file, format, &new, progress)?;
    file.sync_all().map_err(io_error("write", &new))?;
    let bytes = file.metadata().map_err(io_error("look at", &new))?.len();
    progress.expect(bytes);
    let sha256 = digest(&new, progress)?;
    let name = to.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let text = format!("{sha256}  {name}\n");
    let mut beside = File::options().write(true).create_new(true).mode(0o600).open(&sum);
    let said = beside.as_mut().map_err(|e| io::Error::from(e.kind()));
    let said = said.and_then(|file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    said.map_err(io_error("write", &sum))?;
    let mut summed = Begun(Some(sum));
    // Unlike a rename, it replaces nothing.
    fs::hard_link(&new, to).map_err(io_error("make", to))?;
    summed.0 = None;
    drop(begun);
    let dir = to.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("write", dir))?;
    Ok(Exported { bytes, size: disk.size(), sha256 })
}

fn write(disk: &dyn Disk, file: &File, format: Format, path: &Path, progress: &Progress) -> Result<()> {
    match format {
        Format::Raw => {
            file.set_len(disk.size()).map_err(io_error("write", path))?;
            each_piece(disk, step(progress), |at, piece| {
                file.write_all_at(piece, at).map_err(io_error("write", path))
            })
        }
        Format::Qcow2 => {
            qcow2::create(file, disk.size())?;
            let clone = file.try_clone().map_err(io_error("write", path))?;
            let into: Arc<dyn Disk> = open_layers(vec![(clone, format)], false)?;
            each_piece(disk, step(progress), |at, piece| Ok(into.write_at(at, piece)?))?;
            Ok(into.flush()?)
        }
    }
}

fn digest(path: &Path, progress: &Progress) -> Result<String> {
    let mut file = File::open(path).map_err(io_error("read", path))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; STEP as usize]);
    loop {
        let count = match file.read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(io_error("read", path))?,
        };
        if count == 0 {
            return Ok(format!("{:x}", hash.finalize()));
        }
        hash.update(buffer.get(..count).unwrap_or_default());
        progress.advance(count as u64)?;
    }
}

/// Checks a snapshot: the tables of its layers, and that all it holds can be read. Tells the layers, the top one first, and how
/// many bytes of the disk are no zeros.
///
/// # Errors
/// [`ExportError`].
pub fn check(reader: &Reader, progress: &Progress) -> Result<(Vec<Layer>, u64)> {
    let disk = &*reader.disk;
    progress.expect(disk.size());
    let mut layers = Vec::new();
    for (name, file, format) in &reader.layers {
        let found = match format {
            Format::Raw => None,
            Format::Qcow2 => qcow2::check(file, &(0..=disk.size()))?,
        };
        layers.push(Layer { name: name.clone(), found });
    }
    // What a damaged table says is not read: it would be somebody else's.
    let mut data = 0;
    if layers.iter().all(|layer| layer.found.as_ref().is_none_or(|found| found.wrong == 0)) {
        each_piece(disk, step(progress), |_, piece| {
            data += piece.len() as u64;
            Ok(())
        })?;
    }
    Ok((layers, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Host, Simulated, Source};
    use std::time::Duration;

    #[test]
    fn what_is_exported_is_whole_or_not_there() {
        let room = tempfile::tempdir().unwrap();
        let host = Simulated::memory(Duration::ZERO);
        host.create_volume("vol-a", 3 << 20, &Source::Empty, None).unwrap();
        host.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
        let reader = host.read(&Source::Snapshot("snap-a".into())).unwrap();
        for (format, name) in [(Format::Raw, "a.raw"), (Format::Qcow2, "a.qcow2")] {
            let to = room.path().join(name);
            let progress = Progress::default();
            let made = export(&reader, format, &to, None, &progress).unwrap();
            assert_eq!((made.size, made.bytes), (3 << 20, to.metadata().unwrap().len()));
            let (done, total) = progress.figures();
            assert_eq!((done, total), (made.size + made.bytes, made.size + made.bytes));
            let sum = format!("{}  {name}\n", made.sha256);
            assert_eq!(fs::read_to_string(room.path().join(format!("{name}.sha256"))).unwrap(), sum);
            let file = File::open(&to).unwrap();
            assert_eq!(open_layers(vec![(file, format)], true).unwrap().size(), 3 << 20);
            assert!(matches!(export(&reader, format, &to, None, &progress), Err(ExportError::Exists(_))));
        }
        let notes = room.path().join("notes");
        let (to, progress) = (room.path().join("b.raw"), Progress::default());
        progress.stop();
        assert!(matches!(
            export(&reader, Format::Raw, &to, Some(&notes), &progress),
            Err(ExportError::Stopped)
        ));
        let missing = host.read(&Source::Snapshot("snap-none".into()));
        assert!(matches!(missing, Err(HostError::Missing(_))));
        assert_eq!(fs::read_dir(&notes).unwrap().count(), 0, "nothing is under way");
        fs::remove_dir(notes).unwrap();
        assert_eq!(fs::read_dir(room.path()).unwrap().count(), 4, "two files and their sums");
    }

    #[test]
    fn what_a_process_that_was_killed_left_is_tidied_and_nothing_else() {
        let room = tempfile::tempdir().unwrap();
        let (notes, path) = (room.path().join("notes"), |name: &str| room.path().join(name));
        tidy(&notes).unwrap();
        for name in ["a.part", "a.sha256", "b", "b.part", "b.sha256", "c.part", "c.sha256"] {
            fs::write(path(name), name).unwrap();
        }
        // Killed while it was written, and after it had its name; the third is somebody else's.
        for name in ["a", "b", "none/d"] {
            note(&notes, &path(name)).unwrap().0 = None;
        }
        tidy(&notes).unwrap();
        let there = |name: &&str| path(name).exists();
        let left: Vec<_> = ["a.part", "a.sha256", "b.part"].into_iter().filter(there).collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(["b", "b.sha256", "c.part", "c.sha256"].iter().all(there));
        assert_eq!(fs::read_dir(&notes).unwrap().count(), 0);
    }
}
