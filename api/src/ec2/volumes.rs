//! Volumes.

use hutch_cloud::model::{Device, Instance, Progress, Volume, VolumeState};
use hutch_cloud::region::metadata::zone_id;
use hutch_cloud::region::{NewVolume, VolumeChange};

use super::{Answer, Context, Operation, chosen, done, encryption, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateVolume", create),
    ("DeleteVolume", delete),
    ("DescribeVolumes", describe),
    ("DescribeVolumeStatus", status),
    ("DescribeVolumeAttribute", attribute),
    ("ModifyVolume", modify),
    ("DescribeVolumesModifications", modifications),
    ("AttachVolume", attach),
    ("DetachVolume", detach),
];

const KIND: (&str, &str, &str) = ("vol", "InvalidVolume", "volume");

fn attachment(volume: &str, instance: &str, device: &Device, status: &str) -> Node {
    node! {
        "volumeId": volume,
        "instanceId": instance,
        "device": &device.name,
        "status": status,
        "attachTime": time(device.attached),
        "deleteOnTermination": device.delete_on_termination,
    }
}

fn told(c: &Context<'_>, v: &Volume) -> Result<Node, Fault> {
    let state = match (v.state, &v.instance) {
        (VolumeState::Creating, _) => "creating",
        (VolumeState::Deleting, _) => "deleting",
        (VolumeState::Error, _) => "error",
        (VolumeState::Ready, Some(_)) => "in-use",
        (VolumeState::Ready, None) => "available",
    };
    let holder = v.instance.as_ref().map(|id| c.region.get::<Instance>(id)).transpose()?.flatten();
    let device =
        holder.as_ref().and_then(|i| Some((i, i.devices.iter().find(|device| device.volume == v.id)?)));
    let attachments = device.map(|(i, device)| attachment(&v.id, &i.id, device, device.state.name()));
    Ok(node! {
        "volumeId": &v.id,
        "size": v.gib,
        "snapshotId": v.snapshot.as_deref().unwrap_or_default(),
        "availabilityZone": &v.zone,
        "availabilityZoneId": zone_id(c.region, &v.zone),
        "status": state,
        "createTime": time(v.created),
        "attachmentSet": Node::List(attachments.into_iter().collect()),
        "tagSet": tag_set(&v.tags),
        "volumeType": &v.kind,
        "iops": v.iops,
        "throughput": v.throughput,
        "encrypted": v.key.is_some(),
        "kmsKeyId": v.key.as_ref().map(|key| c.region.key_arn(&v.account, key)),
        "multiAttachEnabled": false,
    })
}

/// The account's volumes that are named, or all.
fn own(c: &Context<'_>, ids: &[String]) -> Result<Vec<Volume>, Fault> {
    let mut all = c.region.all::<Volume>()?;
    all.retain(|volume| volume.account == c.account);
    chosen(all, ids, |volume| &volume.id, KIND)
}

/// A number that is not negative.
fn number(c: &Context<'_>, name: &str) -> Result<Option<u64>, Fault> {
    let n = c.params.int(name)?;
    n.map(|n| u64::try_from(n).map_err(|_| Fault::value(name, &n.to_string(), "It is negative."))).transpose()
}

/// A text that is not empty.
fn text(c: &Context<'_>, name: &str) -> Option<String> {
    c.params.str(name).filter(|text| !text.is_empty()).map(str::to_owned)
}

fn no_multi_attach(c: &Context<'_>) -> Result<(), Fault> {
    match c.params.boolean("MultiAttachEnabled")? {
        Some(true) => {
            let why = "hutch does not attach a volume to several instances";
            Err(Fault::new("UnsupportedOperation", why))
        }
        _ => Ok(()),
    }
}

fn create(c: &Context<'_>) -> Answer {
    let p = c.params;
    no_multi_attach(c)?;
    let zone = text(c, "AvailabilityZone").or_else(|| {
        let id = p.str("AvailabilityZoneId")?;
        c.region.zones().into_iter().find(|zone| zone_id(c.region, zone) == id)
    });
    let new = NewVolume {
        zone: zone.ok_or_else(|| Fault::missing("AvailabilityZone"))?,
        gib: number(c, "Size")?,
        snapshot: text(c, "SnapshotId"),
        kind: text(c, "VolumeType"),
        iops: number(c, "Iops")?,
        throughput: number(c, "Throughput")?,
        encryption: encryption(p, "")?,
        tags: c.tag_specifications()?.remove("volume").unwrap_or_default(),
        client_token: text(c, "ClientToken"),
        request: c.digest(),
    };
    told(c, &c.region.create_volume(c.account, &new)?)
}

fn modify(c: &Context<'_>) -> Answer {
    no_multi_attach(c)?;
    let change = VolumeChange {
        volume: c.params.required("VolumeId")?.into(),
        gib: number(c, "Size")?,
        kind: text(c, "VolumeType"),
        iops: number(c, "Iops")?,
        throughput: number(c, "Throughput")?,
    };
    let volume = c.region.modify_volume(c.account, &change)?;
    Ok(Node::empty().with("volumeModification", modification(&volume)))
}

/// A volume's latest change, as answers tell it.
fn modification(volume: &Volume) -> Option<Node> {
    let change = volume.modification.as_ref()?;
    let progress = match change.progress {
        Progress::Modifying | Progress::Failed => 0u64,
        Progress::Optimizing => 50,
        Progress::Completed => 100,
    };
    let (original, target) = (&change.original, &change.target);
    Some(node! {
        "volumeId": &volume.id,
        "modificationState": change.progress.name(),
        "statusMessage": change.failed.as_ref(),
        "targetSize": target.gib,
        "targetIops": target.iops,
        "targetVolumeType": &target.kind,
        "targetThroughput": target.throughput,
        "targetMultiAttachEnabled": false,
        "originalSize": original.gib,
        "originalIops": original.iops,
        "originalVolumeType": &original.kind,
        "originalThroughput": original.throughput,
        "originalMultiAttachEnabled": false,
        "progress": progress,
        "startTime": time(change.started),
        "endTime": change.progress.is_over().then(|| time(change.since)),
    })
}

fn modifications(c: &Context<'_>) -> Answer {
    let ids = c.ids("VolumeId");
    let all = own(c, &ids)?;
    if let Some(volume) = all.iter().find(|volume| !ids.is_empty() && volume.modification.is_none()) {
        let why = format!("Modification for volume '{}' does not exist.", volume.id);
        return Err(Fault::new("InvalidVolumeModification.NotFound", why));
    }
    let told = all.into_iter().filter_map(|volume| Some((volume.id.clone(), modification(&volume)?)));
    c.describe("volumeModificationSet", told.collect(), &ids)
}

fn delete(c: &Context<'_>) -> Answer {
    c.region.delete_volume(c.account, c.params.required("VolumeId")?)?;
    Ok(done())
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("VolumeId");
    let all = own(c, &ids)?;
    let told = all.iter().map(|v| Ok((v.id.clone(), told(c, v)?))).collect::<Result<Vec<_>, Fault>>()?;
    c.describe("volumeSet", told, &ids)
}

fn status(c: &Context<'_>) -> Answer {
    let ids = c.ids("VolumeId");
    let told = own(c, &ids)?.into_iter().map(|v| {
        let status = if v.state == VolumeState::Error { "impaired" } else { "ok" };
        let details = Node::list(["io-enabled", "io-performance"], |name| {
            node! { "name": name, "status": if name == "io-enabled" { "passed" } else { "not-applicable" } }
        });
        let node = node! {
            "volumeId": &v.id,
            "availabilityZone": &v.zone,
            "volumeStatus": node! { "status": status, "details": details },
            "eventsSet": Node::List(vec![]),
            "actionsSet": Node::List(vec![]),
        };
        (v.id, node)
    });
    c.describe("volumeStatusSet", told.collect(), &ids)
}

fn attribute(c: &Context<'_>) -> Answer {
    let id = c.params.required("VolumeId")?.to_owned();
    own(c, std::slice::from_ref(&id))?;
    let name = c.params.required("Attribute")?;
    let answer = Node::empty().with("volumeId", &id);
    match name {
        "autoEnableIO" => Ok(answer.with("autoEnableIO", node! { "value": false })),
        "productCodes" => Ok(answer.with("productCodes", Node::List(vec![]))),
        _ => Err(Fault::value("attribute", name, "It is no attribute of a volume.")),
    }
}

fn attach(c: &Context<'_>) -> Answer {
    let p = c.params;
    let (volume, instance) = (p.required("VolumeId")?, p.required("InstanceId")?);
    let device = c.region.attach_volume(c.account, volume, instance, p.required("Device")?)?;
    Ok(attachment(volume, instance, &device, device.state.name()))
}

fn detach(c: &Context<'_>) -> Answer {
    let p = c.params;
    let volume = p.required("VolumeId")?;
    let force = p.boolean("Force")?.unwrap_or_default();
    let (instance, device) =
        c.region.detach_volume(c.account, volume, p.str("InstanceId"), p.str("Device"), force)?;
    // Whoever asks next finds it gone, or on its way.
    Ok(attachment(volume, &instance, &device, "detaching"))
}
