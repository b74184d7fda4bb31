//! A machine of this host: its directory, its record, and how one run of it is started.
//!
//! ```text
//!   machines/i-…/machine.json   what it is, its process, how it ended; written whole
//!   machines/i-…/console.log    what the guests of all its runs wrote, as far as there is room
//!   machines/i-…/report.json    how its process says it ended        machines/i-…/vmm.log   what its process complains of
//!   machines/i-…/control.sock   the machine's control socket        machines/i-…/a?i-….raw  the kernel and RAM disk it was told to boot
//! ```
//! A process is recorded before it is told what to run, so that none runs that is not recorded; and marked as running
//! after it answered, so that a start that was cut short is known as one.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hutch_blockdev::Layer;
use hutch_netfw::guest::{self, Address, GuestNet, MTU, NetError, name_servers};
use hutch_netfw::name::GroupId;
use hutch_vmm::config::{DiskConfig, End as VmmEnd, MachineConfig, NetConfig, Rate, RunAs};
use hutch_vmm::launch::{self, Inherit, LaunchError};
use hutch_vmm::plan::Plan;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::{End, HostError, Interface, Machine, Public, Result, Status};
use super::Together;
use super::boot;
use super::process::{Identity, Process, Waiting};
use super::stores;
use super::volumes::{Volumes, chain, failed, remove, serial, write};
use crate::metadata::Metadata;

/// How long a new machine may take until its first processor runs: reading its kernel from a slow disk, mostly.
const BEGIN: Duration = Duration::from_secs(60);
/// How long a machine may take to answer at its control socket.
pub const ANSWER: Duration = Duration::from_secs(10);
/// How long its disks may take to be flushed when it is paused.
pub const FLUSH: Duration = Duration::from_secs(120);
/// The console's log begins anew at so many bytes.
const CONSOLE: u64 = 1 << 20;

/// Answers guests at 169.254.169.254.
pub trait MetadataService: Send + Sync {
    /// Answers the guest whose requests arrive at `listener`, until what is returned is dropped.
    ///
    /// # Errors
    /// It cannot be served.
    fn serve(&self, listener: TcpListener, metadata: &Metadata) -> io::Result<Box<dyn Served>>;
}

/// One guest's metadata, being served; dropping it ends that.
pub trait Served: Send {
    /// Tells this from now on.
    fn update(&self, metadata: &Metadata);
}

/// What all machines of a host are started with.
pub struct Means {
    /// The program `hutch-vmm`.
    pub vmm: PathBuf,
    /// The program `hutch-import-worker`.
    pub importer: PathBuf,
    /// Where networks are recorded, for this network namespace.
    pub networks: PathBuf,
    /// The region's name: other regions of this machine tell of security groups of their own.
    pub region: String,
    /// What the regions of this machine have together.
    pub together: Arc<Together>,
    /// What answers guests.
    pub metadata: Box<dyn MetadataService>,
}

/// What is kept of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    pub machine: Machine,
    /// Its latest process.
    pub process: Option<Identity>,
    pub phase: Phase,
    /// Its reboot was asked for: when it ends it starts anew.
    pub restart: bool,
    pub end: Option<End>,
}

/// What was being done with a machine when its record was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its first process was started, and has not answered yet: the run is none yet.
    Starting,
    /// Its process answered.
    Running,
    /// It ended to start anew; the next process has not answered yet.
    Restarting,
}

impl Kept {
    /// A run that has not begun.
    pub fn new(machine: Machine) -> Kept {
        Kept { machine, process: None, phase: Phase::Starting, restart: false, end: None }
    }

    pub fn status(&self) -> Status {
        Status { id: self.machine.id.clone(), run: self.machine.run, end: self.end.clone() }
    }

    /// Whether it runs, as far as is known.
    pub fn runs(&self) -> bool {
        self.phase != Phase::Starting && self.end.is_none()
    }
}

/// A machine's directory.
#[derive(Debug, Clone)]
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn read(&self) -> Result<Option<Kept>> {
        let path = self.0.join("machine.json");
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| failed(&path, e.into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(&path, e)),
        }
    }

    pub fn write(&self, kept: &Kept) -> Result<()> {
        let path = self.0.join("machine.json");
        let text = serde_json::to_vec(kept).map_err(|e| failed(&path, e.into()))?;
        write(&path, |file| {
            std::os::unix::fs::FileExt::write_all_at(file, &text, 0).map_err(|e| failed(&path, e))
        })
    }

    /// Removes all of it, the record first: what is left of the rest is removed at the next start.
    pub fn remove(&self) -> Result<()> {
        remove(&self.0.join("machine.json"))?;
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(&self.0, e)),
            _ => Ok(()),
        }
    }

    /// The last `limit` bytes of its console.
    pub fn console(&self, limit: u64) -> Result<Vec<u8>> {
        let path = self.0.join("console.log");
        let mut file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file.map_err(|e| failed(&path, e))?,
        };
        let mut text = Vec::new();
        let read = file.metadata().and_then(|about| {
            io::Seek::seek(&mut file, io::SeekFrom::Start(about.len().saturating_sub(limit)))?;
            file.take(limit).read_to_end(&mut text)
        });
        read.map(|_| text).map_err(|e| failed(&path, e))
    }

    /// Asks the machine that runs.
    pub fn ask(&self, command: &str, limit: Duration) -> std::result::Result<Value, LaunchError> {
        self.ask_all(&json!({ "command": command }), limit)
    }

    /// Likewise, with all that a request says.
    pub fn ask_all(&self, request: &Value, limit: Duration) -> std::result::Result<Value, LaunchError> {
        launch::ask(&self.0.join("control.sock"), request, limit).map(|(_, _, answer)| answer)
    }

    /// What its devices have moved: bytes its disks read and wrote, its interfaces received and sent.
    pub fn moved(&self, limit: Duration) -> std::result::Result<[u64; 4], LaunchError> {
        let status = self.ask("status", limit)?;
        let sum = |of: &str, what: &str| {
            let all = status[of].as_array().map_or(&[][..], Vec::as_slice);
            all.iter().filter_map(|one| one[what].as_u64()).sum()
        };
        Ok([
            sum("disks", "read_bytes"),
            sum("disks", "written_bytes"),
            sum("nets", "received_bytes"),
            sum("nets", "sent_bytes"),
        ])
    }

    /// Has the machine that runs make its disk so large and hold it to `rate`.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]: it refuses.
    pub fn change_disk(&self, volume: &str, size: u64, rate: &Rate) -> Result<()> {
        let request = json!({ "command": "disk", "serial": serial(volume), "size": size, "rate": rate });
        match self.ask_all(&request, FLUSH) {
            Err(LaunchError::Refused(why)) => Err(HostError::NoRoom(why)),
            asked => asked.map(drop).map_err(|e| launch_failed(&e)),
        }
    }

    /// Has the machine that runs hold all its disks, and each of its interfaces, to what `machine` says.
    pub fn change_speed(&self, machine: &Machine) -> Result<()> {
        let disks = json!({ "command": "disks", "rate": machine.speed.volumes });
        let net = |interface: &Interface| json!({ "command": "net", "mac": interface.mac, "rate": machine.speed.network });
        for request in machine.interfaces.iter().map(net).chain([disks]) {
            match self.ask_all(&request, ANSWER) {
                // It was started by an earlier version; the next start is of this one.
                Err(LaunchError::Refused(why)) => {
                    tracing::warn!(instance = machine.id, why, "it keeps its speed")
                }
                asked => drop(asked.map_err(|e| launch_failed(&e))?),
            }
        }
        Ok(())
    }

    /// How its process says it ended; `None` when it could not say.
    pub fn report(&self) -> Option<VmmEnd> {
        launch::report(File::open(self.0.join("report.json")).ok()?).ok().map(|report| report.end)
    }
}

/// How the end of a process is told; `None` is a reboot.
pub fn end_of(report: Option<VmmEnd>) -> Option<End> {
    Some(match report {
        Some(VmmEnd::Reboot) => return None,
        Some(VmmEnd::PowerOff | VmmEnd::Command { .. }) => End::PowerOff,
        Some(VmmEnd::Killed) => End::Stopped,
        Some(VmmEnd::Panic { message }) => End::Failed(format!("the guest's kernel panicked: {message}")),
        Some(VmmEnd::TripleFault) => End::Failed("the guest's processor shut down (triple fault)".into()),
        Some(VmmEnd::Error { message }) => End::Failed(message),
        None => End::Failed("its process was killed, or the host went down".into()),
    })
}

/// What a running machine has here.
pub struct Live {
    pub process: Arc<Process>,
    /// Its interfaces, in the order of the machine's, as far as they are served.
    pub nets: Vec<Net>,
}

/// An interface, up and served.
pub struct Net {
    // Dropped first: the service must be gone before its port is.
    served: Vec<Box<dyn Served>>,
    guest: GuestNet,
}

impl Net {
    fn serve(mut guest: GuestNet, metadata: &Metadata, means: &Means) -> Result<Net> {
        let listeners = guest.take_metadata_listeners().into_iter();
        let served = listeners.map(|listener| means.metadata.serve(listener, metadata));
        match served.collect() {
            Ok(served) => Ok(Net { served, guest }),
            Err(e) => {
                Err(HostError::Failed(format!("cannot serve the metadata of {}: {e}", metadata.instance_id)))
            }
        }
    }

    /// Brings an interface up: its rules first.
    fn up(interface: &Interface, machine: &Machine, means: &Means) -> Result<(Net, Vec<File>)> {
        let address = address(interface, machine)?;
        let queues = guest::queues(machine.vcpus);
        let first = Address { more: Vec::new(), ..address.clone() };
        let guest = GuestNet::up_as(&means.networks, &first, queues, MTU, name_servers());
        let mut guest = guest.map_err(|e| net_failed(&e))?;
        let taps = guest.take_taps();
        if let Err(error) = guest.lead(interface.public.map(led)) {
            // It is no reason not to run. Whoever wants it there says so again, when the machine runs.
            tracing::warn!(
                instance = machine.id,
                error = chain(&error),
                "its public address does not lead to it"
            );
        }
        if let Err(error) = guest.place(&address) {
            // Likewise.
            tracing::warn!(instance = machine.id, error = chain(&error), "it has not all its addresses");
        }
        Ok((Net::serve(guest, &machine.metadata, means)?, taps))
    }

    /// Serves an interface that is up.
    pub fn adopt(interface: &Interface, machine: &Machine, means: &Means) -> Result<Net> {
        let guest = GuestNet::adopt(&means.networks, interface.ip, MTU, name_servers());
        let mut guest = guest.map_err(|e| net_failed(&e))?;
        // Its public address is what is recorded there: another may have it by now.
        let told = address(interface, machine).and_then(|address| match guest.place(&address) {
            // It is told again, when it is looked at.
            Ok(()) | Err(NetError::Led { .. }) => Ok(()),
            Err(error) => Err(net_failed(&error)),
        });
        if let Err(error) = told {
            guest.leave();
            return Err(error);
        }
        Net::serve(guest, &machine.metadata, means)
    }

    pub fn update(&mut self, interface: &Interface, machine: &Machine) -> Result<()> {
        let busy = |e| match e {
            NetError::Led { .. } => HostError::Busy(e.to_string()),
            e => net_failed(&e),
        };
        let placed = self.guest.place(&address(interface, machine)?).map_err(busy);
        if !matches!(placed, Ok(()) | Err(HostError::Busy(_))) {
            return placed;
        }
        self.served.iter().for_each(|served| served.update(&machine.metadata));
        self.guest.lead(interface.public.map(led)).map_err(busy)?;
        placed
    }

    /// Whether it is this one.
    pub fn is_of(&self, interface: &Interface) -> bool {
        self.guest.ip == interface.ip
    }

    /// Whether its public address and its secondary ones are these.
    pub fn is_led(&self, interface: &Interface) -> bool {
        self.guest.public() == interface.public.map(led) && self.guest.more() == interface.more
    }

    /// Its public address.
    pub fn public(&self) -> Option<Ipv4Addr> {
        self.guest.public().map(|public| public.ip)
    }

    /// Ends what is served and leaves the rest to who comes next.
    pub fn leave(self) {
        drop(self.served);
        self.guest.leave();
    }
}

fn led(public: Public) -> hutch_netfw::Public {
    hutch_netfw::Public { ip: public.ip, lan: public.lan }
}

fn groups(interface: &Interface) -> Result<Vec<GroupId>> {
    let wrong = |e| HostError::Failed(format!("the interface {}: {e}", interface.id));
    interface.groups.iter().map(|id| id.parse().map_err(wrong)).collect()
}

fn address(interface: &Interface, machine: &Machine) -> Result<Address> {
    let wrong = |what: &str| HostError::Failed(format!("the interface {} has a wrong {what}", interface.id));
    let told = || machine.metadata.subnet_cidr.parse().map_err(|_| wrong("subnet"));
    Ok(Address {
        ip: interface.ip,
        more: interface.more.clone(),
        mac: interface.mac.parse().map_err(|_| wrong("MAC"))?,
        subnet: interface.subnet.map_or_else(told, Ok)?,
        network: interface.network.clone(),
        groups: groups(interface)?,
    })
}

pub fn net_failed(error: &NetError) -> HostError {
    match error {
        NetError::Overlaps { .. } => HostError::NoRoom(error.to_string()),
        error => HostError::Failed(chain(error)),
    }
}

pub fn launch_failed(error: &LaunchError) -> HostError {
    HostError::Failed(chain(error))
}

/// A disk of a machine that is being started.
struct Disk {
    serial: String,
    top: String,
    layers: Vec<Layer>,
    rate: Rate,
}

/// Starts what `kept` says, and records it: disks, then interfaces with their rules and metadata, then the process.
///
/// # Errors
/// Those of [`super::super::Host::start`]; nothing of it runs then.
pub fn launch(kept: &mut Kept, dir: &Dir, volumes: &Volumes, means: &Means) -> Result<Live> {
    let machine = kept.machine.clone();
    let open = |id| {
        let (files, rate) = volumes.ready(id)?;
        Ok(Disk { serial: serial(id), layers: files.open()?, top: files.top, rate })
    };
    let mut disks = machine.volumes.iter().map(|id| open(id)).collect::<Result<Vec<_>>>()?;
    let store = |(index, layer)| Disk {
        serial: stores::serial(index),
        layers: vec![layer],
        top: String::new(),
        rate: Rate::default(),
    };
    let stores = stores::open(kept, &dir.0)?.into_iter().enumerate().map(store);
    // Behind the root, where programs look for them.
    let behind = disks.len().min(1);
    disks.splice(behind..behind, stores);
    let mut inherit = Inherit::default();
    boot::keep(&machine, dir, volumes)?;
    let boot = boot::config(&machine, dir, disks.first().map(|disk| disk.layers.as_slice()), &mut inherit)?;

    let mut nets = Vec::new();
    let mut configs = Vec::new();
    for interface in &machine.interfaces {
        let (net, taps) = Net::up(interface, &machine, means)?;
        nets.push(net);
        let taps = taps.into_iter().map(|tap| inherit.give(tap.into())).collect();
        let rate = machine.speed.network.clone();
        configs.push(NetConfig { mac: interface.mac.clone(), taps, mtu: MTU, rate });
    }

    let path = |name: &str| dir.0.join(name);
    let file = |name: &str, anew: bool| {
        let mut how = File::options();
        let how = how.create(true).append(!anew).write(true).truncate(anew).mode(0o600);
        how.open(path(name)).map_err(|e| failed(&path(name), e))
    };
    let (report, console, log) =
        (file("report.json", true)?, file("console.log", false)?, file("vmm.log", false)?);
    let socket = path("control.sock");
    remove(&socket)?;
    let listener = UnixListener::bind(&socket).map_err(|e| failed(&socket, e))?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.map_err(|e| failed(Path::new("/dev/kvm"), e))?;
    let lend = |disk: &Disk, inherit: &mut Inherit| {
        let lent = inherit.disk(&disk.layers, disk.serial.clone(), false).map_err(|e| launch_failed(&e))?;
        Ok(DiskConfig { rate: disk.rate.clone(), top: disk.top.clone(), ..lent })
    };
    let config = MachineConfig {
        id: machine.id.clone(),
        uuid: machine.uuid.clone(),
        cpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        hugepages: false,
        boot,
        disks: disks.iter().map(|disk| lend(disk, &mut inherit)).collect::<Result<_>>()?,
        disks_rate: machine.speed.volumes.clone(),
        nets: configs,
        kvm: inherit.give(kvm.into()),
        control: Some(inherit.give(listener.into())),
        console_log: Some(inherit.give(console.into())),
        console_log_limit: CONSOLE,
        report: Some(inherit.give(report.into())),
        run_as: rustix::process::geteuid().is_root().then_some(RunAs::NOBODY),
        exit_port: false,
        // The kernel is read off the disk at every start, so that the one upgraded in the guest boots next.
        no_reboot: true,
        tethered: false,
    };
    let wrong = |e: &dyn std::error::Error| HostError::Failed(format!("{}: {}", machine.id, chain(e)));
    Plan::new(config.clone()).map_err(|e| wrong(&e))?;
    let text = hutch_vmm::secret::json(&config).map_err(|e| wrong(&e))?;

    let mut command = inherit.command(&means.vmm);
    let waiting = Waiting::start(command.stderr(log)).map_err(|e| failed(&means.vmm, e))?;
    // Only the machine has its disks and taps now: they are free when it ends.
    drop((command, disks));
    kept.process = Some(waiting.identity().clone());
    dir.write(kept)?;
    let process = waiting.go(&text).map_err(|e| failed(&means.vmm, e))?;
    if let Err(silent) = dir.ask("status", BEGIN) {
        process.end(Duration::ZERO).map_err(|e| wrong(&e))?;
        return Err(match end_of(dir.report()) {
            Some(End::Failed(why)) if dir.report().is_some() => HostError::Failed(why),
            _ => launch_failed(&silent),
        });
    }
    kept.phase = Phase::Running;
    if let Err(e) = dir.write(kept) {
        process.end(Duration::ZERO).map_err(|e| wrong(&e))?;
        return Err(e);
    }
    if let Err(error) = boot::let_go(&machine, dir) {
        tracing::warn!(instance = machine.id, %error, "a kernel or RAM disk that it had is kept on");
    }
    Ok(Live { process: Arc::new(process), nets })
}

/// What the last process of a machine left running, if it did; its interfaces are served again.
///
/// # Errors
/// It cannot be looked for.
pub fn adopt(kept: &Kept, dir: &Dir, means: &Means) -> Result<Option<Live>> {
    let Some(identity) = &kept.process else { return Ok(None) };
    let found = Process::find(identity).map_err(|e| failed(&dir.0, e))?;
    let Some(process) = found else { return Ok(None) };
    let machine = &kept.machine;
    // Who asked for a snapshot may have been killed while it was held.
    if let Err(error) = dir.ask("resume", ANSWER) {
        if kept.phase != Phase::Running {
            process.end(Duration::ZERO).map_err(|e| failed(&dir.0, e))?;
            return Ok(None);
        }
        tracing::warn!(instance = machine.id, %error, "it runs, but does not answer");
    }
    let mut nets = Vec::new();
    for interface in &machine.interfaces {
        match Net::adopt(interface, machine, means) {
            Ok(net) => nets.push(net),
            // It has an address already; only what we serve is missing, and that is no reason to end it.
            Err(error) => tracing::warn!(instance = machine.id, %error, "its interface is not served"),
        }
    }
    Ok(Some(Live { process: Arc::new(process), nets }))
}
