//! Volumes and snapshots as files.
//!
//! ```text
//!   volumes/vol-….qcow2    what was written to the volume
//!   volumes/vol-….base     a hard link to the raw disk that it lies on, so that it outlives the template or the snapshot
//!   volumes/vol-….json     the record, written last and removed first: with it there is a volume, without it there is none
//!   snapshots/snap-….raw   a snapshot: the bytes of the volume, with holes
//! ```
//! The format of a file is in its name, which we gave it; its header names no base. A file is written under another
//! name, made durable and renamed. What a crash left half done is removed when the directories are opened.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use hutch_blockdev::store::lock;
use hutch_blockdev::{
    Disk, DiskError, DiskErrorKind, Format, Qcow2Disk, RawDisk, SECTOR, open_layers, qcow2,
};
use hutch_imagestore::store::{Image, Kind, Store, StoreError};
use hutch_vmm::config::Rate;
use serde::{Deserialize, Serialize};

use super::super::{Content, HostError, Result, Source, Template};

/// Names that end so are of files that are being written.
const NEW: &str = "new";
/// A snapshot is read in steps of this many bytes.
const STEP: u64 = 1 << 20;
/// Zeros of this many bytes become a hole of the snapshot.
const HOLE: usize = 64 << 10;

static ZEROS: [u8; HOLE] = [0; HOLE];

/// What is kept of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// In bytes, a multiple of 512.
    size: u64,
    source: Source,
    /// Whether it lies on its own `.base`.
    based: bool,
    /// What it may do.
    #[serde(default)]
    rate: Rate,
    /// It is being made larger: its file may still have this size.
    #[serde(default)]
    growing: Option<u64>,
}

/// The files of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// What was written to it: qcow2.
    pub top: PathBuf,
    /// What it lies on: raw, only read.
    pub base: Option<PathBuf>,
}

/// The volumes and snapshots of a host, and the templates that volumes are made of.
pub struct Volumes {
    volumes: PathBuf,
    snapshots: PathBuf,
    templates: Store,
    busy: Mutex<BTreeSet<String>>,
    free: Condvar,
    /// Volumes whose machine has been told since this process began what they are.
    told: Mutex<BTreeSet<String>>,
}

/// Asks a machine for a size and a rate of its disk.
pub type Ask<'a> = dyn Fn(u64, &Rate) -> Result<()> + 'a;

/// Volumes that nobody else holds until this is dropped.
pub struct Hold<'a> {
    all: &'a Volumes,
    ids: BTreeSet<String>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut busy = self.all.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|id| !self.ids.contains(id));
        self.all.free.notify_all();
    }
}

impl Volumes {
    /// Opens `dir/volumes` and `dir/snapshots`, makes them where they are not there, and removes what a crash left.
    ///
    /// # Errors
    /// A directory cannot be made, read or cleaned.
    pub fn open(dir: &Path, templates: Store) -> Result<Volumes> {
        let all = Volumes {
            volumes: dir.join("volumes"),
            snapshots: dir.join("snapshots"),
            templates,
            busy: Mutex::default(),
            free: Condvar::new(),
            told: Mutex::default(),
        };
        for dir in [&all.volumes, &all.snapshots] {
            fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        }
        sweep(&all.snapshots, |_| false)?;
        let recorded: BTreeSet<PathBuf> =
            files(&all.volumes)?.into_iter().filter(|path| has_extension(path, "json")).collect();
        sweep(&all.volumes, |path| !recorded.contains(&path.with_extension("json")))?;
        Ok(all)
    }

    /// Waits until nobody holds any of these volumes, and holds all of them: while a machine is started on them, while they
    /// are copied, while one grows. None of these may see a half of another.
    pub fn hold<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> Hold<'_> {
        let ids: BTreeSet<String> = ids.into_iter().map(str::to_owned).collect();
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.free.wait_while(busy, |busy| !busy.is_disjoint(&ids));
        free.unwrap_or_else(PoisonError::into_inner).extend(ids.iter().cloned());
        Hold { all: self, ids }
    }

    /// Whether no process may write to a volume now. One that is gone is free.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn is_free(&self, id: &str) -> Result<bool> {
        let top = path(&self.volumes, id, "qcow2")?;
        match File::open(&top) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
            file => Ok(lock(&file.map_err(|e| failed(&top, e))?, true).is_ok()),
        }
    }

    /// Where volumes are.
    pub fn directory(&self) -> &Path {
        &self.volumes
    }

    /// Where snapshots are.
    pub fn snapshots_directory(&self) -> &Path {
        &self.snapshots
    }

    /// The templates as they are kept.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn images(&self) -> Result<Vec<Image>> {
        self.templates.list().map_err(|e| HostError::Failed(chain(&e)))
    }

    /// The templates, the oldest first.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn templates(&self) -> Result<Vec<Template>> {
        let images = self.images()?.into_iter().filter(|image| image.record.kind == Kind::Machine);
        let template = |record: hutch_imagestore::store::Record| Template {
            name: record.name,
            digest: record.source_sha256,
            size: record.virtual_size,
        };
        Ok(images.map(|image| template(image.record)).collect())
    }

    /// See [`Host::create_volume`](super::super::Host::create_volume). Takes the same time whatever the size.
    ///
    /// # Errors
    /// [`HostError::Missing`] source, [`HostError::NoRoom`]. The templates have to be on the file system of the volumes.
    pub fn create(&self, id: &str, bytes: u64, source: &Source) -> Result<()> {
        let record_path = path(&self.volumes, id, "json")?;
        if record_path.exists() {
            // As of a snapshot: its name may not be durable yet.
            return sync_dir(&self.volumes);
        }
        let base = self.base_of(source)?;
        let least = match &base {
            Some(path) => fs::metadata(path).map_err(|e| failed(path, e))?.len(),
            None => 0,
        };
        let size = bytes.max(least).checked_next_multiple_of(SECTOR);
        let size =
            size.ok_or_else(|| HostError::Failed(format!("the volume {id} cannot have {bytes} bytes")))?;

        // Without a record whatever lies there is a crash's, and is replaced.
        let link = path(&self.volumes, id, "base")?;
        remove(&link)?;
        if let Some(base) = &base {
            fs::hard_link(base, &link).map_err(|e| cannot_link(base, &link, e))?;
        }
        write(&path(&self.volumes, id, "qcow2")?, |file| {
            qcow2::create(file, size).map_err(|e| disk_failed(id, &e))
        })?;
        let (based, rate) = (base.is_some(), Rate::default());
        self.put(id, &Record { size, source: source.clone(), based, rate, growing: None })
    }

    /// See [`Host::modify_volume`](super::super::Host::modify_volume). Who calls it holds the volume. `machine` asks the
    /// machine that has it for that size and that rate: only a machine may write to what it runs on.
    ///
    /// The record is written first, so that who comes after a crash knows what was meant; a machine that is started next
    /// finds its volume large.
    ///
    /// # Errors
    /// [`HostError::Missing`], [`HostError::NoRoom`].
    pub fn modify(&self, id: &str, bytes: u64, rate: &Rate, machine: Option<&Ask<'_>>) -> Result<()> {
        let old = self.record(id)?;
        let size = bytes.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX).max(old.size);
        let had = (size > old.size).then_some(old.size);
        let meant = Record { size, rate: rate.clone(), growing: old.growing.or(had), ..old.clone() };
        let told = || self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if meant == old && meant.growing.is_none() && (machine.is_none() || told().contains(id)) {
            return Ok(());
        }
        // Until the machine has heard of it, nobody takes it for told.
        told().remove(id);
        if meant != old {
            self.put(id, &meant)?;
        }
        let done = match machine {
            Some(ask) => ask(size, rate),
            None if meant.growing.is_some() => self.grow(id, &meant),
            None => Ok(()),
        };
        match &done {
            Ok(()) if meant.growing.is_some() => self.put(id, &Record { growing: None, ..meant })?,
            Ok(()) => {}
            // As it was, so that nobody tries it again.
            Err(HostError::NoRoom(_)) => {
                self.put(id, &Record { size: meant.growing.unwrap_or(old.size), growing: None, ..old })?;
            }
            Err(_) => {}
        }
        if done.is_ok() {
            told().insert(id.to_owned());
        }
        done
    }

    /// Makes the file of a volume that no machine has as large as its record says.
    fn grow(&self, id: &str, record: &Record) -> Result<()> {
        let files = self.files_of(id, record)?;
        let disk = open_layers(files.open()?, false).map_err(|e| disk_failed(id, &e))?;
        match disk.grow(record.size) {
            Err(e) if e.kind == DiskErrorKind::OutOfRange => {
                Err(HostError::NoRoom(format!("the volume {id}: {}", chain(&e))))
            }
            grown => grown.map_err(|e| disk_failed(id, &e)),
        }
    }

    /// The files of a volume for a machine that is being started, and what the volume may do. A growth that was cut short
    /// is done first. Who calls it holds the volume.
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn ready(&self, id: &str) -> Result<(Files, Rate)> {
        let record = self.record(id)?;
        if record.growing.is_some() {
            match self.grow(id, &record) {
                Ok(()) => self.put(id, &Record { growing: None, ..record.clone() })?,
                // It is tried again by who wants it so large, and then by the machine.
                Err(error) => tracing::warn!(volume = id, %error, "it does not grow"),
            }
        }
        Ok((self.files_of(id, &record)?, record.rate))
    }

    fn put(&self, id: &str, record: &Record) -> Result<()> {
        let path = path(&self.volumes, id, "json")?;
        let text = serde_json::to_vec(record).map_err(|e| failed(&path, e.into()))?;
        write(&path, |file| file.write_all_at(&text, 0).map_err(|e| failed(&path, e)))
    }

    fn record(&self, id: &str) -> Result<Record> {
        let path = path(&self.volumes, id, "json")?;
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(HostError::Missing(format!("volume {id}")));
            }
            text => text.map_err(|e| failed(&path, e))?,
        };
        serde_json::from_slice(&text).map_err(|e| failed(&path, e.into()))
    }

    /// Removes a volume, if it is there. Nobody may have it.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn delete(&self, id: &str) -> Result<()> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        remove(&path(&self.volumes, id, "json")?)?;
        sync_dir(&self.volumes)?;
        remove(&path(&self.volumes, id, "qcow2")?)?;
        remove(&path(&self.volumes, id, "base")?)
    }

    /// The files of a volume.
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn files(&self, id: &str) -> Result<Files> {
        self.files_of(id, &self.record(id)?)
    }

    fn files_of(&self, id: &str, record: &Record) -> Result<Files> {
        let base = record.based.then(|| path(&self.volumes, id, "base")).transpose()?;
        Ok(Files { top: path(&self.volumes, id, "qcow2")?, base })
    }

    /// See [`Host::create_snapshots`](super::super::Host::create_snapshots). Who calls it holds the volumes, and has paused
    /// the machine that has them; what its guest has not flushed may be missing, as after loss of power. All data are
    /// copied: the time that takes grows with them.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume, [`HostError::NoRoom`]; none of the snapshots is there then.
    pub fn create_snapshots(&self, snapshots: &[(&str, &str)]) -> Result<()> {
        let paths = snapshots.iter().map(|(id, _)| path(&self.snapshots, id, "raw"));
        let paths = paths.collect::<Result<Vec<_>>>()?;
        if paths.iter().all(|path| path.exists()) {
            // Whoever gave them their names may have been killed before the names were durable.
            return sync_dir(&self.snapshots);
        }
        let made = snapshots.iter().zip(&paths).try_for_each(|((_, volume), path)| {
            // One that is there is of another instant than those that are missing.
            remove(path)?;
            self.copy_volume(volume, path)
        });
        if made.is_err() {
            paths.iter().try_for_each(|path| remove(path))?;
        }
        made
    }

    fn copy_volume(&self, volume: &str, to: &Path) -> Result<()> {
        let disk = read_only(&self.files(volume)?).map_err(|e| match e {
            Unopened::File(path, e) => failed(&path, e),
            Unopened::Disk(e) => disk_failed(volume, &e),
        })?;
        write(to, |file| copy(&disk, file).map_err(|e| disk_failed(volume, &e)))
    }

    /// See [`Host::content`](super::super::Host::content).
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn content(&self, source: &Source) -> Result<Content> {
        let missing = || HostError::Missing("content of an empty volume".into());
        self.base_of(source)?.map(Content::File).ok_or_else(missing)
    }

    /// See [`Host::copy_snapshot`](super::super::Host::copy_snapshot). On one file system it is another name of the same
    /// bytes, which never change, so it takes no time and no room; on another all data are copied.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]; it cannot be read. There is no snapshot then.
    pub fn copy_snapshot(&self, id: &str, content: &Content) -> Result<()> {
        let snapshot = path(&self.snapshots, id, "raw")?;
        let Content::File(from) = content else {
            return Err(HostError::Failed("a simulated snapshot has no bytes to copy".into()));
        };
        if snapshot.exists() {
            // Whoever gave it the name may have been killed before the name was durable.
            return sync_dir(&self.snapshots);
        }
        match fs::hard_link(from, &snapshot) {
            Ok(()) => sync_dir(&self.snapshots),
            Err(e) if e.kind() == io::ErrorKind::CrossesDevices => {
                let file = File::open(from).map_err(|e| failed(from, e))?;
                let disk = RawDisk::open(file, true).map_err(|e| disk_failed(id, &e))?;
                write(&snapshot, |file| copy(&disk, file).map_err(|e| disk_failed(id, &e)))
            }
            Err(e) => Err(failed(&snapshot, e)),
        }
    }

    /// Removes a snapshot, if it is there.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn delete_snapshot(&self, id: &str) -> Result<()> {
        remove(&path(&self.snapshots, id, "raw")?)?;
        sync_dir(&self.snapshots)
    }

    /// The raw disk that a volume of this source lies on.
    fn base_of(&self, source: &Source) -> Result<Option<PathBuf>> {
        match source {
            Source::Empty => Ok(None),
            Source::Template(name) => match self.templates.get(name) {
                Ok(image) if image.record.kind == Kind::Machine => Ok(Some(image.disk())),
                Ok(_) | Err(StoreError::NotFound { .. }) => {
                    Err(HostError::Missing(format!("template {name}")))
                }
                Err(e) => Err(HostError::Failed(chain(&e))),
            },
            Source::Snapshot(id) => {
                let snapshot = path(&self.snapshots, id, "raw")?;
                let missing = || HostError::Missing(format!("snapshot {id}"));
                snapshot.exists().then_some(Some(snapshot)).ok_or_else(missing)
            }
        }
    }
}

enum Unopened {
    File(PathBuf, io::Error),
    Disk(DiskError),
}

/// The volume, to be read here and now, without a lock: a paused machine may have it.
fn read_only(files: &Files) -> std::result::Result<Qcow2Disk, Unopened> {
    let open = |path: &Path| File::open(path).map_err(|e| Unopened::File(path.to_owned(), e));
    let base = match &files.base {
        Some(path) => {
            Some(Arc::new(RawDisk::open(open(path)?, true).map_err(Unopened::Disk)?) as Arc<dyn Disk>)
        }
        None => None,
    };
    Qcow2Disk::on(Arc::new(open(&files.top)?), base, true).map_err(Unopened::Disk)
}

impl Files {
    /// Opens them for a machine, the top one first; no other machine may have the volume.
    ///
    /// # Errors
    /// They cannot be opened, or somebody has them.
    pub fn open(&self) -> Result<Vec<(File, Format)>> {
        let open = |path: &Path, write: bool| {
            let file = File::options().read(true).write(write).open(path).map_err(|e| failed(path, e))?;
            lock(&file, !write).map_err(|e| disk_failed(&path.display().to_string(), &e))?;
            Ok(file)
        };
        let mut layers = vec![(open(&self.top, true)?, Format::Qcow2)];
        if let Some(base) = &self.base {
            layers.push((open(base, false)?, Format::Raw));
        }
        Ok(layers)
    }
}

/// Copies what is not zero.
fn copy(from: &dyn Disk, to: &File) -> std::result::Result<(), DiskError> {
    let write_failed = |e| DiskError::io("write the snapshot", e);
    to.set_len(from.size()).map_err(write_failed)?;
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
                to.write_all_at(piece, at + (index * HOLE) as u64).map_err(write_failed)?;
            }
        }
        at += count;
    }
    Ok(())
}

/// What a guest reads as the serial of a volume's disk: its id without the dash, as on EC2.
pub(super) fn serial(volume: &str) -> String {
    volume.replacen('-', "", 1)
}

/// `dir/id.extension`.
fn path(dir: &Path, id: &str, extension: &str) -> Result<PathBuf> {
    let plain = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if id.is_empty() || !plain {
        return Err(HostError::Failed(format!("{id:?} is no id; one has letters, digits and -")));
    }
    Ok(dir.join(format!("{id}.{extension}")))
}

/// Makes a file that is whole and durable once it has its name.
pub(super) fn write(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
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
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, e)),
        _ => Ok(()),
    }
}

/// Makes the names in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed(dir, e))
}

pub(super) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(|e| failed(dir, e))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(|e| failed(dir, e))).collect()
}

pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// Removes what is half written, and what `orphan` says.
fn sweep(dir: &Path, orphan: impl Fn(&Path) -> bool) -> Result<()> {
    for path in files(dir)? {
        if has_extension(&path, NEW) || orphan(&path) {
            tracing::info!(path = %path.display(), "removing what was half done");
            remove(&path)?;
        }
    }
    Ok(())
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

pub(super) fn failed(path: &Path, error: io::Error) -> HostError {
    let text = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => HostError::NoRoom(text),
        _ => HostError::Failed(text),
    }
}

pub fn cannot_link(base: &Path, link: &Path, error: io::Error) -> HostError {
    if error.kind() == io::ErrorKind::CrossesDevices {
        let (base, link) = (base.display(), link.display());
        return HostError::Failed(format!("{base} and {link} are on two file systems; keep both on one"));
    }
    failed(link, error)
}

fn disk_failed(volume: &str, error: &DiskError) -> HostError {
    let text = format!("the volume {volume}: {}", chain(error));
    match error.kind {
        DiskErrorKind::NoSpace => HostError::NoRoom(text),
        _ => HostError::Failed(text),
    }
}

#[cfg(test)]
mod tests;
