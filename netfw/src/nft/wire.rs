//! A host with guests and a world beyond its uplink, in a network namespace: the other ends of all links are descriptors of
//! the test, which writes and reads the packets.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::process::Command;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::*;
use crate::tap::{self, Ends};

/// Where a packet comes from or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Guest(usize),
    World,
}

/// A packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: u8,
    /// Source and destination port; or type and code.
    pub ports: (u16, u16),
    /// TCP's flags.
    pub flags: u8,
    /// What it is known by.
    pub mark: u32,
}

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;
/// A virtio header (linux/virtio_net.h).
const VNET: usize = 10;
const HOST_UP: Hardware = [2, 0, 0, 0, 9, 1];
const WORLD: Hardware = [2, 0, 0, 0, 9, 2];
type Hardware = [u8; 6];

impl Packet {
    /// The packet as it is on the wire, after the Ethernet header.
    fn bytes(&self) -> Vec<u8> {
        let mut body = vec![0; 24];
        match self.protocol {
            6 => {
                body[0..2].copy_from_slice(&self.ports.0.to_be_bytes());
                body[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
                body[4..8].copy_from_slice(&1u32.to_be_bytes());
                (body[12], body[13], body[14]) = (5 << 4, self.flags, 0xff);
            }
            17 => {
                body[0..2].copy_from_slice(&self.ports.0.to_be_bytes());
                body[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
                body[4..6].copy_from_slice(&24u16.to_be_bytes());
            }
            1 | 58 => {
                (body[0], body[1]) = (self.ports.0 as u8, self.ports.1 as u8);
                body[4..8].copy_from_slice(&self.mark.to_be_bytes());
            }
            _ => {}
        }
        body[20..24].copy_from_slice(&self.mark.to_be_bytes());
        let (from, to) = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => (from.octets().to_vec(), to.octets().to_vec()),
            (IpAddr::V6(from), IpAddr::V6(to)) => (from.octets().to_vec(), to.octets().to_vec()),
            _ => panic!("one family"),
        };
        let at = match self.protocol {
            6 => Some(16),
            17 => Some(6),
            1 | 58 => Some(2),
            _ => None,
        };
        if let Some(at) = at {
            let pseudo = [&from[..], &to, &[0, self.protocol, 0, 24]].concat();
            let sum = checksum(&[if self.protocol == 1 { &[] } else { &pseudo[..] }, &body].concat());
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let mut packet = Vec::new();
        if self.from.is_ipv4() {
            packet.extend([0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, self.protocol, 0, 0]);
            packet.extend(from);
            packet.extend(to);
            let sum = checksum(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        } else {
            packet.extend([0x60, 0, 0, 0, 0, 24, self.protocol, 64]);
            packet.extend(from);
            packet.extend(to);
        }
        packet.extend(body);
        packet
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// The host, as this thread's network namespace.
pub struct Wire {
    pub guests: Vec<Guest>,
    taps: Vec<File>,
    /// The host's hardware addresses, of the taps.
    gateways: Vec<Hardware>,
    up: File,
    marks: u32,
}

/// An address of the world.
pub const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn set(path: &str, value: &str) {
    std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
}

fn nonblocking(file: &File) {
    fcntl(file, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).unwrap();
}

/// Runs `test` in a network namespace of its own; says so where there is none to be had.
pub fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let run = move || {
        if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
            eprintln!("SKIPPED: a network namespace: {e}");
            return;
        }
        if !std::path::Path::new("/dev/net/tun").exists() || Command::new("nft").arg("-v").output().is_err() {
            eprintln!("SKIPPED: no /dev/net/tun, or no nft");
            return;
        }
        test();
    };
    std::thread::spawn(run).join().unwrap();
}

impl Wire {
    /// So many guests, whose taps are up; the firewall is the test's.
    pub fn new(guests: usize) -> Wire {
        ip("link set lo up");
        set("ipv4/ip_forward", "1");
        set("ipv6/conf/all/forwarding", "1");
        let tap = "hu0".parse().unwrap();
        let up = tap::create_called("up0", &tap, 1).unwrap().remove(0);
        nonblocking(&up);
        for line in [
            "link set up0 address 02:00:00:00:09:01 up",
            "addr add 192.0.2.1/24 dev up0",
            "route add default via 192.0.2.2",
            "neigh add 192.0.2.2 lladdr 02:00:00:00:09:02 dev up0 nud permanent",
        ] {
            ip(line);
        }
        let mut wire =
            Wire { guests: Vec::new(), taps: Vec::new(), gateways: Vec::new(), up, marks: 0x5eed_0000 };
        for n in 0..guests {
            let guest = Guest {
                tap: format!("hu0000000{n:x}").parse().unwrap(),
                mac: MacAddr::new([2, 0, 0, 0, 0, n as u8]).unwrap(),
                ip4: Ipv4Addr::new(172, 31, 0, 10 + n as u8),
                more: vec![],
                ip6: Some(Ipv6Addr::new(0xfd68, 0, 0, 0, 0, 0, 0, 10 + n as u16)),
                gateway: Ipv4Addr::new(172, 31, 0, 1),
                network: Network::alone(),
                groups: vec![],
            };
            let file = tap::create(&guest.tap, 1).unwrap().remove(0);
            nonblocking(&file);
            let ends = [
                Ends { host: guest.gateway.into(), guest: Some(guest.ip4.into()) },
                Ends { host: GATEWAY6.into(), guest: guest.ip6.map(IpAddr::V6) },
            ];
            tap::configure(&guest.tap, 1500, &ends).unwrap();
            for address in [IpAddr::V4(guest.ip4), guest.ip6.unwrap().into()] {
                ip(&format!("neigh add {address} lladdr {} dev {} nud permanent", guest.mac, guest.tap));
            }
            wire.gateways.push(hardware(&guest.tap.to_string()));
            wire.guests.push(guest);
            wire.taps.push(file);
        }
        wire
    }

    /// The firewall of these guests with these groups.
    pub fn rules(&self, groups: &[Group]) -> Ruleset {
        let mut rules = Ruleset::new("172.31.0.0/16".parse().unwrap(), Some("up0".parse().unwrap()));
        rules = rules.with_groups(groups.to_vec());
        for guest in &self.guests {
            rules.add(guest.clone()).unwrap();
        }
        rules
    }

    pub fn ip(&self, end: End, six: bool) -> IpAddr {
        match end {
            End::World => FAR.into(),
            End::Guest(n) if six => self.guests[n].ip6.unwrap().into(),
            End::Guest(n) => self.guests[n].ip4.into(),
        }
    }

    /// A packet, known by a mark of its own.
    pub fn packet(&mut self, from: End, to: End, six: bool, protocol: u8, ports: (u16, u16)) -> Packet {
        self.marks += 1;
        let (from, to) = (self.ip(from, six), self.ip(to, six));
        Packet { from, to, protocol, ports, flags: SYN, mark: self.marks }
    }

    /// Sends from one end; whether it comes out at another, as it was. `expected` is waited for.
    pub fn passes(&mut self, from: End, to: End, packet: Packet, expected: bool) -> bool {
        self.send(from, packet);
        let until =
            std::time::Instant::now() + std::time::Duration::from_millis(if expected { 500 } else { 0 });
        loop {
            if self.received(to).contains(&packet.mark) {
                return true;
            }
            if std::time::Instant::now() >= until {
                return false;
            }
            let file = if let End::Guest(n) = to { &self.taps[n] } else { &self.up };
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(20u8)).unwrap();
        }
    }

    pub fn send(&mut self, from: End, packet: Packet) {
        let (file, source) = match from {
            End::Guest(n) => (&mut self.taps[n], self.guests[n].mac.bytes()),
            End::World => (&mut self.up, WORLD),
        };
        let destination = match from {
            End::Guest(n) => self.gateways[n],
            End::World => HOST_UP,
        };
        let mut frame = vec![0; VNET];
        frame.extend(destination);
        frame.extend(source);
        frame.extend(if packet.from.is_ipv4() { [0x08, 0x00] } else { [0x86, 0xdd] });
        frame.extend(packet.bytes());
        file.write_all(&frame).unwrap();
    }

    /// The marks of what has come out at an end.
    pub fn received(&mut self, end: End) -> Vec<u32> {
        let file = if let End::Guest(n) = end { &mut self.taps[n] } else { &mut self.up };
        let mut frame = [0; 2048];
        let mut marks = Vec::new();
        while let Ok(len) = file.read(&mut frame) {
            if let Some(last) = frame.get(len.saturating_sub(4)..len) {
                marks.push(u32::from_be_bytes(last.try_into().unwrap()));
            }
        }
        marks
    }
}

/// The hardware address of a link.
fn hardware(link: &str) -> Hardware {
    let addresses = nix::ifaddrs::getifaddrs().unwrap().filter(|a| a.interface_name == link);
    let found = addresses.filter_map(|a| a.address?.as_link_addr()?.addr()).next();
    found.unwrap()
}

/// Forgets all connections: linux/netfilter/nfnetlink_conntrack.h, `IPCTNL_MSG_CT_DELETE` of everything.
pub fn forget_connections() {
    use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
    let mut socket = Socket::new(NETLINK_NETFILTER).unwrap();
    socket.bind_auto().unwrap();
    socket.connect(&SocketAddr::new(0, 0)).unwrap();
    let mut ask = 20u32.to_ne_bytes().to_vec();
    ask.extend(((1u16 << 8) | 2).to_ne_bytes());
    // NLM_F_REQUEST and NLM_F_ACK.
    ask.extend(5u16.to_ne_bytes());
    ask.extend([0; 12]);
    socket.send(&ask, 0).unwrap();
    let (answer, _) = socket.recv_from_full().unwrap();
    assert_eq!(answer[16..20], [0; 4], "no error");
}
