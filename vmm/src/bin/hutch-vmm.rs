//! One process, one guest: reads a `MachineConfig`, takes the descriptors it names, gives up every right, runs.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use hutch_blockdev::Layer;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};

use hutch_vmm::board::{Backends, TapBackend};
use hutch_vmm::complaint::complain;
use hutch_vmm::config::{Counters, End, FdNumber, MachineConfig, Report, RunAs};
use hutch_vmm::control::Control;
use hutch_vmm::drives::Drive;
use hutch_vmm::machine::{Files, Machine};
use hutch_vmm::plan::Plan;
use hutch_vmm::rate::Limiter;
use hutch_vmm::secret;

/// Runs one virtual machine from a configuration on standard input.
///
/// The configuration is JSON and names no path: every file is a descriptor that the parent opened. `hutch boot`
/// prepares all that. Exit status: 0 power-off or reboot refused, 65 the guest's command ended, 66 kernel panic,
/// 67 triple fault, 68 killed, 70 machine error.
#[derive(Parser)]
#[command(version)]
struct Args {}

fn main() -> ExitCode {
    Args::parse();
    let mut fds = Inherited::default();
    let mut report_to = None;
    raise_limit();
    let end = run(&mut fds, &mut report_to);
    let report =
        end.unwrap_or_else(|message| Report { end: End::Error { message }, counters: Counters::default() });
    if let End::Error { message } = &report.end {
        complain(format_args!("{message}"));
    }
    if let (Some(mut file), Ok(mut line)) = (report_to, serde_json::to_string(&report)) {
        line.push('\n');
        // The parent may be gone; the exit status still tells.
        let _ = file.write_all(line.as_bytes());
    }
    ExitCode::from(report.end.status() as u8)
}

fn run(fds: &mut Inherited, report_to: &mut Option<File>) -> Result<Report, String> {
    let text = secret::read(std::io::stdin(), 1 << 20).map_err(|e| format!("configuration: {e}"))?;
    let config: MachineConfig = serde_json::from_str(&text)
        .map_err(|e| format!("the configuration on standard input is wrong: {e}"))?;
    drop(text);
    *report_to = config.report.map(|fd| fds.file(fd, "report")).transpose()?;
    let plan = Plan::new(config).map_err(|e| e.to_string())?;
    let config = plan.config();
    let files = Files {
        kvm: fds.file(config.kvm, "kvm")?,
        kernel: fds.file(config.boot.kernel, "kernel")?,
        initrd: config.boot.initrd.map(|fd| fds.file(fd, "initrd")).transpose()?,
        console_log: config.console_log.map(|fd| fds.file(fd, "console log")).transpose()?,
        backends: backends(config, fds)?,
    };
    let control = config.control.map(|fd| fds.file(fd, "control socket")).transpose()?;
    let control = control.map(|file| UnixListener::from(std::os::fd::OwnedFd::from(file)));
    if let Some(identity) = config.run_as {
        become_unprivileged(identity).map_err(|e| format!("{}: cannot give up root: {e}", config.id))?;
    }
    nix::sys::prctl::set_no_new_privs().map_err(|e| format!("{}: no-new-privs: {e}", config.id))?;

    let id = config.id.clone();
    let tether = match (plan.config().tethered, &report_to) {
        (true, Some(report)) => Some(report.try_clone().map_err(|e| format!("{id}: report: {e}"))?),
        _ => None,
    };
    let terminate = block_termination().map_err(|e| format!("{id}: signals: {e}"))?;
    let mut machine = Machine::new(plan, files).map_err(|e| e.to_string())?;
    let (console, input) = (machine.console(), machine.input());
    let (counts, devices) = (machine.counts(), machine.devices());
    let (disks_limit, nets) = (machine.disks_limit(), machine.net_limits());
    let mut trouble = None;
    let report = machine.run(|handle| {
        let killer = handle.clone();
        let wait = move || {
            if terminate.wait().is_ok() {
                killer.kill();
            }
        };
        let signals = std::thread::Builder::new().name("signals".into()).spawn(wait).map(drop);
        let killer = handle.clone();
        let hold = move |tether: File| {
            if reader_is_gone(&tether) {
                killer.kill();
            }
        };
        let tethered = tether.map_or(Ok(()), |tether| {
            std::thread::Builder::new().name("tether".into()).spawn(move || hold(tether)).map(drop)
        });
        let served = control.map_or(Ok(()), |listener| {
            let handle = handle.clone();
            Control { id: id.clone(), handle, console, input, counts, devices, disks_limit, nets }
                .serve(listener)
        });
        if let Err(e) = signals.and(tethered).and(served) {
            trouble = Some(format!("{id}: cannot start a thread: {e}"));
            handle.kill();
        }
    });
    trouble.map_or(Ok(report), Err)
}

/// Opens what the disks and interfaces run on, from inherited descriptors.
fn backends(config: &MachineConfig, fds: &mut Inherited) -> Result<Backends, String> {
    let limiter = |rate| Arc::new(Limiter::new(rate, Instant::now()));
    let mut backends = Backends { disks_limit: limiter(&config.disks_rate), ..Backends::default() };
    for disk in &config.disks {
        let layers = disk.layers.iter().map(|layer| {
            let (format, key) = (layer.format.into(), layer.key.clone().map(|key| key.0));
            Ok(Layer { file: fds.file(layer.fd, &disk.serial)?, format, key })
        });
        let layers = layers.collect::<Result<_, String>>()?;
        // The plan has checked that there are no two of one serial.
        let mut drive = Drive::open(&config.id, &disk.serial, layers, disk.read_only)?;
        drive.top.clone_from(&disk.top);
        drive.limit.set(&disk.rate, Instant::now());
        let _ = backends.drives.add(drive);
    }
    for net in &config.nets {
        let queues = net.taps.iter().map(|fd| fds.file(*fd, "tap")).collect::<Result<Vec<_>, _>>()?;
        let limits = [limiter(&net.rate), limiter(&net.rate)];
        backends.taps.push(TapBackend { queues, counts: Arc::default(), limits });
    }
    Ok(backends)
}

/// Descriptors taken over from the parent, each at most once.
#[derive(Default)]
struct Inherited(HashSet<FdNumber>);

impl Inherited {
    fn file(&mut self, fd: FdNumber, what: &str) -> Result<File, String> {
        if fd <= 2 {
            return Err(format!("{what}: descriptor {fd} is standard input, output or error"));
        }
        if !self.0.insert(fd) {
            return Err(format!("{what}: descriptor {fd} is named twice in the configuration"));
        }
        // SAFETY: `fcntl` only asks whether the number is open; a closed one is an error, not undefined behaviour.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|e| format!("{what}: descriptor {fd} was not inherited: {e}"))?;
        // SAFETY: the descriptor is open, was made by the parent for us, and the set above gives it out only once.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}

/// Waits until the reading end of a pipe is closed; false when that cannot be known.
fn reader_is_gone(pipe: &File) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    loop {
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::empty())], PollTimeout::NONE) {
            Ok(_) => return true,
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn become_unprivileged(identity: RunAs) -> nix::Result<()> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setgroups(&[])?;
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

/// Each disk takes a descriptor a file and three a queue: the process may have as many as the system lets it.
fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(e) = raised {
        complain(format_args!(
            "its limit of open files stays as it is: {e}; it may be too low for many disks"
        ));
    }
}

/// Blocks SIGTERM and SIGINT in every thread to come, so that one thread can wait for them.
fn block_termination() -> nix::Result<SigSet> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.thread_block()?;
    Ok(set)
}
