//! Images: those of the host's templates, and those made of instances.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use crate::bundle::Manifest;
use crate::fault::{Fault, Result};
use crate::host::{Source, Template};
use crate::id;
use crate::model::{
    Image, ImageDevice, ImageKind, Instance, InstanceState, Name, Shape, Snapshot, Tags, Volume,
};

use super::snapshots::{self, begun};
use super::{DeviceAsk, Encryption, Region, Work, now, recall, remember, tags};

/// The root's device name of images made here.
pub(super) const ROOT: &str = "/dev/xvda";
const GIB: u64 = 1 << 30;

/// What CreateImage asks for.
#[derive(Debug, Clone, Default)]
pub struct NewImage {
    /// The instance.
    pub instance: String,
    /// The image's name.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// The image's tags.
    pub tags: Tags,
    /// The tags of its snapshots.
    pub snapshot_tags: Tags,
    /// Changes of the instance's disks, for the image.
    pub devices: Vec<DeviceAsk>,
}

/// What RegisterImage asks for.
#[derive(Debug, Clone, Default)]
pub struct Registration {
    /// The image's name.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// The manifest of a bundle that its root begins with, `BUCKET/PREFIX.manifest.xml`.
    pub location: Option<String>,
    /// The root's device name.
    pub root_device: Option<String>,
    /// Its disks.
    pub devices: Vec<DeviceAsk>,
    /// The kernel that its instances boot by default.
    pub kernel: Option<String>,
    /// The RAM disk that goes with it.
    pub ramdisk: Option<String>,
    /// Enhanced networking.
    pub ena_support: bool,
    /// Its tags.
    pub tags: Tags,
}

/// What CopyImage asks for.
#[derive(Debug, Clone, Default)]
pub struct ImageCopy {
    /// The image's id in its region.
    pub image: String,
    /// The copy's name.
    pub name: String,
    /// What its owner says of it; by default what it says of the original.
    pub description: Option<String>,
    /// The original's tags come along, where it is the account's own.
    pub copy_tags: bool,
    /// The copy's tags.
    pub tags: Tags,
    /// The tags of its snapshots.
    pub snapshot_tags: Tags,
    /// Whether its snapshots are encrypted.
    pub encryption: Encryption,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
}

/// The speed of a type that has none by itself.
fn provisioned(kind: &str, iops: Option<u64>) -> Option<u64> {
    iops.filter(|_| matches!(kind, "io1" | "io2"))
}

/// A disk of an image as it is asked for.
fn device(work: &mut Work<'_>, account: &str, ask: &DeviceAsk, root: &str) -> Result<ImageDevice> {
    let snapshot = ask.snapshot.as_ref().map(|id| snapshots::readable(work, account, id)).transpose()?;
    let least = snapshot.as_ref().map_or(0, |snapshot| snapshot.gib);
    let gib = ask.gib.or(snapshot.as_ref().map(|snapshot| snapshot.gib)).ok_or_else(|| {
        Fault::new("MissingParameter", format!("The device '{}' needs a size or a snapshot", ask.name))
    })?;
    if gib < least {
        let why = format!("Volume of size {gib}GB is smaller than its snapshot, expect size >= {least}GB");
        return Err(Fault::new("InvalidBlockDeviceMapping", why));
    }
    let key = snapshot.as_ref().and_then(|snapshot| snapshot.key.as_ref());
    let encrypted = ask.encryption.encrypted.unwrap_or(key.is_some());
    if snapshot.is_some() && encrypted != key.is_some() {
        let why = format!("The device '{}' is encrypted if its snapshot is; CopySnapshot encrypts", ask.name);
        return Err(Fault::combination(why));
    }
    let shape = Shape::new(ask.kind.as_deref(), gib, ask.iops, ask.throughput)?;
    Ok(ImageDevice {
        encrypted,
        name: ask.name.clone(),
        snapshot: snapshot.map(|snapshot| snapshot.id),
        gib,
        iops: provisioned(&shape.kind, shape.iops),
        kind: shape.kind,
        delete_on_termination: ask.delete_on_termination.unwrap_or(ask.name == root),
    })
}

/// There is no such image, or it is not for the account.
pub(super) fn missing(id: &str) -> Fault {
    Fault::new("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"))
}

/// Whether an image can be launched, or booted, by those who may.
pub(super) fn check_available(image: &Image) -> Result<()> {
    let id = &image.id;
    let why = if image.pending || image.failed.is_some() {
        format!("The image '{id}' is not available; wait until it is")
    } else if image.disabled {
        format!("The image '{id}' is disabled; its owner can enable it (EnableImage)")
    } else {
        return Ok(());
    };
    Err(Fault::new("InvalidAMIID.Unavailable", why))
}

pub(super) fn check_name(name: &str) -> Result<()> {
    let known = |c: char| c.is_ascii_alphanumeric() || " ()[]./-'@_".contains(c);
    match (3..=128).contains(&name.len()) && name.chars().all(known) {
        true => Ok(()),
        false => Err(Fault::new(
            "InvalidAMIName.Malformed",
            "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', '-', '/' and '_'",
        )),
    }
}

/// A machine's image without disks, its owner's alone: on it the rest is put.
pub(super) fn blank(id: &str, account: &str, name: &str) -> Image {
    Image {
        id: id.into(),
        account: account.into(),
        name: name.into(),
        description: String::new(),
        created: now(),
        kind: ImageKind::Machine,
        bundle: None,
        kernel: None,
        ramdisk: None,
        root_device: String::new(),
        devices: Vec::new(),
        stores: BTreeMap::new(),
        public: false,
        launch: Vec::new(),
        deprecated: None,
        disabled: false,
        pending: false,
        failed: None,
        ena_support: true,
        source_instance: None,
        tags: Tags::new(),
    }
}

/// What a template is called as an image, and its snapshot.
fn ids(template: &Template) -> (String, String) {
    let content = format!("{}/{}", template.name, template.digest);
    (id::of("ami", &content), id::of("snap", &content))
}

impl Region {
    /// Registers every template of the host that is not an image yet, and its kernels and RAM disks. Returns the ids of the
    /// new ones.
    ///
    /// # Errors
    /// The host's, the store's.
    pub fn adopt_templates(&self) -> Result<Vec<String>> {
        let mut new = Vec::new();
        for template in self.host.templates().map_err(Fault::internal)? {
            let (image, snapshot) = ids(&template);
            let added = self.transact(|work| {
                if work.get::<Snapshot>(&snapshot)?.is_some() {
                    return Ok(false);
                }
                self.adopt(work, &template, &image, &snapshot)?;
                Ok(true)
            })?;
            new.extend(added.then_some(image));
        }
        new.extend(self.adopt_boot_files()?);
        Ok(new)
    }

    fn adopt(&self, work: &mut Work<'_>, template: &Template, image: &str, snapshot: &str) -> Result<()> {
        let gib = template.size.div_ceil(GIB).max(1);
        let account = self.settings.owner.clone();
        work.put(&Snapshot {
            key: None,
            id: snapshot.into(),
            account: account.clone(),
            volume: snapshots::NO_VOLUME.into(),
            gib,
            started: now(),
            description: format!("The template {}", template.name),
            source: Source::Template(template.name.clone()),
            together: Vec::new(),
            copy_of: None,
            public: true,
            shared: Vec::new(),
            complete: true,
            failed: None,
            deleting: false,
            tags: Tags::new(),
        })?;
        work.put(&Image {
            description: format!("Imported as {}", template.name),
            root_device: ROOT.into(),
            devices: vec![ImageDevice {
                encrypted: false,
                name: ROOT.into(),
                snapshot: Some(snapshot.into()),
                gib,
                kind: "gp3".into(),
                iops: None,
                delete_on_termination: true,
            }],
            public: true,
            ..blank(image, &account, &template.name)
        })
    }

    /// Makes an image of an instance: snapshots of its volumes, all at one instant. It is `pending` until they are complete.
    ///
    /// # Errors
    /// `InvalidAMIName.*`, `IncorrectState`, `InvalidInstanceID.*`.
    pub fn create_image(&self, account: &str, new: &NewImage) -> Result<String> {
        check_name(&new.name)?;
        tags::check(&new.tags)?;
        tags::check(&new.snapshot_tags)?;
        super::launch::check_devices(&new.devices)?;
        self.transact(|work| {
            let instance: Instance = tags::own(work, account, &new.instance)?;
            if !matches!(instance.state, InstanceState::Running | InstanceState::Stopped) {
                let why = format!("Instance '{}' is not 'running' or 'stopped'.", instance.id);
                return Err(Fault::new("IncorrectState", why));
            }
            if instance.bundle.is_some() {
                let root = &instance.root_device;
                let why = format!(
                    "Instance does not have a volume attached at root ({root}); BundleInstance keeps what it has there"
                );
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let image = id::new("ami");
            self.take_name(work, account, &new.name, &image)?;
            let (mut devices, mut taken) = (Vec::new(), Vec::new());
            let asked = |name: &str| new.devices.iter().find(|ask| ask.name == name);
            for device in &instance.devices {
                let ask = asked(&device.name);
                if ask.is_some_and(DeviceAsk::leaves_out) {
                    if device.name == instance.root_device {
                        let why = format!("The root device '{}' cannot be left out", device.name);
                        return Err(Fault::new("InvalidBlockDeviceMapping", why));
                    }
                    continue;
                }
                let volume: Volume = tags::own(work, account, &device.volume)?;
                let description = format!("Created by CreateImage({}) for {image}", instance.id);
                let snapshot = begun(&volume, &description, new.snapshot_tags.clone())?;
                let gib = ask.and_then(|ask| ask.gib).unwrap_or(snapshot.gib);
                if gib < snapshot.gib {
                    let why =
                        format!("Volume of size {gib}GB is smaller than {}, which it is made of", volume.id);
                    return Err(Fault::new("InvalidBlockDeviceMapping", why));
                }
                let kind = ask.and_then(|ask| ask.kind.clone()).unwrap_or(volume.kind);
                let iops = ask.and_then(|ask| ask.iops).or(provisioned(&kind, volume.iops));
                let shape = Shape::new(Some(&kind), gib, iops, None)?;
                let goes = ask.and_then(|ask| ask.delete_on_termination);
                devices.push(ImageDevice {
                    encrypted: volume.key.is_some(),
                    name: device.name.clone(),
                    snapshot: Some(snapshot.id.clone()),
                    iops: provisioned(&shape.kind, shape.iops),
                    kind: shape.kind,
                    gib,
                    delete_on_termination: goes.unwrap_or(device.delete_on_termination),
                });
                taken.push(snapshot);
            }
            let mut stores = instance.stores.clone();
            stores.extend(super::launch::stores(&new.devices));
            snapshots::put_together(work, &mut taken)?;
            for ask in new.devices.iter().filter(|ask| !ask.leaves_out()) {
                if !instance.devices.iter().any(|have| have.name == ask.name) {
                    devices.push(device(work, account, ask, &instance.root_device)?);
                }
            }
            work.put(&Image {
                description: new.description.clone(),
                kernel: instance.kernel,
                ramdisk: instance.ramdisk,
                root_device: instance.root_device,
                devices,
                stores,
                pending: true,
                source_instance: Some(instance.id),
                tags: new.tags.clone(),
                ..blank(&image, account, &new.name)
            })?;
            Ok(image)
        })
    }

    /// Makes an image of snapshots, or of a bundle.
    ///
    /// # Errors
    /// `InvalidAMIName.*`, `InvalidManifest`, `AccessDenied`, `InvalidAMIID.*` of a kernel or RAM disk, `InvalidBlockDeviceMapping`, `InvalidSnapshot.*`.
    pub fn register_image(&self, account: &str, new: &Registration) -> Result<String> {
        check_name(&new.name)?;
        tags::check(&new.tags)?;
        super::launch::check_devices(&new.devices)?;
        let mapping = |why: &str| Fault::new("InvalidBlockDeviceMapping", why);
        let bundle = new.location.as_deref().map(|location| self.bundle_at(account, location)).transpose()?;
        let (bundle, manifest) = bundle.unzip();
        let said = |id: &Option<String>, of: fn(&Manifest) -> &Option<String>| {
            id.clone().or_else(|| of(manifest.as_ref()?).clone())
        };
        self.transact(|work| {
            let first = match bundle.is_some() {
                true => Some(ROOT.to_owned()),
                false => new.devices.first().map(|ask| ask.name.clone()),
            };
            let root =
                new.root_device.clone().or(first).ok_or_else(|| mapping("An image needs a root device"))?;
            let image = id::new("ami");
            self.take_name(work, account, &new.name, &image)?;
            let mut devices = Vec::new();
            // Instance stores come with the type: an image says what they are called.
            for ask in new.devices.iter().filter(|ask| !ask.leaves_out()) {
                devices.push(device(work, account, ask, &root)?);
            }
            if bundle.is_some() && devices.iter().any(|device| device.name == root) {
                return Err(mapping(&format!("The root device {root} is the bundle's")));
            }
            if bundle.is_none() && !devices.iter().any(|d| d.name == root && d.snapshot.is_some()) {
                return Err(mapping(&format!("No snapshot specified for the root device {root}")));
            }
            devices.sort_by_key(|device| device.name != root);
            let mut checked = |kind, id: &Option<String>| {
                id.as_ref().map(|id| self.bootable(work, account, kind, id)).transpose()
            };
            let kernel = checked(ImageKind::Kernel, &said(&new.kernel, |m| &m.kernel))?;
            let ramdisk = checked(ImageKind::Ramdisk, &said(&new.ramdisk, |m| &m.ramdisk))?;
            bundle.as_ref().map_or(Ok(()), |bundle| self.bundle_changed(work, bundle))?;
            work.put(&Image {
                description: new.description.clone(),
                bundle: bundle.clone(),
                kernel,
                ramdisk,
                root_device: root,
                devices,
                stores: super::launch::stores(&new.devices),
                ena_support: new.ena_support,
                tags: new.tags.clone(),
                ..blank(&image, account, &new.name)
            })?;
            Ok(image)
        })
    }

    /// Copies an image of `from`, which may be this region, with its snapshots; who may launch it is not copied. It is
    /// `pending` until they are complete.
    ///
    /// # Errors
    /// `InvalidAMIName.*`, `InvalidAMIID.*`, `InvalidRequest`: a snapshot of it is not for the account, or this region does
    /// not have its kernel or RAM disk.
    pub fn copy_image(&self, account: &str, from: &Region, ask: &ImageCopy) -> Result<String> {
        check_name(&ask.name)?;
        tags::check(&ask.tags)?;
        tags::check(&ask.snapshot_tags)?;
        let token = ask.client_token.as_ref().map(|token| format!("CopyImage/{account}/{token}"));
        // The original may be gone when the call is sent again.
        let made = self.transact(|work| recall(work, token.as_deref(), &ask.request))?;
        if let Some(id) = made.and_then(|made| made.first().cloned()) {
            return Ok(id);
        }
        let image = from.transact(|work| from.launchable(work, account, &ask.image))?;
        from.may_copy(account, &image)?;
        let (of, disks) = from.transact(|work| {
            let image = from.launchable(work, account, &ask.image)?;
            let mut disks = Vec::new();
            for id in image.devices.iter().filter_map(|device| device.snapshot.as_ref()) {
                let disk = work.get::<Snapshot>(id)?.filter(|s| s.readable(account) && !s.deleting);
                let why = || "You do not have permission to access the storage of this ami";
                disks.push(disk.ok_or_else(|| Fault::new("InvalidRequest", why()))?);
            }
            Ok((image, disks))
        })?;
        self.transact(|work| {
            let made = recall(work, token.as_deref(), &ask.request)?;
            if let Some(id) = made.and_then(|made| made.first().cloned()) {
                return Ok(id);
            }
            let image = id::new("ami");
            self.take_name(work, account, &ask.name, &image)?;
            let mut copy = Image {
                id: image.clone(),
                account: account.into(),
                name: ask.name.clone(),
                description: ask.description.clone().unwrap_or_else(|| of.description.clone()),
                created: now(),
                public: false,
                launch: Vec::new(),
                deprecated: None,
                disabled: false,
                pending: true,
                source_instance: None,
                tags: ask.tags.clone(),
                ..of.clone()
            };
            // Their ids say what they hold, so they are the same in all regions that have them.
            for id in [&of.kernel, &of.ramdisk].into_iter().flatten() {
                if work.get::<Image>(id)?.is_none() {
                    let why = format!("The image '{}' boots '{id}', which this region does not have", of.id);
                    return Err(Fault::new("InvalidRequest", why));
                }
            }
            if ask.copy_tags && of.account == account {
                copy.tags = of.tags.iter().map(|(k, v)| (k.clone(), v.clone())).chain(copy.tags).collect();
            }
            for disk in &disks {
                let region = &from.settings.name;
                let told = format!(
                    "Copied for DestinationAmi {image} from SourceAmi {} for SourceSnapshot {} of {region}",
                    of.id, disk.id
                );
                let key = self.key_for(work, account, &ask.encryption, Some(disk))?;
                let snapshot = snapshots::copied(from, disk, account, told, ask.snapshot_tags.clone(), key);
                let holders = copy.devices.iter_mut().filter(|d| d.snapshot.as_ref() == Some(&disk.id));
                holders.for_each(|device| {
                    device.snapshot = Some(snapshot.id.clone());
                    device.encrypted = snapshot.key.is_some();
                });
                work.put(&snapshot)?;
            }
            copy.bundle.as_ref().map_or(Ok(()), |bundle| self.bundle_changed(work, bundle))?;
            work.put(&copy)?;
            remember(work, token.as_deref(), &ask.request, vec![image.clone()])?;
            Ok(image)
        })
    }

    /// Has a name stand for an image of the account.
    pub(super) fn take_name(
        &self,
        work: &mut Work<'_>,
        account: &str,
        name: &str,
        image: &str,
    ) -> Result<()> {
        let id = format!("image/{account}/{name}");
        if let Some(other) = work.get::<Name>(&id)? {
            let why = format!("AMI name {name} is already in use by AMI {}", other.of);
            return Err(Fault::new("InvalidAMIName.Duplicate", why));
        }
        // Templates are the owner's images, until it deregisters them.
        if account == self.settings.owner {
            let templates = self.host.templates().map_err(Fault::internal)?;
            for template in templates.iter().filter(|template| template.name == name) {
                let (other, snapshot) = ids(template);
                if work.get::<Image>(&other)?.is_some() || work.get::<Snapshot>(&snapshot)?.is_none() {
                    let why = format!("AMI name {name} is already in use by AMI {other}, a template");
                    return Err(Fault::new("InvalidAMIName.Duplicate", why));
                }
            }
        }
        work.put(&Name { id, of: image.into() })
    }

    /// Removes an image; its snapshots and its instances stay.
    ///
    /// # Errors
    /// `InvalidAMIID.*`, `AuthFailure` where it is another account's.
    pub fn deregister_image(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            let image = self.image(work, account, id)?;
            let name = format!("image/{account}/{}", image.name);
            // The host's images have theirs from there, and another may go by it here.
            if work.get::<Name>(&name)?.is_some_and(|name| name.of == image.id) {
                work.delete::<Name>(&name);
            }
            if image.kind != ImageKind::Machine {
                self.forget_boot_file(work, &image)?;
            }
            image.bundle.as_ref().map_or(Ok(()), |bundle| self.bundle_changed(work, bundle))?;
            work.delete::<Image>(id);
            Ok(())
        })
    }

    /// An image to be changed by its owner.
    fn image(&self, work: &mut Work<'_>, account: &str, id: &str) -> Result<Image> {
        id::check(id, <Image as tags::Tagged>::PREFIX, "InvalidAMIID")?;
        let image = work.get::<Image>(id)?.filter(|image| image.launchable(account));
        let image = image.ok_or_else(|| missing(id))?;
        match image.account == account {
            true => Ok(image),
            false => Err(Fault::new("AuthFailure", format!("Not authorized for image:{id}"))),
        }
    }

    /// Changes who may launch an image, or what its owner says of it.
    ///
    /// # Errors
    /// `InvalidAMIID.*`, `AuthFailure`; `OperationNotPermitted`: the account's images are not for everyone;
    /// `UnsupportedOperation`: it has encrypted snapshots, which are not for everyone;
    /// `InvalidAMIID.Unavailable`: it is disabled, and so nobody else's.
    pub fn modify_image(
        &self,
        account: &str,
        id: &str,
        job: impl Fn(&mut Image) -> Result<()>,
    ) -> Result<()> {
        self.transact(|work| {
            let mut image = self.image(work, account, id)?;
            let public = image.public;
            job(&mut image)?;
            if image.disabled && (image.public || !image.launch.is_empty()) {
                let why = format!("The image '{id}' is disabled and cannot be shared; enable it first");
                return Err(Fault::new("InvalidAMIID.Unavailable", why));
            }
            let secret = image.devices.iter().find(|device| device.encrypted && device.snapshot.is_some());
            if let Some(device) = secret.filter(|_| image.public && !public) {
                let why = format!(
                    "Encrypted snapshots can't be shared publicly. Specify another snapshot than {} of {}.",
                    device.snapshot.as_deref().unwrap_or_default(),
                    device.name
                );
                return Err(Fault::new("UnsupportedOperation", why));
            }
            let settings = work.get::<super::AccountSettings>(account)?;
            if image.public && !public && settings.is_some_and(|settings| settings.block_public_images) {
                let why = "You can't publicly share this image because block public access for AMIs is enabled for \
                           this account; DisableImageBlockPublicAccess lifts that";
                return Err(Fault::new("OperationNotPermitted", why));
            }
            work.put(&image)
        })
    }

    /// Has an image be deprecated from a time on, or, with `None`, not.
    ///
    /// # Errors
    /// `InvalidParameterValue`: a time in the past, or too far away; `InvalidAMIID.*`, `AuthFailure`.
    pub fn deprecate_image(&self, account: &str, id: &str, at: Option<Timestamp>) -> Result<()> {
        let minute = |at: Timestamp| at.round(jiff::Unit::Minute).unwrap_or(at);
        let limit = |from: Timestamp, years: i64| from + SignedDuration::from_hours(years * 24 * 366);
        self.transact(|work| {
            let mut image = self.image(work, account, id)?;
            if let Some(at) = at {
                let bad = |why: &str| Err(Fault::value("DeprecateAt", &at.to_string(), why));
                if at < now() {
                    return bad("It is in the past; name a time to come.");
                }
                if at > limit(now(), 10) {
                    return bad("It is at most 10 years from now.");
                }
                if image.public && at > limit(image.created, 2) {
                    return bad("A public image is deprecated at most 2 years after it was made.");
                }
            }
            image.deprecated = at.map(minute);
            work.put(&image)
        })
    }

    /// Has nobody launch an image any more, and takes it from whom it was shared with; or, with `disabled` false, has its
    /// owner launch it again.
    ///
    /// # Errors
    /// `InvalidAMIID.Unavailable`: it is not made yet; `InvalidAMIID.*`, `AuthFailure`.
    pub fn disable_image(&self, account: &str, id: &str, disabled: bool) -> Result<()> {
        self.transact(|work| {
            let mut image = self.image(work, account, id)?;
            if image.pending || image.failed.is_some() {
                let why = format!("The image '{id}' is not available; wait until it is");
                return Err(Fault::new("InvalidAMIID.Unavailable", why));
            }
            image.disabled = disabled;
            if disabled {
                (image.public, image.launch) = (false, Vec::new());
            }
            work.put(&image)
        })
    }
}
