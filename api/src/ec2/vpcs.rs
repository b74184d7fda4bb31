//! Networks and their subnets.

use std::collections::BTreeMap;

use hutch_cloud::model::{Interface, Subnet, Vpc};
use hutch_cloud::region::NewSubnet;
use hutch_cloud::region::metadata::zone_id;
use ipnet::Ipv4Net;

use super::{Answer, Context, Operation, chosen, done, tag_set};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeVpcs", vpcs),
    ("DescribeVpcAttribute", vpc_attribute),
    ("CreateVpc", create_vpc),
    ("CreateDefaultVpc", |c| Ok(node! { "vpc": vpc(&c.region.create_default_vpc(c.account)?) })),
    ("DeleteVpc", |c| c.region.delete_vpc(c.account, c.params.required("VpcId")?).map(|()| done())),
    ("ModifyVpcAttribute", modify_vpc),
    ("DescribeSubnets", subnets),
    ("CreateSubnet", create_subnet),
    ("CreateDefaultSubnet", create_default_subnet),
    ("DeleteSubnet", |c| c.region.delete_subnet(c.account, c.params.required("SubnetId")?).map(|()| done())),
    ("ModifySubnetAttribute", modify_subnet),
];

/// The account's networks that are named, or all.
pub(super) fn own_vpcs(c: &Context<'_>, ids: &[String]) -> Result<Vec<Vpc>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Vpc>()?;
    all.retain(|vpc| vpc.account == c.account);
    chosen(all, ids, |vpc| &vpc.id, ("vpc", "InvalidVpcID", "vpc ID"))
}

/// The account's subnets that are named, or all.
pub(super) fn own_subnets(c: &Context<'_>, ids: &[String]) -> Result<Vec<Subnet>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Subnet>()?;
    all.retain(|subnet| subnet.account == c.account);
    chosen(all, ids, |subnet| &subnet.id, ("subnet", "InvalidSubnetID", "subnet ID"))
}

/// The address range of a parameter; host bits are for whoever uses it to drop or refuse.
pub(super) fn cidr(params: &Params, name: &str) -> Result<Ipv4Net, Fault> {
    let text = params.required(name)?;
    text.parse().map_err(|_| Fault::value(name, text, "This is not a valid CIDR block."))
}

/// Refuses what is asked for of these names: hutch would have to overlook it. What is off is not asked for.
pub(super) fn refuse(params: &Params, names: &[&str]) -> Result<(), Fault> {
    let asked = |name: &&&str| {
        let off = |text: &str| matches!(text, "" | "false" | "0");
        params.sub(name).is_some_and(|below| below.text().is_none_or(|text| !off(text)))
    };
    match names.iter().find(asked) {
        Some(name) => {
            Err(Fault::new("UnsupportedOperation", format!("hutch does not have {name} yet; leave it out")))
        }
        None => Ok(()),
    }
}

fn vpc(vpc: &Vpc) -> Node {
    let cidr = node! {
        "associationId": &vpc.parts.cidr_association,
        "cidrBlock": vpc.cidr,
        "cidrBlockState": node! { "state": "associated" },
    };
    node! {
        "vpcId": &vpc.id,
        "ownerId": &vpc.account,
        "state": "available",
        "cidrBlock": vpc.cidr,
        "cidrBlockAssociationSet": Node::List(vec![cidr]),
        "dhcpOptionsId": &vpc.parts.dhcp_options,
        "instanceTenancy": "default",
        "isDefault": vpc.default,
        "tagSet": tag_set(&vpc.tags),
    }
}

fn vpcs(c: &Context<'_>) -> Answer {
    let ids = c.ids("VpcId");
    let told = own_vpcs(c, &ids)?.into_iter().map(|one| (one.id.clone(), vpc(&one)));
    c.describe("vpcSet", told.collect(), &ids)
}

fn create_vpc(c: &Context<'_>) -> Answer {
    let p = c.params;
    let later = [
        "Ipv4IpamPoolId",
        "Ipv4NetmaskLength",
        "AmazonProvidedIpv6CidrBlock",
        "Ipv6CidrBlock",
        "Ipv6Pool",
        "Ipv6IpamPoolId",
    ];
    refuse(p, &later)?;
    match p.str("InstanceTenancy") {
        None | Some("default") => {}
        Some("dedicated") => {
            return Err(Fault::new("UnsupportedTenancy", "hutch's networks have the tenancy default"));
        }
        Some(other) => return Err(Fault::value("instanceTenancy", other, "It is default.")),
    }
    let tags = c.tag_specifications()?.remove("vpc").unwrap_or_default();
    Ok(node! { "vpc": vpc(&c.region.create_vpc(c.account, cidr(p, "CidrBlock")?, &tags)?) })
}

fn vpc_attribute(c: &Context<'_>) -> Answer {
    let id = c.params.required("VpcId")?.to_owned();
    let name = c.params.required("Attribute")?;
    let vpc = own_vpcs(c, std::slice::from_ref(&id))?.into_iter().next();
    let vpc = vpc.ok_or_else(|| Fault::not_found("InvalidVpcID", "vpc ID", &id))?;
    let (name, on) = match name {
        "enableDnsSupport" => ("enableDnsSupport", vpc.dns_support),
        "enableDnsHostnames" => ("enableDnsHostnames", vpc.dns_hostnames),
        "enableNetworkAddressUsageMetrics" => ("enableNetworkAddressUsageMetrics", vpc.usage_metrics),
        _ => return Err(Fault::value("attribute", name, "It is no attribute of a VPC.")),
    };
    Ok(Node::empty().with("vpcId", &id).with(name, node! { "value": on }))
}

/// The one of these attributes that a call sets.
fn one_set<'a>(params: &Params, names: &[&'a str]) -> Result<(&'a str, bool), Fault> {
    let mut set = Vec::new();
    for name in names {
        set.extend(params.boolean(&format!("{name}.Value"))?.map(|on| (*name, on)));
    }
    match set.as_slice() {
        [one] => Ok(*one),
        [] => Err(Fault::combination("No attributes specified.")),
        _ => Err(Fault::combination("Fields for multiple attribute types specified")),
    }
}

fn modify_vpc(c: &Context<'_>) -> Answer {
    let names = ["EnableDnsSupport", "EnableDnsHostnames", "EnableNetworkAddressUsageMetrics"];
    let (name, on) = one_set(c.params, &names)?;
    c.region.modify_vpc(c.account, c.params.required("VpcId")?, |vpc| match name {
        "EnableDnsSupport" => vpc.dns_support = on,
        "EnableDnsHostnames" => vpc.dns_hostnames = on,
        _ => vpc.usage_metrics = on,
    })?;
    Ok(done())
}

/// A subnet, so many of whose addresses are used.
fn subnet(c: &Context<'_>, s: &Subnet, used: u32) -> Node {
    let all = 1u32 << (32 - s.cidr.prefix_len());
    node! {
        "subnetId": &s.id,
        "subnetArn": format!("arn:aws:ec2:{}:{}:subnet/{}", c.region.settings().name, s.account, s.id),
        "state": "available",
        "ownerId": &s.account,
        "vpcId": &s.vpc,
        "cidrBlock": s.cidr,
        "ipv6CidrBlockAssociationSet": Node::List(vec![]),
        // EC2 keeps five addresses of each.
        "availableIpAddressCount": all.saturating_sub(5 + used),
        "availabilityZone": &s.zone,
        "availabilityZoneId": zone_id(c.region, &s.zone),
        "defaultForAz": s.default,
        "mapPublicIpOnLaunch": c.region.maps_public(s),
        "assignIpv6AddressOnCreation": false,
        "mapCustomerOwnedIpOnLaunch": false,
        "enableDns64": false,
        "ipv6Native": false,
        "privateDnsNameOptionsOnLaunch": node! {
            "hostnameType": "ip-name",
            "enableResourceNameDnsARecord": false,
            "enableResourceNameDnsAAAARecord": false,
        },
        "tagSet": tag_set(&s.tags),
    }
}

fn subnets(c: &Context<'_>) -> Answer {
    let ids = c.ids("SubnetId");
    let found = own_subnets(c, &ids)?;
    let mut used: BTreeMap<String, u32> = BTreeMap::new();
    for interface in c.region.all::<Interface>()? {
        *used.entry(interface.subnet).or_default() += 1;
    }
    let used = |s: &Subnet| used.get(&s.id).copied().unwrap_or(0);
    let told = found.iter().map(|s| (s.id.clone(), subnet(c, s, used(s))));
    c.describe("subnetSet", told.collect(), &ids)
}

fn create_subnet(c: &Context<'_>) -> Answer {
    let p = c.params;
    let later = [
        "Ipv6CidrBlock",
        "OutpostArn",
        "Ipv6Native",
        "Ipv4IpamPoolId",
        "Ipv4NetmaskLength",
        "Ipv6IpamPoolId",
    ];
    refuse(p, &later)?;
    let zone = match (p.str("AvailabilityZone"), p.str("AvailabilityZoneId")) {
        (Some(_), Some(_)) => {
            return Err(Fault::combination("Name the zone or its id, not both"));
        }
        (zone, None) => zone.map(str::to_owned),
        (None, Some(id)) => {
            let known = c.region.zones().into_iter().find(|zone| zone_id(c.region, zone) == id);
            let missing = || Fault::value("availabilityZoneId", id, "There is no such zone.");
            Some(known.ok_or_else(missing)?)
        }
    };
    let ask = NewSubnet {
        vpc: p.required("VpcId")?.into(),
        cidr: cidr(p, "CidrBlock")?,
        zone,
        tags: c.tag_specifications()?.remove("subnet").unwrap_or_default(),
    };
    Ok(node! { "subnet": subnet(c, &c.region.create_subnet(c.account, &ask)?, 0) })
}

fn create_default_subnet(c: &Context<'_>) -> Answer {
    refuse(c.params, &["Ipv6Native"])?;
    let zone = c.params.required("AvailabilityZone")?;
    Ok(node! { "subnet": subnet(c, &c.region.create_default_subnet(c.account, zone)?, 0) })
}

fn modify_subnet(c: &Context<'_>) -> Answer {
    let p = c.params;
    let truths = [
        "AssignIpv6AddressOnCreation",
        "MapCustomerOwnedIpOnLaunch",
        "EnableDns64",
        "EnableResourceNameDnsARecordOnLaunch",
        "EnableResourceNameDnsAAAARecordOnLaunch",
        "DisableLniAtDeviceIndex",
    ];
    refuse(p, &["CustomerOwnedIpv4Pool", "EnableLniAtDeviceIndex"])?;
    let id = p.required("SubnetId")?;
    if let Some(kind) = p.str("PrivateDnsHostnameTypeOnLaunch") {
        return match kind {
            "ip-name" => c.region.check_subnet(c.account, id).map(|()| done()),
            _ => Err(Fault::new("UnsupportedOperation", "hutch names instances by their addresses: ip-name")),
        };
    }
    let (name, on) = one_set(p, &[&["MapPublicIpOnLaunch"], truths.as_slice()].concat())?;
    if on && name != "MapPublicIpOnLaunch" {
        let why = format!("hutch does not have {name} yet; leave it out");
        return Err(Fault::new("UnsupportedOperation", why));
    }
    match name {
        "MapPublicIpOnLaunch" => c.region.map_public_on_launch(c.account, id, on)?,
        _ => c.region.check_subnet(c.account, id)?,
    }
    Ok(done())
}
