//! ImportSnapshot and ImportImage: disks of other machines become snapshots and images, by and by.
//!
//! ```text
//!   asked ─► active ─► host: each file becomes a snapshot ─► completed: the snapshots are there, and the image
//!                 └──── it cannot be, or is cancelled ─► deleting ─► deleted: nothing of it is there
//! ```
//! How far one is, is known to this process only. After a crash a file is read anew from its begin.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hutch_imagestore::store::Format;
use jiff::SignedDuration;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::fault::{Fault, Result};
use crate::host::{HostError, Source};
use crate::id;
use crate::model::{Image, ImageDevice, ImportDisk, ImportState, ImportTask, Snapshot, Tags};

use super::{Encryption, Region, Work, images, now, recall, remember, snapshots, tags};

/// What ids of imports begin with: of snapshots, and of images.
const SNAP: &str = "import-snap";
const AMI: &str = "import-ami";
/// The most disks of an image.
const MAX_DISKS: usize = 24;
/// At a time: each reads a disk and writes one.
const MOST: usize = 2;
/// When one that waits for others is looked at again.
pub(super) const WAIT: Duration = Duration::from_millis(500);
/// How long one that is over is remembered.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(7 * 24);
const GIB: u64 = 1 << 30;

/// What ImportSnapshot and ImportImage ask for.
#[derive(Debug, Clone, Default)]
pub struct NewImport {
    /// What its owner says of it.
    pub description: String,
    /// The disks; an image's, root first where no device says otherwise.
    pub disks: Vec<DiskAsk>,
    /// They become an image.
    pub image: bool,
    /// Whether its snapshots are encrypted, and by which key.
    pub encryption: Encryption,
    /// The task's tags.
    pub tags: Tags,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
}

/// A disk that is asked for.
#[derive(Debug, Clone, Default)]
pub struct DiskAsk {
    /// The device of an image.
    pub device: Option<String>,
    /// What its owner says of it.
    pub description: String,
    /// Its bytes.
    pub from: DiskFrom,
    /// The file's format, as EC2 spells it.
    pub format: Option<String>,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DiskFrom {
    /// Nowhere.
    #[default]
    Nowhere,
    /// A `file://` URL, below the directory that is for imports.
    Url(String),
    /// A file of the machine's owner, by its whole path. Only the owner may be let ask so.
    Path(PathBuf),
    /// A snapshot that is there.
    Snapshot(String),
}

/// The imports, and what else takes as long, that this process is at.
#[derive(Default)]
pub(super) struct Imports {
    /// Bytes that are done, and all of them.
    running: Mutex<HashMap<String, (u64, u64)>>,
    ending: AtomicBool,
}

impl Imports {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, (u64, u64)>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins one, unless it is under way, or as many are as there may be.
    pub(super) fn begin<'a>(&'a self, id: &'a str) -> Option<Running<'a>> {
        let mut running = self.lock();
        if running.len() >= MOST || running.contains_key(id) {
            return None;
        }
        running.insert(id.to_owned(), (0, 0));
        Some(Running(self, id))
    }

    /// How far one is: bytes that are done, and all of them.
    pub(super) fn figures(&self, id: &str) -> (u64, u64) {
        self.lock().get(id).copied().unwrap_or((0, 0))
    }

    /// Whether they are to stop.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Has those that run stop; the next process begins them anew.
    pub(super) fn end(&self, ending: bool) {
        self.ending.store(ending, Ordering::Relaxed);
    }
}

/// One that this process is at, until this is dropped.
pub(super) struct Running<'a>(&'a Imports, &'a str);

impl Running<'_> {
    /// How far it is.
    pub(super) fn tell(&self, done: u64, total: u64) {
        self.0.lock().insert(self.1.to_owned(), (done, total));
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(self.1);
    }
}

fn no_task(id: &str) -> Fault {
    Fault::new("InvalidConversionTaskId", format!("The import task '{id}' does not exist"))
}

/// The format that a request names.
fn format(name: &str) -> Result<Option<Format>> {
    Ok(Some(match name.to_ascii_lowercase().as_str() {
        "" => return Ok(None),
        "raw" => Format::Raw,
        "raw.gz" => Format::RawGz,
        "raw.xz" => Format::RawXz,
        "raw.zst" => Format::RawZst,
        "vmdk" => Format::Vmdk,
        "vhd" => Format::Vhd,
        "vhdx" => Format::Vhdx,
        "qcow2" => Format::Qcow2,
        "ova" => {
            let why = "An OVA is a tar archive: unpack it, and import the VMDK disks in it.";
            return Err(Fault::value("Format", name, why));
        }
        _ => {
            return Err(Fault::value(
                "Format",
                name,
                "It is RAW, VMDK, VHD, VHDX or QCOW2; without one, the file tells.",
            ));
        }
    }))
}

/// Opens a file below a directory, whatever links there are in it; nothing else is opened.
fn open_below(dir: &Path, file: &Path) -> io::Result<File> {
    let how = OFlags::RDONLY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, how | OFlags::DIRECTORY, Mode::empty())?;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    // A pipe would be waited for.
    let file = rustix::fs::openat2(&dir, file, how | OFlags::NONBLOCK, Mode::empty(), within)?;
    let file = File::from(file);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

impl Region {
    /// The file of a URL, relative to the directory that is for imports.
    fn file_of(&self, url: &str) -> Result<PathBuf> {
        let bad = |why: &str| Fault::value("Url", url, why);
        let Some(dir) = &self.settings.import_dir else {
            return Err(bad("hutchd has to be told a directory for imports (--import-dir)."));
        };
        let path =
            url.strip_prefix("file://").ok_or_else(|| bad("It is like file:///srv/import/disk.vmdk."))?;
        let below = || format!("It is no file below {}, which is for imports.", dir.display());
        let relative = Path::new(path).strip_prefix(dir).map_err(|_| bad(&below()))?;
        let plain = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || relative.as_os_str().is_empty() {
            return Err(bad(&below()));
        }
        Ok(relative.to_owned())
    }

    fn open(&self, file: &Path) -> io::Result<File> {
        if file.is_absolute() {
            return hutch_imagestore::import::open(file).map_err(io::Error::other);
        }
        let dir = self.settings.import_dir.as_deref();
        open_below(dir.ok_or_else(|| io::Error::other("there is no directory for imports any more"))?, file)
    }

    /// Begins an import. It is `active` when this returns.
    ///
    /// # Errors
    /// `InvalidParameterValue`: a file that is not there, or may not be read; `InvalidSnapshot.*`,
    /// `InvalidBlockDeviceMapping`.
    pub fn import(&self, account: &str, new: &NewImport) -> Result<ImportTask> {
        tags::check(&new.tags)?;
        let most = if new.image { MAX_DISKS } else { 1 };
        if new.disks.is_empty() || new.disks.len() > most {
            return Err(Fault::missing(if new.image {
                "DiskContainer, 1 to 24 of them"
            } else {
                "DiskContainer"
            }));
        }
        let kind = if new.image { AMI } else { SNAP };
        let token = new.client_token.as_ref().map(|token| format!("{kind}/{account}/{token}"));
        self.transact(|work| {
            let made = recall(work, token.as_deref(), &new.request)?;
            if let Some(id) = made.and_then(|made| made.into_iter().next()) {
                return work.get::<ImportTask>(&id)?.ok_or_else(|| no_task(&id));
            }
            let key = self.key_for(work, account, &new.encryption, None)?;
            let mut disks = Vec::new();
            for (index, ask) in new.disks.iter().enumerate() {
                disks.push(self.import_disk(work, account, index, ask, key.is_some())?);
            }
            let devices: std::collections::BTreeSet<_> = disks.iter().map(|disk| &disk.device).collect();
            if devices.len() < disks.len() {
                let why = "Each disk of an image needs a device name of its own";
                return Err(Fault::new("InvalidBlockDeviceMapping", why));
            }
            let task = ImportTask {
                id: id::new(kind),
                account: account.into(),
                description: new.description.clone(),
                started: now(),
                disks,
                image: new.image.then(|| id::new("ami")),
                state: ImportState::Active,
                message: String::new(),
                ended: None,
                key,
                tags: new.tags.clone(),
            };
            work.put(&task)?;
            remember(work, token.as_deref(), &new.request, vec![task.id.clone()])?;
            Ok(task)
        })
    }

    fn import_disk(
        &self,
        work: &mut Work<'_>,
        account: &str,
        index: usize,
        ask: &DiskAsk,
        encrypted: bool,
    ) -> Result<ImportDisk> {
        let file = match &ask.from {
            DiskFrom::Nowhere => return Err(Fault::missing("DiskContainer.Url")),
            DiskFrom::Url(url) => Some(self.file_of(url)?),
            DiskFrom::Path(path) => Some(path.clone()),
            DiskFrom::Snapshot(_) => None,
        };
        let bytes = match &file {
            None => 0,
            Some(path) => {
                let open = self.open(path).and_then(|file| file.metadata()).map(|about| about.len());
                let why = |e: io::Error| format!("The file cannot be read: {e}.");
                open.map_err(|e| Fault::value("Url", &path.display().to_string(), &why(e)))?
            }
        };
        let (snapshot, of) = match &ask.from {
            DiskFrom::Snapshot(id) => {
                let there = snapshots::readable(work, account, id)?;
                match encrypted && there.key.is_none() {
                    true => (id::new("snap"), Some(there.id)),
                    false => (there.id, None),
                }
            }
            _ => (id::new("snap"), None),
        };
        let default = match u8::try_from(index).ok().map(|index| char::from(b'a' + index)) {
            None | Some('a') => images::ROOT.to_owned(),
            Some(letter) => format!("/dev/sd{letter}"),
        };
        Ok(ImportDisk {
            device: ask.device.clone().unwrap_or(default),
            description: ask.description.clone(),
            format: ask.format.as_deref().map_or(Ok(None), format)?,
            done: file.is_none() && of.is_none(),
            file,
            of,
            snapshot,
            bytes,
        })
    }

    /// How far an import that is active is, in percent; 0 while it waits.
    pub fn import_progress(&self, task: &ImportTask) -> u64 {
        let done = task.disks.iter().filter(|disk| disk.done).count() as u64;
        let (part, whole) = self.imports.figures(&task.id);
        let part = part.min(whole).saturating_mul(100).checked_div(whole).unwrap_or(0);
        (done * 100 + part).checked_div(task.disks.len() as u64).unwrap_or(0).min(99)
    }

    /// Cancels an import; returns the state before.
    ///
    /// # Errors
    /// `InvalidConversionTaskId`, `IncorrectState`: it is over.
    pub fn cancel_import(&self, account: &str, id: &str, why: &str) -> Result<ImportState> {
        self.transact(|work| {
            let task = work.get::<ImportTask>(id)?.filter(|task| task.account == account);
            let mut task = task.ok_or_else(|| no_task(id))?;
            let before = task.state;
            if before.is_over() {
                let why = format!("The import task '{id}' is {} already", before.name());
                return Err(Fault::new("IncorrectState", why));
            }
            task.state = ImportState::Deleting;
            let why = if why.is_empty() { "User initiated task cancelation." } else { why };
            task.message = why.into();
            work.put(&task)?;
            Ok(before)
        })
    }

    /// Looks at an import. Returns when it is to be looked at again without a change.
    pub(super) fn step_import(&self, id: &str) -> Result<Option<Duration>> {
        let Some(task) = self.get::<ImportTask>(id)? else { return Ok(None) };
        match task.state {
            ImportState::Completed | ImportState::Deleted => Ok(None),
            ImportState::Deleting => self.undo(&task).map(|()| None),
            ImportState::Active => match task.disks.iter().position(|disk| !disk.done) {
                Some(index) => self.import_one(&task, index),
                None => self.complete(&task).map(|()| None),
            },
        }
    }

    /// Makes a snapshot of a disk.
    fn import_one(&self, task: &ImportTask, index: usize) -> Result<Option<Duration>> {
        let Some(disk) = task.disks.get(index) else { return Ok(None) };
        let Some(running) = self.imports.begin(&task.id) else { return Ok(Some(WAIT)) };
        let cancelled = || {
            let now = self.get::<ImportTask>(&task.id).ok().flatten();
            now.is_none_or(|now| now.state != ImportState::Active)
        };
        let mut go_on = |done, total| {
            running.tell(done, total);
            !self.imports.is_ending() && !cancelled()
        };
        let key = task.key.as_deref();
        let made = match &disk.of {
            Some(of) => self.import_copy(of, &disk.snapshot, key),
            None => {
                let file = disk.file.as_deref().unwrap_or(Path::new(""));
                let unread = |e| HostError::Failed(format!("the file cannot be read: {e}"));
                self.open(file).map_err(unread).and_then(|file| {
                    self.host.import_snapshot(&disk.snapshot, &file, disk.format, key, &mut go_on)
                })
            }
        };
        let bytes = match made {
            Ok(bytes) => bytes,
            // The next process carries on, or what was cancelled is undone: that has another step.
            Err(HostError::Busy(_)) => return Ok(None),
            Err(error) => {
                tracing::warn!(task = task.id, %error, "nothing is imported");
                self.settle_import(&task.id, |task| {
                    task.state = ImportState::Deleting;
                    task.message = format!("ClientError: {error}");
                })?;
                return Ok(None);
            }
        };
        self.transact(|work| {
            let Some(mut task) = work.get::<ImportTask>(&task.id)? else { return Ok(()) };
            let Some(disk) = task.disks.get_mut(index) else { return Ok(()) };
            if task.state != ImportState::Active || disk.done {
                return Ok(());
            }
            disk.done = true;
            let said = [&disk.description, &task.description].into_iter().find(|text| !text.is_empty());
            work.put(&Snapshot {
                id: disk.snapshot.clone(),
                source: Source::Snapshot(disk.snapshot.clone()),
                account: task.account.clone(),
                volume: snapshots::NO_VOLUME.into(),
                gib: bytes.div_ceil(GIB).max(1),
                started: now(),
                description: said.cloned().unwrap_or_else(|| format!("Imported by {}", task.id)),
                together: Vec::new(),
                copy_of: None,
                key: task.key.clone(),
                public: false,
                shared: Vec::new(),
                complete: true,
                failed: None,
                deleting: false,
                tags: Tags::new(),
            })?;
            work.put(&task)
        })?;
        Ok(None)
    }

    /// Makes an encrypted copy of a snapshot; tells its size in bytes.
    fn import_copy(&self, of: &str, to: &str, key: Option<&str>) -> std::result::Result<u64, HostError> {
        let missing = || HostError::Missing(format!("snapshot {of}"));
        let of = self.get::<Snapshot>(of).map_err(|fault| HostError::Failed(fault.message))?;
        let of = of.filter(|of| !of.deleting).ok_or_else(missing)?;
        self.host.copy_snapshot(to, &self.host.content(&of.source)?, key)?;
        Ok(of.gib * GIB)
    }

    /// All disks are there.
    fn complete(&self, task: &ImportTask) -> Result<()> {
        let done = self.transact(|work| {
            let Some(mut task) = work.get::<ImportTask>(&task.id)? else { return Ok(()) };
            if task.state != ImportState::Active {
                return Ok(());
            }
            (task.state, task.ended) = (ImportState::Completed, Some(now()));
            if let Some(image) = &task.image {
                self.take_name(work, &task.account, &task.id, image)?;
                let image = image_of(work, &task, image)?;
                work.put(&image)?;
            }
            work.put(&task)
        });
        match done {
            // A snapshot that was there before is gone.
            Err(fault) if fault.code != "InternalError" => self.settle_import(&task.id, |task| {
                task.state = ImportState::Deleting;
                task.message = format!("ClientError: {}", fault.message);
            }),
            done => done,
        }
    }

    /// Takes away what there is of an import that is not to be.
    fn undo(&self, task: &ImportTask) -> Result<()> {
        for disk in task.disks.iter().filter(|disk| disk.is_made()) {
            self.host.delete_snapshot(&disk.snapshot).map_err(Fault::internal)?;
        }
        self.transact(|work| {
            let Some(mut task) = work.get::<ImportTask>(&task.id)? else { return Ok(()) };
            for disk in task.disks.iter().filter(|disk| disk.is_made()) {
                work.delete::<Snapshot>(&disk.snapshot);
            }
            (task.state, task.ended) = (ImportState::Deleted, Some(now()));
            work.put(&task)
        })
    }

    fn settle_import(&self, id: &str, job: impl Fn(&mut ImportTask)) -> Result<()> {
        self.transact(|work| {
            let Some(mut task) = work.get::<ImportTask>(id)? else { return Ok(()) };
            if task.state == ImportState::Active {
                job(&mut task);
                work.put(&task)?;
            }
            Ok(())
        })
    }

    /// Forgets imports that were over long ago.
    ///
    /// # Errors
    /// The store's.
    pub fn forget_imports(&self) -> Result<()> {
        for task in self.all::<ImportTask>()? {
            if task.ended.is_some_and(|at| now().duration_since(at) > REMEMBERED) {
                self.transact(|work| {
                    work.delete::<ImportTask>(&task.id);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

/// The image of an import's snapshots.
fn image_of(work: &mut Work<'_>, task: &ImportTask, image: &str) -> Result<Image> {
    let mut devices = Vec::new();
    for disk in &task.disks {
        let snapshot = snapshots::readable(work, &task.account, &disk.snapshot)?;
        devices.push(ImageDevice {
            name: disk.device.clone(),
            encrypted: snapshot.key.is_some(),
            snapshot: Some(snapshot.id),
            gib: snapshot.gib,
            kind: "gp3".into(),
            iops: None,
            delete_on_termination: true,
        });
    }
    Ok(Image {
        description: task.description.clone(),
        root_device: devices.first().map(|device| device.name.clone()).unwrap_or_default(),
        devices,
        ..images::blank(image, &task.account, &task.id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_opened_outside_of_the_directory() {
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("import");
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        std::fs::write(room.path().join("secret"), "secret").unwrap();
        std::fs::write(dir.join("sub/disk"), "disk").unwrap();
        for (link, to) in [("out", "../secret"), ("whole", "/etc/passwd"), ("in", "sub/disk"), ("up", "..")] {
            std::os::unix::fs::symlink(to, dir.join(link)).unwrap();
        }
        for good in ["sub/disk", "in"] {
            open_below(&dir, Path::new(good)).unwrap();
        }
        for bad in
            ["out", "whole", "up/secret", "../secret", "/etc/passwd", "sub", "none", "sub/../../secret"]
        {
            assert!(open_below(&dir, Path::new(bad)).is_err(), "{bad}");
        }
    }
}
