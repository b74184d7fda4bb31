//! Network interfaces, as they are made and changed.

use std::net::Ipv4Addr;

use hutch_cloud::model::{Group, Interface};
use hutch_cloud::region::{InterfaceAsk, InterfaceAttribute, NewInterface, Secondary};

use super::{Answer, Context, Operation, chosen, done, time};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateNetworkInterface", create),
    ("DeleteNetworkInterface", |c| {
        c.region.delete_interface(c.account, c.params.required("NetworkInterfaceId")?).map(|()| done())
    }),
    ("AttachNetworkInterface", attach),
    ("DetachNetworkInterface", |c| {
        c.region.detach_interface(c.account, c.params.required("AttachmentId")?).map(|()| done())
    }),
    ("AssignPrivateIpAddresses", assign),
    ("UnassignPrivateIpAddresses", unassign),
    ("ModifyNetworkInterfaceAttribute", modify),
    ("DescribeNetworkInterfaceAttribute", attribute),
];

fn create(c: &Context<'_>) -> Answer {
    let p = c.params;
    let later = [
        "Ipv4Prefix",
        "Ipv4PrefixCount",
        "Ipv6Prefix",
        "Ipv6PrefixCount",
        "Ipv6Addresses",
        "Ipv6AddressCount",
        "EnablePrimaryIpv6",
        "ConnectionTrackingSpecification",
    ];
    super::vpcs::refuse(p, &later)?;
    if let Some(kind) = p.str("InterfaceType").filter(|kind| *kind != "interface") {
        return Err(Fault::value("interfaceType", kind, "It is interface."));
    }
    let (private_ip, more) = addresses(p)?;
    let token = p.str("ClientToken").filter(|token| !token.is_empty());
    let new = NewInterface {
        subnet: p.required("SubnetId")?.into(),
        description: p.str("Description").unwrap_or_default().into(),
        groups: p.strings("SecurityGroupId"),
        private_ip,
        more,
        tags: c.tag_specifications()?.remove("network-interface").unwrap_or_default(),
        client_token: token.map(str::to_owned),
        request: c.digest(),
    };
    let made = c.region.create_interface(c.account, &new)?;
    let told = super::network::tell(c, vec![made])?.into_iter().next();
    Ok(node! { "networkInterface": told.map(|(_, node)| node), "clientToken": token })
}

fn address(ip: &str) -> Result<Ipv4Addr, Fault> {
    ip.parse().map_err(|_| Fault::value("privateIpAddress", ip, "It is no IPv4 address."))
}

/// How many addresses more are asked for.
fn count(p: &Params) -> Result<Option<u32>, Fault> {
    let Some(count) = p.int("SecondaryPrivateIpAddressCount")? else { return Ok(None) };
    let why = "It is a number from 1 on.";
    let bad = || Fault::value("secondaryPrivateIpAddressCount", &count.to_string(), why);
    u32::try_from(count).ok().filter(|count| *count > 0 && *count < 1000).map(Some).ok_or_else(bad)
}

/// The addresses that a new interface is to have: the primary one, and those beside it.
pub(super) fn addresses(p: &Params) -> Result<(Option<Ipv4Addr>, Secondary), Fault> {
    let mut primary = p.str("PrivateIpAddress").filter(|ip| !ip.is_empty()).map(address).transpose()?;
    let (mut ips, mut named) = (Vec::new(), None);
    for one in p.list("PrivateIpAddresses") {
        let ip = address(one.required("PrivateIpAddress")?)?;
        match one.boolean("Primary")? {
            Some(true) if named.is_some() => {
                return Err(Fault::combination("Only one private address is the primary one"));
            }
            Some(true) => named = Some(ip),
            _ => ips.push(ip),
        }
    }
    if primary.is_some() && named.is_some() {
        return Err(Fault::combination(
            "The primary address is PrivateIpAddress or in PrivateIpAddresses, not both",
        ));
    }
    primary = primary.or(named);
    // Where none is said to be it, the first one is.
    if primary.is_none() && !ips.is_empty() {
        primary = Some(ips.remove(0));
    }
    let count = count(p)?;
    if count.is_some() && !ips.is_empty() {
        let why = "Give secondary addresses or how many they are, not both";
        return Err(Fault::combination(why));
    }
    Ok((primary, Secondary { ips, count: count.unwrap_or(0), reassign: false }))
}

/// The interfaces that a launch asks for: the first, and those beside it.
pub(super) fn cards(p: &Params) -> Result<(Option<&Params>, Vec<InterfaceAsk>), Fault> {
    let (mut first, mut others) = (None, Vec::new());
    let listed = p.list("NetworkInterface");
    for (place, one) in listed.iter().enumerate() {
        let of_its_own = [
            "SubnetId",
            "PrivateIpAddress",
            "PrivateIpAddresses",
            "SecondaryPrivateIpAddressCount",
            "Description",
            "SecurityGroupId",
            "AssociatePublicIpAddress",
        ];
        let made_before = one.str("NetworkInterfaceId").map(str::to_owned);
        if made_before.is_some() && of_its_own.iter().any(|name| one.sub(name).is_some()) {
            let why = "A network interface that was made before has its subnet, addresses, groups and description already";
            return Err(Fault::combination(why));
        }
        // A launch template's interfaces may leave it to their order.
        let index = one.int("DeviceIndex")?.unwrap_or(place as i64);
        let bad = || Fault::value("deviceIndex", &index.to_string(), "It is a number from 0 to 31.");
        let index = u32::try_from(index).ok().filter(|index| *index < 32).ok_or_else(bad)?;
        if index == 0 && first.is_none() {
            first = Some(*one);
            continue;
        }
        if one.sub("AssociatePublicIpAddress").is_some() {
            let why = "The associatePublicIPAddress parameter can only be specified for the network interface with DeviceIndex 0.";
            return Err(Fault::combination(why));
        }
        let (private_ip, more) = addresses(one)?;
        others.push(InterfaceAsk {
            index,
            interface: made_before,
            subnet: one.str("SubnetId").map(str::to_owned),
            groups: one.strings("SecurityGroupId"),
            private_ip,
            more,
            description: one.str("Description").unwrap_or_default().into(),
            keep: one.boolean("DeleteOnTermination")?.map(|goes| !goes),
        });
    }
    if first.is_none() && !others.is_empty() {
        return Err(Fault::combination("The first network interface has the device index 0"));
    }
    Ok((first, others))
}

fn assign(c: &Context<'_>) -> Answer {
    let p = c.params;
    super::vpcs::refuse(p, &["Ipv4Prefix", "Ipv4PrefixCount"])?;
    let id = p.required("NetworkInterfaceId")?;
    let ips: Vec<Ipv4Addr> =
        p.strings("PrivateIpAddress").iter().map(|ip| address(ip)).collect::<Result<_, _>>()?;
    let reassign = p.boolean("AllowReassignment")?.unwrap_or(false);
    let count = match (count(p)?, ips.is_empty()) {
        (Some(_), false) => {
            let why = "Give PrivateIpAddress or SecondaryPrivateIpAddressCount, not both";
            return Err(Fault::combination(why));
        }
        (None, true) => return Err(Fault::missing("PrivateIpAddress or SecondaryPrivateIpAddressCount")),
        (count, _) => count.unwrap_or(0),
    };
    let assigned = c.region.assign_addresses(c.account, id, &Secondary { ips, count, reassign })?;
    Ok(done()
        .with("networkInterfaceId", id)
        .with("assignedPrivateIpAddressesSet", Node::list(&assigned, |ip| node! { "privateIpAddress": *ip })))
}

fn unassign(c: &Context<'_>) -> Answer {
    let p = c.params;
    super::vpcs::refuse(p, &["Ipv4Prefix"])?;
    let id = p.required("NetworkInterfaceId")?;
    let ips: Vec<Ipv4Addr> =
        p.strings("PrivateIpAddress").iter().map(|ip| address(ip)).collect::<Result<_, _>>()?;
    if ips.is_empty() {
        return Err(Fault::missing("PrivateIpAddress"));
    }
    c.region.unassign_addresses(c.account, id, &ips).map(|()| done())
}

fn attach(c: &Context<'_>) -> Answer {
    let p = c.params;
    super::vpcs::refuse(p, &["NetworkCardIndex", "EnaSrdSpecification"])?;
    let index = p.int("DeviceIndex")?.ok_or_else(|| Fault::missing("DeviceIndex"))?;
    let bad = || Fault::value("deviceIndex", &index.to_string(), "It is a number from 0 to 31.");
    let number = u32::try_from(index).ok().filter(|index| *index < 32).ok_or_else(bad)?;
    let (id, instance) = (p.required("NetworkInterfaceId")?, p.required("InstanceId")?);
    let attachment = c.region.attach_interface(c.account, id, instance, number)?;
    Ok(node! { "attachmentId": attachment, "networkCardIndex": 0u32 })
}

fn modify(c: &Context<'_>) -> Answer {
    let p = c.params;
    super::vpcs::refuse(
        p,
        &[
            "EnaSrdSpecification",
            "EnablePrimaryIpv6",
            "ConnectionTrackingSpecification",
            "AssociatePublicIpAddress",
        ],
    )?;
    let mut set = Vec::new();
    set.extend(p.str("Description.Value").map(|text| InterfaceAttribute::Description(text.into())));
    set.extend(p.boolean("SourceDestCheck.Value")?.map(InterfaceAttribute::SourceDestCheck));
    let groups = p.strings("SecurityGroupId");
    set.extend((!groups.is_empty()).then_some(InterfaceAttribute::Groups(groups)));
    if let Some(goes) = p.boolean("Attachment.DeleteOnTermination")? {
        let id = p.str("Attachment.AttachmentId").ok_or_else(|| Fault::missing("Attachment.AttachmentId"))?;
        set.push(InterfaceAttribute::DeleteOnTermination(id.into(), goes));
    }
    match set.as_slice() {
        [] => Err(Fault::combination("No attributes specified.")),
        [attribute] => {
            c.region.modify_interface(c.account, p.required("NetworkInterfaceId")?, attribute)?;
            Ok(done())
        }
        _ => Err(Fault::combination("Fields for multiple attribute types specified")),
    }
}

fn attribute(c: &Context<'_>) -> Answer {
    let id = c.params.required("NetworkInterfaceId")?.to_owned();
    let found = c.region.get::<Interface>(&id)?.filter(|e| e.account == c.account);
    let kind = ("eni", "InvalidNetworkInterfaceID", "networkInterface ID");
    let found = chosen(found.into_iter().collect(), std::slice::from_ref(&id), |e| &e.id, kind)?;
    let missing = || Fault::not_found(kind.1, kind.2, &id);
    let e = found.into_iter().next().ok_or_else(missing)?;
    let answer = Node::empty().with("networkInterfaceId", &e.id);
    Ok(match c.params.required("Attribute")? {
        "description" => answer.with("description", node! { "value": &e.description }),
        "sourceDestCheck" => answer.with("sourceDestCheck", node! { "value": e.source_dest_check }),
        "groupSet" => {
            let mut groups = Vec::new();
            for id in &e.groups {
                let name = c.region.get::<Group>(id)?.map(|group| group.name);
                groups.push(node! { "groupId": id, "groupName": name });
            }
            answer.with("groupSet", Node::List(groups))
        }
        "attachment" => answer.with(
            "attachment",
            e.attachment.as_ref().map(|a| {
                node! {
                    "attachmentId": &a.id, "instanceId": &a.instance, "instanceOwnerId": &e.account,
                    "deviceIndex": a.device_index, "networkCardIndex": 0u32, "status": "attached",
                    "attachTime": time(a.attached), "deleteOnTermination": a.delete_on_termination,
                }
            }),
        ),
        other => return Err(Fault::value("attribute", other, "It is no attribute of a network interface.")),
    })
}
