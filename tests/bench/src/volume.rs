//! A volume of a 10 GiB template, made: what is written for it, and how long a process takes that makes one.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};

use crate::All;
use crate::table::{Better, HUTCH, Table};

const TEMPLATE: u64 = 10 << 30;

/// Makes an empty volume, as `hutch boot --root-volume` does.
///
/// # Errors
/// The file is there already, or cannot be written.
pub fn create(path: &Path, size: u64) -> anyhow::Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(path);
    let file = file.with_context(|| format!("cannot make {}", path.display()))?;
    hutch_blockdev::qcow2::create(&file, size)?;
    Ok(())
}

/// Makes volumes by each in turn.
///
/// # Errors
/// One cannot be made.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    let template = all.dir.join("bench-template.raw");
    File::create(&template)?.set_len(TEMPLATE)?;
    let own = std::env::current_exe()?;
    let path = all.dir.join("bench-volume.qcow2");
    // Once more than asked for: the first only brings the programs into memory.
    for round in 0..=all.rounds {
        for who in [HUTCH, "qemu-img"] {
            // It is there when an earlier bench was killed.
            let _ = fs::remove_file(&path);
            let mut command = if who == HUTCH { Command::new(&own) } else { Command::new("qemu-img") };
            if who == HUTCH {
                command.arg("create").arg(&path).arg(TEMPLATE.to_string());
            } else {
                command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&template).arg(&path);
            }
            let (took, bytes) = timed(&mut command, &path)?;
            if round > 0 {
                table.add("10 GiB volume: a process that makes it", "ms", Better::Lower, who, took);
                table.add("10 GiB volume: bytes on the disk", "KiB", Better::Lower, who, bytes);
            }
            fs::remove_file(&path)?;
        }
        let started = Instant::now();
        create(&path, TEMPLATE)?;
        let took = started.elapsed().as_secs_f64() * 1e3;
        if round > 0 {
            table.add("10 GiB volume: the call that makes it", "ms", Better::Lower, HUTCH, took);
        }
        fs::remove_file(&path)?;
    }
    fs::remove_file(&template)?;
    Ok(())
}

/// Milliseconds of the command, and the KiB of disk that the file it made takes once they are on it.
fn timed(command: &mut Command, path: &Path) -> anyhow::Result<(f64, f64)> {
    let started = Instant::now();
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    let took = started.elapsed().as_secs_f64() * 1e3;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    let file = File::open(path)?;
    // Blocks are counted when they are allocated, which may be as late as this.
    file.sync_all()?;
    Ok((took, file.metadata()?.blocks() as f64 / 2.0))
}
