//! Router advertisements (RFC 4861) for one guest on its tap: which prefix its link has, so that it gives itself the address
//! that the firewall expects (RFC 4862, with the interface identifier of its MAC).
//!
//! The router offers no default route: nothing of IPv6 leaves the host yet, and a route that leads nowhere would make every
//! connection of the guest wait.

use std::io::{self, Read};
use std::net::{Ipv6Addr, SocketAddrV6};

use ipnet::Ipv6Net;
use socket2::{Domain, Protocol, Socket, Type};

use crate::name::{MacAddr, TapName};
use crate::served::{Served, TICK};

/// The router's address on every tap.
pub const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The prefix of guests' own IPv6 addresses: unique local (RFC 4193), since none leaves the host.
pub const PREFIX6: Ipv6Net = match Ipv6Net::new(Ipv6Addr::new(0xfd68, 0x7574, 0x6368, 0, 0, 0, 0, 0), 64) {
    Ok(net) => net,
    Err(_) => panic!("a prefix of 64 bits is one"),
};
/// The host's own address in it.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd68, 0x7574, 0x6368, 0, 0, 0, 0, 1);
/// Where a guest asks for its metadata by IPv6: EC2's address, on every tap.
pub const METADATA6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// ICMPv6 types (RFC 4861, 4.1 and 4.2).
const SOLICITATION: u8 = 133;
const ADVERTISEMENT: u8 = 134;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// The address that a guest with this MAC gives itself in `prefix`, of 64 bits (RFC 4291, appendix A).
pub fn address(prefix: Ipv6Net, mac: MacAddr) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.bytes();
    let identifier = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from(u128::from(prefix.network()) | u128::from(identifier))
}

/// What the guest is told: the prefix, on its link and for addresses of its own, for ever; that the metadata service is on
/// its link, which needs no route then; and the MTU.
fn advertisement(prefix: Ipv6Net, mtu: u16) -> Vec<u8> {
    let mut packet = vec![ADVERTISEMENT, 0, 0, 0, 64, 0, 0, 0];
    // Reachable and retransmission times: the guest's own.
    packet.extend([0; 8]);
    // Prefix information (4.6.2): on link, autonomous; lifetimes without end.
    packet.extend([3, 4, prefix.prefix_len(), 0xc0]);
    packet.extend([0xff; 8]);
    packet.extend([0; 4]);
    packet.extend(prefix.network().octets());
    packet.extend([3, 4, 128, 0x80]);
    packet.extend([0xff; 8]);
    packet.extend([0; 4]);
    packet.extend(METADATA6.octets());
    // MTU (4.6.4).
    packet.extend([5, 1, 0, 0]);
    packet.extend(u32::from(mtu).to_be_bytes());
    packet
}

/// A router on one tap; dropping it ends it.
pub struct Router {
    _served: Served,
}

impl Router {
    /// Answers solicitations on `tap`, which is up and has [`ROUTER`] as an address.
    ///
    /// # Errors
    /// The socket's: no permission, no IPv6.
    pub fn start(tap: &TapName, prefix: Ipv6Net, mtu: u16) -> io::Result<Router> {
        let index = nix::net::if_::if_nametoindex(tap.to_string().as_str())?;
        let mut socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.bind_device(Some(tap.to_string().as_bytes()))?;
        socket.join_multicast_v6(&ALL_ROUTERS, index)?;
        // Others are not believed (6.1.2).
        socket.set_multicast_hops_v6(255)?;
        socket.set_read_timeout(Some(TICK))?;
        let packet = advertisement(prefix, mtu);
        let to = SocketAddrV6::new(ALL_NODES, 0, 0, index).into();
        let mut asked = [0; 256];
        let turn = move || {
            // An error is a tick without a packet. That it comes from the link itself (hop limit 255), the firewall has
            // checked.
            let Ok(len) = socket.read(&mut asked) else { return };
            if len >= 8 && asked.first() == Some(&SOLICITATION) {
                // The guest is alone on its link, and asks again if this is lost.
                let _ = socket.send_to(&packet, &to);
            }
        };
        Ok(Router { _served: Served::start(format!("ra {tap}"), turn)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_address_is_made_of_its_mac() {
        let mac = "02:68:ac:1f:00:04".parse().unwrap();
        let prefix = "fd68:7574:6368::/64".parse().unwrap();
        assert_eq!(address(prefix, mac).to_string(), "fd68:7574:6368:0:68:acff:fe1f:4");
    }

    #[test]
    fn an_advertisement_is_what_the_rfc_has() {
        let packet = advertisement("fd68:7574:6368::/64".parse().unwrap(), 1500);
        assert_eq!(packet.len(), 16 + 2 * 32 + 8);
        // No flags; a router lifetime of 0.
        assert_eq!(packet[4..8], [64, 0, 0, 0]);
        assert_eq!(packet[16..20], [3, 4, 64, 0xc0]);
        assert_eq!(packet[32..38], [0xfd, 0x68, 0x75, 0x74, 0x63, 0x68]);
        assert_eq!(packet[48..52], [3, 4, 128, 0x80]);
        assert_eq!(packet[64..80], METADATA6.octets());
        assert_eq!(packet[80..], [5, 1, 0, 0, 0, 0, 5, 220]);
    }
}
