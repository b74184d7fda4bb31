//! PID 1 of hutch's own initrd: loads the modules the initrd lists, mounts a root read-only under a tmpfs overlay when
//! asked, runs one command, and hands its exit code to the machine.

mod plan;
mod port;

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

/// The machine's ports (`vmm`'s `EXIT_PORT` and `USER_SPACE_PORT`); both take bytes.
const EXIT_PORT: u16 = 0xf4;
const USER_SPACE_PORT: u16 = 0xf5;
/// Codes of shells: the command was not found, or could not be run; init itself failed.
const NOT_FOUND: u8 = 127;
const NOT_RUN: u8 = 126;
const INIT_FAILED: u8 = 125;

fn main() {
    if std::process::id() != 1 {
        eprintln!("hutch-init is the first process of a guest, nothing to run by hand");
        std::process::exit(2);
    }
    let mut ports = true;
    let code = run(&mut ports).unwrap_or_else(|e| {
        eprintln!("hutch-init: {e}");
        INIT_FAILED
    });
    // Where there is no exit port this write is lost, and the power-off below ends the machine.
    if ports {
        let _ = port::out(EXIT_PORT, code);
    }
    nix::unistd::sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    // PID 1 must not end: the kernel would panic.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// What the machine was started for; `ports` becomes whether its ports may be used.
fn run(ports: &mut bool) -> io::Result<u8> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/run")] {
        fs::create_dir_all(at)?;
        match mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>) {
            Err(nix::Error::EBUSY) | Ok(()) => {}
            Err(e) => return Err(io::Error::other(format!("cannot mount {kind} at {at}: {e}"))),
        }
    }
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let plan = plan::Plan::parse(&cmdline)
        .map_err(|e| io::Error::other(format!("the kernel's command line: {e:?}")))?;
    *ports = !plan.no_ports;
    if *ports {
        let _ = port::out(USER_SPACE_PORT, 1);
    }
    println!("hutch-init: user space reached");
    load_modules(Path::new("/modules"))?;
    if let Some(device) = &plan.root {
        enter_root(device, plan.start)?;
    }
    match plan.command.split_first() {
        None => Ok(0),
        Some((program, args)) => Ok(command(program, args, plan.console.as_deref())),
    }
}

/// Loads the modules in the order of `list`; one that fails is named, and the rest go on. Without a list this is a
/// distribution's initrd, which has a modprobe, or a kernel that has all it needs.
fn load_modules(dir: &Path) -> io::Result<()> {
    let list = match fs::read_to_string(dir.join("list")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            modprobe(&["-a", "virtio_pci", "virtio_blk", "ext4", "overlay"]);
            return Ok(());
        }
        list => list?,
    };
    for name in list.lines().filter(|l| !l.is_empty()) {
        let file = File::open(dir.join(name))?;
        match finit_module(&file, &CString::default(), ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(e) => eprintln!("hutch-init: module {name}: {e}"),
        }
    }
    Ok(())
}

/// Runs the initrd's modprobe, if it has one. What is missing shows when it is used.
fn modprobe(args: &[&str]) {
    let program = ["/sbin/modprobe", "/usr/sbin/modprobe"].into_iter().find(|path| Path::new(path).exists());
    if let Some(program) = program {
        let _ = Command::new(program).arg("-q").args(args).stdin(Stdio::null()).status();
    }
}

/// File systems that a root may have, with what keeps them from writing to a device that cannot be written.
const FILE_SYSTEMS: [(&str, Option<&str>); 5] = [
    ("ext4", Some("noload")),
    ("xfs", Some("norecovery")),
    ("btrfs", None),
    ("erofs", None),
    ("squashfs", None),
];

/// Makes the root on `device` ours, read-only under an overlay in memory: whatever the command writes is gone with the
/// machine.
fn enter_root(device: &str, start: u64) -> io::Result<()> {
    let device = block_device(device, start)?;
    for dir in ["/run/lower", "/run/upper", "/run/root"] {
        fs::create_dir_all(dir)?;
    }
    let none = None::<&str>;
    let mounted = FILE_SYSTEMS.iter().any(|(kind, options)| {
        mount(Some(device.as_str()), "/run/lower", Some(*kind), MsFlags::MS_RDONLY, *options).is_ok()
    });
    if !mounted {
        return Err(io::Error::other(format!(
            "{device} has no file system that this kernel and initrd can mount"
        )));
    }
    mount(Some("tmpfs"), "/run/upper", Some("tmpfs"), MsFlags::empty(), none)?;
    for dir in ["/run/upper/data", "/run/upper/work"] {
        fs::create_dir_all(dir)?;
    }
    let layers = "lowerdir=/run/lower,upperdir=/run/upper/data,workdir=/run/upper/work";
    let overlay = || mount(Some("overlay"), "/run/root", Some("overlay"), MsFlags::empty(), Some(layers));
    if overlay().is_err() {
        // Distributions leave it out of their initrds; the root has it.
        modprobe(&["-d", "/run/lower", "overlay"]);
        overlay().map_err(|e| io::Error::other(format!("cannot mount an overlay on {device}: {e}")))?;
    }
    for dir in ["dev", "proc", "sys"] {
        let at = format!("/run/root/{dir}");
        fs::create_dir_all(&at)?;
        mount(Some(format!("/{dir}").as_str()), at.as_str(), none, MsFlags::MS_MOVE, none)?;
    }
    nix::unistd::chroot("/run/root")?;
    std::env::set_current_dir("/")
}

/// The device, or its partition that begins at `start`, as soon as the kernel has found it.
fn block_device(device: &str, start: u64) -> io::Result<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let found = if start == 0 { Some(device.to_owned()) } else { partition(device, start) };
        if let Some(path) = found.filter(|path| Path::new(path).exists()) {
            return Ok(path);
        }
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("{device} did not appear within 10 s (sector {start})")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The partition of `device` that begins at this sector, as sysfs tells.
fn partition(device: &str, start: u64) -> Option<String> {
    let disk = Path::new("/sys/class/block").join(Path::new(device).file_name()?);
    fs::read_dir(disk).ok()?.flatten().find_map(|entry| {
        let at = fs::read_to_string(entry.path().join("start")).ok()?;
        (at.trim().parse() == Ok(start)).then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}

/// Runs the command to its end; a signal's number n becomes 128 + n, as shells do.
fn command(program: &str, args: &[String], console: Option<&str>) -> u8 {
    let mut command = Command::new(program);
    command.args(args);
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("HOME", "/root").stdin(Stdio::null());
    let terminal = console.map(|name| File::options().read(true).write(true).open(format!("/dev/{name}")));
    match terminal {
        Some(Ok(terminal)) => {
            command.env("TERM", "vt220");
            // Its output is the terminal's too, so that a shell finds itself interactive.
            for set in [Command::stdin, Command::stdout, Command::stderr] {
                if let Ok(copy) = terminal.try_clone() {
                    set(&mut command, copy);
                }
            }
            port::controlled(&mut command);
        }
        Some(Err(e)) => eprintln!("hutch-init: the console: {e}"),
        None => {}
    }
    match command.status() {
        Ok(status) => {
            let code = status.code().or_else(|| status.signal().map(|s| 128 + s));
            code.and_then(|c| u8::try_from(c).ok()).unwrap_or(INIT_FAILED)
        }
        Err(e) => {
            eprintln!("hutch-init: {program}: {e}");
            if e.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_RUN }
        }
    }
}
