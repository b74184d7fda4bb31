use std::collections::BTreeSet;

use super::*;
use crate::groups::{Peer, Protocol, Rule};

fn guest(n: u8) -> Guest {
    Guest {
        tap: format!("hu0000000{n:x}").parse().unwrap(),
        mac: MacAddr::new([2, 0, 0, 0, 0, n]).unwrap(),
        ip4: Ipv4Addr::new(172, 31, 0, n),
        more: vec![],
        ip6: n.is_multiple_of(2).then(|| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n.into())),
        gateway: Ipv4Addr::new(172, 31, 0, 1),
        network: network(),
        groups: vec!["sg-2".parse().unwrap(), "sg-1".parse().unwrap()],
    }
}

fn network() -> Network {
    let id = "vpc-1".parse().unwrap();
    Network { id, cidr: "172.31.0.0/20".parse().unwrap(), routes: vec![Ipv4Net::default()] }
}

fn rules(uplink: Option<&str>) -> Ruleset {
    let uplink = uplink.map(|name| name.parse().unwrap());
    Ruleset::new("172.31.0.0/20".parse().unwrap(), uplink)
}

/// Runs a script in a network namespace of its own; `None`, with the reason printed, where that cannot be.
fn in_namespace(script: &str, text: &str) -> Option<Result<Vec<u8>, NftError>> {
    let able = run(Command::new("unshare").args(["-n", "nft", "list", "ruleset"]), "");
    if let Err(why) = able {
        println!("SKIPPED: no root, no nft or no namespaces: {why}");
        return None;
    }
    Some(run(Command::new("unshare").args(["-n", "sh", "-ec", script]), text))
}

fn rule(egress: bool, protocol: Protocol, peer: &str) -> Rule {
    let peer = peer.parse().map_or_else(|_| Peer::Group(peer.parse().unwrap()), Peer::Net);
    Rule { egress, protocol, peer }
}

fn group(id: &str, rules: Vec<Rule>) -> Group {
    Group { id: id.parse().unwrap(), rules, members: BTreeSet::new() }
}

/// Rules of every kind, in the order of their making.
fn every_kind() -> Group {
    group(
        "sg-1",
        vec![
            rule(false, Protocol::Tcp(80, 80), "10.1.0.0/16"),
            rule(false, Protocol::Tcp(80, 80), "10.0.0.0/16"),
            rule(false, Protocol::Tcp(80, 80), "fd00::/8"),
            rule(false, Protocol::Tcp(80, 80), "sg-3"),
            rule(false, Protocol::Tcp(443, 444), "0.0.0.0/0"),
            rule(false, Protocol::Tcp(443, 444), "10.0.0.0/8"),
            rule(false, Protocol::Udp(0, 65_535), "10.0.0.0/8"),
            rule(false, Protocol::Icmp(Some(8), Some(0)), "0.0.0.0/0"),
            rule(false, Protocol::Icmp(None, None), "sg-3"),
            rule(false, Protocol::Icmpv6(Some(128), None), "::/0"),
            rule(false, Protocol::Icmpv6(None, None), "0.0.0.0/0"),
            rule(false, Protocol::Number(47), "192.0.2.1/32"),
            rule(true, Protocol::All, "0.0.0.0/0"),
        ],
    )
}

#[test]
fn a_group_is_lines() {
    let mut group = every_kind();
    let lines = [
        "ct mark and 0x40000000 == 0 ip saddr { 10.0.0.0/15 } tcp dport 80 goto keep_in",
        "ip saddr @sg-3-4 tcp dport 80 goto keep_in",
        "ct mark and 0x40000000 == 0 ip6 saddr { fd00::/8 } tcp dport 80 goto keep_in",
        "ip6 saddr @sg-3-6 tcp dport 80 goto keep_in",
        "meta nfproto ipv4 tcp dport 443-444 goto pass_in",
        "ct mark and 0x40000000 == 0 ip saddr { 10.0.0.0/8 } meta l4proto udp goto keep_in",
        "ip saddr @sg-3-4 meta l4proto 1 goto keep_in",
        "meta nfproto ipv4 icmp type 8 icmp code 0 goto keep_in",
        "meta nfproto ipv6 icmpv6 type 128 goto keep_in",
        "ct mark and 0x40000000 == 0 ip saddr { 192.0.2.1/32 } meta l4proto 47 goto keep_in",
    ];
    assert_eq!(group.lines(false), lines);
    assert_eq!(group.lines(true), ["meta nfproto ipv4 goto pass_out"]);
    group.rules.reverse();
    assert_eq!(group.lines(false), lines, "whatever their order");
    // What cannot be is not there, and takes nothing along.
    group.rules.push(rule(false, Protocol::Tcp(2, 1), "0.0.0.0/0"));
    group.rules.push(rule(false, Protocol::Icmp(None, Some(1)), "10.0.0.0/8"));
    assert_eq!(group.lines(false), lines);
    assert!(group.rules.iter().rev().take(2).all(|rule| rule.check().is_err()));
}

#[test]
fn guests_and_groups_are_elements_and_chains() {
    let mut rules = rules(Some("up0")).with_groups(vec![every_kind()]);
    rules.add(guest(2)).unwrap();
    let text = rules.render(&Listing::default());
    // `UPDATE=1 cargo test -p hutch-netfw` writes it anew, to be looked at.
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write("src/nft/golden.nft", &text).unwrap();
    }
    assert_eq!(text, include_str!("golden.nft"));
    assert_eq!(text, rules.clone().render(&Listing::default()), "the same makes the same");
}

#[test]
fn a_change_is_no_more_than_that() {
    let before = |groups: &[&str], rules_of: Vec<Rule>| {
        let mut rules = rules(Some("up0")).with_groups(vec![group("sg-1", rules_of), group("sg-2", vec![])]);
        let groups = groups.iter().map(|id| id.parse().unwrap()).collect();
        rules.add(Guest { groups, ..guest(3) }).unwrap();
        rules
    };
    let ssh = |peer: &str| vec![rule(false, Protocol::Tcp(22, 22), peer)];
    let one = before(&["sg-1"], ssh("10.0.0.0/8"));
    for (after, text) in [
        (before(&["sg-1"], ssh("10.0.0.0/8")), ""),
        (
            before(&["sg-1"], ssh("10.1.0.0/16")),
            "flush chain inet hutch sg-1-in\n\
             add rule inet hutch sg-1-in ct mark and 0x40000000 == 0 ip saddr { 10.1.0.0/16 } tcp dport 22 goto keep_in\n",
        ),
        (
            before(&["sg-1"], ssh("sg-1")),
            "add set inet hutch sg-1-4 { type ipv4_addr; }\n\
             add set inet hutch sg-1-6 { type ipv6_addr; }\n\
             flush chain inet hutch sg-1-in\n\
             add rule inet hutch sg-1-in ip saddr @sg-1-4 tcp dport 22 goto keep_in\n\
             add rule inet hutch sg-1-in ip6 saddr @sg-1-6 tcp dport 22 goto keep_in\n\
             add element inet hutch sg-1-4 { 172.31.0.3 }\n",
        ),
        (
            before(&["sg-2"], ssh("10.0.0.0/8")),
            "add chain inet hutch sg-2-in\n\
             add chain inet hutch sg-2-out\n\
             delete element inet hutch groups_in { \"hu00000003\" }\n\
             delete element inet hutch groups_out { \"hu00000003\" }\n\
             flush chain inet hutch sg-1-in\n\
             flush chain inet hutch sg-1-out\n\
             add element inet hutch groups_in { \"hu00000003\" : jump sg-2-in }\n\
             add element inet hutch groups_out { \"hu00000003\" : jump sg-2-out }\n\
             delete chain inet hutch sg-1-in\n\
             delete chain inet hutch sg-1-out\n",
        ),
    ] {
        assert_eq!(after.change(&one).unwrap(), text);
    }
    assert!(rules(None).change(&one).is_none(), "another uplink is another firewall");
}

#[test]
fn every_accept_matches_a_constant_or_a_member() {
    for line in rules(Some("up0")).render(&Listing::default()).lines().filter(|l| l.ends_with(" accept")) {
        assert!(line.contains("iifname") || line.contains("oifname"), "{line}");
    }
    assert!(!rules(None).render(&Listing::default()).contains("masquerade"));
}

#[test]
fn what_clashes_or_lies_outside_is_refused() {
    let mut rules = rules(None);
    rules.add(guest(2)).unwrap();
    for change in [
        |g: &mut Guest| g.tap = guest(2).tap,
        |g: &mut Guest| g.mac = guest(2).mac,
        |g: &mut Guest| g.ip4 = guest(2).ip4,
        |g: &mut Guest| g.ip6 = guest(2).ip6,
    ] {
        let mut other = guest(3);
        change(&mut other);
        assert!(matches!(rules.add(other), Err(NftError::Twice(..))));
    }
    for ip4 in [[172, 31, 0, 0], [172, 31, 0, 1], [172, 31, 15, 255], [172, 31, 16, 1]] {
        let outside = Guest { ip4: ip4.into(), ..guest(3) };
        assert!(matches!(rules.add(outside), Err(NftError::OutOfRange { .. })), "{ip4:?}");
    }
    let local = Guest { ip6: Some("fe80::2".parse().unwrap()), ..guest(3) };
    assert!(matches!(rules.add(local), Err(NftError::BadIpv6 { .. })));
    rules.add(guest(3)).unwrap();
}

#[test]
fn a_refused_text_leaves_the_rules() {
    let script = "nft -f - \nif echo 'flush table inet hutch; nonsense' | nft -f - 2>/dev/null; then exit 1; fi\n\
                  nft list chain inet hutch input | grep -q guest_to_host";
    if let Some(result) = in_namespace(script, &rules(None).render(&Listing::default())) {
        result.unwrap();
    }
}

#[test]
fn the_kernel_takes_it_twice_and_replaces_and_forgets() {
    super::wire::in_namespace(|| {
        let mut rules = rules(Some("up0")).with_groups(vec![every_kind()]);
        rules.add(guest(2)).unwrap();
        let one = rules.clone();
        rules.add(guest(3)).unwrap();
        let none = listing().unwrap();
        assert_eq!(none, Listing::default());
        for (known, rules) in [(&none, &one), (&none, &one), (&listing().unwrap(), &rules)] {
            apply(&rules.render(known)).unwrap();
            assert!(rules.is_there(&listing().unwrap()));
        }
        assert!(!one.is_there(&listing().unwrap()), "it is told which");
        // Whatever is left of groups goes.
        let alone = Guest { groups: vec![GroupId::alone()], ..guest(4) };
        let mut other = Ruleset::new("172.31.0.0/20".parse().unwrap(), None);
        other.add(alone).unwrap();
        apply(&other.render(&listing().unwrap())).unwrap();
        assert!(other.is_there(&listing().unwrap()));
        for chain in ["arriving", "forward_out", "alone-out"] {
            let now = generation().unwrap();
            run(Command::new("nft").args(["flush", "chain", "inet", TABLE, chain]), "").unwrap();
            assert_eq!(generation().unwrap(), now + 1);
            assert!(!other.is_there(&listing().unwrap()), "{chain}");
            apply(&other.render(&Listing::default())).unwrap();
        }
        apply(&render_teardown()).unwrap();
        assert_eq!(listing().unwrap(), Listing::default());
    });
}

#[test]
fn many_rules_are_put_at_once() {
    super::wire::in_namespace(|| {
        let net = |group: u32, n: u32| format!("10.{group}.{n}.0/24");
        let mut groups: Vec<Group> = (0..10u32)
            .map(|n| {
                let port = |m: u32| Protocol::Tcp(1000 + m as u16, 1000 + m as u16);
                let rules = (0..60).map(|m| rule(false, port(m), &net(n, m))).collect();
                group(&format!("sg-{n}"), rules)
            })
            .collect();
        let of = |groups: &[Group], guests: u8| {
            let mut rules = Ruleset::new("172.31.0.0/20".parse().unwrap(), None).with_groups(groups.to_vec());
            for n in 2..2 + guests {
                let own = groups[usize::from(n) % groups.len()].id.clone();
                let guest = Guest {
                    tap: format!("hu000000{n:02x}").parse().unwrap(),
                    mac: MacAddr::new([2, 0, 0, 0, 0, n]).unwrap(),
                    ip4: Ipv4Addr::new(172, 31, 0, n),
                    more: vec![],
                    ip6: None,
                    gateway: Ipv4Addr::new(172, 31, 0, 1),
                    network: network(),
                    groups: vec![own],
                };
                rules.add(guest).unwrap();
            }
            rules
        };
        let timed = |what: &str, text: &str| {
            let begun = std::time::Instant::now();
            apply(text).unwrap();
            println!("{what}: {:?}, {} bytes", begun.elapsed(), text.len());
        };
        let whole = of(&groups, 100);
        timed("100 guests, 600 rules, whole", &whole.render(&Listing::default()));
        timed("and again", &whole.render(&Listing::default()));
        let more = of(&groups, 101);
        timed("one more guest", &more.change(&whole).unwrap());
        groups[0].rules[0].protocol = Protocol::Tcp(1, 1);
        let other = of(&groups, 101);
        let text = other.change(&more).unwrap();
        timed("one rule", &text);
        assert!(text.lines().all(|line| line.contains("sg-0-in")), "only its chain is touched: {text}");
        assert!(other.is_there(&listing().unwrap()));
    });
}
