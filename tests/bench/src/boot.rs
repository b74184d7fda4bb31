//! To user space: CPU, exits, wall time, and what the VMM takes beside the guest's memory.

use anyhow::Context;

use crate::All;
use crate::exits::Exits;
use crate::machine::{Guest, Machine, Vmm};
use crate::table::{Better, Table};

/// What our init says at its start; the mark on its port comes right before.
const MARK: &str = "hutch-init: user space reached";
const READY: &str = "bench: ready";

/// Boots the same guest with each in turn.
///
/// # Errors
/// A guest did not come up, or the kernel does not count.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    let initrd = all.micro.join("initrd");
    let say = format!("echo {READY}; sleep 1");
    let guest = Guest { initrd: &initrd, command: &["sh", "-c", &say], disk: None, huge: true, tap: false };
    let mut everyone = vec![Vmm::Hutch, Vmm::Microvm, Vmm::Q35];
    everyone.extend(all.peers.iter().map(Vmm::Peer));
    for round in 0..all.rounds {
        // Whoever is first finds a host that others have not warmed: each is first in its turn.
        everyone.rotate_left(usize::from(round > 0));
        for &who in &everyone {
            let name = who.name();
            let exits = Exits::start()?;
            let mut machine = Machine::start(who, &guest, all)?;
            machine.wait_line(MARK).with_context(|| name.to_owned())?;
            let cpu = machine.cpu()?;
            let wall = machine.started.elapsed().as_secs_f64();
            let count = exits.read(&machine.threads()?)?;
            machine.wait_line(READY).with_context(|| name.to_owned())?;
            let memory = machine.memory()?;
            // Not every machine ends when its guest powers off.
            if !matches!(who, Vmm::Peer(_)) {
                machine.end().with_context(|| name.to_owned())?;
            }
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
