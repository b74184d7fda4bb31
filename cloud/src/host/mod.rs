//! What runs the machines: the line between what is to be and what is.
//!
//! ```text
//!   reconciler ──► Host ──┬── simulated   files that say what would run: no KVM, no root
//!                         └── local       disks, taps and hutch-vmm on this machine
//! ```

pub mod local;
mod simulated;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use hutch_blockdev::Disk;
use hutch_blockdev::qcow2::Repaired;
use hutch_imagestore::import::{self, ImportError, Limits, Target};
use hutch_imagestore::store::{Format, Image, Kind};
use hutch_vmm::config::Rate;
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

pub use hutch_netfw::groups::Group;
pub use hutch_netfw::nft::Network;
pub use simulated::{OneMachine, Simulated};

use crate::backup::Captured;
use crate::keyring::Wrapped;
use crate::metadata::Metadata;

/// What ids of volumes begin with that are roots on instance store: they are a run's own, and in no backup.
pub const OWN_ROOT: &str = "eph-";

/// A machine as its host is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The instance's id.
    pub id: String,
    /// Which start of the instance this is, from 1. A host starts each at most once.
    pub run: u64,
    /// The SMBIOS UUID, which begins with `ec2`.
    pub uuid: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel it boots, by id; `None`: the one on its root disk.
    #[serde(default)]
    pub kernel: Option<String>,
    /// The RAM disk it boots with, by id. `None`: the one on its root disk where its kernel is from there, too; else none.
    #[serde(default)]
    pub ramdisk: Option<String>,
    /// The disks in the order the guest sees them; the first is the root.
    pub volumes: Vec<String>,
    /// The sizes in bytes of its instance stores, which come behind the root. They are zeros when a run begins, and gone
    /// when it has ended; a reboot is no end.
    #[serde(default)]
    pub stores: Vec<u64>,
    /// The interfaces in the order the guest sees them.
    pub interfaces: Vec<Interface>,
    /// What it may do.
    #[serde(default)]
    pub speed: Speed,
    /// What the guest is told about itself.
    pub metadata: Metadata,
}

/// What a machine may do, beside what each of its volumes may.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speed {
    /// All of its volumes together.
    pub volumes: Rate,
    /// Each of its interfaces, each way.
    pub network: Rate,
}

/// An interface of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The network interface's id.
    pub id: String,
    /// Its hardware address.
    pub mac: String,
    /// Its primary address.
    pub ip: Ipv4Addr,
    /// Its secondary ones.
    #[serde(default)]
    pub more: Vec<Ipv4Addr>,
    /// Its subnet, whose first address is its router's; machines of earlier versions have the one that their metadata tell.
    #[serde(default)]
    pub subnet: Option<Ipv4Net>,
    /// The network that it is in, apart from all others, and what is reached from there.
    #[serde(default = "Network::alone")]
    pub network: Network,
    /// The public address that leads to it.
    pub public: Option<Public>,
    /// The ids of its security groups; what they say the host is told by [`Host::firewall`]. It reaches port 22 always.
    #[serde(default)]
    pub groups: Vec<String>,
}

/// A public address of an interface: what is sent to it is led to the interface's own address, and passes the firewall there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Public {
    /// The address.
    pub ip: Ipv4Addr,
    /// It is of the host's network, where others reach it; else it means something on this host only.
    pub lan: bool,
}

/// Where a new volume's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Zeros.
    Empty,
    /// A template of the image store, by name.
    Template(String),
    /// A snapshot, by id.
    Snapshot(String),
}

/// A file of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What its host calls it; no other layer is called so.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// What its bytes mean.
    pub format: hutch_blockdev::Format,
    /// What it is encrypted with.
    pub key: Option<Wrapped>,
}

/// What a template or a snapshot holds, as one host hands it to another.
#[derive(Debug, Clone)]
pub enum Content {
    /// Layers, the top one first, whose bytes together never change, and the size of the disk in bytes.
    Layers {
        /// In bytes.
        size: u64,
        /// The top one first.
        layers: Vec<Layer>,
        /// Who keeps them as they are, where they could change.
        reading: Option<Arc<local::Reading>>,
    },
    /// So many bytes of nothing: a simulated host's.
    Bytes(u64),
}

/// A snapshot that is read.
pub struct Reader {
    /// What it holds.
    pub disk: Arc<dyn Disk>,
    /// Its layers, the top one first, by their names; a simulated host has none.
    pub layers: Vec<(String, File, hutch_blockdev::Format)>,
    /// Who keeps them as they are.
    _reading: Option<local::Reading>,
}

/// A template that can be launched.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its name in the image store.
    pub name: String,
    /// SHA-256 of its content, in hexadecimal: tells one of the same name from another.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
}

/// A kernel or a RAM disk that machines can be started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootFile {
    /// Its id, which says its name and its content.
    pub id: String,
    /// Which of the two it is.
    pub kind: Kind,
    /// Its name in the image store.
    pub name: String,
    /// When it came there, in seconds since 1970.
    pub created: u64,
}

/// How a run of a machine stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The instance's id.
    pub id: String,
    /// The run.
    pub run: u64,
    /// How it ended; `None` while it runs.
    pub end: Option<End>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// It was stopped from outside.
    Stopped,
    /// The host went down while it ran.
    HostDown,
    /// It failed: what a person is told.
    Failed(String),
}

/// What a machine has used and moved since its process began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Processor time, in microseconds: the guest's and its devices'.
    pub cpu_us: u64,
    /// Memory of the host that it has now.
    pub memory_bytes: u64,
    /// Bytes the guest read off its disks.
    pub disk_read: u64,
    /// Bytes the guest wrote to its disks.
    pub disk_written: u64,
    /// Bytes that came to the guest.
    pub net_received: u64,
    /// Bytes that the guest sent.
    pub net_sent: u64,
}

/// The room of a host's disks, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// What all layers take together.
    pub used: u64,
    /// What their file system has left.
    pub free: u64,
    /// What each volume and snapshot takes, by its id.
    pub of: BTreeMap<String, Room>,
}

/// The room of a volume or a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Layers that it is made of.
    pub layers: usize,
    /// Bytes of those that nobody else has: without it they are free.
    pub alone: u64,
    /// Bytes of those that others have too.
    pub shared: u64,
}

/// Why a host did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// There is no room for it: memory, processors or disk.
    #[error("the host has no room: {0}")]
    NoRoom(String),
    /// It does not have what the request names.
    #[error("the host has no {0}")]
    Missing(String),
    /// Another machine has it still: soon it may not.
    #[error("{0}")]
    Busy(String),
    /// A key that it needs is not there, or is another.
    #[error("{0}")]
    Key(String),
    /// It failed; the next try may succeed.
    #[error("{0}")]
    Failed(String),
}

/// A layer of a volume that was to be repaired.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairedLayer {
    /// Its name.
    pub name: String,
    /// What came of it; `None`: it has no tables that could be wrong.
    pub repaired: Option<Repaired>,
    /// The other volumes and the snapshots that lie on it: then it is only looked at.
    pub users: Vec<String>,
}

/// What a host's functions return.
pub type Result<T> = std::result::Result<T, HostError>;

/// Runs machines and keeps their volumes.
///
/// Callers may rely on:
/// - every function may be called again with the same arguments, also after the caller was killed in the middle of it: what
///   is done already is not done twice, what is half done is finished;
/// - machines and volumes outlive the process that asked for them;
/// - functions of different ids may run at the same time, and none waits for a guest longer than it says.
///
/// Callers never call two functions with the same id at once.
pub trait Host: Send + Sync {
    /// The templates volumes can be made of.
    ///
    /// # Errors
    /// They cannot be read.
    fn templates(&self) -> Result<Vec<Template>>;

    /// The kernels and RAM disks machines can be started with.
    ///
    /// # Errors
    /// They cannot be read.
    fn boot_files(&self) -> Result<Vec<BootFile>>;

    /// The ids of the keys that can wrap those of volumes and snapshots, the default one first.
    fn keys(&self) -> Vec<String>;

    /// Makes a volume of `bytes` bytes (at least its source's size), which is the first of its id or already like that. With
    /// `key`, one of [`keys`](Host::keys), it is encrypted: what is written to it, and to what is made of it.
    ///
    /// # Errors
    /// [`HostError::Missing`] source, [`HostError::NoRoom`]; [`HostError::Key`]: also where the source is encrypted, and it is not.
    fn create_volume(&self, id: &str, bytes: u64, source: &Source, key: Option<&str>) -> Result<()>;

    /// Has a volume be at least `bytes` bytes large and held to `rate` from now on, also where a machine that runs has it:
    /// its guest sees the new size. A volume that was never told a rate has none.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume; [`HostError::NoRoom`]: it cannot become so large, and is as it was.
    fn modify_volume(&self, id: &str, bytes: u64, rate: &Rate) -> Result<()>;

    /// Makes the layers of a volume whole that nobody else has; tells all of them, the top one first. Without `discard`
    /// nothing is written where bytes of the guest's would be lost; with it they read as zeros, or as what else has them.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume; [`HostError::Busy`]: a machine that runs has it. [`HostError::NoRoom`]: it may be tried again.
    fn repair_volume(&self, id: &str, discard: bool) -> Result<Vec<RepairedLayer>>;

    /// Removes a volume, if it is there. No machine that runs has it.
    ///
    /// # Errors
    /// It cannot be removed now.
    fn delete_volume(&self, id: &str) -> Result<()>;

    /// Keeps what volumes hold at one instant as snapshots, given as the id and the volume of each; a guest that has any of
    /// the volumes goes on meanwhile. Either all are made, or none counts: called again, those that are there already are
    /// made anew where others are missing, so that they are of one instant.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume, [`HostError::NoRoom`].
    fn create_snapshots(&self, snapshots: &[(&str, &str)]) -> Result<()>;

    /// What a volume of this source would begin with, to be handed to [`copy_snapshot`](Host::copy_snapshot).
    ///
    /// # Errors
    /// [`HostError::Missing`] source.
    fn content(&self, source: &Source) -> Result<Content>;

    /// Keeps what another snapshot or a template holds, here or on another host, as a snapshot that needs neither any more.
    /// With `key` all of it is encrypted, and that key wraps its key.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]; it cannot be read. [`HostError::Key`]: also where it is encrypted, and no key is given.
    fn copy_snapshot(&self, id: &str, content: &Content, key: Option<&str>) -> Result<()>;

    /// Keeps the disk that a file of any known format holds as a snapshot; tells the disk's size in bytes. A process without
    /// rights reads it. With `key` it is encrypted, and nothing of it is ever on the disk that is not. `go_on` is told bytes done and in all, again and again, and says whether to go on.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]; [`HostError::Busy`]: it was not to go on; [`HostError::Failed`]: the file is bad, in words for
    /// whoever it belongs to. There is no snapshot then.
    fn import_snapshot(
        &self,
        id: &str,
        file: &File,
        format: Option<Format>,
        key: Option<&str>,
        go_on: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64>;

    /// Keeps as a snapshot what `fill` writes to the file that it is given, which is empty; `fill` tells the disk's size in
    /// bytes, and so does this. A snapshot that is there stays, and nothing is filled.
    ///
    /// # Errors
    /// Those of `fill`, [`HostError::NoRoom`]. There is no snapshot then.
    fn write_snapshot(&self, id: &str, fill: &mut dyn FnMut(&File) -> Result<u64>) -> Result<u64>;

    /// What a snapshot or a template holds, to be read here: also when it is deleted meanwhile. What is encrypted of it is read as its guest wrote it.
    ///
    /// # Errors
    /// [`HostError::Missing`] source; it cannot be read.
    fn read(&self, source: &Source) -> Result<Reader>;

    /// Removes a snapshot, if it is there. Volumes made of it stay whole.
    ///
    /// # Errors
    /// It cannot be removed now.
    fn delete_snapshot(&self, id: &str) -> Result<()>;

    /// Whether it is one machine, as the hosts of other regions in this process may be the same: its kernel routes the
    /// addresses of all, so none may be there twice, and what it reaches otherwise no machine can be. Machines route nothing.
    fn one_machine(&self) -> bool {
        false
    }

    /// Whether machines can be in this network now.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]: the host has its addresses somewhere else.
    fn room(&self, _network: &Network) -> Result<()> {
        Ok(())
    }

    /// Tells what security groups say, all there are, and who is in those that rules name. A group that is not among them
    /// lets nothing through. It holds for machines that run and that start, until it is told again: also by another process.
    ///
    /// # Errors
    /// It cannot be done; then what was told before holds.
    fn firewall(&self, groups: &[Group]) -> Result<()>;

    /// Has the machine run, if this run of it has not been started before. Returns when its first processor runs; its
    /// firewall and its metadata were there before. A public or secondary address that leads to another machine still is left
    /// out. Its kernel and its RAM disk it keeps, whatever becomes of them meanwhile, until it is started with others or
    /// forgotten.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume, kernel or RAM disk, [`HostError::NoRoom`], [`HostError::Key`]; nothing of the run is left
    /// then.
    fn start(&self, machine: &Machine) -> Result<()>;

    /// Tells a machine that runs what has changed of its metadata, its firewall, its network, its speed and its addresses; its volumes come
    /// and go by [`attach`](Host::attach) and [`detach`](Host::detach).
    ///
    /// # Errors
    /// [`HostError::Missing`]: it does not run. [`HostError::Busy`]: a public or secondary address leads to another machine that runs,
    /// which has to be told first that it does not; the rest is done.
    fn update(&self, machine: &Machine) -> Result<()>;

    /// Gives a machine that runs one more volume, whose guest finds it by itself; the next run is told of it anew.
    ///
    /// # Errors
    /// [`HostError::Missing`]: it does not run, or there is no such volume; nothing changed.
    fn attach(&self, id: &str, volume: &str) -> Result<()>;

    /// Asks the guest of a machine that runs to let a volume go, or takes it away with `force`. Returns whether the machine
    /// does not have it any more, without waiting for the guest: asking again is the way to see.
    ///
    /// # Errors
    /// [`HostError::Missing`]: it does not run.
    fn detach(&self, id: &str, volume: &str, force: bool) -> Result<bool>;

    /// Has the machine not run: presses its power button, waits for `patience` at most, then ends it. Its interfaces are
    /// gone when this returns.
    ///
    /// # Errors
    /// It could not be ended.
    fn stop(&self, id: &str, patience: Duration) -> Result<()>;

    /// Has the guest start anew, without its leaving the host.
    ///
    /// # Errors
    /// [`HostError::Missing`]: it does not run.
    fn reboot(&self, id: &str) -> Result<()>;

    /// Forgets a machine that does not run, with its console.
    ///
    /// # Errors
    /// It cannot be forgotten now.
    fn forget(&self, id: &str) -> Result<()>;

    /// The latest run of one machine; `None` when it was never started, or is forgotten.
    ///
    /// # Errors
    /// It cannot be read.
    fn machine(&self, id: &str) -> Result<Option<Status>> {
        Ok(self.machines()?.into_iter().find(|status| status.id == id))
    }

    /// The latest run of every machine that was started and not forgotten.
    ///
    /// # Errors
    /// They cannot be read.
    fn machines(&self) -> Result<Vec<Status>>;

    /// Where each public address leads now: to which machine.
    ///
    /// # Errors
    /// They cannot be read.
    fn public_addresses(&self) -> Result<BTreeMap<Ipv4Addr, String>>;

    /// Up to the last 64 KiB of what the guest wrote to its console, over all its runs.
    ///
    /// # Errors
    /// It cannot be read.
    fn console(&self, id: &str) -> Result<Vec<u8>>;

    /// What a machine that runs has used and moved; `None` when it does not run, or nobody counts.
    ///
    /// # Errors
    /// It does not answer.
    fn figures(&self, _id: &str) -> Result<Option<Figures>> {
        Ok(None)
    }

    /// Volumes whose guests' writes wait because the host's disk is full, as seen within the last seconds.
    fn stalled(&self) -> BTreeSet<String> {
        BTreeSet::new()
    }

    /// What room volumes and snapshots take; `None` when they take none.
    ///
    /// # Errors
    /// It cannot be read.
    fn usage(&self) -> Result<Option<Usage>> {
        Ok(None)
    }

    /// All that it keeps at this moment, to be copied while it goes on. It takes moments, and one at a time is had.
    ///
    /// # Errors
    /// It cannot be read.
    fn capture(&self) -> Result<Box<dyn Captured>>;

    /// Waits until the end of some machine may have to be looked at, for at most `limit`; `seen` is what the last call
    /// returned (0 at first).
    fn wait(&self, seen: u64, limit: Duration) -> u64;
}

/// The kernels and RAM disks of an image store.
fn boot_files(images: Vec<Image>) -> Vec<BootFile> {
    let records = images.into_iter().map(|image| image.record).filter(|r| r.kind != Kind::Machine);
    records.map(|r| BootFile { id: r.id, kind: r.kind, name: r.name, created: r.created }).collect()
}

/// What is said where a kernel or a RAM disk is not there.
fn no_boot_file(id: &str) -> HostError {
    let kind = Kind::of_id(id).map_or("kernel", Kind::name);
    HostError::Missing(format!(
        "{kind} {id}: it was removed from the images; import it again under its name (hutch image import --{kind}), or give \
         the instance another (ModifyInstanceAttribute)"
    ))
}

/// An error with its causes.
pub(crate) fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", told(cause)),
        None => error.to_string(),
    }
}

/// Makes a raw disk of an image file, in `to`, which is empty; tells its size.
fn convert(
    importer: &Path,
    file: &File,
    to: &mut Target<'_>,
    format: Option<Format>,
    go_on: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<u64> {
    let made = import::format_of(file, format).and_then(|format| {
        import::convert(file, to, format, &Limits::default(), Command::new(importer), go_on)
    });
    made.map(|(size, _)| size).map_err(|error| match &error {
        ImportError::Full(_) => HostError::NoRoom(error.to_string()),
        ImportError::Stopped => HostError::Busy(error.to_string()),
        _ => HostError::Failed(told(&error)),
    })
}
