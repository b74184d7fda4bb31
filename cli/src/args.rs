//! What `hutch boot` may be told.

use std::path::PathBuf;

use crate::disks::DiskArg;

/// What `--net` may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NetArg {
    /// A tap.
    Tap,
    /// No interface.
    None,
}

/// Arguments of `hutch boot`.
///
/// The exit status is the guest command's own, or 0 when the guest powers off; 240: machine error, 241: the guest's
/// kernel panicked, 242: triple fault, 243: timeout, 244: killed.
#[derive(clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// The image to boot: an imported one by id or name, or a file: .qcow2, or a raw one by any other name. It is never
    /// written.
    #[arg(value_name = "IMAGE", required_unless_present_any = ["kernel", "root"])]
    pub image: Option<PathBuf>,
    /// Run COMMAND in this root instead of booting it: an image, or a directory, of which a copy is made. hutch's own init
    /// mounts it; it is never written, what COMMAND writes is forgotten.
    #[arg(long, value_name = "IMAGE|DIR", conflicts_with = "image", requires = "command")]
    pub root: Option<PathBuf>,
    /// Keep the root disk in FILE, a volume on IMAGE; made when it is not there yet. Without this, what the guest writes
    /// is forgotten at the end.
    #[arg(long, value_name = "FILE", requires = "image")]
    pub root_volume: Option<PathBuf>,
    /// The kernel: a bzImage, such as /boot/vmlinuz of a distribution, or an ELF file with a PVH entry (vmlinux). Without it,
    /// what IMAGE's boot loader would load.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The initrd.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// One more disk: a .qcow2 volume, or anything else as raw; `:ro` is only read, `:ephemeral` forgets what is written.
    #[arg(long = "disk", value_name = "FILE[:ro|:ephemeral]")]
    pub disks: Vec<DiskArg>,
    /// More words for the kernel's command line; the serial console is always there.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub append: String,
    /// An instance type, such as t3.micro, for CPUs and memory.
    #[arg(long = "type", value_name = "TYPE", conflicts_with_all = ["cpus", "memory"])]
    pub instance_type: Option<String>,
    /// Virtual CPUs, 1 to 32.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub memory: u64,
    /// Back memory with huge pages reserved on the host.
    #[arg(long)]
    pub hugepages: bool,
    /// The network: a tap of its own, routed, with DHCP, NAT out and ssh in from this host; or none. [default: tap for an
    /// IMAGE, none for a --kernel]
    #[arg(long)]
    pub net: Option<NetArg>,
    /// Put the network into this network namespace, made (and deleted at the end) when it is not there.
    #[arg(long, value_name = "NAME")]
    pub netns: Option<String>,
    /// A public SSH key (FILE.pub) that may log in; by default hutch's own, which `hutch ssh` uses.
    #[arg(long, value_name = "FILE", requires = "image")]
    pub key: Option<PathBuf>,
    /// User data, for cloud-init: a script or a #cloud-config, of 16 KiB at most. The guest asks for them at
    /// 169.254.169.254, as on EC2.
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Make a control socket here, for `hutch control`.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Lead what is typed here to the machine's console, and to COMMAND if there is one. On a terminal, Ctrl-] ends the
    /// machine.
    #[arg(long, conflicts_with = "quiet")]
    pub console: bool,
    /// End the machine after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// End the machine when the guest reboots.
    #[arg(long)]
    pub no_reboot: bool,
    /// Print how the machine ended and its counters, as JSON, to standard error.
    #[arg(long)]
    pub report: bool,
    /// Do not print the console (its last lines are still shown when the guest fails).
    #[arg(long, short)]
    pub quiet: bool,
    /// A command that hutch's own init runs in the guest, in the --root or in an initrd that has this init; its exit status
    /// becomes hutch's.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}
