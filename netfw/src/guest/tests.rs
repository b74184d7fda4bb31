use std::io::{Read, Write};
use std::process::Command;

use super::*;
use crate::groups::{Group, Peer, Protocol, Rule};
use crate::kept::any_tap;
use crate::repair;

/// Runs `test` in a network namespace of its own; says so where there is none to be had.
pub(super) fn in_namespace(test: impl FnOnce(&Path) + Send + 'static) {
    let run = move || {
        if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("SKIPPED: a network namespace: {e}");
            return;
        }
        if !Path::new("/dev/net/tun").exists() || Command::new("nft").arg("--version").output().is_err() {
            eprintln!("SKIPPED: no /dev/net/tun, or no nft");
            return;
        }
        let state = tempfile::tempdir().unwrap();
        test(state.path());
    };
    std::thread::spawn(run).join().unwrap();
}

pub(super) fn tables() -> String {
    let out = Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    String::from_utf8(out.stdout).unwrap()
}

fn up(state: &Path) -> GuestNet {
    GuestNet::up(state, 1, 1500, vec![]).unwrap()
}

#[test]
fn guests_have_addresses_of_their_own_and_leave_nothing() {
    in_namespace(|state| {
        let (a, b) = (up(state), up(state));
        assert_eq!([a.ip, b.ip].map(|ip| ip.octets()[3]), [254, 253]);
        assert_ne!(a.mac, b.mac);
        drop(a);
        let text = tables();
        assert!(!text.contains("172.31.15.254") && text.contains("172.31.15.253"), "{text}");
        let again = up(state);
        assert_eq!(again.ip.octets()[3], 254, "a free address is used again");
        drop((again, b));
        assert_eq!(tables(), "");
        assert!(!any_tap());
        assert_eq!(fs::read_dir(state).unwrap().count(), 1, "only the lock is left");
    });
}

#[test]
fn who_comes_in_the_place_of_the_dead_is_recorded() {
    in_namespace(|state| {
        let mut dead = up(state);
        let (ip, taps) = (dead.ip, dead.take_taps());
        // Killed: nothing is undone, and its tap goes with its process.
        dead.leave();
        drop(taps);
        let again = up(state);
        assert_eq!(again.ip, ip);
        let recorded = state.join(format!("{}.json", again.guest.tap));
        assert!(recorded.exists(), "else nobody would keep its firewall up to date");
        assert!(tables().contains(&ip.to_string()));
        drop(again);
        assert_eq!(tables(), "");
    });
}

#[test]
fn a_guest_that_asks_is_told_its_prefix() {
    in_namespace(|state| {
        let mut net = up(state);
        let Some(ip6) = net.ip6 else {
            eprintln!("SKIPPED: no IPv6 here");
            return;
        };
        let mut tap = net.take_taps().remove(0);
        // A virtio header without offloads, Ethernet, IPv6 with hop limit 255, a router solicitation.
        let source = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x68, 0xacff, 0xfe1f, 4).octets();
        let all_routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2).octets();
        let mut frame = vec![0; 10];
        frame.extend([0x33, 0x33, 0, 0, 0, 2]);
        frame.extend(net.mac.bytes());
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255]);
        frame.extend(source);
        frame.extend(all_routers);
        let words =
            source.chunks(2).chain(all_routers.chunks(2)).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
        let sum = words.sum::<u32>() + 8 + 58 + (133 << 8);
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        frame.extend([133, 0, (sum >> 8) as u8, sum as u8, 0, 0, 0, 0]);
        tap.write_all(&frame).unwrap();
        // Until the advertisement comes, other packets of the host's may.
        let mut answer = [0; 2048];
        let told = (0..20).find_map(|_| {
            let len = tap.read(&mut answer).unwrap();
            let packet = answer.get(10 + 14..len)?;
            (packet.get(6) == Some(&58) && packet.get(40) == Some(&134)).then(|| packet.to_vec())
        });
        let told = told.expect("an advertisement");
        assert_eq!(told[7], 255, "the hop limit");
        assert_eq!(told[8..24], ra::ROUTER.octets());
        assert_eq!(told[40 + 32..40 + 48], PREFIX6.network().octets());
        assert!(PREFIX6.contains(&ip6));
    });
}

#[test]
fn what_cannot_be_brought_up_is_undone() {
    in_namespace(|state| {
        // Another program holds the port of the metadata service.
        let held = TcpListener::bind(("0.0.0.0", nft::METADATA_PORT)).unwrap();
        assert!(matches!(GuestNet::up(state, 1, 1500, vec![]), Err(NetError::Metadata { .. })));
        assert_eq!(tables(), "");
        assert!(!any_tap());
        drop(held);
        drop(up(state));
        assert_eq!(fs::read_dir(state).unwrap().count(), 1, "only the lock is left");
    });
}

#[test]
fn while_a_tap_lives_its_firewall_does() {
    in_namespace(|state| {
        let mut net = up(state);
        let held = net.take_taps();
        drop(net);
        let text = tables();
        assert!(text.contains("hu*") && !text.contains("172.31.15.254"), "a machine without rules: {text}");
        drop(held);
        let next = up(state);
        drop(next);
        assert_eq!(tables(), "");
    });
}

#[test]
fn a_guest_has_the_address_it_is_given_and_nobody_else_has() {
    in_namespace(|state| {
        let (ip, mac) = (Ipv4Addr::new(172, 31, 17, 9), "0a:00:00:00:00:09".parse().unwrap());
        let other: MacAddr = "0a:00:00:00:00:0a".parse().unwrap();
        let address = |ip, mac, net: &str| {
            let subnet = net.parse().unwrap();
            Address {
                ip,
                more: vec![],
                mac,
                subnet,
                network: Network::alone(),
                groups: vec!["sg-1".parse().unwrap()],
            }
        };
        let second = "172.31.16.0/20";
        let net = GuestNet::up_as(state, &address(ip, mac, second), 1, 1500, vec![]).unwrap();
        assert_eq!((net.ip, net.mac), (ip, mac));
        let text = tables();
        assert!(text.contains("0a:00:00:00:00:09") && text.contains("172.31.17.9"), "{text}");
        assert!(text.contains("172.31.16.1"), "its subnet's gateway: {text}");
        let next = Ipv4Addr::new(172, 31, 17, 10);
        for (ip, mac) in [(ip, other), (next, mac)] {
            let again = GuestNet::up_as(state, &address(ip, mac, second), 1, 1500, vec![]);
            assert!(matches!(again, Err(NetError::Taken { .. })));
        }
        let outside = address(Ipv4Addr::new(10, 0, 0, 9), other, "10.0.0.0/24");
        let outside = GuestNet::up_as(state, &outside, 1, 1500, vec![]);
        assert!(matches!(outside, Err(NetError::Firewall(_))));
        assert!(tables().contains("172.31.17.9"), "who was refused took nothing along");
        drop(net);
        assert_eq!(tables(), "");
    });
}

#[test]
fn a_guest_that_was_left_is_adopted_while_its_machine_holds_the_tap() {
    in_namespace(|state| {
        let mut net = up(state);
        let (ip, taps) = (net.ip, net.take_taps());
        net.leave();
        nft::apply(&nft::render_teardown()).unwrap();
        let mut adopted = GuestNet::adopt(state, ip, 1500, vec![]).unwrap();
        let listener = adopted.take_metadata_listeners();
        assert!(tables().contains("172.31.15.254"), "its rules are there whoever took them away");
        // Its port is served already: the second fails, and takes nothing from the first.
        let second = GuestNet::adopt(state, ip, 1500, vec![]);
        assert!(matches!(second, Err(NetError::Metadata { .. })));
        assert!(tables().contains("172.31.15.254") && any_tap());
        drop((taps, listener));
        drop(adopted);
        assert_eq!(tables(), "");
        assert!(matches!(GuestNet::adopt(state, ip, 1500, vec![]), Err(NetError::Gone(_))));
    });
}

#[test]
fn what_a_crash_left_is_repaired() {
    in_namespace(|state| {
        let mut net = up(state);
        let taps = net.take_taps();
        // As if the process had ended here: nothing is undone but what the kernel closes.
        drop((net.server.take(), net.router.take()));
        std::mem::forget(net);
        assert_eq!(repair(state).unwrap(), 0, "it lives");
        drop(taps);
        assert!(tables().contains("172.31.15.254"));
        assert_eq!(repair(state).unwrap(), 1);
        assert_eq!(tables(), "");
    });
}

#[test]
fn what_groups_say_stays_for_who_comes_next() {
    in_namespace(|state| {
        let web: GroupId = "sg-1".parse().unwrap();
        let peer = Peer::Net("10.0.0.0/8".parse().unwrap());
        let rule = Rule { egress: false, protocol: Protocol::Tcp(80, 80), peer };
        let group = Group { id: web.clone(), rules: vec![rule], members: Default::default() };
        crate::set_groups(state, "home-1", std::slice::from_ref(&group)).unwrap();
        assert_eq!(tables(), "", "without a guest there is none");
        let address = Address {
            ip: Ipv4Addr::new(172, 31, 17, 9),
            more: vec![],
            mac: "0a:00:00:00:00:09".parse().unwrap(),
            subnet: "172.31.16.0/20".parse().unwrap(),
            network: Network::alone(),
            groups: vec![web],
        };
        let mut net = GuestNet::up_as(state, &address, 1, 1500, vec![]).unwrap();
        let taps = net.take_taps();
        assert!(tables().contains("ip saddr 10.0.0.0/8 tcp dport 80 goto keep_in"), "{}", tables());
        net.leave();
        let generation = nft::generation().unwrap();
        let mut net = GuestNet::adopt(state, address.ip, 1500, vec![]).unwrap();
        crate::set_groups(state, "home-1", std::slice::from_ref(&group)).unwrap();
        assert_eq!(nft::generation().unwrap(), generation, "what is as it should be is not touched");
        // A table of another program changes nothing, and neither does its own way of working.
        Command::new("nft").args(["add", "table", "inet", "other"]).status().unwrap();
        net.place(&Address { groups: vec![GroupId::alone()], ..address }).unwrap();
        assert!(tables().contains("jump alone-in") && !tables().contains("sg-1"), "{}", tables());
        assert_eq!(nft::generation().unwrap(), generation + 2, "one change, and the other's");
        crate::set_groups(state, "home-1", &[]).unwrap();
        assert_eq!(nft::generation().unwrap(), generation + 2);
        drop((net, taps));
    });
}

#[test]
fn each_region_tells_of_its_own_groups() {
    in_namespace(|state| {
        let group = |id: &str, port| {
            let peer = Peer::Net("10.0.0.0/8".parse().unwrap());
            let rule = Rule { egress: false, protocol: Protocol::Tcp(port, port), peer };
            Group { id: id.parse().unwrap(), rules: vec![rule], members: Default::default() }
        };
        // As the version before kept them, which knew one region only.
        fs::write(state.join("groups.json"), serde_json::to_vec(&[group("sg-1", 80)]).unwrap()).unwrap();
        let address = Address {
            ip: Ipv4Addr::new(172, 31, 17, 9),
            more: vec![],
            mac: "0a:00:00:00:00:09".parse().unwrap(),
            subnet: "172.31.16.0/20".parse().unwrap(),
            network: Network::alone(),
            groups: vec!["sg-1".parse().unwrap(), "sg-2".parse().unwrap()],
        };
        let net = GuestNet::up_as(state, &address, 1, 1500, vec![]).unwrap();
        let open = |port| tables().contains(&format!("tcp dport {port} goto keep_in"));
        crate::set_groups(state, "home-2", &[group("sg-2", 443)]).unwrap();
        assert!(open(80) && open(443), "{}", tables());
        crate::set_groups(state, "home-1", &[group("sg-1", 81)]).unwrap();
        assert!(!open(80) && open(81) && open(443), "{}", tables());
        assert!(!state.join("groups.json").exists());
        crate::set_groups(state, "home-2", &[]).unwrap();
        assert!(open(81) && !open(443), "{}", tables());
        assert!(matches!(crate::set_groups(state, "../x", &[]), Err(NetError::State { .. })));
        drop(net);
    });
}

#[test]
fn addresses_that_lead_elsewhere_are_no_guests() {
    in_namespace(|state| {
        for line in ["link set lo up", "addr add 10.9.0.1/16 dev lo", "route add 10.77.0.0/16 dev lo"] {
            assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
        }
        let of = |vpc: &str, cidr: &str, last: u8| {
            let cidr: Ipv4Net = cidr.parse().unwrap();
            Address {
                ip: Ipv4Addr::from(u32::from(cidr.network()) + u32::from(last)),
                more: vec![],
                mac: MacAddr::new([2, 0, 0, 0, 0, last]).unwrap(),
                subnet: cidr,
                network: Network { id: vpc.parse().unwrap(), cidr, routes: vec![] },
                groups: vec![],
            }
        };
        let up = |address: &Address| GuestNet::up_as(state, address, 1, 1500, vec![]);
        let own = of("vpc-1", "10.1.0.0/24", 9);
        let net = up(&own).unwrap();
        assert!(tables().contains("10.1.0.9"), "{}", tables());
        let before = nft::generation().unwrap();
        for (cidr, with) in [
            ("10.1.0.0/16", "vpc-1"),
            ("10.1.0.0/28", "vpc-1"),
            ("10.9.7.0/24", "link lo"),
            ("10.77.1.0/24", "link lo"),
            ("172.31.16.0/20", "default"),
        ] {
            let other = of("vpc-2", cidr, 8);
            for refused in [crate::room(state, &other.network), up(&other).map(drop)] {
                let Err(NetError::Overlaps { with: told, .. }) = &refused else {
                    panic!("{cidr}: {refused:?}")
                };
                assert!(told.contains(with), "{told}");
            }
        }
        assert_eq!(nft::generation().unwrap(), before);
        let same = up(&of("vpc-1", "10.1.0.0/24", 10)).unwrap();
        let other = up(&of("vpc-2", "10.2.0.0/24", 11)).unwrap();
        drop((net, same));
        crate::room(state, &of("vpc-2", "10.1.0.0/16", 8).network).unwrap();
        drop(other);
        assert_eq!(tables(), "");
    });
}

#[test]
fn what_another_program_flushes_is_put_anew() {
    in_namespace(|state| {
        let net = up(state);
        let there = || nft::listing().unwrap();
        let whole = there();
        let watch = crate::Watch::start(state).unwrap();
        for other in
            ["flush ruleset", "flush chain inet hutch leaving", "delete element inet hutch to4 { \"hu\" }"]
        {
            let other = other.replace("\"hu\"", "\"huac1f0ffe\" . 172.31.15.254");
            let done = Command::new("nft").arg(&other).status().unwrap();
            assert!(done.success(), "{other}");
            assert_ne!(there(), whole);
            let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while there() != whole {
                assert!(std::time::Instant::now() < until, "{other}: {}", tables());
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        drop(watch);
        // Without anybody who watches, the next one mends it.
        Command::new("nft").args(["flush", "ruleset"]).status().unwrap();
        repair(state).unwrap();
        assert_eq!(there(), whole);
        drop(net);
        assert_eq!(tables(), "");
    });
}

#[test]
fn a_change_that_was_cut_short_is_not_believed() {
    in_namespace(|state| {
        let net = up(state);
        let there = || nft::listing().unwrap();
        let whole = there();
        // As if a process had ended between the kernel and the files.
        fs::remove_file(state.join("applied")).unwrap();
        Command::new("nft")
            .arg("add element inet hutch to4 { \"huac1f0ffe\" . 172.31.9.9 }")
            .status()
            .unwrap();
        crate::set_groups(state, "home-1", &[]).unwrap();
        assert_eq!(there(), whole);
        drop(net);
    });
}
