//! CreateStoreImageTask and CreateRestoreImageTask: an image as one object of a bucket, and an image of such an object.
//!
//! ```text
//!   store     asked ─► InProgress ─► its disks are read, and written as one object ─► Completed, or Failed
//!   restore   asked ─► the image is pending, its task beside it ─► each disk becomes a snapshot ─► available, or failed
//! ```
//! After a crash an object is written anew from its begin; of one that is read, disks that are there are passed over.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;

use crate::archive::{self, Archive, ArchiveError};
use crate::fault::{Fault, Result};
use crate::host::{HostError, Source};
use crate::id;
use crate::model::{
    Image, ImageDevice, ImageKind, Reason, RestoreDisk, RestoreTask, Shape, Snapshot, StoreState, StoreTask,
    StoredDevice, StoredImage, StoredSnapshot, Tags,
};
use crate::objects::{self, LARGEST, Objects};

use super::imports::{Running, WAIT};
use super::{Region, Work, images, now, snapshots, tags};

/// The most tags of an object: S3's.
const OBJECT_TAGS: usize = 10;
/// How long one that is over is told: EC2's 31 days.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(31 * 24);
/// After so many bytes it is looked whether an image that is made is still wanted.
const LOOK: u64 = 64 << 20;
const GIB: u64 = 1 << 30;

/// What CreateStoreImageTask asks for.
#[derive(Debug, Clone, Default)]
pub struct StoreAsk {
    /// The image's id.
    pub image: String,
    /// Where it goes.
    pub bucket: String,
    /// The object's tags.
    pub object_tags: Tags,
}

/// What CreateRestoreImageTask asks for.
#[derive(Debug, Clone, Default)]
pub struct RestoreAsk {
    /// Where the object is.
    pub bucket: String,
    /// The object's name there.
    pub key: String,
    /// The image's name; `None`: as it was.
    pub name: Option<String>,
    /// The image's tags, beside those it had.
    pub tags: Tags,
    /// The tags of its snapshots, likewise.
    pub snapshot_tags: Tags,
}

/// What the object of an image is called.
fn key_of(image: &str) -> String {
    format!("{image}.bin")
}

/// Why a stream of an object was not read or written, for whoever asked for it.
pub(super) fn refused(error: &ArchiveError) -> HostError {
    match error {
        ArchiveError::Stopped => HostError::Busy(error.to_string()),
        ArchiveError::Write(e) if e.kind() == io::ErrorKind::StorageFull => {
            HostError::NoRoom(error.to_string())
        }
        _ => HostError::Failed(error.to_string()),
    }
}

/// Whether an image that somebody's object says could be one of ours; its disks are of these sizes.
fn check_said(image: &StoredImage, sizes: &[u64]) -> std::result::Result<(), String> {
    let told = |fault: Fault| fault.message;
    images::check_name(&image.name).map_err(told)?;
    tags::check(&image.tags).map_err(told)?;
    let mut disks = sizes.iter();
    for StoredDevice { device, snapshot } in &image.devices {
        Shape::new(Some(&device.kind), device.gib, device.iops, None).map_err(told)?;
        if image.devices.iter().filter(|other| other.device.name == device.name).count() > 1 {
            return Err(format!("it has two devices {:?}", device.name));
        }
        if device.name.is_empty() || device.name.len() > 255 || device.snapshot.is_some() || device.encrypted
        {
            return Err(format!("its device {:?} cannot be", device.name));
        }
        let Some(snapshot) = snapshot else { continue };
        tags::check(&snapshot.tags).map_err(told)?;
        let size = disks.next().ok_or("it has fewer disks than it says")?;
        if snapshot.gib > device.gib || size.div_ceil(GIB) > snapshot.gib {
            return Err(format!("its device {:?} is smaller than its disk", device.name));
        }
    }
    let root = image.devices.first().filter(|root| root.snapshot.is_some());
    let has_root = root.is_some_and(|root| root.device.name == image.root_device);
    match (disks.next(), has_root && image.devices.len() <= archive::DISKS) {
        (None, true) => Ok(()),
        (Some(_), _) => Err("it has more disks than it says".into()),
        (None, false) => Err("it has no root disk, or too many".into()),
    }
}

impl Region {
    /// The object store.
    pub(super) fn objects(&self) -> Result<&Arc<Objects>> {
        let none = || Fault::new("UnsupportedOperation", "hutchd has no object store (--object-store)");
        self.objects.as_ref().ok_or_else(none)
    }

    /// Begins to write an image to a bucket; tells the object's name.
    ///
    /// # Errors
    /// `InvalidAMIID.*`, `InvalidRequest`: a snapshot of it is not for the account; `UnsupportedOperation`: it is encrypted;
    /// `InvalidBucketName`, `AccessDenied`, `IncorrectState`: it is being written there;
    /// `Unavailable`.
    pub fn create_store_task(&self, account: &str, ask: &StoreAsk) -> Result<String> {
        let objects = self.objects()?;
        objects::check_bucket(&ask.bucket)?;
        tags::check(&ask.object_tags)?;
        if ask.object_tags.len() > OBJECT_TAGS {
            return Err(Fault::new("TagLimitExceeded", format!("An object has at most {OBJECT_TAGS} tags")));
        }
        self.transact(|work| self.to_store(work, account, ask))?;
        let objects = objects.for_call()?;
        objects.take(&ask.bucket, account)?;
        // Another region may have an image of this id: a template's is the same in all.
        drop(objects.claim(&ask.bucket, &key_of(&ask.image))?);
        self.transact(|work| {
            let (image, disks) = self.to_store(work, account, ask)?;
            let task = StoreTask {
                id: id::new("store"),
                account: account.into(),
                bucket: ask.bucket.clone(),
                key: key_of(&ask.image),
                object_tags: ask.object_tags.clone(),
                started: now(),
                image,
                disks,
                state: StoreState::InProgress,
                failed: None,
            };
            work.put(&task)?;
            Ok(task.key)
        })
    }

    /// What is to be written of an image, if the account may have it written.
    fn to_store(
        &self,
        work: &mut Work<'_>,
        account: &str,
        ask: &StoreAsk,
    ) -> Result<(StoredImage, Vec<Source>)> {
        let image = self.launchable(work, account, &ask.image)?;
        if image.bundle.is_some() {
            let why = format!("The image '{}' is in a bucket already: it is instance-store-backed", image.id);
            return Err(Fault::new("UnsupportedOperation", why));
        }
        let same = |task: &StoreTask| task.image.id == image.id && task.bucket == ask.bucket;
        let runs = |task: &StoreTask| task.state == StoreState::InProgress && same(task);
        if work.all::<StoreTask>("")?.iter().any(runs) {
            let why = format!("The image '{}' is being stored in '{}'; wait for that", image.id, ask.bucket);
            return Err(Fault::new("IncorrectState", why));
        }
        // Tags are their owner's own.
        let own = |of: &str, tags: &Tags| -> Tags {
            let kept = tags.iter().filter(|(key, _)| of == account && !key.starts_with("aws:"));
            kept.map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        let (mut devices, mut disks) = (Vec::new(), Vec::new());
        for device in &image.devices {
            let mut stored =
                StoredDevice { device: ImageDevice { snapshot: None, ..device.clone() }, snapshot: None };
            if let Some(id) = &device.snapshot {
                let why = "You do not have permission to access the storage of this ami";
                let known = |s: &Snapshot| s.readable(account) && !s.deleting;
                let snapshot = work.get::<Snapshot>(id)?.filter(known);
                let snapshot = snapshot.ok_or_else(|| Fault::new("InvalidRequest", why))?;
                if snapshot.key.is_some() {
                    let why = format!(
                        "The snapshot '{id}' of the image '{}' is encrypted: in a bucket it would be plain",
                        image.id
                    );
                    return Err(Fault::new("UnsupportedOperation", why));
                }
                stored.snapshot = Some(StoredSnapshot {
                    gib: snapshot.gib,
                    tags: own(&snapshot.account, &snapshot.tags),
                    description: snapshot.description,
                });
                disks.push(snapshot.source);
            } else if device.encrypted {
                let why = format!("The device '{}' of the image '{}' is encrypted", device.name, image.id);
                return Err(Fault::new("UnsupportedOperation", why));
            }
            devices.push(stored);
        }
        let tags = own(&image.account, &image.tags);
        let Image { id, name, description, kernel, ramdisk, root_device, ena_support, .. } = image;
        let said =
            StoredImage { id, name, description, kernel, ramdisk, root_device, ena_support, devices, tags };
        Ok((said, disks))
    }

    /// How far the writing of an image is, in percent.
    pub fn store_progress(&self, task: &StoreTask) -> u64 {
        let (done, total) = self.imports.figures(&task.id);
        match task.state {
            StoreState::InProgress => {
                done.min(total).saturating_mul(100).checked_div(total).unwrap_or(0).min(99)
            }
            StoreState::Completed => 100,
            StoreState::Failed => 0,
        }
    }

    /// Looks at an image that is to be in a bucket. Returns when it is to be looked at again without a change.
    pub(super) fn step_store(&self, id: &str) -> Result<Option<Duration>> {
        let task = self.get::<StoreTask>(id)?.filter(|task| task.state == StoreState::InProgress);
        let Some(task) = task else { return Ok(None) };
        let Some(running) = self.imports.begin(id) else { return Ok(Some(WAIT)) };
        let failed = match self.store_image(&task, &running) {
            // The next process begins it anew.
            Err(HostError::Busy(_)) => return Ok(None),
            Err(error) => {
                tracing::warn!(image = task.image.id, bucket = task.bucket, %error, "it is not stored");
                Some(error.to_string())
            }
            Ok(()) => None,
        };
        self.transact(|work| {
            let Some(mut task) = work.get::<StoreTask>(id)? else { return Ok(()) };
            task.state = if failed.is_some() { StoreState::Failed } else { StoreState::Completed };
            task.failed.clone_from(&failed);
            work.put(&task)
        })?;
        Ok(None)
    }

    fn store_image(&self, task: &StoreTask, running: &Running<'_>) -> std::result::Result<(), HostError> {
        let failed = |error: &dyn std::fmt::Display| HostError::Failed(error.to_string());
        let objects = self.objects().map_err(|fault| failed(&fault.message))?;
        let readers = task.disks.iter().map(|source| self.host.read(source));
        let readers = readers.collect::<std::result::Result<Vec<_>, _>>()?;
        let disks: Vec<_> = readers.iter().map(|reader| &*reader.disk).collect();
        let (most, total) =
            (archive::most(&disks).map_err(|e| failed(&e))?, disks.iter().map(|d| d.size()).sum());
        if most > LARGEST {
            return Err(failed(&format!("it may have {most} bytes, and an object has {LARGEST} at most")));
        }
        let mut done = 0;
        let mut go_on = |more| {
            done += more;
            running.tell(done, total);
            !self.imports.is_ending()
        };
        let to = objects.write(&task.bucket, &task.key, most, task.object_tags.iter());
        let mut to = to.map_err(|e| failed(&e))?;
        archive::write(&mut to, &task.image, &disks, &mut go_on).map_err(|e| refused(&e))?;
        to.finish().map_err(|e| failed(&e))
    }

    /// Begins to make an image of an object. It is `pending` when this returns.
    ///
    /// # Errors
    /// `NoSuchBucket`, `NoSuchKey`, `AccessDenied`, `Unavailable`; `InvalidParameterValue`: the object is no image; `InvalidAMIName.*`;
    /// `InvalidAMIID.*`: of its kernel or RAM disk, which the account has to be allowed to boot.
    pub fn create_restore_task(&self, account: &str, ask: &RestoreAsk) -> Result<String> {
        let objects = self.objects()?;
        objects::check_bucket(&ask.bucket)?;
        objects::check_key("ObjectKey", &ask.key)?;
        ask.name.as_deref().map_or(Ok(()), images::check_name)?;
        tags::check(&ask.tags)?;
        tags::check(&ask.snapshot_tags)?;
        let objects = objects.for_call()?;
        objects.check(&ask.bucket, account)?;
        let refused =
            |why: &str| Fault::value("ObjectKey", &ask.key, &format!("The object is no image: {why}."));
        let opened = Archive::open::<StoredImage>(objects.read(&ask.bucket, &ask.key)?);
        let (archive, said) = opened.map_err(|error| match error {
            ArchiveError::Bad(_) => refused(&error.to_string()),
            error => Fault::new("Unavailable", format!("{error}; try again later")),
        })?;
        let sizes = archive.disks;
        check_said(&said, &sizes).map_err(|why| refused(&why))?;
        let with = |own: &Tags, asked: &Tags| {
            let mut all = own.clone();
            all.extend(asked.clone());
            tags::check(&all).map(|()| all)
        };
        let image_tags = with(&said.tags, &ask.tags)?;
        let (mut devices, mut disks, mut sizes) = (Vec::new(), Vec::new(), sizes.into_iter());
        for StoredDevice { device, snapshot } in &said.devices {
            let mut device = device.clone();
            if let (Some(snapshot), Some(bytes)) = (snapshot, snapshot.as_ref().and_then(|_| sizes.next())) {
                let tags = with(&snapshot.tags, &ask.snapshot_tags)?;
                let disk = RestoreDisk { snapshot: id::new("snap"), bytes, tags, done: false };
                device.snapshot = Some(disk.snapshot.clone());
                disks.push(disk);
            }
            devices.push(device);
        }
        self.transact(|work| {
            let image = id::new("ami");
            let name = ask.name.as_ref().unwrap_or(&said.name);
            self.take_name(work, account, name, &image)?;
            // The object may be anybody's, and name what is not for the account.
            for (kind, id) in [(ImageKind::Kernel, &said.kernel), (ImageKind::Ramdisk, &said.ramdisk)] {
                id.as_ref().map(|id| self.bootable(work, account, kind, id)).transpose()?;
            }
            work.put(&Image {
                description: said.description.clone(),
                kernel: said.kernel.clone(),
                ramdisk: said.ramdisk.clone(),
                root_device: said.root_device.clone(),
                devices: devices.clone(),
                pending: true,
                ena_support: said.ena_support,
                tags: image_tags.clone(),
                ..images::blank(&image, account, name)
            })?;
            work.put(&RestoreTask {
                id: image.clone(),
                account: account.into(),
                bucket: ask.bucket.clone(),
                key: ask.key.clone(),
                image: said.clone(),
                disks: disks.clone(),
                undone: false,
            })?;
            Ok(image)
        })
    }

    /// Looks at an image that is made of an object. Returns when it is to be looked at again without a change.
    pub(super) fn step_restore(&self, id: &str) -> Result<Option<Duration>> {
        let Some(task) = self.get::<RestoreTask>(id)? else { return Ok(None) };
        let wanted = || self.get::<Image>(id).ok().flatten().is_some();
        // It was deregistered; or it is being undone already.
        if task.undone || self.get::<Image>(id)?.is_none() {
            return self.undo_restore(&task, None).map(|()| None);
        }
        let Some(running) = self.imports.begin(id) else { return Ok(Some(WAIT)) };
        let (mut seen, total) = (0, task.disks.iter().map(|disk| disk.bytes).sum());
        let mut done = 0;
        let mut go_on = |more| {
            done += more;
            running.tell(done, total);
            let look = done - seen >= LOOK;
            seen = if look { done } else { seen };
            !self.imports.is_ending() && (!look || wanted())
        };
        let made = self.restore_disks(&task, &mut go_on);
        match made {
            Ok(()) => {
                return self.transact(|work| {
                    // It was deregistered this moment, which the next step sees.
                    let Some(mut image) = work.get::<Image>(id)? else { return Ok(Some(WAIT)) };
                    image.pending = false;
                    work.put(&image)?;
                    work.delete::<RestoreTask>(id);
                    Ok(None)
                });
            }
            // The next process carries on; or it was deregistered, which the next step sees.
            Err(HostError::Busy(_)) => return Ok(Some(WAIT)),
            Err(error) => {
                tracing::warn!(image = id, %error, "no image is made of its object");
                self.undo_restore(&task, Some(&error.to_string()))?;
            }
        }
        Ok(None)
    }

    fn restore_disks(
        &self,
        task: &RestoreTask,
        go_on: &mut archive::GoOn<'_>,
    ) -> std::result::Result<(), HostError> {
        let failed = |error: &dyn std::fmt::Display| HostError::Failed(error.to_string());
        let objects = self.objects().map_err(|fault| failed(&fault.message))?;
        let reader = objects.read(&task.bucket, &task.key).map_err(|e| failed(&e))?;
        let (mut archive, said) = Archive::open::<StoredImage>(reader).map_err(|e| refused(&e))?;
        if said != task.image || !archive.disks.iter().eq(task.disks.iter().map(|disk| &disk.bytes)) {
            return Err(failed(&"its object is another one now"));
        }
        let saids = said.devices.iter().filter_map(|device| device.snapshot.as_ref());
        for (disk, said) in task.disks.iter().zip(saids) {
            let mut read = false;
            if !disk.done {
                self.host.write_snapshot(&disk.snapshot, &mut |file| {
                    read = true;
                    archive.disk(Some(file), go_on).map_err(|e| refused(&e))
                })?;
                self.restored(task, disk, said).map_err(|fault| failed(&fault.message))?;
            }
            if !read {
                archive.disk(None, go_on).map_err(|e| refused(&e))?;
            }
        }
        archive.end().map_err(|e| refused(&e))
    }

    /// Writes down that a disk is there.
    fn restored(&self, task: &RestoreTask, disk: &RestoreDisk, said: &StoredSnapshot) -> Result<()> {
        self.transact(|work| {
            let Some(mut task) = work.get::<RestoreTask>(&task.id)? else { return Ok(()) };
            let own = task.disks.iter_mut().find(|own| own.snapshot == disk.snapshot);
            own.into_iter().for_each(|own| own.done = true);
            work.put(&Snapshot {
                id: disk.snapshot.clone(),
                source: Source::Snapshot(disk.snapshot.clone()),
                account: task.account.clone(),
                volume: snapshots::NO_VOLUME.into(),
                gib: said.gib,
                started: now(),
                description: said.description.clone(),
                together: Vec::new(),
                copy_of: None,
                key: None,
                public: false,
                shared: Vec::new(),
                complete: true,
                failed: None,
                deleting: false,
                tags: disk.tags.clone(),
            })?;
            work.put(&task)
        })
    }

    /// Takes away what there is of the disks of an image that is not to be, or, for `why`, cannot be. That it is undone is
    /// written down first: else who carries on after a crash would take disks for made that are gone.
    fn undo_restore(&self, task: &RestoreTask, why: Option<&str>) -> Result<()> {
        self.transact(|work| {
            let Some(mut task) = work.get::<RestoreTask>(&task.id)?.filter(|task| !task.undone) else {
                return Ok(());
            };
            for disk in &task.disks {
                if let Some(mut snapshot) = work.get::<Snapshot>(&disk.snapshot)? {
                    snapshot.deleting = true;
                    work.put(&snapshot)?;
                }
            }
            if let (Some(mut image), Some(why)) = (work.get::<Image>(&task.id)?, why) {
                image.pending = false;
                image.devices.iter_mut().for_each(|device| device.snapshot = None);
                image.failed = Some(Reason {
                    code: "Client.InvalidObject".into(),
                    message: format!("Client.InvalidObject: {}/{}: {why}", task.bucket, task.key),
                });
                work.put(&image)?;
            }
            task.undone = true;
            work.put(&task)
        })?;
        for disk in &task.disks {
            self.host.delete_snapshot(&disk.snapshot).map_err(Fault::internal)?;
        }
        self.transact(|work| {
            for disk in &task.disks {
                work.delete::<Snapshot>(&disk.snapshot);
            }
            work.delete::<RestoreTask>(&task.id);
            Ok(())
        })
    }

    /// Forgets images that were written long ago.
    ///
    /// # Errors
    /// The store's.
    pub fn forget_stored(&self) -> Result<()> {
        for task in self.all::<StoreTask>()? {
            let over = task.state != StoreState::InProgress;
            if over && now().duration_since(task.started) > REMEMBERED {
                self.transact(|work| {
                    work.delete::<StoreTask>(&task.id);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
