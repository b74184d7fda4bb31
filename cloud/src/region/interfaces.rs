//! Network interfaces as their owners handle them: made, attached, changed, deleted.

use std::net::Ipv4Addr;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Attachment, Instance, InstanceState, Interface, Subnet, Tags};

use super::attachments::one_more;
use super::{Region, Secondary, Work, now, recall, remember, tags};

/// The most interfaces of an instance.
pub const MAX_INTERFACES: usize = 8;

/// What CreateNetworkInterface asks for.
#[derive(Debug, Clone, Default)]
pub struct NewInterface {
    /// The subnet's id.
    pub subnet: String,
    /// What its owner says of it.
    pub description: String,
    /// Its groups' ids; by default the network's default one.
    pub groups: Vec<String>,
    /// Its address; by default a free one.
    pub private_ip: Option<Ipv4Addr>,
    /// Its secondary addresses.
    pub more: Secondary,
    /// Its tags.
    pub tags: Tags,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
}

/// An attribute that ModifyNetworkInterfaceAttribute sets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InterfaceAttribute {
    /// What its owner says of it.
    Description(String),
    /// Its groups' ids.
    Groups(Vec<String>),
    /// Packets must be its own.
    SourceDestCheck(bool),
    /// By the attachment's id: whether it goes with the instance.
    DeleteOnTermination(String, bool),
}

/// An interface that is used by something.
pub(super) fn in_use(id: &str) -> Fault {
    let why = format!("Interface: [{id}] in use; detach it first");
    Fault::new("InvalidNetworkInterface.InUse", why)
}

impl Region {
    /// Makes an interface, attached to nothing.
    ///
    /// # Errors
    /// `InvalidSubnetID.*`, `InvalidGroup.*`, `InvalidIPAddress.InUse`, `InvalidParameterValue`, `PrivateIpAddressLimitExceeded`,
    /// `InsufficientFreeAddressesInSubnet`, `IdempotentParameterMismatch`.
    pub fn create_interface(&self, account: &str, new: &NewInterface) -> Result<Interface> {
        self.ensure_account(account)?;
        tags::check(&new.tags)?;
        if new.description.chars().count() > 255 {
            return Err(Fault::value("description", "…", "It has at most 255 characters."));
        }
        let token =
            new.client_token.as_ref().map(|token| format!("CreateNetworkInterface/{account}/{token}"));
        self.transact(|work| {
            let made = recall(work, token.as_deref(), &new.request)?;
            if let Some(made) = made.as_deref().and_then(<[_]>::first) {
                return tags::own(work, account, made);
            }
            let subnet: Subnet = tags::own(work, account, &new.subnet)?;
            let groups = self.groups_of(work, account, &subnet.vpc, &new.groups, &[])?;
            let mut interface = self.new_interface(work, &subnet, groups, new.private_ip, &new.more)?;
            interface.description.clone_from(&new.description);
            interface.tags.clone_from(&new.tags);
            work.put(&interface)?;
            remember(work, token.as_deref(), &new.request, vec![interface.id.clone()])?;
            Ok(interface)
        })
    }

    /// Gives an interface secondary addresses, also while its instance runs; returns them. Those that it has already stay.
    ///
    /// # Errors
    /// `InvalidParameterValue`: an address is not of the subnet, or another interface's that it may not be taken from;
    /// `PrivateIpAddressLimitExceeded`, `InsufficientFreeAddressesInSubnet`, `InvalidNetworkInterfaceID.*`.
    pub fn assign_addresses(&self, account: &str, id: &str, ask: &Secondary) -> Result<Vec<Ipv4Addr>> {
        self.transact(|work| {
            let mut interface: Interface = tags::own(work, account, id)?;
            let subnet: Subnet = tags::own(work, account, &interface.subnet)?;
            let assigned = self.assign(work, &subnet, &mut interface, ask)?;
            work.put(&interface)?;
            Ok(assigned)
        })
    }

    /// Takes secondary addresses from an interface.
    ///
    /// # Errors
    /// `InvalidParameterValue`: it does not have them. `InvalidNetworkInterfaceID.*`.
    pub fn unassign_addresses(&self, account: &str, id: &str, ips: &[Ipv4Addr]) -> Result<()> {
        self.transact(|work| {
            let mut interface: Interface = tags::own(work, account, id)?;
            self.unassign(work, &mut interface, ips)?;
            work.put(&interface)
        })
    }

    /// Deletes an interface that is attached to nothing.
    ///
    /// # Errors
    /// `InvalidParameterValue`: it is in use. `InvalidNetworkInterfaceID.*`.
    pub fn delete_interface(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            let interface: Interface = tags::own(work, account, id)?;
            if let Some(attachment) = &interface.attachment {
                let why = format!(
                    "Network interface '{id}' is currently in use by {}; detach it first",
                    attachment.instance
                );
                return Err(Fault::new("InvalidParameterValue", why));
            }
            self.drop_interface(work, id)
        })
    }

    /// An interface that is to be an instance's first: it is free, and stays when the instance goes unless it is asked to go.
    pub(super) fn free_interface(
        &self,
        work: &mut Work<'_>,
        account: &str,
        id: &str,
    ) -> Result<(Interface, Subnet)> {
        let interface: Interface = tags::own(work, account, id)?;
        if interface.attachment.is_some() {
            return Err(in_use(id));
        }
        let subnet = tags::own(work, account, &interface.subnet)?;
        Ok((interface, subnet))
    }

    /// Attaches an interface to an instance that is stopped, beside those that it has; returns the attachment's id.
    ///
    /// # Errors
    /// `UnsupportedOperation`: the instance runs. `IncorrectState`,
    /// `InvalidParameterValue`, `InvalidParameterCombination`, `InvalidNetworkInterface.InUse`, `AttachmentLimitExceeded`.
    pub fn attach_interface(&self, account: &str, id: &str, instance: &str, index: u32) -> Result<String> {
        self.transact(|work| {
            let (mut interface, _) = self.free_interface(work, account, id)?;
            let mut to: Instance = tags::own(work, account, instance)?;
            at_rest(&to)?;
            if interface.zone != to.zone || interface.vpc != to.vpc {
                let what = if interface.zone == to.zone { "VPC" } else { "availability zone" };
                let why = format!(
                    "You may not attach a network interface to an instance if they are not in the same {what}: {id}, {instance}"
                );
                return Err(Fault::combination(why));
            }
            if to.interfaces.len() >= MAX_INTERFACES {
                let why = format!("Interface count exceeds the limit: an instance has at most {MAX_INTERFACES}");
                return Err(Fault::new("AttachmentLimitExceeded", why));
            }
            one_more(&to)?;
            let mut taken = Vec::new();
            for have in &to.interfaces {
                let attachment = work.get::<Interface>(have)?.and_then(|have| have.attachment);
                taken.extend(attachment.map(|attachment| attachment.device_index));
            }
            if taken.contains(&index) {
                let why =
                    format!("Instance '{instance}' already has an interface attached at device index '{index}'.");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let at = taken.iter().filter(|have| **have < index).count();
            to.interfaces.insert(at.min(to.interfaces.len()), id.into());
            let attachment = id::new("eni-attach");
            interface.attachment = Some(Attachment {
                id: attachment.clone(),
                instance: instance.into(),
                device_index: index,
                attached: now(),
                delete_on_termination: false,
            });
            work.put(&interface)?;
            work.put(&to)?;
            Ok(attachment)
        })
    }

    /// The account's interface that has an attachment of this id, as it is now.
    fn attached(&self, work: &mut Work<'_>, account: &str, attachment: &str) -> Result<Interface> {
        id::check(attachment, "eni-attach", "InvalidAttachmentID")?;
        let is = |e: &Interface| {
            e.account == account && e.attachment.as_ref().is_some_and(|have| have.id == attachment)
        };
        let found = work.all::<Interface>("")?.into_iter().find(is);
        let found = found.map(|found| work.get::<Interface>(&found.id)).transpose()?.flatten();
        found.filter(is).ok_or_else(|| Fault::not_found("InvalidAttachmentID", "attachment ID", attachment))
    }

    /// Detaches an interface that is not the first of its instance, which is stopped.
    ///
    /// # Errors
    /// `OperationNotPermitted`: it is the first. `UnsupportedOperation`, `IncorrectState`, `InvalidAttachmentID.*`.
    pub fn detach_interface(&self, account: &str, attachment: &str) -> Result<()> {
        self.transact(|work| {
            let mut interface = self.attached(work, account, attachment)?;
            let Some(was) = interface.attachment.take() else { return Ok(()) };
            if was.device_index == 0 {
                let why = "The network interface at device index 0 cannot be detached.";
                return Err(Fault::new("OperationNotPermitted", why));
            }
            let mut from: Instance = tags::own(work, account, &was.instance)?;
            at_rest(&from)?;
            from.interfaces.retain(|have| *have != interface.id);
            work.put(&from)?;
            work.put(&interface)
        })
    }

    /// Sets an attribute of an interface.
    ///
    /// # Errors
    /// `InvalidNetworkInterfaceID.*`, `InvalidGroup.*`, `InvalidAttachmentID.NotFound`.
    pub fn modify_interface(&self, account: &str, id: &str, attribute: &InterfaceAttribute) -> Result<()> {
        self.transact(|work| {
            let mut interface: Interface = tags::own(work, account, id)?;
            match attribute {
                InterfaceAttribute::Description(text) => interface.description.clone_from(text),
                InterfaceAttribute::Groups(groups) => {
                    interface.groups = self.groups_of(work, account, &interface.vpc, groups, &[])?;
                }
                InterfaceAttribute::SourceDestCheck(on) => {
                    interface.source_dest_check = *on;
                    // An instance tells its first interface's.
                    if let Some(attachment) = interface.attachment.as_ref().filter(|a| a.device_index == 0)
                        && let Some(mut instance) = work.get::<Instance>(&attachment.instance)?
                    {
                        instance.source_dest_check = *on;
                        work.put(&instance)?;
                    }
                }
                InterfaceAttribute::DeleteOnTermination(attachment, on) => {
                    let missing = || Fault::not_found("InvalidAttachmentID", "attachment ID", attachment);
                    let known = interface.attachment.as_mut().filter(|known| known.id == *attachment);
                    known.ok_or_else(missing)?.delete_on_termination = *on;
                }
            }
            work.put(&interface)
        })
    }
}

/// Whether interfaces of an instance can come and go.
fn at_rest(instance: &Instance) -> Result<()> {
    let id = &instance.id;
    match instance.state {
        InstanceState::Stopped => Ok(()),
        InstanceState::Running => Err(Fault::new(
            "UnsupportedOperation",
            format!(
                "The instance '{id}' runs: hutch attaches and detaches interfaces of stopped instances; stop it first"
            ),
        )),
        state => Err(Fault::new(
            "IncorrectState",
            format!("Instance '{id}' is not in the 'stopped' state; it is '{}'", state.name()),
        )),
    }
}
