//! Where files are copied to: as clones of the same blocks or other names of the same bytes where the file system can,
//! else as copies with holes where the zeros are.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::manifest::Entry;
use super::{Progress, Result, io_error};

/// Bytes read at a time.
const STEP: usize = 1 << 20;
/// Zeros of this many bytes become a hole.
const HOLE: usize = 64 << 10;

static ZEROS: [u8; HOLE] = [0; HOLE];

/// A directory that is being filled.
pub struct Target<'a> {
    root: PathBuf,
    progress: &'a Progress,
    files: BTreeMap<String, Entry>,
    directories: BTreeMap<String, u32>,
    /// Files that never change, by the device and the number of where they came from.
    known: HashMap<(u64, u64), String>,
}

impl<'a> Target<'a> {
    /// A new directory.
    pub(super) fn new(root: PathBuf, progress: &'a Progress) -> Result<Target<'a>> {
        fs::DirBuilder::new().mode(0o700).create(&root).map_err(io_error("make", &root))?;
        let (files, directories, known) = Default::default();
        Ok(Target { root, progress, files, directories, known })
    }

    /// Where a file is to be, in directories that are there.
    pub(super) fn place(&mut self, name: &str) -> Result<PathBuf> {
        let parents = Path::new(name).ancestors().skip(1);
        let parents: Vec<_> = parents.filter_map(Path::to_str).filter(|name| !name.is_empty()).collect();
        for parent in parents.into_iter().rev() {
            if !self.directories.contains_key(parent) {
                self.directory(parent, 0o700)?;
            }
        }
        Ok(self.root.join(name))
    }

    /// Whether a directory or a file is there already: another host of this machine has the same templates.
    pub fn has(&self, name: &str) -> bool {
        self.directories.contains_key(name) || self.files.contains_key(name)
    }

    /// Makes a directory that is to have this mode when it is restored.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        let path = self.place(name)?;
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(io_error("make", &path))?;
        self.directories.insert(name.to_owned(), mode & 0o7777);
        Ok(())
    }

    /// Copies a file; one that is `fixed` never changes, and is copied once whatever its names.
    pub fn file(&mut self, from: &Path, name: &str, fixed: bool) -> Result<()> {
        let path = self.place(name)?;
        let about = fs::metadata(from).map_err(io_error("read", from))?;
        let mut entry = Entry {
            size: about.len(),
            mode: about.mode() & 0o7777,
            sha256: String::new(),
            fixed,
            link: None,
        };
        let identity = (about.dev(), about.ino());
        if let Some(first) = self.known.get(&identity).filter(|_| fixed) {
            fs::hard_link(self.root.join(first), &path).map_err(io_error("make", &path))?;
            entry.link = Some(first.clone());
        } else {
            copy(from, &path, fixed, self.progress)?;
            if fixed {
                self.known.insert(identity, name.to_owned());
            }
        }
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Writes a file.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.place(name)?;
        fs::write(&path, bytes).map_err(io_error("write", &path))?;
        self.made(name)
    }

    /// Takes in a file that somebody else made at its [place](Target::place).
    pub(super) fn made(&mut self, name: &str) -> Result<()> {
        let path = self.root.join(name);
        let private = fs::set_permissions(&path, Permissions::from_mode(0o600));
        private.map_err(io_error("write", &path))?;
        let entry = Entry { size: 0, mode: 0o600, sha256: String::new(), fixed: false, link: None };
        self.files.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Makes all of it durable, and tells what it is.
    pub(super) fn seal(mut self) -> Result<(BTreeMap<String, Entry>, BTreeMap<String, u32>)> {
        let mut digests: HashMap<String, (u64, String)> = HashMap::new();
        for (name, entry) in self.files.iter_mut().filter(|(_, entry)| entry.link.is_none()) {
            let path = self.root.join(name);
            let file = File::open(&path).map_err(io_error("open", &path))?;
            file.sync_all().map_err(io_error("write", &path))?;
            // A mutable file may have grown since it was looked at.
            entry.size = file.metadata().map_err(io_error("read", &path))?.len();
            entry.sha256 = digest(&file, &path, self.progress)?;
            digests.insert(name.clone(), (entry.size, entry.sha256.clone()));
        }
        for entry in self.files.values_mut() {
            if let Some((size, sha256)) = entry.link.as_ref().and_then(|first| digests.get(first)) {
                (entry.size, entry.sha256) = (*size, sha256.clone());
            }
        }
        for name in self.directories.keys().map(String::as_str).chain([""]) {
            let path = self.root.join(name);
            File::open(&path).and_then(|dir| dir.sync_all()).map_err(io_error("write", &path))?;
        }
        Ok((self.files, self.directories))
    }
}

/// Copies a file to a new name, with its permissions: clones its blocks, or gives bytes that are `fixed` one more name, or
/// copies all that is not zero.
pub(super) fn copy(from: &Path, to: &Path, fixed: bool, progress: &Progress) -> Result<()> {
    let source = File::open(from).map_err(io_error("open", from))?;
    let about = source.metadata().map_err(io_error("read", from))?;
    let failed = || io_error("write", to);
    let new = || File::options().write(true).create_new(true).mode(0o600).open(to).map_err(failed());
    let file = new()?;
    if ioctl_ficlone(&file, &source).is_ok() {
        file.set_permissions(about.permissions()).map_err(failed())?;
        return progress.advance(allocated(&about));
    }
    if fixed {
        drop(file);
        fs::remove_file(to).map_err(failed())?;
        if fs::hard_link(from, to).is_ok() {
            return progress.advance(allocated(&about));
        }
        return pour(&source, from, &new()?, to, progress);
    }
    pour(&source, from, &file, to, progress)
}

/// Bytes that a file takes on the disk.
pub fn allocated(about: &fs::Metadata) -> u64 {
    about.blocks() * 512
}

/// Copies what is not zero.
fn pour(source: &File, from: &Path, file: &File, to: &Path, progress: &Progress) -> Result<()> {
    let about = source.metadata().map_err(io_error("read", from))?;
    file.set_len(about.len()).map_err(io_error("write", to))?;
    let mut buffer = vec![0; STEP];
    let mut at = 0;
    while let Some((begin, end)) = data(source, at, about.len()).map_err(io_error("read", from))? {
        at = begin;
        while at < end {
            let most = usize::try_from(end - at).unwrap_or(STEP).min(STEP);
            let part = buffer.get_mut(..most).unwrap_or_default();
            source.read_exact_at(part, at).map_err(io_error("read", from))?;
            for (index, piece) in part.chunks(HOLE).enumerate() {
                if ZEROS.get(..piece.len()) != Some(piece) {
                    let place = at + (index * HOLE) as u64;
                    file.write_all_at(piece, place).map_err(io_error("write", to))?;
                }
            }
            at += most as u64;
            progress.advance(most as u64)?;
        }
    }
    file.set_permissions(about.permissions()).map_err(io_error("write", to))
}

/// The first bytes at or behind `at` that are no hole, within `len`.
fn data(file: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    match seek(file, SeekFrom::Data(at)) {
        Ok(begin) if begin < len => Ok(Some((begin, seek(file, SeekFrom::Hole(begin))?.min(len)))),
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        // A file system that knows of no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some((at, len))),
        Err(e) => Err(e.into()),
    }
}

/// SHA-256 of a file's bytes.
pub(super) fn digest(file: &File, path: &Path, progress: &Progress) -> Result<String> {
    let mut buffer = vec![0; STEP];
    let mut sum = Sha256::new();
    let mut file = file;
    loop {
        let read = file.read(&mut buffer).map_err(io_error("read", path))?;
        if read == 0 {
            return Ok(format!("{:x}", sum.finalize()));
        }
        sum.update(buffer.get(..read).unwrap_or_default());
        progress.advance(read as u64)?;
    }
}
