//! Security groups: what their rules say, and the lines of the firewall that say the same.
//!
//! A group is a chain each way, whoever is in it. A rule that names a group follows that group's members by a set. What a
//! rule lets through goes on to `keep_in` or `keep_out`, where the connection is marked, or to `pass_in` or `pass_out`,
//! where it is not if EC2 would not track it: see [`crate::nft`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::name::{GroupId, NameError};
use crate::nft::STRANGER;

/// A security group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its id.
    pub id: GroupId,
    /// What it lets through; everything else is dropped.
    pub rules: Vec<Rule>,
    /// The addresses of its members wherever they are. Of guests of this host only what they were brought up with counts.
    pub members: BTreeSet<IpAddr>,
}

/// A rule of a group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rule {
    /// Whether it is about what members send; else it is about what they are sent.
    pub egress: bool,
    /// What it lets through.
    pub protocol: Protocol,
    /// To whom, or from whom.
    pub peer: Peer,
}

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Everything.
    All,
    /// TCP to these ports, the first and the last.
    Tcp(u16, u16),
    /// UDP to these ports.
    Udp(u16, u16),
    /// ICMP of IPv4: a type and a code, or all.
    Icmp(Option<u8>, Option<u8>),
    /// ICMP of IPv6 likewise.
    Icmpv6(Option<u8>, Option<u8>),
    /// Another protocol of IP, by its number.
    Number(u8),
}

/// Whom a rule is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// These addresses.
    Net(IpNet),
    /// The members of a group.
    Group(GroupId),
}

/// A rule that says nothing a packet could match.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Not a group's id.
    #[error(transparent)]
    Group(#[from] NameError),
    /// The ports are the wrong way round.
    #[error("the port range {0}-{1} ends before it begins")]
    Ports(u16, u16),
    /// A code of all types.
    #[error("an ICMP code goes with a type: with all types, take all codes")]
    Code,
}

impl Rule {
    /// Whether it can be put into the kernel as it is.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), RuleError> {
        match self.protocol {
            Protocol::Tcp(first, last) | Protocol::Udp(first, last) if first > last => {
                Err(RuleError::Ports(first, last))
            }
            Protocol::Icmp(None, Some(_)) | Protocol::Icmpv6(None, Some(_)) => Err(RuleError::Code),
            _ => Ok(()),
        }
    }
}

impl Group {
    /// The group of guests without a daemon: nothing in, everything of IPv4 out.
    pub fn alone() -> Group {
        let peer = Peer::Net(Ipv4Net::default().into());
        let rules = vec![Rule { egress: true, protocol: Protocol::All, peer }];
        Group { id: GroupId::alone(), rules, members: BTreeSet::new() }
    }

    /// A group that lets nothing through.
    pub(crate) fn closed(id: GroupId) -> Group {
        Group { id, rules: Vec::new(), members: BTreeSet::new() }
    }

    /// The groups that its rules name.
    pub(crate) fn named(&self) -> impl Iterator<Item = &GroupId> {
        self.rules.iter().filter_map(|rule| match &rule.peer {
            Peer::Group(id) => Some(id),
            Peer::Net(_) => None,
        })
    }

    /// For which family and protocol one of its rules lets everything through, from or to everyone, on every port.
    pub(crate) fn open(&self, egress: bool) -> BTreeSet<(Family, Transport)> {
        let mut open = BTreeSet::new();
        for rule in self.rules.iter().filter(|rule| rule.egress == egress) {
            let Peer::Net(net) = rule.peer else { continue };
            let family = if net.addr().is_ipv4() { Family::Ip4 } else { Family::Ip6 };
            let transports: &[Transport] = match rule.protocol {
                Protocol::All => &[Transport::Tcp, Transport::Udp],
                Protocol::Tcp(0, u16::MAX) => &[Transport::Tcp],
                Protocol::Udp(0, u16::MAX) => &[Transport::Udp],
                _ => &[],
            };
            if net.prefix_len() == 0 {
                open.extend(transports.iter().map(|transport| (family, *transport)));
            }
        }
        open
    }

    /// The lines of its chain one way, the same for the same rules in whatever order.
    pub(crate) fn lines(&self, egress: bool) -> Vec<String> {
        let mut together: BTreeMap<Protocol, Peers> = BTreeMap::new();
        for rule in self.rules.iter().filter(|rule| rule.egress == egress && rule.check().is_ok()) {
            let peers = together.entry(rule.protocol).or_default();
            match &rule.peer {
                Peer::Net(IpNet::V4(net)) => peers.nets4.push(*net),
                Peer::Net(IpNet::V6(net)) => peers.nets6.push(*net),
                Peer::Group(id) => drop(peers.groups.insert(id)),
            }
        }
        let mut lines = Vec::new();
        for (protocol, peers) in together {
            let nets = (Ipv4Net::aggregate(&peers.nets4), Ipv6Net::aggregate(&peers.nets6));
            let texts = |nets: &[String]| nets.join(", ");
            let four: Vec<_> = nets.0.iter().map(ToString::to_string).collect();
            let six: Vec<_> = nets.1.iter().map(ToString::to_string).collect();
            for (family, nets, any) in [
                (Family::Ip4, texts(&four), nets.0.iter().any(|net| net.prefix_len() == 0)),
                (Family::Ip6, texts(&six), nets.1.iter().any(|net| net.prefix_len() == 0)),
            ] {
                let Some(what) = told(protocol, family) else { continue };
                lines.extend(family.lines(&what, protocol, egress, &nets, any, &peers.groups));
            }
        }
        lines
    }
}

/// Whom rules of one protocol are about.
#[derive(Default)]
struct Peers<'a> {
    nets4: Vec<Ipv4Net>,
    nets6: Vec<Ipv6Net>,
    groups: BTreeSet<&'a GroupId>,
}

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Family {
    Ip4,
    Ip6,
}

/// A protocol whose connections EC2 leaves untracked where all of it may go both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Transport {
    Tcp,
    Udp,
}

impl Family {
    /// What nft calls it beside a protocol.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Family::Ip4 => "ipv4",
            Family::Ip6 => "ipv6",
        }
    }

    fn lines(
        self,
        what: &str,
        protocol: Protocol,
        egress: bool,
        nets: &str,
        any: bool,
        groups: &BTreeSet<&GroupId>,
    ) -> Vec<String> {
        let (way, end) = if egress { ("out", "daddr") } else { ("in", "saddr") };
        let (ip, digit) = if self == Family::Ip4 { ("ip", 4) } else { ("ip6", 6) };
        let line = |from: &str, verdict: &str| {
            let parts = [from, what, "goto"].into_iter().filter(|part| !part.is_empty());
            format!("{} {verdict}_{way}", parts.collect::<Vec<_>>().join(" "))
        };
        if any {
            let untracked = matches!(protocol, Protocol::All | Protocol::Tcp(..) | Protocol::Udp(..));
            let verdict = if untracked { "pass" } else { "keep" };
            // Whoever else is named is of these.
            return vec![line(&format!("meta nfproto {}", self.name()), verdict)];
        }
        let mut lines = Vec::new();
        if !nets.is_empty() {
            let own = format!("ct mark and {STRANGER:#x} == 0 {ip} {end} {{ {nets} }}");
            lines.push(line(&own, "keep"));
        }
        lines.extend(groups.iter().map(|id| line(&format!("{ip} {end} @{id}-{digit}"), "keep")));
        lines
    }
}

impl Transport {
    /// What nft calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }
}

/// What a packet of this family must be; `None`: no packet of it can.
fn told(protocol: Protocol, family: Family) -> Option<String> {
    let ports = |name: &str, first: u16, last: u16| match (first, last) {
        (0, u16::MAX) => format!("meta l4proto {name}"),
        (first, last) if first == last => format!("{name} dport {first}"),
        (first, last) => format!("{name} dport {first}-{last}"),
    };
    let icmp = |name: &str, number: u8, kind: Option<u8>, code: Option<u8>| match (kind, code) {
        (None, _) => format!("meta l4proto {number}"),
        (Some(kind), None) => format!("{name} type {kind}"),
        (Some(kind), Some(code)) => format!("{name} type {kind} {name} code {code}"),
    };
    Some(match (protocol, family) {
        (Protocol::All, _) => String::new(),
        (Protocol::Tcp(first, last), _) => ports("tcp", first, last),
        (Protocol::Udp(first, last), _) => ports("udp", first, last),
        (Protocol::Icmp(kind, code), Family::Ip4) => icmp("icmp", 1, kind, code),
        (Protocol::Icmpv6(kind, code), Family::Ip6) => icmp("icmpv6", 58, kind, code),
        (Protocol::Icmp(..), Family::Ip6) | (Protocol::Icmpv6(..), Family::Ip4) => return None,
        (Protocol::Number(number), _) => format!("meta l4proto {number}"),
    })
}

/// The addresses of a group's members: those of this host's guests that are in it, and of those told the ones that no
/// guest of this host has. So nobody inherits a membership with an address.
pub(crate) fn members(
    told: &BTreeSet<IpAddr>,
    local: impl Fn(IpAddr) -> Option<bool>,
    inside: impl Iterator<Item = IpAddr>,
) -> (BTreeSet<Ipv4Addr>, BTreeSet<Ipv6Addr>) {
    let (mut four, mut six) = (BTreeSet::new(), BTreeSet::new());
    let elsewhere = told.iter().copied().filter(|ip| local(*ip).is_none());
    for ip in elsewhere.chain(inside) {
        match ip {
            IpAddr::V4(ip) => drop(four.insert(ip)),
            IpAddr::V6(ip) => drop(six.insert(ip)),
        }
    }
    (four, six)
}
