//! What takes its time and is asked of the daemon itself: a snapshot written to a file, or checked; a volume repaired.
//!
//! ```text
//!   CreateExport SnapshotId=… Path=FILE Format=raw|qcow2 ─► jobId     by the administrator's account: it writes files
//!   CreateCheck SnapshotId=… ─► jobId
//!   CreateRepair VolumeId=… DiscardBroken=true|false ─► jobId     of a volume that no instance has that runs
//!   DescribeJob JobId=… ─► state running | done | failed, bytes, what came of it
//! ```
//! A job is its process's: when that ends, what was begun is gone; when it was killed, the next one takes that away.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hutch_api::node;
use hutch_api::query::{Call, Fault, Node};
use hutch_blockdev::Format;
use hutch_cloud::backup::Progress;
use hutch_cloud::export::{self, ExportError};
use hutch_cloud::host::RepairedLayer;
use hutch_cloud::model::{Instance, InstanceState, Snapshot, Volume, VolumeState};
use hutch_cloud::region::Region;

/// Jobs at a time.
const MOST: usize = 2;
/// Jobs that are over and remembered.
const KEPT: usize = 32;

/// The most ranges of a layer that are told one by one.
const RANGES: usize = 100;

/// What came of a job.
type End = Arc<Mutex<Option<Result<Node, String>>>>;

struct Job {
    id: String,
    account: String,
    progress: Arc<Progress>,
    end: End,
    thread: Option<JoinHandle<()>>,
}

impl Job {
    fn runs(&self) -> bool {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// The jobs of this process.
pub struct Jobs {
    /// The latest is last.
    jobs: Mutex<Vec<Job>>,
    /// Where exports are noted that are under way.
    notes: Option<PathBuf>,
}

/// The snapshot that a call names.
fn snapshot(region: &Region, call: &Call) -> Result<Snapshot, Fault> {
    let id = call.params.required("SnapshotId")?;
    hutch_cloud::id::check(id, "snap", "InvalidSnapshotID")?;
    let known = |s: &Snapshot| s.readable(&call.identity.account) && !s.deleting;
    let found = region.get::<Snapshot>(id)?.filter(known);
    let found = found.ok_or_else(|| Fault::not_found("InvalidSnapshot", "snapshot", id))?;
    match found.complete {
        true => Ok(found),
        false => Err(Fault::new("IncorrectState", format!("The snapshot '{id}' is not completed"))),
    }
}

/// The volume that a call names, which no instance has that is not stopped.
fn unused_volume(region: &Region, call: &Call) -> Result<Volume, Fault> {
    let id = call.params.required("VolumeId")?;
    hutch_cloud::id::check(id, "vol", "InvalidVolumeID")?;
    let volume = region.get::<Volume>(id)?.filter(|volume| volume.account == call.identity.account);
    let volume = volume.ok_or_else(|| Fault::not_found("InvalidVolume", "volume", id))?;
    if volume.state != VolumeState::Ready {
        let why = format!("The volume '{id}' is being made or deleted, or is in error");
        return Err(Fault::new("IncorrectState", why));
    }
    let user = volume.instance.as_deref().map(|user| region.get::<Instance>(user)).transpose()?.flatten();
    match user.filter(|user| user.state != InstanceState::Stopped) {
        None => Ok(volume),
        Some(user) => {
            let why = format!("The volume '{id}' is in use by {}; stop that, or detach the volume", user.id);
            Err(Fault::new("IncorrectState", why))
        }
    }
}

fn ranges(of: &[Range<u64>]) -> Node {
    let range =
        |range: &Range<u64>| node! { "offset": range.start, "bytes": range.end.saturating_sub(range.start) };
    Node::list(of.get(..RANGES).unwrap_or(of), range)
}

fn repaired(layer: &RepairedLayer) -> Node {
    let of = layer.repaired.as_ref();
    let found = of.map(|repaired| &repaired.found);
    let bytes = |of: &[Range<u64>]| of.iter().map(|range| range.end - range.start).sum::<u64>();
    node! {
        "name": &layer.name,
        "done": of.map(|repaired| repaired.done),
        "leaked": found.map(|found| found.leaked),
        "wrong": found.map(|found| found.wrong),
        "faultSet": found.map(|found| Node::list(&found.faults, |fault| Node::Text(fault.clone()))),
        "lostBytes": found.map(|found| bytes(&found.lost)),
        "lostSet": found.map(|found| ranges(&found.lost)),
        "sharedBytes": found.map(|found| bytes(&found.shared)),
        "sharedSet": found.map(|found| ranges(&found.shared)),
        "userSet": Node::list(&layer.users, |user| Node::Text(user.clone())),
    }
}

impl Jobs {
    /// Of a daemon on this state: takes away what an earlier one had begun to export.
    pub fn open(state: Option<&Path>) -> Jobs {
        let notes = state.map(|state| state.join("exports"));
        if let Some(Err(error)) = notes.as_deref().map(export::tidy) {
            tracing::warn!(error = format!("{:#}", anyhow::Error::new(error)), "half exported files stay");
        }
        Jobs { jobs: Mutex::default(), notes }
    }

    /// Begins to write a snapshot to a file. Who calls this knows that the caller may.
    ///
    /// # Errors
    /// What the client is told.
    pub fn export(&self, region: &Region, call: &Call) -> Result<Node, Fault> {
        let snapshot = snapshot(region, call)?;
        let to = PathBuf::from(call.params.required("Path")?);
        if !to.is_absolute() || to.file_name().is_none() {
            let why = "It is a whole path on the daemon's machine, such as /export/disk.qcow2.";
            return Err(Fault::value("Path", &to.to_string_lossy(), why));
        }
        let format = match call.params.required("Format")? {
            "raw" => Format::Raw,
            "qcow2" => Format::Qcow2,
            other => return Err(Fault::value("Format", other, "It is raw or qcow2.")),
        };
        let (host, notes) = (region.host().clone(), self.notes.clone());
        self.begin(call, move |progress| {
            let reader = host.read(&snapshot.source)?;
            let made = export::export(&reader, format, &to, notes.as_deref(), progress)?;
            tracing::info!(to = %to.display(), snapshot = snapshot.id, "a snapshot is exported");
            Ok(node! { "bytes": made.bytes, "size": made.size, "sha256": made.sha256 })
        })
    }

    /// Begins to check a snapshot.
    ///
    /// # Errors
    /// What the client is told.
    pub fn check(&self, region: &Region, call: &Call) -> Result<Node, Fault> {
        let snapshot = snapshot(region, call)?;
        let host = region.host().clone();
        self.begin(call, move |progress| {
            let (layers, data) = export::check(&host.read(&snapshot.source)?, progress)?;
            let layer = |layer: &export::Layer| {
                let found = layer.found.as_ref();
                node! {
                    "name": &layer.name,
                    "clusters": found.map(|found| found.data),
                    "leaked": found.map(|found| found.leaked),
                    "wrong": found.map(|found| found.wrong),
                    "faultSet": found.map(|found| Node::list(&found.faults, |fault| Node::Text(fault.clone()))),
                }
            };
            Ok(node! { "bytes": data, "layerSet": Node::list(&layers, layer) })
        })
    }

    /// Begins to repair a volume.
    ///
    /// # Errors
    /// What the client is told.
    pub fn repair(&self, region: &Region, call: &Call) -> Result<Node, Fault> {
        let volume = unused_volume(region, call)?;
        let discard = call.params.boolean("DiscardBroken")?.unwrap_or(false);
        let host = region.host().clone();
        self.begin(call, move |_| {
            let layers = host.repair_volume(&volume.id, discard)?;
            tracing::info!(volume = volume.id, discard, "looked at, to be repaired");
            Ok(node! { "layerSet": Node::list(&layers, repaired) })
        })
    }

    fn begin(
        &self,
        call: &Call,
        work: impl FnOnce(&Progress) -> Result<Node, ExportError> + Send + 'static,
    ) -> Result<Node, Fault> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.iter().filter(|job| job.runs()).count() >= MOST {
            let why = format!("{MOST} exports, checks and repairs are under way; wait for one of them");
            return Err(Fault::new("IncorrectState", why));
        }
        while jobs.len() >= KEPT {
            let Some(over) = jobs.iter().position(|job| !job.runs()) else { break };
            jobs.remove(over);
        }
        let (progress, end) = (Arc::new(Progress::default()), End::default());
        let thread = {
            let (progress, end) = (progress.clone(), end.clone());
            let work = move || {
                let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&progress)));
                let done = match done {
                    Ok(done) => done.map_err(|error| format!("{:#}", anyhow::Error::new(error))),
                    Err(_) => Err("it ended badly; the log says more".into()),
                };
                *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            };
            std::thread::Builder::new().name("job".into()).spawn(work).map_err(Fault::internal)?
        };
        let id = format!("job-{}", uuid::Uuid::new_v4().simple());
        let account = call.identity.account.clone();
        jobs.push(Job { id: id.clone(), account, progress, end, thread: Some(thread) });
        Ok(node! { "jobId": id })
    }

    /// How far a job is, and what came of it.
    ///
    /// # Errors
    /// What the client is told.
    pub fn describe(&self, call: &Call) -> Result<Node, Fault> {
        let id = call.params.required("JobId")?;
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let job = jobs.iter().find(|job| job.id == id && job.account == call.identity.account);
        let job = job.ok_or_else(|| Fault::not_found("InvalidJobID", "job", id))?;
        let (done, total) = job.progress.figures();
        let end = job.end.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, message, result) = match end.as_ref() {
            None => ("running", None, None),
            Some(Ok(result)) => ("done", None, Some(result.clone())),
            Some(Err(why)) => ("failed", Some(why), None),
        };
        Ok(node! {
            "jobId": id,
            "state": state,
            "doneBytes": done,
            "totalBytes": total,
            "message": message,
            "result": result,
        })
    }

    /// Ends those that run; what there is of a file is removed.
    pub fn end(&self) {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.iter().for_each(|job| job.progress.stop());
        let threads: Vec<_> = jobs.iter_mut().filter_map(|job| job.thread.take()).collect();
        drop(jobs);
        if threads.into_iter().any(|thread| thread.join().is_err()) {
            tracing::warn!("a job ended badly");
        }
    }
}
