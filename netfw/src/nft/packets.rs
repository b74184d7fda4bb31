//! Real packets through the kernel: what security groups let through is what a model of them says, and nothing else.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::wire::{ACK, End, FAR, Packet, SYN, Wire, forget_connections, in_namespace};
use super::*;
use crate::groups::{Peer, Protocol, Rule};

use End::{Guest as G, World};

fn id(name: &str) -> GroupId {
    name.parse().unwrap()
}

fn net(text: &str) -> Peer {
    Peer::Net(text.parse().unwrap())
}

fn of(name: &str) -> Peer {
    Peer::Group(id(name))
}

fn rule(egress: bool, protocol: Protocol, peer: Peer) -> Rule {
    Rule { egress, protocol, peer }
}

fn group(name: &str, rules: Vec<Rule>) -> Group {
    Group { id: id(name), rules, members: BTreeSet::new() }
}

fn all_out() -> Vec<Rule> {
    vec![rule(true, Protocol::All, net("0.0.0.0/0")), rule(true, Protocol::All, net("::/0"))]
}

/// Lets all out, and in what the rules say.
fn web(rules: Vec<Rule>) -> Group {
    group("sg-web", [all_out(), rules].concat())
}

fn put(rules: &Ruleset) {
    apply(&rules.render(&listing().unwrap())).unwrap();
    assert!(rules.is_there(&listing().unwrap()), "{:?}", listing().unwrap());
}

/// Changes what is there, by the difference.
fn change(before: &Ruleset, after: &Ruleset) {
    apply(&after.change(before).unwrap()).unwrap();
    assert!(after.is_there(&listing().unwrap()), "{:?}", listing().unwrap());
}

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;

#[test]
fn each_protocol_either_way_in_either_family() {
    in_namespace(|| {
        let mut wire = Wire::new(2);
        wire.guests[0].groups = vec![id("sg-web")];
        wire.guests[1].groups = vec![id("sg-out")];
        let out = group("sg-out", all_out());
        let everyone = ["0.0.0.0/0", "::/0"];
        // What a rule lets through, and what is nearest to it that it does not.
        type What = (u8, (u16, u16));
        let cases: [(Protocol, &[What], &[What]); 10] = [
            (
                Protocol::Tcp(80, 80),
                &[(TCP, (999, 80))],
                &[(TCP, (80, 81)), (UDP, (999, 80)), (ICMP, (8, 0))],
            ),
            (
                Protocol::Tcp(1000, 2000),
                &[(TCP, (1, 1000)), (TCP, (1, 2000))],
                &[(TCP, (1, 999)), (TCP, (1, 2001))],
            ),
            (Protocol::Udp(53, 53), &[(UDP, (53, 53))], &[(UDP, (53, 54)), (TCP, (9, 53))]),
            (Protocol::Udp(0, 65_535), &[(UDP, (1, 1)), (UDP, (1, 65_535))], &[(TCP, (1, 1))]),
            (Protocol::Icmp(None, None), &[(ICMP, (8, 0)), (ICMP, (13, 0))], &[(UDP, (8, 0))]),
            (Protocol::Icmp(Some(8), None), &[(ICMP, (8, 0)), (ICMP, (8, 3))], &[(ICMP, (13, 0))]),
            (Protocol::Icmp(Some(3), Some(4)), &[(ICMP, (3, 4))], &[(ICMP, (3, 3)), (ICMP, (8, 4))]),
            (
                Protocol::Icmpv6(Some(128), Some(0)),
                &[(ICMP6, (128, 0))],
                &[(ICMP6, (128, 1)), (ICMP6, (139, 0))],
            ),
            (Protocol::Number(47), &[(47, (0, 0))], &[(50, (0, 0)), (TCP, (0, 47))]),
            (Protocol::All, &[(TCP, (1, 1)), (UDP, (1, 1)), (132, (0, 0))], &[]),
        ];
        for (protocol, yes, no) in cases {
            for egress in [false, true] {
                for six in [false, true] {
                    let family = !matches!(
                        (protocol, six),
                        (Protocol::Icmp(..), true) | (Protocol::Icmpv6(..), false)
                    );
                    let mut rules = if egress { vec![] } else { all_out() };
                    rules.push(rule(egress, protocol, net(everyone[usize::from(six)])));
                    let open = [
                        rule(false, Protocol::All, net(everyone[0])),
                        rule(false, Protocol::All, net(everyone[1])),
                    ];
                    let peer = group("sg-out", [out.rules.clone(), open.to_vec()].concat());
                    put(&wire.rules(&[group("sg-web", rules), peer]));
                    let (from, to) = if egress { (G(0), G(1)) } else { (G(1), G(0)) };
                    for (what, let_through) in
                        yes.iter().map(|w| (w, family)).chain(no.iter().map(|w| (w, false)))
                    {
                        for (six_too, expected) in [(six, let_through), (!six, false)] {
                            let wrong = matches!((what.0, six_too), (ICMP, true) | (ICMP6, false));
                            let expected = expected && !wrong;
                            forget_connections();
                            let packet = wire.packet(from, to, six_too, what.0, what.1);
                            let passed = wire.passes(from, to, packet, expected);
                            assert_eq!(
                                passed, expected,
                                "{protocol:?} egress {egress} IPv6 {six}: {packet:?}"
                            );
                        }
                    }
                    if !six && !egress && family {
                        let (number, ports) = yes[0];
                        forget_connections();
                        let packet = wire.packet(World, G(0), false, number, ports);
                        assert!(wire.passes(World, G(0), packet, true), "from the world: {packet:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_group_as_source_follows_its_members() {
    in_namespace(|| {
        let mut wire = Wire::new(3);
        let inner = web(vec![rule(false, Protocol::Tcp(22, 22), of("sg-bastion"))]);
        let mut bastion = group("sg-bastion", all_out());
        // One whose address is told, and who is none here; and one here who is told, and is none.
        bastion.members = [FAR.into(), IpAddr::V4(wire.guests[2].ip4)].into();
        let groups = [inner, bastion, group("sg-other", all_out())];
        for (guest, name) in wire.guests.iter_mut().zip(["sg-web", "sg-bastion", "sg-other"]) {
            guest.groups = vec![id(name)];
        }
        let ssh = |wire: &mut Wire, from: End, six: bool, expected: bool| {
            forget_connections();
            let packet = wire.packet(from, G(0), six, TCP, (999, 22));
            assert_eq!(wire.passes(from, G(0), packet, expected), expected, "{from:?} {six}");
        };
        let first = wire.rules(&groups);
        put(&first);
        for six in [false, true] {
            ssh(&mut wire, G(1), six, true);
            ssh(&mut wire, G(2), six, false);
        }
        ssh(&mut wire, World, false, true);
        wire.guests[2].groups = vec![id("sg-other"), id("sg-bastion")];
        wire.guests[1].groups = vec![id("sg-other")];
        let second = wire.rules(&groups[..2]);
        let text = second.change(&first).unwrap();
        assert!(!text.contains("sg-web"), "the group's own chains are not touched: {text}");
        change(&first, &second);
        for six in [false, true] {
            ssh(&mut wire, G(2), six, true);
            ssh(&mut wire, G(1), six, false);
        }
        // Nor is who says so on the uplink, whatever rp_filter is.
        forget_connections();
        let mut forged = wire.packet(World, G(0), false, UDP, (999, 22));
        let open = wire.rules(&[web(vec![rule(false, Protocol::All, of("sg-bastion"))]), groups[1].clone()]);
        change(&second, &open);
        forged.from = wire.ip(G(2), false);
        assert!(!wire.passes(World, G(0), forged, false), "a guest's address from the uplink");
        change(&open, &second);
        // Nothing is let out by a group that is not there.
        let packet = wire.packet(G(1), World, false, UDP, (1, 1));
        assert!(!wire.passes(G(1), World, packet, false));
        // Members of a default group talk to each other, and nobody else to them.
        let own = group("sg-own", [all_out(), vec![rule(false, Protocol::All, of("sg-own"))]].concat());
        wire.guests[0].groups = vec![id("sg-own")];
        wire.guests[1].groups = vec![id("sg-own")];
        let third = wire.rules(&[own, groups[1].clone()]);
        change(&second, &third);
        for (from, to, expected) in [(0, 1, true), (1, 0, true), (2, 0, false)] {
            forget_connections();
            let packet = wire.packet(G(from), G(to), false, UDP, (1, 7));
            assert_eq!(wire.passes(G(from), G(to), packet, expected), expected);
        }
        assert_eq!(refused(&wire.guests[0].tap).unwrap().inbound, 3);
    });
}

/// A network of this id, whose routes lead these through its gateway.
fn vpc(name: &str, routes: &[&str]) -> Network {
    let routes = routes.iter().map(|net| net.parse().unwrap()).collect();
    Network { id: id(name), cidr: "172.31.0.0/16".parse().unwrap(), routes }
}

#[test]
fn guests_of_two_networks_do_not_reach_each_other_whatever_their_groups_say() {
    in_namespace(|| {
        let mut wire = Wire::new(4);
        let everyone = ["0.0.0.0/0", "::/0", "172.31.0.0/16"];
        let open = everyone.map(|all| rule(false, Protocol::All, net(all)));
        let open = group(
            "sg-own",
            [all_out(), open.to_vec(), vec![rule(false, Protocol::All, of("sg-own"))]].concat(),
        );
        let everywhere = ["0.0.0.0/0"];
        for (guest, name) in wire.guests.iter_mut().zip(["vpc-a", "vpc-a", "vpc-b", "vpc-c"]) {
            guest.groups = vec![id("sg-own")];
            guest.network = vpc(name, &everywhere);
        }
        let groups = [open];
        let probe = |wire: &mut Wire, same: &dyn Fn(usize, usize) -> bool| {
            let mut refused = 0;
            for (from, to) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))).filter(|(a, b)| a != b) {
                for (six, protocol) in [(false, TCP), (false, UDP), (false, ICMP), (true, UDP), (false, 47)] {
                    forget_connections();
                    let ports = if protocol == ICMP { (8, 0) } else { (7, 9) };
                    let packet = wire.packet(G(from), G(to), six, protocol, ports);
                    let expected = same(from, to);
                    assert_eq!(
                        wire.passes(G(from), G(to), packet, expected),
                        expected,
                        "{from} to {to}: {packet:?}"
                    );
                    refused += u64::from(!expected);
                }
            }
            refused
        };
        let first = wire.rules(&groups);
        put(&first);
        let network = |n: usize| n / 2 * n;
        let walled = probe(&mut wire, &|a, b| network(a) == network(b));
        let counted =
            run(Command::new("nft").args(["list", "counter", "inet", TABLE, "walled"]), "").unwrap();
        let counted = String::from_utf8(counted).unwrap();
        assert!(counted.contains(&format!("packets {walled} ")), "{walled}: {counted}");
        // One that is moved is among the others, and its connections with those it left end.
        forget_connections();
        let more = connect(&mut wire, G(0), G(1), false, 80);
        wire.guests[1].network = vpc("vpc-b", &everywhere);
        let second = wire.rules(&groups);
        let text = second.change(&first).unwrap();
        assert!(text.lines().all(|line| line.contains("hu00000001")), "only it is touched: {text}");
        change(&first, &second);
        assert!(!wire.passes(G(0), G(1), more, false));
        probe(&mut wire, &|a, b| (a.min(b), a.max(b)) == (1, 2));
        // Whose network is not known reaches nobody.
        apply("delete element inet hutch walls { \"hu00000001\" }").unwrap();
        probe(&mut wire, &|a, b| (a, b) == (2, 1));
        // Networks go with the last of their guests.
        apply(&second.render(&listing().unwrap())).unwrap();
        wire.guests[3].network = vpc("vpc-b", &everywhere);
        let third = wire.rules(&groups);
        change(&second, &third);
        assert!(!third.render(&listing().unwrap()).contains("vpc-c"));
    });
}

#[test]
fn nothing_passes_the_uplink_but_what_routes_lead_there() {
    in_namespace(|| {
        let mut wire = Wire::new(4);
        let open = rule(false, Protocol::All, net("0.0.0.0/0"));
        let groups = [group("sg-own", [all_out(), vec![open]].concat())];
        let routes: [&[&str]; 4] = [
            &["0.0.0.0/0", "198.51.100.0/24"],
            &["198.51.100.0/25", "203.0.113.0/24"],
            &["203.0.113.0/24"],
            &[],
        ];
        for (guest, routes) in wire.guests.iter_mut().zip(routes) {
            guest.groups = vec![id("sg-own")];
            guest.network = vpc("vpc-a", routes);
        }
        let first = wire.rules(&groups);
        put(&first);
        let probe = |wire: &mut Wire, expected: [bool; 4]| {
            for (n, expected) in expected.into_iter().enumerate() {
                for (from, to) in [(G(n), World), (World, G(n))] {
                    forget_connections();
                    let packet = wire.packet(from, to, false, UDP, (7, 9));
                    assert_eq!(wire.passes(from, to, packet, expected), expected, "{from:?} to {to:?}");
                }
            }
        };
        probe(&mut wire, [true, true, false, false]);
        // What is of the network stays in it, also where nobody has the address; and nobody outside is of it.
        for (from, to) in [(G(0), World), (World, G(0))] {
            let mut packet = wire.packet(from, to, false, UDP, (7, 9));
            let other = "172.31.77.7".parse().unwrap();
            if to == World {
                packet.to = other
            } else {
                packet.from = other
            }
            assert!(!wire.passes(from, to, packet, false));
        }
        // A route that goes takes what is open along.
        forget_connections();
        let more = connect(&mut wire, G(0), World, false, 80);
        wire.guests[0].network.routes = vec![];
        wire.guests[3].network = vpc("vpc-a", &["0.0.0.0/0"]);
        let second = wire.rules(&groups);
        change(&first, &second);
        assert!(!wire.passes(G(0), World, more, false));
        probe(&mut wire, [false, true, false, true]);
    });
}

/// Opens a connection of a guest's: the first packet and the answer. Returns one more packet of it.
fn connect(wire: &mut Wire, from: End, to: End, six: bool, port: u16) -> Packet {
    let syn = wire.packet(from, to, six, TCP, (4000, port));
    assert!(wire.passes(from, to, syn, true));
    let mut answer = wire.packet(to, from, six, TCP, (port, 4000));
    answer.flags = SYN | ACK;
    assert!(wire.passes(to, from, answer, true), "an answer needs no rule");
    let mut more = wire.packet(from, to, six, TCP, (4000, port));
    more.flags = ACK;
    more
}

#[test]
fn a_revoked_rule_ends_only_what_is_not_tracked() {
    in_namespace(|| {
        let mut wire = Wire::new(2);
        wire.guests[0].groups = vec![id("sg-web")];
        wire.guests[1].groups = vec![id("sg-out")];
        let closed = group("sg-web", vec![]);
        let tcp = |peer| rule(false, Protocol::Tcp(80, 80), peer);
        // Whether what is revoked was tracked: a rule for some; one for all, where answers need not go anywhere; and the
        // example of EC2's guide: everyone in, and everything out.
        let all = all_out().remove(0);
        for (rules, tracked) in [
            (vec![tcp(net("172.31.0.0/16")), all.clone()], true),
            (vec![tcp(net("0.0.0.0/0"))], true),
            (vec![tcp(net("0.0.0.0/0")), rule(true, Protocol::Udp(0, 65_535), net("0.0.0.0/0"))], true),
            (vec![tcp(net("0.0.0.0/0")), all.clone()], false),
            (
                vec![
                    rule(false, Protocol::All, net("0.0.0.0/0")),
                    rule(true, Protocol::Tcp(0, 65_535), net("0.0.0.0/0")),
                ],
                false,
            ),
        ] {
            let out = group("sg-out", all_out());
            let before = wire.rules(&[group("sg-web", rules.clone()), out.clone()]);
            put(&before);
            forget_connections();
            let mut more = connect(&mut wire, G(1), G(0), false, 80);
            let after = wire.rules(&[closed.clone(), out]);
            change(&before, &after);
            assert_eq!(wire.passes(G(1), G(0), more, tracked), tracked, "{rules:?}");
            more.ports.0 += 1;
            more.flags = SYN;
            assert!(!wire.passes(G(1), G(0), more, false), "no new one");
        }
    });
}

#[test]
fn nothing_leaks_while_a_group_is_refilled() {
    in_namespace(|| {
        let mut wire = Wire::new(2);
        wire.guests[0].groups = vec![id("sg-web"), id("sg-more")];
        wire.guests[1].groups = vec![id("sg-out")];
        let web = |port| web(vec![rule(false, Protocol::Tcp(port, port), net("172.31.0.0/16"))]);
        let more = group("sg-more", vec![rule(false, Protocol::Udp(9, 9), of("sg-out"))]);
        let out = group("sg-out", all_out());
        let of = |port| [web(port), more.clone(), out.clone()];
        let rules = [wire.rules(&of(80)), wire.rules(&of(443))];
        put(&rules[0]);
        // A full replace, which is for repair, may drop what is allowed; the steady state does not.
        for (packets, replace) in [(12_000, false), (5_000, true)] {
            let (over, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
            let (ends, count, rules) = (over.clone(), done.clone(), rules.clone());
            // In the same namespace: threads begin in their parent's.
            let changes = std::thread::spawn(move || {
                while !ends.load(Ordering::Relaxed) {
                    let n = count.fetch_add(1, Ordering::Relaxed) + 1;
                    match replace {
                        true => apply(&rules[n % 2].render(&Listing::default())).unwrap(),
                        false => apply(&rules[n % 2].change(&rules[(n + 1) % 2]).unwrap()).unwrap(),
                    }
                }
            });
            let (mut wrong, mut lost, mut sent) = (0, 0, 0u32);
            // So many packets and so many changes under them: where changes are slow, more packets. Their ports come again, for
            // a guest has only so many connections.
            while sent < packets || done.load(Ordering::Relaxed) <= 20 && !changes.is_finished() {
                let port = (sent % packets) as u16;
                sent += 1;
                for (protocol, ports, passes) in [(TCP, (port, 22), false), (UDP, (port, 9), true)] {
                    let packet = wire.packet(G(1), G(0), false, protocol, ports);
                    let passed = wire.passes(G(1), G(0), packet, passes);
                    wrong += u32::from(passed && !passes);
                    lost += u32::from(!passed && passes);
                }
            }
            over.store(true, Ordering::Relaxed);
            changes.join().unwrap();
            let changes = done.load(Ordering::Relaxed);
            println!(
                "{sent} packets each way, {changes} changes, replace {replace}: {wrong} wrong, {lost} lost"
            );
            assert_eq!(wrong, 0);
            assert!(replace || lost == 0, "{lost}");
            assert!(changes > 20, "{changes}");
        }
    });
}

#[test]
fn one_guest_has_so_many_connections() {
    in_namespace(|| {
        let mut wire = Wire::new(2);
        for guest in &mut wire.guests {
            guest.groups = vec![id("sg-out")];
        }
        let rules = wire.rules(&[group("sg-out", all_out())]);
        let few = rules.render(&Listing::default()).replace(&format!("over {FLOWS}"), "over 20");
        apply(&few).unwrap();
        let passed = |wire: &mut Wire, guest, port| {
            let packet = wire.packet(G(guest), World, false, UDP, (port, 9));
            wire.passes(G(guest), World, packet, true)
        };
        let first = (0..30).filter(|port| passed(&mut wire, 0, 1000 + port)).count();
        assert_eq!(first, 20);
        assert!(passed(&mut wire, 1, 7), "the other has its own");
    });
}

/// Numbers that follow from a seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % n
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }
}

const NAMES: [&str; 4] = ["sg-0", "sg-1", "sg-2", "sg-3"];

fn random_rule(random: &mut Random, wire: &Wire) -> Rule {
    let ports = |random: &mut Random| {
        let (a, b) = (random.of(&PORTS), random.of(&PORTS));
        (a.min(b), a.max(b))
    };
    let (first, last) = ports(random);
    let kind = random.of(&[None, Some(8), Some(128), Some(3)]);
    let code = kind.and_then(|_| random.of(&[None, Some(0), Some(1)]));
    let protocol = match random.below(7) {
        0 => Protocol::All,
        1 | 2 => Protocol::Tcp(first, last),
        3 => Protocol::Udp(first, last),
        4 => Protocol::Icmp(kind, code),
        5 => Protocol::Icmpv6(kind, code),
        _ => Protocol::Number(random.of(&[47, 50])),
    };
    let guest = random.below(wire.guests.len());
    let peer = match random.below(10) {
        0 | 8 => net("0.0.0.0/0"),
        1 | 9 => net("::/0"),
        2 => Peer::Net(ipnet::IpNet::from(wire.ip(G(guest), false))),
        3 => Peer::Net(ipnet::IpNet::from(wire.ip(G(guest), true))),
        4 => net("172.31.0.8/30"),
        5 => net("198.51.100.0/24"),
        _ => of(random.of::<&str>(&NAMES)),
    };
    rule(random.below(2) == 0, protocol, peer)
}

const PORTS: [u16; 5] = [0, 22, 80, 1024, 65_535];

/// Whether the group of an end's says so: written from EC2's words, not from the compiler's.
fn says(groups: &[Group], wire: &Wire, end: End, egress: bool, other: IpAddr, packet: &Packet) -> bool {
    let End::Guest(n) = end else { return true };
    let member = |name: &GroupId| {
        wire.guests.iter().any(|guest| {
            (other == IpAddr::V4(guest.ip4) || Some(other) == guest.ip6.map(IpAddr::V6))
                && guest.groups.contains(name)
        }) || other == IpAddr::V4(FAR)
            && groups.iter().any(|group| group.id == *name && group.members.contains(&other))
    };
    let own = groups.iter().filter(|group| wire.guests[n].groups.contains(&group.id));
    own.flat_map(|group| &group.rules).filter(|rule| rule.egress == egress).any(|rule| {
        let (a, b) = packet.ports;
        let typed = |kind: Option<u8>, code: Option<u8>| {
            kind.is_none_or(|kind| u16::from(kind) == a) && code.is_none_or(|code| u16::from(code) == b)
        };
        let protocol = match rule.protocol {
            Protocol::All => true,
            Protocol::Tcp(first, last) => packet.protocol == TCP && first <= b && b <= last,
            Protocol::Udp(first, last) => packet.protocol == UDP && first <= b && b <= last,
            Protocol::Icmp(kind, code) => packet.protocol == ICMP && typed(kind, code),
            Protocol::Icmpv6(kind, code) => packet.protocol == ICMP6 && typed(kind, code),
            Protocol::Number(number) => packet.protocol == number,
        };
        let peer = match &rule.peer {
            Peer::Net(net) => net.contains(&other),
            Peer::Group(name) => member(name),
        };
        protocol && peer
    })
}

#[test]
fn the_kernel_decides_as_the_model_does() {
    in_namespace(|| {
        let mut wire = Wire::new(4);
        let seed = std::env::var("HUTCH_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 0x5eed);
        println!("HUTCH_SEED={seed}");
        let mut random = Random(seed);
        let mut before = wire.rules(&[]);
        put(&before);
        let (mut passed, mut probes) = (0, 0);
        for round in 0..60 {
            let mut groups: Vec<Group> = NAMES.iter().map(|name| group(name, vec![])).collect();
            for group in &mut groups {
                for _ in 0..random.below(24) {
                    group.rules.push(random_rule(&mut random, &wire));
                }
                if random.below(3) == 0 {
                    group.members.insert(FAR.into());
                }
            }
            for guest in &mut wire.guests {
                guest.groups.clear();
                for _ in 0..random.below(4) {
                    let name = id(random.of::<&str>(&NAMES));
                    if !guest.groups.contains(&name) {
                        guest.groups.push(name);
                    }
                }
            }
            let after = wire.rules(&groups);
            // Whatever way it comes about, it is the same.
            if random.below(5) == 0 {
                put(&after)
            } else {
                change(&before, &after)
            }
            before = after;
            for _ in 0..60 {
                let ends = [G(0), G(1), G(2), G(3), World];
                let (from, to) = (random.of(&ends), random.of(&ends));
                let six = random.below(3) == 0;
                if from == to || six && (from == World || to == World) {
                    continue;
                }
                let protocol = random.of(&[TCP, TCP, UDP, UDP, if six { ICMP6 } else { ICMP }, 47, 50]);
                let ports = match protocol {
                    TCP | UDP => (1 + random.below(60_000) as u16, random.of(&PORTS)),
                    ICMP => (random.of(&[8, 13]), random.of(&[0, 1])),
                    _ => (random.of(&[128, 129]), random.of(&[0, 1])),
                };
                if protocol == ICMP6 && ports.0 == 129 || protocol == TCP && ports.1 == 0 {
                    continue;
                }
                let packet = wire.packet(from, to, six, protocol, ports);
                let expected = says(&groups, &wire, from, true, packet.to, &packet)
                    && says(&groups, &wire, to, false, packet.from, &packet);
                forget_connections();
                assert_eq!(
                    wire.passes(from, to, packet, expected),
                    expected,
                    "seed {seed}, round {round}: {from:?} to {to:?} {packet:?}\n{groups:#?}"
                );
                passed += u32::from(expected);
                probes += 1;
            }
        }
        println!("{passed} of {probes} packets passed");
        assert!(passed > probes / 20 && passed < probes, "{passed} of {probes}");
    });
}
