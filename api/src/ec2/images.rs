//! Images.

use hutch_cloud::model::{Image, Snapshot};
use hutch_cloud::region::NewImage;

use super::{Answer, Context, Operation, chosen, done, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeImages", describe),
    ("CreateImage", create),
    ("DeregisterImage", deregister),
    ("DescribeImageAttribute", attribute),
    ("ModifyImageAttribute", modify),
    ("ResetImageAttribute", reset),
];

fn told(c: &Context<'_>, image: &Image) -> Node {
    let state = match (&image.failed, image.pending) {
        (Some(_), _) => "failed",
        (None, true) => "pending",
        (None, false) => "available",
    };
    let devices = Node::list(&image.devices, |device| {
        node! {
            "deviceName": &device.name,
            "ebs": node! {
                "snapshotId": device.snapshot.as_ref(),
                "volumeSize": device.gib,
                "deleteOnTermination": device.delete_on_termination,
                "volumeType": &device.kind,
                "encrypted": false,
            },
        }
    });
    let own = image.account == c.account;
    node! {
        "imageId": &image.id,
        "imageLocation": format!("{}/{}", image.account, image.name),
        "imageState": state,
        "imageOwnerId": &image.account,
        "creationDate": time(image.created),
        "isPublic": image.public,
        "productCodes": Node::List(vec![]),
        "architecture": "x86_64",
        "imageType": "machine",
        "sriovNetSupport": "simple",
        "name": &image.name,
        "description": (!image.description.is_empty()).then_some(&image.description),
        "rootDeviceType": "ebs",
        "rootDeviceName": &image.root_device,
        "blockDeviceMapping": devices,
        "virtualizationType": "hvm",
        "hypervisor": "xen",
        "enaSupport": true,
        "platformDetails": "Linux/UNIX",
        "usageOperation": "RunInstances",
        "sourceInstanceId": image.source_instance.as_ref().filter(|_| own),
        "stateReason": image.failed.as_ref().map(|r| node! { "code": &r.code, "message": &r.message }),
        // Tags are their owner's own.
        "tagSet": tag_set(&image.tags).filter(|_| own),
    }
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("ImageId");
    let mut all = c.region.all::<Image>()?;
    all.retain(|image| image.launchable(c.account));
    let found = chosen(all, &ids, |image| &image.id, ("ami", "InvalidAMIID", "image id")).map_err(
        |fault| match fault.code.as_ref() {
            "InvalidAMIID.NotFound" => {
                Fault::new(fault.code, format!("The image ids '{ids:?}' do not exist").replace('"', ""))
            }
            _ => fault,
        },
    )?;
    let owners = c.params.strings("Owner");
    let by = c.params.strings("ExecutableBy");
    let owned = |image: &Image| {
        owners.is_empty()
            || owners
                .iter()
                .any(|owner| *owner == image.account || owner == "self" && image.account == c.account)
    };
    let runs = |image: &Image| {
        by.is_empty()
            || by.iter().any(|who| match who.as_str() {
                "all" => image.public,
                "self" => image.launch.iter().any(|account| account == c.account),
                who => image.launch.iter().any(|account| account == who),
            })
    };
    let told = found
        .iter()
        .filter(|image| owned(image) && runs(image))
        .map(|image| (image.id.clone(), told(c, image)));
    c.describe("imagesSet", told.collect(), &ids)
}

fn create(c: &Context<'_>) -> Answer {
    let mut tags = c.tag_specifications()?;
    let new = NewImage {
        instance: c.params.required("InstanceId")?.into(),
        name: c.params.required("Name")?.into(),
        description: c.params.str("Description").unwrap_or_default().into(),
        tags: tags.remove("image").unwrap_or_default(),
        snapshot_tags: tags.remove("snapshot").unwrap_or_default(),
    };
    Ok(node! { "imageId": c.region.create_image(c.account, &new)? })
}

fn deregister(c: &Context<'_>) -> Answer {
    c.region.deregister_image(c.account, c.params.required("ImageId")?)?;
    Ok(done())
}

/// The image, of which the account may see the attributes.
fn the(c: &Context<'_>) -> Result<Image, Fault> {
    let id = c.params.required("ImageId")?;
    hutch_cloud::id::check(id, "ami", "InvalidAMIID")?;
    let missing = || Fault::new("InvalidAMIID.NotFound", format!("The image id '[{id}]' does not exist"));
    let image = c.region.get::<Image>(id)?.filter(|image| image.launchable(c.account)).ok_or_else(missing)?;
    match image.account == c.account {
        true => Ok(image),
        false => Err(Fault::new("AuthFailure", format!("Not authorized for image:{id}"))),
    }
}

fn attribute(c: &Context<'_>) -> Answer {
    let image = the(c)?;
    let answer = Node::empty().with("imageId", &image.id);
    let name = c.params.required("Attribute")?;
    Ok(match name {
        "launchPermission" => {
            let everyone = image.public.then(|| node! { "group": "all" });
            let accounts = image.launch.iter().map(|account| node! { "userId": account });
            answer.with("launchPermission", Node::List(everyone.into_iter().chain(accounts).collect()))
        }
        "description" => answer.with("description", node! { "value": &image.description }),
        "blockDeviceMapping" => {
            answer.with("blockDeviceMapping", told(c, &image).get("blockDeviceMapping").cloned())
        }
        "kernel" | "ramdisk" | "sriovNetSupport" | "bootMode" | "tpmSupport" => answer,
        "productCodes" => answer.with("productCodes", Node::List(vec![])),
        _ => return Err(Fault::value("attribute", name, "It is no attribute of an image.")),
    })
}

fn modify(c: &Context<'_>) -> Answer {
    let p = c.params;
    let id = p.required("ImageId")?;
    let mut changes: Vec<(bool, Option<String>)> = Vec::new();
    for (list, add) in [("LaunchPermission.Add", true), ("LaunchPermission.Remove", false)] {
        for one in p.list(list) {
            match (one.str("Group"), one.str("UserId")) {
                (Some("all"), None) => changes.push((add, None)),
                (None, Some(account)) => changes.push((add, Some(account.into()))),
                _ => {
                    return Err(Fault::new(
                        "InvalidAMIAttributeItemValue",
                        "A launch permission is of the group all, or of a user id",
                    ));
                }
            }
        }
    }
    if let Some(add) = p.str("OperationType") {
        let add = match add {
            "add" => true,
            "remove" => false,
            _ => return Err(Fault::value("operationType", add, "It is add or remove.")),
        };
        changes.extend(p.strings("UserId").into_iter().map(|account| (add, Some(account))));
        changes
            .extend(p.strings("UserGroup").into_iter().filter(|group| group == "all").map(|_| (add, None)));
    }
    for account in changes.iter().filter_map(|(_, account)| account.as_ref()) {
        if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
            let why = format!("Invalid attribute item value \"{account}\" for userId item type.");
            return Err(Fault::new("InvalidAMIAttributeItemValue", why));
        }
    }
    let description = p
        .str("Description.Value")
        .or_else(|| p.str("Attribute").filter(|name| *name == "description").and(p.str("Value")));
    if changes.is_empty() && description.is_none() {
        return Err(Fault::new("InvalidParameterCombination", "No attributes specified."));
    }
    c.region.modify_image(c.account, id, |image| {
        for (add, account) in &changes {
            match account {
                None => image.public = *add,
                Some(account) => {
                    image.launch.retain(|have| have != account);
                    image.launch.extend(add.then(|| account.clone()));
                }
            }
        }
        if let Some(description) = description {
            image.description = description.into();
        }
        Ok(())
    })?;
    Ok(done())
}

fn reset(c: &Context<'_>) -> Answer {
    let name = c.params.required("Attribute")?;
    if name != "launchPermission" {
        return Err(Fault::value("attribute", name, "Only launchPermission can be reset."));
    }
    c.region.modify_image(c.account, c.params.required("ImageId")?, |image| {
        (image.public, image.launch) = (false, Vec::new());
        Ok(())
    })?;
    Ok(done())
}

/// A snapshot, as answers tell it.
pub(super) fn snapshot(s: &Snapshot) -> Node {
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
        "encrypted": false,
        "storageTier": "standard",
        "tagSet": tag_set(&s.tags),
    }
}
