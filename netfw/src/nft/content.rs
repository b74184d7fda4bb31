//! What is in the tables beside the constant rules: guests, as elements, and groups, as chains and sets of members. It is
//! written whole, or as the difference to what is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::Ipv4Net;

use super::{Guest, Listing, Ruleset, SETS, fnv};
use crate::groups::{Family, Group, Transport, members};
use crate::name::GroupId;

/// A set's table and name.
type Set = (&'static str, String);

/// Chains with their lines, sets of members with their types, and the elements of all sets and maps, with what a map's lead to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Content {
    chains: BTreeMap<String, Vec<String>>,
    sets: BTreeMap<String, &'static str>,
    elements: BTreeMap<Set, BTreeMap<String, String>>,
}

impl Content {
    /// Nothing but what is always there.
    pub(super) fn empty() -> Content {
        let sets = SETS.iter().map(|(family, _, set, _)| ((*family, (*set).to_owned()), BTreeMap::new()));
        Content { elements: sets.collect(), ..Content::default() }
    }

    pub(super) fn of(rules: &Ruleset) -> Content {
        let mut content = Content::empty();
        let alone = Group::alone();
        let mut groups: BTreeMap<&GroupId, &Group> = [(&alone.id, &alone)].into();
        groups.extend(rules.groups.iter().map(|group| (&group.id, group)));
        // Only what a guest here is in has to be there.
        let used: BTreeSet<&GroupId> = rules.guests.iter().flat_map(|guest| &guest.groups).collect();
        let mut named = BTreeSet::new();
        for id in used {
            let closed = Group::closed(id.clone());
            let group = groups.get(id).copied().unwrap_or(&closed);
            for (egress, way) in WAYS {
                content.chains.insert(format!("{id}-{way}"), group.lines(egress));
            }
            named.extend(group.named().cloned());
        }
        for id in named {
            content.members(&id, groups.get(&id).copied(), rules);
        }
        for guest in &rules.guests {
            content.guest(guest, &groups);
        }
        content
    }

    /// The sets of a group's members.
    fn members(&mut self, id: &GroupId, group: Option<&Group>, rules: &Ruleset) {
        let ips = |guest: &Guest| -> Vec<IpAddr> {
            guest.ips().map(IpAddr::V4).chain(guest.ip6.map(IpAddr::V6)).collect()
        };
        let inside = |guest: &Guest| guest.groups.contains(id);
        let local: BTreeMap<IpAddr, bool> = rules
            .guests
            .iter()
            .flat_map(|guest| ips(guest).into_iter().map(move |ip| (ip, inside(guest))))
            .collect();
        let told = group.map(|group| group.members.clone()).unwrap_or_default();
        let own = local.iter().filter(|(_, inside)| **inside).map(|(ip, _)| *ip);
        let (four, six) = members(&told, |ip| local.get(&ip).copied(), own);
        for (digit, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            self.sets.insert(format!("{id}-{digit}"), kind);
        }
        let text = |ip: String| (ip, String::new());
        self.elements
            .insert(("inet", format!("{id}-4")), four.iter().map(|ip| text(ip.to_string())).collect());
        self.elements
            .insert(("inet", format!("{id}-6")), six.iter().map(|ip| text(ip.to_string())).collect());
    }

    /// What lets a guest speak and be spoken to.
    fn guest(&mut self, guest: &Guest, groups: &BTreeMap<&GroupId, &Group>) {
        let Guest { tap, mac, ip6, gateway, network, .. } = guest;
        let mut element = |family, set: &str, element: String| {
            self.elements.entry((family, set.into())).or_default().insert(element, String::new());
        };
        element("inet", "macs", format!("\"{tap}\" . {mac}"));
        for ip in guest.ips() {
            element("inet", "from4", format!("\"{tap}\" . {mac} . {ip}"));
            element("inet", "to4", format!("\"{tap}\" . {ip}"));
            element("arp", "senders", format!("\"{tap}\" . {mac} . {mac} . {ip}"));
        }
        element("inet", "gateways", format!("\"{tap}\" . {gateway}"));
        element("arp", "senders", format!("\"{tap}\" . {mac} . {mac} . 0.0.0.0"));
        if let Some(ip6) = ip6 {
            element("inet", "from6", format!("\"{tap}\" . {mac} . {ip6}"));
            element("inet", "to6", format!("\"{tap}\" . {ip6}"));
        }
        element("inet", "inside", format!("\"{tap}\" . {}", network.cidr));
        // Of ranges that overlap the kernel takes none.
        for route in Ipv4Net::aggregate(&network.routes) {
            element("inet", "routes", format!("\"{tap}\" . {route}"));
        }
        let (wall, taps) = (format!("{}-wall", network.id), format!("{}-taps", network.id));
        element("inet", &taps, format!("\"{tap}\""));
        let own: BTreeSet<&GroupId> = guest.groups.iter().collect();
        for (egress, way) in WAYS {
            element("inet", &format!("refused_{way}"), format!("\"{tap}\""));
            // A connection is tracked but where all of it may go the other way.
            let back: BTreeSet<(Family, Transport)> =
                own.iter().filter_map(|id| groups.get(id)).flat_map(|group| group.open(!egress)).collect();
            for (family, transport) in back {
                let element_of = format!("\"{tap}\" . {} . {}", family.name(), transport.name());
                element("inet", &format!("untracked_{way}"), element_of);
            }
        }
        let walls = self.elements.entry(("inet", "walls".into())).or_default();
        walls.insert(format!("\"{tap}\""), format!("goto {wall}"));
        let lines = [
            format!("oifname @{taps} return"),
            "ct status dnat goto stranger".into(),
            "counter name walled goto refused_out".into(),
        ];
        self.chains.insert(wall, lines.into());
        self.sets.insert(taps, "ifname");
        for (_, way) in WAYS {
            let chain = match own.iter().collect::<Vec<_>>().as_slice() {
                [] => continue,
                [one] => format!("{one}-{way}"),
                many => {
                    let lines: Vec<_> = many.iter().map(|id| format!("jump {id}-{way}")).collect();
                    // An underscore is in no group's id.
                    let name = format!("c_{:016x}-{way}", fnv(&lines.join(" ")));
                    self.chains.insert(name.clone(), lines);
                    name
                }
            };
            let map = self.elements.entry(("inet", format!("groups_{way}"))).or_default();
            map.insert(format!("\"{tap}\""), format!("jump {chain}"));
        }
    }

    /// What makes its sets be there and have nothing in them, also where nobody could tell what is there.
    pub(super) fn empty_sets(&self) -> String {
        let set = |(set, kind): (&String, &_)| {
            format!("add set inet hutch {set} {{ type {kind}; }}\nflush set inet hutch {set}\n")
        };
        self.sets.iter().map(set).collect()
    }

    /// What makes this of `before`, in an order in which nothing is missing that is referred to, nor goes that is.
    pub(super) fn change(&self, before: &Content) -> String {
        let mut text = String::new();
        let missing = Default::default();
        let added = |name: &&String| !before.chains.contains_key(*name);
        // Writing to a String cannot fail.
        for (set, kind) in self.sets.iter().filter(|(set, _)| !before.sets.contains_key(*set)) {
            let _ = writeln!(text, "add set inet hutch {set} {{ type {kind}; }}");
        }
        for chain in self.chains.keys().filter(added) {
            let _ = writeln!(text, "add chain inet hutch {chain}");
        }
        for (set, elements) in &self.elements {
            let had = before.elements.get(set).unwrap_or(&missing);
            let gone = had.iter().filter(|(key, verdict)| elements.get(*key) != Some(*verdict));
            write_elements(&mut text, "delete", set, gone.map(|(key, _)| key.clone()));
        }
        let changed = |name: &String| before.chains.get(name) != self.chains.get(name);
        for chain in before.chains.keys().filter(|name| changed(name)) {
            let _ = writeln!(text, "flush chain inet hutch {chain}");
        }
        for (chain, lines) in self.chains.iter().filter(|(name, _)| changed(name)) {
            for line in lines {
                let _ = writeln!(text, "add rule inet hutch {chain} {line}");
            }
        }
        for (set, elements) in &self.elements {
            let had = before.elements.get(set).unwrap_or(&missing);
            let new = elements.iter().filter(|(key, verdict)| had.get(*key) != Some(*verdict));
            let told = |(key, verdict): (&String, &String)| match verdict.is_empty() {
                true => key.clone(),
                false => format!("{key} : {verdict}"),
            };
            write_elements(&mut text, "add", set, new.map(told));
        }
        for chain in before.chains.keys().filter(|name| !self.chains.contains_key(*name)) {
            let _ = writeln!(text, "delete chain inet hutch {chain}");
        }
        for set in before.sets.keys().filter(|set| !self.sets.contains_key(*set)) {
            let _ = writeln!(text, "delete set inet hutch {set}");
        }
        text
    }

    /// What empties the sets of groups that are there, and takes away what is not wanted. Nothing refers to it: the tables
    /// are flushed.
    pub(super) fn forget_others(&self, present: &Listing) -> String {
        let mut text = String::new();
        for (kind, name) in present.of_groups() {
            let verb = match (self.chains.contains_key(name), self.sets.contains_key(name)) {
                (true, _) => continue,
                (_, true) => "flush",
                _ => "delete",
            };
            let _ = writeln!(text, "{verb} {kind} inet hutch {name}");
        }
        text
    }

    /// Adds how many rules each chain has, and how many elements each set.
    pub(super) fn count(&self, counts: &mut BTreeMap<String, usize>) {
        for (chain, lines) in &self.chains {
            counts.insert(format!("inet chain {chain}"), lines.len());
        }
        for ((family, set), elements) in &self.elements {
            counts.insert(format!("{family} set {set}"), elements.len());
        }
    }
}

/// Each way: whether it is out, and what it is called.
const WAYS: [(bool, &str); 2] = [(false, "in"), (true, "out")];

fn write_elements(text: &mut String, verb: &str, set: &Set, elements: impl Iterator<Item = String>) {
    let elements: Vec<_> = elements.collect();
    if !elements.is_empty() {
        let _ = writeln!(text, "{verb} element {} hutch {} {{ {} }}", set.0, set.1, elements.join(", "));
    }
}
