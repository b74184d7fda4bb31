//! Bundles: roots of instances, written to buckets.

use hutch_cloud::model::{BundleState, BundleTask};
use hutch_cloud::region::BundleAsk;

use super::{Answer, Context, Operation, chosen, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] =
    &[("BundleInstance", bundle), ("DescribeBundleTasks", describe), ("CancelBundleTask", cancel)];

const IDS: (&str, &str, &str) = ("bun", "InvalidBundleID", "bundle task ID");

/// A task as answers tell it.
fn told(c: &Context<'_>, task: &BundleTask) -> Node {
    // What was written of one that fails is removed before it has failed.
    let failed = task.failed.as_ref().filter(|_| task.state == BundleState::Failed);
    let runs = matches!(task.state, BundleState::Bundling | BundleState::Storing);
    node! {
        "bundleId": &task.id,
        "instanceId": task.instance.as_ref(),
        "state": task.state.name(),
        "startTime": time(task.started),
        "updateTime": time(task.updated),
        "progress": runs.then(|| format!("{}%", c.region.bundle_progress(task))),
        "storage": node! { "S3": node! { "bucket": &task.bucket, "prefix": &task.prefix } },
        "error": failed.map(|why| node! { "code": &why.code, "message": &why.message }),
    }
}

fn bundle(c: &Context<'_>) -> Answer {
    let p = c.params;
    let place = |name: &str| {
        let given = p.str(&format!("Storage.S3.{name}")).filter(|text| !text.is_empty());
        given.map(str::to_owned).ok_or_else(|| Fault::missing(&format!("Storage.S3.{name}")))
    };
    let ask = BundleAsk {
        instance: Some(p.required("InstanceId")?.into()),
        image: None,
        bucket: place("Bucket")?,
        prefix: place("Prefix")?,
    };
    Ok(node! { "bundleInstanceTask": told(c, &c.region.bundle(c.account, &ask)?) })
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("BundleId");
    let mut all = c.region.all::<BundleTask>()?;
    all.retain(|task| task.account == c.account);
    let found = chosen(all, &ids, |task| &task.id, IDS)?;
    let told = found.iter().map(|task| (task.id.clone(), told(c, task))).collect();
    c.describe("bundleInstanceTasksSet", told, &ids)
}

fn cancel(c: &Context<'_>) -> Answer {
    let id = c.params.required("BundleId")?;
    hutch_cloud::id::check(id, IDS.0, IDS.1)?;
    Ok(node! { "bundleInstanceTask": told(c, &c.region.cancel_bundle(c.account, id)?) })
}
