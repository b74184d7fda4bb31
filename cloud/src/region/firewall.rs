//! What the host is told of security groups: all of them, whenever one changes or its members do.
//!
//! It is told by one at a time, who reads what is true when it is his turn: nobody tells what was true before. A machine
//! starts when what its groups say has been told.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use hutch_netfw::groups::{Group as Told, Peer as ToldPeer, Protocol, Rule as ToldRule};

use crate::fault::{Fault, Result};
use crate::model::{Group, Interface, Peer, Rule};

use super::Region;

/// What has been told, and who is in which group.
#[derive(Default)]
pub(super) struct Firewall {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The rules of each group as they were told last.
    told: BTreeMap<String, BTreeMap<String, Rule>>,
    /// The addresses and the groups of each interface.
    interfaces: HashMap<String, (Vec<Ipv4Addr>, Vec<String>)>,
}

/// A rule as the host is told it.
///
/// # Errors
/// `InvalidParameterValue`: no packet could be held against it.
pub(super) fn compiled(rule: &Rule) -> Result<ToldRule> {
    let port = |n: i64, all: u16| if n == -1 { Ok(all) } else { u16::try_from(n) };
    let wrong = |why: &str| {
        let range = format!("{}-{}", rule.from, rule.to);
        Fault::value("portRange", &range, why)
    };
    let ports = || -> Result<(u16, u16)> {
        let bad = |_| wrong("Ports are 0 to 65535.");
        Ok((port(rule.from, 0).map_err(bad)?, port(rule.to, u16::MAX).map_err(bad)?))
    };
    let icmp = || -> Result<(Option<u8>, Option<u8>)> {
        let one = |n: i64| if n == -1 { Ok(None) } else { u8::try_from(n).map(Some) };
        let bad = |_| wrong("Types and codes are -1 to 255.");
        Ok((one(rule.from).map_err(bad)?, one(rule.to).map_err(bad)?))
    };
    let protocol = match rule.protocol.as_str() {
        "-1" => Protocol::All,
        "tcp" => ports().map(|(first, last)| Protocol::Tcp(first, last))?,
        "udp" => ports().map(|(first, last)| Protocol::Udp(first, last))?,
        "icmp" => icmp().map(|(kind, code)| Protocol::Icmp(kind, code))?,
        "icmpv6" => icmp().map(|(kind, code)| Protocol::Icmpv6(kind, code))?,
        number => {
            let why = "It is tcp, udp, icmp, icmpv6, a number, or -1.";
            Protocol::Number(number.parse().map_err(|_| Fault::value("protocol", number, why))?)
        }
    };
    let peer = match &rule.peer {
        Peer::Ipv4(net) => ToldPeer::Net(net.trunc().into()),
        Peer::Ipv6(net) => ToldPeer::Net(net.trunc().into()),
        Peer::Group(id) => ToldPeer::Group(id.parse().map_err(Fault::internal)?),
        Peer::PrefixList(id) => {
            let why = format!("The prefix list ID '{id}' does not exist");
            return Err(Fault::new("InvalidPrefixListID.NotFound", why));
        }
    };
    let told = ToldRule { egress: rule.egress, protocol, peer };
    told.check().map_err(|e| wrong(&format!("{e}.")))?;
    Ok(told)
}

impl Region {
    /// Takes note of all interfaces there are.
    pub(super) fn members(&self, interfaces: &[Interface]) {
        let mut firewall = self.firewall.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |one: &Interface| (one.id.clone(), (one.ips().collect(), one.groups.clone()));
        firewall.interfaces = interfaces.iter().map(of).collect();
    }

    /// Takes note of an interface as it is now; whether that means other members of groups.
    pub(super) fn member(&self, id: &str, interface: Option<&Interface>) -> bool {
        let mut firewall = self.firewall.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let now = interface.map(|interface| (interface.ips().collect(), interface.groups.clone()));
        let before = match now.clone() {
            Some(now) => firewall.interfaces.insert(id.to_owned(), now),
            None => firewall.interfaces.remove(id),
        };
        before != now
    }

    /// Tells the host all security groups.
    ///
    /// # Errors
    /// The store's, the host's: then what was told before holds.
    pub(super) fn tell_firewall(&self) -> Result<()> {
        let mut firewall = self.firewall.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let groups = self.all::<Group>()?;
        // Of groups that no rule names nobody asks who is in them.
        let peers =
            groups.iter().flat_map(|group| group.rules.values()).filter_map(|rule| match &rule.peer {
                Peer::Group(id) => Some(id.clone()),
                _ => None,
            });
        let mut members: BTreeMap<String, BTreeSet<IpAddr>> = peers.map(|id| (id, BTreeSet::new())).collect();
        for (ips, groups) in firewall.interfaces.values() {
            for id in groups {
                if let Some(members) = members.get_mut(id) {
                    members.extend(ips.iter().copied().map(IpAddr::from));
                }
            }
        }
        let mut told = Vec::new();
        for group in &groups {
            let mut rules = Vec::new();
            for (id, rule) in &group.rules {
                match compiled(rule) {
                    Ok(rule) => rules.push(rule),
                    Err(error) => tracing::error!(rule = id, %error, "it lets nothing through"),
                }
            }
            let members = members.remove(&group.id).unwrap_or_default();
            told.push(Told { id: group.id.parse().map_err(Fault::internal)?, rules, members });
        }
        self.host.firewall(&told).map_err(Fault::internal)?;
        firewall.told = groups.into_iter().map(|group| (group.id, group.rules)).collect();
        Ok(())
    }

    /// Sees to it that the host has been told what these groups say.
    ///
    /// # Errors
    /// As [`tell_firewall`](Region::tell_firewall).
    pub(super) fn tell_groups(&self, groups: &[Group]) -> Result<()> {
        let firewall = self.firewall.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let told = groups.iter().all(|group| firewall.told.get(&group.id) == Some(&group.rules));
        drop(firewall);
        if told { Ok(()) } else { self.tell_firewall() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_packet_could_match_is_refused() {
        let peer = Peer::Ipv4("10.1.2.3/8".parse().unwrap());
        let rule = |protocol: &str, from, to| Rule {
            egress: false,
            protocol: protocol.into(),
            from,
            to,
            peer: peer.clone(),
            description: None,
        };
        for (protocol, from, to, is) in [
            ("-1", -1, -1, Protocol::All),
            ("tcp", 22, 23, Protocol::Tcp(22, 23)),
            ("udp", -1, -1, Protocol::Udp(0, 65_535)),
            ("icmp", 8, -1, Protocol::Icmp(Some(8), None)),
            ("icmpv6", -1, -1, Protocol::Icmpv6(None, None)),
            ("50", -1, -1, Protocol::Number(50)),
        ] {
            let told = compiled(&rule(protocol, from, to)).unwrap();
            assert_eq!((told.protocol, told.peer), (is, ToldPeer::Net("10.0.0.0/8".parse().unwrap())));
        }
        for (protocol, from, to) in [
            ("tcp", 23, 22),
            ("tcp", 0, 65_536),
            ("udp", -2, 1),
            ("icmp", -1, 0),
            ("icmp", 256, 0),
            ("icmpv6", 1, 65_535),
            ("256", -1, -1),
            ("ip", -1, -1),
        ] {
            let fault = compiled(&rule(protocol, from, to)).unwrap_err();
            assert_eq!(fault.code, "InvalidParameterValue", "{protocol} {from} {to}");
        }
    }
}
