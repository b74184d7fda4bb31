//! How volumes come to be what they are to be; and ModifyVolume: one that is there gets another size, type or speed, also
//! while a guest writes to it.
//!
//! ```text
//!   asked ─► modifying ─► host: the volume is that ─► optimizing ─► completed
//!                              └─ it cannot be ─► failed: the volume is as it was
//! ```

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::fault::{Fault, Result};
use crate::host::{self, HostError, Speed};
use crate::model::{Instance, Modification, Progress, Reason, Shape, Volume, VolumeState};
use crate::speed;
use crate::types::InstanceType;

use super::encryption::NO_KEY;
use super::{Region, now, tags};

/// The time in which a volume is changed only so often.
const WINDOW: SignedDuration = SignedDuration::from_hours(24);
/// EC2 moves data for minutes or hours when it has changed a volume. Nothing is moved here: this is for clients to see.
const OPTIMIZING: SignedDuration = SignedDuration::from_secs(1);

/// What ModifyVolume asks for; what is not said stays, as far as the type lets it.
#[derive(Debug, Clone, Default)]
pub struct VolumeChange {
    /// The volume.
    pub volume: String,
    /// The size in GiB.
    pub gib: Option<u64>,
    /// The volume type.
    pub kind: Option<String>,
    /// I/O operations a second.
    pub iops: Option<u64>,
    /// MiB a second.
    pub throughput: Option<u64>,
}

impl VolumeChange {
    /// What a volume is to be.
    fn target(&self, old: &Shape) -> Result<Shape> {
        let kind = self.kind.as_deref().unwrap_or(&old.kind);
        let gib = self.gib.unwrap_or(old.gib);
        if gib < old.gib {
            let why = format!("New size cannot be smaller than existing size, which is {} GiB.", old.gib);
            return Err(Fault::value("size", &gib.to_string(), &why));
        }
        let stays = kind == old.kind;
        // Of another type, EC2 says 3000 where nothing is said. gp2's is never said: it is its size's.
        let iops = match kind {
            "io1" | "io2" | "gp3" => self.iops.or(if stays { old.iops } else { Some(3000) }),
            _ => self.iops,
        };
        let kept = old.throughput.filter(|_| stays);
        Shape::new(Some(kind), gib, iops, self.throughput.or(kept))
    }
}

impl Region {
    /// Changes a volume. It is `modifying` when this returns.
    ///
    /// # Errors
    /// `IncorrectState`, `IncorrectModificationState`, `VolumeModificationRateExceeded`, what the type does not have.
    pub fn modify_volume(&self, account: &str, change: &VolumeChange) -> Result<Volume> {
        let VolumeChange { gib, kind, iops, throughput, .. } = change;
        if kind.is_none() && [gib, iops, throughput].into_iter().all(Option::is_none) {
            let why = "Nothing is to be changed: name a size, a volumeType, iops or a throughput";
            return Err(Fault::combination(why));
        }
        self.transact(|work| {
            let mut volume: Volume = tags::own(work, account, &change.volume)?;
            let id = &volume.id;
            if volume.state != VolumeState::Ready {
                let why = format!("The volume '{id}' is not 'available' or 'in-use'; wait until it is");
                return Err(Fault::new("IncorrectState", why));
            }
            if let Some(last) = volume.modification.as_ref().filter(|last| !last.progress.is_over()) {
                let state = last.progress.name().to_uppercase();
                let why = format!("Volume {id} cannot be modified in modification state {state}");
                return Err(Fault::new("IncorrectModificationState", why));
            }
            let now = now();
            let mut modified = volume.modified.clone();
            modified.retain(|at| now.duration_since(*at) < WINDOW);
            let most = self.settings.limits.changes_per_volume;
            if modified.len() >= most as usize {
                let next = modified.first().and_then(|at| at.checked_add(WINDOW).ok()).unwrap_or(now);
                let why = format!(
                    "You've reached the maximum modification rate per volume limit: {most} within 24 hours. Volume {id} can be modified again at {next:.0}"
                );
                return Err(Fault::new("VolumeModificationRateExceeded", why));
            }
            let original = volume.shape();
            let target = change.target(&original)?;
            if let Some(holder) = &volume.instance
                && matches!(target.kind.as_str(), "st1" | "sc1")
                && let Some(instance) = work.get::<Instance>(holder)?
                && instance.devices.iter().any(|d| d.volume == *id && d.name == instance.root_device)
            {
                let why = format!("The root volume of {holder} cannot be of this type.");
                return Err(Fault::value("volumeType", &target.kind, &why));
            }
            modified.push(now);
            volume.modified = modified;
            volume.modification = Some(Modification {
                started: now,
                progress: Progress::Modifying,
                since: now,
                original,
                target,
                failed: None,
            });
            work.put(&volume)?;
            Ok(volume)
        })
    }

    /// What an instance of a type may do.
    pub(super) fn speed_of(&self, kind: &InstanceType) -> Speed {
        if self.settings.limits.speed { speed::of_instance(kind) } else { Speed::default() }
    }

    /// Tells the host what a volume is to be.
    fn tell_volume(&self, id: &str, shape: &Shape) -> host::Result<()> {
        let rate = if self.settings.limits.speed { speed::of_volume(shape) } else { Default::default() };
        self.host.modify_volume(id, shape.gib << 30, &rate)
    }

    /// Looks at a volume. Returns when it is to be looked at again without a change.
    pub(super) fn step_volume(&self, id: &str) -> Result<Option<Duration>> {
        let Some(volume) = self.get::<Volume>(id)? else { return Ok(None) };
        match volume.state {
            VolumeState::Creating => {
                let made =
                    self.host.create_volume(id, volume.gib << 30, &volume.source, volume.key.as_deref());
                let made = made.and_then(|()| self.tell_volume(id, &volume.shape()));
                if let Err(error) = &made {
                    tracing::warn!(volume = id, %error, "the volume cannot be made");
                }
                self.transact(|work| {
                    let Some(mut volume) = work.get::<Volume>(id)? else { return Ok(()) };
                    if volume.state == VolumeState::Creating {
                        volume.state = if made.is_ok() { VolumeState::Ready } else { VolumeState::Error };
                        volume.failed = made.as_ref().err().map(|error| {
                            let key = matches!(error, HostError::Key(_));
                            let code = if key { NO_KEY } else { "Server.InternalError" };
                            Reason { code: code.into(), message: error.to_string() }
                        });
                        work.put(&volume)?;
                    }
                    Ok(())
                })?;
                Ok(None)
            }
            VolumeState::Ready => self.step_modification(&volume),
            VolumeState::Deleting => {
                self.host.delete_volume(id).map_err(Fault::internal)?;
                self.transact(|work| {
                    work.delete::<Volume>(id);
                    Ok(())
                })?;
                Ok(None)
            }
            VolumeState::Error => Ok(None),
        }
    }

    /// A volume that is there: has the host know what it is to be.
    fn step_modification(&self, volume: &Volume) -> Result<Option<Duration>> {
        let id = volume.id.as_str();
        let Some(change) = volume.pending() else {
            match self.tell_volume(id, &volume.shape()) {
                Ok(()) => {}
                Err(HostError::Failed(why)) => return Err(Fault::internal(why)),
                // Nothing that another try would heal: who uses the volume is told.
                Err(error) => tracing::warn!(volume = id, %error, "it is not what it is to be"),
            }
            return self.finish(volume);
        };
        let failed = match self.tell_volume(id, &change.target) {
            Ok(()) => None,
            Err(HostError::Failed(why)) => return Err(Fault::internal(why)),
            Err(error) => Some(error.to_string()),
        };
        self.advance(id, change.started, |volume, change| match &failed {
            Some(why) => {
                change.progress = Progress::Failed;
                change.failed = Some(why.clone());
            }
            None => {
                change.progress = Progress::Optimizing;
                let target = change.target.clone();
                (volume.gib, volume.kind) = (target.gib, target.kind);
                (volume.iops, volume.throughput) = (target.iops, target.throughput);
            }
        })?;
        Ok(None)
    }

    /// From optimizing to completed, when it is time.
    fn finish(&self, volume: &Volume) -> Result<Option<Duration>> {
        let optimizing = |change: &&Modification| change.progress == Progress::Optimizing;
        let Some(change) = volume.modification.as_ref().filter(optimizing) else { return Ok(None) };
        let left = OPTIMIZING - now().duration_since(change.since);
        if left.is_positive() {
            return Ok(Some(Duration::try_from(left).unwrap_or_default()));
        }
        self.advance(&volume.id, change.started, |_, change| change.progress = Progress::Completed)?;
        Ok(None)
    }

    /// Writes down how far a volume's change is, if it is still the one that began then.
    fn advance(
        &self,
        id: &str,
        started: Timestamp,
        job: impl Fn(&mut Volume, &mut Modification),
    ) -> Result<()> {
        self.transact(|work| {
            let Some(mut volume) = work.get::<Volume>(id)? else { return Ok(()) };
            let Some(mut change) = volume.modification.take() else { return Ok(()) };
            if change.started != started {
                return Ok(());
            }
            job(&mut volume, &mut change);
            change.since = now();
            volume.modification = Some(change);
            work.put(&volume)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(old: (&str, u64, Option<u64>), change: VolumeChange) -> Result<(Option<u64>, Option<u64>)> {
        let old = Shape::new(Some(old.0), old.1, old.2, None)?;
        change.target(&old).map(|shape| (shape.iops, shape.throughput))
    }

    #[test]
    fn what_is_not_said_stays_as_far_as_the_type_lets_it() {
        let kind = |kind: &str| VolumeChange { kind: Some(kind.into()), ..VolumeChange::default() };
        let gib = |gib| VolumeChange { gib: Some(gib), ..VolumeChange::default() };
        assert_eq!(target(("gp2", 100, None), gib(200)).unwrap(), (Some(600), None));
        assert_eq!(target(("gp3", 100, Some(4000)), gib(200)).unwrap(), (Some(4000), Some(125)));
        assert_eq!(target(("gp2", 100, None), kind("gp3")).unwrap(), (Some(3000), Some(125)));
        assert_eq!(target(("io1", 100, Some(500)), kind("io2")).unwrap(), (Some(3000), None));
        assert_eq!(target(("gp3", 100, Some(4000)), kind("gp2")).unwrap(), (Some(300), None));
        assert_eq!(target(("io1", 100, Some(500)), gib(100)).unwrap(), (Some(500), None));
        let iops = VolumeChange { iops: Some(4000), ..VolumeChange::default() };
        assert_eq!(target(("gp2", 100, None), iops).unwrap_err().code, "InvalidParameterCombination");
        assert_eq!(target(("gp2", 100, None), gib(99)).unwrap_err().code, "InvalidParameterValue");
        assert_eq!(target(("gp2", 10, None), kind("io1")).unwrap_err().code, "InvalidParameterValue");
        assert_eq!(target(("gp2", 100, None), kind("st1")).unwrap_err().code, "InvalidParameterValue");
    }
}
