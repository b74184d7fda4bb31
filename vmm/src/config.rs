//! What is asked of a machine: the whole input of `hutch-vmm`, as JSON.
//!
//! A [`MachineConfig`] names no path. Everything it needs from the host is a descriptor that the parent opened and
//! the child inherits by number, so that the child can run without the right to open anything.

use serde::{Deserialize, Serialize};

use crate::secret::DiskKey;

/// The number of a descriptor the process inherited.
pub type FdNumber = i32;

/// One machine, as asked for. Checked and laid out by `Plan::new`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The instance's id, such as `i-0123456789abcdef0`; shown as the SMBIOS serial number and in messages.
    pub id: String,
    /// The SMBIOS UUID. EC2's begin with `ec2`, which is how cloud-init knows where it is.
    pub uuid: String,
    /// Virtual CPUs: 1 to 32.
    pub cpus: u32,
    /// Guest memory in MiB: 16 to 1048576.
    pub memory_mib: u64,
    /// Back guest memory with 2 MiB huge pages (they must be reserved on the host).
    #[serde(default)]
    pub hugepages: bool,
    /// What the machine boots.
    pub boot: BootConfig,
    /// Disks, in the order the guest sees them (`/dev/vda`, `/dev/vdb`, …).
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// What all disks may do together, beside what each may.
    #[serde(default)]
    pub disks_rate: Rate,
    /// Network interfaces, in the order the guest sees them.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// An inherited descriptor of `/dev/kvm`.
    pub kvm: FdNumber,
    /// An inherited listening Unix stream socket that serves the control protocol.
    #[serde(default)]
    pub control: Option<FdNumber>,
    /// An inherited descriptor to which the console's output is appended (a file or a pipe).
    #[serde(default)]
    pub console_log: Option<FdNumber>,
    /// A `console_log` that is a file, opened to append, begins anew with the console's last 64 KiB instead of growing
    /// beyond so many bytes (0: no bound; else more than 64 KiB).
    #[serde(default)]
    pub console_log_limit: u64,
    /// An inherited descriptor to which the [`Report`] is written, one line of JSON, when the machine ends.
    #[serde(default)]
    pub report: Option<FdNumber>,
    /// The user and group to become before the first guest instruction.
    #[serde(default)]
    pub run_as: Option<RunAs>,
    /// Let a guest command hand its exit code back through I/O port [`EXIT_PORT`].
    #[serde(default)]
    pub exit_port: bool,
    /// End the machine when the guest asks for a reboot, instead of rebooting.
    #[serde(default)]
    pub no_reboot: bool,
    /// End the machine when nobody can read `report` (a pipe) any more: its parent is gone.
    #[serde(default)]
    pub tethered: bool,
}

/// The I/O port of the exit device: a byte written there ends the machine with [`End::Command`] and that code. Bytes,
/// the same port and width as QEMU's isa-debug-exit, so one initrd serves both.
pub const EXIT_PORT: u16 = 0xf4;
/// Any byte written here marks in the counters that user space was reached.
pub const USER_SPACE_PORT: u16 = EXIT_PORT + 1;

/// A kernel, and what it is given.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// An inherited descriptor of the kernel: a bzImage, or an ELF file with a PVH note.
    pub kernel: FdNumber,
    /// An inherited descriptor of the initrd.
    #[serde(default)]
    pub initrd: Option<FdNumber>,
    /// The kernel's command line, at most 2047 bytes of ASCII.
    pub cmdline: String,
}

/// One virtio-blk disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// What the guest reads as the disk's serial: the volume's id without its dash (`vol0123456789abcdef0`), at most 20 bytes.
    pub serial: String,
    /// The top layer first, then its base, and so on. Formats are from our records, never probed.
    pub layers: Vec<LayerConfig>,
    /// What the parent calls the top layer; it is told in the disk's status.
    #[serde(default)]
    pub top: String,
    /// Refuse the guest's writes.
    #[serde(default)]
    pub read_only: bool,
    /// What it may do.
    #[serde(default)]
    pub rate: Rate,
}

/// How much may be done in a time: every flow holds. Without any there is no limit.
///
/// Of a disk, a read or a write is one operation for each 256 KiB begun, a discarded or zeroed range is one without
/// bytes, and a flush is free. Of a network interface an operation is a frame.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rate {
    /// Of operations.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ops: Vec<Flow>,
    /// Of bytes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bytes: Vec<Flow>,
}

/// A token bucket: it begins full, and what is done takes tokens out of it. Something larger than the bucket passes when
/// there is any token, and what comes next waits until that is paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// Tokens that it gains a second; at least 1.
    pub per_second: u64,
    /// Tokens that it holds; at least 1.
    pub burst: u64,
}

impl Rate {
    /// The most flows of a kind.
    pub const FLOWS_MAX: usize = 4;

    /// What is wrong with it, if anything is.
    pub fn wrong(&self) -> Option<&'static str> {
        if self.ops.len() > Rate::FLOWS_MAX || self.bytes.len() > Rate::FLOWS_MAX {
            return Some("its rate has more than four flows of a kind");
        }
        let idle = |flow: &Flow| flow.per_second == 0 || flow.burst == 0;
        self.ops
            .iter()
            .chain(&self.bytes)
            .any(idle)
            .then_some("a flow of its rate is 0, so that it would never do anything")
    }
}

/// One file of a disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerConfig {
    /// An inherited descriptor; open for writing on the top layer of a writable disk, else read-only.
    pub fd: FdNumber,
    /// The file's format.
    pub format: DiskFormat,
    /// What the guest's bytes in it are encrypted with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<DiskKey>,
}

/// The format of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2 version 3, made or checked by us.
    Qcow2,
}

impl From<DiskFormat> for hutch_blockdev::Format {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Raw => Self::Raw,
            DiskFormat::Qcow2 => Self::Qcow2,
        }
    }
}

/// One virtio-net interface on a tap.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The guest's hardware address, such as `02:00:00:00:00:01`.
    pub mac: String,
    /// Inherited descriptors of the tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), one a queue pair.
    pub taps: Vec<FdNumber>,
    /// The guest's MTU: 576 to 9001 bytes.
    pub mtu: u16,
    /// What it may send, and what it may receive: so much each way.
    #[serde(default)]
    pub rate: Rate,
}

/// An unprivileged identity.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunAs {
    /// User id; not 0.
    pub uid: u32,
    /// Group id; not 0.
    pub gid: u32,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "kebab-case")]
pub enum End {
    /// The guest powered off (ACPI S5), or rebooted under `no_reboot`.
    PowerOff,
    /// The guest rebooted under `no_reboot`.
    Reboot,
    /// The guest's command ended with this exit code.
    Command {
        /// 0 to 255.
        code: u8,
    },
    /// The guest's kernel panicked.
    Panic {
        /// The console line that said so.
        message: String,
    },
    /// A vCPU took a triple fault and no panic was seen.
    TripleFault,
    /// The control socket asked for it, or SIGTERM.
    Killed,
    /// The machine itself failed.
    Error {
        /// What failed and what to do next.
        message: String,
    },
}

impl End {
    /// The exit status of `hutch-vmm` for this end: 0 power-off and reboot, 65 command (the code is in the report),
    /// 66 panic, 67 triple fault, 68 killed, 70 machine error.
    pub fn status(&self) -> i32 {
        match self {
            End::PowerOff | End::Reboot => 0,
            End::Command { .. } => 65,
            End::Panic { .. } => 66,
            End::TripleFault => 67,
            End::Killed => 68,
            End::Error { .. } => 70,
        }
    }
}

impl RunAs {
    /// nobody and nogroup of Debian.
    pub const NOBODY: RunAs = RunAs { uid: 65534, gid: 65534 };
}

/// What `hutch-vmm` says when it ends.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
    /// What happened meanwhile.
    pub counters: Counters,
}

/// Counts since the machine was built, over all vCPUs and devices.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Exits to user space by kind: `pio`, `mmio`, `hlt`, `intr`, `other`.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Exits to user space until the guest marked user space at [`EXIT_PORT`], if it did.
    pub exits_to_user_space: Option<u64>,
    /// CPU time of this process until then, in microseconds.
    pub cpu_us_to_user_space: Option<u64>,
    /// Wall time until then, in microseconds.
    pub wall_us_to_user_space: Option<u64>,
    /// Reboots so far.
    pub reboots: u64,
    /// Bytes the guest wrote to its console.
    pub console_bytes: u64,
}
