//! Imports of other machines' disks.

use hutch_cloud::model::{ImportDisk, ImportState, ImportTask};
use hutch_cloud::region::{DiskAsk, DiskFrom, Encryption, NewImport};

use super::{Answer, Context, Operation, tag_set};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("ImportSnapshot", import_snapshot),
    ("ImportImage", import_image),
    ("DescribeImportSnapshotTasks", |c| describe(c, "importSnapshotTaskSet", false)),
    ("DescribeImportImageTasks", |c| describe(c, "importImageTaskSet", true)),
    ("CancelImportTask", cancel),
];

/// What is known of a disk.
fn disk(c: &Context<'_>, task: &ImportTask, disk: &ImportDisk) -> Node {
    let status = match (task.state, disk.done) {
        (ImportState::Active, true) => "completed",
        (state, _) => state.name(),
    };
    let active = task.state == ImportState::Active && !disk.done;
    let dir = c.region.settings().import_dir.as_deref();
    let url = disk.file.as_ref().map(|file| dir.map_or_else(|| file.clone(), |dir| dir.join(file)));
    let alive = disk.done && matches!(task.state, ImportState::Active | ImportState::Completed);
    node! {
        "description": (!disk.description.is_empty()).then_some(&disk.description),
        "deviceName": task.image.as_ref().map(|_| &disk.device),
        "diskImageSize": disk.file.as_ref().map(|_| format!("{}.0", disk.bytes)),
        "encrypted": task.key.is_some(),
        "kmsKeyId": key(c, task),
        "format": disk.format.and_then(|format| serde_json::to_value(format).ok()?.as_str().map(str::to_uppercase)),
        "progress": active.then(|| c.region.import_progress(task)),
        "snapshotId": alive.then_some(&disk.snapshot),
        "status": status,
        "statusMessage": message(task),
        "url": url.map(|file| format!("file://{}", file.display())),
    }
}

fn key(c: &Context<'_>, task: &ImportTask) -> Option<String> {
    Some(c.region.key_arn(&task.account, task.key.as_ref()?))
}

fn message(task: &ImportTask) -> Option<&str> {
    match task.state {
        ImportState::Active => Some("pending").filter(|_| task.message.is_empty()),
        _ => Some(&*task.message).filter(|message| !message.is_empty()),
    }
}

/// A task, as answers tell it.
fn told(c: &Context<'_>, task: &ImportTask) -> Node {
    let common = node! {
        "importTaskId": &task.id,
        "description": (!task.description.is_empty()).then_some(&task.description),
        "tagSet": tag_set(&task.tags),
    };
    let Some(image) = &task.image else {
        return common.with("snapshotTaskDetail", task.disks.first().map(|one| disk(c, task, one)));
    };
    let active = task.state == ImportState::Active;
    common
        .with("architecture", "x86_64")
        .with("platform", "Linux")
        .with("encrypted", task.key.is_some())
        .with("kmsKeyId", key(c, task))
        .with("bootMode", "legacy-bios")
        .with("imageId", (task.state == ImportState::Completed).then_some(image))
        .with("progress", active.then(|| c.region.import_progress(task)))
        .with("status", task.state.name())
        .with("statusMessage", message(task))
        .with("snapshotDetailSet", Node::list(&task.disks, |one| disk(c, task, one)))
}

fn describe(c: &Context<'_>, set: &'static str, images: bool) -> Answer {
    let ids = c.ids("ImportTaskId");
    let mut all = c.region.all::<ImportTask>()?;
    all.retain(|task| task.account == c.account && task.image.is_some() == images);
    let kind = if images { "import-ami" } else { "import-snap" };
    for id in &ids {
        hutch_cloud::id::check(id, kind, "InvalidConversionTaskId")?;
        if !all.iter().any(|task| task.id == *id) {
            let why = format!("The import task '{id}' does not exist");
            return Err(Fault::new("InvalidConversionTaskId", why));
        }
    }
    all.retain(|task| ids.is_empty() || ids.contains(&task.id));
    // The one that EC2 documents for these tasks.
    let mut states = Vec::new();
    for filter in c.params.list("Filters") {
        match filter.required("Name")? {
            "task-state" => states.extend(filter.strings("Value")),
            other => {
                let why = format!("The filter '{other}' is invalid");
                return Err(Fault::new("InvalidParameterValue", why));
            }
        }
    }
    all.retain(|task| states.is_empty() || states.iter().any(|state| state == task.state.name()));
    let told = all.iter().map(|task| (task.id.clone(), told(c, task))).collect();
    let (page, token) = c.page(told, &ids)?;
    Ok(Node::empty().with(set, Node::List(page)).with("nextToken", token))
}

/// What is asked of a disk.
fn ask(p: &Params) -> Result<DiskAsk, Fault> {
    let text = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    if p.sub("UserBucket").is_some() {
        let why = "hutch has no S3: name a file by its Url, file:///DIR/FILE, below hutchd's --import-dir";
        return Err(Fault::new("UnsupportedOperation", why));
    }
    let from = match (text("Url"), text("SnapshotId")) {
        (Some(_), Some(_)) => {
            return Err(Fault::combination("A disk is of a Url or of a SnapshotId, not both."));
        }
        (Some(url), None) => DiskFrom::Url(url),
        (None, Some(id)) => DiskFrom::Snapshot(id),
        (None, None) => DiskFrom::Nowhere,
    };
    Ok(DiskAsk {
        device: text("DeviceName"),
        description: text("Description").unwrap_or_default(),
        from,
        format: text("Format"),
    })
}

/// The request, but for its disks.
fn asked(c: &Context<'_>, kind: &str, disks: Vec<DiskAsk>) -> Result<NewImport, Fault> {
    let p = c.params;
    let text = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    Ok(NewImport {
        description: text("Description").unwrap_or_default(),
        disks,
        image: kind == "import-image-task",
        encryption: Encryption { encrypted: p.boolean("Encrypted")?, key: text("KmsKeyId") },
        tags: c.tag_specifications()?.remove(kind).unwrap_or_default(),
        client_token: text("ClientToken"),
        request: c.digest(),
    })
}

fn import_snapshot(c: &Context<'_>) -> Answer {
    let disk = c.params.sub("DiskContainer").ok_or_else(|| Fault::missing("DiskContainer"))?;
    let new = asked(c, "import-snapshot-task", vec![ask(disk)?])?;
    Ok(told(c, &c.region.import(c.account, &new)?))
}

fn import_image(c: &Context<'_>) -> Answer {
    for (name, known) in [
        ("Architecture", "x86_64"),
        ("Platform", "Linux"),
        ("BootMode", "legacy-bios"),
        ("LicenseType", "BYOL"),
    ] {
        if let Some(other) = c.params.str(name).filter(|given| !given.is_empty() && *given != known) {
            return Err(Fault::value(name, other, &format!("hutch's images are {known}.")));
        }
    }
    let disks = c.params.list("DiskContainer").iter().map(|disk| ask(disk)).collect::<Result<_, _>>()?;
    let new = asked(c, "import-image-task", disks)?;
    Ok(told(c, &c.region.import(c.account, &new)?))
}

fn cancel(c: &Context<'_>) -> Answer {
    let id = c.params.required("ImportTaskId")?;
    hutch_cloud::id::check(id, "import-ami|import-snap", "InvalidConversionTaskId")?;
    let before = c.region.cancel_import(c.account, id, c.params.str("CancelReason").unwrap_or_default())?;
    Ok(node! { "importTaskId": id, "state": "deleting", "previousState": before.name() })
}
