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
    ) -> Result<Interface> {
        let id = id::new("eni");
        let of = (subnet.account.as_str(), subnet.vpc.as_str());
        let ip = match wanted {
            Some(ip) if !assignable(subnet.cidr, ip) => {
                let why = format!("Address {ip} does not fall within the subnet's address range");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            Some(ip) => {
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
        let interface = Interface {
            id,
            account: subnet.account.clone(),
            description: String::new(),
            subnet: subnet.id.clone(),
            vpc: subnet.vpc.clone(),
            zone: subnet.zone.clone(),
            mac,
            ip,
            groups,
            source_dest_check: true,
            attachment: None,
            public: None,
            auto_public: false,
            tags: Tags::new(),
        };
        work.put(&interface)?;
        Ok(interface)
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
            work.delete::<Address>(&self.address_key((&interface.account, &interface.vpc), interface.ip));
            work.delete::<Interface>(id);
        }
        Ok(())
    }
}

/// Whether an interface may have the address.
fn assignable(cidr: Ipv4Net, ip: Ipv4Addr) -> bool {
    cidr.contains(&ip) && u32::from(ip) >= u32::from(cidr.network()) + KEPT && ip != cidr.broadcast()
}
