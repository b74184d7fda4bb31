//! DHCP (RFC 2131) for one guest on its tap: whoever asks with the guest's address gets the guest's lease, nobody else
//! anything.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use dhcproto::v4::{DhcpOption, Message, MessageType, Opcode};
use dhcproto::{Encodable, Encoder};
use ipnet::Ipv4Net;
use nix::sys::socket::{SockType, setsockopt, sockopt};

use crate::name::{MacAddr, TapName};
use crate::served::{Served, TICK};
use crate::tap;

/// Message types of guests that are answered (RFC 2132, 9.6).
const DISCOVER: u8 = 1;
const REQUEST: u8 = 3;
const INFORM: u8 = 8;
/// EC2's lease time: an hour.
const LEASE: u32 = 3600;

/// What a guest is told.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Who is told.
    pub mac: MacAddr,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its subnet.
    pub subnet: Ipv4Net,
    /// Gateway and DHCP server.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// Its link's MTU.
    pub mtu: u16,
}

impl Lease {
    /// EC2's name for an address: `ip-172-31-0-5`.
    pub fn hostname(&self) -> String {
        let [a, b, c, d] = self.ip.octets();
        format!("ip-{a}-{b}-{c}-{d}")
    }

    /// The answer to `packet`, if there is one.
    pub fn answer(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let request = Request::parse(packet)?;
        if request.mac != self.mac.bytes() {
            return None;
        }
        let kind = match request.kind {
            DISCOVER => MessageType::Offer,
            // It chose another server's offer.
            REQUEST if request.server.is_some_and(|server| server != self.gateway) => return None,
            REQUEST if request.wanted.unwrap_or(request.ciaddr) == self.ip => MessageType::Ack,
            REQUEST => MessageType::Nak,
            INFORM => MessageType::Ack,
            _ => return None,
        };
        let mut reply = Message::default();
        reply.set_opcode(Opcode::BootReply).set_xid(request.xid);
        reply.set_flags(request.flags.into()).set_chaddr(&request.mac);
        let options = reply.opts_mut();
        options.insert(DhcpOption::MessageType(kind));
        options.insert(DhcpOption::ServerIdentifier(self.gateway));
        if kind != MessageType::Nak {
            options.insert(DhcpOption::SubnetMask(self.subnet.netmask()));
            options.insert(DhcpOption::Router(vec![self.gateway]));
            options.insert(DhcpOption::BroadcastAddr(self.subnet.broadcast()));
            options.insert(DhcpOption::Hostname(self.hostname()));
            options.insert(DhcpOption::InterfaceMtu(self.mtu));
            if !self.dns.is_empty() {
                options.insert(DhcpOption::DomainNameServer(self.dns.clone()));
            }
            if request.kind != INFORM {
                options.insert(DhcpOption::AddressLeaseTime(LEASE));
                reply.set_yiaddr(self.ip);
            }
            reply.set_siaddr(self.gateway);
        }
        let mut bytes = Vec::new();
        reply.encode(&mut Encoder::new(&mut bytes)).ok()?;
        // Shorter ones are dropped by old clients (RFC 1542, 2.1).
        bytes.resize(bytes.len().max(300), 0);
        Some(bytes)
    }
}

/// What is read of a guest's packet (RFC 2131, section 2; RFC 2132). dhcproto decodes more, and panics on some of it,
/// so only answers are left to it.
struct Request {
    kind: u8,
    xid: u32,
    flags: u16,
    ciaddr: Ipv4Addr,
    mac: [u8; 6],
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Request {
    fn parse(packet: &[u8]) -> Option<Request> {
        // A request, from Ethernet, with addresses of six bytes; the options follow the magic cookie.
        let (head, options) = packet.split_at_checked(240)?;
        if !head.starts_with(&[1, 1, 6]) || !head.ends_with(&[99, 130, 83, 99]) {
            return None;
        }
        let mut request = Request {
            kind: 0,
            xid: u32::from_be_bytes(*head.get(4..)?.first_chunk()?),
            flags: u16::from_be_bytes(*head.get(10..)?.first_chunk()?),
            ciaddr: Ipv4Addr::from(*head.get(12..)?.first_chunk::<4>()?),
            mac: *head.get(28..)?.first_chunk()?,
            wanted: None,
            server: None,
        };
        let mut rest = options;
        while let Some((&code, after)) = rest.split_first().filter(|(code, _)| **code != 255) {
            if code == 0 {
                rest = after;
                continue;
            }
            let (&len, after) = after.split_first()?;
            let (value, after) = after.split_at_checked(len.into())?;
            rest = after;
            match (code, value) {
                (53, &[kind]) => request.kind = kind,
                (50, &[a, b, c, d]) => request.wanted = Some(Ipv4Addr::new(a, b, c, d)),
                (54, &[a, b, c, d]) => request.server = Some(Ipv4Addr::new(a, b, c, d)),
                _ => {}
            }
        }
        Some(request)
    }
}

/// A server on one tap; dropping it ends it.
pub struct Server {
    _served: Served,
}

impl Server {
    /// Serves `lease` on `tap`, which is up and has the gateway's address.
    ///
    /// # Errors
    /// The socket's: no permission, or a port that is taken.
    pub fn start(tap: &TapName, lease: Lease) -> io::Result<Server> {
        let socket = socket(tap)?;
        let mut packet = [0; 2048];
        let turn = move || {
            // An error is a tick without a packet, or a packet that was none.
            let Ok(len) = socket.recv(&mut packet) else { return };
            if let Some(answer) = packet.get(..len).and_then(|packet| lease.answer(packet)) {
                // The guest has no address yet: all are told, and it is alone on its link. It asks again if this is lost.
                let _ = socket.send_to(&answer, SocketAddrV4::new(Ipv4Addr::BROADCAST, 68));
            }
        };
        Ok(Server { _served: Served::start(format!("dhcp {tap}"), turn)? })
    }
}

/// UDP port 67 of one tap only.
fn socket(tap: &TapName) -> io::Result<UdpSocket> {
    let fd = tap::bound(tap, SockType::Datagram, 67)?;
    setsockopt(&fd, sockopt::Broadcast, &true)?;
    let socket = UdpSocket::from(fd);
    socket.set_read_timeout(Some(TICK))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use dhcproto::{Decodable, Decoder};

    use super::*;

    fn lease() -> Lease {
        Lease {
            mac: "02:00:00:00:00:05".parse().unwrap(),
            ip: Ipv4Addr::new(172, 31, 0, 5),
            subnet: "172.31.0.0/20".parse().unwrap(),
            gateway: Ipv4Addr::new(172, 31, 0, 1),
            dns: vec![Ipv4Addr::new(9, 9, 9, 9)],
            mtu: 1500,
        }
    }

    fn request(kind: MessageType, mac: [u8; 6], options: &[DhcpOption]) -> Vec<u8> {
        let mut message = Message::default();
        message.set_opcode(Opcode::BootRequest).set_xid(77).set_chaddr(&mac);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in options {
            message.opts_mut().insert(option.clone());
        }
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).unwrap();
        bytes
    }

    fn answer(kind: MessageType, options: &[DhcpOption]) -> Option<Message> {
        let bytes = lease().answer(&request(kind, lease().mac.bytes(), options))?;
        Some(Message::decode(&mut Decoder::new(&bytes)).unwrap())
    }

    #[test]
    fn a_guest_gets_its_lease_and_no_other() {
        let offer = answer(MessageType::Discover, &[]).unwrap();
        assert_eq!((offer.opts().msg_type(), offer.yiaddr()), (Some(MessageType::Offer), lease().ip));
        let wanted = |ip| [DhcpOption::RequestedIpAddress(ip)];
        let ack = answer(MessageType::Request, &wanted(lease().ip)).unwrap();
        assert_eq!(
            (ack.opts().msg_type(), ack.yiaddr(), ack.xid()),
            (Some(MessageType::Ack), lease().ip, 77)
        );
        let has = |option| ack.opts().iter().any(|(_, o)| *o == option);
        assert!(has(DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 240, 0))));
        assert!(has(DhcpOption::Router(vec![lease().gateway])));
        assert!(has(DhcpOption::Hostname("ip-172-31-0-5".into())));
        assert!(has(DhcpOption::InterfaceMtu(1500)) && has(DhcpOption::AddressLeaseTime(3600)));

        let nak = answer(MessageType::Request, &wanted(Ipv4Addr::new(172, 31, 0, 6))).unwrap();
        assert_eq!((nak.opts().msg_type(), nak.yiaddr()), (Some(MessageType::Nak), Ipv4Addr::UNSPECIFIED));
    }

    #[test]
    fn others_get_nothing() {
        let lease = lease();
        assert!(lease.answer(&request(MessageType::Discover, [2, 0, 0, 0, 0, 6], &[])).is_none());
        let other = DhcpOption::ServerIdentifier(Ipv4Addr::new(172, 31, 0, 2));
        assert!(answer(MessageType::Request, &[other]).is_none());
        assert!(answer(MessageType::Release, &[]).is_none());
        assert!(lease.answer(&[]).is_none());
    }

    #[test]
    fn arbitrary_packets_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let good =
            request(MessageType::Request, lease().mac.bytes(), &[DhcpOption::RequestedIpAddress(lease().ip)]);
        for _ in 0..20_000 {
            let mut packet = good.clone();
            for _ in 0..1 + next() % 6 {
                let at = 236 * usize::from(next() % 3 > 0) + next() as usize % 30;
                if let Some(byte) = packet.get_mut(at) {
                    *byte = next() as u8;
                }
            }
            packet.truncate(next() as usize % (packet.len() + 1) + 200);
            let _ = lease().answer(&packet);
        }
    }
}
