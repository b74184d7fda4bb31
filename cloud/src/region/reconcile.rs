//! Brings the host to what is to be, and records what came of it.
//!
//! ```text
//!   store's changes ─┐
//!   host's events   ─┼─► ids to look at ─► workers ─► step(id): read, ask the host, write
//!   start, retries  ─┘
//! ```
//! A step looks at what is, not at what happened: it may be done twice, late, or anew after a crash. No two workers have
//! the same id.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::fault::{Fault, Result};
use crate::host::{End, HostError};
use crate::model::{
    BundleTask, BundleTemplate, Group, Image, ImportTask, Instance, InstanceState, Interface, Reason, Record,
    RestoreTask, Snapshot, StoreTask, Volume, VolumeState,
};
use crate::store::StoreError;

use super::bundles::{self, Fetched};
use super::encryption::NO_KEY;
use super::instances::PATIENCE;
use super::{Region, attachments, neighbours, now, work};

/// Steps at a time.
const WORKERS: usize = 16;
/// When a step is tried again that waits for another's.
const SOON: Duration = Duration::from_millis(50);
/// When a step that failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// How long a terminated instance is remembered.
const REMEMBERED: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);
/// How long a client token is.
const TOKENS: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);
/// What stands in the queue for all security groups together.
const FIREWALL: &str = "firewall";
/// How long changed members of groups wait for more of them. Of the host's own machines it knows at once.
const MEMBERS: Duration = Duration::from_millis(100);
/// Changes read at a time.
const PAGE: usize = 1000;

/// Ids to look at.
#[derive(Default)]
struct Queue {
    waiting: Vec<String>,
    known: HashSet<String>,
    busy: HashSet<String>,
    /// Asked for again while they were looked at.
    again: HashSet<String>,
    later: BTreeMap<Instant, Vec<String>>,
    /// When each of those is due: each is looked at once then, whatever asked for it.
    due: HashMap<String, Instant>,
}

impl Queue {
    fn push(&mut self, key: String) {
        if self.busy.contains(&key) {
            self.again.insert(key);
        } else if self.known.insert(key.clone()) {
            self.waiting.push(key);
        }
    }

    /// To be looked at in a while, or before where that is asked for already.
    fn push_later(&mut self, key: &str, wait: Duration) {
        let at = Instant::now() + wait;
        match self.due.get(key) {
            Some(due) if *due <= at => return,
            Some(due) => self.later.entry(*due).or_default().retain(|waiting| waiting != key),
            None => {}
        }
        self.due.insert(key.to_owned(), at);
        self.later.entry(at).or_default().push(key.to_owned());
    }
}

struct Shared {
    region: Arc<Region>,
    queue: Mutex<Queue>,
    more: Condvar,
    stop: AtomicBool,
}

/// The threads that reconcile a region; they end when this is dropped, each after its step.
pub struct Reconciler {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Reconciler {
    /// Starts them, with everything there is to look at.
    ///
    /// # Errors
    /// The store's; threads cannot be started.
    pub fn start(region: Arc<Region>) -> Result<Reconciler> {
        let shared = Arc::new(Shared {
            region,
            queue: Mutex::default(),
            more: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        shared.region.imports.end(false);
        let seen = shared.region.store.revision()?;
        shared.push_all()?;
        let mut reconciler = Reconciler { shared, threads: Vec::new() };
        for _ in 0..WORKERS {
            reconciler.spawn("worker", |shared| shared.work())?;
        }
        reconciler.spawn("changes", move |shared| shared.follow(seen))?;
        reconciler.spawn("host", |shared| shared.listen())?;
        Ok(reconciler)
    }

    fn spawn(&mut self, name: &str, job: impl FnOnce(&Shared) + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new().name(format!("reconcile-{name}"));
        self.threads.push(thread.spawn(move || job(&shared)).map_err(Fault::internal)?);
        Ok(())
    }

    /// Waits until there is nothing to look at within the next seconds, for `limit` at most; whether there is not.
    pub fn quiet(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let seen = self.shared.region.store.revision().unwrap_or(0);
            // What was written a moment ago is on its way to the queue.
            std::thread::sleep(Duration::from_millis(20));
            let queue = self.shared.lock();
            let soon = Instant::now() + RETRY;
            let idle = queue.waiting.is_empty()
                && queue.busy.is_empty()
                && queue.later.keys().next().is_none_or(|due| *due > soon);
            drop(queue);
            if idle && self.shared.region.store.revision().unwrap_or(0) == seen {
                return true;
            }
            if Instant::now() > until {
                return false;
            }
        }
    }
}

impl Drop for Reconciler {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.region.imports.end(true);
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn push(&self, key: String) {
        self.lock().push(key);
        self.more.notify_one();
    }

    /// To be looked at in a while, together with what comes until then.
    fn push_later(&self, key: &str, wait: Duration) {
        self.lock().push_later(key, wait);
    }

    /// Everything there is.
    fn push_all(&self) -> Result<()> {
        self.region.members(&self.region.all::<Interface>()?);
        self.push(FIREWALL.to_owned());
        for instance in self.region.all::<Instance>()? {
            self.push(work::key::<Instance>(&instance.id));
        }
        for volume in self.region.all::<Volume>()? {
            self.push(work::key::<Volume>(&volume.id));
        }
        for snapshot in self.region.all::<Snapshot>()? {
            self.push(work::key::<Snapshot>(&snapshot.id));
        }
        for image in self.region.all::<Image>()? {
            self.push(work::key::<Image>(&image.id));
        }
        for task in self.region.all::<ImportTask>()? {
            self.push(work::key::<ImportTask>(&task.id));
        }
        for task in self.region.all::<StoreTask>()? {
            self.push(work::key::<StoreTask>(&task.id));
        }
        for task in self.region.all::<BundleTask>()? {
            self.push(work::key::<BundleTask>(&task.id));
        }
        for template in self.region.all::<BundleTemplate>()? {
            self.push(work::key::<BundleTemplate>(&template.id));
        }
        for task in self.region.all::<RestoreTask>()? {
            self.push(work::key::<RestoreTask>(&task.id));
        }
        Ok(())
    }

    /// Follows the store.
    fn follow(&self, mut seen: u64) {
        while !self.stopping() {
            let revision = match self.region.store.wait(seen, Duration::from_millis(500)) {
                Ok(revision) => revision,
                Err(error) => {
                    tracing::error!(%error, "the store cannot be followed");
                    std::thread::sleep(RETRY);
                    continue;
                }
            };
            if revision == seen {
                continue;
            }
            match self.region.store.changes("", seen, PAGE) {
                Ok(changes) => {
                    if let Err(error) = self.changed(changes.iter().map(|change| change.key.as_str())) {
                        // What it means for others is not known: everything is looked at.
                        tracing::error!(%error, "the store cannot be read");
                        let _ = self.push_all();
                    }
                    seen = match changes.last() {
                        Some(last) if changes.len() >= PAGE => last.revision,
                        _ => revision,
                    };
                }
                Err(StoreError::Compacted { .. }) => {
                    // Too much has happened: everything is looked at.
                    let _ = self.push_all();
                    seen = revision;
                }
                Err(error) => {
                    tracing::error!(%error, "the store cannot be read");
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    /// Looks at these records, and at the instances for which they mean another firewall.
    fn changed<'a>(&self, keys: impl Iterator<Item = &'a str>) -> Result<()> {
        let concerns = |interface: Interface| {
            if let Some(attachment) = interface.attachment {
                self.push(work::key::<Instance>(&attachment.instance));
            }
        };
        let mut members = false;
        for key in keys {
            match key.split_once('/') {
                Some((
                    Instance::KIND
                    | Volume::KIND
                    | Snapshot::KIND
                    | Image::KIND
                    | ImportTask::KIND
                    | StoreTask::KIND
                    | RestoreTask::KIND
                    | BundleTask::KIND
                    | BundleTemplate::KIND,
                    _,
                )) => self.push(key.to_owned()),
                // Once for the host, however many machines it means.
                Some((Group::KIND, _)) => self.push(FIREWALL.to_owned()),
                Some((Interface::KIND, id)) => {
                    let interface = self.region.get::<Interface>(id)?;
                    members |= self.region.member(id, interface.as_ref());
                    interface.into_iter().for_each(concerns);
                }
                Some((kind, id)) => {
                    if let Some(whose) = neighbours::routes(&self.region, kind, id)? {
                        let all = self.region.all::<Instance>()?.into_iter();
                        let concerned =
                            all.filter(|i| whose.as_ref().is_none_or(|whose| *whose == i.account));
                        concerned.for_each(|instance| self.push(work::key::<Instance>(&instance.id)));
                    }
                }
                None => {}
            }
        }
        if members {
            self.push_later(FIREWALL, MEMBERS);
        }
        Ok(())
    }

    /// Follows the host: what ended is looked at.
    fn listen(&self) {
        let mut seen = 0;
        let mut ended = HashMap::new();
        while !self.stopping() {
            let events = self.region.host.wait(seen, Duration::from_millis(500));
            if events == seen {
                continue;
            }
            seen = events;
            match self.region.host.machines() {
                Ok(machines) => {
                    let over = machines.into_iter().filter(|status| status.end.is_some());
                    let over: HashMap<String, u64> = over.map(|status| (status.id, status.run)).collect();
                    for (id, run) in &over {
                        if ended.get(id) != Some(run) {
                            self.push(work::key::<Instance>(id));
                        }
                    }
                    ended = over;
                }
                Err(error) => tracing::error!(%error, "the host cannot tell its machines"),
            }
        }
    }

    /// A worker.
    fn work(&self) {
        while let Some(key) = self.next() {
            let result = self.region.step(&key);
            let mut queue = self.lock();
            queue.busy.remove(&key);
            match result {
                Ok(None) => {}
                Ok(Some(wait)) => queue.push_later(&key, wait),
                Err(error) => {
                    tracing::warn!(%key, %error, "to be tried again");
                    queue.push_later(&key, RETRY);
                }
            }
            if queue.again.remove(&key) {
                queue.push(key);
            }
            self.more.notify_one();
        }
    }

    fn next(&self) -> Option<String> {
        let mut queue = self.lock();
        loop {
            if self.stopping() {
                return None;
            }
            let now = Instant::now();
            while let Some(entry) = queue.later.first_entry().filter(|entry| *entry.key() <= now) {
                for key in entry.remove() {
                    queue.due.remove(&key);
                    queue.push(key);
                }
            }
            if let Some(key) = queue.waiting.pop() {
                queue.known.remove(&key);
                queue.busy.insert(key.clone());
                return Some(key);
            }
            let due = queue.later.keys().next().map(|due| due.saturating_duration_since(now));
            let wait =
                due.unwrap_or(Duration::from_secs(1)).clamp(Duration::from_millis(1), Duration::from_secs(1));
            queue = self.more.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Region {
    /// Looks at one record. Returns when it is to be looked at again without a change.
    fn step(&self, key: &str) -> Result<Option<Duration>> {
        match key.split_once('/') {
            Some((Instance::KIND, id)) => self.step_instance(id),
            Some((Volume::KIND, id)) => self.step_volume(id),
            Some((Snapshot::KIND, id)) => self.step_snapshot(id),
            Some((Image::KIND, id)) => self.step_image(id),
            Some((ImportTask::KIND, id)) => self.step_import(id),
            Some((StoreTask::KIND, id)) => self.step_store(id),
            Some((RestoreTask::KIND, id)) => self.step_restore(id),
            Some((BundleTask::KIND, id)) => self.step_bundle(id),
            Some((BundleTemplate::KIND, id)) => self.step_template(id),
            _ if key == FIREWALL => self.tell_firewall().map(|()| None),
            _ => Ok(None),
        }
    }

    fn step_instance(&self, id: &str) -> Result<Option<Duration>> {
        let Some(instance) = self.get::<Instance>(id)? else { return Ok(None) };
        match instance.state {
            InstanceState::Pending => self.bring_up(&instance),
            InstanceState::Running => self.watch(&instance),
            InstanceState::Stopping => {
                self.take_down(&instance)?;
                self.settle(id, instance.state, |work, instance| {
                    instance.state = InstanceState::Stopped;
                    attachments::settle_volumes(work, instance)?;
                    self.take_back_all(work, instance)
                })?;
                Ok(None)
            }
            InstanceState::ShuttingDown => {
                self.take_down(&instance)?;
                self.host.forget(id).map_err(Fault::internal)?;
                if instance.bundle.is_some() {
                    self.host.delete_volume(&bundles::root_of(id)).map_err(Fault::internal)?;
                }
                self.settle(id, instance.state, |work, instance| self.bury(work, instance))?;
                Ok(None)
            }
            InstanceState::Stopped => Ok(None),
            InstanceState::Terminated => {
                let at = instance.terminated.unwrap_or(instance.launched);
                let left = REMEMBERED - now().duration_since(at);
                if left.is_positive() {
                    return Ok(Some(Duration::try_from(left).unwrap_or(RETRY)));
                }
                self.transact(|work| {
                    work.delete::<Instance>(id);
                    Ok(())
                })?;
                Ok(None)
            }
        }
    }

    /// From pending to running, or to where an instance goes that cannot run.
    fn bring_up(&self, instance: &Instance) -> Result<Option<Duration>> {
        for device in &instance.devices {
            let Some(volume) = self.get::<Volume>(&device.volume)? else { continue };
            match volume.state {
                VolumeState::Creating => {
                    // Its own step is under way, and tells when it is done by changing it: we come again then or soon.
                    return Ok(Some(Duration::from_millis(20)));
                }
                VolumeState::Error => {
                    let why = format!("the volume {} could not be made", volume.id);
                    match &volume.failed {
                        Some(failed) => {
                            self.fail(instance, &failed.code, &format!("{why}: {}", failed.message))?
                        }
                        None => self.fail(instance, "Server.InternalError", &why)?,
                    }
                    return Ok(None);
                }
                _ => {}
            }
        }
        if let Some(bundle) = &instance.bundle {
            match self.ready_root(instance, bundle)? {
                Fetched::Ready => {}
                Fetched::Wait(wait) => return Ok(Some(wait)),
                Fetched::Failed(code, why) => return self.fail(instance, code, &why).map(|()| None),
            }
        }
        let machine = self.machine(instance)?;
        match self.host.start(&machine) {
            Ok(()) => {
                self.settle(&instance.id, InstanceState::Pending, |_, instance| {
                    instance.state = InstanceState::Running;
                    Ok(())
                })?;
            }
            Err(HostError::NoRoom(why)) => {
                self.fail(instance, "Server.InsufficientInstanceCapacity", &why)?
            }
            Err(HostError::Missing(what)) => {
                self.fail(instance, "Server.InternalError", &format!("the host has no {what}"))?;
            }
            Err(HostError::Key(why)) => self.fail(instance, NO_KEY, &why)?,
            Err(HostError::Busy(why) | HostError::Failed(why)) => {
                self.fail(instance, "Server.InternalError", &why)?
            }
        }
        Ok(None)
    }

    /// An instance that was launched goes; one that was started stays stopped.
    fn fail(&self, instance: &Instance, code: &str, why: &str) -> Result<()> {
        tracing::warn!(instance = instance.id, why, "it does not run");
        self.settle(&instance.id, InstanceState::Pending, |work, instance| {
            instance.state =
                if instance.run <= 1 { InstanceState::ShuttingDown } else { InstanceState::Stopped };
            instance.reason = Some(Reason { code: code.into(), message: format!("{code}: {why}") });
            instance.transition = code.into();
            self.take_back_all(work, instance)
        })
    }

    /// A running instance: has it ended, is it to reboot?
    fn watch(&self, instance: &Instance) -> Result<Option<Duration>> {
        let end = match self.host.machine(&instance.id).map_err(Fault::internal)? {
            Some(status) if status.run == instance.run => status.end,
            _ => Some(End::Failed("the host has lost it".into())),
        };
        let Some(end) = end else {
            if instance.reboots.0 > instance.reboots.1 {
                // What ended meanwhile is seen with the next event.
                if let Err(error) = self.host.reboot(&instance.id) {
                    tracing::warn!(instance = instance.id, %error, "not rebooted");
                }
                let done = instance.reboots.0;
                self.settle(&instance.id, InstanceState::Running, |_, instance| {
                    instance.reboots.1 = instance.reboots.1.max(done);
                    Ok(())
                })?;
            }
            match self.host.update(&self.machine(instance)?) {
                // What ended meanwhile is seen with the next event.
                Ok(()) | Err(HostError::Missing(_)) => {}
                // Its step is under way.
                Err(HostError::Busy(_)) => {
                    let wait = self.follow_volumes(instance)?;
                    return Ok(Some(wait.map_or(SOON, |wait| wait.min(SOON))));
                }
                Err(error) => return Err(Fault::internal(error)),
            }
            return self.follow_volumes(instance);
        };
        // What is on instance store does not outlive its run.
        if end == End::HostDown && self.settings.resume && instance.bundle.is_none() {
            tracing::info!(instance = instance.id, "it ran when the host went down: it is started again");
            self.settle(&instance.id, InstanceState::Running, |work, instance| {
                instance.state = InstanceState::Pending;
                instance.run += 1;
                attachments::settle_volumes(work, instance)
            })?;
            return Ok(None);
        }
        let (code, why) = match end {
            End::HostDown => ("Server.InternalError", "the host went down".into()),
            End::PowerOff => ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown".into()),
            End::Stopped => ("Server.InternalError", "it was ended on the host".into()),
            End::Failed(why) => ("Server.InternalError", why),
        };
        self.settle(&instance.id, InstanceState::Running, |_, instance| {
            let ends =
                code.starts_with("Client") && instance.shutdown_terminates || instance.bundle.is_some();
            instance.state = if ends { InstanceState::ShuttingDown } else { InstanceState::Stopping };
            instance.reason = Some(Reason { code: code.into(), message: format!("{code}: {why}") });
            instance.transition = code.into();
            Ok(())
        })?;
        Ok(None)
    }

    fn take_down(&self, instance: &Instance) -> Result<()> {
        let ends = instance.state == InstanceState::ShuttingDown;
        let patience = match instance.force {
            true => Duration::ZERO,
            false if ends => PATIENCE / 3,
            false => PATIENCE,
        };
        self.host.stop(&instance.id, patience).map_err(Fault::internal)
    }

    /// An image that is being made is there when its snapshots are.
    fn step_image(&self, id: &str) -> Result<Option<Duration>> {
        let Some(image) = self.get::<Image>(id)? else { return Ok(None) };
        // One that is made of an object is done when that is.
        if !image.pending || self.get::<RestoreTask>(id)?.is_some() {
            return Ok(None);
        }
        let mut failed = None;
        for device in &image.devices {
            let Some(snapshot) = &device.snapshot else { continue };
            match self.get::<Snapshot>(snapshot)? {
                Some(snapshot) if snapshot.complete => {}
                Some(snapshot) if snapshot.failed.is_none() => return Ok(Some(Duration::from_millis(50))),
                other => failed = other.and_then(|s| s.failed).or(Some("a snapshot of it is gone".into())),
            }
        }
        self.transact(|work| {
            let Some(mut image) = work.get::<Image>(id)? else { return Ok(()) };
            image.pending = false;
            image.failed =
                failed.clone().map(|message| Reason { code: "Server.InternalError".into(), message });
            work.put(&image)
        })?;
        Ok(None)
    }

    /// Forgets client tokens that nobody will use again.
    ///
    /// # Errors
    /// The store's.
    pub fn forget_tokens(&self) -> Result<()> {
        for token in self.all::<crate::model::Token>()? {
            if now().duration_since(token.at) > TOKENS {
                self.transact(|work| {
                    work.delete::<crate::model::Token>(&token.id);
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}
