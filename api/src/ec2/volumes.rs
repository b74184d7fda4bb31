//! Volumes.

use hutch_cloud::model::{Device, Instance, Volume, VolumeState};
use hutch_cloud::region::NewVolume;
use hutch_cloud::region::metadata::zone_id;

use super::{Answer, Context, Operation, chosen, done, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateVolume", create),
    ("DeleteVolume", delete),
    ("DescribeVolumes", describe),
    ("DescribeVolumeStatus", status),
    ("DescribeVolumeAttribute", attribute),
    ("DescribeVolumesModifications", |c| c.describe("volumeModificationSet", vec![], &[])),
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
        "encrypted": v.encrypted,
        "multiAttachEnabled": false,
    })
}

/// The account's volumes that are named, or all.
fn own(c: &Context<'_>, ids: &[String]) -> Result<Vec<Volume>, Fault> {
    let mut all = c.region.all::<Volume>()?;
    all.retain(|volume| volume.account == c.account);
    chosen(all, ids, |volume| &volume.id, KIND)
}

fn create(c: &Context<'_>) -> Answer {
    let p = c.params;
    let number = |name: &str| -> Result<Option<u64>, Fault> {
        let n = p.int(name)?;
        n.map(|n| u64::try_from(n).map_err(|_| Fault::value(name, &n.to_string(), "It is negative.")))
            .transpose()
    };
    if p.boolean("MultiAttachEnabled")? == Some(true) {
        return Err(Fault::new(
            "UnsupportedOperation",
            "hutch does not attach a volume to several instances",
        ));
    }
    if p.boolean("Encrypted")? == Some(true) {
        return Err(Fault::new("UnsupportedOperation", "hutch does not encrypt volumes yet"));
    }
    let text = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let zone = text("AvailabilityZone").or_else(|| {
        let id = p.str("AvailabilityZoneId")?;
        c.region.zones().into_iter().find(|zone| zone_id(c.region, zone) == id)
    });
    let new = NewVolume {
        zone: zone.ok_or_else(|| Fault::missing("AvailabilityZone"))?,
        gib: number("Size")?,
        snapshot: text("SnapshotId"),
        kind: text("VolumeType"),
        iops: number("Iops")?,
        throughput: number("Throughput")?,
        encrypted: false,
        tags: c.tag_specifications()?.remove("volume").unwrap_or_default(),
        client_token: text("ClientToken"),
        request: c.digest(),
    };
    told(c, &c.region.create_volume(c.account, &new)?)
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
