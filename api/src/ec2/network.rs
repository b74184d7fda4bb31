//! Networks: what each account has from the beginning.

use std::collections::BTreeMap;

use hutch_cloud::model::{Group, Interface, Subnet, Vpc};
use hutch_cloud::region::metadata::{private_name, public_name, zone_id};

use super::{Answer, Context, Operation, chosen, done, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeVpcs", vpcs),
    ("DescribeVpcAttribute", vpc_attribute),
    ("DescribeSubnets", subnets),
    ("DescribeNetworkInterfaces", interfaces),
    ("DescribeRouteTables", route_tables),
    ("DescribeInternetGateways", internet_gateways),
    ("DescribeNetworkAcls", network_acls),
    ("DescribeDhcpOptions", dhcp_options),
    ("ModifySubnetAttribute", modify_subnet),
];

fn own_vpcs(c: &Context<'_>, ids: &[String]) -> Result<Vec<Vpc>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Vpc>()?;
    all.retain(|vpc| vpc.account == c.account);
    chosen(all, ids, |vpc| &vpc.id, ("vpc", "InvalidVpcID", "vpc ID"))
}

fn own_subnets(c: &Context<'_>, ids: &[String]) -> Result<Vec<Subnet>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Subnet>()?;
    all.retain(|subnet| subnet.account == c.account);
    chosen(all, ids, |subnet| &subnet.id, ("subnet", "InvalidSubnetID", "subnet ID"))
}

fn vpcs(c: &Context<'_>) -> Answer {
    let ids = c.ids("VpcId");
    let told = own_vpcs(c, &ids)?.into_iter().map(|vpc| {
        let cidr = node! {
            "associationId": &vpc.parts.cidr_association,
            "cidrBlock": vpc.cidr,
            "cidrBlockState": node! { "state": "associated" },
        };
        let node = node! {
            "vpcId": &vpc.id,
            "ownerId": &vpc.account,
            "state": "available",
            "cidrBlock": vpc.cidr,
            "cidrBlockAssociationSet": Node::List(vec![cidr]),
            "dhcpOptionsId": &vpc.parts.dhcp_options,
            "instanceTenancy": "default",
            "isDefault": vpc.default,
            "tagSet": tag_set(&vpc.tags),
        };
        (vpc.id, node)
    });
    c.describe("vpcSet", told.collect(), &ids)
}

fn vpc_attribute(c: &Context<'_>) -> Answer {
    let id = c.params.required("VpcId")?.to_owned();
    own_vpcs(c, std::slice::from_ref(&id))?;
    let answer = Node::empty().with("vpcId", &id);
    let name = c.params.required("Attribute")?;
    Ok(match name {
        "enableDnsSupport" => answer.with("enableDnsSupport", node! { "value": true }),
        "enableDnsHostnames" => answer.with("enableDnsHostnames", node! { "value": true }),
        "enableNetworkAddressUsageMetrics" => {
            answer.with("enableNetworkAddressUsageMetrics", node! { "value": false })
        }
        _ => return Err(Fault::value("attribute", name, "It is no attribute of a VPC.")),
    })
}

fn subnets(c: &Context<'_>) -> Answer {
    let ids = c.ids("SubnetId");
    let subnets = own_subnets(c, &ids)?;
    let mut used: BTreeMap<String, u32> = BTreeMap::new();
    for interface in c.region.all::<Interface>()? {
        *used.entry(interface.subnet).or_default() += 1;
    }
    let region = &c.region.settings().name;
    let told = subnets.into_iter().map(|s| {
        let all = 1u32 << (32 - s.cidr.prefix_len());
        let node = node! {
            "subnetId": &s.id,
            "subnetArn": format!("arn:aws:ec2:{region}:{}:subnet/{}", s.account, s.id),
            "state": "available",
            "ownerId": &s.account,
            "vpcId": &s.vpc,
            "cidrBlock": s.cidr,
            "ipv6CidrBlockAssociationSet": Node::List(vec![]),
            // EC2 keeps five addresses of each.
            "availableIpAddressCount": all.saturating_sub(5 + used.get(&s.id).copied().unwrap_or(0)),
            "availabilityZone": &s.zone,
            "availabilityZoneId": zone_id(c.region, &s.zone),
            "defaultForAz": s.default,
            "mapPublicIpOnLaunch": c.region.maps_public(&s),
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
        };
        (s.id, node)
    });
    c.describe("subnetSet", told.collect(), &ids)
}

fn modify_subnet(c: &Context<'_>) -> Answer {
    let id = c.params.required("SubnetId")?;
    let known = ["Action", "Version", "DryRun", "SubnetId", "MapPublicIpOnLaunch"];
    let other = c.params.names().find(|(name, _)| !known.contains(name));
    if let Some((name, _)) = other {
        return Err(Fault::new(
            "UnsupportedOperation",
            format!("hutch does not have {name} yet; leave it out"),
        ));
    }
    let on = c.params.boolean("MapPublicIpOnLaunch.Value")?;
    let on = on.ok_or_else(|| Fault::missing("MapPublicIpOnLaunch"))?;
    c.region.map_public_on_launch(c.account, id, on)?;
    Ok(done())
}

/// An interface's public address.
pub(super) fn association(c: &Context<'_>, e: &Interface) -> Option<Node> {
    let public = e.public.as_ref()?;
    let elastic = public.elastic.as_ref();
    Some(node! {
        "publicIp": public.ip,
        "publicDnsName": public_name(c.region, public.ip),
        "ipOwnerId": if elastic.is_some() { e.account.as_str() } else { "amazon" },
        "allocationId": elastic.map(|(allocation, _)| allocation),
        "associationId": elastic.map(|(_, association)| association),
    })
}

fn addresses(c: &Context<'_>, e: &Interface) -> Node {
    let name = private_name(c.region, e.ip);
    Node::List(vec![node! {
        "privateIpAddress": e.ip, "privateDnsName": name, "primary": true, "association": association(c, e),
    }])
}

/// An interface, as its instance tells it.
pub(super) fn interface_of_instance(c: &Context<'_>, e: &Interface, groups: &Node) -> Node {
    let attachment = e.attachment.as_ref().map(|a| {
        node! {
            "attachmentId": &a.id, "deviceIndex": a.device_index, "status": "attached",
            "attachTime": time(a.attached), "deleteOnTermination": a.delete_on_termination, "networkCardIndex": 0u32,
        }
    });
    node! {
        "networkInterfaceId": &e.id,
        "subnetId": &e.subnet,
        "vpcId": &e.vpc,
        "description": &e.description,
        "ownerId": &e.account,
        "status": "in-use",
        "macAddress": &e.mac,
        "privateIpAddress": e.ip,
        "privateDnsName": private_name(c.region, e.ip),
        "sourceDestCheck": e.source_dest_check,
        "interfaceType": "interface",
        "groupSet": groups.clone(),
        "attachment": attachment,
        "association": association(c, e),
        "privateIpAddressesSet": addresses(c, e),
        "ipv6AddressesSet": Node::List(vec![]),
    }
}

fn interfaces(c: &Context<'_>) -> Answer {
    let ids = c.ids("NetworkInterfaceId");
    let mut all = c.region.all::<Interface>()?;
    all.retain(|e| e.account == c.account);
    let found = chosen(all, &ids, |e| &e.id, ("eni", "InvalidNetworkInterfaceID", "networkInterface ID"))?;
    let names: BTreeMap<String, String> =
        c.region.all::<Group>()?.into_iter().map(|g| (g.id, g.name)).collect();
    let told = found.into_iter().map(|e| {
        let attachment = e.attachment.as_ref().map(|a| {
            node! {
                "attachmentId": &a.id, "instanceId": &a.instance, "instanceOwnerId": &e.account,
                "deviceIndex": a.device_index, "networkCardIndex": 0u32, "status": "attached",
                "attachTime": time(a.attached), "deleteOnTermination": a.delete_on_termination,
            }
        });
        let node = node! {
            "networkInterfaceId": &e.id,
            "subnetId": &e.subnet,
            "vpcId": &e.vpc,
            "availabilityZone": &e.zone,
            "availabilityZoneId": zone_id(c.region, &e.zone),
            "description": &e.description,
            "ownerId": &e.account,
            "requesterManaged": false,
            "status": if attachment.is_some() { "in-use" } else { "available" },
            "macAddress": &e.mac,
            "privateIpAddress": e.ip,
            "privateDnsName": private_name(c.region, e.ip),
            "sourceDestCheck": e.source_dest_check,
            "interfaceType": "interface",
            "groupSet": Node::list(&e.groups, |id| node! { "groupId": id, "groupName": names.get(id) }),
            "attachment": attachment,
            "association": association(c, &e),
            "privateIpAddressesSet": addresses(c, &e),
            "ipv6AddressesSet": Node::List(vec![]),
            "tagSet": tag_set(&e.tags),
        };
        (e.id, node)
    });
    c.describe("networkInterfaceSet", told.collect(), &ids)
}

/// Each network's own thing of a kind.
fn parts(
    c: &Context<'_>,
    (ids, set): (&'static str, &'static str),
    (prefix, error, what): (&str, &'static str, &str),
    told: impl Fn(&Vpc) -> (String, Node),
) -> Answer {
    let ids = c.ids(ids);
    let all: Vec<_> = own_vpcs(c, &[])?.iter().map(told).collect();
    let found = chosen(all, &ids, |(id, _)| id, (prefix, error, what))?;
    c.describe(set, found, &ids)
}

fn route_tables(c: &Context<'_>) -> Answer {
    let kind = ("rtb", "InvalidRouteTableID", "routeTable ID");
    parts(c, ("RouteTableId", "routeTableSet"), kind, |vpc| {
        let routes = vec![
            node! { "destinationCidrBlock": vpc.cidr, "gatewayId": "local", "origin": "CreateRouteTable", "state": "active" },
            node! {
                "destinationCidrBlock": "0.0.0.0/0", "gatewayId": &vpc.parts.internet_gateway,
                "origin": "CreateRoute", "state": "active",
            },
        ];
        let association = node! {
            "routeTableAssociationId": &vpc.parts.route_table_association,
            "routeTableId": &vpc.parts.route_table,
            "main": true,
            "associationState": node! { "state": "associated" },
        };
        let node = node! {
            "routeTableId": &vpc.parts.route_table,
            "vpcId": &vpc.id,
            "ownerId": &vpc.account,
            "routeSet": Node::List(routes),
            "associationSet": Node::List(vec![association]),
            "propagatingVgwSet": Node::List(vec![]),
            "tagSet": Node::List(vec![]),
        };
        (vpc.parts.route_table.clone(), node)
    })
}

fn internet_gateways(c: &Context<'_>) -> Answer {
    let kind = ("igw", "InvalidInternetGatewayID", "internetGateway ID");
    parts(c, ("InternetGatewayId", "internetGatewaySet"), kind, |vpc| {
        let node = node! {
            "internetGatewayId": &vpc.parts.internet_gateway,
            "ownerId": &vpc.account,
            "attachmentSet": Node::List(vec![node! { "vpcId": &vpc.id, "state": "available" }]),
            "tagSet": Node::List(vec![]),
        };
        (vpc.parts.internet_gateway.clone(), node)
    })
}

fn network_acls(c: &Context<'_>) -> Answer {
    let subnets = own_subnets(c, &[])?;
    let kind = ("acl", "InvalidNetworkAclID", "networkAcl ID");
    parts(c, ("NetworkAclId", "networkAclSet"), kind, |vpc| {
        let acl = &vpc.parts.network_acl;
        let entry = |egress: bool, allow: bool| {
            node! {
                "ruleNumber": if allow { 100u32 } else { 32_767 },
                "protocol": "-1",
                "ruleAction": if allow { "allow" } else { "deny" },
                "egress": egress,
                "cidrBlock": "0.0.0.0/0",
            }
        };
        let entries = vec![entry(true, true), entry(true, false), entry(false, true), entry(false, false)];
        let associations = Node::list(subnets.iter().filter(|s| s.vpc == vpc.id), |s| {
            let id = s.id.replace("subnet-", "aclassoc-");
            node! { "networkAclAssociationId": id, "networkAclId": acl, "subnetId": &s.id }
        });
        let node = node! {
            "networkAclId": acl,
            "vpcId": &vpc.id,
            "ownerId": &vpc.account,
            "default": true,
            "entrySet": Node::List(entries),
            "associationSet": associations,
            "tagSet": Node::List(vec![]),
        };
        (acl.clone(), node)
    })
}

fn dhcp_options(c: &Context<'_>) -> Answer {
    let domain = format!("{}.internal", c.region.settings().name);
    let kind = ("dopt", "InvalidDhcpOptionID", "dhcpOption ID");
    parts(c, ("DhcpOptionsId", "dhcpOptionsSet"), kind, |vpc| {
        let option = |key: &'static str, value: &str| {
            node! { "key": key, "valueSet": Node::List(vec![node! { "value": value }]) }
        };
        let options =
            vec![option("domain-name", &domain), option("domain-name-servers", "AmazonProvidedDNS")];
        let node = node! {
            "dhcpOptionsId": &vpc.parts.dhcp_options,
            "ownerId": &vpc.account,
            "dhcpConfigurationSet": Node::List(options),
            "tagSet": Node::List(vec![]),
        };
        (vpc.parts.dhcp_options.clone(), node)
    })
}
