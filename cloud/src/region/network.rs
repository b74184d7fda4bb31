//! What each account begins with: a default network with a subnet a zone and a default group. Addresses.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::PoisonError;

use ipnet::Ipv4Net;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Address, Group, Interface, Name, Peer, Rule, Subnet, Tags, Vpc, VpcParts};

use super::{Region, Work, tags};

/// The default network of every account.
pub const DEFAULT_CIDR: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 31, 0, 0), 16);
/// The bits of a default subnet's prefix.
const SUBNET_BITS: u8 = 20;
/// Addresses at a subnet's beginning that no interface gets: the network's, the router's, and two that EC2 keeps.
const KEPT: u32 = 4;

impl Region {
    /// Makes the account's default network, if it has none.
    ///
    /// # Errors
    /// The store's.
    pub fn ensure_account(&self, account: &str) -> Result<()> {
        // Ids follow from the account and the region, so that a second try finds what the first made.
        let of =
            |prefix: &str, what: &str| id::of(prefix, &format!("{}/{account}/{what}", self.settings.name));
        let vpc = of("vpc", "default");
        if self.get::<Vpc>(&vpc)?.is_some() {
            return Ok(());
        }
        self.transact(|work| {
            if work.get::<Vpc>(&vpc)?.is_some() {
                return Ok(());
            }
            work.put(&Vpc {
                id: vpc.clone(),
                account: account.into(),
                cidr: DEFAULT_CIDR,
                default: true,
                parts: VpcParts {
                    dhcp_options: of("dopt", "default"),
                    route_table: of("rtb", "default"),
                    route_table_association: of("rtbassoc", "default"),
                    network_acl: of("acl", "default"),
                    internet_gateway: of("igw", "default"),
                    cidr_association: of("vpc-cidr-assoc", "default"),
                },
                tags: Tags::new(),
            })?;
            let cidrs = DEFAULT_CIDR.subnets(SUBNET_BITS).map_err(Fault::internal)?;
            for (zone, cidr) in self.zones().into_iter().zip(cidrs) {
                let (vpc, id) = (vpc.clone(), of("subnet", &zone));
                let (account, tags) = (account.into(), Tags::new());
                work.put(&Subnet { id, account, vpc, cidr, zone, default: true, map_public: None, tags })?;
            }
            let id = of("sg", "default");
            let members = rule(false, Peer::Group(id.clone()));
            let out = rule(true, Peer::Ipv4(Ipv4Net::default()));
            let rules = [(of("sgr", "members"), members), (of("sgr", "out"), out)];
            work.put(&Name { id: format!("group/{vpc}/default"), of: id.clone() })?;
            work.put(&Group {
                id,
                account: account.into(),
                name: "default".into(),
                description: "default VPC security group".into(),
                vpc: vpc.clone(),
                rules: rules.into(),
                rule_tags: BTreeMap::new(),
                tags: Tags::new(),
            })
        })
    }

    /// The account's default network.
    pub fn default_vpc(&self, account: &str) -> String {
        id::of("vpc", &format!("{}/{account}/default", self.settings.name))
    }

    /// The subnet an instance goes to that names none: the zone's default, or that of the first zone.
    pub(super) fn default_subnet(&self, account: &str, zone: Option<&str>) -> Result<String> {
        let zones = self.zones();
        let zone = match zone {
            Some(zone) if zones.iter().any(|known| known == zone) => zone,
            Some(zone) => {
                let known = zones.join(", ");
                return Err(Fault::new(
                    "InvalidParameterValue",
                    format!("Invalid availability zone: [{zone}]; there are: {known}"),
                ));
            }
            None => zones.first().map(String::as_str).unwrap_or_default(),
        };
        Ok(id::of("subnet", &format!("{}/{account}/{zone}", self.settings.name)))
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
        let ip = match wanted {
            Some(ip) if !assignable(subnet.cidr, ip) => {
                let why = format!("Address {ip} does not fall within the subnet's address range");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            Some(ip) => {
                if work.get::<Address>(&ip.to_string())?.is_some() {
                    return Err(Fault::new("InvalidIPAddress.InUse", format!("Address {ip} is in use")));
                }
                ip
            }
            None => self.free_address(work, subnet)?,
        };
        work.put(&Address { id: ip.to_string(), interface: id.clone() })?;
        let [_, _, c, d] = ip.octets();
        let region = id::of("x", &self.settings.name);
        // Locally administered, and one of a kind on this host as the address is.
        let salt = u8::from_str_radix(region.get(4..6).unwrap_or("00"), 16).unwrap_or(0);
        let [a, b, ..] = ip.octets();
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
        let mut hints = self.hints.lock().unwrap_or_else(PoisonError::into_inner);
        let hint = hints.entry(subnet.id.clone()).or_insert(0);
        for _ in 0..count {
            let ip = Ipv4Addr::from(first + *hint % count);
            *hint = (*hint + 1) % count;
            if work.get::<Address>(&ip.to_string())?.is_none() {
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
            work.delete::<Address>(&interface.ip.to_string());
            work.delete::<Interface>(id);
        }
        Ok(())
    }
}

/// Whether an interface may have the address.
fn assignable(cidr: Ipv4Net, ip: Ipv4Addr) -> bool {
    cidr.contains(&ip) && u32::from(ip) >= u32::from(cidr.network()) + KEPT && ip != cidr.broadcast()
}

fn rule(egress: bool, peer: Peer) -> Rule {
    Rule { egress, protocol: "-1".into(), from: -1, to: -1, peer, description: None }
}
