//! The other side of `hutch-vmm`: what a program that starts it hands over, and what it asks of it later.
//!
//! ```text
//!   parent ── MachineConfig (JSON) on standard input ──► hutch-vmm ── Report ──► the file or pipe that `report` names
//!          ── descriptors, by the numbers in it ───────►      ▲
//!          ── control socket: ask() ─────────────────────────┘
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::CommandFdExt;
use hutch_blockdev::{Format, Layer};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;
use serde::Serialize;
use serde_json::Value;

use crate::config::{DiskConfig, DiskFormat, FdNumber, LayerConfig, Rate, Report};
use crate::passing;
use crate::secret::{self, DiskKey};

/// The longest answer at a control socket, in bytes; a console's ring, escaped, is the largest.
const ANSWER_MAX: usize = 1 << 20;
/// What is passed on of a refusal, in characters.
const REFUSAL_MAX: usize = 500;
/// The longest report, in bytes.
const REPORT_MAX: u64 = 1 << 20;

/// The report that a machine left in a file or a pipe, read to its end.
///
/// # Errors
/// It cannot be read, or is none.
pub fn report(from: impl Read) -> io::Result<Report> {
    let mut text = String::new();
    from.take(REPORT_MAX).read_to_string(&mut text)?;
    Ok(serde_json::from_str(&text)?)
}

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
    pub fn disk(&mut self, layers: &[Layer], serial: String, read_only: bool) -> Result<DiskConfig> {
        let mut lend = |layer: &Layer| {
            let (format, key) = (disk_format(layer.format), layer.key.clone().map(DiskKey));
            Ok(LayerConfig { fd: self.lend(&layer.file)?, format, key })
        };
        let layers = layers.iter().map(&mut lend).collect::<Result<Vec<_>>>()?;
        let (top, rate) = Default::default();
        Ok(DiskConfig { serial, layers, top, read_only, rate })
    }

    /// The command that starts `program`, a `hutch-vmm`, with all this under the same numbers. It reads its
    /// configuration from a pipe; drop the command once it runs, so that only the child holds what was given.
    pub fn command(self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).preserved_fds(self.0);
        command
    }
}

/// A line, or what there is of it when the other side hangs up.
fn line(reader: &mut BufReader<UnixStream>, until: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        reader.get_ref().set_read_timeout(Some(left))?;
        let bytes = match reader.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            bytes => bytes?,
        };
        let end = bytes.iter().position(|b| *b == b'\n');
        let taken = end.map_or(bytes.len(), |end| end + 1);
        line.extend(bytes.get(..taken).unwrap_or_default());
        reader.consume(taken);
        if end.is_some() || taken == 0 {
            return Ok(line);
        }
        if line.len() > ANSWER_MAX {
            return Err(io::Error::other("its answer does not end"));
        }
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

/// Asks the machine behind a control socket, and waits for its whole answer for at most `limit`. Whoever broke into a
/// machine may answer anything: neither the time nor the memory that costs is up to it.
///
/// # Errors
/// [`LaunchError::Silent`], [`LaunchError::Refused`].
pub fn ask(
    socket: &Path,
    request: &Value,
    limit: Duration,
) -> Result<(BufReader<UnixStream>, UnixStream, Value)> {
    ask_with(socket, request, &[], limit)
}

/// Hands a disk to the machine behind a control socket: its files, the top one first, which it then has open too, and what
/// it may do. `top` is what the parent calls the top one.
///
/// # Errors
/// Those of [`ask`].
pub fn attach_disk(
    socket: &Path,
    layers: &[Layer],
    (serial, top): (&str, &str),
    read_only: bool,
    rate: &Rate,
    limit: Duration,
) -> Result<()> {
    #[derive(Serialize)]
    struct Attach<'a> {
        command: &'a str,
        serial: &'a str,
        top: &'a str,
        formats: Vec<DiskFormat>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        keys: Vec<Option<DiskKey>>,
        read_only: bool,
        rate: &'a Rate,
    }
    let (command, formats, keys) = ("attach-disk", formats(layers), keys(layers));
    let request = Attach { command, serial, top, formats, keys, read_only, rate };
    hand(socket, &request, layers.iter().map(|layer| &layer.file), limit)
}

/// Hands new, empty top layers to the machine behind a control socket: the serial of the disk, what the layer is called,
/// and its file, of each. What was written until then is beneath them, all at one instant.
///
/// # Errors
/// Those of [`ask`].
pub fn cut_disks(socket: &Path, cuts: &[(String, String, File)], limit: Duration) -> Result<()> {
    let disk =
        |(serial, top, _): &(String, String, File)| serde_json::json!({ "serial": serial, "top": top });
    let disks: Vec<_> = cuts.iter().map(disk).collect();
    let request = serde_json::json!({ "command": "cut-disks", "disks": disks });
    hand(socket, &request, cuts.iter().map(|(_, _, file)| file), limit)
}

/// Lays the top layer of a disk of the machine behind a control socket on other files that hold the same bytes.
///
/// # Errors
/// Those of [`ask`].
pub fn rebase_disk(socket: &Path, layers: &[Layer], serial: &str, limit: Duration) -> Result<()> {
    #[derive(Serialize)]
    struct Rebase<'a> {
        command: &'a str,
        serial: &'a str,
        formats: Vec<DiskFormat>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        keys: Vec<Option<DiskKey>>,
    }
    let request = Rebase { command: "rebase-disk", serial, formats: formats(layers), keys: keys(layers) };
    hand(socket, &request, layers.iter().map(|layer| &layer.file), limit)
}

fn hand<'a>(
    socket: &Path,
    request: &impl Serialize,
    files: impl Iterator<Item = &'a File>,
    limit: Duration,
) -> Result<()> {
    let files: Vec<_> = files.map(AsFd::as_fd).collect();
    ask_with(socket, request, &files, limit).map(drop)
}

fn formats(layers: &[Layer]) -> Vec<DiskFormat> {
    layers.iter().map(|layer| disk_format(layer.format)).collect()
}

/// None at all where all layers are plain, as machines of earlier versions know it.
fn keys(layers: &[Layer]) -> Vec<Option<DiskKey>> {
    match layers.iter().any(|layer| layer.key.is_some()) {
        true => layers.iter().map(|layer| layer.key.clone().map(DiskKey)).collect(),
        false => Vec::new(),
    }
}

fn disk_format(format: Format) -> DiskFormat {
    match format {
        Format::Raw => DiskFormat::Raw,
        Format::Qcow2 => DiskFormat::Qcow2,
    }
}

/// Connects within `limit`, which also bounds each write: a machine that accepts nobody must not hold who asks.
fn connect(socket: &Path, limit: Duration) -> io::Result<UnixStream> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&fd, Timeout::Send, Some(limit))?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
    Ok(UnixStream::from(fd))
}

fn ask_with(
    socket: &Path,
    request: &impl Serialize,
    fds: &[BorrowedFd<'_>],
    limit: Duration,
) -> Result<(BufReader<UnixStream>, UnixStream, Value)> {
    let silent = |source| LaunchError::Silent { path: socket.into(), source };
    let until = Instant::now() + limit;
    let stream = connect(socket, limit).map_err(silent)?;
    let mut text = secret::json(request).map_err(io::Error::from)?;
    text.push(b'\n');
    let sent = passing::send(&stream, &text, fds);
    let mut reader = BufReader::new(stream.try_clone().map_err(silent)?);
    let answer = line(&mut reader, until).map_err(silent)?;
    // A machine with too many clients says so and hangs up before it has read anything.
    if answer.is_empty() {
        sent.map_err(silent)?;
    }
    let answer: Value = serde_json::from_slice(&answer).map_err(|e| silent(e.into()))?;
    stream.set_read_timeout(Some(limit)).map_err(silent)?;
    if answer["ok"] != Value::Bool(true) {
        let why: String =
            answer["error"].as_str().unwrap_or("the machine refused").chars().take(REFUSAL_MAX).collect();
        // It did not hear what was asked: asked again, it may.
        if answer["busy"] == Value::Bool(true) {
            return Err(silent(io::Error::other(why)));
        }
        return Err(LaunchError::Refused(why));
    }
    Ok((reader, stream, answer))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Asks one that answers with these pieces, some milliseconds apart, for ever.
    fn answered(piece: &'static [u8], limit: Duration) -> Result<Value> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("control");
        let listener = UnixListener::bind(&path)?;
        let machine = std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            while stream.write_all(piece).is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let answer =
            ask(&path, &serde_json::json!({ "command": "status" }), limit).map(|(_, _, answer)| answer);
        machine.join().expect("the machine ends when nobody listens");
        answer
    }

    #[test]
    fn an_answer_without_an_end_costs_neither_time_nor_memory() {
        let long = Duration::from_secs(100);
        assert!(answered(b"{\"ok\":true,\"id\":\"i-1\"}\n", long).is_ok_and(|answer| answer["id"] == "i-1"));
        assert!(
            matches!(answered(b"{\"ok\":false,\"error\":\"no\"}\n", long), Err(LaunchError::Refused(why)) if why == "no")
        );
        // Each piece comes soon after the last, but the whole does not.
        assert!(matches!(answered(b"x", Duration::from_millis(200)), Err(LaunchError::Silent { .. })));
        let much: &[u8] = Box::leak(vec![b'x'; 1 << 19].into_boxed_slice());
        assert!(
            matches!(answered(much, long), Err(LaunchError::Silent { source, .. }) if source.to_string().contains("does not end"))
        );
    }

    #[test]
    fn a_machine_that_accepts_nobody_holds_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let request = serde_json::json!({ "command": "status" });
        for _ in 0..4 {
            let asked = ask(&path, &request, Duration::from_millis(50));
            assert!(matches!(asked, Err(LaunchError::Silent { .. })));
        }
    }

    #[test]
    fn a_report_is_read_as_far_as_one_can_be_long() {
        assert!(report(&b"{\"end\":\"power-off\",\"counters\":{\"exits\":{},\"reboots\":0,\"console_bytes\":0}}\n"[..]).is_ok());
        assert!(report(&b""[..]).is_err());
        assert!(report(io::repeat(b' ')).is_err());
    }
}
