//! This machine as a host.
//!
//! ```text
//!   volumes   what machines write to and what is kept of it: layers of qcow2 on templates, which our records name
//!   process   a machine's process: recorded, found again by the next daemon, watched, ended
//!   machine   a machine's directory and record; how a run of it is started, and adopted
//!   boot      what a machine boots: kernels and RAM disks that were named, or what is on its root volume
//!   disks     volumes that come and go while it runs
//!   stores    disks that one run has for itself
//!   together  what it has together with the other regions of this machine
//!   watch     who stays with a machine that runs, and what its end means
//!   backup    what there is at one moment, and how it is copied; volumes held still
//! ```
//! Machines outlive the daemon that started them. A thread watches each: it sees the end at once, and starts the next
//! process where the guest only reboots.

mod backup;
mod boot;
mod disks;
mod machine;
mod process;
mod stores;
mod together;
mod volumes;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hutch_imagestore::store::{Format, Store};
use hutch_vmm::config::Rate;

use crate::backup::Captured;
use crate::keyring::Keyring;

use super::{
    BootFile, Content, Figures, Group, Host, HostError, Machine, Network, Reader, RepairedLayer, Result,
    Source, Status, Template, Usage,
};
use machine::{ANSWER, Dir, FLUSH, Kept, Live, Phase};
use volumes::{Running, Volumes, failed};

pub use machine::{Means, MetadataService, Served};
pub use together::Together;
pub use volumes::Reading;

/// How long a guest that was asked to reboot may take to end by itself; EC2 says a few minutes.
const REBOOT: Duration = Duration::from_secs(120);
/// How often a machine is asked whether its guest waits for room.
const LOOK: Duration = Duration::from_secs(5);
/// How often a watching thread looks whether it is to leave.
const TICK: Duration = Duration::from_millis(500);
/// What is kept of a console for its readers.
const CONSOLE: u64 = 64 << 10;

/// This machine.
pub struct Local {
    shared: Arc<Shared>,
    _watch: Option<hutch_netfw::Watch>,
}

struct Shared {
    machines: PathBuf,
    volumes: Volumes,
    means: Means,
    slots: Mutex<BTreeMap<String, Arc<Slot>>>,
    watchers: Mutex<Vec<JoinHandle<()>>>,
    closing: AtomicBool,
    events: Mutex<u64>,
    changed: Condvar,
}

/// A machine's place.
struct Slot {
    dir: Dir,
    /// Held by who starts or changes the machine, however long that takes; taken before the state.
    work: Mutex<()>,
    /// Held for moments only: all machines are listed by it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    kept: Option<Kept>,
    live: Option<Live>,
    /// It is being ended: a reboot is an end too.
    stopping: bool,
    /// When a reboot that was asked for is done by force.
    reboot_by: Option<Instant>,
    /// Volumes whose guest's writes wait for room on the host.
    stalled: BTreeSet<String>,
    /// When it was last asked for those.
    looked: Option<Instant>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    fn new(dir: PathBuf) -> Slot {
        let state = State::default();
        Slot { dir: Dir(dir), work: Mutex::default(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// What runs, and its record.
    fn running(&mut self) -> Option<(&mut Kept, &mut Live)> {
        Some((self.kept.as_mut().filter(|kept| kept.runs())?, self.live.as_mut()?))
    }
}

impl Local {
    /// Opens the host whose volumes, snapshots and machines are in `dir`, and adopts the machines that run. Those that
    /// ended meanwhile are known as ended; those whose guest was rebooting start anew.
    ///
    /// # Errors
    /// The directories cannot be made or read.
    pub fn open(dir: &Path, templates: Store, keyring: Keyring, means: Means) -> Result<Local> {
        backup::unpin(dir)?;
        let machines = dir.join("machines");
        fs::create_dir_all(&machines).map_err(|e| failed(&machines, e))?;
        let shared = Arc::new(Shared {
            machines,
            volumes: Volumes::open(dir, templates, keyring)?,
            means,
            slots: Mutex::default(),
            watchers: Mutex::default(),
            closing: AtomicBool::new(false),
            events: Mutex::new(1),
            changed: Condvar::new(),
        });
        for entry in fs::read_dir(&shared.machines).map_err(|e| failed(&shared.machines, e))? {
            let path = entry.map_err(|e| failed(&shared.machines, e))?.path();
            let Some(id) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let slot = Slot::new(path.clone());
            match slot.dir.read()? {
                Some(kept) => shared.clone().find(id, slot, kept)?,
                // It was being removed.
                None => slot.dir.remove()?,
            }
        }
        shared.means.together.join(&shared);
        let watch = hutch_netfw::Watch::start(&shared.means.networks).inspect_err(|error| {
            tracing::warn!(%error, "nobody mends the firewall when another program changes it");
        });
        let tidy = shared.clone();
        let tidy = std::thread::Builder::new().name("layers".into()).spawn(move || tidy.keep_tidy());
        let tidy = tidy.map_err(|e| HostError::Failed(format!("no thread for the layers: {e}")))?;
        lock(&shared.watchers).push(tidy);
        Ok(Local { shared, _watch: watch.ok() })
    }

    /// A machine's place, if it has any.
    fn slot(&self, id: &str) -> Option<Arc<Slot>> {
        lock(&self.shared.slots).get(id).cloned()
    }

    /// The places of all machines.
    fn slots(&self) -> Vec<Arc<Slot>> {
        lock(&self.shared.slots).values().cloned().collect()
    }

    /// Whether no machine that is to run has a volume; else why not.
    fn unused(&self, id: &str) -> std::result::Result<(), String> {
        for slot in self.slots() {
            let state = slot.state();
            if let Some(kept) = state.kept.as_ref().filter(|kept| kept.runs())
                && kept.machine.volumes.iter().any(|volume| volume == id)
            {
                return Err(format!("{} uses the volume {id}", kept.machine.id));
            }
        }
        Ok(())
    }

    /// The machine that runs and has a volume.
    fn user(&self, id: &str) -> Option<Arc<Slot>> {
        let has = |kept: &Kept| kept.machine.volumes.iter().any(|volume| volume == id);
        let uses = |slot: &Arc<Slot>| slot.state().running().is_some_and(|(kept, _)| has(kept));
        self.slots().into_iter().find(uses)
    }
}

impl Drop for Local {
    /// Leaves the machines to who comes next.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.volumes.close();
        for watcher in std::mem::take(&mut *lock(&self.shared.watchers)) {
            let _ = watcher.join();
        }
        for slot in self.slots() {
            if let Some(live) = slot.state().live.take() {
                live.nets.into_iter().for_each(machine::Net::leave);
            }
        }
    }
}

/// A machine that is held, all its guest wrote in its disks' files; dropping this lets it go on.
struct Held<'a>(&'a Dir);

impl Held<'_> {
    fn new(dir: &Dir) -> std::result::Result<Held<'_>, hutch_vmm::launch::LaunchError> {
        // From here on it is told to go on, also where it did not answer in time that it is held.
        let held = Held(dir);
        dir.ask("pause", FLUSH).map(|_| held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.ask("resume", ANSWER) {
            tracing::warn!(machine = %self.0.0.display(), %error, "it was held and cannot be told to go on");
        }
    }
}

impl Host for Local {
    fn templates(&self) -> Result<Vec<Template>> {
        self.shared.volumes.templates()
    }

    fn boot_files(&self) -> Result<Vec<BootFile>> {
        self.shared.volumes.images().map(super::boot_files)
    }

    fn keys(&self) -> Vec<String> {
        self.shared.volumes.wrapping_keys()
    }

    fn create_volume(&self, id: &str, bytes: u64, source: &Source, key: Option<&str>) -> Result<()> {
        self.shared.volumes.create(id, bytes, source, key)
    }

    fn delete_volume(&self, id: &str) -> Result<()> {
        // A snapshot that is being taken of it comes first.
        let _held = self.shared.volumes.hold([id]);
        self.unused(id).map_err(HostError::Failed)?;
        self.shared.volumes.delete(id)
    }

    fn repair_volume(&self, id: &str, discard: bool) -> Result<Vec<RepairedLayer>> {
        let _held = self.shared.volumes.hold([id]);
        self.unused(id).map_err(HostError::Busy)?;
        self.shared.volumes.repair(id, discard)
    }

    fn modify_volume(&self, id: &str, bytes: u64, rate: &Rate) -> Result<()> {
        let volumes = &self.shared.volumes;
        let _held = volumes.hold([id]);
        let user = self.user(id);
        let running = user.as_ref().filter(|slot| disks::has(&slot.dir, id).unwrap_or(false));
        volumes.end_cut(id, running.map(|slot| &slot.dir as &dyn Running))?;
        let ask =
            user.as_ref().map(|slot| move |size: u64, rate: &Rate| slot.dir.change_disk(id, size, rate));
        let asked = volumes.modify(id, bytes, rate, ask.as_ref().map(|ask| ask as _));
        let gone =
            |slot: Arc<Slot>| slot.state().running().is_none() || !disks::has(&slot.dir, id).unwrap_or(false);
        match asked {
            // One that has ended meanwhile, or let it go, leaves the volume to us, and we are called again.
            Err(HostError::NoRoom(why)) if user.is_some_and(gone) => Err(HostError::Failed(why)),
            asked => asked,
        }
    }

    fn create_snapshots(&self, snapshots: &[(&str, &str)]) -> Result<()> {
        let volumes: Vec<_> = snapshots.iter().map(|(_, volume)| (*volume).to_owned()).collect();
        let shared = &self.shared;
        shared.at_an_instant(&volumes, &|users| shared.volumes.create_snapshots(snapshots, users))
    }

    fn content(&self, source: &Source) -> Result<Content> {
        self.shared.volumes.content(source)
    }

    fn copy_snapshot(&self, id: &str, content: &Content, key: Option<&str>) -> Result<()> {
        self.shared.volumes.copy_snapshot(id, content, key)
    }

    fn read(&self, source: &Source) -> Result<Reader> {
        self.shared.volumes.read(source)
    }

    fn import_snapshot(
        &self,
        id: &str,
        file: &fs::File,
        format: Option<Format>,
        key: Option<&str>,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64> {
        let importer = &self.shared.means.importer;
        self.shared.volumes.import_snapshot(id, key, |to| super::convert(importer, file, to, format, go_on))
    }

    fn write_snapshot(&self, id: &str, fill: &mut dyn FnMut(&fs::File) -> Result<u64>) -> Result<u64> {
        self.shared.volumes.import_snapshot(id, None, |to| fill(to.disk))
    }

    fn delete_snapshot(&self, id: &str) -> Result<()> {
        self.shared.volumes.delete_snapshot(id)
    }

    fn one_machine(&self) -> bool {
        true
    }

    fn room(&self, network: &Network) -> Result<()> {
        hutch_netfw::room(&self.shared.means.networks, network).map_err(|e| machine::net_failed(&e))
    }

    fn firewall(&self, groups: &[Group]) -> Result<()> {
        let Means { networks, region, .. } = &self.shared.means;
        hutch_netfw::set_groups(networks, region, groups).map_err(|e| machine::net_failed(&e))
    }

    fn start(&self, machine: &Machine) -> Result<()> {
        let shared = &self.shared;
        let slot = self.slot(&machine.id);
        if let Some(slot) = &slot {
            let state = slot.state();
            let run = state.kept.as_ref().filter(|kept| kept.phase != Phase::Starting);
            if run.is_some_and(|kept| kept.machine.run >= machine.run) {
                return Ok(());
            }
            if run.is_some_and(Kept::runs) {
                return Err(HostError::Failed(format!("{} runs already; stop it first", machine.id)));
            }
        }
        machine.volumes.iter().try_for_each(|id| shared.volumes.files(id).map(drop))?;
        let _room = shared.means.together.room(machine)?;
        let slot = match slot {
            Some(slot) => slot,
            None => {
                let dir = shared.machines.join(&machine.id);
                fs::create_dir_all(&dir).map_err(|e| failed(&dir, e))?;
                lock(&shared.slots)
                    .entry(machine.id.clone())
                    .or_insert_with(|| Arc::new(Slot::new(dir)))
                    .clone()
            }
        };
        let work = lock(&slot.work);
        // Until it is known to run, so that who takes a snapshot finds out whom to hold.
        let _held = shared.volumes.hold(machine.volumes.iter().map(String::as_str));
        let mut kept = Kept::new(machine.clone());
        match machine::launch(&mut kept, &slot.dir, &shared.volumes, &shared.means) {
            Ok(live) => {
                *slot.state() = State { kept: Some(kept), live: Some(live), ..State::default() };
                drop(work);
                shared.clone().watch(slot)
            }
            Err(error) => {
                // As it was before: what an earlier run left, or nothing.
                let before = slot.state().kept.clone();
                match before.filter(|kept| kept.phase != Phase::Starting) {
                    Some(before) => {
                        slot.dir.write(&before)?;
                        stores::clear(&slot.dir.0)?;
                    }
                    None => {
                        lock(&shared.slots).remove(&machine.id);
                        slot.dir.remove()?;
                    }
                }
                Err(error)
            }
        }
    }

    fn update(&self, machine: &Machine) -> Result<()> {
        let missing = || HostError::Missing(format!("machine {}", machine.id));
        let slot = self.slot(&machine.id).ok_or_else(missing)?;
        let _work = lock(&slot.work);
        let slower = {
            let mut state = slot.state();
            let (kept, _) = state.running().ok_or_else(missing)?;
            kept.machine.speed != machine.speed
        };
        if slower {
            // It takes the time that its process takes to answer; nobody else changes the machine meanwhile.
            slot.dir.change_speed(machine)?;
        }
        let mut state = slot.state();
        let (kept, live) = state.running().ok_or_else(missing)?;
        // Interfaces are those it was started with; volumes come and go on their own.
        let mut new = kept.machine.clone();
        new.metadata.clone_from(&machine.metadata);
        new.speed.clone_from(&machine.speed);
        for (own, told) in new.interfaces.iter_mut().zip(&machine.interfaces) {
            own.groups.clone_from(&told.groups);
            (own.subnet, own.network) = (told.subnet, told.network.clone());
            (own.public, own.more) = (told.public, told.more.clone());
        }
        // One that could not be served when its machine was adopted is served now, or nothing of it is taken for told.
        if live.nets.len() < kept.machine.interfaces.len() {
            let all = kept.machine.interfaces.iter();
            let missing = all.filter(|own| !live.nets.iter().any(|net| net.is_of(own)));
            let found = missing.map(|own| machine::Net::adopt(own, &kept.machine, &self.shared.means));
            let found = found.collect::<Result<Vec<_>>>()?;
            live.nets.extend(found);
            let place = |net: &machine::Net| kept.machine.interfaces.iter().position(|own| net.is_of(own));
            live.nets.sort_by_key(place);
        }
        let led = live.nets.iter().zip(&new.interfaces).all(|(net, interface)| net.is_led(interface));
        if led && new == kept.machine {
            return Ok(());
        }
        for (net, interface) in live.nets.iter_mut().zip(&new.interfaces) {
            net.update(interface, &new)?;
        }
        kept.machine = new;
        slot.dir.write(kept)
    }

    fn attach(&self, id: &str, volume: &str) -> Result<()> {
        self.plug(id, volume)
    }

    fn detach(&self, id: &str, volume: &str, force: bool) -> Result<bool> {
        self.unplug(id, volume, force)
    }

    fn stop(&self, id: &str, patience: Duration) -> Result<()> {
        let Some(slot) = self.slot(id) else { return Ok(()) };
        let process = {
            let _work = lock(&slot.work);
            let mut state = slot.state();
            state.stopping = true;
            state.running().map(|(kept, live)| (kept.machine.volumes.clone(), live.process.clone()))
        };
        if let Some((volumes, process)) = process {
            // Not while its disks are copied: who holds it lets it go on then.
            drop(self.shared.volumes.hold(volumes.iter().map(String::as_str)));
            let failed = |e: std::io::Error| HostError::Failed(format!("{id} cannot be ended: {e}"));
            // Held by one that was killed, it would not hear of its button.
            let pressed = !patience.is_zero()
                && dir_asked(&slot.dir, "resume", patience)
                && dir_asked(&slot.dir, "power-button", patience);
            if !(pressed && process.wait(patience).map_err(failed)?) {
                process.end(ANSWER).map_err(failed)?;
            }
        }
        self.shared.settle(&slot);
        Ok(())
    }

    fn reboot(&self, id: &str) -> Result<()> {
        let missing = || HostError::Missing(format!("machine {id}"));
        let slot = self.slot(id).ok_or_else(missing)?;
        let _work = lock(&slot.work);
        {
            let mut state = slot.state();
            let (kept, _) = state.running().ok_or_else(missing)?;
            kept.restart = true;
            slot.dir.write(kept)?;
        }
        // The thread that watches it does the rest: also where the guest does not listen.
        let pressed = dir_asked(&slot.dir, "power-button", ANSWER);
        slot.state().reboot_by = Some(Instant::now() + if pressed { REBOOT } else { Duration::ZERO });
        Ok(())
    }

    fn forget(&self, id: &str) -> Result<()> {
        let Some(slot) = self.slot(id) else { return Ok(()) };
        if slot.state().kept.as_ref().is_some_and(Kept::runs) {
            return Err(HostError::Failed(format!("{id} runs")));
        }
        slot.dir.remove()?;
        lock(&self.shared.slots).remove(id);
        Ok(())
    }

    fn machine(&self, id: &str) -> Result<Option<Status>> {
        let Some(slot) = self.slot(id) else { return Ok(None) };
        let state = slot.state();
        Ok(state.kept.as_ref().filter(|kept| kept.phase != Phase::Starting).map(Kept::status))
    }

    fn machines(&self) -> Result<Vec<Status>> {
        let status = |slot: Arc<Slot>| {
            let state = slot.state();
            state.kept.as_ref().filter(|kept| kept.phase != Phase::Starting).map(Kept::status)
        };
        Ok(self.slots().into_iter().filter_map(status).collect())
    }

    fn public_addresses(&self) -> Result<BTreeMap<Ipv4Addr, String>> {
        let of = |slot: Arc<Slot>| {
            let mut state = slot.state();
            let Some((kept, live)) = state.running() else { return Vec::new() };
            live.nets.iter().filter_map(|net| Some((net.public()?, kept.machine.id.clone()))).collect()
        };
        Ok(self.slots().into_iter().flat_map(of).collect())
    }

    fn console(&self, id: &str) -> Result<Vec<u8>> {
        self.slot(id).map_or(Ok(Vec::new()), |slot| slot.dir.console(CONSOLE))
    }

    fn figures(&self, id: &str) -> Result<Option<Figures>> {
        let Some(slot) = self.slot(id) else { return Ok(None) };
        let process = slot.state().running().map(|(_, live)| live.process.clone());
        let failed = |e: &dyn std::fmt::Display| HostError::Failed(format!("{id} does not tell: {e}"));
        let usage = process.map(|process| process.usage()).transpose().map_err(|e| failed(&e))?.flatten();
        let Some((cpu_us, memory_bytes)) = usage else { return Ok(None) };
        let [disk_read, disk_written, net_received, net_sent] =
            slot.dir.moved(TICK).map_err(|e| failed(&e))?;
        Ok(Some(Figures { cpu_us, memory_bytes, disk_read, disk_written, net_received, net_sent }))
    }

    fn stalled(&self) -> BTreeSet<String> {
        self.slots().into_iter().flat_map(|slot| slot.state().stalled.clone()).collect()
    }

    fn usage(&self) -> Result<Option<Usage>> {
        self.shared.volumes.usage().map(Some)
    }

    fn capture(&self) -> Result<Box<dyn Captured>> {
        backup::capture(self.shared.clone())
    }

    fn wait(&self, seen: u64, limit: Duration) -> u64 {
        let events = lock(&self.shared.events);
        let waited = self.shared.changed.wait_timeout_while(events, limit, |events| *events == seen);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Whether a machine did what it was asked; one that ends at this moment did not.
fn dir_asked(dir: &Dir, command: &str, limit: Duration) -> bool {
    let asked = dir.ask(command, limit.min(ANSWER));
    if let Err(error) = &asked {
        tracing::debug!(machine = %dir.0.display(), command, %error, "it does not do what it was asked");
    }
    asked.is_ok()
}
