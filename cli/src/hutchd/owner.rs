//! What the owner of the machine asks of the daemon itself, beside EC2: the service `hutch` on the same endpoint, signed
//! likewise.
//!
//! ```text
//!   CreateBackup Path=DIR ─► backupId       by the administrator's account; one at a time
//!   DescribeBackup BackupId=… ─► state running | done | failed, bytes, what came of it
//!   BundleImage ImageId=… Bucket=… Prefix=… ─► bundleId          the root of an image, written as BundleInstance does
//!   GetUsage ─► what room each volume and snapshot of the account takes
//!   GetFigures ─► what each running instance of the account has used and moved since it started
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use hutch_api::ec2::Regions;
use hutch_api::node;
use hutch_api::query::{Call, Fault, Node};
use hutch_cloud::backup::{self, Manifest, Progress};
use hutch_cloud::model::{Instance, InstanceState, Snapshot, Tags, Volume};
use hutch_cloud::region::{BundleAsk, DiskAsk, DiskFrom, NewImport, Region};

use crate::jobs::Jobs;

/// The name of the service in a credential's scope.
pub const SERVICE: &str = "hutch";
/// What it does.
pub const ACTIONS: [&str; 10] = [
    "BundleImage",
    "CreateBackup",
    "DescribeBackup",
    "CreateExport",
    "CreateCheck",
    "CreateRepair",
    "DescribeJob",
    "ImportDisk",
    "GetFigures",
    "GetUsage",
];

/// The backup that is made, or was last.
struct Job {
    id: String,
    to: PathBuf,
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
    /// How it ended.
    end: Arc<Mutex<Option<Result<Manifest, String>>>>,
}

/// Begins to make a snapshot of a file of this machine: an import as ImportSnapshot's.
fn import(region: &Region, call: &Call) -> Result<Node, Fault> {
    let path = PathBuf::from(call.params.required("Path")?);
    if !path.is_absolute() {
        let why = "It is a whole path on the daemon's machine, such as /import/disk.vmdk.";
        return Err(Fault::value("Path", &path.to_string_lossy(), why));
    }
    let disk = DiskAsk {
        from: DiskFrom::Path(path),
        format: call.params.str("Format").map(str::to_owned),
        ..DiskAsk::default()
    };
    let task =
        region.import(&call.identity.account, &NewImport { disks: vec![disk], ..NewImport::default() })?;
    Ok(node! { "importTaskId": task.id })
}

/// Begins to write the root of an image to a bucket: a bundle as BundleInstance's.
fn bundle(region: &Region, call: &Call) -> Result<Node, Fault> {
    let text = |name: &str| call.params.required(name).map(str::to_owned);
    let (image, bucket, prefix) = (Some(text("ImageId")?), text("Bucket")?, text("Prefix")?);
    let ask = BundleAsk { instance: None, image, bucket, prefix };
    Ok(node! { "bundleId": region.bundle(&call.identity.account, &ask)?.id })
}

/// The owner's operations.
pub struct Owner {
    /// The state; `None`: nothing is kept.
    state: Option<PathBuf>,
    /// The account that may have backups made.
    account: String,
    job: Mutex<Option<Job>>,
    jobs: Jobs,
    began: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Owner {
    /// The operations of a daemon on this state, whose administrator has this account.
    pub fn new(state: Option<&Path>, account: &str) -> Owner {
        let (jobs, account) = (Jobs::open(state), account.to_owned());
        let state = state.map(Path::to_owned);
        Owner { state, account, job: Mutex::default(), jobs, began: Instant::now() }
    }

    /// Serves a call.
    ///
    /// # Errors
    /// What the client is told.
    pub fn serve(&self, regions: &Regions, call: &Call) -> Result<Node, Fault> {
        match call.action.as_str() {
            "GetFigures" => self.figures(regions, call),
            "GetUsage" => usage(region(regions, call)?, &call.identity.account),
            "CreateBackup" | "DescribeBackup" if call.identity.account != self.account => {
                let why =
                    "Backups are made by the administrator's access key, which is in keys.json of the state";
                Err(Fault::new("UnauthorizedOperation", why))
            }
            "CreateExport" | "ImportDisk" if call.identity.account != self.account => {
                let why = "Files of this machine are the administrator's; that access key is in keys.json of the state";
                Err(Fault::new("UnauthorizedOperation", why))
            }
            "CreateExport" => self.jobs.export(region(regions, call)?, call),
            "CreateCheck" => self.jobs.check(region(regions, call)?, call),
            "CreateRepair" => self.jobs.repair(region(regions, call)?, call),
            "DescribeJob" => self.jobs.describe(call),
            "BundleImage" => bundle(region(regions, call)?, call),
            "ImportDisk" => import(region(regions, call)?, call),
            "CreateBackup" => self.begin(regions, call),
            "DescribeBackup" => self.describe(call),
            other => {
                let why = format!("The action {SERVICE}:{other} is not valid for this web service.");
                Err(Fault::new("InvalidAction", why))
            }
        }
    }

    fn begin(&self, regions: &Regions, call: &Call) -> Result<Node, Fault> {
        let to = PathBuf::from(call.params.required("Path")?);
        if !to.is_absolute() {
            let why = "It is a whole path on the daemon's machine, such as /backup/monday.";
            return Err(Fault::value("Path", &to.to_string_lossy(), why));
        }
        let kept = || Fault::new("UnsupportedOperation", "With --state memory nothing is kept to back up");
        let state = self.state.clone().ok_or_else(kept)?;
        let mut job = lock(&self.job);
        if let Some(job) = job.as_ref().filter(|job| lock(&job.end).is_none()) {
            let why = format!("The backup {} to {} is under way; wait for it", job.id, job.to.display());
            return Err(Fault::new("IncorrectState", why));
        }
        let (progress, end) = (Arc::new(Progress::default()), Arc::new(Mutex::new(None)));
        let id = format!("backup-{}", uuid::Uuid::new_v4().simple());
        let work = {
            let (regions, to, progress, end) = (regions.clone(), to.clone(), progress.clone(), end.clone());
            move || {
                let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    backup::run(&regions, &state, &to, &progress)
                }));
                let made = match made {
                    Ok(made) => made.map_err(|error| format!("{:#}", anyhow::Error::new(error))),
                    Err(_) => Err("it ended badly; the log says more".into()),
                };
                match &made {
                    Ok(made) => tracing::info!(to = %to.display(), bytes = made.bytes(), "a backup is made"),
                    Err(error) => tracing::warn!(to = %to.display(), error, "no backup is made"),
                }
                *lock(&end) = Some(made);
            }
        };
        let thread =
            std::thread::Builder::new().name("backup".into()).spawn(work).map_err(Fault::internal)?;
        let answer = node! { "backupId": &id };
        *job = Some(Job { id, to, progress, thread: Some(thread), end });
        Ok(answer)
    }

    fn describe(&self, call: &Call) -> Result<Node, Fault> {
        let id = call.params.required("BackupId")?;
        let job = lock(&self.job);
        let job = job
            .as_ref()
            .filter(|job| job.id == id)
            .ok_or_else(|| Fault::not_found("InvalidBackupID", "backup", id))?;
        let (done, total) = job.progress.figures();
        let end = lock(&job.end);
        let state = match end.as_ref() {
            None => "running",
            Some(Ok(_)) => "done",
            Some(Err(_)) => "failed",
        };
        let made = end.as_ref().and_then(|end| end.as_ref().ok());
        let count = |of: fn(&backup::RegionEntry) -> usize| {
            made.map(|made| made.regions.iter().map(of).sum::<usize>() as u64)
        };
        Ok(node! {
            "backupId": &job.id,
            "state": state,
            "path": job.to.to_string_lossy().as_ref(),
            "doneBytes": done,
            "totalBytes": total,
            "message": end.as_ref().and_then(|end| end.as_ref().err()),
            "files": made.map(|made| made.files.len() as u64),
            "bytes": made.map(Manifest::bytes),
            "keys": made.map(|made| made.keys() as u64),
            "created": made.map(|made| made.created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
            "instances": count(|region| region.instances),
            "volumes": count(|region| region.volumes),
        })
    }

    fn figures(&self, regions: &Regions, call: &Call) -> Result<Node, Fault> {
        let region = region(regions, call)?;
        let mut items = Vec::new();
        for instance in region.all::<Instance>()? {
            if instance.account != call.identity.account || instance.state != InstanceState::Running {
                continue;
            }
            // One that does not answer, or has just ended, has none.
            let Ok(Some(figures)) = region.host().figures(&instance.id) else { continue };
            items.push(node! {
                "instanceId": &instance.id,
                "run": instance.run,
                // When they were read: rates are differences over differences.
                "atMicros": self.began.elapsed().as_micros() as u64,
                "cpuMicros": figures.cpu_us,
                "memoryBytes": figures.memory_bytes,
                "diskReadBytes": figures.disk_read,
                "diskWrittenBytes": figures.disk_written,
                "netReceivedBytes": figures.net_received,
                "netSentBytes": figures.net_sent,
            });
        }
        Ok(node! { "figureSet": Node::List(items) })
    }

    /// Ends a backup that is under way: guests that are held go on, and what there is of it is removed.
    pub fn end(&self) {
        self.jobs.end();
        let thread = lock(&self.job).as_mut().and_then(|job| {
            job.progress.stop();
            job.thread.take()
        });
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::warn!("a backup ended badly");
        }
    }
}

fn region<'a>(regions: &'a Regions, call: &Call) -> Result<&'a Region, Fault> {
    let missing = || Fault::new("AuthFailure", format!("There is no region {}", call.region));
    regions.get(&call.region).map(|region| &**region).ok_or_else(missing)
}

fn usage(region: &Region, account: &str) -> Result<Node, Fault> {
    let Some(usage) = region.host().usage().map_err(Fault::internal)? else {
        return Ok(node! { "roomSet": Node::List(Vec::new()) });
    };
    let mut items = Vec::new();
    let mut tell = |id: &str, gib: u64, tags: &Tags| {
        let Some(room) = usage.of.get(id) else { return };
        items.push(node! {
            "resourceId": id,
            "name": tags.get("Name"),
            "sizeGiB": gib,
            "layers": room.layers as u64,
            "aloneBytes": room.alone,
            "sharedBytes": room.shared,
        });
    };
    for volume in region.all::<Volume>()?.iter().filter(|volume| volume.account == account) {
        tell(&volume.id, volume.gib, &volume.tags);
    }
    for snapshot in region.all::<Snapshot>()?.iter().filter(|snapshot| snapshot.account == account) {
        tell(&snapshot.id, snapshot.gib, &snapshot.tags);
    }
    Ok(node! { "usedBytes": usage.used, "freeBytes": usage.free, "roomSet": Node::List(items) })
}
