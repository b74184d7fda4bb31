//! RunInstances: everything is checked before anything is written; what is written is one transaction.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::fault::{Fault, Result};
use crate::host::Source;
use crate::id;
use crate::model::{
    Attachment, AttachmentState, Device, Group, Image, ImageDevice, Instance, InstanceState, Interface,
    KeyPair, MetadataOptions, Name, Shape, Snapshot, Subnet, Tags, Volume, VolumeState,
};

use super::attachments::ATTACHMENTS_MAX;
use super::{
    Encryption, InterfaceAsk, Region, Secondary, Work, cards, images, now, recall, remember, snapshots, tags,
};

/// The most user data, in bytes.
const MAX_USER_DATA: usize = 16 << 10;
/// The most instances of one call.
const MAX_COUNT: u32 = 1000;

/// What RunInstances asks for.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// The image's id.
    pub image: String,
    /// At least so many, and
    pub min: u32,
    /// at most so many.
    pub max: u32,
    /// The kernel's id; `None`: the image's.
    pub kernel: Option<String>,
    /// The RAM disk's id; `None`: the image's, where its kernel is, too.
    pub ramdisk: Option<String>,
    /// The type's name.
    pub instance_type: String,
    /// The key pair's name.
    pub key_name: Option<String>,
    /// Groups by id, and by name in the default network.
    pub groups: Vec<String>,
    /// Groups by name.
    pub group_names: Vec<String>,
    /// The one instance's interface, made before: it says the subnet, the groups and the address.
    pub interface: Option<String>,
    /// The subnet's id.
    pub subnet: Option<String>,
    /// The zone's name.
    pub zone: Option<String>,
    /// The address of the one instance.
    pub private_ip: Option<Ipv4Addr>,
    /// The primary interface's secondary addresses.
    pub more: Secondary,
    /// The interfaces beside the primary one.
    pub others: Vec<InterfaceAsk>,
    /// What the primary interface is said to be for.
    pub interface_description: String,
    /// Whether it gets a public address; `None`: as the subnet says.
    pub public_ip: Option<bool>,
    /// Whether the primary interface stays when the instance goes; by default one that was made before.
    pub keep_interface: Option<bool>,
    /// The user data.
    pub user_data: Option<Vec<u8>>,
    /// Changes of the image's disks.
    pub devices: Vec<DeviceAsk>,
    /// The guest's own shutdown terminates it.
    pub shutdown_terminates: bool,
    /// `DisableApiTermination`.
    pub termination_protection: bool,
    /// `DisableApiStop`.
    pub stop_protection: bool,
    /// EBS-optimized.
    pub ebs_optimized: bool,
    /// Detailed monitoring.
    pub monitoring: bool,
    /// The metadata service's options.
    pub metadata: MetadataOptions,
    /// Tags by type of resource.
    pub tags: BTreeMap<String, Tags>,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
    /// The launch template it came from, and its version.
    pub template: Option<(String, u64)>,
}

/// A block device mapping as it is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceAsk {
    /// The device's name.
    pub name: String,
    /// The image's device of this name is left out.
    pub none: bool,
    /// An instance store's name, such as `ephemeral0`.
    pub ephemeral: Option<String>,
    /// The snapshot to begin with.
    pub snapshot: Option<String>,
    /// The size in GiB.
    pub gib: Option<u64>,
    /// The volume type.
    pub kind: Option<String>,
    /// I/O operations a second.
    pub iops: Option<u64>,
    /// MiB a second.
    pub throughput: Option<u64>,
    /// The volume goes with the instance.
    pub delete_on_termination: Option<bool>,
    /// Whether it is encrypted.
    pub encryption: Encryption,
}

impl DeviceAsk {
    /// It says that there is to be no volume: none at all, or an instance store.
    pub(super) fn leaves_out(&self) -> bool {
        self.none || self.ephemeral.is_some()
    }
}

/// A disk of an instance that is to be, checked.
struct Disk {
    name: String,
    shape: Shape,
    snapshot: Option<String>,
    source: Source,
    delete_on_termination: bool,
    key: Option<String>,
}

impl Region {
    /// Launches instances. They are `pending` when this returns.
    ///
    /// # Errors
    /// Whatever of the request cannot be; nothing is changed then.
    pub fn run_instances(&self, account: &str, launch: &Launch) -> Result<Vec<Instance>> {
        self.ensure_account(account)?;
        let token = launch.client_token.as_ref().map(|token| format!("RunInstances/{account}/{token}"));
        self.transact(|work| {
            if let Some(made) = recall(work, token.as_deref(), &launch.request)? {
                return made.iter().filter_map(|id| work.get::<Instance>(id).transpose()).collect();
            }
            let instances = self.launch(work, account, launch)?;
            remember(
                work,
                token.as_deref(),
                &launch.request,
                instances.iter().map(|i| i.id.clone()).collect(),
            )?;
            Ok(instances)
        })
    }

    fn launch(&self, work: &mut Work<'_>, account: &str, launch: &Launch) -> Result<Vec<Instance>> {
        let image = self.launchable(work, account, &launch.image)?;
        check(self, launch)?;
        let asked = (launch.kernel.as_deref(), launch.ramdisk.as_deref());
        let (kernel, ramdisk) = self.choice(work, account, &image, asked)?;
        if let Some(name) = &launch.key_name
            && work.get::<KeyPair>(&format!("{account}/{name}"))?.is_none()
        {
            return Err(Fault::not_found("InvalidKeyPair", "key pair", name));
        }
        let before =
            launch.interface.as_ref().map(|id| self.free_interface(work, account, id)).transpose()?;
        let subnet = match (&before, &launch.subnet) {
            (Some((_, subnet)), _) => subnet.clone(),
            (None, Some(subnet)) => tags::own::<Subnet>(work, account, subnet)?,
            (None, None) => self.default_subnet(work, account, launch.zone.as_deref())?,
        };
        self.runs_in(work, &subnet)?;
        if launch.zone.as_ref().is_some_and(|zone| *zone != subnet.zone) {
            let why =
                format!("The subnet {} is in the zone {}, not in the one asked for", subnet.id, subnet.zone);
            return Err(Fault::new("InvalidParameterValue", why));
        }
        let groups = match &before {
            Some(_) => Vec::new(),
            None => self.groups_of(work, account, &subnet.vpc, &launch.groups, &launch.group_names)?,
        };
        let disks = self.disks(work, account, &image, &launch.devices)?;
        let (volumes, cards) = (disks.len(), launch.others.len() + 1);
        if volumes + cards > ATTACHMENTS_MAX {
            let why = format!(
                "{volumes} volumes and {cards} interfaces were asked for: an instance has at most {ATTACHMENTS_MAX} together"
            );
            return Err(Fault::new("AttachmentLimitExceeded", why));
        }
        let most = self.room_for(work, account, launch, disks.len())?;
        let (reservation, at) = (id::new("r"), now());
        let mut made = Vec::new();
        for index in 0..most {
            let asked = launch.public_ip.unwrap_or_else(|| before.is_none() && self.maps_public(&subnet));
            let public = match asked {
                true => self.free_public(work).map(Some),
                false => Ok(None),
            };
            let interface = public.and_then(|public| {
                let interface = match &before {
                    Some((interface, _)) => interface.clone(),
                    None => Interface {
                        auto_public: public.is_some(),
                        description: launch.interface_description.clone(),
                        tags: tags_of(launch, "network-interface"),
                        ..self.new_interface(
                            work,
                            &subnet,
                            groups.clone(),
                            launch.private_ip,
                            &launch.more,
                        )?
                    },
                };
                Ok((interface, public))
            });
            let (mut interface, public) = match interface {
                Ok(interface) => interface,
                // Fewer than the most that were asked for will do.
                Err(fault) if index >= launch.min && is_full(&fault) => break,
                Err(fault) => return Err(fault),
            };
            let id = id::new("i");
            let mut interfaces = match self.other_interfaces(work, &subnet, launch, &id) {
                Ok(others) => others,
                Err(fault) if index >= launch.min && is_full(&fault) => {
                    self.drop_interface(work, &interface.id)?;
                    break;
                }
                Err(fault) => return Err(fault),
            };
            if let Some(ip) = public {
                self.take_public(work, &mut interface, ip)?;
            }
            let devices = disks.iter().map(|disk| {
                let volume = volume_of(disk, account, &subnet.zone, &id, tags_of(launch, "volume"));
                work.put(&volume)?;
                Ok(Device {
                    state: AttachmentState::Attached,
                    name: disk.name.clone(),
                    volume: volume.id,
                    attached: at,
                    delete_on_termination: disk.delete_on_termination,
                })
            });
            let devices = devices.collect::<Result<Vec<_>>>()?;
            let attachment = Attachment {
                id: id::new("eni-attach"),
                instance: id.clone(),
                device_index: 0,
                attached: at,
                delete_on_termination: !launch.keep_interface.unwrap_or(before.is_some()),
            };
            interface.attachment = Some(attachment);
            work.put(&interface)?;
            let source_dest_check = interface.source_dest_check;
            interfaces.push(interface);
            interfaces.sort_by_key(|e| e.attachment.as_ref().map(|a| a.device_index));
            let instance = Instance {
                id,
                account: account.into(),
                reservation: reservation.clone(),
                launch_index: index,
                client_token: launch.client_token.clone().unwrap_or_default(),
                image: image.id.clone(),
                kernel: kernel.clone(),
                ramdisk: ramdisk.clone(),
                bundle: image.bundle.clone(),
                instance_type: launch.instance_type.clone(),
                key_name: launch.key_name.clone(),
                zone: subnet.zone.clone(),
                subnet: subnet.id.clone(),
                vpc: subnet.vpc.clone(),
                interfaces: interfaces.into_iter().map(|interface| interface.id).collect(),
                user_data: launch.user_data.clone(),
                launched: at,
                state: InstanceState::Pending,
                reason: None,
                transition: String::new(),
                terminated: None,
                run: 1,
                force: false,
                reboots: (0, 0),
                root_device: image.root_device.clone(),
                stores: {
                    // What the launch says comes before what the image does.
                    let of_image = image.stores.clone().into_iter();
                    of_image.chain(stores(&launch.devices)).collect()
                },
                devices,
                // Who cannot be stopped ends.
                shutdown_terminates: launch.shutdown_terminates || image.bundle.is_some(),
                termination_protection: launch.termination_protection,
                stop_protection: launch.stop_protection,
                source_dest_check,
                ebs_optimized: launch.ebs_optimized,
                monitoring: launch.monitoring,
                metadata: launch.metadata.clone(),
                uuid: format!("ec2{}", uuid::Uuid::new_v4().to_string().get(3..).unwrap_or_default()),
                tags: instance_tags(launch),
            };
            work.put(&instance)?;
            made.push(instance);
        }
        Ok(made)
    }

    /// The image, if the account may launch it.
    pub(super) fn launchable(&self, work: &mut Work<'_>, account: &str, image: &str) -> Result<Image> {
        id::check(image, "ami", "InvalidAMIID")?;
        let found = work.get::<Image>(image)?.filter(|image| image.launchable(account));
        let found = found.ok_or_else(|| images::missing(image))?;
        images::check_available(&found)?;
        Ok(found)
    }

    /// The groups of an interface in a network: those named, or the default one.
    pub(super) fn groups_of(
        &self,
        work: &mut Work<'_>,
        account: &str,
        vpc: &str,
        ids: &[String],
        names: &[String],
    ) -> Result<Vec<String>> {
        let mut groups = Vec::new();
        let default = [String::from("default")];
        let names = if ids.is_empty() && names.is_empty() { &default } else { names };
        for name in names {
            let missing = || {
                let why = format!("The security group '{name}' does not exist in VPC '{vpc}'");
                Fault::new("InvalidGroup.NotFound", why)
            };
            groups.push(work.get::<Name>(&format!("group/{vpc}/{name}"))?.ok_or_else(missing)?.of);
        }
        for id in ids {
            let group: Group = super::groups::own(work, account, id)?;
            if group.vpc != vpc {
                return Err(Fault::new(
                    "InvalidParameter",
                    format!("Security group {id} and subnet belong to different networks."),
                ));
            }
            groups.push(group.id);
        }
        groups.sort();
        groups.dedup();
        let most = self.settings.limits.groups_per_interface;
        if groups.len() > most as usize {
            let why = format!("An interface has at most {most} security groups");
            return Err(Fault::new("SecurityGroupsPerInterfaceLimitExceeded", why));
        }
        Ok(groups)
    }

    /// The disks of an instance: the image's, with what is asked for in their place and beside them; root first.
    fn disks(
        &self,
        work: &mut Work<'_>,
        account: &str,
        image: &Image,
        asks: &[DeviceAsk],
    ) -> Result<Vec<Disk>> {
        let mapping = |why: String| Fault::new("InvalidBlockDeviceMapping", why);
        let mut disks = Vec::new();
        check_devices(asks)?;
        let asked = |name: &str| asks.iter().find(|ask| ask.name == name);
        if image.bundle.is_some() && asked(&image.root_device).is_some() {
            let why =
                format!("The root device '{}' of '{}' is on instance store", image.root_device, image.id);
            return Err(mapping(why));
        }
        for device in &image.devices {
            match asked(&device.name) {
                Some(ask) if ask.none && device.name == image.root_device => {
                    return Err(mapping(format!("The root device '{}' cannot be left out", ask.name)));
                }
                Some(ask) if ask.leaves_out() => {}
                ask => disks.push(self.disk(work, account, Some(device), ask)?),
            }
        }
        for ask in asks.iter().filter(|ask| !ask.leaves_out()) {
            if !image.devices.iter().any(|device| device.name == ask.name) {
                disks.push(self.disk(work, account, None, Some(ask))?);
            }
        }
        disks.sort_by_key(|disk| disk.name != image.root_device);
        Ok(disks)
    }

    fn disk(
        &self,
        work: &mut Work<'_>,
        account: &str,
        device: Option<&ImageDevice>,
        ask: Option<&DeviceAsk>,
    ) -> Result<Disk> {
        let blank = DeviceAsk::default();
        let ask_or = ask.unwrap_or(&blank);
        let name = device.map_or(&ask_or.name, |device| &device.name).clone();
        let snapshot = ask_or.snapshot.clone().or_else(|| device.and_then(|device| device.snapshot.clone()));
        let of = match &snapshot {
            // The image's own snapshots come with the right to launch it.
            Some(id) => {
                let own = device.is_some_and(|device| device.snapshot.as_ref() == Some(id));
                let snapshot = match own {
                    true => work
                        .get::<Snapshot>(id)?
                        .ok_or_else(|| Fault::not_found("InvalidSnapshot", "snapshot", id))?,
                    false => snapshots::readable(work, account, id)?,
                };
                Some(snapshot)
            }
            None => None,
        };
        let mut asked = ask_or.encryption.clone();
        if of.is_none() && device.is_some_and(|device| device.encrypted) {
            asked.encrypted = asked.encrypted.or(Some(true));
        }
        let key = self.key_for(work, account, &asked, of.as_ref())?;
        let (source, least) = of.map_or((Source::Empty, 0), |of| (of.source, of.gib));
        let gib = ask_or.gib.or(device.map(|device| device.gib)).or((least > 0).then_some(least));
        let gib = gib.ok_or_else(|| {
            Fault::new("MissingParameter", format!("The device '{name}' needs a size or a snapshot"))
        })?;
        if gib < least {
            let id = snapshot.unwrap_or_default();
            return Err(Fault::new(
                "InvalidBlockDeviceMapping",
                format!("Volume of size {gib}GB is smaller than snapshot '{id}', expect size >= {least}GB"),
            ));
        }
        let kind = ask_or.kind.clone().or_else(|| device.map(|device| device.kind.clone()));
        // The image's speed goes with the image's type.
        let iops =
            ask_or.iops.or_else(|| device.filter(|d| kind.as_ref() == Some(&d.kind)).and_then(|d| d.iops));
        Ok(Disk {
            shape: Shape::new(kind.as_deref(), gib, iops, ask_or.throughput)?,
            delete_on_termination: ask_or
                .delete_on_termination
                .unwrap_or_else(|| device.is_some_and(|device| device.delete_on_termination)),
            key,
            name,
            snapshot,
            source,
        })
    }
}

/// What instance stores are called.
pub(super) fn stores(asks: &[DeviceAsk]) -> BTreeMap<String, String> {
    asks.iter().filter_map(|ask| Some((ask.ephemeral.clone()?, ask.name.clone()))).collect()
}

/// There is no address left for one more instance.
fn is_full(fault: &Fault) -> bool {
    matches!(&*fault.code, "InsufficientFreeAddressesInSubnet" | "InsufficientAddressCapacity")
}

/// Whether block device mappings are well-formed.
///
/// # Errors
/// `InvalidBlockDeviceMapping`.
pub(super) fn check_devices(asks: &[DeviceAsk]) -> Result<()> {
    let mapping = |why: String| Fault::new("InvalidBlockDeviceMapping", why);
    for ask in asks {
        if ask.name.is_empty() {
            return Err(mapping("Each block device mapping needs a DeviceName".into()));
        }
        if asks.iter().filter(|other| other.name == ask.name).count() > 1 {
            return Err(mapping(format!("The device '{}' is mapped more than once", ask.name)));
        }
        if let Some(name) = &ask.ephemeral {
            let known = name.strip_prefix("ephemeral").is_some_and(|n| n.parse::<u8>().is_ok_and(|n| n < 24));
            // Types without an instance store ignore such a mapping, as EC2 does.
            if !known {
                return Err(mapping(format!(
                    "'{name}' is no instance store volume: ephemeral0 to ephemeral23"
                )));
            }
        }
    }
    Ok(())
}

/// What can be seen of the request alone.
fn check(region: &Region, launch: &Launch) -> Result<()> {
    let (min, max) = (launch.min, launch.max);
    if min == 0 || max == 0 {
        return Err(Fault::value("minCount", &min.to_string(), "At least one instance has to be asked for."));
    }
    if min > max {
        return Err(Fault::value("minCount", &min.to_string(), "It may not be larger than maxCount."));
    }
    if max > MAX_COUNT {
        let why = format!("You have requested more instances ({max}) than one call may launch ({MAX_COUNT})");
        return Err(Fault::new("InstanceLimitExceeded", why));
    }
    if region.settings.types.get(&launch.instance_type).is_err() {
        let why = format!("Invalid value '{}' for InstanceType", launch.instance_type);
        return Err(Fault::new("InvalidParameterValue", why));
    }
    if launch.private_ip.is_some() && max > 1 {
        return Err(Fault::combination("A private address can be asked for one instance only"));
    }
    if launch.interface.is_some() && max > 1 {
        return Err(Fault::combination("One network interface is for one instance only"));
    }
    cards::check(launch)?;
    if launch.user_data.as_ref().is_some_and(|data| data.len() > MAX_USER_DATA) {
        let why = format!("User data is limited to {MAX_USER_DATA} bytes");
        return Err(Fault::new("InvalidParameterValue", why));
    }
    launch.tags.values().try_for_each(tags::check)
}

/// An instance's tags: those asked for, and EC2's own of its launch template.
fn instance_tags(launch: &Launch) -> Tags {
    let mut tags = tags_of(launch, "instance");
    if let Some((id, version)) = &launch.template {
        tags.insert("aws:ec2launchtemplate:id".into(), id.clone());
        tags.insert("aws:ec2launchtemplate:version".into(), version.to_string());
    }
    tags
}

fn tags_of(launch: &Launch, kind: &str) -> Tags {
    launch.tags.get(kind).cloned().unwrap_or_default()
}

fn volume_of(disk: &Disk, account: &str, zone: &str, instance: &str, tags: Tags) -> Volume {
    Volume {
        id: id::new("vol"),
        account: account.into(),
        gib: disk.shape.gib,
        kind: disk.shape.kind.clone(),
        iops: disk.shape.iops,
        throughput: disk.shape.throughput,
        zone: zone.into(),
        snapshot: disk.snapshot.clone(),
        source: disk.source.clone(),
        created: now(),
        state: VolumeState::Creating,
        key: disk.key.clone(),
        failed: None,
        instance: Some(instance.into()),
        client_token: None,
        modification: None,
        modified: Vec::new(),
        tags,
    }
}
