//! What can be done to instances: start, stop, reboot, terminate; their attributes.

use std::time::Duration;

use crate::fault::{Fault, Result};
use crate::model::{
    Image, ImageKind, Instance, InstanceState, KeyPair, MetadataOptions, Reason, Subnet, Volume, VolumeState,
};

use super::bundles::check_stoppable;
use super::{Region, Work, now, tags};

/// An attribute that ModifyInstanceAttribute sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attribute {
    /// The type, while it is stopped.
    InstanceType(String),
    /// The user data, while it is stopped.
    UserData(Option<Vec<u8>>),
    /// EBS-optimized, while it is stopped.
    EbsOptimized(bool),
    /// The kernel it boots, or the RAM disk, while it is stopped; `None`: as its image says.
    Boots(ImageKind, Option<String>),
    /// Whether it may be terminated by a call.
    TerminationProtection(bool),
    /// Whether it may be stopped by a call.
    StopProtection(bool),
    /// What the guest's own shutdown means.
    ShutdownTerminates(bool),
    /// Packets must be its own.
    SourceDestCheck(bool),
    /// The groups of its primary interface.
    Groups(Vec<String>),
    /// Which of its volumes go with it: device name and answer.
    DeleteOnTermination(Vec<(String, bool)>),
}

/// An instance's state before and after a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The instance.
    pub id: String,
    /// Its state before.
    pub before: InstanceState,
    /// Its state now.
    pub after: InstanceState,
}

fn wrong_state(instance: &Instance, wanted: &str) -> Fault {
    let (id, state) = (&instance.id, instance.state.name());
    Fault::new(
        "IncorrectInstanceState",
        format!("The instance '{id}' is not in a state from which it can be {wanted}; it is '{state}'"),
    )
}

fn user(code: &str, message: &str) -> Option<Reason> {
    Some(Reason { code: code.into(), message: message.into() })
}

impl Region {
    /// Every one of the instances, or none, is changed by `job`.
    fn change(
        &self,
        account: &str,
        ids: &[String],
        job: impl Fn(&mut Work<'_>, &mut Instance) -> Result<()>,
    ) -> Result<Vec<Change>> {
        self.transact(|work| {
            let mut changes = Vec::new();
            for id in ids {
                let mut instance: Instance = tags::own(work, account, id)?;
                let (before, old) = (instance.state, instance.clone());
                job(work, &mut instance)?;
                if instance != old {
                    work.put(&instance)?;
                }
                changes.push(Change { id: id.clone(), before, after: instance.state });
            }
            Ok(changes)
        })
    }

    /// Starts stopped instances.
    ///
    /// # Errors
    /// `IncorrectInstanceState`, `InvalidInstanceID.*`.
    pub fn start_instances(&self, account: &str, ids: &[String]) -> Result<Vec<Change>> {
        self.change(account, ids, |work, instance| match instance.state {
            _ if instance.bundle.is_some() => check_stoppable(instance, "started"),
            InstanceState::Pending | InstanceState::Running => Ok(()),
            InstanceState::Stopped => {
                let kind = &instance.instance_type;
                if self.vcpus_left(work, account)?.is_some_and(|left| left < self.vcpus(kind)) {
                    return Err(self.no_vcpus());
                }
                let subnet: Subnet = tags::own(work, account, &instance.subnet)?;
                self.runs_in(work, &subnet)?;
                self.give_public(work, instance)?;
                instance.state = InstanceState::Pending;
                instance.run += 1;
                instance.force = false;
                instance.launched = now();
                instance.reason = None;
                instance.transition.clear();
                Ok(())
            }
            _ => Err(wrong_state(instance, "started")),
        })
    }

    /// Stops running instances; `force` does not ask the guest.
    ///
    /// # Errors
    /// `IncorrectInstanceState`, `OperationNotPermitted` where that is forbidden, `InvalidInstanceID.*`; `UnsupportedOperation`:
    /// its root is on instance store.
    pub fn stop_instances(&self, account: &str, ids: &[String], force: bool) -> Result<Vec<Change>> {
        self.change(account, ids, |_, instance| match instance.state {
            _ if instance.bundle.is_some() => check_stoppable(instance, "stopped"),
            InstanceState::Running if instance.stop_protection => Err(Fault::new(
                "OperationNotPermitted",
                format!(
                    "The instance '{}' may not be stopped. Modify its 'disableApiStop' instance attribute and try again.",
                    instance.id
                ),
            )),
            InstanceState::Running => {
                instance.state = InstanceState::Stopping;
                instance.force = force;
                instance.reason = user(
                    "Client.UserInitiatedShutdown",
                    "Client.UserInitiatedShutdown: User initiated shutdown",
                );
                instance.transition = initiated();
                Ok(())
            }
            InstanceState::Stopping => {
                instance.force |= force;
                Ok(())
            }
            InstanceState::Stopped => Ok(()),
            _ => Err(wrong_state(instance, "stopped")),
        })
    }

    /// Reboots running instances.
    ///
    /// # Errors
    /// `IncorrectInstanceState`, `InvalidInstanceID.*`.
    pub fn reboot_instances(&self, account: &str, ids: &[String]) -> Result<()> {
        let changes = self.change(account, ids, |_, instance| match instance.state {
            InstanceState::Running => {
                instance.reboots.0 += 1;
                Ok(())
            }
            InstanceState::Terminated => Ok(()),
            _ => Err(wrong_state(instance, "rebooted")),
        });
        changes.map(drop)
    }

    /// Terminates instances. Those that are over already are left as they are.
    ///
    /// # Errors
    /// `OperationNotPermitted` where that is forbidden, `InvalidInstanceID.*`.
    pub fn terminate_instances(&self, account: &str, ids: &[String]) -> Result<Vec<Change>> {
        self.change(account, ids, |_, instance| {
            if instance.state.is_over() {
                return Ok(());
            }
            if instance.termination_protection {
                let id = &instance.id;
                return Err(Fault::new(
                    "OperationNotPermitted",
                    format!(
                        "The instance '{id}' may not be terminated. Modify its 'disableApiTermination' instance attribute and try again."
                    ),
                ));
            }
            instance.state = InstanceState::ShuttingDown;
            instance.reason =
                user("Client.UserInitiatedShutdown", "Client.UserInitiatedShutdown: User initiated shutdown");
            instance.transition = initiated();
            Ok(())
        })
    }

    /// Sets an attribute of an instance.
    ///
    /// # Errors
    /// `IncorrectInstanceState` where it has to be stopped for that, `InvalidInstanceAttributeValue`, `InvalidInstanceID.*`,
    /// `InvalidAMIID.*`.
    pub fn modify_instance(&self, account: &str, id: &str, attribute: &Attribute) -> Result<()> {
        let changes = self.change(account, &[id.to_owned()], |work, instance| {
            if instance.state.is_over() {
                return Err(wrong_state(instance, "modified"));
            }
            let stopped = instance.state == InstanceState::Stopped;
            let needs_stop = matches!(
                attribute,
                Attribute::InstanceType(_)
                    | Attribute::UserData(_)
                    | Attribute::EbsOptimized(_)
                    | Attribute::Boots(..)
            );
            if needs_stop || *attribute == Attribute::ShutdownTerminates(false) {
                check_stoppable(instance, "stopped, which that needs")?;
            }
            if needs_stop && !stopped {
                let (id, state) = (&instance.id, instance.state.name());
                return Err(Fault::new(
                    "IncorrectInstanceState",
                    format!(
                        "The instance '{id}' is not in the 'stopped' state; it is '{state}': stop it first"
                    ),
                ));
            }
            match attribute {
                Attribute::InstanceType(name) => {
                    if self.settings.types.get(name).is_err() {
                        return Err(Fault::new(
                            "InvalidInstanceAttributeValue",
                            format!("The instance type '{name}' is not valid"),
                        ));
                    }
                    instance.instance_type.clone_from(name);
                }
                Attribute::UserData(data) => {
                    if data.as_ref().is_some_and(|data| data.len() > 16 << 10) {
                        return Err(Fault::new(
                            "InvalidParameterValue",
                            "User data is limited to 16384 bytes",
                        ));
                    }
                    instance.user_data.clone_from(data);
                }
                Attribute::EbsOptimized(on) => instance.ebs_optimized = *on,
                Attribute::Boots(kind, id) => {
                    let id = match id {
                        Some(id) => Some(self.bootable(work, account, *kind, id)?),
                        None => self.by_default(work, instance, *kind)?,
                    };
                    match kind {
                        ImageKind::Ramdisk => instance.ramdisk = id,
                        _ => instance.kernel = id,
                    }
                }
                Attribute::TerminationProtection(on) => instance.termination_protection = *on,
                Attribute::StopProtection(on) => instance.stop_protection = *on,
                Attribute::ShutdownTerminates(on) => instance.shutdown_terminates = *on,
                Attribute::SourceDestCheck(on) => instance.source_dest_check = *on,
                Attribute::Groups(groups) => {
                    if groups.is_empty() {
                        return Err(Fault::missing("GroupId"));
                    }
                    let groups = self.groups_of(work, account, &instance.vpc, groups, &[])?;
                    let primary = instance.interfaces.first().cloned().unwrap_or_default();
                    if let Some(mut interface) = work.get::<crate::model::Interface>(&primary)? {
                        interface.groups = groups;
                        work.put(&interface)?;
                    }
                }
                Attribute::DeleteOnTermination(answers) => {
                    for (name, answer) in answers {
                        let device = instance.devices.iter_mut().find(|device| device.name == *name);
                        let missing = || {
                            let why = format!("The instance '{id}' has no block device '{name}'");
                            Fault::new("InvalidInstanceAttributeValue", why)
                        };
                        device.ok_or_else(missing)?.delete_on_termination = *answer;
                    }
                }
            }
            Ok(())
        });
        changes.map(drop)
    }

    /// Sets what the metadata service does for an instance; returns what it is now.
    ///
    /// # Errors
    /// `IncorrectInstanceState`, `InvalidInstanceID.*`, `InvalidParameterValue`.
    pub fn modify_metadata_options(
        &self,
        account: &str,
        id: &str,
        set: impl Fn(&mut MetadataOptions),
    ) -> Result<MetadataOptions> {
        self.transact(|work| {
            let mut instance: Instance = tags::own(work, account, id)?;
            if instance.state.is_over() {
                return Err(wrong_state(&instance, "modified"));
            }
            set(&mut instance.metadata);
            check_hops(&instance.metadata)?;
            work.put(&instance)?;
            Ok(instance.metadata)
        })
    }

    /// Switches detailed monitoring, which is noted only.
    ///
    /// # Errors
    /// `InvalidInstanceID.*`.
    pub fn monitor_instances(&self, account: &str, ids: &[String], on: bool) -> Result<()> {
        let changes = self.change(account, ids, |_, instance| {
            instance.monitoring = on;
            Ok(())
        });
        changes.map(drop)
    }

    /// What an instance has become: called by the reconciler, with what it saw.
    pub(super) fn settle(
        &self,
        id: &str,
        was: InstanceState,
        job: impl Fn(&mut Work<'_>, &mut Instance) -> Result<()>,
    ) -> Result<()> {
        self.transact(|work| {
            let Some(mut instance) = work.get::<Instance>(id)? else { return Ok(()) };
            if instance.state != was {
                return Ok(());
            }
            job(work, &mut instance)?;
            work.put(&instance)
        })
    }

    /// Takes from an instance that is over what does not outlive it.
    pub(super) fn bury(&self, work: &mut Work<'_>, instance: &mut Instance) -> Result<()> {
        for device in std::mem::take(&mut instance.devices) {
            let Some(mut volume) = work.get::<Volume>(&device.volume)? else { continue };
            volume.instance = None;
            if device.delete_on_termination {
                volume.state = VolumeState::Deleting;
            }
            work.put(&volume)?;
        }
        for id in std::mem::take(&mut instance.interfaces) {
            let Some(mut interface) = work.get::<crate::model::Interface>(&id)? else { continue };
            if interface.attachment.take().is_none_or(|attachment| attachment.delete_on_termination) {
                self.drop_interface(work, &id)?;
            } else {
                self.take_back(work, &mut interface)?;
                work.put(&interface)?;
            }
        }
        instance.state = InstanceState::Terminated;
        instance.terminated = Some(now());
        Ok(())
    }

    /// The public key of an instance's key pair.
    pub(super) fn public_key(&self, instance: &Instance) -> Result<Option<KeyPair>> {
        match &instance.key_name {
            Some(name) => self.get(&format!("{}/{name}", instance.account)),
            None => Ok(None),
        }
    }
}

impl Image {
    /// Whether the account may launch it.
    pub fn launchable(&self, account: &str) -> bool {
        self.account == account || self.public || self.launch.iter().any(|other| other == account)
    }
}

/// Whether the hop limit is one.
pub(super) fn check_hops(options: &MetadataOptions) -> Result<()> {
    match (1..=64).contains(&options.hop_limit) {
        true => Ok(()),
        false => Err(Fault::value(
            "HttpPutResponseHopLimit",
            &options.hop_limit.to_string(),
            "It is a number from 1 to 64.",
        )),
    }
}

/// EC2's older sentence about a change of state.
fn initiated() -> String {
    format!("User initiated ({})", now().strftime("%Y-%m-%d %H:%M:%S GMT"))
}

/// How long a guest may take to shut down before it is ended.
pub(super) const PATIENCE: Duration = Duration::from_secs(90);
