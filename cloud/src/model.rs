//! The records: what the store holds of each of EC2's nouns.
//!
//! A record says what is to be (`desired`) and what is known to be (`state`); the reconciler brings one to the other.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

pub use hutch_imagestore::store::Kind as ImageKind;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

mod bundles;
mod imports;
mod modification;
mod network;
mod stored;
mod volumes;

pub use bundles::{Bundle, BundleState, BundleTask, BundleTemplate};
pub use imports::{ImportDisk, ImportState, ImportTask};
pub use modification::{Modification, Progress, Shape};
pub use network::{Account, Gateway, RouteTable, Slots, Subnet, Target, Vpc, VpcParts};
pub use stored::{
    RestoreDisk, RestoreTask, StoreState, StoreTask, StoredDevice, StoredImage, StoredSnapshot,
};
pub use volumes::{AttachmentState, Copied, Device, Snapshot, Volume, VolumeState};

/// Tags: at most 50, keys to 128 characters, values to 256.
pub type Tags = BTreeMap<String, String>;

/// Something the store holds one of under each id.
pub trait Record: Serialize + DeserializeOwned + Clone {
    /// The part of the key before the id.
    const KIND: &'static str;
    /// The id.
    fn id(&self) -> &str;
}

macro_rules! record {
    ($($type:ident $kind:literal),* $(,)?) => {$(
        impl Record for $type {
            const KIND: &'static str = $kind;
            fn id(&self) -> &str {
                &self.id
            }
        }
    )*};
}

record! {
    Slots "slots",
    Instance "instance", Image "image", Volume "volume", Snapshot "snapshot", Interface "interface", Vpc "vpc",
    Subnet "subnet", Group "group", KeyPair "key", Address "address", Token "token", Name "name",
    LaunchTemplate "launch-template", LaunchTemplateVersion "launch-template-version", Elastic "elastic",
    ImportTask "import", StoreTask "store-image", RestoreTask "restore-image", BundleTask "bundle", BundleTemplate "bundle-template", Account "account", Gateway "internet-gateway", RouteTable "route-table",
}

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// It was launched or started, and does not run yet.
    Pending,
    /// It runs.
    Running,
    /// It is to stop.
    Stopping,
    /// It is kept, and does not run.
    Stopped,
    /// It is to go.
    ShuttingDown,
    /// It is gone; this is what is remembered for an hour.
    Terminated,
}

impl InstanceState {
    /// EC2's code of the state.
    pub fn code(self) -> u16 {
        match self {
            InstanceState::Pending => 0,
            InstanceState::Running => 16,
            InstanceState::ShuttingDown => 32,
            InstanceState::Terminated => 48,
            InstanceState::Stopping => 64,
            InstanceState::Stopped => 80,
        }
    }

    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            InstanceState::Pending => "pending",
            InstanceState::Running => "running",
            InstanceState::ShuttingDown => "shutting-down",
            InstanceState::Terminated => "terminated",
            InstanceState::Stopping => "stopping",
            InstanceState::Stopped => "stopped",
        }
    }

    /// It goes or is gone.
    pub fn is_over(self) -> bool {
        matches!(self, InstanceState::ShuttingDown | InstanceState::Terminated)
    }
}

/// Why something is in its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// EC2's code, such as `Client.UserInitiatedShutdown`.
    pub code: String,
    /// What a person is told.
    pub message: String,
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Its id.
    pub id: String,
    /// The account it belongs to.
    pub account: String,
    /// The reservation it was launched in.
    pub reservation: String,
    /// Its number in that launch.
    pub launch_index: u32,
    /// What made the launch idempotent.
    pub client_token: String,
    /// The image it was launched from.
    pub image: String,
    /// The kernel it boots; `None`: the one on its root volume.
    #[serde(default)]
    pub kernel: Option<String>,
    /// The RAM disk that goes with it.
    #[serde(default)]
    pub ramdisk: Option<String>,
    /// What its root on instance store began with; `None`: its root is a volume.
    #[serde(default)]
    pub bundle: Option<Bundle>,
    /// Its type's name.
    pub instance_type: String,
    /// The key pair's name.
    pub key_name: Option<String>,
    /// The zone's name.
    pub zone: String,
    /// Its subnet.
    pub subnet: String,
    /// Its network.
    pub vpc: String,
    /// Its network interfaces, by device index.
    pub interfaces: Vec<String>,
    /// The user data.
    pub user_data: Option<Vec<u8>>,
    /// When it was last started.
    pub launched: Timestamp,
    /// Where it is.
    pub state: InstanceState,
    /// Why, in EC2's structure.
    pub reason: Option<Reason>,
    /// Why, in EC2's older sentence.
    pub transition: String,
    /// When it was terminated.
    pub terminated: Option<Timestamp>,
    /// How often it was started: names a run for the host.
    pub run: u64,
    /// A stop or an end that does not wait for the guest.
    pub force: bool,
    /// How often it was asked to reboot, and how often it did.
    pub reboots: (u64, u64),
    /// The root's device name.
    pub root_device: String,
    /// What its launch calls the devices of instance stores, by their names, such as `ephemeral0`.
    #[serde(default)]
    pub stores: BTreeMap<String, String>,
    /// Its disks, root first.
    pub devices: Vec<Device>,
    /// What the guest's own shutdown means.
    pub shutdown_terminates: bool,
    /// `disableApiTermination`.
    pub termination_protection: bool,
    /// `disableApiStop`.
    pub stop_protection: bool,
    /// Packets must be its own.
    pub source_dest_check: bool,
    /// EBS-optimized, as asked.
    pub ebs_optimized: bool,
    /// Detailed monitoring, as asked.
    pub monitoring: bool,
    /// The metadata service's options.
    pub metadata: MetadataOptions,
    /// The SMBIOS UUID.
    pub uuid: String,
    /// Its tags.
    pub tags: Tags,
}

/// What the metadata service does for an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataOptions {
    /// It answers.
    pub enabled: bool,
    /// Only version 2.
    pub tokens_required: bool,
    /// Hops of an answer with a token, 1 to 64.
    pub hop_limit: u8,
    /// It tells the instance's tags.
    pub tags: bool,
    /// It answers by IPv6, too.
    #[serde(default)]
    pub ipv6: bool,
}

impl Default for MetadataOptions {
    fn default() -> MetadataOptions {
        MetadataOptions { enabled: true, tokens_required: false, hop_limit: 1, tags: false, ipv6: false }
    }
}

/// A machine image, or a kernel or a RAM disk, which have no disks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its name.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// When it was made.
    pub created: Timestamp,
    /// What it is.
    #[serde(default)]
    pub kind: ImageKind,
    /// The kernel that instances of it boot by default.
    #[serde(default)]
    pub kernel: Option<String>,
    /// The RAM disk that they boot by default.
    #[serde(default)]
    pub ramdisk: Option<String>,
    /// What roots on instance store begin with; `None`: its root is a snapshot's.
    #[serde(default)]
    pub bundle: Option<Bundle>,
    /// The root's device name.
    pub root_device: String,
    /// The disks an instance of it gets.
    pub devices: Vec<ImageDevice>,
    /// What it calls the devices of instance stores, by their names, such as `ephemeral0`.
    #[serde(default)]
    pub stores: BTreeMap<String, String>,
    /// Every account may launch it.
    pub public: bool,
    /// These accounts may.
    pub launch: Vec<String>,
    /// From when on its owner advises against it.
    #[serde(default)]
    pub deprecated: Option<Timestamp>,
    /// Nobody may launch it for now.
    #[serde(default)]
    pub disabled: bool,
    /// It is being made; the snapshots are not complete.
    pub pending: bool,
    /// Why it could not be made.
    pub failed: Option<Reason>,
    /// Enhanced networking, as its registration says.
    #[serde(default = "yes")]
    pub ena_support: bool,
    /// The instance it was made from.
    pub source_instance: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// What records say that were written before they said it.
pub(crate) fn yes() -> bool {
    true
}

/// A disk of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDevice {
    /// Its name.
    pub name: String,
    /// The snapshot it begins with; `None`: it is empty.
    pub snapshot: Option<String>,
    /// Its size in GiB.
    pub gib: u64,
    /// The volume type.
    pub kind: String,
    /// I/O operations a second, where the type has to be told.
    #[serde(default)]
    pub iops: Option<u64>,
    /// The volume goes with the instance.
    pub delete_on_termination: bool,
    /// It is encrypted; one with a snapshot is what the snapshot is.
    #[serde(default)]
    pub encrypted: bool,
}

impl Interface {
    /// All its private addresses, the primary one first.
    pub fn ips(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.ip).chain(self.more.iter().copied())
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// What its owner says of it.
    pub description: String,
    /// Its subnet.
    pub subnet: String,
    /// Its network.
    pub vpc: String,
    /// The zone's name.
    pub zone: String,
    /// Its hardware address.
    pub mac: String,
    /// Its primary address.
    pub ip: Ipv4Addr,
    /// Its secondary ones.
    #[serde(default)]
    pub more: Vec<Ipv4Addr>,
    /// Its security groups.
    pub groups: Vec<String>,
    /// Packets must be its own.
    pub source_dest_check: bool,
    /// The attachment's id, the instance, the device index.
    pub attachment: Option<Attachment>,
    /// The public address that leads to it.
    #[serde(default)]
    pub public: Option<Public>,
    /// It is given a public address whenever its instance starts, unless it has one.
    #[serde(default)]
    pub auto_public: bool,
    /// Its tags.
    pub tags: Tags,
}

/// A public address as its interface has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Public {
    /// The address.
    pub ip: Ipv4Addr,
    /// The ids of the elastic address and of its association; one that comes and goes with the run of an instance has none.
    pub elastic: Option<(String, String)>,
}

/// An elastic address. Who has it is also told by its `Name`, `public/ADDRESS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elastic {
    /// The allocation's id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// The address.
    pub ip: Ipv4Addr,
    /// Where it leads.
    pub association: Option<Association>,
    /// Its tags.
    pub tags: Tags,
}

/// Where an elastic address leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Association {
    /// Its id.
    pub id: String,
    /// The network interface.
    pub interface: String,
    /// The interface's private address.
    pub private_ip: Ipv4Addr,
}

/// How an interface is attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub id: String,
    /// The instance.
    pub instance: String,
    /// The interface's number.
    pub device_index: u32,
    /// When.
    pub attached: Timestamp,
    /// The interface goes with the instance.
    pub delete_on_termination: bool,
}

/// A security group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its name, one of a kind in its network.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// Its network.
    pub vpc: String,
    /// Its rules, by their ids.
    pub rules: BTreeMap<String, Rule>,
    /// The tags of those rules that have some.
    #[serde(default)]
    pub rule_tags: BTreeMap<String, Tags>,
    /// Its tags.
    pub tags: Tags,
}

/// A rule of a security group: one peer, one protocol, one range of ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Outbound.
    pub egress: bool,
    /// `tcp`, `udp`, `icmp`, `icmpv6`, a number, or `-1`: all.
    pub protocol: String,
    /// The first port, or the ICMP type; -1: all.
    pub from: i64,
    /// The last port, or the ICMP code; -1: all.
    pub to: i64,
    /// With whom.
    pub peer: Peer,
    /// What its owner says of it.
    pub description: Option<String>,
}

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// IPv4 addresses.
    Ipv4(ipnet::Ipv4Net),
    /// IPv6 addresses.
    Ipv6(ipnet::Ipv6Net),
    /// The members of a group.
    Group(String),
    /// A prefix list.
    PrefixList(String),
}

/// A key pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPair {
    /// `ACCOUNT/NAME`: names are an account's own.
    pub id: String,
    /// EC2's id of it, `key-…`.
    pub key_id: String,
    /// Its name.
    pub name: String,
    /// `rsa` or `ed25519`.
    pub kind: String,
    /// As EC2 computes it.
    pub fingerprint: String,
    /// The public key, in OpenSSH's line.
    pub public: String,
    /// When it was made or imported.
    pub created: Timestamp,
    /// Its tags.
    pub tags: Tags,
}

/// A launch template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchTemplate {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its name.
    pub name: String,
    /// When it was made.
    pub created: Timestamp,
    /// The version that is used where none is named.
    pub default_version: u64,
    /// The number of the newest version, which is never given again.
    pub latest_version: u64,
    /// Its tags.
    pub tags: Tags,
}

/// A version of a launch template; it never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchTemplateVersion {
    /// `TEMPLATE/VERSION`, so that they are in order.
    pub id: String,
    /// Its number, from 1.
    pub version: u64,
    /// When it was made.
    pub created: Timestamp,
    /// What its owner says of it.
    pub description: String,
    /// Parameters of RunInstances, by their flat names.
    pub data: BTreeMap<String, String>,
}

/// An address of a subnet that is in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address; behind `VPC/` where the network is no default one: those share theirs.
    pub id: String,
    /// The interface that has it.
    pub interface: String,
}

/// A name that only one may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Name {
    /// What it is the name of, and the name: `group/VPC/NAME`.
    pub id: String,
    /// Who has it.
    pub of: String,
}

/// What a client token stood for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// `ACTION/ACCOUNT/TOKEN`.
    pub id: String,
    /// A digest of the request's parameters: the same token with others is an error.
    pub request: String,
    /// The ids that came of it.
    pub made: Vec<String>,
    /// When; a day later it is forgotten.
    pub at: Timestamp,
}
