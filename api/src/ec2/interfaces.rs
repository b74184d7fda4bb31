//! Network interfaces, as they are made and changed.

use hutch_cloud::model::{Group, Interface};
use hutch_cloud::region::{InterfaceAttribute, NewInterface};

use super::{Answer, Context, Operation, chosen, done, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateNetworkInterface", create),
    ("DeleteNetworkInterface", |c| {
        c.region.delete_interface(c.account, c.params.required("NetworkInterfaceId")?).map(|()| done())
    }),
    ("AttachNetworkInterface", attach),
    ("DetachNetworkInterface", |c| {
        c.region.detach_interface(c.account, c.params.required("AttachmentId")?).map(|()| done())
    }),
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
        "SecondaryPrivateIpAddressCount",
        "ConnectionTrackingSpecification",
    ];
    super::vpcs::refuse(p, &later)?;
    if let Some(kind) = p.str("InterfaceType").filter(|kind| *kind != "interface") {
        return Err(Fault::value("interfaceType", kind, "It is interface."));
    }
    let listed = p.list("PrivateIpAddresses");
    if listed.len() > 1 {
        return Err(Fault::new("UnsupportedOperation", "hutch has one private address an interface yet"));
    }
    let listed = listed.first().map(|one| one.required("PrivateIpAddress")).transpose()?;
    let ip = match (p.str("PrivateIpAddress"), listed) {
        (Some(_), Some(_)) => {
            return Err(Fault::combination("Give PrivateIpAddress or PrivateIpAddresses, not both"));
        }
        (one, other) => one.or(other),
    };
    let ip =
        ip.map(|ip| ip.parse().map_err(|_| Fault::value("privateIpAddress", ip, "It is no IPv4 address.")));
    let token = p.str("ClientToken").filter(|token| !token.is_empty());
    let new = NewInterface {
        subnet: p.required("SubnetId")?.into(),
        description: p.str("Description").unwrap_or_default().into(),
        groups: p.strings("SecurityGroupId"),
        private_ip: ip.transpose()?,
        tags: c.tag_specifications()?.remove("network-interface").unwrap_or_default(),
        client_token: token.map(str::to_owned),
        request: c.digest(),
    };
    let made = c.region.create_interface(c.account, &new)?;
    let told = super::network::tell(c, vec![made])?.into_iter().next();
    Ok(node! { "networkInterface": told.map(|(_, node)| node), "clientToken": token })
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
