//! What the regions of one machine have together: its memory.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use super::volumes::failed;
use super::{HostError, Machine, Result, Shared, lock};

/// The hosts of the regions of this machine, in one process.
#[derive(Default)]
pub struct Together(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    hosts: Vec<Weak<Shared>>,
    /// Memory in MiB of machines that are being started, by their ids.
    begun: BTreeMap<String, u64>,
}

impl Together {
    /// One more host.
    pub(super) fn join(&self, host: &Arc<Shared>) {
        lock(&self.0).hosts.push(Arc::downgrade(host));
    }

    /// Room for a machine that is to be started, until it is known to run and this is dropped.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]: machines have together no more memory than the host has.
    pub(super) fn room(&self, machine: &Machine) -> Result<Room<'_>> {
        let path = Path::new("/proc/meminfo");
        let text = fs::read_to_string(path).map_err(|e| failed(path, e))?;
        let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let (total, wants) = (kib.unwrap_or(u64::MAX) / 1024, machine.memory_mib);
        let mut inner = lock(&self.0);
        let hosts = inner.hosts.iter().filter_map(Weak::upgrade);
        let slots = hosts.flat_map(|host| lock(&host.slots).values().cloned().collect::<Vec<_>>());
        // One that reboots has its memory still.
        let run = slots.filter_map(|slot| {
            let state = slot.state();
            state.kept.as_ref().filter(|kept| kept.runs()).map(|kept| kept.machine.memory_mib)
        });
        let used = run.chain(inner.begun.values().copied()).fold(0, u64::saturating_add);
        if used.saturating_add(wants) > total {
            return Err(HostError::NoRoom(format!("{wants} MiB more than the {used} of {total} MiB in use")));
        }
        inner.begun.insert(machine.id.clone(), wants);
        Ok(Room { together: self, id: machine.id.clone() })
    }
}

/// Room that is kept for a machine.
pub(super) struct Room<'a> {
    together: &'a Together,
    id: String,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        lock(&self.together.0).begun.remove(&self.id);
    }
}
