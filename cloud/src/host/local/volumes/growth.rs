//! Volumes that become larger and faster.

use std::sync::PoisonError;

use hutch_blockdev::{DiskErrorKind, SECTOR, open_layers};
use hutch_vmm::config::Rate;

use super::super::super::{HostError, Result};
use super::files::{chain, disk_failed};
use super::{Ask, Files, Record, Volumes};

impl Volumes {
    /// See [`Host::modify_volume`](super::super::Host::modify_volume). Who calls it holds the volume. `machine` asks the
    /// machine that has it for that size and that rate: only a machine may write to what it runs on.
    ///
    /// The record is written first, so that who comes after a crash knows what was meant; a machine that is started next
    /// finds its volume large.
    ///
    /// # Errors
    /// [`HostError::Missing`], [`HostError::NoRoom`].
    pub fn modify(&self, id: &str, bytes: u64, rate: &Rate, machine: Option<&Ask<'_>>) -> Result<()> {
        let old = self.record(id)?;
        let size = bytes.checked_next_multiple_of(SECTOR).unwrap_or(u64::MAX).max(old.size);
        let had = (size > old.size).then_some(old.size);
        let meant = Record { size, rate: rate.clone(), growing: old.growing.or(had), ..old.clone() };
        let told = || self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if meant == old && meant.growing.is_none() && (machine.is_none() || told().contains(id)) {
            return Ok(());
        }
        // Until the machine has heard of it, nobody takes it for told.
        told().remove(id);
        if meant != old {
            self.put(id, &meant)?;
        }
        let done = match machine {
            Some(ask) => ask(size, rate),
            None if meant.growing.is_some() => self.grow(id, &meant),
            None => Ok(()),
        };
        match &done {
            Ok(()) if meant.growing.is_some() => self.put(id, &Record { growing: None, ..meant })?,
            Ok(()) => {}
            // As it was, so that nobody tries it again.
            Err(HostError::NoRoom(_)) => {
                self.put(id, &Record { size: meant.growing.unwrap_or(old.size), growing: None, ..old })?;
            }
            Err(_) => {}
        }
        if done.is_ok() {
            told().insert(id.to_owned());
        }
        done
    }

    /// Makes the file of a volume that no machine has as large as its record says.
    pub(super) fn grow(&self, id: &str, record: &Record) -> Result<()> {
        let disk = open_layers(self.files_of(record)?.open()?, false).map_err(|e| disk_failed(id, &e))?;
        match disk.grow(record.size) {
            Err(e) if e.kind == DiskErrorKind::OutOfRange => {
                Err(HostError::NoRoom(format!("the volume {id}: {}", chain(&e))))
            }
            grown => grown.map_err(|e| disk_failed(id, &e)),
        }
    }

    /// The files of a volume for a machine that is being started, and what the volume may do. A growth that was cut short
    /// is done first. Who calls it holds the volume.
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn ready(&self, id: &str) -> Result<(Files, Rate)> {
        self.end_cut(id, None)?;
        let record = self.record(id)?;
        if record.growing.is_some() {
            match self.grow(id, &record) {
                Ok(()) => self.put(id, &Record { growing: None, ..record.clone() })?,
                // It is tried again by who wants it so large, and then by the machine.
                Err(error) => tracing::warn!(volume = id, %error, "it does not grow"),
            }
        }
        Ok((self.files_of(&record)?, record.rate))
    }
}
