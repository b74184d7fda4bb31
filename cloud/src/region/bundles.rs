//! Images whose root is on instance store: BundleInstance writes such a root to a bucket, RegisterImage names it, and an instance
//! of it has a copy that is its own until it is terminated.
//!
//! ```text
//!   pending ─► bundling: the disk is kept as it is at an instant ─► storing: it is written ─► complete, or failed
//!         └──────────── CancelBundleTask ─► cancelling ─► failed: nothing of it is there
//! ```
//! What became of one is written down before anything is removed, so that who carries on after a crash does not begin anew.
//! What a host keeps of a bundle has the id of a snapshot that nobody is told of. It goes with the last image of the bundle.

use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;

use crate::archive::{self, Archive, ArchiveError};
use crate::bundle::{self, MANIFEST, MANIFEST_MOST, Manifest};
use crate::fault::{Fault, Result};
use crate::host::{HostError, Source};
use crate::id;
use crate::model::{
    Bundle, BundleState, BundleTask, BundleTemplate, Image, Instance, InstanceState, Reason, Snapshot,
    Volume, VolumeState,
};
use crate::objects::{self, ObjectError, Objects};

use super::imports::{Running, WAIT};
use super::{Region, Work, now, tags};

/// How long one that is over is told.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(7 * 24);
/// After so many bytes it is looked whether what is done is still wanted.
const LOOK: u64 = 64 << 20;
/// When it is looked again whether nobody needs what the host keeps of a bundle.
const SOON: Duration = Duration::from_secs(2);

/// What BundleInstance asks for.
#[derive(Debug, Clone, Default)]
pub struct BundleAsk {
    /// The instance.
    pub instance: Option<String>,
    /// The image, where there is no instance.
    pub image: Option<String>,
    /// Where it goes.
    pub bucket: String,
    /// What its objects are called.
    pub prefix: String,
}

/// How the fetching of a bundle went.
pub(super) enum Fetched {
    /// The instance has its root.
    Ready,
    /// It is to be looked at again.
    Wait(Duration),
    /// It cannot be, and why: a code and a message.
    Failed(&'static str, String),
}

/// What the host calls the root disk of an instance that has it on instance store.
pub(super) fn root_of(instance: &str) -> String {
    format!("{}{}", crate::host::OWN_ROOT, instance.trim_start_matches("i-"))
}

/// An instance that has no root volume cannot be stopped, nor what has to be stopped for.
pub(super) fn check_stoppable(instance: &Instance, what: &str) -> Result<()> {
    match instance.bundle {
        None => Ok(()),
        Some(_) => Err(Fault::new(
            "UnsupportedOperation",
            format!(
                "The instance '{}' does not have an 'ebs' root device type and cannot be {what}",
                instance.id
            ),
        )),
    }
}

/// What is claimed for the objects of a bundle.
fn parts_of(prefix: &str) -> String {
    format!("{prefix}.part")
}

fn no_task(id: &str) -> Fault {
    Fault::new("InvalidBundleID.NotFound", format!("The bundle task ID '{id}' does not exist"))
}

fn why(error: &dyn std::error::Error) -> HostError {
    HostError::Failed(crate::host::told(error))
}

impl Region {
    /// Begins to write a root disk to a bucket.
    ///
    /// # Errors
    /// `InvalidInstanceID.*`, `IncorrectState`, `BundlingInProgress`, `UnsupportedOperation`: it is encrypted;
    /// `InvalidBucketName`, `InvalidParameterValue`, `AccessDenied`, `Unavailable`.
    pub fn bundle(&self, account: &str, ask: &BundleAsk) -> Result<BundleTask> {
        let objects = self.objects()?;
        objects::check_bucket(&ask.bucket)?;
        bundle::check_prefix(&ask.prefix)?;
        self.transact(|work| self.to_bundle(work, account, ask).map(drop))?;
        let objects = objects.for_call()?;
        objects.take(&ask.bucket, account)?;
        // Another region may be at one of this name.
        objects.claim(&ask.bucket, &parts_of(&ask.prefix)).map(drop).map_err(|error| match error {
            ObjectError::Busy(_) => Fault::new("BundlingInProgress", error.to_string()),
            error => error.into(),
        })?;
        match objects.read(&ask.bucket, &format!("{}{MANIFEST}", ask.prefix)) {
            Err(ObjectError::Missing(_)) => {}
            Err(error) => return Err(error.into()),
            // Images may have been registered of it.
            Ok(_) => {
                let why = format!("There is a bundle of this name in '{}'; choose another.", ask.bucket);
                return Err(Fault::value("Prefix", &ask.prefix, &why));
            }
        }
        self.transact(|work| {
            let task = self.to_bundle(work, account, ask)?;
            work.put(&task)?;
            Ok(task)
        })
    }

    /// The bundle that is asked for, if it can be.
    fn to_bundle(&self, work: &mut Work<'_>, account: &str, ask: &BundleAsk) -> Result<BundleTask> {
        let encrypted = |id: &str| {
            let why = format!("'{id}' is encrypted: in a bucket it would be plain");
            Fault::new("UnsupportedOperation", why)
        };
        let at = now();
        let mut task = BundleTask {
            id: id::new("bun"),
            account: account.into(),
            instance: ask.instance.clone(),
            source: Source::Empty,
            volume: None,
            kernel: None,
            ramdisk: None,
            bucket: ask.bucket.clone(),
            prefix: ask.prefix.clone(),
            started: at,
            updated: at,
            state: BundleState::Pending,
            parts: 0,
            written: false,
            failed: None,
        };
        let same = |other: &BundleTask| {
            let place = other.bucket == task.bucket && other.prefix == task.prefix;
            !other.state.is_over() && (place || task.instance.is_some() && other.instance == task.instance)
        };
        if let Some(other) = work.all::<BundleTask>("")?.iter().find(|other| same(other)) {
            let why = format!("The bundle task '{}' is under way; wait for it, or cancel it", other.id);
            return Err(Fault::new("BundlingInProgress", why));
        }
        if let Some(id) = &ask.instance {
            let instance: Instance = tags::own(work, account, id)?;
            if !matches!(instance.state, InstanceState::Running | InstanceState::Stopped) {
                let why = format!("Instance '{id}' is not 'running' or 'stopped'.");
                return Err(Fault::new("IncorrectState", why));
            }
            let volume = match instance.devices.iter().find(|device| device.name == instance.root_device) {
                _ if instance.bundle.is_some() => root_of(id),
                Some(root) => {
                    let volume: Volume = tags::own(work, account, &root.volume)?;
                    if volume.key.is_some() {
                        return Err(encrypted(&volume.id));
                    }
                    if volume.state != VolumeState::Ready {
                        let why = format!("The volume '{}' is not 'available' or 'in-use'", volume.id);
                        return Err(Fault::new("IncorrectState", why));
                    }
                    volume.id
                }
                None => {
                    let why = format!("The instance '{id}' has no root volume");
                    return Err(Fault::new("IncorrectState", why));
                }
            };
            // Nobody is told of it: it goes once it is written.
            task.source = Source::Snapshot(id::of("snap", &task.id));
            (task.volume, task.kernel, task.ramdisk) = (Some(volume), instance.kernel, instance.ramdisk);
            return Ok(task);
        }
        let image = ask.image.as_deref().ok_or_else(|| Fault::missing("InstanceId"))?;
        let image = self.launchable(work, account, image)?;
        let root = image.devices.iter().find(|device| device.name == image.root_device);
        let snapshot = root.and_then(|root| root.snapshot.clone());
        let none =
            || Fault::new("UnsupportedOperation", format!("The image '{}' has no root snapshot", image.id));
        let snapshot = work.get::<Snapshot>(&snapshot.ok_or_else(none)?)?;
        let denied =
            || Fault::new("InvalidRequest", "You do not have permission to access the storage of this ami");
        let snapshot = snapshot.filter(|s| s.readable(account) && !s.deleting).ok_or_else(denied)?;
        if snapshot.key.is_some() {
            return Err(encrypted(&snapshot.id));
        }
        (task.source, task.kernel, task.ramdisk) = (snapshot.source, image.kernel, image.ramdisk);
        Ok(task)
    }

    /// How far a bundle is, in percent.
    pub fn bundle_progress(&self, task: &BundleTask) -> u64 {
        let (done, total) = self.imports.figures(&task.id);
        done.min(total).saturating_mul(100).checked_div(total).unwrap_or(0).min(99)
    }

    /// Has a bundle not be.
    ///
    /// # Errors
    /// `InvalidBundleID.NotFound`, `IncorrectState`: it is over.
    pub fn cancel_bundle(&self, account: &str, id: &str) -> Result<BundleTask> {
        self.transact(|work| {
            let task = work.get::<BundleTask>(id)?.filter(|task| task.account == account);
            let mut task = task.ok_or_else(|| no_task(id))?;
            if task.state.is_over() || task.written {
                let state = if task.written { BundleState::Complete } else { task.state };
                let why = format!("The bundle task '{id}' is {} already", state.name());
                return Err(Fault::new("IncorrectState", why));
            }
            (task.state, task.updated) = (BundleState::Cancelling, now());
            work.put(&task)?;
            Ok(task)
        })
    }

    /// Looks at a bundle. Returns when it is to be looked at again without a change.
    pub(super) fn step_bundle(&self, id: &str) -> Result<Option<Duration>> {
        let task = self.get::<BundleTask>(id)?.filter(|task| !task.state.is_over());
        let Some(mut task) = task else { return Ok(None) };
        let Some(running) = self.imports.begin(id) else { return Ok(Some(WAIT)) };
        // Another region may have one of this name.
        let claim = self.objects()?.claim(&task.bucket, &parts_of(&task.prefix));
        if task.state != BundleState::Cancelling && task.failed.is_none() && !task.written {
            let written = claim.as_ref().map_err(|e| why(e)).and_then(|_| self.write_bundle(&task, &running));
            let failed = match written {
                Ok(()) => None,
                // The next process begins it anew; or it was cancelled, which the next step sees.
                Err(HostError::Busy(_)) => return Ok(Some(WAIT)),
                Err(error) => {
                    tracing::warn!(bundle = id, %error, "nothing is bundled");
                    Some(Reason { code: "Server.InternalError".into(), message: error.to_string() })
                }
            };
            let found = self.change_bundle(id, |task| {
                if task.state != BundleState::Cancelling {
                    (task.written, task.failed) = (failed.is_none(), failed.clone());
                }
            })?;
            let Some(found) = found else { return Ok(None) };
            task = found;
        }
        if !task.written && (claim.is_ok() || task.parts > 0) {
            if claim.is_err() {
                return Ok(Some(WAIT));
            }
            match self.remove_bundle(&mut task) {
                Ok(true) => {}
                Ok(false) => return Ok(Some(Duration::ZERO)),
                // It may be why it failed; whoever bundles under this name anew writes over it.
                Err(error) => tracing::warn!(bundle = id, %error, "what was written of it stays"),
            }
        }
        if let (Some(_), Source::Snapshot(kept)) = (&task.volume, &task.source) {
            self.host.delete_snapshot(kept).map_err(Fault::internal)?;
        }
        self.change_bundle(id, |task| {
            task.state = if task.written { BundleState::Complete } else { BundleState::Failed };
            if !task.written && task.failed.is_none() {
                let (code, message) = ("Client.Cancelled".into(), "The bundle task was cancelled".into());
                task.failed = Some(Reason { code, message });
            }
        })?;
        Ok(None)
    }

    /// Writes down what has become of a bundle that is not over; tells what is written of it then.
    fn change_bundle(&self, id: &str, change: impl Fn(&mut BundleTask)) -> Result<Option<BundleTask>> {
        self.transact(|work| {
            let task = work.get::<BundleTask>(id)?.filter(|task| !task.state.is_over());
            let Some(mut task) = task else { return Ok(None) };
            let before = task.clone();
            change(&mut task);
            if task != before {
                task.updated = now();
                work.put(&task)?;
            }
            Ok(Some(task))
        })
    }

    /// Brings a bundle a state further, unless it is cancelled.
    fn bundle_is(&self, id: &str, state: BundleState) -> Result<()> {
        let further = |task: &mut BundleTask| {
            if task.state != BundleState::Cancelling {
                task.state = state;
            }
        };
        self.change_bundle(id, further).map(drop)
    }

    /// Removes some of what a task wrote that is not to be; tells whether that was all.
    fn remove_bundle(&self, task: &mut BundleTask) -> Result<bool> {
        let objects = self.objects()?;
        // A bundle is what its manifest names: without that it is none.
        let key = format!("{}{MANIFEST}", task.prefix);
        match self.manifest_of(task)? {
            Some(true) => objects.delete(&task.bucket, &key)?,
            Some(false) => return Ok(true),
            None => {}
        }
        let left = task.parts.saturating_sub(bundle::BATCH);
        bundle::remove(objects, &task.bucket, &task.prefix, left..task.parts)?;
        self.change_bundle(&task.id, |task| task.parts = task.parts.min(left))?;
        Ok(left == 0)
    }

    /// Whether the manifest where a task writes is its own; `None`: there is none.
    fn manifest_of(&self, task: &BundleTask) -> Result<Option<bool>> {
        let key = format!("{}{MANIFEST}", task.prefix);
        match self.objects()?.small(&task.bucket, &key, MANIFEST_MOST) {
            Err(ObjectError::Missing(_)) => Ok(None),
            text => {
                let manifest = Manifest::read(&key, &text?).ok();
                Ok(Some(manifest.is_some_and(|manifest| manifest.task.as_ref() == Some(&task.id))))
            }
        }
    }

    fn write_bundle(&self, task: &BundleTask, running: &Running<'_>) -> std::result::Result<(), HostError> {
        let fault = |fault: Fault| why(&fault);
        let objects = self.objects().map_err(fault)?;
        match self.manifest_of(task).map_err(fault)? {
            // It was killed before this was written down.
            Some(true) => return Ok(()),
            Some(false) => return Err(HostError::Failed("there is another bundle of this name now".into())),
            None => {}
        }
        if let (Some(volume), Source::Snapshot(id)) = (&task.volume, &task.source)
            && task.state != BundleState::Storing
            && matches!(self.host.content(&task.source), Err(HostError::Missing(_)))
        {
            self.bundle_is(&task.id, BundleState::Bundling).map_err(fault)?;
            self.host.create_snapshots(&[(id, volume)])?;
        }
        self.bundle_is(&task.id, BundleState::Storing).map_err(fault)?;
        let reader = self.host.read(&task.source)?;
        let (total, mut done, mut seen) = (reader.disk.size(), 0, 0);
        let wanted = || {
            let task = self.get::<BundleTask>(&task.id).ok().flatten();
            task.is_some_and(|task| task.state != BundleState::Cancelling)
        };
        let mut go_on = |more| {
            done += more;
            running.tell(done, total);
            let look = done - seen >= LOOK;
            seen = if look { done } else { seen };
            !self.imports.is_ending() && (!look || wanted())
        };
        let mut ahead = |parts| {
            let more = self.change_bundle(&task.id, |task| task.parts = task.parts.max(parts));
            more.map(drop).map_err(|fault| ObjectError::Failed(fault.message))
        };
        let mut parts = bundle::Writer::new(objects, &task.bucket, &task.prefix, &mut ahead);
        let written = archive::write(&mut parts, &"bundle", &[&*reader.disk], &mut go_on);
        let written = written.map_err(|error| match error {
            ArchiveError::Stopped => HostError::Busy(error.to_string()),
            error => why(&error),
        });
        written?;
        let parts = parts.finish().map_err(|e| why(&e))?;
        if !wanted() {
            return Err(HostError::Busy("it was cancelled".into()));
        }
        let (kernel, ramdisk) = (task.kernel.clone(), task.ramdisk.clone());
        let manifest = Manifest { task: Some(task.id.clone()), size: total, kernel, ramdisk, parts };
        let text = manifest.text(&task.prefix).into_bytes();
        objects.put(&task.bucket, &format!("{}{MANIFEST}", task.prefix), text).map_err(|e| why(&e))
    }

    /// The bundle at a place, which the account may use, and what its manifest says.
    ///
    /// # Errors
    /// `InvalidManifest`, `AccessDenied`, `NoSuchBucket`, `Unavailable`.
    pub(super) fn bundle_at(&self, account: &str, location: &str) -> Result<(Bundle, Manifest)> {
        let objects = self.objects()?.for_call()?;
        let bad = |why: &str| {
            Fault::new("InvalidManifest", format!("The manifest '{location}' cannot be used: {why}"))
        };
        let (bucket, key) =
            location.split_once('/').ok_or_else(|| bad("it is like BUCKET/PREFIX.manifest.xml"))?;
        objects::check_bucket(bucket)?;
        objects::check_key("ImageLocation", key)?;
        objects.check(bucket, account)?;
        let text = match objects.small(bucket, key, MANIFEST_MOST) {
            Err(ObjectError::Missing(_)) => return Err(bad("there is no such object")),
            text => text?,
        };
        let manifest = Manifest::read(key, &text).map_err(|why| bad(&why))?;
        let digest = format!("{:x}", <sha2::Sha256 as sha2::Digest>::digest(&text));
        Ok((Bundle { location: location.into(), digest, bytes: manifest.size }, manifest))
    }

    /// Whether the account may have the bundle of an image for its own.
    ///
    /// # Errors
    /// `AccessDenied`, `NoSuchBucket`, `Unavailable`.
    pub(super) fn may_copy(&self, account: &str, image: &Image) -> Result<()> {
        match &image.bundle {
            Some(bundle) => self.objects()?.for_call()?.check(bundle.place().0, account),
            None => Ok(()),
        }
    }

    /// Writes down that an image of a bundle comes or goes.
    pub(super) fn bundle_changed(&self, work: &mut Work<'_>, bundle: &Bundle) -> Result<()> {
        work.put(&BundleTemplate { id: bundle.template(), changed: now() })
    }

    /// Has an instance that is to run have its root.
    pub(super) fn ready_root(&self, instance: &Instance, bundle: &Bundle) -> Result<Fetched> {
        let template = Source::Snapshot(bundle.template());
        if matches!(self.host.content(&template), Err(HostError::Missing(_))) {
            let id = bundle.template();
            let Some(running) = self.imports.begin(&id) else { return Ok(Fetched::Wait(WAIT)) };
            let wanted = || {
                let now = self.get::<Instance>(&instance.id).ok().flatten();
                now.is_some_and(|now| now.state == InstanceState::Pending)
            };
            match self.fetch_bundle(bundle, &running, &wanted) {
                Ok(()) => {}
                Err(HostError::Busy(_)) => return Ok(Fetched::Wait(WAIT)),
                Err(error @ HostError::NoRoom(_)) => {
                    return Ok(Fetched::Failed("Server.InsufficientInstanceCapacity", error.to_string()));
                }
                Err(error) => {
                    let why = format!("{} cannot be launched: {error}", bundle.location);
                    return Ok(Fetched::Failed("Client.InvalidManifest", why));
                }
            }
        }
        match self.host.create_volume(&root_of(&instance.id), bundle.bytes, &template, None) {
            Ok(()) => Ok(Fetched::Ready),
            // It went this moment, with the last image of its bundle.
            Err(HostError::Missing(_)) => Ok(Fetched::Wait(WAIT)),
            Err(error @ HostError::NoRoom(_)) => {
                Ok(Fetched::Failed("Server.InsufficientInstanceCapacity", error.to_string()))
            }
            Err(error) => Ok(Fetched::Failed("Server.InternalError", error.to_string())),
        }
    }

    /// Keeps what a bundle holds: whole, and as it was when its image was registered.
    fn fetch_bundle(
        &self,
        bundle: &Bundle,
        running: &Running<'_>,
        wanted: &dyn Fn() -> bool,
    ) -> std::result::Result<(), HostError> {
        let objects: &Arc<Objects> = self.objects().map_err(|fault| why(&fault))?;
        let (bucket, key) = bundle.place();
        let text = objects.small(bucket, key, MANIFEST_MOST).map_err(|e| why(&e))?;
        let digest = format!("{:x}", <sha2::Sha256 as sha2::Digest>::digest(&text));
        if digest != bundle.digest {
            let why = "its manifest is another one than was registered; register it anew";
            return Err(HostError::Failed(why.into()));
        }
        let manifest = Manifest::read(key, &text).map_err(HostError::Failed)?;
        let refused = |error: ArchiveError| match error {
            ArchiveError::Stopped => HostError::Busy(error.to_string()),
            error => super::stored::refused(&error),
        };
        let (mut done, mut seen) = (0, 0);
        let mut go_on = |more| {
            done += more;
            running.tell(done, bundle.bytes);
            let look = done - seen >= LOOK;
            seen = if look { done } else { seen };
            !self.imports.is_ending() && (!look || wanted())
        };
        let kept = self.host.write_snapshot(&bundle.template(), &mut |file| {
            let parts = bundle::Reader::new(objects, bucket, &manifest);
            let (mut archive, _) = Archive::open::<String>(parts).map_err(refused)?;
            if archive.disks != [bundle.bytes] {
                return Err(HostError::Failed("its disk is not what its manifest says".into()));
            }
            let size = archive.disk(Some(file), &mut go_on).map_err(refused)?;
            archive.end().map_err(refused)?;
            Ok(size)
        });
        kept.map(drop)
    }

    /// Looks whether anybody needs what the host keeps of a bundle. Returns when it is to be looked at again.
    pub(super) fn step_template(&self, id: &str) -> Result<Option<Duration>> {
        if self.get::<BundleTemplate>(id)?.is_none() {
            return Ok(None);
        }
        let of = |bundle: &Option<Bundle>| bundle.as_ref().is_some_and(|bundle| bundle.template() == id);
        if self.all::<Image>()?.iter().any(|image| of(&image.bundle)) {
            return Ok(None);
        }
        let waits = |instance: &Instance| instance.state == InstanceState::Pending && of(&instance.bundle);
        if self.all::<Instance>()?.iter().any(waits) {
            return Ok(Some(SOON));
        }
        let Some(_alone) = self.imports.begin(id) else { return Ok(Some(SOON)) };
        self.host.delete_snapshot(id).map_err(Fault::internal)?;
        self.transact(|work| {
            // One may have been registered meanwhile: what it needs is fetched anew.
            if !work.all::<Image>("")?.iter().any(|image| of(&image.bundle)) {
                work.delete::<BundleTemplate>(id);
            }
            Ok(())
        })?;
        Ok(None)
    }

    /// Forgets bundles that were over long ago.
    ///
    /// # Errors
    /// The store's.
    pub fn forget_bundles(&self) -> Result<()> {
        for task in self.all::<BundleTask>()? {
            if task.state.is_over() && now().duration_since(task.updated) > REMEMBERED {
                self.transact(|work| {
                    work.delete::<BundleTask>(&task.id);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
