//! The child process `hutch-vmm`: it is handed open descriptors and a configuration, and hands back a report.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use hutch_vmm::config::{FdNumber, MachineConfig, Report};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;

/// Descriptors that the child will inherit.
#[derive(Default)]
pub struct Inherit(Vec<OwnedFd>);

impl Inherit {
    /// Opens `path` for reading.
    pub fn open(&mut self, path: &Path, what: &str) -> anyhow::Result<FdNumber> {
        self.give(open(path, what)?.into())
    }

    /// Hands over a file in memory that holds `bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) -> anyhow::Result<FdNumber> {
        self.give(in_memory(&mut &bytes[..])?.into())
    }

    /// Hands over an open descriptor and tells its number.
    pub fn give(&mut self, fd: OwnedFd) -> anyhow::Result<FdNumber> {
        fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty()))?;
        let number = fd.as_raw_fd();
        self.0.push(fd);
        Ok(number)
    }

    /// Hands over another descriptor of what is open here, and stays open here.
    pub fn lend(&mut self, fd: &impl AsFd) -> anyhow::Result<FdNumber> {
        self.give(fd.as_fd().try_clone_to_owned()?)
    }

    /// Makes a pipe whose writing end the child inherits.
    pub fn pipe(&mut self) -> anyhow::Result<(File, FdNumber)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok((File::from(read), self.give(write)?))
    }
}

/// Opens `path`, a regular file, for reading.
pub fn open(path: &Path, what: &str) -> anyhow::Result<File> {
    let context = || format!("cannot open the {what} {}", path.display());
    // A pipe would be waited for.
    let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = file.with_context(context)?;
    if !file.metadata()?.is_file() {
        bail!("the {what} {} is no regular file", path.display());
    }
    // Some file systems (9p) read less than they could without blocking.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(file)
}

/// A file in memory with all that `from` has.
pub fn in_memory(from: &mut impl Read) -> anyhow::Result<File> {
    let mut file = File::from(memfd_create(c"hutch-boot", MFdFlags::MFD_CLOEXEC)?);
    io::copy(from, &mut file)?;
    Ok(file)
}

/// A running `hutch-vmm`.
pub struct Vmm {
    child: Child,
    report: File,
}

impl Vmm {
    /// Starts it. `report` is the reading end of the pipe that `config.report` names.
    pub fn start(config: &MachineConfig, inherit: Inherit, report: File) -> anyhow::Result<Vmm> {
        let program = program()?;
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        // Only the child holds them now, so that a pipe ends when the child does.
        drop(inherit);
        let mut stdin = child.stdin.take().context("hutch-vmm has no standard input")?;
        stdin.write_all(&serde_json::to_vec(config)?).context("hutch-vmm does not take its configuration")?;
        Ok(Vmm { child, report })
    }

    /// The process, for signals.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// Waits for the end and reads the report.
    pub fn wait(mut self) -> anyhow::Result<Report> {
        let mut text = String::new();
        (&self.report).take(1 << 20).read_to_string(&mut text)?;
        let status = self.child.wait()?;
        serde_json::from_str(&text).with_context(|| format!("hutch-vmm left no report ({status})"))
    }
}

/// `hutch-vmm` lies beside `hutch`, or where `HUTCH_VMM` says.
fn program() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("HUTCH_VMM") {
        return Ok(path.into());
    }
    Ok(std::env::current_exe()?.with_file_name("hutch-vmm"))
}
