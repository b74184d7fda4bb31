//! Snapshots of a volume that is written: how long one takes that leaves it at an instant, and what reading costs when there
//! are many.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use hutch_blockdev::{Disk, Format, Stack, open_layers, qcow2, stack};

use crate::All;
use crate::table::{Better, HUTCH, Table};

/// What is written before each snapshot.
const WRITTEN: u64 = 64 << 20;
const MIB: usize = 1 << 20;
/// Bytes of the disk that has many snapshots, and reads of it.
const SIZE: u64 = 256 << 20;
const READS: u64 = 20_000;
const BLOCK: usize = 4096;

/// Takes snapshots, and reads what lies under many.
///
/// # Errors
/// A file cannot be made or read, or qemu-img fails.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    let dir = Scratch::new(all.dir.join(format!("bench-snapshots-{}", std::process::id())))?;
    for round in 0..all.rounds {
        for gib in [1, 100] {
            taken(&dir.0, round, gib, table)?;
        }
    }
    let (one, fifty) = (layers(&dir.0, "one", 1)?, layers(&dir.0, "fifty", 50)?);
    // Once more than asked for: the first brings all of it into memory.
    for round in 0..=all.rounds {
        for (who, disk) in [("of 1", &one), (HUTCH, &fifty)] {
            let rate = reads(&**disk, u64::from(round as u32))?;
            if round > 0 {
                table.add("random read, 4 KiB, of 50 layers", "requests/s", Better::Higher, who, rate);
            }
        }
    }
    Ok(())
}

/// A directory that goes with the bench.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> anyhow::Result<Scratch> {
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn layer(path: &Path, size: u64) -> anyhow::Result<Arc<File>> {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    qcow2::create(&file, size)?;
    Ok(Arc::new(file))
}

/// One snapshot of a volume of so many GiB, a part of which was just written.
fn taken(dir: &Path, round: usize, gib: u64, table: &mut Table) -> anyhow::Result<()> {
    let stack = Stack::on(layer(&dir.join("first"), gib << 30)?, vec![], None)?;
    let block = vec![round as u8 + 1; MIB];
    // Over all of it.
    for at in (0..gib << 30).step_by(((gib << 30) / (WRITTEN / MIB as u64)) as usize) {
        stack.write_at(at, &block)?;
    }
    stack.flush()?;
    let began = Instant::now();
    let top = layer(&dir.join("second"), gib << 30)?;
    let waits = Instant::now();
    stack::cut(vec![(&stack, top)])?;
    let waited = waits.elapsed();
    stack.seal()?;
    let all = began.elapsed();
    let mut note = |what: &str, who: &str, took: f64| {
        table.add(&format!("snapshot of {gib} GiB: {what}"), "ms", Better::Lower, who, took * 1e3);
    };
    note("requests wait, at most", HUTCH, waited.as_secs_f64());
    note("the calls that make it", HUTCH, all.as_secs_f64());
    // QEMU's of the same file, while nobody uses it.
    drop(stack);
    let began = Instant::now();
    let mut command = Command::new("qemu-img");
    command.args(["snapshot", "-c", "one"]).arg(dir.join("first"));
    let status = command.status().context("cannot start qemu-img")?;
    if !status.success() {
        bail!("{command:?} failed ({status})");
    }
    note("the calls that make it", "qemu-img", began.elapsed().as_secs_f64());
    Ok(())
}

/// A disk of so many layers, each of which wrote a part of it.
fn layers(dir: &Path, name: &str, count: u64) -> anyhow::Result<Arc<dyn Disk>> {
    let path = |i: u64| dir.join(format!("{name}{i}"));
    let open = |upto: u64| -> anyhow::Result<Arc<dyn Disk>> {
        let file = |i: u64| Ok((File::options().read(true).write(true).open(path(i))?, Format::Qcow2));
        let files = (0..upto).rev().map(file).collect::<std::io::Result<Vec<_>>>()?;
        Ok(open_layers(files, false)?)
    };
    let mut random = 1;
    for i in 0..count {
        layer(&path(i), SIZE)?;
        let disk = open(i + 1)?;
        if i == 0 {
            for at in (0..SIZE).step_by(MIB) {
                disk.write_at(at, &vec![0x5a; MIB])?;
            }
        }
        for _ in 0..8 {
            random = crate::probe::xorshift(random);
            disk.write_at(random % (SIZE / BLOCK as u64) * BLOCK as u64, &[i as u8; BLOCK])?;
        }
        disk.flush()?;
    }
    open(count)
}

/// Reads a second.
fn reads(disk: &dyn Disk, seed: u64) -> anyhow::Result<f64> {
    let (mut random, mut block) = (seed | 1, [0; BLOCK]);
    let began = Instant::now();
    for _ in 0..READS {
        random = crate::probe::xorshift(random);
        disk.read_at(random % (SIZE / BLOCK as u64) * BLOCK as u64, &mut block)?;
    }
    Ok(READS as f64 / began.elapsed().as_secs_f64())
}
