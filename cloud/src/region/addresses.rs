//! Public addresses. An elastic one is an account's until it is released; it leads to an interface, or nowhere. Others come
//! with a run of an instance and go with it.
//!
//! The interface says which address leads to it, so that whoever looks at it need not look further; the elastic address says
//! the same, and both are written at once.

use std::net::Ipv4Addr;
use std::sync::PoisonError;

use crate::fault::{Fault, Result};
use crate::host;
use crate::id;
use crate::model::{Association, Elastic, Instance, InstanceState, Interface, Name, Public, Tags};

use super::{Region, Work, tags};

/// What AllocateAddress asks for.
#[derive(Debug, Clone, Default)]
pub struct Allocation {
    /// This address, rather than any.
    pub ip: Option<Ipv4Addr>,
    /// Its tags.
    pub tags: Tags,
}

/// How an elastic address is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// By its allocation.
    Allocation(String),
    /// By itself.
    Address(Ipv4Addr),
}

/// Where an address is to lead: an instance's primary interface, or an interface.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// The instance.
    pub instance: Option<String>,
    /// The interface.
    pub interface: Option<String>,
    /// The private address of it; the primary one, where none is named.
    pub private_ip: Option<Ipv4Addr>,
}

pub(super) fn name(ip: Ipv4Addr) -> String {
    format!("public/{ip}")
}

/// The elastic address of the account.
fn own(work: &mut Work<'_>, account: &str, which: &Which) -> Result<Elastic> {
    let (id, fault) = match which {
        Which::Allocation(id) => {
            let why = format!("The allocation ID '{id}' does not exist");
            (Some(id.clone()), Fault::new("InvalidAllocationID.NotFound", why))
        }
        Which::Address(ip) => {
            let fault = Fault::new("AuthFailure", format!("The address '{ip}' does not belong to you."));
            (work.get::<Name>(&name(*ip))?.map(|name| name.of), fault)
        }
    };
    let found = id.map(|id| work.get::<Elastic>(&id)).transpose()?.flatten();
    found.filter(|elastic| elastic.account == account).ok_or(fault)
}

impl Region {
    /// Gives an account an address.
    ///
    /// # Errors
    /// `AddressLimitExceeded`, `InsufficientAddressCapacity`; `InvalidAddress.NotFound` and `InvalidIPAddress.InUse` where one
    /// is asked for; tags that cannot be.
    pub fn allocate_address(&self, account: &str, asked: &Allocation) -> Result<Elastic> {
        tags::check(&asked.tags)?;
        self.transact_alone(|work| {
            self.check_elastic(work, account)?;
            let ip = match asked.ip {
                None => self.free_public(work)?,
                Some(ip) if !self.settings.addresses.has(ip) => {
                    let why = format!("The address '{ip}' is none of those in addresses.toml");
                    return Err(Fault::new("InvalidAddress.NotFound", why));
                }
                Some(ip) if work.get::<Name>(&name(ip))?.is_some() || self.given_beside(ip)? => {
                    return Err(Fault::new("InvalidIPAddress.InUse", format!("Address {ip} is in use.")));
                }
                Some(ip) => ip,
            };
            let elastic = Elastic {
                id: id::new("eipalloc"),
                account: account.into(),
                ip,
                association: None,
                tags: asked.tags.clone(),
            };
            work.put(&Name { id: name(ip), of: elastic.id.clone() })?;
            work.put(&elastic)?;
            Ok(elastic)
        })
    }

    /// Gives an address back.
    ///
    /// # Errors
    /// `InvalidAllocationID.NotFound`, `AuthFailure`; `InvalidIPAddress.InUse`: it leads somewhere.
    pub fn release_address(&self, account: &str, which: &Which) -> Result<()> {
        self.transact(|work| {
            let elastic = own(work, account, which)?;
            if let Some(association) = &elastic.association {
                let why = format!(
                    "Address {} is in use by {}; disassociate it first",
                    elastic.ip, association.interface
                );
                return Err(Fault::new("InvalidIPAddress.InUse", why));
            }
            work.delete::<Name>(&name(elastic.ip));
            work.delete::<Elastic>(&elastic.id);
            Ok(())
        })
    }

    /// Has an address lead to an interface, and no other one there; returns the association's id. Where it leads there
    /// already, nothing changes. `again`: it may lead elsewhere now, and another may lead there.
    ///
    /// # Errors
    /// `InvalidAllocationID.NotFound`, `AuthFailure`, `Resource.AlreadyAssociated`, `InvalidInstanceID`,
    /// `InvalidNetworkInterfaceID.*`, `InvalidParameterValue`.
    pub fn associate_address(
        &self,
        account: &str,
        which: &Which,
        target: &Target,
        again: bool,
    ) -> Result<String> {
        self.transact(|work| {
            let mut elastic = own(work, account, which)?;
            let mut interface = self.target(work, account, target)?;
            if target.private_ip.is_some_and(|ip| ip != interface.ip) {
                let ip = target.private_ip.unwrap_or(interface.ip);
                if interface.more.contains(&ip) {
                    let why = format!(
                        "On hutch a public address leads to the primary address of an interface, not to {ip}"
                    );
                    return Err(Fault::new("UnsupportedOperation", why));
                }
                let why = format!("It is no address of the interface {}.", interface.id);
                return Err(Fault::value("privateIpAddress", &ip.to_string(), &why));
            }
            let taken = |what: &str, by: &str| {
                let why = format!("resource {what} is already associated with associate-id {by}");
                Fault::new("Resource.AlreadyAssociated", why)
            };
            if let Some(association) = &elastic.association {
                if association.interface == interface.id {
                    return Ok(association.id.clone());
                }
                if !again {
                    return Err(taken(&elastic.id, &association.id));
                }
                if let Some(mut before) = work.get::<Interface>(&association.interface)? {
                    before.public = None;
                    self.give_again(work, &mut before)?;
                    work.put(&before)?;
                }
            }
            if let Some(Public { elastic: Some((_, other)), .. }) = &interface.public
                && !again
            {
                return Err(taken(&interface.id, other));
            }
            self.part(work, &mut interface)?;
            let association = Association {
                id: id::new("eipassoc"),
                interface: interface.id.clone(),
                private_ip: interface.ip,
            };
            let made = association.id.clone();
            interface.public =
                Some(Public { ip: elastic.ip, elastic: Some((elastic.id.clone(), made.clone())) });
            elastic.association = Some(association);
            work.put(&interface)?;
            work.put(&elastic)?;
            Ok(made)
        })
    }

    /// The interface that an address is to lead to.
    fn target(&self, work: &mut Work<'_>, account: &str, target: &Target) -> Result<Interface> {
        let id = match (&target.instance, &target.interface) {
            (Some(instance), None) => {
                let instance: Instance = tags::own(work, account, instance)?;
                let no = |state: &str| {
                    let id = &instance.id;
                    let why =
                        format!("The {state} instance '{id}' is not in a valid state for this operation.");
                    Fault::new("InvalidInstanceID", why)
                };
                if instance.state == InstanceState::Pending || instance.state.is_over() {
                    return Err(no(instance.state.name()));
                }
                instance.interfaces.first().cloned().ok_or_else(|| no("addressless"))?
            }
            (None, Some(interface)) => interface.clone(),
            (None, None) => return Err(Fault::missing("InstanceId or NetworkInterfaceId")),
            (Some(_), Some(_)) => {
                return Err(Fault::combination("Name an instance or a network interface, but not both"));
            }
        };
        tags::own(work, account, &id)
    }

    /// Has the address of an association lead nowhere.
    ///
    /// # Errors
    /// `InvalidAssociationID.NotFound`.
    pub fn disassociate_address(&self, account: &str, association: &str) -> Result<()> {
        self.transact(|work| {
            let missing = || {
                let why = format!("The association ID '{association}' does not exist");
                Fault::new("InvalidAssociationID.NotFound", why)
            };
            let has = |elastic: &Elastic| elastic.association.as_ref().is_some_and(|a| a.id == association);
            let found = work.all::<Elastic>("")?.into_iter().find(|elastic| has(elastic));
            // As it is now, held still.
            let found = found.map(|elastic| work.get::<Elastic>(&elastic.id)).transpose()?.flatten();
            let found = found.filter(|elastic| elastic.account == account && has(elastic));
            self.disassociate(work, found.ok_or_else(missing)?)
        })
    }

    /// Likewise, by the address; one that leads nowhere stays so.
    ///
    /// # Errors
    /// `AuthFailure`.
    pub fn disassociate_public(&self, account: &str, ip: Ipv4Addr) -> Result<()> {
        self.transact(|work| {
            let elastic = own(work, account, &Which::Address(ip))?;
            self.disassociate(work, elastic)
        })
    }

    fn disassociate(&self, work: &mut Work<'_>, elastic: Elastic) -> Result<()> {
        let Some(association) = elastic.association else { return Ok(()) };
        if let Some(mut interface) = work.get::<Interface>(&association.interface)? {
            interface.public = None;
            self.give_again(work, &mut interface)?;
            work.put(&interface)?;
        }
        work.put(&Elastic { association: None, ..elastic })
    }

    /// A free public address.
    pub(super) fn free_public(&self, work: &mut Work<'_>) -> Result<Ipv4Addr> {
        let from =
            *self.hints.lock().unwrap_or_else(PoisonError::into_inner).entry("public".into()).or_insert(0);
        for (at, ip) in self.settings.addresses.from(from.into()) {
            if work.get::<Name>(&name(ip))?.is_none() && !self.given_beside(ip)? {
                // One that was given back is taken last: others may still believe that they know who has it.
                let next = u32::try_from(at + 1).unwrap_or(0);
                self.hints.lock().unwrap_or_else(PoisonError::into_inner).insert("public".into(), next);
                return Ok(ip);
            }
        }
        let why = "There are no more public addresses; release some, or give hutchd more in addresses.toml";
        Err(Fault::new("InsufficientAddressCapacity", why))
    }

    /// Gives an interface a public address that goes with the run of its instance.
    pub(super) fn take_public(
        &self,
        work: &mut Work<'_>,
        interface: &mut Interface,
        ip: Ipv4Addr,
    ) -> Result<()> {
        work.put(&Name { id: name(ip), of: interface.id.clone() })?;
        interface.public = Some(Public { ip, elastic: None });
        Ok(())
    }

    /// An instance is to run: gives its interfaces the public addresses that they should have.
    pub(super) fn give_public(&self, work: &mut Work<'_>, instance: &Instance) -> Result<()> {
        for id in &instance.interfaces {
            let Some(mut interface) = work.get::<Interface>(id)? else { continue };
            if interface.auto_public && interface.public.is_none() {
                let ip = self.free_public(work)?;
                self.take_public(work, &mut interface, ip)?;
                work.put(&interface)?;
            }
        }
        Ok(())
    }

    /// An elastic address leads to the interface no more: where it had another before, it has another after, if there is any.
    fn give_again(&self, work: &mut Work<'_>, interface: &mut Interface) -> Result<()> {
        let Some(attachment) = interface.attachment.as_ref().filter(|_| interface.auto_public) else {
            return Ok(());
        };
        let instance = work.get::<Instance>(&attachment.instance)?;
        let runs = |i: &Instance| matches!(i.state, InstanceState::Pending | InstanceState::Running);
        if !instance.as_ref().is_some_and(runs) {
            return Ok(());
        }
        match self.free_public(work) {
            Ok(ip) => self.take_public(work, interface, ip),
            Err(fault) if fault.code == "InsufficientAddressCapacity" => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    /// Takes a public address back that goes with the run of an instance.
    pub(super) fn take_back(&self, work: &mut Work<'_>, interface: &mut Interface) -> Result<()> {
        if interface.public.as_ref().is_some_and(|public| public.elastic.is_none()) {
            self.part(work, interface)?;
        }
        Ok(())
    }

    /// Likewise those of an instance that runs no more.
    pub(super) fn take_back_all(&self, work: &mut Work<'_>, instance: &Instance) -> Result<()> {
        for id in &instance.interfaces {
            let Some(mut interface) = work.get::<Interface>(id)? else { continue };
            if interface.public.is_some() {
                self.take_back(work, &mut interface)?;
                work.put(&interface)?;
            }
        }
        Ok(())
    }

    /// Parts an interface, which the caller writes, from its public address, whatever that is.
    pub(super) fn part(&self, work: &mut Work<'_>, interface: &mut Interface) -> Result<()> {
        let Some(public) = interface.public.take() else { return Ok(()) };
        match public.elastic {
            None => work.delete::<Name>(&name(public.ip)),
            Some((id, _)) => {
                if let Some(elastic) = work.get::<Elastic>(&id)? {
                    work.put(&Elastic { association: None, ..elastic })?;
                }
            }
        }
        Ok(())
    }

    /// A public address as the host is told of it.
    pub(super) fn public(&self, ip: Ipv4Addr) -> host::Public {
        let pool = &self.settings.addresses;
        host::Public { ip, lan: pool.is_lan() && pool.has(ip) }
    }
}
