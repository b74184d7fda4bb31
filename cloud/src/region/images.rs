//! Images: those of the host's templates, and those made of instances.

use crate::fault::{Fault, Result};
use crate::host::{Source, Template};
use crate::id;
use crate::model::{Image, ImageDevice, Instance, InstanceState, Name, Snapshot, Tags, Volume};

use super::volumes::snapshot_of;
use super::{Region, Work, now, tags};

/// The root's device name of images made here.
const ROOT: &str = "/dev/xvda";
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
}

fn check_name(name: &str) -> Result<()> {
    let known = |c: char| c.is_ascii_alphanumeric() || " ()[]./-'@_".contains(c);
    match (3..=128).contains(&name.len()) && name.chars().all(known) {
        true => Ok(()),
        false => Err(Fault::new(
            "InvalidAMIName.Malformed",
            "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', '-', '/' and '_'",
        )),
    }
}

impl Region {
    /// Registers every template of the host that is not an image yet. Returns the ids of the new ones.
    ///
    /// # Errors
    /// The host's, the store's.
    pub fn adopt_templates(&self) -> Result<Vec<String>> {
        let mut new = Vec::new();
        for template in self.host.templates().map_err(Fault::internal)? {
            let content = format!("{}/{}", template.name, template.digest);
            let (image, snapshot) = (id::of("ami", &content), id::of("snap", &content));
            let added = self.transact(|work| {
                if work.get::<Snapshot>(&snapshot)?.is_some() {
                    return Ok(false);
                }
                self.adopt(work, &template, &image, &snapshot)?;
                Ok(true)
            })?;
            new.extend(added.then_some(image));
        }
        Ok(new)
    }

    fn adopt(&self, work: &mut Work<'_>, template: &Template, image: &str, snapshot: &str) -> Result<()> {
        let gib = template.size.div_ceil(GIB).max(1);
        let account = self.settings.owner.clone();
        work.put(&Snapshot {
            id: snapshot.into(),
            account: account.clone(),
            volume: "vol-ffffffff".into(),
            gib,
            started: now(),
            description: format!("The template {}", template.name),
            source: Source::Template(template.name.clone()),
            complete: true,
            failed: None,
            deleting: false,
            tags: Tags::new(),
        })?;
        work.put(&Image {
            id: image.into(),
            account,
            name: template.name.clone(),
            description: format!("Imported as {}", template.name),
            created: now(),
            root_device: ROOT.into(),
            devices: vec![ImageDevice {
                name: ROOT.into(),
                snapshot: Some(snapshot.into()),
                gib,
                kind: "gp3".into(),
                delete_on_termination: true,
            }],
            public: true,
            launch: Vec::new(),
            pending: false,
            failed: None,
            source_instance: None,
            tags: Tags::new(),
        })
    }

    /// Makes an image of an instance: snapshots of its volumes, each at a moment when the guest does not write. It is
    /// `pending` until they are complete.
    ///
    /// # Errors
    /// `InvalidAMIName.*`, `IncorrectState`, `InvalidInstanceID.*`.
    pub fn create_image(&self, account: &str, new: &NewImage) -> Result<String> {
        check_name(&new.name)?;
        tags::check(&new.tags)?;
        self.transact(|work| {
            let instance: Instance = tags::own(work, account, &new.instance)?;
            if !matches!(instance.state, InstanceState::Running | InstanceState::Stopped) {
                let why = format!("Instance '{}' is not 'running' or 'stopped'.", instance.id);
                return Err(Fault::new("IncorrectState", why));
            }
            let image = id::new("ami");
            self.take_name(work, account, &new.name, &image)?;
            let mut devices = Vec::new();
            for device in &instance.devices {
                let volume: Volume = tags::own(work, account, &device.volume)?;
                let description = format!("Created by CreateImage({}) for {image}", instance.id);
                let snapshot = snapshot_of(&volume, &description, new.snapshot_tags.clone())?;
                work.put(&snapshot)?;
                devices.push(ImageDevice {
                    name: device.name.clone(),
                    snapshot: Some(snapshot.id),
                    gib: volume.gib,
                    kind: volume.kind,
                    delete_on_termination: device.delete_on_termination,
                });
            }
            work.put(&Image {
                id: image.clone(),
                account: account.into(),
                name: new.name.clone(),
                description: new.description.clone(),
                created: now(),
                root_device: instance.root_device.clone(),
                devices,
                public: false,
                launch: Vec::new(),
                pending: true,
                failed: None,
                source_instance: Some(instance.id),
                tags: new.tags.clone(),
            })?;
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
        work.put(&Name { id, of: image.into() })
    }

    /// Removes an image; its snapshots and its instances stay.
    ///
    /// # Errors
    /// `InvalidAMIID.*`, `AuthFailure` where it is another account's.
    pub fn deregister_image(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            let image = self.image(work, account, id)?;
            work.delete::<Name>(&format!("image/{account}/{}", image.name));
            work.delete::<Image>(id);
            Ok(())
        })
    }

    /// An image to be changed by its owner.
    fn image(&self, work: &mut Work<'_>, account: &str, id: &str) -> Result<Image> {
        id::check(id, "ami", "InvalidAMIID")?;
        let missing = || Fault::new("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"));
        let image = work.get::<Image>(id)?.filter(|image| image.launchable(account)).ok_or_else(missing)?;
        match image.account == account {
            true => Ok(image),
            false => Err(Fault::new("AuthFailure", format!("Not authorized for image:{id}"))),
        }
    }

    /// Changes who may launch an image, or what its owner says of it.
    ///
    /// # Errors
    /// `InvalidAMIID.*`, `AuthFailure`.
    pub fn modify_image(
        &self,
        account: &str,
        id: &str,
        job: impl Fn(&mut Image) -> Result<()>,
    ) -> Result<()> {
        self.transact(|work| {
            let mut image = self.image(work, account, id)?;
            job(&mut image)?;
            work.put(&image)
        })
    }
}
