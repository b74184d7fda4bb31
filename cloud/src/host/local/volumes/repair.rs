//! Volumes that are damaged are made whole. Layers that others lie on, too, are sealed: they are looked at, and never written.

use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;

use hutch_blockdev::qcow2::{Checked, Repaired, check, repair};
use hutch_blockdev::store::lock;
use hutch_blockdev::{DiskError, DiskErrorKind};

use super::super::super::{HostError, RepairedLayer, Result};
use super::chains::{Chains, is_volume};
use super::files::{disk_failed, failed};
use super::{Place, Record, Volumes};

/// As long as this is there, no layer is merged into another.
struct Still<'a>(&'a Volumes);

impl<'a> Still<'a> {
    fn new(volumes: &'a Volumes) -> Still<'a> {
        volumes.keep_still();
        Still(volumes)
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// Who has a layer beside this volume.
fn others(chains: &Chains, layer: &String, volume: &str) -> Vec<String> {
    let all = chains.volumes.iter().chain(&chains.snapshots);
    let has = all.filter(|(id, chain)| *id != volume && chain.contains(layer)).map(|(id, _)| id.clone());
    let read = chains.read.values().any(|chain| chain.contains(layer));
    has.chain(read.then(|| "a copy that is being made".to_owned())).collect()
}

/// What sizes the disk of a layer can have: the top one the volume's own, those below no larger ones.
fn sizes(record: &Record, index: usize) -> RangeInclusive<u64> {
    let least = record.growing.map_or(record.size, |old| old.min(record.size));
    if index == 0 { least..=record.size } else { 0..=record.size }
}

/// A layer without a header that could be read is wrong as a whole.
fn whole(
    looked: std::result::Result<Option<Checked>, DiskError>,
) -> std::result::Result<Option<Checked>, DiskError> {
    match looked {
        Err(e) if e.kind == DiskErrorKind::Format => {
            Ok(Some(Checked { faults: vec![e.to_string()], wrong: 1, ..Checked::default() }))
        }
        looked => looked,
    }
}

impl Volumes {
    /// See [`Host::repair_volume`](super::super::super::Host::repair_volume). Who calls it holds the volume, and no machine
    /// has it.
    ///
    /// # Errors
    /// [`HostError::Missing`], [`HostError::Busy`], [`HostError::NoRoom`].
    pub fn repair(&self, id: &str, discard: bool) -> Result<Vec<RepairedLayer>> {
        let _still = Still::new(self);
        let record = self.record(id)?;
        if !self.is_free(id)? {
            return Err(HostError::Busy(format!("some process has the volume {id}")));
        }
        let wrong = |e: DiskError| disk_failed(id, &e);
        let (mut layers, mut own) = (Vec::new(), Vec::new());
        for (index, name) in record.layers.iter().enumerate() {
            let mut users = others(&self.chains(), name, id);
            let path = self.layers.join(name);
            if path.metadata().map_err(|e| failed(&path, e))?.nlink() > 1 && is_volume(name) {
                // Both have more names of a file, and nothing else tells them.
                users.push("another region, or a backup that is being made".into());
            }
            // Without its key, too: only tables are read.
            let place = Place { path, format: super::format_of(name), key: None };
            let found = match is_volume(name) {
                true => whole(check(&place.open(false)?.file, &sizes(&record, index))).map_err(wrong)?,
                false => None,
            };
            let repaired = found.map(|found| Repaired { done: found.wrong == 0, found });
            if repaired.is_some() && users.is_empty() {
                own.push((layers.len(), place));
            }
            layers.push(RepairedLayer { name: name.clone(), repaired, users });
        }
        let keeps = |(index, _): &(usize, Place)| {
            let repaired = layers.get(*index).and_then(|layer: &RepairedLayer| layer.repaired.as_ref());
            repaired.is_none_or(|repaired| repaired.found.keeps_all())
        };
        if !discard && !own.iter().all(keeps) {
            return Ok(layers);
        }
        for (index, place) in own {
            let file = place.open(true)?.file;
            lock(&file, false).map_err(wrong)?;
            let done = match repair(&file, discard, &sizes(&record, index), self.free_room()?) {
                // That was told.
                Err(e) if e.kind == DiskErrorKind::Format => continue,
                done => done.map_err(wrong)?,
            };
            if let Some(layer) = layers.get_mut(index).filter(|_| done.is_some()) {
                layer.repaired = done;
            }
        }
        Ok(layers)
    }
}
