//! Networks and their subnets: what each account begins with, and what it makes beside it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{
    Account, Gateway, Group, Interface, Name, Peer, RouteTable, Rule, Subnet, Tags, Target, Vpc, VpcParts,
};

use super::{Region, Work, tags};

/// The default network of every account.
pub const DEFAULT_CIDR: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 31, 0, 0), 16);
/// The bits of a default subnet's prefix.
pub(super) const SUBNET_BITS: u8 = 20;

/// What CreateSubnet asks for.
#[derive(Debug, Clone)]
pub struct NewSubnet {
    /// The network.
    pub vpc: String,
    /// Its addresses.
    pub cidr: Ipv4Net,
    /// The zone's name; by default the first.
    pub zone: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// What is said of a thing that others need.
pub(super) fn needed(what: &str, id: &str) -> Fault {
    Fault::new(
        "DependencyViolation",
        format!("The {what} '{id}' has dependencies and cannot be deleted; delete or detach them first"),
    )
}

impl Region {
    /// Makes what an account begins with, once: the default network, with a subnet a zone, a gateway and a group.
    ///
    /// # Errors
    /// The store's.
    pub fn ensure_account(&self, account: &str) -> Result<()> {
        if self.get::<Account>(account)?.is_some() {
            return Ok(());
        }
        self.transact(|work| {
            if work.get::<Account>(account)?.is_some() {
                return Ok(());
            }
            work.put(&Account { id: account.into() })?;
            // Ids follow from the account and the region: networks that were made before they had records of their
            // routes and gateways told these.
            self.make_default(work, account, &|prefix, what| self.first_id(account, prefix, what)).map(drop)
        })
    }

    fn first_id(&self, account: &str, prefix: &str, what: &str) -> String {
        id::of(prefix, &format!("{}/{account}/{what}", self.settings.name))
    }

    /// Makes the default network, and what belongs to it, as far as it is not there.
    fn make_default(
        &self,
        work: &mut Work<'_>,
        account: &str,
        of: &dyn Fn(&str, &str) -> String,
    ) -> Result<Vpc> {
        let known = work.get::<Vpc>(&self.default_vpc(account))?;
        let vpc = known.clone().unwrap_or_else(|| Vpc {
            id: self.default_vpc(account),
            account: account.into(),
            cidr: DEFAULT_CIDR,
            default: true,
            parts: VpcParts {
                dhcp_options: self.dhcp_options(account),
                network_acl: of("acl", "default"),
                cidr_association: of("vpc-cidr-assoc", "default"),
            },
            dns_support: true,
            dns_hostnames: true,
            usage_metrics: false,
            tags: Tags::new(),
        });
        work.put(&vpc)?;
        let gateway = of("igw", "default");
        let (routes, association) = (of("rtb", "default"), of("rtbassoc", "default"));
        work.put(&Gateway {
            id: gateway.clone(),
            account: account.into(),
            vpc: Some(vpc.id.clone()),
            tags: Tags::new(),
        })?;
        let everywhere = (Ipv4Net::default(), Target::Gateway(gateway));
        main_table(work, &vpc, routes, association, [everywhere].into())?;
        if known.is_some() {
            return Ok(vpc);
        }
        for zone in self.zones() {
            if let Some(cidr) = self.default_cidr(&zone) {
                work.put(&self.subnet_of_zone(&vpc, zone, cidr))?;
            }
        }
        let ids = (of("sg", "default"), of("sgr", "members"), of("sgr", "out"));
        default_group(work, &vpc, ids)?;
        Ok(vpc)
    }

    fn subnet_of_zone(&self, vpc: &Vpc, zone: String, cidr: Ipv4Net) -> Subnet {
        Subnet {
            id: self.first_id(&vpc.account, "subnet", &zone),
            account: vpc.account.clone(),
            vpc: vpc.id.clone(),
            cidr,
            zone,
            default: true,
            map_public: None,
            tags: Tags::new(),
        }
    }

    /// The account's default network, while it has it.
    pub fn default_vpc(&self, account: &str) -> String {
        self.first_id(account, "vpc", "default")
    }

    /// The account's DHCP options, which all its networks have.
    pub fn dhcp_options(&self, account: &str) -> String {
        self.first_id(account, "dopt", "default")
    }

    /// The network that is named, or the default one.
    ///
    /// # Errors
    /// `VPCIdNotSpecified`: there is no default one. `InvalidVpcID.*`.
    pub(super) fn vpc_or_default(
        &self,
        work: &mut Work<'_>,
        account: &str,
        vpc: Option<&str>,
    ) -> Result<Vpc> {
        match vpc {
            Some(vpc) => tags::own(work, account, vpc),
            None => work.get::<Vpc>(&self.default_vpc(account))?.ok_or_else(|| {
                let why = "No default VPC for this user; name a VPC or a subnet, or call CreateDefaultVpc";
                Fault::new("VPCIdNotSpecified", why)
            }),
        }
    }

    /// The subnet an instance goes to that names none: the zone's default, or the first zone's that has one.
    pub(super) fn default_subnet(
        &self,
        work: &mut Work<'_>,
        account: &str,
        zone: Option<&str>,
    ) -> Result<Subnet> {
        let all = self.zones();
        let zones = match zone {
            Some(zone) if all.iter().any(|known| known == zone) => vec![zone.to_owned()],
            Some(zone) => {
                let why = format!("Invalid availability zone: [{zone}]; there are: {}", all.join(", "));
                return Err(Fault::new("InvalidParameterValue", why));
            }
            None => all,
        };
        for zone in zones {
            if let Some(subnet) = work.get::<Subnet>(&self.first_id(account, "subnet", &zone))? {
                return Ok(subnet);
            }
        }
        self.vpc_or_default(work, account, None)?;
        Err(Fault::new("MissingInput", "No subnets found for the default VPC; name a subnet"))
    }

    /// Makes a network.
    ///
    /// # Errors
    /// `InvalidVpc.Range`, tags that cannot be.
    pub fn create_vpc(&self, account: &str, cidr: Ipv4Net, tags: &Tags) -> Result<Vpc> {
        self.ensure_account(account)?;
        tags::check(tags)?;
        if !(16..=28).contains(&cidr.prefix_len()) {
            let why = format!("The CIDR '{cidr}' is invalid: a VPC has a prefix of 16 to 28 bits");
            return Err(Fault::new("InvalidVpc.Range", why));
        }
        self.transact(|work| {
            let vpc = Vpc {
                id: id::new("vpc"),
                account: account.into(),
                cidr: cidr.trunc(),
                default: false,
                parts: VpcParts {
                    dhcp_options: self.dhcp_options(account),
                    network_acl: id::new("acl"),
                    cidr_association: id::new("vpc-cidr-assoc"),
                },
                dns_support: true,
                dns_hostnames: false,
                usage_metrics: false,
                tags: tags.clone(),
            };
            work.put(&vpc)?;
            main_table(work, &vpc, id::new("rtb"), id::new("rtbassoc"), BTreeMap::new())?;
            default_group(work, &vpc, (id::new("sg"), id::new("sgr"), id::new("sgr")))?;
            Ok(vpc)
        })
    }

    /// Makes the default network again, with all that belongs to it.
    ///
    /// # Errors
    /// `DefaultVpcAlreadyExists`.
    pub fn create_default_vpc(&self, account: &str) -> Result<Vpc> {
        self.ensure_account(account)?;
        self.transact_alone(|work| {
            if work.get::<Vpc>(&self.default_vpc(account))?.is_some() {
                let why = "A Default VPC already exists for this account in this region.";
                return Err(Fault::new("DefaultVpcAlreadyExists", why));
            }
            // What belonged to the last one may still be there: a gateway, detached.
            self.make_default(work, account, &|prefix, _| id::new(prefix))
        })
    }

    /// Deletes a network in which nothing is left.
    ///
    /// # Errors
    /// `DependencyViolation`, `InvalidVpcID.*`.
    pub fn delete_vpc(&self, account: &str, id: &str) -> Result<()> {
        self.transact_alone(|work| {
            tags::own::<Vpc>(work, account, id)?;
            let tables: Vec<_> =
                work.all::<RouteTable>("")?.into_iter().filter(|table| table.vpc == id).collect();
            let groups: Vec<_> = work.all::<Group>("")?.into_iter().filter(|group| group.vpc == id).collect();
            let used = work.all::<Subnet>("")?.iter().any(|subnet| subnet.vpc == id)
                || work.all::<Gateway>("")?.iter().any(|gateway| gateway.vpc.as_deref() == Some(id))
                || tables.iter().any(|table| !table.is_main())
                || groups.iter().any(|group| group.name != "default");
            if used {
                return Err(needed("vpc", id));
            }
            for table in tables {
                work.delete::<RouteTable>(&table.id);
            }
            for group in groups {
                work.delete::<Name>(&format!("group/{id}/{}", group.name));
                work.delete::<Group>(&group.id);
            }
            work.delete::<Vpc>(id);
            Ok(())
        })
    }

    /// Changes attributes of a network.
    ///
    /// # Errors
    /// `InvalidVpcID.*`.
    pub fn modify_vpc(&self, account: &str, id: &str, change: impl Fn(&mut Vpc)) -> Result<()> {
        self.transact(|work| {
            let mut vpc: Vpc = tags::own(work, account, id)?;
            change(&mut vpc);
            work.put(&vpc)
        })
    }

    /// Makes a subnet.
    ///
    /// # Errors
    /// `InvalidSubnet.Range`, `InvalidSubnet.Conflict`, `InvalidParameterValue`: no such zone. `InvalidVpcID.*`.
    pub fn create_subnet(&self, account: &str, ask: &NewSubnet) -> Result<Subnet> {
        self.ensure_account(account)?;
        tags::check(&ask.tags)?;
        let zones = self.zones();
        let zone =
            ask.zone.as_ref().or(zones.first()).filter(|zone| zones.contains(zone)).ok_or_else(|| {
                let why = format!("Subnets can be created in: {}.", zones.join(", "));
                Fault::value("availabilityZone", ask.zone.as_deref().unwrap_or_default(), &why)
            })?;
        self.transact_alone(|work| {
            let vpc: Vpc = tags::own(work, account, &ask.vpc)?;
            let cidr = ask.cidr.trunc();
            if !vpc.cidr.contains(&cidr) || cidr.prefix_len() > 28 {
                let why = format!(
                    "The CIDR '{}' is invalid: it has to lie in the VPC's {}, with a prefix of 28 bits at most",
                    ask.cidr, vpc.cidr
                );
                return Err(Fault::new("InvalidSubnet.Range", why));
            }
            let overlaps = |net: &Ipv4Net| net.contains(&cidr) || cidr.contains(net);
            let all = work.all::<Subnet>("")?;
            if let Some(other) = all.iter().find(|other| other.vpc == vpc.id && overlaps(&other.cidr)) {
                let why = format!("The CIDR '{cidr}' conflicts with another subnet: {} ({})", other.id, other.cidr);
                return Err(Fault::new("InvalidSubnet.Conflict", why));
            }
            let other = if vpc.default { self.taken_beside(cidr)? } else { None };
            if let Some(other) = other {
                let why = format!("The CIDR '{cidr}' conflicts with another subnet: {other}");
                return Err(Fault::new("InvalidSubnet.Conflict", why));
            }
            let subnet = Subnet {
                id: id::new("subnet"),
                account: account.into(),
                vpc: vpc.id,
                cidr,
                zone: zone.clone(),
                default: false,
                map_public: None,
                tags: ask.tags.clone(),
            };
            work.put(&subnet)?;
            Ok(subnet)
        })
    }

    /// Makes a zone's default subnet again.
    ///
    /// # Errors
    /// `DefaultVpcDoesNotExist`, `DefaultSubnetAlreadyExistsInAvailabilityZone`, `InvalidSubnet.Conflict`: no room is left.
    pub fn create_default_subnet(&self, account: &str, zone: &str) -> Result<Subnet> {
        self.ensure_account(account)?;
        let zones = self.zones();
        if !zones.iter().any(|known| known == zone) {
            return Err(Fault::value("availabilityZone", zone, &format!("There are: {}.", zones.join(", "))));
        }
        self.transact_alone(|work| {
            let vpc = work.get::<Vpc>(&self.default_vpc(account))?.ok_or_else(|| {
                let why =
                    "There is no default VPC for this account in this region; call CreateDefaultVpc first";
                Fault::new("DefaultVpcDoesNotExist", why)
            })?;
            if work.get::<Subnet>(&self.first_id(account, "subnet", zone))?.is_some() {
                let why = format!("A default subnet already exists in the availability zone {zone}.");
                return Err(Fault::new("DefaultSubnetAlreadyExistsInAvailabilityZone", why));
            }
            let taken: Vec<_> = work.all::<Subnet>("")?.into_iter().filter(|s| s.vpc == vpc.id).collect();
            let free = |net: &Ipv4Net| !taken.iter().any(|s| s.cidr.contains(net) || net.contains(&s.cidr));
            let any = vpc.cidr.subnets(SUBNET_BITS).map_err(Fault::internal)?;
            let mut found = None;
            for cidr in self.default_cidr(zone).into_iter().chain(any).filter(free) {
                if self.taken_beside(cidr)?.is_none() {
                    found = Some(cidr);
                    break;
                }
            }
            let cidr = found.ok_or_else(|| {
                let why = format!("No /{SUBNET_BITS} is left in the default VPC; delete a subnet first");
                Fault::new("InvalidSubnet.Conflict", why)
            })?;
            let subnet = self.subnet_of_zone(&vpc, zone.into(), cidr);
            work.put(&subnet)?;
            Ok(subnet)
        })
    }

    /// Deletes a subnet in which no interface is.
    ///
    /// # Errors
    /// `DependencyViolation`, `InvalidSubnetID.*`.
    pub fn delete_subnet(&self, account: &str, id: &str) -> Result<()> {
        self.transact_alone(|work| {
            tags::own::<Subnet>(work, account, id)?;
            if work.all::<Interface>("")?.iter().any(|interface| interface.subnet == id) {
                return Err(needed("subnet", id));
            }
            // Its association with a route table goes with it.
            for mut table in work.all::<RouteTable>("")? {
                let before = table.associations.len();
                table.associations.retain(|_, subnet| subnet.as_deref() != Some(id));
                if table.associations.len() < before {
                    work.put(&table)?;
                }
            }
            work.delete::<Subnet>(id);
            Ok(())
        })
    }

    /// Whether a subnet is there, for what it has already.
    ///
    /// # Errors
    /// `InvalidSubnetID.*`.
    pub fn check_subnet(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| tags::own::<Subnet>(work, account, id).map(drop))
    }
}

fn main_table(
    work: &mut Work<'_>,
    vpc: &Vpc,
    id: String,
    association: String,
    routes: BTreeMap<Ipv4Net, Target>,
) -> Result<()> {
    let associations = [(association, None)].into();
    let (account, vpc) = (vpc.account.clone(), vpc.id.clone());
    work.put(&RouteTable { id, account, vpc, routes, associations, tags: Tags::new() })
}

/// A network's default group: its members reach each other, and everything.
fn default_group(work: &mut Work<'_>, vpc: &Vpc, ids: (String, String, String)) -> Result<()> {
    let (id, members, out) = ids;
    let rule =
        |egress, peer| Rule { egress, protocol: "-1".into(), from: -1, to: -1, peer, description: None };
    let rules =
        [(members, rule(false, Peer::Group(id.clone()))), (out, rule(true, Peer::Ipv4(Ipv4Net::default())))];
    work.put(&Name { id: format!("group/{}/default", vpc.id), of: id.clone() })?;
    work.put(&Group {
        id,
        account: vpc.account.clone(),
        name: "default".into(),
        description: "default VPC security group".into(),
        vpc: vpc.id.clone(),
        rules: rules.into(),
        rule_tags: BTreeMap::new(),
        tags: Tags::new(),
    })
}
