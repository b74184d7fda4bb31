//! `hutch boot`: one machine in the foreground, without any daemon.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, bail};
use hutch_netfw::GuestNet;
use hutch_vmm::config::{BootConfig, DiskConfig, End, MachineConfig, NetConfig, Report, RunAs};
use nix::sys::signal::{Signal, kill};

use crate::disks::{self, DiskArg};
use crate::image;
use crate::ssh;
use crate::vmm::{Inherit, Vmm};

/// Exit status: the machine could not be built or failed.
pub const MACHINE_ERROR: u8 = 240;
const PANIC: u8 = 241;
const TRIPLE_FAULT: u8 = 242;
const TIMEOUT: u8 = 243;
const KILLED: u8 = 244;
/// How much of the console is shown when a guest did not end well.
const LAST_LINES: usize = 50;
/// nobody and nogroup of Debian: the rights a machine runs with when hutch is started by root.
const NOBODY: RunAs = RunAs { uid: 65534, gid: 65534 };

/// Where networks are recorded while they are up.
pub const RUN_DIR: &str = "/run/hutch";
/// The MTU of a guest's link, in bytes.
const MTU: u16 = 1500;

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
    #[arg(value_name = "IMAGE", required_unless_present = "kernel")]
    image: Option<PathBuf>,
    /// Keep the root disk in FILE, a volume on IMAGE; made when it is not there yet. Without this, what the guest writes
    /// is forgotten at the end.
    #[arg(long, value_name = "FILE", requires = "image")]
    root_volume: Option<PathBuf>,
    /// The kernel: a bzImage, such as /boot/vmlinuz of a distribution. Without it, what IMAGE's boot loader would load.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The initrd.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// One more disk: a .qcow2 volume, or anything else as raw; `:ro` is only read, `:ephemeral` forgets what is written.
    #[arg(long = "disk", value_name = "FILE[:ro|:ephemeral]")]
    disks: Vec<DiskArg>,
    /// More words for the kernel's command line; the serial console is always there.
    #[arg(long, value_name = "TEXT", default_value = "")]
    append: String,
    /// Virtual CPUs, 1 to 32.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// Back memory with huge pages reserved on the host.
    #[arg(long)]
    hugepages: bool,
    /// The network: a tap of its own, routed, with DHCP, NAT out and ssh in from this host; or none. [default: tap for an
    /// IMAGE, none for a --kernel]
    #[arg(long)]
    net: Option<NetArg>,
    /// A public SSH key (FILE.pub) that may log in; by default hutch's own, which `hutch ssh` uses.
    #[arg(long, value_name = "FILE", requires = "image")]
    key: Option<PathBuf>,
    /// End the machine after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// End the machine when the guest reboots.
    #[arg(long)]
    no_reboot: bool,
    /// Print how the machine ended and its counters, as JSON, to standard error.
    #[arg(long)]
    report: bool,
    /// Do not print the console (its last lines are still shown when the guest fails).
    #[arg(long, short)]
    quiet: bool,
    /// A command that hutch's own init runs in the guest; its exit status becomes hutch's.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the machine to its end.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut inherit = Inherit::default();
    let (console, console_log) = inherit.pipe()?;
    let (report, report_fd) = inherit.pipe()?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.context("cannot open /dev/kvm; `hutch doctor` tells what to do")?;
    let (boot, disks) = boot_and_disks(args, &mut inherit)?;
    // The network lives as long as this does: it goes when the machine has ended.
    let (net, nets) = network(args, &mut inherit)?;
    let config = MachineConfig {
        id: format!("i-{:017x}", uuid::Uuid::new_v4().as_u128() >> 60),
        uuid: format!("ec2{}", &uuid::Uuid::new_v4().to_string()[3..]),
        cpus: args.cpus,
        memory_mib: args.memory,
        hugepages: args.hugepages,
        boot,
        disks,
        nets,
        kvm: inherit.give(kvm.into())?,
        control: None,
        console_log: Some(console_log),
        console_log_limit: 0,
        report: Some(report_fd),
        run_as: nix::unistd::geteuid().is_root().then_some(NOBODY),
        exit_port: true,
        no_reboot: args.no_reboot,
        tethered: true,
    };
    hutch_vmm::plan::Plan::new(config.clone())?;
    if let Some(net) = &net {
        eprintln!("hutch: {} has address {}", config.id, net.ip);
    }
    let vmm = Vmm::start(&config, inherit, report)?;

    let timed_out = AtomicBool::new(false);
    let (over, ended) = mpsc::channel::<()>();
    let (report, tail) = std::thread::scope(|scope| {
        let pid = vmm.pid();
        let timed_out = &timed_out;
        if let Some(seconds) = args.timeout {
            scope.spawn(move || {
                let waited = ended.recv_timeout(Duration::from_secs(seconds));
                if waited == Err(mpsc::RecvTimeoutError::Timeout) {
                    timed_out.store(true, Ordering::Relaxed);
                    // It fails only when the machine has just ended by itself.
                    let _ = kill(pid, Signal::SIGTERM);
                }
            });
        }
        let tail = scope.spawn(move || follow(console, args.quiet));
        let report = vmm.wait();
        drop(over);
        (report, tail.join().unwrap_or_default())
    });
    let report = report?;
    if args.report {
        eprintln!("{}", serde_json::to_string(&report)?);
    }
    Ok(ExitCode::from(verdict(&report, timed_out.into_inner(), args, &tail)))
}

/// Says how it ended, where that is not plain, and gives the exit status.
fn verdict(report: &Report, timed_out: bool, args: &Args, tail: &str) -> u8 {
    let (status, what) = match &report.end {
        End::PowerOff | End::Reboot => return 0,
        End::Command { code } => return *code,
        End::Panic { message } => (PANIC, format!("the guest's kernel panicked: {message}")),
        End::TripleFault => (TRIPLE_FAULT, "the guest's processor shut down (triple fault)".into()),
        End::Killed if timed_out => {
            (TIMEOUT, format!("the guest did not end within {} s", args.timeout.unwrap_or_default()))
        }
        End::Killed => (KILLED, "the machine was killed".into()),
        // hutch-vmm has said it.
        End::Error { .. } => return MACHINE_ERROR,
    };
    eprintln!("hutch: {what}; the console's last lines:\n{tail}");
    status
}

/// The machine's network, up.
fn network(args: &Args, inherit: &mut Inherit) -> anyhow::Result<(Option<GuestNet>, Vec<NetConfig>)> {
    let default = if args.image.is_some() { NetArg::Tap } else { NetArg::None };
    if args.net.unwrap_or(default) == NetArg::None {
        return Ok((None, vec![]));
    }
    let mut net = GuestNet::up(Path::new(RUN_DIR), 1, MTU, name_servers())?;
    let taps = net.take_taps().into_iter().map(|tap| inherit.give(tap.into()));
    let taps = taps.collect::<anyhow::Result<Vec<_>>>()?;
    let config = NetConfig { mac: net.mac.to_string(), taps, mtu: MTU };
    Ok((Some(net), vec![config]))
}

/// The host's name servers, but for those that only the host can reach.
fn name_servers() -> Vec<Ipv4Addr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
    servers.filter(|ip: &Ipv4Addr| !ip.is_loopback()).take(3).collect()
}

/// What the machine boots, and its disks: the image's first, then the others in the order they were named.
fn boot_and_disks(args: &Args, inherit: &mut Inherit) -> anyhow::Result<(BootConfig, Vec<DiskConfig>)> {
    let mut disks = Vec::new();
    let mut guest = None;
    let serial = |index: usize| format!("vol{index:017x}");
    if let Some(image) = &args.image {
        let image = &image::disk(image)?;
        let layers = disks::root_layers(image, args.root_volume.as_deref())?;
        if args.kernel.is_none() {
            let disk = disks::open(&layers).with_context(|| format!("the image {}", image.display()))?;
            let files = hutch_imagestore::boot::read(&disk);
            guest = Some(files.with_context(|| format!("cannot boot the image {}", image.display()))?);
        }
        disks.push(disks::give(layers, serial(0), false, inherit)?);
    }
    for arg in &args.disks {
        disks.push(disks::give(disks::layers(arg)?, serial(disks.len()), arg.read_only(), inherit)?);
    }
    let boot = match (&args.kernel, guest) {
        (Some(kernel), _) => BootConfig {
            kernel: inherit.open(kernel, "kernel")?,
            initrd: args.initrd.as_deref().map(|p| inherit.open(p, "initrd")).transpose()?,
            cmdline: cmdline(args, "console=ttyS0 panic=1")?,
        },
        (None, Some(files)) => BootConfig {
            kernel: inherit.bytes(&files.kernel)?,
            initrd: (!files.initrd.is_empty()).then(|| inherit.bytes(&files.initrd)).transpose()?,
            cmdline: {
                let own = hutch_imagestore::boot::with_serial_console(&files.entry.cmdline);
                cmdline(args, &format!("{own} hutch.key={}", ssh::public_key(args.key.as_deref())?))?
            },
        },
        (None, None) => bail!("nothing to boot: name an IMAGE or a --kernel"),
    };
    Ok((boot, disks))
}

fn cmdline(args: &Args, first: &str) -> anyhow::Result<String> {
    let mut words = vec![first.trim().to_owned(), args.append.trim().to_owned()];
    if !args.command.is_empty() {
        words.push("quiet".into());
        words.push(format!("hutch.cmd={}", hex(&args.command)));
    }
    words.retain(|w| !w.is_empty());
    let line = words.join(" ");
    if line.len() > hutch_vmm::plan::CMDLINE_MAX {
        bail!(
            "the kernel's command line is {} bytes long, {} at most; shorten --append or the command",
            line.len(),
            hutch_vmm::plan::CMDLINE_MAX
        );
    }
    Ok(line)
}

/// The arguments as hutch's init reads them: hexadecimal, a NUL after each.
fn hex(command: &[String]) -> String {
    command.iter().flat_map(|word| word.bytes().chain([0])).map(|b| format!("{b:02x}")).collect()
}

/// Prints the console until it ends and returns its last lines.
fn follow(mut console: File, quiet: bool) -> String {
    let mut last = VecDeque::from([Vec::new()]);
    let mut buffer = [0; 4096];
    let mut out = io::stdout();
    while let Ok(n @ 1..) = console.read(&mut buffer) {
        if !quiet {
            // Whoever read our output may be gone; the guest goes on.
            let _ = out.write_all(&buffer[..n]).and_then(|()| out.flush());
        }
        for &b in &buffer[..n] {
            if b == b'\n' {
                last.push_back(Vec::new());
                if last.len() > LAST_LINES + 1 {
                    last.pop_front();
                }
            } else if let Some(line) = last.back_mut().filter(|l| l.len() < 1024) {
                line.push(b);
            }
        }
    }
    let lines: Vec<_> = last.iter().map(|l| String::from_utf8_lossy(l).trim_end().to_owned()).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_encoded_as_init_reads_them() {
        assert_eq!(hex(&["ls".into(), "-l bé".into()]), "6c73002d6c2062c3a900");
    }
}
