use super::*;

fn guest(n: u8) -> Guest {
    Guest {
        tap: format!("hu0000000{n:x}").parse().unwrap(),
        mac: MacAddr::new([2, 0, 0, 0, 0, n]).unwrap(),
        ip4: Ipv4Addr::new(172, 31, 0, n),
        ip6: n.is_multiple_of(2).then(|| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n.into())),
        gateway: Ipv4Addr::new(172, 31, 0, 1),
        open_tcp: vec![(443, 443), (80, 90), (85, 100), (101, 101)],
    }
}

fn rules(uplink: Option<&str>) -> Ruleset {
    let uplink = uplink.map(|name| name.parse().unwrap());
    Ruleset::new("172.31.0.0/20".parse().unwrap(), uplink)
}

/// Runs a script in a network namespace of its own; `None`, with the reason printed, where that cannot be.
fn in_namespace(script: &str, text: &str) -> Option<Result<(), NftError>> {
    let able = run(Command::new("unshare").args(["-n", "nft", "list", "ruleset"]), "");
    if let Err(why) = able {
        println!("SKIPPED: no root, no nft or no namespaces: {why}");
        return None;
    }
    Some(run(Command::new("unshare").args(["-n", "sh", "-ec", script]), text))
}

#[test]
fn a_guest_is_only_elements() {
    assert_eq!(
        render_add(&guest(2)),
        "add element inet hutch macs { \"hu00000002\" . 02:00:00:00:00:02 }\n\
         add element inet hutch from4 { \"hu00000002\" . 02:00:00:00:00:02 . 172.31.0.2 }\n\
         add element inet hutch to4 { \"hu00000002\" . 172.31.0.2 }\n\
         add element inet hutch gateways { \"hu00000002\" . 172.31.0.1 }\n\
         add element arp hutch senders { \"hu00000002\" . 02:00:00:00:00:02 . 02:00:00:00:00:02 . 172.31.0.2 }\n\
         add element arp hutch senders { \"hu00000002\" . 02:00:00:00:00:02 . 02:00:00:00:00:02 . 0.0.0.0 }\n\
         add element inet hutch from6 { \"hu00000002\" . 02:00:00:00:00:02 . fd00::2 }\n\
         add element inet hutch to6 { \"hu00000002\" . fd00::2 }\n\
         add element inet hutch open4 { \"hu00000002\" . 172.31.0.2 . 80-101 }\n\
         add element inet hutch open4 { \"hu00000002\" . 172.31.0.2 . 443-443 }\n"
    );
}

#[test]
fn every_accept_matches_a_constant_or_a_member() {
    for line in rules(Some("up0")).render().lines().filter(|l| l.ends_with(" accept")) {
        assert!(line.contains("iifname") || line.contains("oifname"), "{line}");
    }
    assert!(!rules(None).render().contains("masquerade"));
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
fn the_kernel_takes_it_twice_and_replaces_and_forgets() {
    let mut rules = rules(Some("up0"));
    rules.add(guest(2)).unwrap();
    let first = rules.render();
    rules.add(guest(3)).unwrap();
    // Through the same namespace: a replace, then one guest out (known, then unknown), then nothing left.
    let script = format!(
        "nft -f - \n\
         nft -f - <<'X'\n{}X\n\
         [ $(nft list set inet hutch to4 | grep -o hu0000000 | wc -l) = 2 ]\n\
         [ $(nft list chain inet hutch input | grep -c jump) = 1 ]\n\
         for again in 1 2; do nft -f - <<'X'\n{}X\ndone\n\
         [ $(nft list set inet hutch to4 | grep -o hu0000000 | wc -l) = 1 ]\n\
         if nft list ruleset | grep hu00000002; then exit 1; fi\n\
         nft -f - <<'X'\n{}X\n\
         [ -z \"$(nft list ruleset)\" ]",
        rules.render(),
        render_remove(&guest(2)),
        render_teardown()
    );
    if let Some(result) = in_namespace(&script, &first) {
        result.unwrap();
    }
}

#[test]
fn a_refused_text_leaves_the_rules() {
    let script = "nft -f - \nif echo 'flush table inet hutch; nonsense' | nft -f - 2>/dev/null; then exit 1; fi\n\
                  nft list chain inet hutch input | grep -q guest_to_host";
    if let Some(result) = in_namespace(script, &rules(None).render()) {
        result.unwrap();
    }
}
