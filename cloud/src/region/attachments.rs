//! Volumes and the instances that have them. A running instance gets and loses volumes by its reconciler: the verb says what
//! is to be, the machine follows.
//!
//! ```text
//!   AttachVolume ─► attaching ── host.attach ─────────────────────► attached
//!   DetachVolume ─► detaching ── host.detach, until its guest let go ─► gone, the volume available
//!                   a stopped instance has, and loses, its volumes at once
//! ```

use std::time::Duration;

use crate::fault::{Fault, Result};
use crate::host::HostError;
use crate::model::{AttachmentState, Device, Instance, InstanceState, Volume, VolumeState};

use super::work::Work;
use super::{Region, now, tags};

/// Volumes and interfaces that an instance may have together: as many as the largest of EC2's types, and less than a machine
/// has slots for, which instance stores take too.
pub(super) const ATTACHMENTS_MAX: usize = 128;
/// How often a guest that is to let a disk go is looked at.
const LOOK: Duration = Duration::from_millis(200);

impl Region {
    /// Attaches a volume to an instance that runs or is stopped.
    ///
    /// # Errors
    /// `VolumeInUse`, `IncorrectState`, `InvalidVolume.ZoneMismatch`, `InvalidParameterValue`, `AttachmentLimitExceeded`, ids
    /// that are not there.
    pub fn attach_volume(&self, account: &str, id: &str, instance: &str, device: &str) -> Result<Device> {
        self.transact(|work| {
            let mut volume: Volume = tags::own(work, account, id)?;
            let mut instance: Instance = tags::own(work, account, instance)?;
            if let Some(other) = &volume.instance {
                let why = format!("{id} is already attached to an instance: {other}");
                return Err(Fault::new("VolumeInUse", why));
            }
            if volume.state != VolumeState::Ready {
                let why = format!("The volume '{id}' is not 'available'");
                return Err(Fault::new("IncorrectState", why));
            }
            if volume.zone != instance.zone {
                let why =
                    format!("The volume '{id}' is in {}, the instance in {}", volume.zone, instance.zone);
                return Err(Fault::new("InvalidVolume.ZoneMismatch", why));
            }
            if !device.starts_with("/dev/") && !device.starts_with("xvd") && !device.starts_with("sd") {
                return Err(Fault::value(
                    "device",
                    device,
                    "It is no valid EBS device name, such as /dev/sdf.",
                ));
            }
            let own_root = instance.bundle.is_some() && instance.root_device == device;
            if own_root || instance.devices.iter().any(|have| have.name == device) {
                let why = format!("Attachment point {device} is already in use");
                return Err(Fault::value("device", device, &why));
            }
            one_more(&instance)?;
            let state = match instance.state {
                InstanceState::Stopped => AttachmentState::Attached,
                InstanceState::Running => AttachmentState::Attaching,
                _ => return Err(neither(&instance)),
            };
            let (name, volume_id) = (device.into(), id.into());
            let device =
                Device { name, volume: volume_id, attached: now(), delete_on_termination: false, state };
            instance.devices.push(device.clone());
            volume.instance = Some(instance.id.clone());
            work.put(&instance)?;
            work.put(&volume)?;
            Ok(device)
        })
    }

    /// Detaches a volume; returns what it was, and how it stands. A guest that runs is asked to let it go, or it is taken
    /// away with `force`.
    ///
    /// # Errors
    /// `IncorrectState`, `InvalidAttachment.NotFound`, `OperationNotPermitted`, ids that are not there.
    pub fn detach_volume(
        &self,
        account: &str,
        id: &str,
        instance: Option<&str>,
        device: Option<&str>,
        force: bool,
    ) -> Result<(String, Device)> {
        self.transact(|work| {
            let volume: Volume = tags::own(work, account, id)?;
            let none = || Fault::new("IncorrectState", format!("Volume '{id}' is in the 'available' state."));
            let holder = volume.instance.clone().ok_or_else(none)?;
            let other = || {
                let why =
                    format!("The volume '{id}' is not attached to the instance as the device that was named");
                Fault::new("InvalidAttachment.NotFound", why)
            };
            let mut holder: Instance = tags::own(work, account, &holder)?;
            if instance.is_some_and(|instance| instance != holder.id) {
                return Err(other());
            }
            let at = holder.devices.iter().position(|have| have.volume == id).ok_or_else(other)?;
            let found = holder.devices.get_mut(at).ok_or_else(other)?;
            if device.is_some_and(|device| device != found.name) {
                return Err(other());
            }
            match holder.state {
                InstanceState::Stopped => {
                    let was = found.clone();
                    release(work, &mut holder, |device| device.volume == id)?;
                    work.put(&holder)?;
                    Ok((holder.id, was))
                }
                InstanceState::Running if found.name == holder.root_device => {
                    let why = format!("Unable to detach root volume '{id}' from instance '{}'", holder.id);
                    Err(Fault::new("OperationNotPermitted", why))
                }
                InstanceState::Running => {
                    if found.state != AttachmentState::Forced {
                        let states = [AttachmentState::Detaching, AttachmentState::Forced];
                        found.state = states[usize::from(force)];
                    }
                    let was = found.clone();
                    work.put(&holder)?;
                    Ok((holder.id, was))
                }
                _ => Err(neither(&holder)),
            }
        })
    }

    /// Brings the volumes of a machine that runs to what is to be. Returns when it is to be looked at again.
    pub(super) fn follow_volumes(&self, instance: &Instance) -> Result<Option<Duration>> {
        // One that cannot come or go is no reason for the others to stay as they are.
        let (mut again, mut failed) = (None, None);
        for device in &instance.devices {
            let (id, volume) = (&instance.id, &device.volume);
            match device.state {
                AttachmentState::Attached => {}
                AttachmentState::Attaching => match self.host.attach(id, volume) {
                    Ok(()) => self.settle(id, InstanceState::Running, |_, instance| {
                        let attached = |device: &&mut Device| {
                            device.volume == *volume && device.state == AttachmentState::Attaching
                        };
                        let found = instance.devices.iter_mut().find(attached);
                        found.into_iter().for_each(|device| device.state = AttachmentState::Attached);
                        Ok(())
                    })?,
                    // What ended meanwhile is seen with the next event.
                    Err(HostError::Missing(_)) => {}
                    Err(error) => failed = failed.or(Some(error)),
                },
                state => match self.host.detach(id, volume, state == AttachmentState::Forced) {
                    Ok(true) => self.settle(id, InstanceState::Running, |work, instance| {
                        release(work, instance, |device| device.volume == *volume && device.state.leaves())
                    })?,
                    Ok(false) => again = Some(LOOK),
                    Err(HostError::Missing(_)) => {}
                    Err(error) => failed = failed.or(Some(error)),
                },
            }
        }
        failed.map_or(Ok(again), |error| Err(Fault::internal(error)))
    }
}

/// Whether an instance may have one more volume or interface.
///
/// # Errors
/// `AttachmentLimitExceeded`.
pub(super) fn one_more(instance: &Instance) -> Result<()> {
    if instance.devices.len() + instance.interfaces.len() < ATTACHMENTS_MAX {
        return Ok(());
    }
    let why = format!("{} has {ATTACHMENTS_MAX} volumes and interfaces; detach one", instance.id);
    Err(Fault::new("AttachmentLimitExceeded", why))
}

/// The state is one in which volumes neither come nor go.
fn neither(instance: &Instance) -> Fault {
    let (id, state) = (&instance.id, instance.state.name());
    Fault::new("IncorrectState", format!("Instance '{id}' is not 'running' or 'stopped' but '{state}'."))
}

/// What its guest had of volumes that came or went is over: an instance that does not run has those that came, and not those
/// that were to go.
pub(super) fn settle_volumes(work: &mut Work<'_>, instance: &mut Instance) -> Result<()> {
    release(work, instance, |device| device.state.leaves())?;
    instance.devices.iter_mut().for_each(|device| device.state = AttachmentState::Attached);
    Ok(())
}

/// Takes volumes from an instance; they are available.
fn release(work: &mut Work<'_>, instance: &mut Instance, which: impl Fn(&Device) -> bool) -> Result<()> {
    let (gone, kept) = std::mem::take(&mut instance.devices).into_iter().partition(which);
    instance.devices = kept;
    for device in gone as Vec<Device> {
        let Some(mut volume) = work.get::<Volume>(&device.volume)? else { continue };
        volume.instance = None;
        work.put(&volume)?;
    }
    Ok(())
}
