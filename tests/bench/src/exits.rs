//! Exits to user space, counted by the kernel: every return of KVM_RUN passes the tracepoint `kvm_userspace_exit`, on
//! which a histogram by thread and reason is hung. It stops by itself when a guest writes to the port that marks user
//! space, where hutch's own count ends too; a guest without that port is counted until its console's line is read.
//!
//! No other guest may boot meanwhile: its mark would stop the count.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use nix::unistd::Pid;

const TRACEFS: &str = "/sys/kernel/tracing";
const COUNT: &str = "hist:keys=common_pid,reason";
/// The port of hutch's init: `USER_SPACE_PORT` of the machine.
const STOP: &str = "disable_hist:kvm:kvm_userspace_exit if port==0xf5";

/// A count that runs.
pub struct Exits(());

impl Exits {
    /// Starts to count, from nothing.
    ///
    /// # Errors
    /// The kernel does not trace: not root, or built without it.
    pub fn start() -> anyhow::Result<Exits> {
        if !Path::new(TRACEFS).join("events").exists() {
            let mounted = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACEFS]).status()?;
            if !mounted.success() {
                bail!("cannot mount tracefs at {TRACEFS}; run the bench as root");
            }
        }
        // What a bench that was killed has left.
        drop(Exits(()));
        trigger("kvm_userspace_exit", COUNT)?;
        let count = Exits(());
        trigger("kvm_pio", STOP)?;
        Ok(count)
    }

    /// The count of these threads.
    ///
    /// # Errors
    /// The histogram cannot be read.
    pub fn read(&self, threads: &[Pid]) -> anyhow::Result<u64> {
        let path = event("kvm_userspace_exit", "hist");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(sum(&text, threads))
    }
}

impl Drop for Exits {
    fn drop(&mut self) {
        // They fail where there is none.
        let _ = trigger("kvm_pio", &format!("!{STOP}"));
        let _ = trigger("kvm_userspace_exit", &format!("!{COUNT}"));
    }
}

fn event(name: &str, file: &str) -> String {
    format!("{TRACEFS}/events/kvm/{name}/{file}")
}

fn trigger(name: &str, text: &str) -> anyhow::Result<()> {
    let path = event(name, "trigger");
    let advice = "is the kvm module loaded, and are you root?";
    fs::write(&path, text).with_context(|| format!("cannot write \"{text}\" to {path}; {advice}"))
}

/// Sums lines such as `{ common_pid:   217, reason:   2 } hitcount:   114`.
fn sum(histogram: &str, threads: &[Pid]) -> u64 {
    let count = |line: &str| {
        let (keys, hits) = line.split_once("hitcount:")?;
        let pid = keys.split_once("common_pid:")?.1.split(',').next()?.trim().parse().ok()?;
        threads.contains(&Pid::from_raw(pid)).then(|| hits.trim().parse::<u64>().ok())?
    };
    histogram.lines().filter_map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machines_own_threads_are_counted() {
        let text = "# event histogram\n\n\
            { common_pid:        217, reason:          2 } hitcount:        114\n\
            { common_pid:        217, reason:          6 } hitcount:          5\n\
            { common_pid:       2170, reason:          2 } hitcount:       7000\n\n\
            Totals:\n    Hits: 7119\n    Entries: 3\n    Dropped: 0\n";
        assert_eq!(sum(text, &[Pid::from_raw(217), Pid::from_raw(218)]), 119);
    }
}
