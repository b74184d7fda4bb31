//! A machine's process, which outlives this one: how it is recorded, found again, watched and ended.
//!
//! A process is known by its id, by when it started (proc(5), field 22 of `stat`) and by the boot of the host, so that
//! another one that got the same id is never taken for it; once found it is held by a pidfd, which never means another.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};

/// What tells a process from every other that this host had or will have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pid: i32,
    /// In clock ticks since the host's boot.
    started: u64,
    /// The boot's id.
    boot: String,
}

/// A process that ran when it was started or found.
#[derive(Debug)]
pub struct Process {
    identity: Identity,
    fd: OwnedFd,
}

impl Identity {
    /// Whether the host has not gone down since the process was started.
    pub fn is_of_this_boot(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot)
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// A process that runs and has not been given its input: it does nothing before. Dropped, it reads the end of its input.
#[derive(Debug)]
pub struct Waiting {
    process: Process,
    input: Option<ChildStdin>,
}

impl Waiting {
    /// Starts a program in a process group of its own, so that a signal to this one's does not end it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> io::Result<Waiting> {
        let mut child = command.process_group(0).stdin(Stdio::piped()).spawn()?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        // It is not reaped yet, so all of this is about it, even if it has ended.
        let held = open(pid).and_then(|fd| Ok(Process { identity: identify(pid)?, fd }));
        let process = held.inspect_err(|_| {
            // It fails only where the child has ended already.
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Waiting { process, input: child.stdin.take() })
    }

    /// What to record of it, before it does anything.
    pub fn identity(&self) -> &Identity {
        &self.process.identity
    }

    /// Gives it `input` to read, and the end of that.
    ///
    /// # Errors
    /// It does not take it; it is ended then.
    pub fn go(mut self, input: &[u8]) -> io::Result<Process> {
        let given = self.input.take().map_or(Ok(()), |mut stdin| stdin.write_all(input));
        if let Err(e) = given {
            // What is wrong is told by the first error.
            let _ = self.process.end(Duration::ZERO);
            return Err(e);
        }
        Ok(self.process)
    }
}

impl Process {
    /// The process of this identity, started by whomever; `None` when it is gone.
    ///
    /// # Errors
    /// It cannot be looked for.
    pub fn find(identity: &Identity) -> io::Result<Option<Process>> {
        let found = open(identity.pid).and_then(|fd| Ok((identify(identity.pid)?, fd)));
        match found {
            // The one that has the id now is the one recorded, and so had it when the pidfd was opened.
            Ok((now, fd)) if now == *identity => Ok(Some(Process { identity: now, fd })),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(ESRCH) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Waits until it has ended, for at most `limit`. Returns whether it has.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&left)) {
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
                Ok(0) => return Ok(false),
                Ok(_) => {
                    // Only a child is reaped here, and once; an adopted one is reaped by init.
                    let _ =
                        waitid(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                    return Ok(true);
                }
            }
        }
    }

    /// The processor time that it has used, in microseconds, and the bytes of memory that it has; `None` when it is gone.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn usage(&self) -> io::Result<Option<(u64, u64)>> {
        let pid = self.identity.pid;
        let found = fs::read_to_string(format!("/proc/{pid}/stat"))
            .and_then(|stat| Ok((stat, fs::read_to_string(format!("/proc/{pid}/statm"))?)));
        // As long as it has not ended, the id is its own.
        if self.wait(Duration::ZERO)? {
            return Ok(None);
        }
        let (stat, memory) = found?;
        let odd = || io::Error::other(format!("/proc/{pid}/stat is not understood"));
        let (_, rest) = stat.rsplit_once(')').ok_or_else(odd)?;
        // proc(5): utime and stime are fields 14 and 15, counted here from field 3.
        let ticks: Vec<u64> =
            rest.split_ascii_whitespace().skip(11).take(2).filter_map(|n| n.parse().ok()).collect();
        let [user, system] = ticks.as_slice() else { return Err(odd()) };
        let pages = memory.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
        let tick = 1_000_000 / rustix::param::clock_ticks_per_second().max(1);
        let page = rustix::param::page_size() as u64;
        Ok(Some(((user + system) * tick, pages.ok_or_else(odd)? * page)))
    }

    /// Ends it: asks by SIGTERM, and does not ask any more after `patience`.
    ///
    /// # Errors
    /// It has not ended a second after SIGKILL, or may not be signalled.
    pub fn end(&self, patience: Duration) -> io::Result<()> {
        for (signal, limit) in [(Signal::TERM, patience), (Signal::KILL, Duration::from_secs(1))] {
            match pidfd_send_signal(&self.fd, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(e) => return Err(e.into()),
            }
            if self.wait(limit)? {
                return Ok(());
            }
        }
        let pid = self.identity.pid;
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("the process {pid} does not end, though killed")))
    }
}

const ESRCH: i32 = Errno::SRCH.raw_os_error();

fn open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(ESRCH))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn identify(pid: i32) -> io::Result<Identity> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, field 2, may hold anything, also spaces and brackets; fields are counted from behind it.
    let started =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    let started = started.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))?;
    Ok(Identity { pid, started, boot: boot_id()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn start(command: &mut Command, input: &[u8]) -> Process {
        Waiting::start(command).unwrap().go(input).unwrap()
    }

    fn shell(script: &str) -> Process {
        start(Command::new("/bin/sh").args(["-c", script]).stdout(Stdio::null()), b"")
    }

    #[test]
    fn a_process_is_found_again_until_it_ends() {
        let process = shell("exec sleep 100");
        let identity = process.identity.clone();
        let text = serde_json::to_string(&identity).unwrap();
        drop(process);
        let found = Process::find(&serde_json::from_str(&text).unwrap()).unwrap().expect("it runs");
        assert!(!found.wait(Duration::ZERO).unwrap());
        found.end(LONG).unwrap();
        assert!(Process::find(&identity).unwrap().is_none());
    }

    #[test]
    fn another_with_the_same_id_is_not_taken_for_it() {
        let process = shell("exec sleep 100");
        let own = process.identity.clone();
        for other in [
            Identity { started: own.started - 1, ..own.clone() },
            Identity { boot: "another".into(), ..own.clone() },
            Identity { pid: 0, ..own.clone() },
        ] {
            assert!(Process::find(&other).unwrap().is_none(), "{other:?}");
            assert_eq!(other.is_of_this_boot(), other.boot == own.boot);
        }
        process.end(LONG).unwrap();
    }

    #[test]
    fn what_it_uses_is_told_until_it_ends() {
        let process = shell("while :; do :; done");
        let until = Instant::now() + LONG;
        let (cpu, memory) = loop {
            let (cpu, memory) = process.usage().unwrap().expect("it runs");
            if cpu >= 50_000 {
                break (cpu, memory);
            }
            assert!(Instant::now() < until, "it uses no processor");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(cpu < 60_000_000, "{cpu} microseconds");
        assert!((64 << 10..1 << 30).contains(&memory), "{memory} bytes");
        process.end(LONG).unwrap();
        assert_eq!(process.usage().unwrap(), None);
    }

    #[test]
    fn who_does_not_hear_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let ready = dir.path().join("ready");
        let process = shell(&format!("trap '' TERM; touch {}; while :; do :; done", ready.display()));
        while !ready.exists() {
            assert!(!process.wait(Duration::from_millis(10)).unwrap(), "it ended by itself");
        }
        process.end(Duration::from_millis(300)).unwrap();
        assert!(process.wait(Duration::ZERO).unwrap());
    }

    #[test]
    fn it_reads_its_input_and_its_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let script = format!("cat > {}", out.display());
        let waiting = Waiting::start(Command::new("/bin/sh").args(["-c", &script])).unwrap();
        let identity = waiting.identity().clone();
        assert!(Process::find(&identity).unwrap().is_some(), "it runs and waits");
        let process = waiting.go(b"the plan").unwrap();
        assert!(process.wait(LONG).unwrap());
        assert_eq!(fs::read_to_string(&out).unwrap(), "the plan");
        assert!(Waiting::start(&mut Command::new("/nonexistent/vmm")).is_err());
        // Whoever started it is gone before it was told what to do.
        drop(Waiting::start(Command::new("/bin/sh").args(["-c", &script])).unwrap());
        let deadline = Instant::now() + LONG;
        while fs::read_to_string(&out).unwrap() != "" {
            assert!(Instant::now() < deadline, "it waits for ever");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
