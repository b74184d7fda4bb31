//! The other side of `hutch-vmm`: what a program that starts it hands over, and what it asks of it later.
//!
//! ```text
//!   parent ── MachineConfig (JSON) on standard input ──► hutch-vmm ── Report ──► the file or pipe that `report` names
//!          ── descriptors, by the numbers in it ───────►      ▲
//!          ── control socket: ask() ─────────────────────────┘
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::CommandFdExt;
use hutch_blockdev::Format;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;
use serde_json::Value;

use crate::config::{DiskConfig, DiskFormat, FdNumber, LayerConfig};

/// Why something could not be handed over, or asked.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file.
    #[error("cannot open the {what} {path}")]
    Open {
        /// What it was to be.
        what: String,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("the {what} {path} is no regular file")]
    NoFile {
        /// What it was to be.
        what: String,
        /// Which.
        path: PathBuf,
    },
    /// A machine does not answer.
    #[error("no machine answers at {path}")]
    Silent {
        /// Its control socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A machine refused, in its words.
    #[error("{0}")]
    Refused(String),
    /// The kernel.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<nix::errno::Errno> for LaunchError {
    fn from(errno: nix::errno::Errno) -> LaunchError {
        LaunchError::Io(errno.into())
    }
}

/// What these functions return.
pub type Result<T> = std::result::Result<T, LaunchError>;

/// Descriptors that the child will inherit, and no other child of this process.
#[derive(Default)]
pub struct Inherit(Vec<OwnedFd>);

impl Inherit {
    /// Opens `path`, a regular file, for reading.
    ///
    /// # Errors
    /// See [`open`].
    pub fn open(&mut self, path: &Path, what: &str) -> Result<FdNumber> {
        Ok(self.give(open(path, what)?.into()))
    }

    /// Hands over a file in memory that holds `bytes`.
    ///
    /// # Errors
    /// There is no room.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<FdNumber> {
        Ok(self.give(in_memory(&mut &bytes[..])?.into()))
    }

    /// Hands over an open descriptor and tells its number.
    pub fn give(&mut self, fd: OwnedFd) -> FdNumber {
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }

    /// Hands over another descriptor of what is open here, and stays open here.
    ///
    /// # Errors
    /// The process has too many.
    pub fn lend(&mut self, fd: &impl AsFd) -> Result<FdNumber> {
        Ok(self.give(fd.as_fd().try_clone_to_owned()?))
    }

    /// Makes a pipe whose writing end the child inherits.
    ///
    /// # Errors
    /// The process has too many descriptors.
    pub fn pipe(&mut self) -> Result<(File, FdNumber)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        Ok((File::from(read), self.give(write)))
    }

    /// Hands over the files of a disk, the top one first, as the disk with this serial; they stay open here.
    ///
    /// # Errors
    /// The process has too many descriptors.
    pub fn disk(&mut self, layers: &[(File, Format)], serial: String, read_only: bool) -> Result<DiskConfig> {
        let mut lend = |(file, format): &(File, Format)| {
            let format = match format {
                Format::Raw => DiskFormat::Raw,
                Format::Qcow2 => DiskFormat::Qcow2,
            };
            Ok(LayerConfig { fd: self.lend(file)?, format })
        };
        let layers = layers.iter().map(&mut lend).collect::<Result<Vec<_>>>()?;
        Ok(DiskConfig { serial, layers, read_only })
    }

    /// The command that starts `program`, a `hutch-vmm`, with all this under the same numbers. It reads its
    /// configuration from a pipe; drop the command once it runs, so that only the child holds what was given.
    pub fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).preserved_fds(self.0);
        command
    }
}

/// Opens `path`, a regular file, for reading.
///
/// # Errors
/// It cannot be opened, or is something else.
pub fn open(path: &Path, what: &str) -> Result<File> {
    let failed = |source| LaunchError::Open { what: what.into(), path: path.into(), source };
    // A pipe would be waited for.
    let file = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = file.map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(LaunchError::NoFile { what: what.into(), path: path.into() });
    }
    // Some file systems (9p) read less than they could without blocking.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(file)
}

/// A file in memory with all that `from` has.
///
/// # Errors
/// There is no room, or `from`'s.
pub fn in_memory(from: &mut impl Read) -> Result<File> {
    let mut file = File::from(memfd_create(c"hutch-boot", MFdFlags::MFD_CLOEXEC)?);
    io::copy(from, &mut file)?;
    Ok(file)
}

/// `hutch-vmm` lies beside the program that runs, or where `HUTCH_VMM` says.
///
/// # Errors
/// The program that runs cannot be told.
pub fn program() -> io::Result<PathBuf> {
    match std::env::var_os("HUTCH_VMM") {
        Some(path) => Ok(path.into()),
        None => Ok(std::env::current_exe()?.with_file_name("hutch-vmm")),
    }
}

/// Asks the machine behind a control socket, and waits for its answer for at most `limit`.
///
/// # Errors
/// [`LaunchError::Silent`], [`LaunchError::Refused`].
pub fn ask(
    socket: &Path,
    request: &Value,
    limit: Duration,
) -> Result<(BufReader<UnixStream>, UnixStream, Value)> {
    let silent = |source| LaunchError::Silent { path: socket.into(), source };
    let mut stream = UnixStream::connect(socket).map_err(silent)?;
    stream.set_read_timeout(Some(limit)).map_err(silent)?;
    stream.set_write_timeout(Some(limit)).map_err(silent)?;
    let sent = stream.write_all(format!("{request}\n").as_bytes());
    let mut answer = String::new();
    let mut reader = BufReader::new(stream.try_clone().map_err(silent)?);
    // A machine with too many clients says so and hangs up before it has read anything.
    if reader.read_line(&mut answer).map_err(silent)? == 0 {
        sent.map_err(silent)?;
    }
    let answer: Value = serde_json::from_str(&answer).map_err(|e| silent(e.into()))?;
    if answer["ok"] != Value::Bool(true) {
        let why = answer["error"].as_str().unwrap_or("the machine refused");
        return Err(LaunchError::Refused(why.into()));
    }
    Ok((reader, stream, answer))
}
