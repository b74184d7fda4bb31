//! Internet gateways, route tables, and what else comes with a network.

use hutch_cloud::model::{Gateway, Interface, RouteTable, Target, Vpc};
use hutch_cloud::region::RouteChange;
use ipnet::Ipv4Net;

use super::vpcs::{cidr, own_subnets, own_vpcs};
use super::{Answer, Context, Operation, chosen, done, tag_set};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeInternetGateways", gateways),
    ("CreateInternetGateway", create_gateway),
    ("DeleteInternetGateway", |c| {
        c.region.delete_gateway(c.account, c.params.required("InternetGatewayId")?).map(|()| done())
    }),
    ("AttachInternetGateway", |c| {
        let (gateway, vpc) = (c.params.required("InternetGatewayId")?, c.params.required("VpcId")?);
        c.region.attach_gateway(c.account, gateway, vpc).map(|()| done())
    }),
    ("DetachInternetGateway", |c| {
        let (gateway, vpc) = (c.params.required("InternetGatewayId")?, c.params.required("VpcId")?);
        c.region.detach_gateway(c.account, gateway, vpc).map(|()| done())
    }),
    ("DescribeRouteTables", tables),
    ("CreateRouteTable", create_table),
    ("DeleteRouteTable", |c| {
        c.region.delete_route_table(c.account, c.params.required("RouteTableId")?).map(|()| done())
    }),
    ("AssociateRouteTable", associate),
    ("DisassociateRouteTable", |c| {
        c.region.disassociate_route_table(c.account, c.params.required("AssociationId")?).map(|()| done())
    }),
    ("ReplaceRouteTableAssociation", replace_association),
    ("CreateRoute", |c| route(c, RouteChange::Create)),
    ("ReplaceRoute", |c| route(c, RouteChange::Replace)),
    ("DeleteRoute", delete_route),
    ("DescribeNetworkAcls", network_acls),
    ("DescribeDhcpOptions", dhcp_options),
];

fn gateway(gateway: &Gateway) -> Node {
    node! {
        "internetGatewayId": &gateway.id,
        "ownerId": &gateway.account,
        "attachmentSet": Node::list(&gateway.vpc, |vpc| node! { "vpcId": vpc, "state": "available" }),
        "tagSet": tag_set(&gateway.tags).unwrap_or(Node::List(vec![])),
    }
}

fn own_gateways(c: &Context<'_>, ids: &[String]) -> Result<Vec<Gateway>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Gateway>()?;
    all.retain(|gateway| gateway.account == c.account);
    chosen(all, ids, |gateway| &gateway.id, ("igw", "InvalidInternetGatewayID", "internetGateway ID"))
}

fn gateways(c: &Context<'_>) -> Answer {
    let ids = c.ids("InternetGatewayId");
    let told = own_gateways(c, &ids)?.into_iter().map(|one| (one.id.clone(), gateway(&one)));
    c.describe("internetGatewaySet", told.collect(), &ids)
}

fn create_gateway(c: &Context<'_>) -> Answer {
    let tags = c.tag_specifications()?.remove("internet-gateway").unwrap_or_default();
    Ok(node! { "internetGateway": gateway(&c.region.create_gateway(c.account, &tags)?) })
}

/// A route table, of this network.
fn table(c: &Context<'_>, vpc: &Vpc, table: &RouteTable) -> Result<Node, Fault> {
    let mut routes = vec![
        node! { "destinationCidrBlock": vpc.cidr, "gatewayId": "local", "origin": "CreateRouteTable", "state": "active" },
    ];
    for (destination, target) in &table.routes {
        let node = node! { "destinationCidrBlock": *destination };
        let (node, leads) = match target {
            Target::Gateway(id) => {
                let gateway = c.region.get::<Gateway>(id)?;
                (node.with("gatewayId", id), gateway.is_some_and(|g| g.vpc.as_ref() == Some(&vpc.id)))
            }
            Target::Interface(id) => {
                let attachment = c.region.get::<Interface>(id)?.and_then(|interface| interface.attachment);
                let instance = attachment.as_ref().map(|attachment| &attachment.instance);
                let node = node
                    .with("instanceId", instance)
                    .with("instanceOwnerId", instance.map(|_| &table.account))
                    .with("networkInterfaceId", id);
                (node, attachment.is_some())
            }
        };
        let state = if leads { "active" } else { "blackhole" };
        routes.push(node.with("origin", "CreateRoute").with("state", state));
    }
    let associations = Node::list(&table.associations, |(id, subnet)| {
        node! {
            "routeTableAssociationId": id,
            "routeTableId": &table.id,
            "subnetId": subnet.as_ref(),
            "main": subnet.is_none(),
            "associationState": node! { "state": "associated" },
        }
    });
    Ok(node! {
        "routeTableId": &table.id,
        "vpcId": &table.vpc,
        "ownerId": &table.account,
        "routeSet": Node::List(routes),
        "associationSet": associations,
        "propagatingVgwSet": Node::List(vec![]),
        "tagSet": tag_set(&table.tags).unwrap_or(Node::List(vec![])),
    })
}

fn tables(c: &Context<'_>) -> Answer {
    let ids = c.ids("RouteTableId");
    let vpcs = own_vpcs(c, &[])?;
    let mut all = c.region.all::<RouteTable>()?;
    all.retain(|table| table.account == c.account);
    let found = chosen(all, &ids, |table| &table.id, ("rtb", "InvalidRouteTableID", "routeTable ID"))?;
    let mut told = Vec::new();
    for one in &found {
        if let Some(vpc) = vpcs.iter().find(|vpc| vpc.id == one.vpc) {
            told.push((one.id.clone(), table(c, vpc, one)?));
        }
    }
    c.describe("routeTableSet", told, &ids)
}

fn create_table(c: &Context<'_>) -> Answer {
    let id = c.params.required("VpcId")?;
    let tags = c.tag_specifications()?.remove("route-table").unwrap_or_default();
    let token = c.params.str("ClientToken").filter(|token| !token.is_empty());
    let made = c.region.create_route_table(c.account, id, &tags, (token, &c.digest()))?;
    let vpc = own_vpcs(c, &[id.to_owned()])?.into_iter().next();
    let vpc = vpc.ok_or_else(|| Fault::not_found("InvalidVpcID", "vpc ID", id))?;
    Ok(node! { "routeTable": table(c, &vpc, &made)?, "clientToken": token })
}

fn associate(c: &Context<'_>) -> Answer {
    if c.params.sub("GatewayId").is_some() {
        let why = "hutch associates route tables with subnets, not with gateways yet";
        return Err(Fault::new("UnsupportedOperation", why));
    }
    let (table, subnet) = (c.params.required("RouteTableId")?, c.params.required("SubnetId")?);
    let id = c.region.associate_route_table(c.account, table, subnet)?;
    Ok(node! { "associationId": id, "associationState": node! { "state": "associated" } })
}

fn replace_association(c: &Context<'_>) -> Answer {
    let (id, table) = (c.params.required("AssociationId")?, c.params.required("RouteTableId")?);
    let id = c.region.replace_association(c.account, id, table)?;
    Ok(node! { "newAssociationId": id, "associationState": node! { "state": "associated" } })
}

/// The destination of a route, whose host bits are dropped as EC2 does.
fn destination(c: &Context<'_>) -> Result<Ipv4Net, Fault> {
    let other = ["DestinationIpv6CidrBlock", "DestinationPrefixListId"];
    if let Some(name) = other.iter().find(|name| c.params.sub(name).is_some()) {
        return Err(Fault::new(
            "UnsupportedOperation",
            format!("hutch routes IPv4: it does not have {name}"),
        ));
    }
    Ok(cidr(c.params, "DestinationCidrBlock")?.trunc())
}

/// The interface of an instance that packets are routed to: it has to have one only.
fn interface_of(c: &Context<'_>, id: &str) -> Result<String, Fault> {
    let instance = c.region.get::<hutch_cloud::model::Instance>(id)?;
    let instance = instance.filter(|instance| instance.account == c.account);
    let instance = instance.ok_or_else(|| Fault::not_found("InvalidInstanceID", "instance ID", id))?;
    match instance.interfaces.as_slice() {
        [one] => Ok(one.clone()),
        _ => {
            let why = format!(
                "There are multiple interfaces attached to instance '{id}', or none. Please specify an interface ID for the operation instead."
            );
            Err(Fault::new("InvalidInstanceID", why))
        }
    }
}

fn route(c: &Context<'_>, change: RouteChange) -> Answer {
    let p = c.params;
    let destination = destination(c)?;
    let later = [
        "EgressOnlyInternetGatewayId",
        "NatGatewayId",
        "TransitGatewayId",
        "LocalGatewayId",
        "CarrierGatewayId",
        "CoreNetworkArn",
        "VpcPeeringConnectionId",
        "VpcEndpointId",
        "LocalTarget",
    ];
    super::vpcs::refuse(p, &later)?;
    let target = match (p.str("GatewayId"), p.str("InstanceId"), p.str("NetworkInterfaceId")) {
        (Some(gateway), None, None) => Target::Gateway(gateway.into()),
        (None, Some(instance), None) => Target::Interface(interface_of(c, instance)?),
        (None, None, Some(interface)) => Target::Interface(interface.into()),
        (None, None, None) => return Err(Fault::missing("GatewayId")),
        _ => return Err(Fault::combination("A route has one target only")),
    };
    c.region.route(c.account, p.required("RouteTableId")?, destination, &target, change)?;
    Ok(done())
}

fn delete_route(c: &Context<'_>) -> Answer {
    c.region.delete_route(c.account, c.params.required("RouteTableId")?, destination(c)?)?;
    Ok(done())
}

fn network_acls(c: &Context<'_>) -> Answer {
    let ids = c.ids("NetworkAclId");
    let subnets = own_subnets(c, &[])?;
    let vpcs = own_vpcs(c, &[])?;
    let kind = ("acl", "InvalidNetworkAclID", "networkAcl ID");
    let told = chosen(vpcs, &ids, |vpc| &vpc.parts.network_acl, kind)?.into_iter().map(|vpc| {
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
    });
    c.describe("networkAclSet", told.collect(), &ids)
}

fn dhcp_options(c: &Context<'_>) -> Answer {
    let ids = c.ids("DhcpOptionsId");
    let domain = format!("{}.internal", c.region.settings().name);
    // One set, which all networks of the account have.
    let all = vec![c.region.dhcp_options(c.account)];
    let kind = ("dopt", "InvalidDhcpOptionID", "dhcpOption ID");
    let told = chosen(all, &ids, |id| id, kind)?.into_iter().map(|id| {
        let option = |key: &'static str, value: &str| {
            node! { "key": key, "valueSet": Node::List(vec![node! { "value": value }]) }
        };
        let options =
            vec![option("domain-name", &domain), option("domain-name-servers", "AmazonProvidedDNS")];
        let node = node! {
            "dhcpOptionsId": &id,
            "ownerId": c.account,
            "dhcpConfigurationSet": Node::List(options),
            "tagSet": Node::List(vec![]),
        };
        (id, node)
    });
    c.describe("dhcpOptionsSet", told.collect(), &ids)
}
