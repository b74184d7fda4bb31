//! The child process `hutch-vmm`, in the foreground: it is watched until it ends and hands back its report.

use std::fs::File;
use std::io::Write;
use std::process::{Child, Stdio};

use anyhow::Context;
use hutch_vmm::config::{MachineConfig, Report};
use hutch_vmm::launch::{self, Inherit};

/// A running `hutch-vmm`.
pub struct Vmm {
    child: Child,
    report: File,
}

impl Vmm {
    /// Starts it. `report` is the reading end of the pipe that `config.report` names.
    pub fn start(config: &MachineConfig, inherit: Inherit, report: File) -> anyhow::Result<Vmm> {
        let program = launch::program()?;
        let mut command = inherit.command(&program);
        let child = command.stderr(Stdio::inherit()).spawn();
        let mut child = child.with_context(|| format!("cannot start {}", program.display()))?;
        // Only the child holds what was given now, so that a pipe ends when the child does.
        drop(command);
        let mut stdin = child.stdin.take().context("hutch-vmm has no standard input")?;
        stdin
            .write_all(&hutch_vmm::secret::json(config)?)
            .context("hutch-vmm does not take its configuration")?;
        Ok(Vmm { child, report })
    }

    /// The process, for signals.
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// Waits for the end and reads the report.
    pub fn wait(mut self) -> anyhow::Result<Report> {
        let report = launch::report(&self.report);
        let status = self.child.wait()?;
        report.with_context(|| format!("hutch-vmm left no report ({status})"))
    }
}
