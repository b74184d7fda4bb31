//! The interfaces of an instance that is launched, beside its first.

use std::net::Ipv4Addr;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Attachment, Interface, Subnet, Tags};

use super::{Launch, MAX_INTERFACES, Region, Secondary, Work, now, tags};

/// An interface beside the first that RunInstances asks for.
#[derive(Debug, Clone, Default)]
pub struct InterfaceAsk {
    /// The device index: not 0.
    pub index: u32,
    /// One that was made before: it says the subnet, the groups and the addresses.
    pub interface: Option<String>,
    /// The subnet's id; by default the first interface's.
    pub subnet: Option<String>,
    /// The groups' ids.
    pub groups: Vec<String>,
    /// Its address, of the one instance.
    pub private_ip: Option<Ipv4Addr>,
    /// Its secondary addresses.
    pub more: Secondary,
    /// What it is said to be for.
    pub description: String,
    /// Whether it stays when the instance goes; by default one that was made before.
    pub keep: Option<bool>,
}

/// What can be seen of the request alone.
pub(super) fn check(launch: &Launch) -> Result<()> {
    let others = &launch.others;
    if others.len() >= MAX_INTERFACES {
        let count = others.len() + 1;
        let why =
            format!("Interface count {count} exceeds the limit: an instance has at most {MAX_INTERFACES}");
        return Err(Fault::new("AttachmentLimitExceeded", why));
    }
    let mut ids: Vec<_> = others.iter().filter_map(|ask| ask.interface.as_ref()).collect();
    ids.extend(&launch.interface);
    ids.sort();
    if let Some([id, _]) = ids.windows(2).find(|pair| pair.first() == pair.last()) {
        return Err(super::interfaces::in_use(id));
    }
    let mut taken = vec![0];
    for ask in others {
        if taken.contains(&ask.index) {
            return Err(Fault::combination("Each network interface requires a unique device index."));
        }
        taken.push(ask.index);
    }
    if !others.is_empty() && launch.public_ip.is_some() {
        let why = "The associatePublicIPAddress parameter cannot be specified when launching with multiple network interfaces.";
        return Err(Fault::combination(why));
    }
    let named =
        |ask: &InterfaceAsk| ask.interface.is_some() || ask.private_ip.is_some() || !ask.more.ips.is_empty();
    if launch.max > 1 && (others.iter().any(named) || !launch.more.ips.is_empty()) {
        let why = "Interfaces and private addresses can be named for one instance only";
        return Err(Fault::combination(why));
    }
    Ok(())
}

impl Region {
    /// The interfaces of a new instance beside its first, attached and written, in the order they are asked for.
    pub(super) fn other_interfaces(
        &self,
        work: &mut Work<'_>,
        first: &Subnet,
        launch: &Launch,
        instance: &str,
    ) -> Result<Vec<Interface>> {
        let mut made: Vec<Interface> = Vec::new();
        for ask in &launch.others {
            match self.other_interface(work, first, ask, instance, launch) {
                Ok(interface) => made.push(interface),
                Err(fault) => {
                    // One instance less may do.
                    for interface in made {
                        self.drop_interface(work, &interface.id)?;
                    }
                    return Err(fault);
                }
            }
        }
        Ok(made)
    }

    fn other_interface(
        &self,
        work: &mut Work<'_>,
        first: &Subnet,
        ask: &InterfaceAsk,
        instance: &str,
        launch: &Launch,
    ) -> Result<Interface> {
        let account = first.account.as_str();
        let before = ask.interface.as_ref().map(|id| self.free_interface(work, account, id)).transpose()?;
        let subnet = match (&before, &ask.subnet) {
            (Some((_, subnet)), _) => subnet.clone(),
            (None, Some(subnet)) => tags::own::<Subnet>(work, account, subnet)?,
            (None, None) => first.clone(),
        };
        if (&subnet.vpc, &subnet.zone) != (&first.vpc, &first.zone) {
            let what = if subnet.zone == first.zone { "VPC" } else { "availability zone" };
            let why = format!(
                "You may not specify network interfaces that are not in the same {what}: {}, {}",
                first.id, subnet.id
            );
            return Err(Fault::combination(why));
        }
        let mut interface = match before {
            Some((interface, _)) => interface,
            None => {
                let groups = self.groups_of(work, account, &subnet.vpc, &ask.groups, &[])?;
                Interface {
                    description: ask.description.clone(),
                    tags: launch.tags.get("network-interface").cloned().unwrap_or_else(Tags::new),
                    ..self.new_interface(work, &subnet, groups, ask.private_ip, &ask.more)?
                }
            }
        };
        interface.attachment = Some(Attachment {
            id: id::new("eni-attach"),
            instance: instance.into(),
            device_index: ask.index,
            attached: now(),
            delete_on_termination: !ask.keep.unwrap_or(ask.interface.is_some()),
        });
        work.put(&interface)?;
        Ok(interface)
    }
}
