//! Real packets: the host, its guests and its network are namespaces of threads; a guest's end of its tap is a tap there.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

use super::super::Address;
use super::super::tests::{in_namespace, tables};
use super::*;
use ipnet::Ipv4Net;

use crate::groups::{Group, Peer, Protocol, Rule};
use crate::kept::any_tap;
use crate::name::MacAddr;
use crate::nft::Network;
use crate::{nft, repair};

/// What does not come in this time does not come.
const NEVER: Duration = Duration::from_millis(400);

type Job = Box<dyn FnOnce() + Send>;

/// A thread with a network of its own.
struct Place {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Place {
    fn new() -> Place {
        let (jobs, todo) = mpsc::channel::<Job>();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            todo.into_iter().for_each(|job| job());
        });
        Place { jobs: Some(jobs), thread: Some(thread) }
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        self.jobs.as_ref().unwrap().send(Box::new(move || drop(done.send(job())))).unwrap();
        result.recv().unwrap()
    }

    /// Answers everyone who connects with the address that he has here.
    fn serve(&self, port: u16) {
        let listener = self.run(move || TcpListener::bind(("0.0.0.0", port)).unwrap());
        answer(listener);
    }

    fn ask(&self, ip: [u8; 4], port: u16) -> Option<String> {
        self.run(move || ask((ip, port).into()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.jobs = None;
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn ip(words: &str) {
    let done = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(done.status.success(), "ip {words}: {}", String::from_utf8_lossy(&done.stderr));
}

fn shown(words: &str) -> String {
    String::from_utf8(Command::new("ip").args(words.split(' ')).output().unwrap().stdout).unwrap()
}

/// Tells everyone who he is, a line, and then what he says.
fn answer(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let _ = writeln!(stream, "{}", stream.peer_addr().unwrap().ip());
                let _ = std::io::copy(&mut stream.try_clone().unwrap(), &mut stream);
            });
        }
    });
}

/// A connection, and who we are to whoever answers; `None`: nobody does.
fn connect(address: SocketAddr) -> Option<(TcpStream, String)> {
    let mut stream = TcpStream::connect_timeout(&address, NEVER).ok()?;
    stream.set_read_timeout(Some(NEVER)).unwrap();
    let mut line = String::new();
    BufReader::new(&mut stream).read_line(&mut line).ok()?;
    Some((stream, line.trim().to_owned()))
}

fn ask(address: SocketAddr) -> Option<String> {
    Some(connect(address)?.1)
}

/// Whether a connection still leads to who answers.
fn lives(stream: &mut TcpStream) -> bool {
    let mut echo = [0];
    stream.write_all(b"x").is_ok() && stream.read_exact(&mut echo).is_ok()
}

/// A wire between two taps.
struct Wire {
    over: Arc<AtomicBool>,
    pump: Option<JoinHandle<()>>,
}

impl Wire {
    fn new(mut one: File, mut other: File) -> Wire {
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let pump = std::thread::spawn(move || {
            let mut frame = vec![0; 1 << 16];
            while !stop.load(Ordering::Relaxed) {
                let mut ready = [&one, &other].map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN));
                poll(&mut ready, PollTimeout::from(20u8)).unwrap();
                let ready = ready.map(|fd| fd.any().unwrap_or(false));
                // A link that is not up takes nothing, and may give an error instead of a frame.
                if ready[0]
                    && let Ok(len) = one.read(&mut frame)
                {
                    let _ = other.write(&frame[..len]);
                }
                if ready[1]
                    && let Ok(len) = other.read(&mut frame)
                {
                    let _ = one.write(&frame[..len]);
                }
            }
        });
        Wire { over, pump: Some(pump) }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        drop(self.pump.take().map(JoinHandle::join));
    }
}

/// The host's uplink, which is 192.0.2.1; and its other end.
fn uplink() -> File {
    // Our own prefix is what the kernel gives; the uplink's name is another's.
    let tap = crate::tap::create(&"huffffff01".parse().unwrap(), 1).unwrap().remove(0);
    ip("link set huffffff01 name up0 up");
    ip("addr add 192.0.2.1/24 dev up0");
    ip("route add default via 192.0.2.254");
    tap
}

/// A guest: its network on the host, and its own end.
struct Guest {
    net: Option<GuestNet>,
    place: Place,
    wire: Option<Wire>,
}

impl Guest {
    fn new(state: &Path, last: u8) -> Guest {
        let all = |egress, protocol| Rule { egress, protocol, peer: Peer::Net(Ipv4Net::default().into()) };
        let rules = vec![all(true, Protocol::All), all(false, Protocol::Tcp(80, 80))];
        Guest::of(state, last, Network::alone(), rules)
    }

    fn of(state: &Path, last: u8, network: Network, rules: Vec<Rule>) -> Guest {
        let address = Address {
            ip: Ipv4Addr::new(172, 31, 0, last),
            more: vec![],
            mac: MacAddr::new([2, 0, 0, 0, 0, last]).unwrap(),
            subnet: "172.31.0.0/20".parse().unwrap(),
            network,
            groups: vec!["sg-web".parse().unwrap()],
        };
        let web = Group { id: address.groups[0].clone(), rules, members: Default::default() };
        crate::set_groups(state, "home-1", &[web]).unwrap();
        let mut net = GuestNet::up_as(state, &address, 1, 1500, vec![]).unwrap();
        let host = net.take_taps().remove(0);
        let place = Place::new();
        let guest = place.run(move || {
            let tap = crate::tap::create(&"huffffff02".parse().unwrap(), 1).unwrap().remove(0);
            ip(&format!("link set huffffff02 address {} up", address.mac));
            ip(&format!("addr add {}/20 dev huffffff02", address.ip));
            ip("route add default via 172.31.0.1");
            tap
        });
        place.serve(80);
        place.serve(81);
        Guest { net: Some(net), place, wire: Some(Wire::new(host, guest)) }
    }

    fn net(&mut self) -> &mut GuestNet {
        self.net.as_mut().unwrap()
    }

    fn lead(&mut self, public: [u8; 4], lan: bool) {
        self.net().lead(Some(Public { ip: public.into(), lan })).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // As a machine ends: its end of the tap goes first.
        self.wire = None;
        self.net = None;
    }
}

const ONE: [u8; 4] = [198, 19, 0, 1];
const TWO: [u8; 4] = [198, 19, 0, 2];

#[test]
fn on_its_host_a_guest_is_reached_by_its_public_address_where_its_groups_let_it() {
    in_namespace(|state| {
        ip("link set lo up");
        let (mut a, mut b) = (Guest::new(state, 4), Guest::new(state, 5));
        assert_eq!(ask((ONE, 80).into()), None, "it leads nowhere");
        b.lead(ONE, false);
        // The host.
        assert_eq!(ask((ONE, 80).into()).as_deref(), Some("172.31.0.1"));
        assert_eq!(ask((ONE, 81).into()), None, "its groups do not open the port");
        // Another guest, without a public address and with one.
        assert_eq!(a.place.ask(ONE, 80).as_deref(), Some("172.31.0.4"));
        assert_eq!(a.place.ask(ONE, 81), None);
        a.lead(TWO, false);
        assert_eq!(a.place.ask(ONE, 80).as_deref(), Some("198.19.0.2"));
        assert_eq!(a.place.ask(ONE, 81), None);
        assert_eq!(a.place.ask([172, 31, 0, 5], 80).as_deref(), Some("172.31.0.4"), "the private way stays");
        // Itself.
        assert_eq!(b.place.ask(ONE, 80).as_deref(), Some("198.19.0.1"));

        // It leads to one guest only.
        let taken = a.net().lead(Some(Public { ip: ONE.into(), lan: false }));
        assert!(
            matches!(taken, Err(NetError::Led { by, .. }) if by.octets() == [172, 31, 0, 5]),
            "{taken:?}"
        );
        assert_eq!(a.net().public(), None, "and the other has none meanwhile");
        // What is open by it ends with it, and nothing else does.
        let (mut by_public, _) = connect((ONE, 80).into()).unwrap();
        let (mut by_private, _) = connect(([172, 31, 0, 5], 80).into()).unwrap();
        let (mut of_guest, _) = a.place.run(|| connect((ONE, 80).into())).unwrap();
        assert!(lives(&mut by_public) && lives(&mut by_private) && lives(&mut of_guest));
        b.net().lead(None).unwrap();
        assert!(!lives(&mut by_public) && lives(&mut by_private) && !lives(&mut of_guest));
        assert_eq!(ask((ONE, 80).into()), None, "it leads nowhere");
        assert!(!tables().contains("198.19.0."), "{}", tables());
        assert!(!shown("route").contains("198.19.0."), "{}", shown("route"));
        a.lead(ONE, false);
        assert_eq!(ask((ONE, 80).into()).as_deref(), Some("172.31.0.1"));
        drop(b);
        assert_eq!(ask((ONE, 80).into()).as_deref(), Some("172.31.0.1"));
        drop(a);
        assert_eq!(tables(), "");
        assert!(!any_tap() && Kept::open(state).unwrap().records.is_empty());
    });
}

#[test]
fn guests_of_two_networks_meet_by_public_addresses_as_far_as_everyone_may() {
    in_namespace(|state| {
        ip("link set lo up");
        let network = |id: &str, routes: &[&str]| {
            let routes = routes.iter().map(|net| net.parse().unwrap()).collect();
            Network { id: id.parse().unwrap(), routes, ..Network::alone() }
        };
        let rule = |egress, net: &str, port| {
            let protocol = if port == 0 { Protocol::All } else { Protocol::Tcp(port, port) };
            Rule { egress, protocol, peer: Peer::Net(net.parse().unwrap()) }
        };
        // Port 81 is for the network's own, of which the other's guest seems to be one.
        let rules =
            vec![rule(true, "0.0.0.0/0", 0), rule(false, "0.0.0.0/0", 80), rule(false, "172.31.0.0/16", 81)];
        let of = |last, net| Guest::of(state, last, net, rules.clone());
        let mut a = of(4, network("vpc-a", &["0.0.0.0/0"]));
        let mut b = of(5, network("vpc-b", &["0.0.0.0/0"]));
        let c = of(6, network("vpc-b", &["0.0.0.0/0"]));
        b.lead(ONE, false);
        assert_eq!(c.place.ask([172, 31, 0, 5], 81).as_deref(), Some("172.31.0.6"));
        assert_eq!([80, 81].map(|port| a.place.ask([172, 31, 0, 5], port)), [None, None]);
        assert_eq!(a.place.ask(ONE, 80).as_deref(), Some("172.31.0.4"));
        assert_eq!(a.place.ask(ONE, 81), None, "its own address means nothing there");
        a.lead(TWO, false);
        assert_eq!(a.place.ask(ONE, 80).as_deref(), Some("198.19.0.2"));
        // Both have to have a way there.
        let place = |guest: &mut Guest, network: Network| {
            let net = guest.net();
            let (ip, mac, groups) = (net.ip, net.mac, net.guest.groups.clone());
            let subnet = "172.31.0.0/20".parse().unwrap();
            net.place(&Address { ip, more: vec![], mac, subnet, network, groups }).unwrap();
        };
        let (mut open, _) = a.place.run(|| connect((ONE, 80).into())).unwrap();
        assert!(lives(&mut open));
        place(&mut a, network("vpc-a", &["203.0.113.0/24"]));
        assert!(!lives(&mut open));
        assert_eq!(a.place.ask(ONE, 80), None);
        place(&mut a, network("vpc-a", &["198.19.0.0/24"]));
        assert_eq!(a.place.ask(ONE, 80).as_deref(), Some("198.19.0.2"));
        place(&mut b, network("vpc-b", &[]));
        assert_eq!(a.place.ask(ONE, 80), None);
        assert_eq!(c.place.ask([172, 31, 0, 5], 81).as_deref(), Some("172.31.0.6"));
        assert_eq!(ask(([172, 31, 0, 5], 80).into()).as_deref(), Some("172.31.0.1"), "the host");
    });
}

#[test]
fn a_guest_has_more_addresses_while_it_is_told_so() {
    in_namespace(|state| {
        ip("link set lo up");
        const MORE: [u8; 4] = [172, 31, 0, 99];
        let (mut a, mut b) = (Guest::new(state, 4), Guest::new(state, 5));
        let c = Guest::new(state, 6);
        let place = |guest: &mut Guest, more: &[[u8; 4]]| {
            let net = guest.net();
            let Record { ip, mac, subnet, network, groups, .. } =
                Kept::open(state).unwrap().records.into_iter().find(|r| r.ip == net.ip).unwrap();
            let more = more.iter().map(|ip| (*ip).into()).collect();
            net.place(&Address { ip, more, mac: mac.parse().unwrap(), subnet, network, groups })
        };
        // It takes the address by itself, and is neither heard nor reached by it unless it is told.
        for guest in [&a, &b] {
            guest.place.run(|| ip("addr add 172.31.0.99/20 dev huffffff02"));
        }
        let says = |guest: &Guest| {
            guest.place.run(|| {
                let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::from(MORE), 0)).unwrap();
                let _ = socket.send_to(b"x", "172.31.0.6:9");
            });
            std::thread::sleep(Duration::from_millis(50));
            nft::refused(&guest.net.as_ref().unwrap().guest.tap).unwrap().outbound
        };
        // So that it knows its neighbour, and need not ask for it under an address that is not its own.
        assert!(a.place.ask([172, 31, 0, 6], 80).is_some());
        let before = says(&a);
        assert!(before > 0);
        assert_eq!(ask((MORE, 80).into()), None);
        place(&mut a, &[MORE]).unwrap();
        assert_eq!(c.place.ask(MORE, 80).as_deref(), Some("172.31.0.6"));
        assert_eq!(c.place.ask(MORE, 81), None, "its groups hold for it");
        assert_eq!(ask((MORE, 80).into()).as_deref(), Some("172.31.0.1"), "the host");
        assert_eq!(says(&a), before, "it is heard by it");
        // Another has it only when this one has not; connections end then.
        let (mut open, _) = c.place.run(|| connect((MORE, 80).into())).unwrap();
        let led = place(&mut b, &[MORE]);
        assert!(matches!(led, Err(NetError::Led { by, .. }) if by.octets() == [172, 31, 0, 4]), "{led:?}");
        assert!(lives(&mut open));
        let same = [172, 31, 0, 5].into();
        let taken = Address { ip: MORE.into(), more: vec![same], ..address(&c) };
        assert!(matches!(GuestNet::up_as(state, &taken, 1, 1500, vec![]), Err(NetError::Taken { .. })));
        // Who was killed meanwhile is found with it, whatever became of its route.
        a.net.take().unwrap().leave();
        ip("route del 172.31.0.99");
        a.net = Some(GuestNet::adopt(state, [172, 31, 0, 4].into(), 1500, vec![]).unwrap());
        assert!(lives(&mut open));
        place(&mut a, &[]).unwrap();
        assert!(!lives(&mut open));
        assert_eq!(c.place.ask(MORE, 80), None);
        place(&mut b, &[MORE]).unwrap();
        assert_eq!(c.place.ask(MORE, 80).as_deref(), Some("172.31.0.6"));
        drop(b);
        assert!(!shown("route").contains("172.31.0.99") && !tables().contains("172.31.0.99"));
    });
}

/// The address of a guest with another MAC.
fn address(guest: &Guest) -> Address {
    let net = guest.net.as_ref().unwrap();
    Address {
        ip: net.ip,
        more: vec![],
        mac: MacAddr::new([2, 0, 0, 0, 0, 0x77]).unwrap(),
        subnet: "172.31.0.0/20".parse().unwrap(),
        network: Network::alone(),
        groups: vec![],
    }
}

#[test]
fn a_lost_route_opens_nothing() {
    in_namespace(|state| {
        ip("link set lo up");
        let _uplink = uplink();
        let mut a = Guest::new(state, 4);
        a.lead(ONE, false);
        assert_eq!(ask((ONE, 80).into()).as_deref(), Some("172.31.0.1"));
        // Routed elsewhere, a packet is judged as what goes there: it must not come to the guest after all.
        ip("route del 198.19.0.1");
        assert_eq!([80, 81].map(|port| ask((ONE, port).into())), [None, None]);
        // Whoever comes next mends it.
        a.net.take().unwrap().leave();
        let mut net = GuestNet::adopt(state, [172, 31, 0, 4].into(), 1500, vec![]).unwrap();
        assert_eq!(net.public(), Some(Public { ip: ONE.into(), lan: false }));
        assert_eq!(ask((ONE, 80).into()).as_deref(), Some("172.31.0.1"));
        net.lead(None).unwrap();
        a.net = Some(net);
    });
}

#[test]
fn others_on_the_network_reach_it_and_know_it_by_it() {
    in_namespace(|state| {
        let lan = Place::new();
        ip("link set lo up");
        let theirs = lan.run(|| {
            let tap = crate::tap::create(&"huffffff03".parse().unwrap(), 1).unwrap().remove(0);
            ip("addr add 192.0.2.100/24 dev huffffff03");
            ip("link set huffffff03 up");
            tap
        });
        let _wire = Wire::new(uplink(), theirs);
        lan.serve(7000);
        let (a, mut b) = (Guest::new(state, 4), Guest::new(state, 5));
        assert_eq!(lan.ask([192, 0, 2, 8], 80), None, "nobody has it");
        b.lead([192, 0, 2, 8], true);
        let until = Instant::now() + Duration::from_secs(20);
        // What was asked for before is asked for again by and by.
        while lan.ask([192, 0, 2, 8], 80).as_deref() != Some("192.0.2.100") {
            assert!(Instant::now() < until, "it is not announced");
        }
        assert_eq!(lan.ask([192, 0, 2, 8], 81), None, "its groups do not open the port");
        assert_eq!(lan.ask([192, 0, 2, 9], 80), None, "no other address is answered for");
        assert_eq!(ask(([192, 0, 2, 8], 80).into()).as_deref(), Some("172.31.0.1"), "the host");
        assert_eq!(a.place.ask([192, 0, 2, 8], 80).as_deref(), Some("172.31.0.4"), "another guest");
        // What it says itself is said by its public address; who has none is the host.
        assert_eq!(b.place.ask([192, 0, 2, 100], 7000).as_deref(), Some("192.0.2.8"));
        assert_eq!(a.place.ask([192, 0, 2, 100], 7000).as_deref(), Some("192.0.2.1"));
        // An address of this host only means nothing out there.
        let mut a = a;
        a.lead(ONE, false);
        assert_eq!(a.place.ask([192, 0, 2, 100], 7000).as_deref(), Some("192.0.2.1"));

        let own = a.net().lead(Some(Public { ip: [192, 0, 2, 1].into(), lan: true }));
        assert!(matches!(own, Err(NetError::Own(_))), "{own:?}");
        assert!(shown("neigh show proxy").contains("192.0.2.8"));
        // An uplink that was down has forgotten it.
        ip("neigh del proxy 192.0.2.8 dev up0");
        assert_eq!(repair(state).unwrap(), 0);
        assert!(shown("neigh show proxy").contains("192.0.2.8"));
        b.net().lead(None).unwrap();
        assert_eq!(lan.ask([192, 0, 2, 8], 80), None);
        assert!(!shown("neigh show proxy").contains("192.0.2.8"));
        assert_eq!(b.place.ask([192, 0, 2, 100], 7000).as_deref(), Some("192.0.2.1"));
    });
}

#[test]
fn who_dies_leaves_no_public_address_behind() {
    in_namespace(|state| {
        ip("link set lo up");
        let _uplink = uplink();
        let (mut a, b) = (Guest::new(state, 4), Guest::new(state, 5));
        a.lead([192, 0, 2, 8], true);
        // As if the process had ended here; then the machine.
        a.net.take().unwrap().leave();
        drop(a);
        assert!(tables().contains("192.0.2.8"));
        assert_eq!(repair(state).unwrap(), 1);
        assert!(!tables().contains("192.0.2.8"), "{}", tables());
        assert_eq!(shown("neigh show proxy"), "");
        drop(b);
        assert_eq!(tables(), "");
    });
}

#[test]
fn a_guest_asks_for_its_metadata_by_both_protocols_and_reaches_nothing_else_there() {
    in_namespace(|state| {
        ip("link set lo up");
        let mut a = Guest::new(state, 4);
        let listeners = a.net().take_metadata_listeners();
        assert_eq!(a.place.ask([169, 254, 169, 254], 80), None, "nobody answers yet");
        let both = listeners.len() == 2;
        listeners.into_iter().for_each(answer);
        assert_eq!(a.place.ask([169, 254, 169, 254], 80).as_deref(), Some("172.31.0.4"));
        if !both {
            eprintln!("SKIPPED: no IPv6 here");
            return;
        }
        // Something else of the host's.
        answer(TcpListener::bind((Ipv6Addr::UNSPECIFIED, 8080)).unwrap());
        let metadata = crate::ra::METADATA6;
        let until = Instant::now() + Duration::from_secs(20);
        let own = a.net().ip6.unwrap();
        while a.place.run(move || ask((metadata, 80).into())) != Some(own.to_string()) {
            // It waits for an advertisement, and for nobody to have its address.
            assert!(Instant::now() < until, "{}", a.place.run(|| shown("-6 addr") + &shown("-6 route")));
        }
        for port in [8080, nft::METADATA_PORT] {
            assert_eq!(a.place.run(move || ask((metadata, port).into())), None, "{port}");
        }
        // Neither another guest nor the host comes there.
        let b = Guest::new(state, 5);
        for own in [metadata, crate::ra::GATEWAY6] {
            assert_eq!(ask((own, nft::METADATA_PORT).into()), None, "the host, as {own}");
        }
        assert_eq!(b.place.run(move || ask((own, 80).into())), None);
    });
}
