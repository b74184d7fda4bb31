//! What is open to whom, and why: the rules of an instance's security groups in plain words, and what was dropped.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;
use hutch_netfw::{guest, nft};
use serde::Serialize;
use serde_json::Value;

use super::client::{Client, Connection, items, text_of};
use super::{find_one, numbered, param};
use crate::output::{self, Output};

/// What can be asked of the firewall.
#[derive(Subcommand)]
pub enum Firewall {
    /// Tell what is open to whom, by which rule of which group, and how many packets were dropped (as root, on the host).
    Show {
        /// The instance, by id or name.
        instance: String,
        /// How to print.
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        at: Connection,
    },
}

/// A rule, as it is told.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Open {
    /// `in` or `out`.
    way: &'static str,
    /// What may pass.
    what: String,
    /// From whom, or to whom.
    peer: String,
    /// The rule's id.
    rule: String,
    /// The group's id.
    group: String,
    /// The group's name.
    group_name: String,
    /// What its owner says of it.
    description: String,
}

/// An instance's firewall.
#[derive(Debug, Serialize)]
struct Shown {
    instance: String,
    ip: String,
    open: Vec<Open>,
    dropped: Option<Dropped>,
    /// Why it is not known what was dropped.
    dropped_unknown: Option<String>,
}

#[derive(Debug, Serialize)]
struct Dropped {
    inbound: u64,
    outbound: u64,
}

/// `hutch fw`.
pub fn run(command: &Firewall) -> anyhow::Result<ExitCode> {
    let Firewall::Show { instance, output, at } = command;
    let client = Client::new(at)?;
    let found = find_one(&client, instance)?;
    let described = client.call("DescribeInstances", &numbered("InstanceId", [found.id.as_str()]))?;
    let own = items(&described["reservationSet"]).iter().flat_map(|r| items(&r["instancesSet"]));
    let groups: Vec<String> = own
        .flat_map(|instance| items(&instance["groupSet"]))
        .map(|group| text_of(&group["groupId"]).to_owned())
        .collect();
    let open = if groups.is_empty() { Vec::new() } else { open(&client, &groups)? };
    let (dropped, dropped_unknown) = match dropped(&found.ip) {
        _ if found.state != "running" => (None, Some(format!("it is {}", found.state))),
        Ok(dropped) => (Some(dropped), None),
        Err(why) => (None, Some(format!("{why}; ask as root, on the host of the instance"))),
    };
    let shown = Shown { instance: found.id, ip: found.ip, open, dropped, dropped_unknown };
    match output {
        Output::Json | Output::Yaml => output::record(*output, &shown)?,
        _ => print!("{}", words(&shown)),
    }
    Ok(ExitCode::SUCCESS)
}

/// The rules of these groups.
fn open(client: &Client, groups: &[String]) -> anyhow::Result<Vec<Open>> {
    let all = client.all("DescribeSecurityGroups", &[], "securityGroupInfo")?;
    let name =
        |group: &Value| (text_of(&group["groupId"]).to_owned(), text_of(&group["groupName"]).to_owned());
    let names: BTreeMap<String, String> = all.iter().map(name).collect();
    let mut filter = vec![param("Filter.1.Name", "group-id")];
    filter.extend(numbered("Filter.1.Value", groups.iter().map(String::as_str)));
    let rules = client.all("DescribeSecurityGroupRules", &filter, "securityGroupRuleSet")?;
    let mut open: Vec<Open> = rules.iter().map(|rule| told(rule, &names)).collect();
    open.sort_by(|a, b| (a.way, &a.group, &a.what, &a.rule).cmp(&(b.way, &b.group, &b.what, &b.rule)));
    Ok(open)
}

fn told(rule: &Value, names: &BTreeMap<String, String>) -> Open {
    let text = |name: &str| text_of(&rule[name]).to_owned();
    let egress = text_of(&rule["isEgress"]) == "true";
    let called = |id: &str| names.get(id).cloned().unwrap_or_default();
    let referenced = text_of(&rule["referencedGroupInfo"]["groupId"]);
    let peer = match (text("cidrIpv4"), text("cidrIpv6")) {
        (four, _) if four == "0.0.0.0/0" => "everyone (0.0.0.0/0)".into(),
        (_, six) if six == "::/0" => "everyone by IPv6 (::/0)".into(),
        (four, six) if four.is_empty() && six.is_empty() => {
            format!("members of {} ({referenced})", called(referenced))
        }
        (four, six) => four + &six,
    };
    let group = text("groupId");
    Open {
        way: if egress { "out" } else { "in" },
        what: what(text_of(&rule["ipProtocol"]), text_of(&rule["fromPort"]), text_of(&rule["toPort"])),
        peer,
        rule: text("securityGroupRuleId"),
        group_name: called(&group),
        group,
        description: text("description"),
    }
}

/// A protocol and its ports, or type and code, in words.
fn what(protocol: &str, from: &str, to: &str) -> String {
    match (protocol, from, to) {
        ("-1", ..) => "everything".into(),
        ("tcp" | "udp", "0", "65535") => format!("all {}", protocol.to_uppercase()),
        ("tcp" | "udp", from, to) if from == to => format!("{} port {from}", protocol.to_uppercase()),
        ("tcp" | "udp", from, to) => format!("{} ports {from} to {to}", protocol.to_uppercase()),
        ("icmp" | "icmpv6", "-1", _) => format!("all {}", protocol.to_uppercase()),
        ("icmp" | "icmpv6", kind, "-1") => format!("{} type {kind}", protocol.to_uppercase()),
        ("icmp" | "icmpv6", kind, code) => format!("{} type {kind} code {code}", protocol.to_uppercase()),
        (number, ..) => format!("IP protocol {number}"),
    }
}

/// What the guest of an address was refused, as this host's kernel counts it.
fn dropped(ip: &str) -> anyhow::Result<Dropped> {
    let refused = nft::refused(&guest::tap_of(ip.parse()?)?)?;
    Ok(Dropped { inbound: refused.inbound, outbound: refused.outbound })
}

fn words(shown: &Shown) -> String {
    let mut text = format!("{} at {}\n", shown.instance, shown.ip);
    for (way, told, who) in [("in", "It is sent", "from"), ("out", "It sends", "to")] {
        let open: Vec<_> = shown.open.iter().filter(|open| open.way == way).collect();
        if open.is_empty() {
            text += &format!("{told} nothing but answers.\n");
            continue;
        }
        text += &format!("{told}, beside answers:\n");
        for open in open {
            let note = if open.description.is_empty() {
                String::new()
            } else {
                format!(" \"{}\"", open.description)
            };
            text += &format!(
                "  {} {who} {}: rule {}{note} of {} ({})\n",
                open.what, open.peer, open.rule, open.group_name, open.group
            );
        }
    }
    text += "Its host reaches TCP port 22 always.\n";
    text += &match (&shown.dropped, &shown.dropped_unknown) {
        (Some(dropped), _) => format!(
            "Dropped since it was brought up: {} packets to it, {} from it.\n",
            dropped.inbound, dropped.outbound
        ),
        (None, why) => {
            format!("How many packets were dropped is not known: {}.\n", why.as_deref().unwrap_or(""))
        }
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_are_words() {
        for (protocol, from, to, is) in [
            ("-1", "-1", "-1", "everything"),
            ("tcp", "22", "22", "TCP port 22"),
            ("udp", "0", "65535", "all UDP"),
            ("tcp", "80", "90", "TCP ports 80 to 90"),
            ("icmp", "-1", "-1", "all ICMP"),
            ("icmpv6", "128", "-1", "ICMPV6 type 128"),
            ("icmp", "3", "4", "ICMP type 3 code 4"),
            ("47", "-1", "-1", "IP protocol 47"),
        ] {
            assert_eq!(what(protocol, from, to), is);
        }
        let names = [("sg-1".to_owned(), "bastion".to_owned())].into();
        let rule = json!({"isEgress": "false", "ipProtocol": "tcp", "fromPort": "22", "toPort": "22",
            "securityGroupRuleId": "sgr-1", "groupId": "sg-2", "referencedGroupInfo": {"groupId": "sg-1"}});
        assert_eq!(told(&rule, &names).peer, "members of bastion (sg-1)");
    }
}
