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
        .map_err(|e| io::Error::other(format!("hutch.cmd on the kernel's command line: {e:?}")))?;
    *ports = !plan.no_ports;
    if *ports {
        let _ = port::out(USER_SPACE_PORT, 1);
    }
    println!("hutch-init: user space reached");
    load_modules(Path::new("/modules"))?;
    if let Some(device) = &plan.root {
        enter_root(device)?;
    }
    match plan.command.split_first() {
        None => Ok(0),
        Some((program, args)) => Ok(command(program, args)),
    }
}

/// Loads the modules in the order of `list`; one that fails is named, and the rest go on.
fn load_modules(dir: &Path) -> io::Result<()> {
    let list = match fs::read_to_string(dir.join("list")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
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

/// Makes `device` the root, read-only under an overlay in memory: whatever the command writes is gone with the machine.
fn enter_root(device: &str) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !Path::new(device).exists() {
        if Instant::now() > deadline {
            return Err(io::Error::other(format!("{device} did not appear within 10 s")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    for dir in ["/run/lower", "/run/upper", "/run/root"] {
        fs::create_dir_all(dir)?;
    }
    let none = None::<&str>;
    mount(Some(device), "/run/lower", Some("ext4"), MsFlags::MS_RDONLY, Some("noload"))?;
    mount(Some("tmpfs"), "/run/upper", Some("tmpfs"), MsFlags::empty(), none)?;
    for dir in ["/run/upper/data", "/run/upper/work"] {
        fs::create_dir_all(dir)?;
    }
    let layers = "lowerdir=/run/lower,upperdir=/run/upper/data,workdir=/run/upper/work";
    mount(Some("overlay"), "/run/root", Some("overlay"), MsFlags::empty(), Some(layers))?;
    for dir in ["dev", "proc", "sys"] {
        let at = format!("/run/root/{dir}");
        fs::create_dir_all(&at)?;
        mount(Some(format!("/{dir}").as_str()), at.as_str(), none, MsFlags::MS_MOVE, none)?;
    }
    nix::unistd::chroot("/run/root")?;
    std::env::set_current_dir("/")
}

/// Runs the command to its end; a signal's number n becomes 128 + n, as shells do.
fn command(program: &str, args: &[String]) -> u8 {
    let child = Command::new(program)
        .args(args)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .stdin(Stdio::null())
        .status();
    match child {
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
