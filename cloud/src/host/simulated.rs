//! A host that runs nothing: files, or just memory, say what would run. Needs neither KVM nor root.
//!
//! With a directory it outlives the process that asks it, as real machines do: `machines/ID` holds a run, `volumes/ID` and
//! `snapshots/ID` say what is kept.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hutch_blockdev::open_layers;
use hutch_imagestore::import;
use hutch_imagestore::store::{Format, Store};
use hutch_netfw::VPC;
use hutch_netfw::name::GroupId;
use hutch_vmm::config::Rate;
use ipnet::Ipv4Net;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::backup::{self, Captured, Target};

use super::{
    BootFile, Content, End, Group, Host, HostError, Machine, Network, OWN_ROOT, Reader, RepairedLayer,
    Result, Source, Status, Template,
};

/// What is kept of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    machine: Machine,
    end: Option<End>,
    /// How often it was started: more than its runs would be a mistake.
    starts: u64,
    reboots: u64,
}

impl Kept {
    fn status(&self) -> Status {
        Status { id: self.machine.id.clone(), run: self.machine.run, end: self.end.clone() }
    }
}

/// What is kept of a volume: its bytes, where they came from, what it may do, what wraps its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Disk(u64, Source, #[serde(default)] Rate, #[serde(default)] Option<String>);

/// The key that would wrap others; nothing here has bytes.
const KEY: &str = "5117ed00-0000-4000-8000-000000000001";

/// Everything there is.
#[derive(Default)]
struct State {
    machines: BTreeMap<String, Kept>,
    volumes: BTreeMap<String, Disk>,
    snapshots: BTreeMap<String, u64>,
    groups: Vec<Group>,
    events: u64,
}

/// A machine that several simulated hosts are: the networks that were ever in use there, but for default ones.
#[derive(Default)]
pub struct OneMachine(Mutex<BTreeMap<GroupId, Ipv4Net>>);

/// A simulated host.
pub struct Simulated {
    dir: Option<PathBuf>,
    state: Mutex<State>,
    changed: Condvar,
    delay: Duration,
    /// What other hosts of this kind know, too.
    machine: Option<Arc<OneMachine>>,
    images: Option<Store>,
    importer: Option<PathBuf>,
}

impl Simulated {
    /// A host that is gone with the process.
    pub fn memory(delay: Duration) -> Simulated {
        let (state, changed) = Default::default();
        Simulated { dir: None, state, changed, delay, machine: None, images: None, importer: None }
    }

    /// Has it say of networks what hosts say that are one machine.
    #[must_use]
    pub fn on(self, machine: &Arc<OneMachine>) -> Simulated {
        Simulated { machine: Some(machine.clone()), ..self }
    }

    /// Has it take kernels and RAM disks of a store; without one it has none.
    #[must_use]
    pub fn with_images(self, images: Store) -> Simulated {
        Simulated { images: Some(images), ..self }
    }

    /// Has it read disks that are imported by this program, a `hutch-import-worker`: of them it keeps the size.
    #[must_use]
    pub fn with_importer(self, importer: PathBuf) -> Simulated {
        Simulated { importer: Some(importer), ..self }
    }

    /// A host whose machines, volumes and snapshots are kept in `dir`. Starting and stopping take `delay`.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(dir: PathBuf, delay: Duration) -> std::io::Result<Simulated> {
        let state = State {
            machines: read_all(&dir.join("machines"))?,
            volumes: read_all(&dir.join("volumes"))?,
            snapshots: read_all(&dir.join("snapshots"))?,
            groups: Vec::new(),
            events: 1,
        };
        let (dir, state) = (Some(dir), Mutex::new(state));
        let changed = Condvar::new();
        Ok(Simulated { dir, state, changed, delay, machine: None, images: None, importer: None })
    }

    /// Ends a machine as its guest, or a mishap, would.
    pub fn end(&self, id: &str, end: End) -> Result<()> {
        let mut state = self.lock();
        let missing = || HostError::Missing(format!("machine {id}"));
        let kept = state.machines.get_mut(id).filter(|kept| kept.end.is_none()).ok_or_else(missing)?;
        kept.end = Some(end);
        let kept = kept.clone();
        self.keep("machines", id, Some(&kept))?;
        state.events += 1;
        self.changed.notify_all();
        Ok(())
    }

    /// How often a machine was started, and rebooted.
    pub fn starts(&self, id: &str) -> (u64, u64) {
        self.lock().machines.get(id).map_or((0, 0), |kept| (kept.starts, kept.reboots))
    }

    /// What was told last of a machine.
    pub fn told(&self, id: &str) -> Option<Machine> {
        self.lock().machines.get(id).map(|kept| kept.machine.clone())
    }

    /// What was told last of security groups.
    pub fn groups(&self) -> Vec<Group> {
        self.lock().groups.clone()
    }

    /// The volumes that are kept.
    pub fn volumes(&self) -> Vec<String> {
        self.lock().volumes.keys().cloned().collect()
    }

    /// What wraps a volume's key.
    pub fn volume_key(&self, id: &str) -> Option<String> {
        self.lock().volumes.get(id).and_then(|volume| volume.3.clone())
    }

    /// How large a volume is, in bytes, and what it may do.
    pub fn volume(&self, id: &str) -> Option<(u64, Rate)> {
        self.lock().volumes.get(id).map(|Disk(bytes, _, rate, _)| (*bytes, rate.clone()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is kept under a name, or removes it: whole or not at all.
    fn keep<T: Serialize>(&self, kind: &str, id: &str, value: Option<&T>) -> Result<()> {
        let Some(dir) = &self.dir else { return Ok(()) };
        let failed = |e: std::io::Error| HostError::Failed(format!("the simulated host's {kind}/{id}: {e}"));
        let path = dir.join(kind).join(id);
        let Some(value) = value else {
            return match std::fs::remove_file(path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed(e)),
                _ => Ok(()),
            };
        };
        let text = serde_json::to_vec(value).map_err(|e| failed(e.into()))?;
        let new = path.with_extension("new");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).map_err(failed)
    }
}

fn known(key: Option<&str>) -> Result<()> {
    let missing = |key: &str| HostError::Key(format!("there is no key {key}"));
    key.filter(|key| *key != KEY).map_or(Ok(()), |key| Err(missing(key)))
}

/// Where public addresses lead.
fn public(machines: &BTreeMap<String, Kept>) -> BTreeMap<Ipv4Addr, String> {
    let running = machines.values().filter(|kept| kept.end.is_none()).map(|kept| &kept.machine);
    let public = running.flat_map(|machine| {
        machine.interfaces.iter().filter_map(|interface| Some((interface.public?.ip, machine.id.clone())))
    });
    public.collect()
}

/// Takes out the addresses that lead to others; returns one of them.
fn without_taken(machine: &mut Machine, public: &BTreeMap<Ipv4Addr, String>) -> Option<Ipv4Addr> {
    let mut taken = None;
    for interface in &mut machine.interfaces {
        let others = |p: &super::Public| public.get(&p.ip).is_some_and(|id| *id != machine.id);
        taken = interface.public.take_if(|p| others(p)).map(|p| p.ip).or(taken);
    }
    taken
}

/// All that is kept in a directory, which is made where it is not there.
fn read_all<T: DeserializeOwned>(dir: &std::path::Path) -> std::io::Result<BTreeMap<String, T>> {
    std::fs::create_dir_all(dir)?;
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // Half written when a process was killed: it was never true.
        if name.ends_with(".new") {
            continue;
        }
        all.insert(name.to_owned(), serde_json::from_slice(&std::fs::read(&path)?)?);
    }
    Ok(all)
}

/// All files of a simulated host, by their names.
struct Files(BTreeMap<String, Vec<u8>>);

impl Captured for Files {
    fn bytes(&self) -> u64 {
        self.0.values().map(|text| text.len() as u64).sum()
    }

    fn copy(&self, target: &mut Target<'_>, dir: &str) -> backup::Result<()> {
        self.0.iter().try_for_each(|(name, text)| target.bytes(&format!("{dir}/{name}"), text))
    }
}

impl Host for Simulated {
    fn capture(&self) -> Result<Box<dyn Captured>> {
        let state = self.lock();
        let mut files = BTreeMap::new();
        let mut add = |name: String, text: serde_json::Result<Vec<u8>>| {
            let text = text.map_err(|e| HostError::Failed(format!("the simulated host's {name}: {e}")))?;
            files.insert(name, text);
            Ok(())
        };
        for (id, kept) in &state.machines {
            let end = kept.end.clone().or(Some(End::HostDown));
            add(format!("machines/{id}"), serde_json::to_vec(&Kept { end, ..kept.clone() }))?;
        }
        for (id, volume) in state.volumes.iter().filter(|(id, _)| !id.starts_with(OWN_ROOT)) {
            add(format!("volumes/{id}"), serde_json::to_vec(volume))?;
        }
        for (id, bytes) in &state.snapshots {
            add(format!("snapshots/{id}"), serde_json::to_vec(bytes))?;
        }
        Ok(Box::new(Files(files)))
    }

    fn templates(&self) -> Result<Vec<Template>> {
        let named = [("debian-12", 2u64), ("debian-12-lean", 2), ("debian-13", 2), ("micro", 1)];
        let template = |(name, gib): (&str, u64)| Template {
            name: name.into(),
            digest: format!("{:064x}", name.bytes().fold(7u128, |sum, b| sum * 31 + u128::from(b))),
            size: gib << 30,
        };
        Ok(named.into_iter().map(template).collect())
    }

    fn boot_files(&self) -> Result<Vec<BootFile>> {
        let images = self.images.as_ref().map_or(Ok(Vec::new()), Store::list);
        let images = images.map_err(|e| HostError::Failed(format!("the image store: {e}")))?;
        Ok(super::boot_files(images))
    }

    fn keys(&self) -> Vec<String> {
        vec![KEY.into()]
    }

    fn create_volume(&self, id: &str, bytes: u64, source: &Source, key: Option<&str>) -> Result<()> {
        known(key)?;
        let mut state = self.lock();
        if state.volumes.contains_key(id) {
            return Ok(());
        }
        if let Source::Snapshot(snapshot) = source
            && !state.snapshots.contains_key(snapshot)
        {
            return Err(HostError::Missing(format!("snapshot {snapshot}")));
        }
        let volume = Disk(bytes, source.clone(), Rate::default(), key.map(str::to_owned));
        self.keep("volumes", id, Some(&volume))?;
        state.volumes.insert(id.into(), volume);
        Ok(())
    }

    fn repair_volume(&self, id: &str, _discard: bool) -> Result<Vec<RepairedLayer>> {
        let state = self.lock();
        let uses = |kept: &Kept| kept.end.is_none() && kept.machine.volumes.iter().any(|v| v == id);
        match state.machines.values().find(|kept| uses(kept)) {
            Some(user) => Err(HostError::Busy(format!("{} uses the volume {id}", user.machine.id))),
            // It has no layers.
            None if state.volumes.contains_key(id) => Ok(Vec::new()),
            None => Err(HostError::Missing(format!("volume {id}"))),
        }
    }

    fn delete_volume(&self, id: &str) -> Result<()> {
        let mut state = self.lock();
        let uses = |kept: &Kept| kept.end.is_none() && kept.machine.volumes.iter().any(|v| v == id);
        if let Some(user) = state.machines.values().find(|kept| uses(kept)) {
            return Err(HostError::Failed(format!("{} uses the volume {id}", user.machine.id)));
        }
        self.keep::<()>("volumes", id, None)?;
        state.volumes.remove(id);
        Ok(())
    }

    fn modify_volume(&self, id: &str, bytes: u64, rate: &Rate) -> Result<()> {
        let mut state = self.lock();
        let missing = || HostError::Missing(format!("volume {id}"));
        let Disk(had, source, old, key) = state.volumes.get(id).ok_or_else(missing)?;
        if *had >= bytes && old == rate {
            return Ok(());
        }
        let volume = Disk(bytes.max(*had), source.clone(), rate.clone(), key.clone());
        self.keep("volumes", id, Some(&volume))?;
        state.volumes.insert(id.into(), volume);
        Ok(())
    }

    fn create_snapshots(&self, snapshots: &[(&str, &str)]) -> Result<()> {
        let mut state = self.lock();
        let mut made = Vec::new();
        for (id, volume) in snapshots {
            let missing = || HostError::Missing(format!("volume {volume}"));
            made.push((*id, state.volumes.get(*volume).ok_or_else(missing)?.0));
        }
        for (id, bytes) in made {
            self.keep("snapshots", id, Some(&bytes))?;
            state.snapshots.insert(id.into(), bytes);
        }
        Ok(())
    }

    fn content(&self, source: &Source) -> Result<Content> {
        let bytes = match source {
            Source::Empty => None,
            Source::Template(name) => {
                self.templates()?.into_iter().find(|template| template.name == *name).map(|t| t.size)
            }
            Source::Snapshot(id) => self.lock().snapshots.get(id).copied(),
        };
        bytes.map(Content::Bytes).ok_or_else(|| HostError::Missing(format!("{source:?}")))
    }

    fn copy_snapshot(&self, id: &str, content: &Content, key: Option<&str>) -> Result<()> {
        known(key)?;
        let Content::Bytes(bytes) = content else {
            return Err(HostError::Failed("a simulated host keeps no disks".into()));
        };
        self.keep("snapshots", id, Some(bytes))?;
        self.lock().snapshots.insert(id.into(), *bytes);
        Ok(())
    }

    fn read(&self, source: &Source) -> Result<Reader> {
        let Content::Bytes(bytes) = self.content(source)? else {
            return Err(HostError::Missing(format!("{source:?}")));
        };
        let failed = |e: &dyn std::fmt::Display| HostError::Failed(format!("{source:?}: {e}"));
        let file = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|e| failed(&e))?);
        file.set_len(bytes).map_err(|e| failed(&e))?;
        let disk = open_layers(vec![(file, hutch_blockdev::Format::Raw)], true).map_err(|e| failed(&e))?;
        Ok(Reader { disk, layers: Vec::new(), _reading: None })
    }

    fn import_snapshot(
        &self,
        id: &str,
        file: &File,
        format: Option<Format>,
        key: Option<&str>,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64> {
        known(key)?;
        let missing = || HostError::Missing("program that reads disks".into());
        let importer = self.importer.as_ref().ok_or_else(missing)?;
        self.write_snapshot(id, &mut |disk| {
            let mut to = import::Target { disk, directory: std::path::Path::new("memory"), sink: None };
            super::convert(importer, file, &mut to, format, go_on)
        })
    }

    fn write_snapshot(&self, id: &str, fill: &mut dyn FnMut(&File) -> Result<u64>) -> Result<u64> {
        if let Some(bytes) = self.lock().snapshots.get(id) {
            return Ok(*bytes);
        }
        let failed = |e: std::io::Error| HostError::Failed(format!("cannot make a file for a while: {e}"));
        let disk = rustix::fs::memfd_create("snapshot", rustix::fs::MemfdFlags::CLOEXEC);
        let bytes = fill(&File::from(disk.map_err(|e| failed(e.into()))?))?;
        self.keep("snapshots", id, Some(&bytes))?;
        self.lock().snapshots.insert(id.into(), bytes);
        Ok(bytes)
    }

    fn delete_snapshot(&self, id: &str) -> Result<()> {
        let mut state = self.lock();
        self.keep::<()>("snapshots", id, None)?;
        state.snapshots.remove(id);
        Ok(())
    }

    fn one_machine(&self) -> bool {
        self.machine.is_some()
    }

    fn room(&self, network: &Network) -> Result<()> {
        let Some(machine) = self.machine.as_ref().filter(|_| network.cidr != VPC) else { return Ok(()) };
        let networks = machine.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |cidr: &Ipv4Net| cidr.contains(&network.cidr) || network.cidr.contains(cidr);
        match networks.iter().find(|(id, cidr)| **id != network.id && has(cidr)) {
            Some((id, cidr)) => Err(HostError::NoRoom(format!("{cidr} is {id}'s"))),
            None => Ok(()),
        }
    }

    /// There are no packets.
    fn firewall(&self, groups: &[Group]) -> Result<()> {
        self.lock().groups = groups.to_vec();
        Ok(())
    }

    fn start(&self, machine: &Machine) -> Result<()> {
        std::thread::sleep(self.delay);
        let mut state = self.lock();
        let before = state.machines.get(&machine.id);
        if before.is_some_and(|kept| kept.machine.run >= machine.run) {
            return Ok(());
        }
        if let Some(volume) = machine.volumes.iter().find(|volume| !state.volumes.contains_key(*volume)) {
            return Err(HostError::Missing(format!("volume {volume}")));
        }
        // One that it was started with before it has still.
        let has = |id: &String| {
            before.is_some_and(|kept| {
                [&kept.machine.kernel, &kept.machine.ramdisk].contains(&&Some(id.clone()))
            })
        };
        let wanted: Vec<_> =
            [&machine.kernel, &machine.ramdisk].into_iter().flatten().filter(|id| !has(id)).collect();
        let files = if wanted.is_empty() { Vec::new() } else { self.boot_files()? };
        if let Some(id) = wanted.into_iter().find(|id| !files.iter().any(|file| file.id == **id)) {
            return Err(super::no_boot_file(id));
        }
        for interface in &machine.interfaces {
            self.room(&interface.network)?;
            if let Some(machine) = self.machine.as_ref().filter(|_| interface.network.cidr != VPC) {
                let Network { id, cidr, .. } = interface.network.clone();
                machine.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id, cidr);
            }
        }
        let starts = before.map_or(0, |kept| kept.starts) + 1;
        let mut machine = machine.clone();
        without_taken(&mut machine, &public(&state.machines));
        let kept = Kept { machine: machine.clone(), end: None, starts, reboots: 0 };
        self.keep("machines", &machine.id, Some(&kept))?;
        state.machines.insert(machine.id.clone(), kept);
        Ok(())
    }

    fn update(&self, machine: &Machine) -> Result<()> {
        let mut state = self.lock();
        let mut machine = machine.clone();
        let taken = without_taken(&mut machine, &public(&state.machines));
        let missing = || HostError::Missing(format!("machine {}", machine.id));
        let kept =
            state.machines.get_mut(&machine.id).filter(|kept| kept.end.is_none()).ok_or_else(missing)?;
        let Machine { volumes, kernel, ramdisk, .. } = kept.machine.clone();
        let told = Machine { volumes, kernel, ramdisk, ..machine };
        if kept.machine != told {
            kept.machine = told;
            let kept = kept.clone();
            self.keep("machines", &kept.machine.id, Some(&kept))?;
        }
        taken.map_or(Ok(()), |ip| Err(HostError::Busy(format!("{ip} leads to another machine"))))
    }

    fn attach(&self, id: &str, volume: &str) -> Result<()> {
        let mut state = self.lock();
        if !state.volumes.contains_key(volume) {
            return Err(HostError::Missing(format!("volume {volume}")));
        }
        let uses = |kept: &Kept| kept.end.is_none() && kept.machine.volumes.iter().any(|have| have == volume);
        let missing = || HostError::Missing(format!("machine {id}"));
        let user = state.machines.values().find(|kept| uses(kept)).map(|kept| kept.machine.id.clone());
        let kept = state.machines.get_mut(id).filter(|kept| kept.end.is_none()).ok_or_else(missing)?;
        match user {
            Some(user) if user == id => return Ok(()),
            Some(user) => return Err(HostError::Failed(format!("{user} has the volume {volume}"))),
            None => kept.machine.volumes.push(volume.into()),
        }
        let kept = kept.clone();
        self.keep("machines", id, Some(&kept))
    }

    fn detach(&self, id: &str, volume: &str, _force: bool) -> Result<bool> {
        let mut state = self.lock();
        let missing = || HostError::Missing(format!("machine {id}"));
        let kept = state.machines.get_mut(id).filter(|kept| kept.end.is_none()).ok_or_else(missing)?;
        kept.machine.volumes.retain(|have| have != volume);
        let kept = kept.clone();
        self.keep("machines", id, Some(&kept))?;
        Ok(true)
    }

    fn stop(&self, id: &str, _patience: Duration) -> Result<()> {
        std::thread::sleep(self.delay);
        let mut state = self.lock();
        let Some(kept) = state.machines.get_mut(id).filter(|kept| kept.end.is_none()) else { return Ok(()) };
        kept.end = Some(End::Stopped);
        let kept = kept.clone();
        self.keep("machines", id, Some(&kept))
    }

    fn reboot(&self, id: &str) -> Result<()> {
        let mut state = self.lock();
        let missing = || HostError::Missing(format!("machine {id}"));
        let kept = state.machines.get_mut(id).filter(|kept| kept.end.is_none()).ok_or_else(missing)?;
        kept.reboots += 1;
        let kept = kept.clone();
        self.keep("machines", id, Some(&kept))
    }

    fn forget(&self, id: &str) -> Result<()> {
        let mut state = self.lock();
        if state.machines.get(id).is_some_and(|kept| kept.end.is_none()) {
            return Err(HostError::Failed(format!("{id} runs")));
        }
        self.keep::<()>("machines", id, None)?;
        state.machines.remove(id);
        Ok(())
    }

    fn machine(&self, id: &str) -> Result<Option<Status>> {
        Ok(self.lock().machines.get(id).map(Kept::status))
    }

    fn machines(&self) -> Result<Vec<Status>> {
        Ok(self.lock().machines.values().map(Kept::status).collect())
    }

    fn public_addresses(&self) -> Result<BTreeMap<Ipv4Addr, String>> {
        Ok(public(&self.lock().machines))
    }

    fn console(&self, id: &str) -> Result<Vec<u8>> {
        let state = self.lock();
        let Some(kept) = state.machines.get(id) else { return Ok(Vec::new()) };
        let lines = (0..=kept.reboots).map(|_| format!("{id} login: \r\n"));
        Ok(lines.collect::<String>().into_bytes())
    }

    fn wait(&self, seen: u64, limit: Duration) -> u64 {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        while state.events == seen {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.events
    }
}
