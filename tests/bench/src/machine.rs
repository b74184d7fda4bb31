//! A guest under hutch or QEMU: the same kernel, initrd, memory and command, its console line by line.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

use crate::All;
use crate::peers::Peer;
use crate::table::HUTCH;

/// Guest memory, in MiB.
const MEMORY_MIB: u64 = 512;
/// How long a guest may take, in seconds.
const LIMIT: u64 = 240;

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm<'a> {
    /// `hutch boot`.
    Hutch,
    /// QEMU's small machine.
    Microvm,
    /// QEMU's PC.
    Q35,
    /// A program named from outside.
    Peer(&'a Peer),
}

impl<'a> Vmm<'a> {
    /// Its name in the table.
    pub fn name(self) -> &'a str {
        match self {
            Vmm::Hutch => HUTCH,
            Vmm::Microvm => "qemu-microvm",
            Vmm::Q35 => "qemu-q35",
            Vmm::Peer(peer) => &peer.name,
        }
    }
}

/// A disk of the guest.
pub struct DiskFile {
    /// The file.
    pub path: PathBuf,
    /// The template below, which makes the file a qcow2 volume; otherwise it is raw.
    pub base: Option<PathBuf>,
}

/// What the guest is.
pub struct Guest<'a> {
    /// Its initrd.
    pub initrd: &'a Path,
    /// What our init runs in it.
    pub command: &'a [&'a str],
    /// Its disk, if any.
    pub disk: Option<&'a DiskFile>,
    /// Its memory is on the host's huge pages, so that it does not count as the VMM's.
    pub huge: bool,
    /// It has an interface on a tap: hutch's own, or the one made for QEMU.
    pub tap: bool,
}

/// A guest that runs; killed when dropped.
pub struct Machine {
    child: Child,
    console: BufReader<ChildStdout>,
    /// The process that runs the guest.
    pub vmm: Pid,
    /// When it was started.
    pub started: Instant,
}

impl Machine {
    /// Starts it.
    ///
    /// # Errors
    /// The program is not there, or ends before it runs a guest.
    pub fn start(who: Vmm, guest: &Guest, all: &All) -> anyhow::Result<Machine> {
        if guest.huge {
            reserve_huge_pages(MEMORY_MIB / 2 + 8)?;
        }
        let mut command = Command::new("timeout");
        command.arg(LIMIT.to_string());
        match who {
            Vmm::Hutch => hutch(&mut command, guest, all),
            Vmm::Microvm | Vmm::Q35 => qemu(&mut command, who, guest, all),
            Vmm::Peer(peer) => other(&mut command, peer, guest, all),
        }
        let started = Instant::now();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let console = BufReader::new(child.stdout.take().context("the console is piped")?);
        let mut machine = Machine { child, console, vmm: Pid::from_raw(0), started };
        machine.vmm = machine.find().with_context(|| format!("{} did not start", who.name()))?;
        Ok(machine)
    }

    /// The process below ours that has a virtual machine.
    fn find(&mut self) -> anyhow::Result<Pid> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended at once ({status})");
            }
            let mut pid = self.child.id() as i32;
            while let Some(child) = child_of(pid) {
                pid = child;
                if has_machine(pid) {
                    return Ok(Pid::from_raw(pid));
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("no process with a virtual machine within 20 s");
    }

    /// Reads the console up to a line that contains `text`, and returns that line.
    ///
    /// # Errors
    /// The console ended before.
    pub fn wait_line(&mut self, text: &str) -> anyhow::Result<String> {
        let mut last = Vec::new();
        loop {
            let mut line = Vec::new();
            if self.console.read_until(b'\n', &mut line)? == 0 {
                bail!("the guest ended before it said \"{text}\"; it said:\n{}", last.concat());
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            if line.contains(text) {
                return Ok(line);
            }
            last.push(line);
            last.drain(..last.len().saturating_sub(30));
        }
    }

    /// The CPU seconds of the process that runs the guest, so far.
    ///
    /// # Errors
    /// It has ended.
    pub fn cpu(&self) -> anyhow::Result<f64> {
        let clock = clock_getcpuclockid(self.vmm).context("the machine has ended")?;
        Ok(Duration::from(clock_gettime(clock)?).as_secs_f64())
    }

    /// Its threads.
    ///
    /// # Errors
    /// It has ended.
    pub fn threads(&self) -> anyhow::Result<Vec<Pid>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.vmm)).context("the machine has ended")?;
        let name = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw);
        Ok(tasks.filter_map(Result::ok).filter_map(name).collect())
    }

    /// The process' memory beside the guest's, in MiB: its proportional set, in which huge pages do not count.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> anyhow::Result<f64> {
        let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", self.vmm));
        let text = text.context("the machine has ended")?;
        let pss = text.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next());
        let pss: f64 = pss.context("smaps_rollup tells no Pss")?.parse()?;
        Ok(pss / 1024.0)
    }

    /// Waits for the guest's end.
    ///
    /// # Errors
    /// It had to be stopped.
    pub fn end(mut self) -> anyhow::Result<()> {
        // What it still says is read, or it might wait for us.
        std::io::copy(&mut self.console, &mut std::io::sink())?;
        match self.child.wait()?.code() {
            Some(124) | None => bail!("the guest did not end within {LIMIT} s"),
            Some(_) => Ok(()),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            // `timeout` passes it on.
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
            let _ = self.child.wait();
        }
    }
}

/// The first process whose parent is `pid`.
fn child_of(pid: i32) -> Option<i32> {
    let processes = fs::read_dir("/proc").ok()?.filter_map(Result::ok);
    processes.filter_map(|p| p.file_name().to_str()?.parse().ok()).find(|candidate: &i32| {
        let stat = fs::read_to_string(format!("/proc/{candidate}/stat")).unwrap_or_default();
        // The name, in parentheses, may hold anything.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        parent == Some(pid)
    })
}

/// Whether KVM runs a guest for this process.
fn has_machine(pid: i32) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().filter_map(Result::ok);
    fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|to| to.to_string_lossy() == "anon_inode:kvm-vm")
}

fn hutch(command: &mut Command, guest: &Guest, all: &All) {
    let net = if guest.tap { "tap" } else { "none" };
    command.arg(&all.hutch).args(["boot", "--net", net, "--memory", &MEMORY_MIB.to_string()]);
    command.arg("--kernel").arg(all.micro.join("vmlinuz")).arg("--initrd").arg(guest.initrd);
    if guest.huge {
        command.arg("--hugepages");
    }
    match guest.disk {
        Some(DiskFile { path, base: Some(base) }) => command.arg(base).arg("--root-volume").arg(path),
        Some(DiskFile { path, base: None }) => command.arg("--disk").arg(path),
        None => command,
    };
    command.args(["--append", "reboot=t"]).arg("--").args(guest.command);
}

fn qemu(command: &mut Command, who: Vmm, guest: &Guest, all: &All) {
    // Without its clock, microvm's kernel asks for the time 20,000 times: it is measured at its best.
    let (machine, ports) = match who {
        Vmm::Microvm if guest.tap => ("microvm,rtc=on,pcie=on", ""),
        Vmm::Microvm => ("microvm,rtc=on", ""),
        // Under q35 in the lab, the emulated processor forgets which ports our init may use.
        _ => ("q35", "hutch.ports=none "),
    };
    let memory = if guest.huge {
        format!("memory-backend-memfd,id=m,size={MEMORY_MIB}M,hugetlb=on,hugetlbsize=2M")
    } else {
        format!("memory-backend-memfd,id=m,size={MEMORY_MIB}M")
    };
    command.args(["qemu-system-x86_64", "-M", &format!("{machine},memory-backend=m"), "-object", &memory]);
    command.args(["-accel", "kvm", "-cpu", "host", "-m", &MEMORY_MIB.to_string(), "-smp", "1", "-no-reboot"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
    command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
    command.arg("-kernel").arg(all.micro.join("vmlinuz")).arg("-initrd").arg(guest.initrd);
    if let Some(DiskFile { path, base }) = guest.disk {
        let format = if base.is_some() { "qcow2" } else { "raw" };
        let path = path.display();
        command.args([
            "-drive",
            &format!("file={path},format={format},if=none,id=d,cache=writeback,aio=io_uring,discard=unmap"),
        ]);
        command.args(["-device", "virtio-blk-pci,drive=d"]);
    }
    if guest.tap {
        let tap = crate::net::TAP;
        command.args(["-netdev", &format!("tap,id=n,ifname={tap},script=no,downscript=no,vhost=off")]);
        command.args(["-device", "virtio-net-pci,netdev=n,mac=02:00:00:00:00:09"]);
    }
    command.args(["-append", &line(guest, ports)]);
}

/// A program that knows its VMM's own command line.
fn other(command: &mut Command, peer: &Peer, guest: &Guest, all: &All) {
    command.arg(&peer.program).arg("--kernel").arg(all.micro.join("vmlinuz"));
    command.arg("--initrd").arg(guest.initrd).args(["--append", &line(guest, "")]);
    command.args(["--cpus", "1", "--memory", &MEMORY_MIB.to_string()]);
}

fn line(guest: &Guest, ports: &str) -> String {
    format!("console=ttyS0 panic=1 reboot=t quiet {ports}hutch.cmd={}", hex(guest.command))
}

/// The command as hutch's init reads it: hexadecimal, a NUL after each word.
fn hex(command: &[&str]) -> String {
    command.iter().flat_map(|word| word.bytes().chain([0])).map(|b| format!("{b:02x}")).collect()
}

/// Has the kernel set aside so many huge pages of 2 MiB, at least.
fn reserve_huge_pages(pages: u64) -> anyhow::Result<()> {
    let path = "/proc/sys/vm/nr_hugepages";
    let now = || -> anyhow::Result<u64> { Ok(fs::read_to_string(path)?.trim().parse()?) };
    if now()? < pages {
        fs::write(path, pages.to_string())
            .with_context(|| format!("cannot write {path}; run the bench as root"))?;
    }
    match now()? {
        got if got < pages => {
            bail!("the host set aside {got} huge pages of {pages}; it has too little free memory")
        }
        _ => Ok(()),
    }
}
