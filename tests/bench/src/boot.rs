//! To user space: CPU, exits, wall time, and what the VMM takes beside the guest's memory.

use std::fs;

use anyhow::{Context, bail};

use crate::All;
use crate::exits::Exits;
use crate::machine::{Guest, MEMORY_MIB, Machine, Vmm};
use crate::table::{Better, Table};

/// What our init says at its start; the mark on its port comes right before.
const MARK: &str = "hutch-init: user space reached";
const READY: &str = "bench: ready";

/// Boots the same guest with each in turn.
///
/// # Errors
/// A guest did not come up, or the kernel does not count.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    reserve_huge_pages(MEMORY_MIB / 2 + 8)?;
    let initrd = all.micro.join("initrd");
    let say = format!("echo {READY}; sleep 1");
    let guest = Guest { initrd: &initrd, command: &["sh", "-c", &say], disk: None, huge: true };
    for round in 0..all.rounds {
        for who in [Vmm::Hutch, Vmm::Microvm, Vmm::Q35] {
            let name = who.name();
            let exits = Exits::start()?;
            let mut machine = Machine::start(who, &guest, all)?;
            machine.wait_line(MARK).with_context(|| name)?;
            let cpu = machine.cpu()?;
            let wall = machine.started.elapsed().as_secs_f64();
            let count = exits.read(&machine.threads()?)?;
            machine.wait_line(READY).with_context(|| name)?;
            let memory = machine.memory()?;
            machine.end().with_context(|| name)?;
            let mut add = |metric, unit, value| table.add(metric, unit, Better::Lower, name, value);
            add("CPU to user space", "s", cpu);
            add("exits to user space, until it is reached", "exits", count as f64);
            add("wall time to user space", "s", wall);
            add("VMM memory beside the guest's", "MiB", memory);
            eprintln!(
                "boot, round {round}: {name}: {cpu:.2} CPU s, {count} exits, {wall:.2} s, {memory:.1} MiB"
            );
        }
    }
    Ok(())
}

/// Has the kernel set aside so many huge pages of 2 MiB, at least.
fn reserve_huge_pages(pages: u64) -> anyhow::Result<()> {
    let path = "/proc/sys/vm/nr_hugepages";
    let now = || -> anyhow::Result<u64> { Ok(fs::read_to_string(path)?.trim().parse()?) };
    if now()? < pages {
        fs::write(path, pages.to_string())
            .with_context(|| format!("cannot write {path}; run the bench as root"))?;
    }
    match now()? {
        got if got < pages => {
            bail!("the host set aside {got} huge pages of {pages}; it has too little free memory")
        }
        _ => Ok(()),
    }
}
