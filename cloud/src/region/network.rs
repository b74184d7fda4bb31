//! Network interfaces and the addresses they have.

use std::net::Ipv4Addr;
use std::sync::PoisonError;

use ipnet::Ipv4Net;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Address, Interface, Subnet, Tags};

use super::{Region, Work, tags};

/// Addresses at a subnet's beginning that no interface gets: the network's, the router's, and two that EC2 keeps.
const KEPT: u32 = 4;
/// The most private addresses of an interface.
pub const MAX_ADDRESSES: usize = 30;

impl Region {
    /// What an address is known by. The default networks of all accounts share theirs, every other network has its own.
    fn address_key(&self, (account, vpc): (&str, &str), ip: Ipv4Addr) -> String {
        if vpc == self.default_vpc(account) { ip.to_string() } else { format!("{vpc}/{ip}") }
    }

    /// A new interface in a subnet, with the address that is asked for or a free one.
    pub(super) fn new_interface(
        &self,
        work: &mut Work<'_>,
        subnet: &Subnet,
        groups: Vec<String>,
        wanted: Option<Ipv4Addr>,
        more: &Secondary,
    ) -> Result<Interface> {
        let id = id::new("eni");
        let of = (subnet.account.as_str(), subnet.vpc.as_str());
        let ip = match wanted {
            Some(ip) => {
                within(subnet, ip)?;
                if work.get::<Address>(&self.address_key(of, ip))?.is_some() {
                    return Err(Fault::new("InvalidIPAddress.InUse", format!("Address {ip} is in use")));
                }
                ip
            }
            None => self.free_address(work, subnet)?,
        };
        let key = self.address_key(of, ip);
        // Locally administered, and one of a kind on this host as the address is.
        let network = if key.contains('/') { &subnet.vpc } else { &self.settings.name };
        let salt = u8::from_str_radix(id::of("x", network).get(4..6).unwrap_or("00"), 16).unwrap_or(0);
        let [a, b, c, d] = ip.octets();
        work.put(&Address { id: key, interface: id.clone() })?;
        let mac = format!("02:{salt:02x}:{a:02x}:{b:02x}:{c:02x}:{d:02x}");
        let mut interface = Interface {
            id,
            account: subnet.account.clone(),
            description: String::new(),
            subnet: subnet.id.clone(),
            vpc: subnet.vpc.clone(),
            zone: subnet.zone.clone(),
            mac,
            ip,
            more: Vec::new(),
            groups,
            source_dest_check: true,
            attachment: None,
            public: None,
            auto_public: false,
            tags: Tags::new(),
        };
        self.assign(work, subnet, &mut interface, more)?;
        work.put(&interface)?;
        Ok(interface)
    }

    /// Gives an interface, which the caller writes, secondary addresses; returns them.
    pub(super) fn assign(
        &self,
        work: &mut Work<'_>,
        subnet: &Subnet,
        interface: &mut Interface,
        ask: &Secondary,
    ) -> Result<Vec<Ipv4Addr>> {
        if interface.more.len() + ask.ips.len() + ask.count as usize >= MAX_ADDRESSES {
            let why = format!("An interface has at most {MAX_ADDRESSES} private addresses: {}", interface.id);
            return Err(Fault::new("PrivateIpAddressLimitExceeded", why));
        }
        let of = (subnet.account.as_str(), subnet.vpc.as_str());
        let mut assigned = Vec::new();
        for ip in &ask.ips {
            within(subnet, *ip)?;
            if assigned.contains(ip) {
                return Err(Fault::value("privateIpAddresses", &ip.to_string(), "It is named twice."));
            }
            if let Some(taken) = work.get::<Address>(&self.address_key(of, *ip))?
                && taken.interface != interface.id
            {
                if !ask.reassign {
                    let why = format!("[{ip}] is already assigned, but move is not allowed.");
                    return Err(Fault::new("InvalidParameterValue", why));
                }
                self.let_go(work, &taken.interface, *ip)?;
            } else if interface.ip == *ip {
                let why = format!("[{ip}] is the primary address of {} already.", interface.id);
                return Err(Fault::new("InvalidParameterValue", why));
            }
            work.put(&Address { id: self.address_key(of, *ip), interface: interface.id.clone() })?;
            assigned.push(*ip);
        }
        for _ in 0..ask.count {
            let ip = self.free_address(work, subnet)?;
            work.put(&Address { id: self.address_key(of, ip), interface: interface.id.clone() })?;
            assigned.push(ip);
        }
        interface.more.extend(assigned.iter().filter(|ip| !ask.ips.contains(ip)));
        let new: Vec<_> = ask.ips.iter().filter(|ip| !interface.more.contains(ip)).copied().collect();
        interface.more.extend(new);
        Ok(assigned)
    }

    /// Has another interface not have an address that is to be moved.
    fn let_go(&self, work: &mut Work<'_>, id: &str, ip: Ipv4Addr) -> Result<()> {
        let Some(mut other) = work.get::<Interface>(id)? else { return Ok(()) };
        if other.ip == ip {
            let why = format!("[{ip}] is the primary address of {id}, which cannot be moved.");
            return Err(Fault::new("InvalidParameterValue", why));
        }
        other.more.retain(|have| *have != ip);
        work.put(&other)
    }

    /// Takes secondary addresses from an interface, which the caller writes.
    pub(super) fn unassign(
        &self,
        work: &mut Work<'_>,
        interface: &mut Interface,
        ips: &[Ipv4Addr],
    ) -> Result<()> {
        if let Some(missing) = ips.iter().find(|ip| !interface.more.contains(ip)) {
            let why = format!(
                "Some of [{missing}] are not assigned to interface {} as secondary addresses",
                interface.id
            );
            return Err(Fault::new("InvalidParameterValue", why));
        }
        interface.more.retain(|ip| !ips.contains(ip));
        for ip in ips {
            work.delete::<Address>(&self.address_key((&interface.account, &interface.vpc), *ip));
        }
        Ok(())
    }

    /// Whether instances of a subnet are given public addresses: default ones give them where others can use them.
    pub fn maps_public(&self, subnet: &Subnet) -> bool {
        subnet.map_public.unwrap_or(subnet.default && self.settings.addresses.is_lan())
    }

    /// Says whether instances that are launched in a subnet are given a public address.
    ///
    /// # Errors
    /// `InvalidSubnetID.*`.
    pub fn map_public_on_launch(&self, account: &str, id: &str, on: bool) -> Result<()> {
        self.transact(|work| {
            let mut subnet: Subnet = tags::own(work, account, id)?;
            subnet.map_public = Some(on);
            work.put(&subnet)
        })
    }

    fn free_address(&self, work: &mut Work<'_>, subnet: &Subnet) -> Result<Ipv4Addr> {
        let first = u32::from(subnet.cidr.network()) + KEPT;
        let last = u32::from(subnet.cidr.broadcast()) - 1;
        let count = last - first + 1;
        let of = (subnet.account.as_str(), subnet.vpc.as_str());
        let mut hints = self.hints.lock().unwrap_or_else(PoisonError::into_inner);
        let hint = hints.entry(subnet.id.clone()).or_insert(0);
        for _ in 0..count {
            let ip = Ipv4Addr::from(first + *hint % count);
            *hint = (*hint + 1) % count;
            if work.get::<Address>(&self.address_key(of, ip))?.is_none() {
                return Ok(ip);
            }
        }
        Err(Fault::new(
            "InsufficientFreeAddressesInSubnet",
            format!("There are not enough free addresses in subnet '{}'", subnet.id),
        ))
    }

    /// Removes an interface and gives its address back.
    pub(super) fn drop_interface(&self, work: &mut Work<'_>, id: &str) -> Result<()> {
        if let Some(mut interface) = work.get::<Interface>(id)? {
            self.part(work, &mut interface)?;
            for ip in interface.ips() {
                work.delete::<Address>(&self.address_key((&interface.account, &interface.vpc), ip));
            }
            work.delete::<Interface>(id);
        }
        Ok(())
    }
}

/// Secondary addresses that are asked for: these, and so many more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Secondary {
    /// These.
    pub ips: Vec<Ipv4Addr>,
    /// Any, so many.
    pub count: u32,
    /// Those may be another interface's secondary ones, and are moved then.
    pub reassign: bool,
}

/// Whether an interface in a subnet may have the address.
fn within(subnet: &Subnet, ip: Ipv4Addr) -> Result<()> {
    match assignable(subnet.cidr, ip) {
        true => Ok(()),
        false => {
            let why = format!("Address {ip} does not fall within the subnet's address range");
            Err(Fault::new("InvalidParameterValue", why))
        }
    }
}

/// Whether an interface may have the address.
fn assignable(cidr: Ipv4Net, ip: Ipv4Addr) -> bool {
    cidr.contains(&ip) && u32::from(ip) >= u32::from(cidr.network()) + KEPT && ip != cidr.broadcast()
}
