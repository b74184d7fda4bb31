//! Who stays with a machine: a thread each, which sees its end at once, and starts the next process where the guest only
//! reboots.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::machine::{Kept, Phase, end_of};
use super::{REBOOT, Shared, Slot, State, TICK, lock, machine, stores};
use crate::host::{End, HostError, Result};

impl Shared {
    /// Takes up what an earlier daemon left of a machine.
    pub(super) fn find(self: Arc<Shared>, id: &str, slot: Slot, kept: Kept) -> Result<()> {
        let live = match kept.end {
            Some(_) => {
                // It ended, and then the daemon did.
                stores::clear(&slot.dir.0)?;
                None
            }
            None => machine::adopt(&kept, &slot.dir, &self.means)?,
        };
        let slot = Arc::new(slot);
        let mut state = slot.state();
        let found = live.is_some();
        (state.live, state.kept) = (live, Some(kept));
        if found {
            let State { kept: Some(kept), reboot_by, .. } = &mut *state else { return Ok(()) };
            tracing::info!(instance = id, "it runs: adopted");
            if kept.phase != Phase::Running {
                kept.phase = Phase::Running;
                slot.dir.write(kept)?;
            }
            *reboot_by = kept.restart.then(|| Instant::now() + REBOOT);
        }
        let ended = !found && state.kept.as_ref().is_some_and(Kept::runs);
        drop(state);
        lock(&self.slots).insert(id.to_owned(), slot.clone());
        match found || ended {
            // What ended while nobody watched is settled by the thread, too: a reboot takes its time.
            true => self.watch(slot),
            false => Ok(()),
        }
    }

    /// Has a thread stay with a machine until it has ended.
    pub(super) fn watch(self: Arc<Shared>, slot: Arc<Slot>) -> Result<()> {
        let shared = self.clone();
        let stay = move || {
            while !shared.closing.load(Ordering::Acquire) {
                let (process, reboot_by) = {
                    let state = slot.state();
                    (state.live.as_ref().map(|live| live.process.clone()), state.reboot_by)
                };
                if let Some(process) = process {
                    let late = reboot_by.is_some_and(|by| Instant::now() >= by);
                    let ended =
                        if late { process.end(Duration::ZERO).map(|()| true) } else { process.wait(TICK) };
                    match ended {
                        Ok(true) => {}
                        Ok(false) => {
                            slot.look();
                            continue;
                        }
                        Err(error) => {
                            tracing::warn!(machine = %slot.dir.0.display(), %error, "its process cannot be watched");
                            std::thread::sleep(TICK);
                            continue;
                        }
                    }
                }
                if !shared.settle(&slot) {
                    return;
                }
            }
        };
        let watcher = std::thread::Builder::new().name("machine".into()).spawn(stay);
        let watcher = watcher.map_err(|e| HostError::Failed(format!("cannot watch a machine: {e}")))?;
        let mut watchers = lock(&self.watchers);
        watchers.retain(|watcher| !watcher.is_finished());
        watchers.push(watcher);
        Ok(())
    }

    /// Takes note of the end of a machine's process, and starts the next where the guest reboots. Returns whether the
    /// machine runs.
    pub(super) fn settle(&self, slot: &Slot) -> bool {
        let _work = lock(&slot.work);
        let (mut kept, stopping) = {
            let mut state = slot.state();
            if state.live.as_ref().is_some_and(|live| !live.process.wait(Duration::ZERO).unwrap_or(false)) {
                // Somebody else settled it, and it runs again.
                return true;
            }
            let (live, stopping) = (state.live.take(), state.stopping);
            state.reboot_by = None;
            let kept = state.kept.clone();
            drop(state);
            // Interfaces go, with their taps and their rules.
            drop(live);
            match kept.filter(Kept::runs) {
                Some(kept) => (kept, stopping),
                None => return false,
            }
        };
        let id = kept.machine.id.clone();
        let end = end_of(slot.dir.report());
        let host_went_down = kept.process.as_ref().is_some_and(|process| !process.is_of_this_boot());
        if host_went_down {
            kept.end = Some(End::HostDown);
        } else if !stopping && (end.is_none() || kept.restart || kept.phase == Phase::Restarting) {
            tracing::info!(instance = id, "it reboots");
            (kept.phase, kept.restart) = (Phase::Restarting, false);
            // A snapshot that is being taken of them has to be done.
            let _held = self.volumes.hold(kept.machine.volumes.iter().map(String::as_str));
            // Before the report of its end is gone: whoever finds it later knows that it is to run.
            let again = slot.dir.write(&kept);
            let again =
                again.and_then(|()| machine::launch(&mut kept, &slot.dir, &self.volumes, &self.means));
            match again {
                Ok(live) => {
                    let mut state = slot.state();
                    (state.kept, state.live) = (Some(kept), Some(live));
                    return true;
                }
                Err(error) => {
                    kept.end = Some(End::Failed(format!("it did not come back from a reboot: {error}")))
                }
            }
        } else {
            kept.end = Some(if stopping { End::Stopped } else { end.unwrap_or(End::PowerOff) });
        }
        tracing::info!(instance = id, end = ?kept.end, "it has ended");
        if let Err(error) = slot.dir.write(&kept) {
            // At the next start its process is not found, and it is known as ended again.
            tracing::warn!(instance = id, %error, "its end is not recorded");
        } else if let Err(error) = stores::clear(&slot.dir.0) {
            // Nobody is given them; they go with the next start of it, or of the daemon.
            tracing::warn!(instance = id, %error, "what it had in its instance stores takes room still");
        }
        self.volumes.settle(&kept.machine.volumes);
        slot.state().kept = Some(kept);
        *lock(&self.events) += 1;
        self.changed.notify_all();
        false
    }
}
