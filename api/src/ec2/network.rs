//! Network interfaces, as they are told.

use std::collections::BTreeMap;

use hutch_cloud::model::{Group, Interface};
use hutch_cloud::region::metadata::{private_name, public_name, zone_id};

use super::{Answer, Context, Operation, chosen, tag_set, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[("DescribeNetworkInterfaces", interfaces)];

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
    let one = |ip| {
        node! {
            "privateIpAddress": ip,
            "privateDnsName": private_name(c.region, ip),
            "primary": ip == e.ip,
            "association": association(c, e).filter(|_| ip == e.ip),
        }
    };
    Node::List(e.ips().map(one).collect())
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
    c.describe("networkInterfaceSet", tell(c, found)?, &ids)
}

/// Interfaces, by their ids.
pub(super) fn tell(c: &Context<'_>, found: Vec<Interface>) -> Result<Vec<(String, Node)>, Fault> {
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
    Ok(told.collect())
}
