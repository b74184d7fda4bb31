//! Images in buckets: written there, and made of what is there.

use hutch_cloud::model::{StoreTask, Tags};
use hutch_cloud::region::{RestoreAsk, StoreAsk};

use super::{Answer, Context, Operation, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateStoreImageTask", store),
    ("DescribeStoreImageTasks", describe),
    ("CreateRestoreImageTask", restore),
];

fn store(c: &Context<'_>) -> Answer {
    let p = c.params;
    let mut object_tags = Tags::new();
    for tag in p.list("S3ObjectTag") {
        object_tags.insert(tag.required("Key")?.into(), tag.str("Value").unwrap_or_default().into());
    }
    let ask =
        StoreAsk { image: p.required("ImageId")?.into(), bucket: p.required("Bucket")?.into(), object_tags };
    Ok(node! { "objectKey": c.region.create_store_task(c.account, &ask)? })
}

fn told(c: &Context<'_>, task: &StoreTask) -> Node {
    node! {
        "amiId": &task.image.id,
        "bucket": &task.bucket,
        "progressPercentage": c.region.store_progress(task),
        "s3objectKey": &task.key,
        "storeTaskFailureReason": task.failed.as_ref(),
        "storeTaskState": task.state.name(),
        "taskStartTime": time(task.started),
    }
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("ImageId");
    let mut all = c.region.all::<StoreTask>()?;
    all.retain(|task| task.account == c.account);
    for id in &ids {
        hutch_cloud::id::check(id, "ami", "InvalidAMIID")?;
        if !all.iter().any(|task| task.image.id == *id) {
            let why = format!("The image '{id}' was not stored within the last 31 days");
            return Err(Fault::new("InvalidAMIID.NotFound", why));
        }
    }
    all.retain(|task| ids.is_empty() || ids.contains(&task.image.id));
    // The latest first.
    all.sort_by_key(|task| std::cmp::Reverse(task.started));
    let told = all.iter().map(|task| (key(task), told(c, task))).collect();
    c.describe("storeImageTaskResultSet", told, &ids)
}

/// Of later ones first in the order of keys.
fn key(task: &StoreTask) -> String {
    format!("{:020}/{}", i64::MAX - task.started.as_millisecond(), task.id)
}

fn restore(c: &Context<'_>) -> Answer {
    let p = c.params;
    let mut tags = c.tag_specifications()?;
    let ask = RestoreAsk {
        bucket: p.required("Bucket")?.into(),
        key: p.required("ObjectKey")?.into(),
        name: p.str("Name").filter(|name| !name.is_empty()).map(str::to_owned),
        tags: tags.remove("image").unwrap_or_default(),
        snapshot_tags: tags.remove("snapshot").unwrap_or_default(),
    };
    Ok(node! { "imageId": c.region.create_restore_task(c.account, &ask)? })
}
