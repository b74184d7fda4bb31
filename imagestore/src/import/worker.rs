//! The process that reads an image: it gives up all rights, then copies what is not zeros.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};

use super::{CHUNK, Limits, Report, Task, is_full, pipe};
use crate::foreign::{self, Fault};

/// What is looked at for zeros, in bytes: a file system's block.
const BLOCK: usize = 4096;
/// A block of zeros to compare with.
const ZEROS: [u8; BLOCK] = [0; BLOCK];
/// A disk is whole sectors, of so many bytes.
const SECTOR: u64 = 512;
/// The user and group `nobody`.
const NOBODY: u32 = 65534;

/// The worker's whole life: `task` is the last argument that [`import`] gave it. It gives up all rights before it
/// looks at the image.
pub fn worker(task: &str) -> ExitCode {
    let report = work(task).unwrap_or_else(|report| report);
    say(&report);
    if matches!(report, Report::Done { .. }) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn say(report: &Report) {
    // Whoever listened is gone when this fails, and then so is the reason to work; the next write to the disk's
    // pending file harms nobody.
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        let _ = io::stderr().write_all(&line);
    }
}

fn failed(error: impl std::fmt::Display) -> Report {
    Report::Failed(error.to_string())
}

fn unwritten(error: io::Error) -> Report {
    if is_full(&error) { Report::Full } else { failed(error) }
}

fn refused(fault: Fault) -> Report {
    match fault {
        Fault::Bad(why) => Report::Refused(why),
        Fault::Host(why) => Report::Unreadable(why),
    }
}

fn work(task: &str) -> Result<Report, Report> {
    let Task { format, limits, pipe } = serde_json::from_str(task).map_err(failed)?;
    let own = |fd: io::Result<OwnedFd>| fd.map(File::from).map_err(failed);
    let source = own(io::stdin().as_fd().try_clone_to_owned())?;
    let target = own(io::stdout().as_fd().try_clone_to_owned())?;
    let mut target = if pipe { Out::Pipe(target) } else { Out::File(target) };
    confine(&limits).map_err(failed)?;

    let too_large =
        |size: u64| Report::Limit(format!("{} bytes of disk: it has {size}", limits.virtual_bytes));
    let mut content = foreign::open(source, format).map_err(refused)?;
    let size = content.size();
    if let Some(size) = size {
        if size > limits.virtual_bytes {
            return Err(too_large(size));
        }
        target.set_len(size).map_err(unwritten)?;
    }
    let (mut buffer, mut at, mut data) = (vec![0; CHUNK], 0, 0_u64);
    loop {
        let left = size.map_or(CHUNK as u64, |size| size - at);
        let want = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let chunk = buffer.get_mut(..want).ok_or_else(|| failed("chunk"))?;
        let count = if want == 0 { 0 } else { content.read(at, chunk).map_err(refused)? };
        let Some(chunk) = chunk.get(..count).filter(|chunk| !chunk.is_empty()) else { break };
        // Where the size is not known before, it may be any.
        if at + count as u64 > limits.virtual_bytes {
            return Err(too_large(at + count as u64));
        }
        data += write_data(&mut target, at, chunk).map_err(unwritten)?;
        if data > limits.data_bytes {
            return Err(Report::Limit(format!("{} bytes of data", limits.data_bytes)));
        }
        at += count as u64;
        if at.is_multiple_of(16 << 20) || Some(at) == size {
            let (done, total) = content.taken().unwrap_or((at, size.unwrap_or(at)));
            say(&Report::Progress { done, total });
        }
    }
    match size {
        _ if at == 0 => return Err(Report::Refused("it is empty".to_owned())),
        Some(size) if at < size => return Err(failed("the disk ends before its size")),
        Some(_) => {}
        None if !at.is_multiple_of(SECTOR) => {
            let why = format!(
                "it holds {at} bytes, which is no multiple of {SECTOR}: it was cut short, or is no disk"
            );
            return Err(Report::Refused(why));
        }
        None => target.set_len(at).map_err(unwritten)?,
    }
    target.sync().map_err(unwritten)?;
    Ok(Report::Done { total: at })
}

/// Where the disk goes.
enum Out {
    File(File),
    Pipe(File),
}

impl Out {
    fn set_len(&mut self, size: u64) -> io::Result<()> {
        match self {
            Out::File(file) => file.set_len(size),
            Out::Pipe(out) => pipe::say_size(out, size),
        }
    }

    fn write_all_at(&mut self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            Out::File(file) => file.write_all_at(bytes, at),
            Out::Pipe(out) => pipe::piece(out, at, bytes),
        }
    }

    /// Of a pipe, whoever is at its other end does that.
    fn sync(&self) -> io::Result<()> {
        match self {
            Out::File(file) => file.sync_all(),
            Out::Pipe(_) => Ok(()),
        }
    }
}

/// Writes the blocks of `chunk` that are not zeros, neighbours at once; tells how many bytes that were.
fn write_data(target: &mut Out, at: u64, chunk: &[u8]) -> io::Result<u64> {
    let (mut offset, mut written) = (at, 0);
    for run in chunk.chunks(BLOCK).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|block| block.len()).sum();
        if run.first().is_some_and(|block| !is_zero(block)) {
            target.write_all_at(&run.concat(), offset)?;
            written += len as u64;
        }
        offset += len as u64;
    }
    Ok(written)
}

fn is_zero(block: &[u8]) -> bool {
    // One comparison of memory, which is as fast in a debug build.
    ZEROS.get(..block.len()).is_some_and(|zeros| zeros == block)
}

/// Gives up every right that reading one file and writing another does not need.
fn confine(limits: &Limits) -> nix::Result<()> {
    let fixed = |resource, value| setrlimit(resource, value, value);
    fixed(Resource::RLIMIT_AS, limits.memory_bytes)?;
    // At the hard limit the kernel sends SIGKILL, which would not say why: one second before, SIGXCPU does.
    setrlimit(Resource::RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds.saturating_add(1))?;
    fixed(Resource::RLIMIT_FSIZE, limits.virtual_bytes)?;
    fixed(Resource::RLIMIT_CORE, 0)?;
    // What is open stays open; nothing more can be.
    fixed(Resource::RLIMIT_NOFILE, 0)?;
    if geteuid().is_root() {
        setgroups(&[])?;
        setgid(Gid::from_raw(NOBODY))?;
        setuid(Uid::from_raw(NOBODY))?;
    }
    fixed(Resource::RLIMIT_NPROC, 0)?;
    nix::sys::prctl::set_no_new_privs()?;
    // After the change of user, which clears it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
}
