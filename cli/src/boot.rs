//! `hutch boot`: one machine in the foreground, without any daemon.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use hutch_cloud::types::{InstanceType, Table};
use hutch_netfw::guest::{self, GuestNet, MTU, name_servers};
use hutch_vmm::config::{End, MachineConfig, NetConfig, Rate, Report, RunAs};
use hutch_vmm::launch::Inherit;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::args::{Args, NetArg};
use crate::attach;
use crate::metadata;
use crate::netns;
use crate::source::Disks;
use crate::vmm::Vmm;

/// Exit status: the machine could not be built or failed.
pub const MACHINE_ERROR: u8 = 240;
const PANIC: u8 = 241;
const TRIPLE_FAULT: u8 = 242;
const TIMEOUT: u8 = 243;
const KILLED: u8 = 244;
/// How much of the console is shown when a guest did not end well.
const LAST_LINES: usize = 50;

/// Runs the machine to its end, and anew when it reboots.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    // Before there are threads: each would be in a namespace of its own.
    let _namespace = args.netns.as_deref().map(netns::enter).transpose()?;
    let signals = Signals::hold()?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.context("cannot open /dev/kvm; `hutch doctor` tells what to do")?;
    let size = size(args)?;
    let mut metadata = metadata::describe(
        args.image.as_deref(),
        args.instance_type.as_deref().unwrap_or_default(),
        args.key.as_deref(),
        args.user_data.as_deref(),
    )?;
    let disks = Disks::open(args)?;
    let id = format!("i-{:017x}", uuid::Uuid::new_v4().as_u128() >> 60);
    let own_socket = || std::env::temp_dir().join(format!("hutch-{id}"));
    let socket = args.control.clone().or_else(|| args.console.then(own_socket));
    let socket = socket.as_deref().map(Socket::bind).transpose()?;
    let uuid = format!("ec2{}", &uuid::Uuid::new_v4().to_string()[3..]);
    metadata.instance_id.clone_from(&id);
    // Whatever can be refused is refused before anything on the host is changed.
    disks.boot(args, &mut Inherit::default())?;
    // The network lives as long as this does: it goes when the machine has ended.
    let (mut net, taps) = network(args, size.vcpus)?;
    // It answers before the first virtual CPU runs.
    let _metadata = net.as_mut().map(|net| metadata::Service::start(net, metadata)).transpose()?;
    if let Some(net) = &net {
        eprintln!("hutch: {id} has address {}", net.ip);
    }
    // The signal goes the way of Ctrl-C elsewhere. It fails only when this process ends anyway.
    let end = || {
        let _ = kill(Pid::this(), Signal::SIGTERM);
    };
    let keyboard = args.console.then(|| attach::Keyboard::open(end)).transpose()?;
    let deadline = args.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    loop {
        let mut inherit = Inherit::default();
        let (console, console_log) = inherit.pipe()?;
        let (report, report_fd) = inherit.pipe()?;
        let config = MachineConfig {
            id: id.clone(),
            uuid: uuid.clone(),
            cpus: size.vcpus,
            memory_mib: size.memory_mib,
            hugepages: args.hugepages,
            boot: disks.boot(args, &mut inherit)?,
            disks: disks.give(&mut inherit)?,
            disks_rate: Rate::default(),
            nets: nets(net.as_ref(), &taps, &mut inherit)?,
            kvm: inherit.lend(&kvm)?,
            control: socket.as_ref().map(|socket| inherit.lend(&socket.listener)).transpose()?,
            console_log: Some(console_log),
            console_log_limit: 0,
            report: Some(report_fd),
            run_as: nix::unistd::geteuid().is_root().then_some(RunAs::NOBODY),
            exit_port: true,
            // An image's kernel is read off its disk at every start, so that the one upgraded in the guest boots next.
            no_reboot: args.no_reboot || disks.has_own_kernel(args),
            tethered: true,
        };
        hutch_vmm::plan::Plan::new(config.clone())?;
        let vmm = Vmm::start(&config, inherit, report)?;
        if let (Some(keyboard), Some(socket)) = (&keyboard, &socket) {
            keyboard.attach(&socket.path)?;
        }
        let ended = attend(vmm, console, args, deadline, &signals)?;
        if args.report {
            eprintln!("{}", serde_json::to_string(&ended.report)?);
        }
        if ended.report.end == End::Reboot && !args.no_reboot {
            continue;
        }
        return Ok(ExitCode::from(verdict(&ended, args)));
    }
}

/// How one run of the machine went.
struct Ended {
    report: Report,
    timed_out: bool,
    /// The console's last lines.
    tail: String,
}

/// Stays with a running machine: shows its console, passes signals on, ends it at the deadline.
fn attend(
    vmm: Vmm,
    console: File,
    args: &Args,
    deadline: Option<Instant>,
    signals: &Signals,
) -> anyhow::Result<Ended> {
    let timed_out = AtomicBool::new(false);
    let (over, ended) = mpsc::channel::<()>();
    let pid = vmm.pid();
    signals.pass_to(Some(pid));
    let (report, tail) = std::thread::scope(|scope| {
        let timed_out = &timed_out;
        if let Some(deadline) = deadline {
            scope.spawn(move || {
                let waited = ended.recv_timeout(deadline.saturating_duration_since(Instant::now()));
                if waited == Err(mpsc::RecvTimeoutError::Timeout) {
                    timed_out.store(true, Ordering::Relaxed);
                    // It fails only when the machine has just ended by itself.
                    let _ = kill(pid, Signal::SIGTERM);
                }
            });
        }
        let tail = scope.spawn(move || follow(console, args.quiet));
        let report = vmm.wait();
        signals.pass_to(None);
        drop(over);
        (report, tail.join().unwrap_or_default())
    });
    Ok(Ended { report: report?, timed_out: timed_out.into_inner(), tail })
}

/// SIGINT and SIGTERM, held back from this process, which has to put the host in order, and passed to the machine.
struct Signals(Arc<Mutex<Option<Pid>>>);

impl Signals {
    fn hold() -> anyhow::Result<Signals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGINT);
        set.add(Signal::SIGTERM);
        set.thread_block()?;
        let to = Arc::new(Mutex::new(None));
        let current = to.clone();
        let pass = move || {
            while set.wait().is_ok() {
                match *current.lock().unwrap_or_else(PoisonError::into_inner) {
                    // It fails only when the machine has just ended by itself.
                    Some(pid) => drop(kill(pid, Signal::SIGTERM)),
                    None => std::process::exit(KILLED.into()),
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(pass)?;
        Ok(Signals(to))
    }

    fn pass_to(&self, pid: Option<Pid>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = pid;
    }
}

/// The control socket, gone at the end.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    fn bind(path: &Path) -> anyhow::Result<Socket> {
        let listener = UnixListener::bind(path);
        let listener = listener.with_context(|| format!("cannot make the socket {}", path.display()))?;
        Ok(Socket { listener, path: path.to_owned() })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Says how it ended, where that is not plain, and gives the exit status.
fn verdict(ended: &Ended, args: &Args) -> u8 {
    let (status, what) = match &ended.report.end {
        End::PowerOff | End::Reboot => return 0,
        End::Command { code } => return *code,
        End::Panic { message } => (PANIC, format!("the guest's kernel panicked: {message}")),
        End::TripleFault => (TRIPLE_FAULT, "the guest's processor shut down (triple fault)".into()),
        End::Killed if ended.timed_out => {
            (TIMEOUT, format!("the guest did not end within {} s", args.timeout.unwrap_or_default()))
        }
        End::Killed => (KILLED, "the machine was killed".into()),
        // hutch-vmm has said it.
        End::Error { .. } => return MACHINE_ERROR,
    };
    eprintln!("hutch: {what}; the console's last lines:\n{}", ended.tail);
    status
}

/// The machine's processors and memory.
fn size(args: &Args) -> anyhow::Result<InstanceType> {
    match &args.instance_type {
        Some(name) => Ok(Table::built_in().get(name)?.clone()),
        None => Ok(InstanceType { vcpus: args.cpus, memory_mib: args.memory, ..InstanceType::default() }),
    }
}

/// The machine's network, up, and its tap's queues.
fn network(args: &Args, vcpus: u32) -> anyhow::Result<(Option<GuestNet>, Vec<File>)> {
    let default = if args.image.is_some() { NetArg::Tap } else { NetArg::None };
    if args.net.unwrap_or(default) == NetArg::None {
        return Ok((None, vec![]));
    }
    let mut net = GuestNet::up(&guest::records_dir()?, guest::queues(vcpus), MTU, name_servers())?;
    let taps = net.take_taps();
    Ok((Some(net), taps))
}

/// The interfaces as the machine is told of them.
fn nets(net: Option<&GuestNet>, taps: &[File], inherit: &mut Inherit) -> anyhow::Result<Vec<NetConfig>> {
    let Some(net) = net else { return Ok(vec![]) };
    let taps = taps.iter().map(|tap| inherit.lend(tap)).collect::<Result<Vec<_>, _>>()?;
    Ok(vec![NetConfig { mac: net.mac.to_string(), taps, mtu: MTU, rate: Rate::default() }])
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
