//! Volumes of a machine that runs: they come, and they go once its guest has let them go.
//!
//! The machine's record names a volume before its process has it, and until its process has it no more: whoever comes after a
//! crash finds in it each volume that may be open.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use hutch_blockdev::Layer;
use hutch_vmm::launch::{self, LaunchError};
use serde_json::{Value, json};

use super::machine::{ANSWER, Dir, FLUSH, Kept};
use super::volumes::{Running, User, chain, serial};
use super::{Held, Local, Shared, Slot, TICK, lock};
use crate::host::{HostError, Result};

impl Running for Dir {
    fn cut(&self, cuts: &[(String, String, File)]) -> Result<()> {
        let asked = launch::cut_disks(&self.0.join("control.sock"), cuts, ANSWER);
        asked.map_err(|e| HostError::Failed(format!("{}: {}", self.0.display(), chain(&e))))
    }

    fn seal(&self, volume: &str) -> Result<()> {
        let request = json!({ "command": "seal-disk", "serial": serial(volume) });
        let asked = self.ask_all(&request, FLUSH).map(drop);
        asked.map_err(|e| HostError::Failed(format!("{}: {}", self.0.display(), chain(&e))))
    }

    fn rebase(&self, volume: &str, layers: &[Layer]) -> std::result::Result<(), LaunchError> {
        launch::rebase_disk(&self.0.join("control.sock"), layers, &serial(volume), ANSWER)
    }
}

impl Shared {
    /// Does something with a volume that is held, and with the machine that has it.
    pub(super) fn with_machine(
        &self,
        volume: &str,
        job: &mut dyn FnMut(Option<&dyn Running>) -> Result<()>,
    ) -> Result<()> {
        let _held = self.volumes.hold([volume]);
        let users = self.users(&[volume.to_owned()]);
        match users.first() {
            Some((dir, _)) if has(dir, volume)? => job(Some(dir)),
            _ => job(None),
        }
    }

    /// Does something with volumes that are held, and with the machines that have them; these are held too, with all that
    /// their guests wrote in the volumes' files, where there are several.
    pub(super) fn at_an_instant(
        &self,
        volumes: &[String],
        job: &dyn Fn(&[User<'_>]) -> Result<()>,
    ) -> Result<()> {
        let until = Instant::now() + FLUSH;
        loop {
            let held = self.volumes.hold(volumes.iter().map(String::as_str));
            let mut users = Vec::new();
            for (dir, _) in self.users(volumes) {
                let having = volumes.iter().map(|volume| Ok((volume.clone(), has(&dir, volume)?)));
                let having = having.collect::<Result<Vec<_>>>()?;
                let having: Vec<_> = having.into_iter().filter(|(_, has)| *has).map(|(id, _)| id).collect();
                users.push((dir, having));
            }
            // Between the cuts of several machines nobody may write.
            let paused = users.iter().filter(|_| users.len() > 1).map(|(dir, _)| Held::new(dir));
            let paused = paused.collect::<std::result::Result<Vec<_>, _>>();
            let paused = paused.map_err(|e| HostError::Failed(chain(&e)))?;
            let of: Vec<User<'_>> =
                users.iter().map(|(dir, having)| (dir as &dyn Running, having.clone())).collect();
            match job(&of) {
                // A machine is ending, or lets one go.
                Err(HostError::Busy(_)) if Instant::now() < until => {}
                done => return done,
            }
            drop((paused, held));
            std::thread::sleep(TICK);
        }
    }

    /// Keeps the layers of volumes and snapshots few, until the volumes are closed.
    pub(super) fn keep_tidy(self: Arc<Shared>) {
        self.volumes.keep_tidy(&|volume, job| self.with_machine(volume, job));
    }
}

impl Local {
    /// See [`Host::attach`](crate::host::Host::attach).
    pub(super) fn plug(&self, id: &str, volume: &str) -> Result<()> {
        let (missing, slot) = (|| HostError::Missing(format!("machine {id}")), self.slot(id));
        let slot = slot.ok_or_else(missing)?;
        let _work = lock(&slot.work);
        slot.state().running().ok_or_else(missing)?;
        let _held = self.shared.volumes.hold([volume]);
        self.shared.volumes.files(volume)?;
        let recorded = |volumes: &mut Vec<String>| {
            volumes.retain(|have| have != volume);
            volumes.push(volume.into());
        };
        if has(&slot.dir, volume)? {
            // It had heard an earlier time, though its answer was lost.
            return record(&slot, recorded);
        }
        let (files, rate) = self.shared.volumes.ready(volume)?;
        // Locked here, so that no other machine has it; the machine gets the same open files, and with them the lock.
        let layers = files.open()?;
        record(&slot, recorded)?;
        let socket = slot.dir.0.join("control.sock");
        let attached =
            launch::attach_disk(&socket, &layers, (&serial(volume), &files.top), false, &rate, ANSWER);
        if let Err(error) = attached {
            // It may have heard: its answer alone was lost, now or an earlier time.
            if matches!(error, LaunchError::Refused(_)) && !has(&slot.dir, volume)? {
                record(&slot, |volumes| volumes.retain(|have| have != volume))?;
            }
            return Err(HostError::Failed(format!("{volume} is not attached to {id}: {}", chain(&error))));
        }
        tracing::info!(instance = id, volume, "attached");
        Ok(())
    }

    /// See [`Host::detach`](crate::host::Host::detach).
    pub(super) fn unplug(&self, id: &str, volume: &str, force: bool) -> Result<bool> {
        let (missing, slot) = (|| HostError::Missing(format!("machine {id}")), self.slot(id));
        let slot = slot.ok_or_else(missing)?;
        let _work = lock(&slot.work);
        slot.state().running().ok_or_else(missing)?;
        if has(&slot.dir, volume)? {
            let request = json!({ "command": "detach-disk", "serial": serial(volume), "force": force });
            match slot.dir.ask_all(&request, ANSWER) {
                // What it refuses is a disk that went at this moment.
                Ok(_) | Err(LaunchError::Refused(_)) => {}
                Err(error) => return Err(silent(id, &error)),
            }
            if has(&slot.dir, volume)? {
                return Ok(false);
            }
        }
        let _held = self.shared.volumes.hold([volume]);
        // Its word is not enough: it is gone when nobody has its file open any more.
        if !self.shared.volumes.is_free(volume)? {
            return Ok(false);
        }
        record(&slot, |volumes| volumes.retain(|have| have != volume))?;
        tracing::info!(instance = id, volume, "detached");
        Ok(true)
    }
}

/// Whether the machine's process has the volume.
pub(super) fn has(dir: &Dir, volume: &str) -> Result<bool> {
    let status = dir.ask("status", ANSWER).map_err(|e| silent(&dir.0.display().to_string(), &e))?;
    let disks = status.get("disks").and_then(Value::as_array);
    let serial = serial(volume);
    Ok(disks.is_some_and(|disks| disks.iter().any(|disk| disk.get("serial") == Some(&json!(serial)))))
}

fn silent(id: &str, error: &LaunchError) -> HostError {
    HostError::Failed(format!("{id}: its machine does not say which disks it has: {}", chain(error)))
}

/// Changes which volumes the record names.
fn record(slot: &Slot, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
    let mut state = slot.state();
    let Some(kept) = state.kept.as_mut().filter(|kept| kept.runs()) else { return Ok(()) };
    let mut new: Kept = kept.clone();
    change(&mut new.machine.volumes);
    if new.machine.volumes != kept.machine.volumes {
        slot.dir.write(&new)?;
        *kept = new;
    }
    Ok(())
}
