//! From a file that somebody downloaded to a template: raw, sparse, and read by a process that can do nothing else.
//!
//! ```text
//!   import (the caller's rights)                     worker (nobody, no-new-privs, rlimits)
//!     stdin   the source, read only        ─────►      reads it as blockdev reads disks, or as `foreign` does
//!     stdout  the store's pending disk     ─────►      writes what is not zeros; or a pipe, to who encrypts it (`pipe`)
//!     stderr  a pipe                       ◄─────      JSON lines: progress, then done or refused
//! ```
//!
//! The worker is a program, so that nothing of the caller's memory is in it: its three descriptors are all it has.
//! The checksum is of the source's bytes and taken by the caller, beside the worker: it cannot be lied to.

mod pipe;
mod worker;

use std::fs::{self, File, FileType};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use pipe::Sink;
pub use worker::worker;

use crate::store::{Architecture, Format, Image, Kind, Origin, Store, StoreError};

/// How much is read at once, in bytes.
pub(crate) const CHUNK: usize = 1 << 20;
/// How the footer of a VHD begins (and the file, where it is a dynamic one).
const VHD: &[u8] = b"conectix";
/// The most of a worker's report that is kept, in bytes.
const MAX_REPORT: usize = 64 << 10;
/// Beyond this no more of a worker's words are kept, in bytes; a line that began before is.
const MAX_WORDS: usize = 1 << 10;
/// How often the limits that the worker does not see itself are looked at.
const TICK: Duration = Duration::from_millis(50);

/// What an import may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The largest virtual size in bytes.
    pub virtual_bytes: u64,
    /// The most bytes that are not zeros: a small file can unpack to any size. The worker counts them; what it has
    /// the store's file system allocate is watched besides, with an eighth and 16 MiB more for that one's own blocks.
    pub data_bytes: u64,
    /// Address space of the worker in bytes.
    pub memory_bytes: u64,
    /// Processor time of the worker in seconds.
    pub cpu_seconds: u64,
    /// Time in seconds, after which the worker is killed.
    pub wall_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            virtual_bytes: 16 << 40,
            data_bytes: 256 << 30,
            memory_bytes: 1 << 30,
            cpu_seconds: 3600,
            wall_seconds: 7200,
        }
    }
}

/// What to make of a source.
#[derive(Debug, Clone)]
pub struct Request {
    /// The image's name.
    pub name: String,
    /// The source's format; `None` has it checked, once, here.
    pub format: Option<Format>,
    /// The processor it is for.
    pub architecture: Architecture,
    /// What it may take.
    pub limits: Limits,
}

/// Why nothing was imported. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The store's own reasons; want of room is [`ImportError::Full`].
    #[error(transparent)]
    Store(StoreError),
    /// The source could not be opened.
    #[error("it cannot be opened; check its name, and who may read it")]
    Open(#[source] io::Error),
    /// The source is no image that can be imported.
    #[error("the image is refused: {0}")]
    Refused(String),
    /// The host could not read the source.
    #[error("cannot read the image: {0}; check the disk or network that it is on")]
    Unreadable(String),
    /// The store's file system is full, or its owner's share of it is.
    #[error("there is no room for it in {0}; make room there, or keep images elsewhere")]
    Full(PathBuf),
    /// The worker was killed, by the kernel or by hand.
    #[error(
        "the import's worker was killed: the host is out of memory (see its kernel's log), somebody ended it, or it \
         went on past {cpu_seconds} seconds of processor time"
    )]
    Killed {
        /// The limit of its processor time in seconds.
        cpu_seconds: u64,
    },
    /// It took more than was allowed.
    #[error("the import was ended: it needs more than {0}; check the image, or allow more")]
    Limit(String),
    /// It was told to stop.
    #[error("the import was stopped")]
    Stopped,
    /// The worker could not be run, or broke.
    #[error("the import failed to {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// The worker ended without a word.
    #[error("the import's worker ended with {status}: {words}")]
    Worker {
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        words: String,
    },
}

/// Of an error in `store`, whose directory may have run out of room for a disk, its record or their names.
pub(crate) fn store_error(store: &Store) -> impl Fn(StoreError) -> ImportError + '_ {
    move |error| match &error {
        StoreError::Io { source, .. } if is_full(source) => ImportError::Full(store.directory().to_owned()),
        _ => ImportError::Store(error),
    }
}

/// Whether there is no room: on the file system, or in what its user may have of it.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

pub(crate) fn io_error(what: &'static str) -> impl Fn(io::Error) -> ImportError {
    move |source| ImportError::Io { what, source }
}

/// A line that the worker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Report {
    /// Bytes of the disk done, and its size.
    Progress { done: u64, total: u64 },
    /// All is written and durable.
    Done { total: u64 },
    /// The image is bad.
    Refused(String),
    /// The image could not be read.
    Unreadable(String),
    /// More than one of the limits.
    Limit(String),
    /// There is no room for the disk.
    Full,
    /// The host failed.
    Failed(String),
}

/// What the worker is told.
#[derive(Debug, Serialize, Deserialize)]
struct Task {
    format: Format,
    limits: Limits,
    /// The disk is not a file, but a pipe.
    #[serde(default)]
    pipe: bool,
}

/// Opens a source for [`import`]. What is neither a file nor a block device is not even opened: a pipe would be waited
/// for, and some devices act when they are.
///
/// # Errors
/// [`ImportError::Open`], [`ImportError::Refused`].
pub fn open(path: &Path) -> Result<File, ImportError> {
    check_kind(fs::metadata(path).map_err(ImportError::Open)?.file_type())?;
    // Should the name be a pipe's by now, this does not wait either; `import` looks again at what it was given.
    File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path).map_err(ImportError::Open)
}

/// Imports `source` into `store`. `worker` is the program (`hutch-import-worker`, or one with [`worker`] behind a
/// subcommand); `progress` is told bytes done and in all.
///
/// # Errors
/// Those of [`ImportError`].
pub fn import(
    store: &Store,
    source: &File,
    request: &Request,
    worker: Command,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Image, ImportError> {
    // Before there is anything of it.
    let format = format_of(source, request.format)?;
    let pending = store.begin(Kind::Machine, &request.name).map_err(store_error(store))?;
    let mut to = Target { disk: pending.disk(), directory: store.directory(), sink: None };
    let (_, sha256) = convert(source, &mut to, format, &request.limits, worker, &mut |done, total| {
        // Nothing is known yet.
        if total > 0 {
            progress(done, total);
        }
        true
    })?;
    let origin = Origin { format, sha256, architecture: request.architecture };
    pending.commit(origin).map_err(store_error(store))
}

/// What becomes of an image.
pub struct Target<'a> {
    /// An empty file, which becomes the raw disk, or what `sink` makes of it.
    pub disk: &'a File,
    /// Where that is, as a person is told.
    pub directory: &'a Path,
    /// Takes the disk's bytes instead: the worker never has the file then.
    pub sink: Option<&'a mut dyn Sink>,
}

/// The format of a source: what is said, or what it looks like.
///
/// # Errors
/// [`ImportError::Refused`]: it is none that is read, or cannot be of the one that is said.
pub fn format_of(source: &File, said: Option<Format>) -> Result<Format, ImportError> {
    let len = source_len(source)?;
    let format = match said {
        Some(format) => format,
        None => detect(source, len)?,
    };
    if format == Format::Raw && !len.is_multiple_of(512) {
        return Err(ImportError::Refused(format!(
            "it is raw and has {len} bytes, which is no multiple of 512: it was cut short, or is no disk; \
             `truncate -s %512` pads a copy of it"
        )));
    }
    Ok(format)
}

/// Makes a raw disk of `source`, in `to`, or has its sink make one; tells its size and the source's checksum. `progress` is told bytes done and in
/// all, and says whether to go on; it is asked when nothing was done, too.
///
/// # Errors
/// Those of [`ImportError`].
pub fn convert(
    source: &File,
    to: &mut Target<'_>,
    format: Format,
    limits: &Limits,
    mut worker: Command,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<(u64, String), ImportError> {
    let len = source_len(source)?;
    let clone = |file: &File| file.try_clone().map_err(io_error("hand over the files"));
    let task = serde_json::to_string(&Task { format, limits: *limits, pipe: to.sink.is_some() })
        .map_err(|error| io_error("describe the task")(error.into()))?;
    worker
        .arg(task)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(clone(source)?))
        .stdout(if to.sink.is_some() { Stdio::piped() } else { Stdio::from(clone(to.disk)?) })
        .stderr(Stdio::piped());
    let mut child = Running(worker.spawn().map_err(io_error("start its worker"))?);
    // Nobody else has the end of a pipe that it writes to.
    drop(worker);
    let stop = AtomicBool::new(false);
    let (disk, directory, sink) = (to.disk, to.directory, &mut to.sink);
    let (total, taken, sha256) = std::thread::scope(|scope| {
        let sum = scope.spawn(|| checksum(source, len, &stop));
        let pipe = child.0.stdout.take().zip(sink.as_deref_mut());
        let taken = pipe.map(|(pipe, sink)| scope.spawn(move || pipe::take(pipe, sink, limits, directory)));
        let total = watch(child, disk, directory, limits, progress);
        // Nobody waits for the checksum of what is not imported.
        stop.store(total.is_err(), Ordering::Relaxed);
        let ended = |_| Err(ImportError::Refused("the thread that takes its bytes ended".to_owned()));
        let taken = taken.map(|taken| taken.join().unwrap_or_else(ended)).transpose();
        let sum = sum.join().unwrap_or_else(|_| Err(io::Error::other("the checksum's thread ended")));
        // A worker that is not listened to fails for that.
        let taken = match (&total, taken) {
            (Err(ImportError::Stopped), _) => None,
            (_, taken) => taken?,
        };
        Ok::<_, ImportError>((total?, taken, sum.map_err(io_error("read the image"))?))
    })?;
    let len = match taken {
        Some(len) => len,
        None => disk.metadata().map_err(io_error("look at the disk"))?.len(),
    };
    if len != total || len == 0 || !len.is_multiple_of(512) || len > limits.virtual_bytes {
        return Err(ImportError::Refused(format!("its disk has {len} bytes")));
    }
    Ok((total, sha256))
}

/// The format by what the source begins with and ends with. Formats that are none of ours are told apart from raw.
fn detect(source: &File, len: u64) -> Result<Format, ImportError> {
    const OURS: [(&[u8], Format); 7] = [
        (b"QFI\xfb", Format::Qcow2),
        (b"KDMV", Format::Vmdk),
        (b"vhdxfile", Format::Vhdx),
        (VHD, Format::Vhd),
        (b"\x1f\x8b", Format::RawGz),
        (b"\xfd7zXZ\0", Format::RawXz),
        (b"\x28\xb5\x2f\xfd", Format::RawZst),
    ];
    /// What is not read, where it shows, and what to do.
    const FOREIGN: [(usize, &[u8], &str); 7] = [
        (
            0,
            b"# Disk Descriptor",
            "the text of a VMDK disk in several files; convert that by `qemu-img convert -O qcow2`",
        ),
        (0, b"QED\0", "QED; convert it by `qemu-img convert -O qcow2`"),
        (64, b"\x7f\x10\xda\xbe", "VDI; convert it by `qemu-img convert -O qcow2`"),
        (0, b"WithoutFreeSpace", "Parallels; convert it by `qemu-img convert -O qcow2`"),
        (0, b"WithouFreSpacExt", "Parallels; convert it by `qemu-img convert -O qcow2`"),
        (0, b"BZh", "bzip2-compressed; unpack it"),
        (257, b"ustar", "a tar archive, as an OVA is; unpack it and import the disk in it"),
    ];
    let read = |at: u64| {
        let mut bytes = vec![0; 512];
        let count = source.read_at(&mut bytes, at).map_err(io_error("read the image"))?;
        bytes.truncate(count);
        Ok::<_, ImportError>(bytes)
    };
    let head = read(0)?;
    if let Some((_, format)) = OURS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return Ok(*format);
    }
    let is = |at: usize, magic| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, what)) = FOREIGN.iter().find(|(at, magic, _)| is(*at, magic)) {
        return Err(ImportError::Refused(format!("it looks like {what}, or say that its format is raw")));
    }
    // A fixed VHD is a raw disk with a footer.
    let tail = read(len.saturating_sub(512))?;
    Ok(if tail.starts_with(VHD) { Format::Vhd } else { Format::Raw })
}

/// Refuses what has no size, and may have no end.
fn check_kind(kind: FileType) -> Result<(), ImportError> {
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let why = if kind.is_dir() {
        "it is a directory; name the image file in it"
    } else {
        "it is neither a file nor a block device; save it to a file"
    };
    Err(ImportError::Refused(why.to_owned()))
}

/// The source's size in bytes.
pub(crate) fn source_len(mut source: &File) -> Result<u64, ImportError> {
    check_kind(source.metadata().map_err(io_error("look at the image"))?.file_type())?;
    // A block device's metadata has no size. All reads say where: the file's position serves nobody.
    source.seek(SeekFrom::End(0)).map_err(io_error("measure the image"))
}

/// The checksum of the first `len` bytes: a file that grows meanwhile has an end all the same.
fn checksum(source: &File, len: u64, stop: &AtomicBool) -> io::Result<String> {
    let (mut hash, mut buffer, mut at) = (Sha256::new(), vec![0; CHUNK], 0);
    while at < len && !stop.load(Ordering::Relaxed) {
        let want = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
        let count = match source.read_at(buffer.get_mut(..want).unwrap_or_default(), at) {
            Ok(0) => return Err(io::Error::other("it became shorter while it was read")),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        hash.update(buffer.get(..count).unwrap_or_default());
        at += count as u64;
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// A worker that does not outlive its import.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Listens to the worker until it ends; tells the disk's size. Nothing that the worker does or leaves undone keeps
/// this from ending with the limits.
fn watch(
    mut child: Running,
    disk: &File,
    directory: &Path,
    limits: &Limits,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<u64, ImportError> {
    let deadline = Instant::now() + Duration::from_secs(limits.wall_seconds);
    let mut pipe = child.0.stderr.take();
    let mut heard = Heard::default();
    let status = loop {
        check(disk, limits, deadline)?;
        if !progress(heard.figures.0, heard.figures.1) {
            return Err(ImportError::Stopped);
        }
        let Some(open) = &mut pipe else {
            // It has closed its ear, which does not mean that it has ended.
            match child.0.try_wait().map_err(io_error("wait for its worker"))? {
                Some(status) => break status,
                None => std::thread::sleep(TICK.min(Duration::from_millis(5))),
            }
            continue;
        };
        let timeout = PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO);
        match poll(&mut [PollFd::new(open.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => continue,
            result => result.map_err(|error| io_error("listen to its worker")(error.into()))?,
        };
        if !heard.listen(open)? {
            pipe = None;
        }
    };
    check(disk, limits, deadline)?;
    progress(heard.figures.0, heard.figures.1);
    verdict(status, heard, limits, directory)
}

/// The limits that hold even if the worker keeps none.
fn check(disk: &File, limits: &Limits, deadline: Instant) -> Result<(), ImportError> {
    if Instant::now() >= deadline {
        return Err(ImportError::Limit(format!("{} seconds", limits.wall_seconds)));
    }
    let allocated = disk.metadata().map_err(io_error("look at the disk"))?.blocks().saturating_mul(512);
    let most = limits.data_bytes.saturating_add(limits.data_bytes / 8).saturating_add(16 << 20);
    if allocated > most {
        return Err(ImportError::Limit(format!("{} bytes of data", limits.data_bytes)));
    }
    Ok(())
}

/// What the worker has said so far.
#[derive(Default)]
struct Heard {
    /// A line that has not ended.
    text: Vec<u8>,
    /// The first lines that are no reports: a panic's, say.
    words: String,
    /// Bytes done and in all.
    figures: (u64, u64),
    /// How it says that it went.
    end: Option<Report>,
}

impl Heard {
    /// Takes in what the pipe holds; `false` at its end.
    fn listen(&mut self, pipe: &mut impl Read) -> Result<bool, ImportError> {
        let mut buffer = [0; 4096];
        let count = pipe.read(&mut buffer).map_err(io_error("listen to its worker"))?;
        self.text.extend_from_slice(buffer.get(..count).unwrap_or_default());
        while let Some(newline) = self.text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.text.drain(..=newline).collect();
            match serde_json::from_slice(&line) {
                Ok(Report::Progress { done, total }) => self.figures = (done, total),
                Ok(report) => self.end = Some(report),
                Err(_) if self.words.len() < MAX_WORDS => {
                    let words = String::from_utf8_lossy(&line);
                    self.words = format!("{} {}", self.words, words.trim()).trim_start().to_owned();
                }
                Err(_) => {}
            }
        }
        if self.text.len() > MAX_REPORT {
            return Err(ImportError::Refused("its worker talks without end".to_owned()));
        }
        Ok(count > 0)
    }
}

/// What to make of how the worker ended and what it said of it.
fn verdict(status: ExitStatus, heard: Heard, limits: &Limits, store: &Path) -> Result<u64, ImportError> {
    let killed = |signal: Signal| status.signal() == Some(signal as i32);
    // Rust's words where an allocation fails.
    let no_memory = killed(Signal::SIGABRT) && heard.words.contains("memory allocation of ");
    match heard.end {
        _ if killed(Signal::SIGKILL) => Err(ImportError::Killed { cpu_seconds: limits.cpu_seconds }),
        _ if killed(Signal::SIGXCPU) => {
            Err(ImportError::Limit(format!("{} seconds of processor time", limits.cpu_seconds)))
        }
        _ if killed(Signal::SIGXFSZ) => {
            Err(ImportError::Limit(format!("{} bytes of disk", limits.virtual_bytes)))
        }
        _ if no_memory => Err(ImportError::Limit(format!("{} bytes of memory", limits.memory_bytes))),
        Some(Report::Done { total }) if status.success() => Ok(total),
        Some(Report::Refused(why)) => Err(ImportError::Refused(why)),
        Some(Report::Unreadable(why)) => Err(ImportError::Unreadable(why)),
        Some(Report::Limit(what)) => Err(ImportError::Limit(what)),
        Some(Report::Full) => Err(ImportError::Full(store.to_owned())),
        Some(Report::Failed(why)) => Err(io_error("write the disk")(io::Error::other(why))),
        _ => Err(ImportError::Worker { status, words: heard.words }),
    }
}
