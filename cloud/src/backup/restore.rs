//! A state of a backup.

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use super::manifest::Manifest;
use super::target::{allocated, copy, digest};
use super::{BackupError, Progress, Result, STATE, io_error};

/// Checks that every file of a backup is there, as it was written.
///
/// # Errors
/// [`BackupError::Damaged`], those of [`Manifest::read`].
pub fn check(backup: &Path, progress: &Progress) -> Result<Manifest> {
    let manifest = Manifest::read(backup)?;
    progress.expect(manifest.bytes());
    let mut damaged = Vec::new();
    let mut seen = HashSet::new();
    for (name, entry) in &manifest.files {
        let path = backup.join(STATE).join(name);
        match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => damaged.push(format!("{name} is missing")),
            Err(e) => return Err(io_error("read", &path)(e)),
            Ok(about) if !about.is_file() => damaged.push(format!("{name} is no file")),
            Ok(about) if about.len() != entry.size => {
                damaged.push(format!("{name} has {} bytes, not {}", about.len(), entry.size));
            }
            // The same file by another name.
            Ok(about) if !seen.insert((about.dev(), about.ino(), entry.sha256.clone())) => {}
            Ok(_) => {
                let file = File::open(&path).map_err(io_error("open", &path))?;
                if digest(&file, &path, progress)? != entry.sha256 {
                    damaged.push(format!("{name} has other bytes"));
                }
            }
        }
        if let Some(first) = entry.link.as_ref().filter(|first| !manifest.files.contains_key(*first)) {
            damaged.push(format!("{name} is another name of {first}, which is not listed"));
        }
    }
    match damaged.is_empty() {
        true => Ok(manifest),
        false => Err(BackupError::Damaged { path: backup.to_owned(), files: damaged }),
    }
}

/// Makes the state `state`, which is not there or empty, of a backup: all of it, or, after an error, nothing.
///
/// # Errors
/// [`BackupError::NotEmpty`], [`BackupError::Mounted`], [`BackupError::Busy`], those of [`check`], the file system's.
pub fn restore(backup: &Path, state: &Path, progress: &Progress) -> Result<Manifest> {
    is_free(state)?;
    let (parent, name) = (state.parent().filter(|path| !path.as_os_str().is_empty()), state.file_name());
    let parent = parent.unwrap_or(Path::new("."));
    let name = name.unwrap_or_default().to_string_lossy();
    if let (Ok(own), Ok(above)) = (fs::metadata(state), fs::metadata(parent))
        && own.dev() != above.dev()
    {
        return Err(BackupError::Mounted(state.to_owned()));
    }
    let manifest = check(backup, progress)?;
    fs::create_dir_all(parent).map_err(io_error("make", parent))?;
    let new = parent.join(format!(".{name}.restore"));
    let lock = hold(&new)?;
    let made = fill(&manifest, &backup.join(STATE), &new, progress).and_then(|()| {
        // Again: somebody may have made it meanwhile.
        is_free(state)?;
        fs::rename(&new, state).map_err(io_error("make", state))?;
        File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_error("write", parent))
    });
    if made.is_err() {
        // The next restore would remove it too.
        let _ = empty(&new).and_then(|()| fs::remove_dir(&new).map_err(io_error("remove", &new)));
    }
    drop(lock);
    made?;
    Ok(manifest)
}

fn is_free(state: &Path) -> Result<()> {
    match fs::read_dir(state).map(|mut entries| entries.next().is_some()) {
        Ok(false) => Ok(()),
        Ok(true) => Err(BackupError::NotEmpty(state.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_error("read", state)(e)),
    }
}

/// Makes an empty directory that is ours alone, of what a restore left that was cut off.
fn hold(new: &Path) -> Result<File> {
    let make = fs::DirBuilder::new().mode(0o700).create(new);
    match make {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("make", new)(e)),
        _ => {}
    }
    let lock = File::open(new).map_err(io_error("open", new))?;
    if lock.try_lock().is_err() {
        return Err(BackupError::Busy(new.to_owned()));
    }
    empty(new)?;
    Ok(lock)
}

/// Removes all in a directory, also what nobody may write in.
fn empty(dir: &Path) -> Result<()> {
    let read = || io_error("read", dir);
    fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(io_error("write", dir))?;
    for entry in fs::read_dir(dir).map_err(read())? {
        let entry = entry.map_err(read())?;
        let path = entry.path();
        if entry.file_type().map_err(read())?.is_dir() {
            empty(&path)?;
            fs::remove_dir(&path).map_err(io_error("remove", &path))?;
        } else {
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Fills a new directory with what the manifest lists, and makes it durable.
fn fill(manifest: &Manifest, from: &Path, new: &Path, progress: &Progress) -> Result<()> {
    let originals = || manifest.files.iter().filter(|(_, entry)| entry.link.is_none());
    for (name, _) in originals() {
        let path = from.join(name);
        progress.expect(allocated(&fs::metadata(&path).map_err(io_error("read", &path))?));
    }
    let make = |path: &Path| {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("make", path))
    };
    for name in manifest.directories.keys() {
        make(&new.join(name))?;
    }
    for (name, entry) in originals() {
        let to = new.join(name);
        copy(&from.join(name), &to, entry.fixed, progress)?;
        let file = File::open(&to).map_err(io_error("open", &to))?;
        let mode = Permissions::from_mode(entry.mode);
        let done = file.set_permissions(mode).and_then(|()| file.sync_all());
        done.map_err(io_error("write", &to))?;
    }
    for (name, entry) in &manifest.files {
        if let Some(first) = &entry.link {
            let to = new.join(name);
            fs::hard_link(new.join(first), &to).map_err(io_error("make", &to))?;
        }
    }
    // The deepest first: one that nobody may write in is full by then.
    for (name, mode) in manifest.directories.iter().rev() {
        let path = new.join(name);
        let dir = File::open(&path).map_err(io_error("open", &path))?;
        let done = dir.set_permissions(Permissions::from_mode(*mode)).and_then(|()| dir.sync_all());
        done.map_err(io_error("write", &path))?;
    }
    File::open(new).and_then(|dir| dir.sync_all()).map_err(io_error("write", new))
}
