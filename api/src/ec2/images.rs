//! Images.

use hutch_cloud::model::{Image, ImageDevice, ImageKind, Snapshot};
use hutch_cloud::region::{ImageCopy, NewImage, Registration};

use super::instances::device_asks;
use super::{Answer, Context, Operation, chosen, done, encryption, tag_set, time};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeImages", describe),
    ("CreateImage", create),
    ("RegisterImage", register),
    ("CopyImage", copy),
    ("DeregisterImage", deregister),
    ("DescribeImageAttribute", attribute),
    ("ModifyImageAttribute", modify),
    ("ResetImageAttribute", reset),
    ("EnableImageDeprecation", deprecate),
    ("DisableImageDeprecation", |c| act(c, |c, id| c.region.deprecate_image(c.account, id, None))),
    ("EnableImage", |c| act(c, |c, id| c.region.disable_image(c.account, id, false))),
    ("DisableImage", |c| act(c, |c, id| c.region.disable_image(c.account, id, true))),
    ("ListImagesInRecycleBin", |c| {
        // Nothing is kept of an image that is deregistered.
        c.page(Vec::new(), &c.ids("ImageId"))?;
        Ok(node! { "imageSet": Node::List(vec![]) })
    }),
];

/// What ids of images begin with: those of machines, kernels and RAM disks.
const IDS: &str = "ami|aki|ari";

fn told(c: &Context<'_>, image: &Image) -> Node {
    let state = match (&image.failed, image.pending) {
        (Some(_), _) => "failed",
        (None, true) => "pending",
        (None, false) if image.disabled => "disabled",
        (None, false) => "available",
    };
    // One that cannot be read is told nowhere else, either.
    let snapshot = |id: &String| c.region.get::<Snapshot>(id).ok().flatten();
    let key = |device: &ImageDevice| {
        let of = device.snapshot.as_ref().filter(|_| device.encrypted).and_then(snapshot)?;
        Some(c.region.key_arn(&of.account, of.key.as_ref()?))
    };
    let volumes = image.devices.iter().map(|device| {
        node! {
            "deviceName": &device.name,
            "ebs": node! {
                "snapshotId": device.snapshot.as_ref(),
                "volumeSize": device.gib,
                "deleteOnTermination": device.delete_on_termination,
                "volumeType": &device.kind,
                "iops": device.iops,
                "encrypted": device.encrypted,
                "kmsKeyId": key(device),
            },
        }
    });
    let stores =
        image.stores.iter().map(|(name, device)| node! { "deviceName": device, "virtualName": name });
    let devices = Node::List(volumes.chain(stores).collect());
    let own = image.account == c.account;
    let machine = image.kind == ImageKind::Machine;
    node! {
        "imageId": &image.id,
        "imageLocation": image.bundle.as_ref().map_or_else(|| format!("{}/{}", image.account, image.name), |b| b.location.clone()),
        "imageState": state,
        "imageOwnerId": &image.account,
        "creationDate": time(image.created),
        "isPublic": image.public,
        "productCodes": Node::List(vec![]),
        "architecture": "x86_64",
        "imageType": image.kind.name(),
        "kernelId": image.kernel.as_ref(),
        "ramdiskId": image.ramdisk.as_ref(),
        "sriovNetSupport": machine.then_some("simple"),
        "name": &image.name,
        "description": (!image.description.is_empty()).then_some(&image.description),
        "rootDeviceType": if machine && image.bundle.is_none() { "ebs" } else { "instance-store" },
        "rootDeviceName": machine.then_some(&image.root_device),
        "blockDeviceMapping": devices,
        "virtualizationType": "hvm",
        "hypervisor": "xen",
        "enaSupport": machine.then_some(image.ena_support),
        "platformDetails": "Linux/UNIX",
        "usageOperation": machine.then_some("RunInstances"),
        "deprecationTime": image.deprecated.map(time),
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
    let found =
        chosen(all, &ids, |image| &image.id, (IDS, "InvalidAMIID", "image id")).map_err(
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
    let deprecated = c.params.boolean("IncludeDeprecated")? == Some(true) || !ids.is_empty();
    let disabled = c.params.boolean("IncludeDisabled")? == Some(true);
    let now = jiff::Timestamp::now();
    // Who owns an image or knows its id sees it also when it is deprecated.
    let shown = |image: &Image| {
        let over = image.deprecated.is_some_and(|at| at <= now) && image.account != c.account;
        (deprecated || !over) && (disabled || !image.disabled)
    };
    let told = found
        .iter()
        .filter(|image| owned(image) && runs(image) && shown(image))
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
        devices: device_asks(c.params)?,
    };
    Ok(node! { "imageId": c.region.create_image(c.account, &new)? })
}

fn register(c: &Context<'_>) -> Answer {
    let p = c.params;
    for (name, known) in
        [("Architecture", "x86_64"), ("VirtualizationType", "hvm"), ("BootMode", "legacy-bios")]
    {
        if let Some(other) = p.str(name).filter(|given| !given.is_empty() && *given != known) {
            return Err(Fault::value(name, other, &format!("hutch's images are {known}.")));
        }
    }
    // Terraform names what it does not want, too, with nothing behind it.
    if p.str("UefiData").is_some_and(|text| !text.is_empty()) {
        let why = "hutch registers images of snapshots and bundles: it does not have UefiData";
        return Err(Fault::new("UnsupportedOperation", why));
    }
    let owned = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let new = Registration {
        name: p.required("Name")?.into(),
        description: p.str("Description").unwrap_or_default().into(),
        location: owned("ImageLocation"),
        root_device: owned("RootDeviceName"),
        devices: device_asks(p)?,
        kernel: owned("KernelId"),
        ramdisk: owned("RamdiskId"),
        ena_support: p.boolean("EnaSupport")?.unwrap_or(false),
        tags: c.tag_specifications()?.remove("image").unwrap_or_default(),
    };
    Ok(node! { "imageId": c.region.register_image(c.account, &new)? })
}

fn copy(c: &Context<'_>) -> Answer {
    let p = c.params;
    let text = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let mut tags = c.tag_specifications()?;
    let ask = ImageCopy {
        image: p.required("SourceImageId")?.into(),
        name: p.required("Name")?.into(),
        description: text("Description"),
        copy_tags: p.boolean("CopyImageTags")?.unwrap_or(false),
        tags: tags.remove("image").unwrap_or_default(),
        snapshot_tags: tags.remove("snapshot").unwrap_or_default(),
        encryption: encryption(p, "")?,
        client_token: text("ClientToken"),
        request: c.digest(),
    };
    Ok(node! { "imageId": c.region.copy_image(c.account, c.source_region()?, &ask)? })
}

fn deregister(c: &Context<'_>) -> Answer {
    act(c, |c, id| c.region.deregister_image(c.account, id))
}

/// Does something with the image that is named.
fn act(c: &Context<'_>, job: impl Fn(&Context<'_>, &str) -> Result<(), Fault>) -> Answer {
    job(c, c.params.required("ImageId")?)?;
    Ok(done())
}

fn deprecate(c: &Context<'_>) -> Answer {
    let at = c.params.required("DeprecateAt")?;
    let bad = |_| Fault::value("DeprecateAt", at, "It is a time such as 2030-01-31T12:00:00Z.");
    let at: jiff::Timestamp = at.parse().map_err(bad)?;
    act(c, |c, id| c.region.deprecate_image(c.account, id, Some(at)))
}

/// The image, of which the account may see the attributes.
fn the(c: &Context<'_>) -> Result<Image, Fault> {
    let id = c.params.required("ImageId")?;
    hutch_cloud::id::check(id, IDS, "InvalidAMIID")?;
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
        "launchPermission" => answer.with("launchPermission", permitted(image.public, &image.launch)),
        "description" => answer.with("description", node! { "value": &image.description }),
        "blockDeviceMapping" => {
            answer.with("blockDeviceMapping", told(c, &image).get("blockDeviceMapping").cloned())
        }
        "kernel" => answer.with("kernel", image.kernel.map(|id| node! { "value": id })),
        "ramdisk" => answer.with("ramdisk", image.ramdisk.map(|id| node! { "value": id })),
        "sriovNetSupport" | "bootMode" | "tpmSupport" => answer,
        "productCodes" => answer.with("productCodes", Node::List(vec![])),
        _ => return Err(Fault::value("attribute", name, "It is no attribute of an image.")),
    })
}

/// What a call says of who may use an image or a snapshot: add or remove, and an account, or everyone.
pub(super) fn permissions(
    p: &Params,
    list: &str,
    groups: &str,
) -> Result<Vec<(bool, Option<String>)>, Fault> {
    let bad = |why: String| Fault::new("InvalidAMIAttributeItemValue", why);
    let mut changes: Vec<(bool, Option<String>)> = Vec::new();
    for (part, add) in [("Add", true), ("Remove", false)] {
        for one in p.list(&format!("{list}.{part}")) {
            match (one.str("Group"), one.str("UserId")) {
                (Some("all"), None) => changes.push((add, None)),
                (None, Some(account)) => changes.push((add, Some(account.into()))),
                _ => return Err(bad("A permission is of the group all, or of a user id".into())),
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
        changes.extend(p.strings(groups).into_iter().filter(|group| group == "all").map(|_| (add, None)));
    }
    for account in changes.iter().filter_map(|(_, account)| account.as_ref()) {
        if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad(format!("Invalid attribute item value \"{account}\" for userId item type.")));
        }
    }
    Ok(changes)
}

/// Carries such changes out.
pub(super) fn permit(changes: &[(bool, Option<String>)], everyone: &mut bool, accounts: &mut Vec<String>) {
    for (add, account) in changes {
        match account {
            None => *everyone = *add,
            Some(account) => {
                accounts.retain(|have| have != account);
                accounts.extend(add.then(|| account.clone()));
            }
        }
    }
}

/// Who may use an image or a snapshot, as answers tell it.
pub(super) fn permitted(everyone: bool, accounts: &[String]) -> Node {
    let everyone = everyone.then(|| node! { "group": "all" });
    let accounts = accounts.iter().map(|account| node! { "userId": account });
    Node::List(everyone.into_iter().chain(accounts).collect())
}

fn modify(c: &Context<'_>) -> Answer {
    let p = c.params;
    let id = p.required("ImageId")?;
    let changes = permissions(p, "LaunchPermission", "UserGroup")?;
    let description = p
        .str("Description.Value")
        .or_else(|| p.str("Attribute").filter(|name| *name == "description").and(p.str("Value")));
    if changes.is_empty() && description.is_none() {
        return Err(Fault::new("InvalidParameterCombination", "No attributes specified."));
    }
    c.region.modify_image(c.account, id, |image| {
        permit(&changes, &mut image.public, &mut image.launch);
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
