//! Snapshots.

use hutch_cloud::model::Snapshot;
use hutch_cloud::region::{NewSnapshots, SnapshotCopy};

use super::images::{permissions, permit, permitted};
use super::{Answer, Context, Operation, chosen, done, encryption, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateSnapshot", create),
    ("CreateSnapshots", create_all),
    ("CopySnapshot", copy),
    ("DeleteSnapshot", delete),
    ("DescribeSnapshots", describe),
    ("DescribeSnapshotAttribute", attribute),
    ("ModifySnapshotAttribute", modify),
    ("ResetSnapshotAttribute", reset),
];

/// A snapshot, as answers tell it.
fn told(c: &Context<'_>, s: &Snapshot) -> Node {
    let (status, progress) = match (&s.failed, s.complete) {
        (Some(_), _) => ("error", ""),
        (None, true) => ("completed", "100%"),
        (None, false) => ("pending", "0%"),
    };
    node! {
        "snapshotId": &s.id,
        "volumeId": &s.volume,
        "status": status,
        "statusMessage": s.failed.as_ref(),
        "startTime": time(s.started),
        "progress": progress,
        "ownerId": &s.account,
        "volumeSize": s.gib,
        "description": &s.description,
        "encrypted": s.key.is_some(),
        "kmsKeyId": s.key.as_ref().map(|key| c.region.key_arn(&s.account, key)),
        "storageTier": "standard",
        // Tags are their owner's own.
        "tagSet": tag_set(&s.tags).filter(|_| s.account == c.account),
    }
}

fn create(c: &Context<'_>) -> Answer {
    let description = c.params.str("Description").unwrap_or_default();
    let tags = c.tag_specifications()?.remove("snapshot").unwrap_or_default();
    Ok(told(c, &c.region.create_snapshot(c.account, c.params.required("VolumeId")?, description, &tags)?))
}

fn create_all(c: &Context<'_>) -> Answer {
    let p = c.params;
    let local = p.str("Location").is_some_and(|place| place != "regional");
    if local || p.str("OutpostArn").is_some() {
        return Err(Fault::new("UnsupportedOperation", "hutch keeps snapshots in the region only"));
    }
    let new = NewSnapshots {
        instance: p.required("InstanceSpecification.InstanceId")?.into(),
        without_root: p.boolean("InstanceSpecification.ExcludeBootVolume")? == Some(true),
        without: p.strings("InstanceSpecification.ExcludeDataVolumeId"),
        description: p.str("Description").unwrap_or_default().into(),
        copy_tags: match p.str("CopyTagsFromSource") {
            None => false,
            Some("volume") => true,
            Some(other) => return Err(Fault::value("copyTagsFromSource", other, "There is: volume.")),
        },
        tags: c.tag_specifications()?.remove("snapshot").unwrap_or_default(),
    };
    let made = c.region.create_snapshots(c.account, &new)?;
    let info = |s: &Snapshot| {
        node! {
            "snapshotId": &s.id,
            "volumeId": &s.volume,
            "state": "pending",
            "startTime": time(s.started),
            "progress": "0%",
            "ownerId": &s.account,
            "volumeSize": s.gib,
            "description": &s.description,
            "encrypted": s.key.is_some(),
            "tagSet": tag_set(&s.tags),
        }
    };
    Ok(node! { "snapshotSet": Node::list(&made, info) })
}

fn copy(c: &Context<'_>) -> Answer {
    let p = c.params;
    let ask = SnapshotCopy {
        snapshot: p.required("SourceSnapshotId")?.into(),
        description: p.str("Description").unwrap_or_default().into(),
        tags: c.tag_specifications()?.remove("snapshot").unwrap_or_default(),
        encryption: encryption(p, "")?,
    };
    let made = c.region.copy_snapshot(c.account, c.source_region()?, &ask)?;
    Ok(node! { "snapshotId": &made.id, "tagSet": tag_set(&made.tags) })
}

fn delete(c: &Context<'_>) -> Answer {
    c.region.delete_snapshot(c.account, c.params.required("SnapshotId")?)?;
    Ok(done())
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("SnapshotId");
    let (owners, by) = (c.params.strings("Owner"), c.params.strings("RestorableBy"));
    let mut all = c.region.all::<Snapshot>()?;
    all.retain(|s| !s.deleting && s.readable(c.account));
    let own = |s: &Snapshot, who: &str| who == s.account || who == "self" && s.account == c.account;
    all.retain(|s| owners.is_empty() || owners.iter().any(|owner| own(s, owner)));
    let restores = |s: &Snapshot, who: &str| match who {
        "all" => s.public,
        "self" => s.account == c.account || s.shared.iter().any(|account| account == c.account),
        who => s.account == who || s.shared.iter().any(|account| account == who),
    };
    all.retain(|s| by.is_empty() || by.iter().any(|who| restores(s, who)));
    let found = chosen(all, &ids, |s| &s.id, ("snap", "InvalidSnapshot", "snapshot"))?;
    c.describe("snapshotSet", found.iter().map(|s| (s.id.clone(), told(c, s))).collect(), &ids)
}

fn attribute(c: &Context<'_>) -> Answer {
    let id = c.params.required("SnapshotId")?;
    hutch_cloud::id::check(id, "snap", "InvalidSnapshotID")?;
    let found = c.region.get::<Snapshot>(id)?.filter(|s| s.account == c.account && !s.deleting);
    let snapshot = found.ok_or_else(|| Fault::not_found("InvalidSnapshot", "snapshot", id))?;
    let answer = Node::empty().with("snapshotId", &snapshot.id);
    match c.params.required("Attribute")? {
        "createVolumePermission" => {
            Ok(answer.with("createVolumePermission", permitted(snapshot.public, &snapshot.shared)))
        }
        "productCodes" => Ok(answer.with("productCodes", Node::List(vec![]))),
        other => Err(Fault::value("attribute", other, "It is no attribute of a snapshot.")),
    }
}

fn modify(c: &Context<'_>) -> Answer {
    let changes = permissions(c.params, "CreateVolumePermission", "UserGroup")?;
    if changes.is_empty() {
        return Err(Fault::combination("No attributes specified."));
    }
    c.region.modify_snapshot(c.account, c.params.required("SnapshotId")?, |snapshot| {
        permit(&changes, &mut snapshot.public, &mut snapshot.shared);
    })?;
    Ok(done())
}

fn reset(c: &Context<'_>) -> Answer {
    let name = c.params.required("Attribute")?;
    if name != "createVolumePermission" {
        return Err(Fault::value("attribute", name, "Only createVolumePermission can be reset."));
    }
    c.region.modify_snapshot(c.account, c.params.required("SnapshotId")?, |snapshot| {
        (snapshot.public, snapshot.shared) = (false, Vec::new());
    })?;
    Ok(done())
}
