//! Elastic addresses.

use std::net::Ipv4Addr;

use hutch_cloud::model::{Elastic, Interface};
use hutch_cloud::region::{Allocation, Target, Which};

use super::{Answer, Context, Operation, done, tag_set};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("AllocateAddress", allocate),
    ("ReleaseAddress", release),
    ("DescribeAddresses", describe),
    ("AssociateAddress", associate),
    ("DisassociateAddress", disassociate),
    ("DescribeAddressesAttribute", attribute),
];

/// The pool that all addresses are of, by the name of EC2's.
const POOL: &str = "amazon";

fn ip(name: &str, text: &str) -> Result<Ipv4Addr, Fault> {
    text.parse().map_err(|_| Fault::value(name, text, "It is no IPv4 address."))
}

/// The address that is asked for at a name.
fn asked(c: &Context<'_>, name: &str, called: &str) -> Result<Option<Ipv4Addr>, Fault> {
    c.params.str(name).filter(|text| !text.is_empty()).map(|text| ip(called, text)).transpose()
}

/// How the call names an address: by its allocation, or by itself.
fn which(c: &Context<'_>) -> Result<Which, Fault> {
    let allocation = c.params.str("AllocationId").filter(|id| !id.is_empty());
    match (allocation, asked(c, "PublicIp", "publicIp")?) {
        (Some(id), None) => Ok(Which::Allocation(id.into())),
        (None, Some(ip)) => Ok(Which::Address(ip)),
        (None, None) => Err(Fault::missing("AllocationId or PublicIp")),
        (Some(_), Some(_)) => Err(Fault::combination(
            "You may specify public IP or allocation id, but not both in the same call",
        )),
    }
}

/// There is one network border group: the region.
fn check_border(c: &Context<'_>) -> Result<(), Fault> {
    let region = &c.region.settings().name;
    match c.params.str("NetworkBorderGroup") {
        Some(group) if group != region => {
            Err(Fault::value("networkBorderGroup", group, &format!("There is {region} only.")))
        }
        _ => Ok(()),
    }
}

fn allocate(c: &Context<'_>) -> Answer {
    check_border(c)?;
    if let Some(domain) = c.params.str("Domain").filter(|domain| *domain != "vpc") {
        return Err(Fault::value("domain", domain, "It is vpc."));
    }
    if let Some(pool) = c.params.str("PublicIpv4Pool").filter(|pool| *pool != POOL) {
        return Err(Fault::value("publicIpv4Pool", pool, &format!("There is {POOL} only.")));
    }
    if let Some(name) =
        ["CustomerOwnedIpv4Pool", "IpamPoolId"].into_iter().find(|n| c.params.str(n).is_some())
    {
        let why = format!("hutch does not have {name}; name addresses in addresses.toml");
        return Err(Fault::new("UnsupportedOperation", why));
    }
    let mut tags = c.tag_specifications()?;
    let own = tags.remove("elastic-ip").unwrap_or_default();
    if let Some(kind) = tags.keys().next() {
        return Err(Fault::value("resourceType", kind, "It is elastic-ip."));
    }
    let allocation = Allocation { ip: asked(c, "Address", "address")?, tags: own };
    let elastic = c.region.allocate_address(c.account, &allocation)?;
    Ok(node! {
        "publicIp": elastic.ip,
        "allocationId": elastic.id,
        "domain": "vpc",
        "publicIpv4Pool": POOL,
        "networkBorderGroup": &c.region.settings().name,
    })
}

fn release(c: &Context<'_>) -> Answer {
    check_border(c)?;
    c.region.release_address(c.account, &which(c)?)?;
    Ok(done())
}

fn associate(c: &Context<'_>) -> Answer {
    let which = which(c)?;
    let owned = |name: &str| c.params.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let target = Target {
        instance: owned("InstanceId"),
        interface: owned("NetworkInterfaceId"),
        private_ip: asked(c, "PrivateIpAddress", "privateIpAddress")?,
    };
    // In a VPC it is done unless that is forbidden.
    let again = c.params.boolean("AllowReassociation")?.unwrap_or(true);
    let association = c.region.associate_address(c.account, &which, &target, again)?;
    Ok(node! { "return": true, "associationId": association })
}

fn disassociate(c: &Context<'_>) -> Answer {
    let association = c.params.str("AssociationId").filter(|id| !id.is_empty());
    match (association, asked(c, "PublicIp", "publicIp")?) {
        (Some(id), None) => c.region.disassociate_address(c.account, id)?,
        (None, Some(ip)) => c.region.disassociate_public(c.account, ip)?,
        (None, None) => return Err(Fault::missing("AssociationId or PublicIp")),
        (Some(_), Some(_)) => {
            return Err(Fault::combination("You may specify public IP or association id, but not both"));
        }
    }
    Ok(done())
}

/// The account's elastic addresses, or those of them that are named.
fn own(c: &Context<'_>, ids: &[String], ips: &[String]) -> Result<Vec<Elastic>, Fault> {
    let mut all = c.region.all::<Elastic>()?;
    all.retain(|elastic| elastic.account == c.account);
    if let Some(id) = ids.iter().find(|id| !all.iter().any(|elastic| elastic.id == **id)) {
        let why = format!("The allocation ID '{id}' does not exist");
        return Err(Fault::new("InvalidAllocationID.NotFound", why));
    }
    let ips = ips.iter().map(|text| ip("publicIp", text)).collect::<Result<Vec<_>, _>>()?;
    if let Some(ip) = ips.iter().find(|ip| !all.iter().any(|elastic| elastic.ip == **ip)) {
        return Err(Fault::new("InvalidAddress.NotFound", format!("Address '{ip}' not found.")));
    }
    let named = |elastic: &Elastic| ids.contains(&elastic.id) || ips.contains(&elastic.ip);
    all.retain(|elastic| ids.is_empty() && ips.is_empty() || named(elastic));
    Ok(all)
}

fn describe(c: &Context<'_>) -> Answer {
    let filters = c.filters()?;
    let mut told = Vec::new();
    for elastic in own(c, &c.ids("AllocationId"), &c.ids("PublicIp"))? {
        let association = elastic.association.as_ref();
        let interface = association.map(|a| c.region.get::<Interface>(&a.interface)).transpose()?.flatten();
        let instance = interface.as_ref().and_then(|e| e.attachment.as_ref()).map(|a| &a.instance);
        let node = node! {
            "publicIp": elastic.ip,
            "allocationId": &elastic.id,
            "domain": "vpc",
            "publicIpv4Pool": POOL,
            "networkBorderGroup": &c.region.settings().name,
            "associationId": association.map(|a| &a.id),
            "instanceId": instance,
            "networkInterfaceId": association.map(|a| &a.interface),
            "networkInterfaceOwnerId": interface.as_ref().map(|e| &e.account),
            "privateIpAddress": association.map(|a| a.private_ip),
            "tagSet": tag_set(&elastic.tags),
        };
        if filters.hold(&node) {
            told.push(node);
        }
    }
    Ok(node! { "addressesSet": Node::List(told) })
}

/// Names in the DNS: none of ours has any.
fn attribute(c: &Context<'_>) -> Answer {
    if let Some(name) = c.params.str("Attribute").filter(|name| *name != "domain-name") {
        return Err(Fault::value("attribute", name, "It is domain-name."));
    }
    let ids = c.ids("AllocationId");
    let told = own(c, &ids, &[])?.into_iter().map(|elastic| {
        let node = node! { "publicIp": elastic.ip, "allocationId": &elastic.id };
        (elastic.id, node)
    });
    c.describe("addressSet", told.collect(), &[])
}
