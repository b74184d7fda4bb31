//! The guest's disk: the probe in the guest on a raw file and on a volume, under each VMM, and on the same raw file on
//! the host. QEMU has the file as virtio-blk with cache=writeback, which is what hutch does. Raw files and volumes are new
//! each time, so that the first write finds no room made for it in any of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::All;
use crate::machine::{DiskFile, Guest, Machine, Vmm};
use crate::probe::{Done, END, LOADS, Load, REGION, START, forget};
use crate::table::{Better, Table};
use crate::volume;

/// How long each load lasts, in milliseconds.
const TIME: &str = "3000";
/// Bytes of the disk: more than the probe uses.
const SIZE: u64 = REGION + (16 << 20);

/// Puts the loads on the disks of each in turn.
///
/// # Errors
/// A guest did not come up, or a load failed.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    let initrd = all.probe_initrd.as_deref().context("the disk part needs --probe-initrd")?;
    let raw = Scratch(all.dir.join("bench-disk.raw"));
    let base = Scratch(all.dir.join("bench-base.raw"));
    let top = Scratch(all.dir.join("bench-top.qcow2"));
    fill(&base.0)?;
    let mut everyone = [Vmm::Hutch, Vmm::Q35];
    for round in 0..all.rounds {
        make_raw(&raw.0)?;
        host(&raw.0, table)?;
        everyone.rotate_left(usize::from(round > 0));
        for who in everyone {
            // Each is first in its turn: what comes later finds the host's memory as the other one left it.
            for volume in [round % 2 == 1, round % 2 == 0] {
                let disk = if volume {
                    make_volume(who, &base.0, &top.0)?;
                    DiskFile { path: top.0.clone(), base: Some(base.0.clone()) }
                } else {
                    make_raw(&raw.0)?;
                    DiskFile { path: raw.0.clone(), base: None }
                };
                let kind = if volume { "volume" } else { "raw" };
                guest(who, &disk, initrd, all, table).with_context(|| format!("{}, {kind}", who.name()))?;
                let _ = fs::remove_file(&disk.path);
            }
            eprintln!("disk, round {round}: {}", who.name());
        }
    }
    Ok(())
}

/// A file that goes with the bench.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A file of the disk's size without anything in it.
fn make_raw(path: &Path) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(file.set_len(SIZE)?)
}

/// Writes the whole file: a volume's base that has something everywhere.
fn fill(path: &Path) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    let block = vec![0x5a; 1 << 20];
    for at in (0..SIZE).step_by(block.len()) {
        file.write_all_at(&block, at)?;
    }
    Ok(file.sync_all()?)
}

/// An empty volume on `base`, each in its own program's way.
fn make_volume(who: Vmm, base: &Path, top: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_file(top);
    if who == Vmm::Hutch {
        return volume::create(top, SIZE);
    }
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(base).arg(top);
    let status = command.status().context("cannot start qemu-img")?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    Ok(())
}

/// The host's own figures, of the same file by way of the page cache, as the VMMs use it.
fn host(path: &Path, table: &mut Table) -> anyhow::Result<()> {
    let own = std::env::current_exe()?;
    let output = Command::new(own).arg("probe").arg(path).args(["--time-ms", TIME]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    for load in &LOADS {
        let line = text.lines().find(|l| l.split(' ').take(2).eq([END, load.name]));
        let done = line.and_then(Done::parse);
        let done = done
            .with_context(|| format!("the probe on the host: {}", String::from_utf8_lossy(&output.stderr)))?;
        note("raw disk", load, "host's file", done, done.cpu, table);
    }
    Ok(())
}

/// The loads in a guest, with the CPU of the process that runs it.
fn guest(who: Vmm, disk: &DiskFile, initrd: &Path, all: &All, table: &mut Table) -> anyhow::Result<()> {
    let command = ["/bin/hutch-bench", "probe", "/dev/vda", "--direct", "--time-ms", TIME];
    let guest = Guest { initrd, command: &command, disk: Some(disk), huge: true, tap: false };
    let mut machine = Machine::start(who, &guest, all)?;
    let kind = if disk.base.is_some() { "volume" } else { "raw disk" };
    for load in &LOADS {
        machine.wait_line(&format!("{START} {}", load.name))?;
        if load.cold {
            for file in std::iter::once(&disk.path).chain(&disk.base) {
                forget(&File::open(file)?)?;
            }
        }
        let before = machine.cpu()?;
        let line = machine.wait_line(&format!("{END} {}", load.name))?;
        let cpu = machine.cpu()? - before;
        let done = Done::parse(&line).with_context(|| format!("the probe said \"{}\"", line.trim()))?;
        note(kind, load, who.name(), done, cpu, table);
        if who == Vmm::Hutch && disk.base.is_none() {
            note("volume", load, "our raw disk", done, cpu, table);
        }
    }
    machine.end()
}

/// Enters what a load did, and the seconds of CPU it took on the host.
fn note(kind: &str, load: &Load, who: &str, done: Done, cpu: f64, table: &mut Table) {
    let name = format!("{kind}: {}", load.title);
    let rate = done.operations as f64 / done.seconds.max(1e-6);
    table.add(&name, "requests/s", Better::Higher, who, rate);
    let per_gib = cpu / (done.bytes.max(1) as f64 / f64::from(1 << 30));
    table.add(&format!("{name}: CPU"), "s/GiB", Better::Lower, who, per_gib);
}
