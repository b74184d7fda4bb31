//! Security groups and their rules.

use std::collections::BTreeMap;

use hutch_cloud::model::{Group, Peer, Rule};

use super::{Answer, Context, Operation, chosen, done, tag_set};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateSecurityGroup", create),
    ("DeleteSecurityGroup", delete),
    ("DescribeSecurityGroups", describe),
    ("DescribeSecurityGroupRules", describe_rules),
    ("AuthorizeSecurityGroupIngress", |c| authorize(c, false)),
    ("AuthorizeSecurityGroupEgress", |c| authorize(c, true)),
    ("RevokeSecurityGroupIngress", |c| revoke(c, false)),
    ("RevokeSecurityGroupEgress", |c| revoke(c, true)),
    ("ModifySecurityGroupRules", modify),
    ("UpdateSecurityGroupRuleDescriptionsIngress", |c| descriptions(c, false)),
    ("UpdateSecurityGroupRuleDescriptionsEgress", |c| descriptions(c, true)),
];

/// Rules of one protocol and one range of ports are told together.
fn permissions(group: &Group, egress: bool) -> Node {
    let mut together: BTreeMap<(&str, i64, i64), Vec<&Rule>> = BTreeMap::new();
    for rule in group.rules.values().filter(|rule| rule.egress == egress) {
        together.entry((&rule.protocol, rule.from, rule.to)).or_default().push(rule);
    }
    Node::list(together, |((protocol, from, to), rules)| {
        let list = |make: &dyn Fn(&Rule) -> Option<Node>| {
            Node::List(rules.iter().filter_map(|rule| make(rule)).collect())
        };
        let described = |node: Node, rule: &Rule| node.with("description", rule.description.as_ref());
        let ports = protocol != "-1";
        node! {
            "ipProtocol": protocol,
            "fromPort": ports.then_some(from),
            "toPort": ports.then_some(to),
            "groups": list(&|rule| match &rule.peer {
                Peer::Group(id) => Some(described(node! { "groupId": id, "userId": &group.account }, rule)),
                _ => None,
            }),
            "ipRanges": list(&|rule| match &rule.peer {
                Peer::Ipv4(net) => Some(described(node! { "cidrIp": net.to_string() }, rule)),
                _ => None,
            }),
            "ipv6Ranges": list(&|rule| match &rule.peer {
                Peer::Ipv6(net) => Some(described(node! { "cidrIpv6": net.to_string() }, rule)),
                _ => None,
            }),
            "prefixListIds": list(&|rule| match &rule.peer {
                Peer::PrefixList(id) => Some(described(node! { "prefixListId": id }, rule)),
                _ => None,
            }),
        }
    })
}

fn told(c: &Context<'_>, group: &Group) -> Node {
    node! {
        "ownerId": &group.account,
        "groupId": &group.id,
        "groupName": &group.name,
        "groupDescription": &group.description,
        "vpcId": &group.vpc,
        "securityGroupArn": format!("arn:aws:ec2:{}:{}:security-group/{}", c.region.settings().name, group.account, group.id),
        "ipPermissions": permissions(group, false),
        "ipPermissionsEgress": permissions(group, true),
        "tagSet": tag_set(&group.tags),
    }
}

fn rule(group: &Group, id: &str, rule: &Rule) -> Node {
    let referenced = match &rule.peer {
        Peer::Group(other) => Some(node! { "groupId": other, "userId": &group.account, "vpcId": &group.vpc }),
        _ => None,
    };
    node! {
        "securityGroupRuleId": id,
        "groupId": &group.id,
        "groupOwnerId": &group.account,
        "isEgress": rule.egress,
        "ipProtocol": &rule.protocol,
        "fromPort": rule.from,
        "toPort": rule.to,
        "cidrIpv4": match &rule.peer { Peer::Ipv4(net) => Some(net.to_string()), _ => None },
        "cidrIpv6": match &rule.peer { Peer::Ipv6(net) => Some(net.to_string()), _ => None },
        "prefixListId": match &rule.peer { Peer::PrefixList(id) => Some(id), _ => None },
        "referencedGroupInfo": referenced,
        "description": rule.description.as_ref(),
        "tagSet": group.rule_tags.get(id).and_then(tag_set).unwrap_or(Node::List(vec![])),
    }
}

/// What the ports of a protocol may be.
fn ports(protocol: &str, from: Option<i64>, to: Option<i64>) -> Result<(String, i64, i64), Fault> {
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "all" | "-1" => "-1".into(),
        named @ ("tcp" | "udp" | "icmp" | "icmpv6") => named.to_owned(),
        // However it is written: 06 is TCP too, and has ports.
        number => match number.parse::<u8>() {
            Ok(6) => "tcp".into(),
            Ok(17) => "udp".into(),
            Ok(1) => "icmp".into(),
            Ok(58) => "icmpv6".into(),
            Ok(other) => other.to_string(),
            Err(_) => {
                let why = "It is tcp, udp, icmp, icmpv6, a number, or -1.";
                return Err(Fault::value("protocol", number, why));
            }
        },
    };
    let (least, most) = match protocol.as_str() {
        "tcp" | "udp" => (0, 65_535),
        "icmp" | "icmpv6" => (-1, 255),
        // Other protocols have no ports: EC2 takes and forgets them.
        _ => return Ok((protocol, -1, -1)),
    };
    let (Some(from), Some(to)) = (from, to) else {
        if least == -1 {
            return Ok((protocol, from.unwrap_or(-1), to.unwrap_or(-1)));
        }
        return Err(Fault::new(
            "InvalidParameterValue",
            format!("Invalid value 'Must specify both from and to ports with {protocol}.' for portRange."),
        ));
    };
    // A client that means all ports of TCP may say -1.
    if least == 0 && (from, to) == (-1, -1) {
        return Ok((protocol, 0, 65_535));
    }
    if least == -1 {
        for (what, n) in [("type", from), ("code", to)] {
            if !(least..=most).contains(&n) {
                let why =
                    format!("ICMP {what} ({n}) out of range. Types and codes are 0 to 255, or -1 for all.");
                return Err(Fault::new("InvalidParameterValue", why));
            }
        }
        if from == -1 && to != -1 {
            let why = format!("ICMP code ({to}) needs a type. With all types (-1), specify all codes (-1).");
            return Err(Fault::new("InvalidParameterValue", why));
        }
    } else if !(least..=most).contains(&from) || !(least..=most).contains(&to) {
        return Err(Fault::value("portRange", &format!("{from}-{to}"), "Ports are 0 to 65535."));
    }
    if least == 0 && from > to {
        let why = format!("Invalid TCP/UDP port range ({from}:{to})");
        return Err(Fault::new("InvalidParameterValue", why));
    }
    Ok((protocol, from, to))
}

/// An address range, whose host bits are dropped as EC2 does.
fn cidr4(text: &str) -> Result<Peer, Fault> {
    let bad = || Fault::new("InvalidParameterValue", format!("CIDR block {text} is malformed"));
    let net: ipnet::Ipv4Net = text.parse().map_err(|_| bad())?;
    Ok(Peer::Ipv4(net.trunc()))
}

fn cidr6(text: &str) -> Result<Peer, Fault> {
    let bad = || Fault::new("InvalidParameterValue", format!("CIDR block {text} is malformed"));
    let net: ipnet::Ipv6Net = text.parse().map_err(|_| bad())?;
    Ok(Peer::Ipv6(net.trunc()))
}

/// The rules that a call names: `IpPermissions.N`, or the older flat form.
fn asked(c: &Context<'_>, egress: bool) -> Result<Vec<Rule>, Fault> {
    let p = c.params;
    let mut rules = Vec::new();
    let mut add = |at: &Params, peers: Vec<(Peer, Option<String>)>| -> Result<(), Fault> {
        let protocol = at.required("IpProtocol")?;
        let (protocol, from, to) = ports(protocol, at.int("FromPort")?, at.int("ToPort")?)?;
        if peers.is_empty() {
            return Err(Fault::missing("CidrIp"));
        }
        rules.extend(peers.into_iter().map(|(peer, description)| Rule {
            egress,
            protocol: protocol.clone(),
            from,
            to,
            peer,
            description,
        }));
        Ok(())
    };
    for permission in p.list("IpPermissions") {
        add(permission, peers(c, permission)?)?;
    }
    if p.str("IpProtocol").is_some() {
        let mut flat = Vec::new();
        if let Some(net) = p.str("CidrIp") {
            flat.push((cidr4(net)?, None));
        }
        if let Some(name) = p.str("SourceSecurityGroupName") {
            flat.push((Peer::Group(c.region.group_id(c.account, None, Some(name))?), None));
        }
        add(p, flat)?;
    } else if let Some(name) = p.str("SourceSecurityGroupName") {
        // All of every protocol from that group.
        let peer = Peer::Group(c.region.group_id(c.account, None, Some(name))?);
        for (protocol, from, to) in [("tcp", 0, 65_535), ("udp", 0, 65_535), ("icmp", -1, -1)] {
            rules.push(Rule {
                egress,
                protocol: protocol.into(),
                from,
                to,
                peer: peer.clone(),
                description: None,
            });
        }
    }
    Ok(rules)
}

fn peers(c: &Context<'_>, permission: &Params) -> Result<Vec<(Peer, Option<String>)>, Fault> {
    let mut peers = Vec::new();
    let description = |at: &Params| at.str("Description").map(str::to_owned);
    for range in permission.list("IpRanges") {
        peers.push((cidr4(range.required("CidrIp")?)?, description(range)));
    }
    for range in permission.list("Ipv6Ranges") {
        peers.push((cidr6(range.required("CidrIpv6")?)?, description(range)));
    }
    if let Some(list) = permission.list("PrefixListIds").first() {
        let why = format!("The prefix list ID '{}' does not exist", list.required("PrefixListId")?);
        return Err(Fault::new("InvalidPrefixListID.NotFound", why));
    }
    for group in permission.list("Groups") {
        let id = c.region.group_id(c.account, group.str("GroupId"), group.str("GroupName"))?;
        peers.push((Peer::Group(id), description(group)));
    }
    Ok(peers)
}

fn group_id(c: &Context<'_>) -> Result<String, Fault> {
    c.region.group_id(c.account, c.params.str("GroupId"), c.params.str("GroupName"))
}

fn own(c: &Context<'_>, ids: &[String]) -> Result<Vec<Group>, Fault> {
    c.region.ensure_account(c.account)?;
    let mut all = c.region.all::<Group>()?;
    all.retain(|group| group.account == c.account);
    chosen(all, ids, |group| &group.id, ("sg", "InvalidGroup", "security group")).map_err(|fault| match fault
        .code
        .as_ref()
    {
        "InvalidGroup.Malformed" => Fault::new("InvalidGroupId.Malformed", fault.message),
        _ => fault,
    })
}

fn create(c: &Context<'_>) -> Answer {
    let p = c.params;
    let tags = c.tag_specifications()?.remove("security-group").unwrap_or_default();
    let (name, description) = (p.required("GroupName")?, p.required("GroupDescription")?);
    let group = c.region.create_group(c.account, name, description, p.str("VpcId"), &tags)?;
    let arn = format!("arn:aws:ec2:{}:{}:security-group/{}", c.region.settings().name, c.account, group.id);
    Ok(
        node! { "return": true, "groupId": &group.id, "tagSet": tag_set(&group.tags), "securityGroupArn": arn },
    )
}

fn delete(c: &Context<'_>) -> Answer {
    let id = group_id(c)?;
    c.region.delete_group(c.account, &id)?;
    Ok(done().with("groupId", &id))
}

fn describe(c: &Context<'_>) -> Answer {
    let (ids, names) = (c.ids("GroupId"), c.ids("GroupName"));
    let mut groups = own(c, &ids)?;
    let vpc = c.region.default_vpc(c.account);
    for name in &names {
        if !groups.iter().any(|group| group.name == *name && group.vpc == vpc) {
            let why = format!("The security group '{name}' does not exist in default VPC '{vpc}'");
            return Err(Fault::new("InvalidGroup.NotFound", why));
        }
    }
    groups.retain(|group| names.is_empty() || group.vpc == vpc && names.contains(&group.name));
    c.describe(
        "securityGroupInfo",
        groups.iter().map(|group| (group.id.clone(), told(c, group))).collect(),
        &ids,
    )
}

fn describe_rules(c: &Context<'_>) -> Answer {
    let ids = c.ids("SecurityGroupRuleId");
    let groups = own(c, &[])?;
    let all = groups
        .iter()
        .flat_map(|group| group.rules.iter().map(move |(id, told)| (id.clone(), rule(group, id, told))));
    let mut all: Vec<_> = all.collect();
    for id in &ids {
        if !all.iter().any(|(have, _)| have == id) {
            let why = format!("The security group rule ID '{id}' does not exist");
            return Err(Fault::new("InvalidSecurityGroupRuleId.NotFound", why));
        }
    }
    all.retain(|(id, _)| ids.is_empty() || ids.contains(id));
    all.sort_by(|a, b| a.0.cmp(&b.0));
    c.describe("securityGroupRuleSet", all, &ids)
}

fn authorize(c: &Context<'_>, egress: bool) -> Answer {
    let id = group_id(c)?;
    let rules = asked(c, egress)?;
    if rules.is_empty() {
        return Err(Fault::missing("IpPermissions"));
    }
    let tags = c.tag_specifications()?.remove("security-group-rule").unwrap_or_default();
    let added = c.region.authorize(c.account, &id, &rules, &tags)?;
    let group = own(c, &[id])?;
    let told = added.iter().filter_map(|(id, added)| Some(rule(group.first()?, id, added)));
    Ok(done().with("securityGroupRuleSet", Node::List(told.collect())))
}

fn revoke(c: &Context<'_>, egress: bool) -> Answer {
    let id = group_id(c)?;
    let (rules, ids) = (asked(c, egress)?, c.ids("SecurityGroupRuleId"));
    if rules.is_empty() && ids.is_empty() {
        return Err(Fault::missing("IpPermissions"));
    }
    c.region.revoke(c.account, &id, egress, &rules, &ids)?;
    Ok(done())
}

fn modify(c: &Context<'_>) -> Answer {
    let id = group_id(c)?;
    let mut changes = Vec::new();
    for change in c.params.list("SecurityGroupRule") {
        let rule_id = change.required("SecurityGroupRuleId")?.to_owned();
        let at = change.sub("SecurityGroupRule").ok_or_else(|| Fault::missing("SecurityGroupRule"))?;
        let (protocol, from, to) = ports(at.required("IpProtocol")?, at.int("FromPort")?, at.int("ToPort")?)?;
        let peer = match (at.str("CidrIpv4"), at.str("CidrIpv6"), at.str("ReferencedGroupId")) {
            (Some(net), None, None) => cidr4(net)?,
            (None, Some(net), None) => cidr6(net)?,
            (None, None, Some(group)) => Peer::Group(c.region.group_id(c.account, Some(group), None)?),
            _ => {
                return Err(Fault::combination("A rule has one of CidrIpv4, CidrIpv6 and ReferencedGroupId"));
            }
        };
        changes.push((rule_id, protocol, from, to, peer, at.str("Description").map(str::to_owned)));
    }
    c.region.modify_rules(c.account, &id, |rules| {
        for (id, protocol, from, to, peer, description) in &changes {
            let missing = || {
                let why = format!("The security group rule ID '{id}' does not exist");
                Fault::new("InvalidSecurityGroupRuleId.NotFound", why)
            };
            let rule = rules.get_mut(id).ok_or_else(missing)?;
            *rule = Rule {
                egress: rule.egress,
                protocol: protocol.clone(),
                from: *from,
                to: *to,
                peer: peer.clone(),
                description: description.clone(),
            };
        }
        Ok(())
    })?;
    Ok(done())
}

fn descriptions(c: &Context<'_>, egress: bool) -> Answer {
    let id = group_id(c)?;
    let asked = asked(c, egress)?;
    let mut by_id = BTreeMap::new();
    for one in c.params.list("SecurityGroupRuleDescription") {
        let id = one.required("SecurityGroupRuleId")?.to_owned();
        by_id.insert(id, one.str("Description").map(str::to_owned));
    }
    c.region.modify_rules(c.account, &id, |rules| {
        for wanted in &asked {
            let same = |have: &&mut Rule| {
                (have.egress, &have.protocol, have.from, have.to, &have.peer)
                    == (egress, &wanted.protocol, wanted.from, wanted.to, &wanted.peer)
            };
            let missing = || {
                Fault::new(
                    "InvalidPermission.NotFound",
                    "The specified rule does not exist in this security group.",
                )
            };
            rules.values_mut().find(same).ok_or_else(missing)?.description.clone_from(&wanted.description);
        }
        for (id, description) in &by_id {
            let missing = || {
                let why = format!("The security group rule ID '{id}' does not exist");
                Fault::new("InvalidSecurityGroupRuleId.NotFound", why)
            };
            rules.get_mut(id).ok_or_else(missing)?.description.clone_from(description);
        }
        Ok(())
    })?;
    Ok(done())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_protocols() {
        for (protocol, from, to, is) in [
            ("tcp", Some(22), Some(22), Ok(("tcp", 22, 22))),
            ("6", Some(1), Some(2), Ok(("tcp", 1, 2))),
            ("-1", None, None, Ok(("-1", -1, -1))),
            ("icmp", Some(8), Some(-1), Ok(("icmp", 8, -1))),
            ("icmp", None, None, Ok(("icmp", -1, -1))),
            ("icmp", Some(-1), Some(0), Err(())),
            ("icmp", Some(8), Some(256), Err(())),
            ("icmpv6", Some(0), Some(65_535), Err(())),
            ("58", Some(128), Some(0), Ok(("icmpv6", 128, 0))),
            ("50", None, None, Ok(("50", -1, -1))),
            ("tcp", None, None, Err(())),
            ("tcp", Some(2), Some(1), Err(())),
            ("tcp", Some(0), Some(65_536), Err(())),
            ("sctp?", None, None, Err(())),
            ("256", None, None, Err(())),
        ] {
            let got = ports(protocol, from, to).map_err(drop);
            assert_eq!(got.as_ref().map(|(p, f, t)| (p.as_str(), *f, *t)).map_err(|e| *e), is, "{protocol}");
        }
        assert_eq!(cidr4("10.1.2.3/8"), cidr4("10.0.0.0/8"));
        assert!(cidr4("10.0.0.0").is_err() && cidr4("10.0.0.0/33").is_err() && cidr6("::/129").is_err());
    }
}
