//! Taps: one link a guest, routed, never bridged. A tap is gone when the last of its descriptors is closed.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{self, SockFlag, SockType, SockaddrIn, sockopt};

use crate::name::TapName;

mod tun {
    // TUNSETIFF is declared with an int, and takes an ifreq (linux/if_tun.h).
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Why a tap could not be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel gives no taps.
    #[error("cannot open /dev/net/tun; load the module tun, and run as root")]
    NoTun(#[source] io::Error),
    /// The name is another's.
    #[error("the tap {0} is in use by another program; end that, or remove the tap (ip link del {0})")]
    Busy(TapName),
    /// The kernel refused.
    #[error("{tap}: cannot {what}")]
    Refused {
        /// The tap.
        tap: TapName,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Makes the tap `name` with so many `queues` (1 to 8), in this thread's network namespace. It is down.
///
/// # Errors
/// See [`TapError`]; nothing is left.
pub fn create(name: &TapName, queues: usize) -> Result<Vec<File>, TapError> {
    create_called(&name.to_string(), name, queues)
}

/// Likewise, of any name; errors tell `name`.
pub(crate) fn create_called(text: &str, name: &TapName, queues: usize) -> Result<Vec<File>, TapError> {
    // Without the flag for many queues, a second opening of the same name is refused, which is what tells that it is taken.
    let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    if nix::net::if_::if_nametoindex(text).is_ok() {
        return Err(TapError::Busy(name.clone()));
    }
    let mut taps = Vec::new();
    for _ in 0..queues {
        let tap = File::options().read(true).write(true).open("/dev/net/tun").map_err(TapError::NoTun)?;
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open and the request is a valid ifreq.
        unsafe { tun::set_interface(tap.as_raw_fd(), &request) }.map_err(|e| match e {
            nix::errno::Errno::EBUSY => TapError::Busy(name.clone()),
            e => TapError::Refused { tap: name.clone(), what: "make the tap", source: e.into() },
        })?;
        taps.push(tap);
    }
    Ok(taps)
}

/// Makes the host the guest's gateway on its tap, and routes the guest's address there. Call it when the firewall knows
/// the guest: afterwards the tap is up.
///
/// # Errors
/// The kernel's. What was done goes away with the tap.
pub fn configure(name: &TapName, mtu: u16, ends: &[Ends]) -> Result<(), TapError> {
    let refused = |what| move |source| TapError::Refused { tap: name.clone(), what, source };
    for (key, value) in [
        // Only the addresses given below, and nobody's advertisements.
        ("ipv6/conf/{}/addr_gen_mode", "1"),
        ("ipv6/conf/{}/accept_ra", "0"),
        ("ipv6/conf/{}/accept_redirects", "0"),
        ("ipv6/conf/{}/disable_ipv6", if ends.iter().any(|ends| ends.host.is_ipv6()) { "0" } else { "1" }),
        ("ipv4/conf/{}/rp_filter", "1"),
        ("ipv4/conf/{}/accept_redirects", "0"),
        ("ipv4/conf/{}/send_redirects", "0"),
        // The guest believes that its neighbours are on its link: the host answers for them, and then decides.
        ("ipv4/conf/{}/proxy_arp", "1"),
        ("ipv4/neigh/{}/proxy_delay", "0"),
        ("ipv4/conf/{}/forwarding", "1"),
    ] {
        let path = format!("/proc/sys/net/{}", key.replace("{}", &name.to_string()));
        match std::fs::write(path, value) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && key.starts_with("ipv6") => {}
            done => done.map_err(refused("set the tap's sysctls"))?,
        }
    }
    let index = nix::net::if_::if_nametoindex(name.to_string().as_str());
    let index = index.map_err(|e| refused("find the tap")(e.into()))?;
    let mut kernel = Route::open().map_err(refused("talk to the kernel"))?;

    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link.attributes.push(LinkAttribute::Mtu(mtu.into()));
    kernel.ask(RouteNetlinkMessage::SetLink(link), 0).map_err(refused("bring the tap up"))?;

    for ends in ends {
        kernel
            .ask(ends.address(index), NLM_F_CREATE | NLM_F_EXCL)
            .map_err(refused("give the tap an address"))?;
        if let Some(route) = ends.route(index) {
            // Exclusive: an address that is routed already is another guest's.
            kernel.ask(route, NLM_F_CREATE | NLM_F_EXCL).map_err(refused("route the guest's address"))?;
        }
    }
    Ok(())
}

/// Whether this host speaks IPv6 at all.
pub fn has_ipv6() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv6/conf/all/disable_ipv6").is_ok_and(|off| off.trim() == "0")
}

/// The two ends of a tap in one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// The host's address.
    pub host: IpAddr,
    /// The guest's; none, where there is nothing to route.
    pub guest: Option<IpAddr>,
}

impl Ends {
    fn address(&self, index: u32) -> RouteNetlinkMessage {
        let mut address = AddressMessage::default();
        let link_local = matches!(self.host, IpAddr::V6(ip) if ip.is_unicast_link_local());
        address.header.family = family(self.host);
        address.header.prefix_len = if link_local { 64 } else { bits(self.host) };
        address.header.index = index;
        // IPv6 tells the scope by the address itself.
        address.header.scope = if self.host.is_ipv4() { AddressScope::Link } else { AddressScope::Universe };
        address.attributes = vec![AddressAttribute::Local(self.host), AddressAttribute::Address(self.host)];
        if self.host.is_ipv6() {
            // There is nobody who could have it.
            address
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute));
        }
        RouteNetlinkMessage::NewAddress(address)
    }

    fn route(&self, index: u32) -> Option<RouteNetlinkMessage> {
        let to = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => RouteAddress::Inet(ip),
            IpAddr::V6(ip) => RouteAddress::Inet6(ip),
        };
        let guest = self.guest?;
        let mut route = RouteMessage::default();
        route.header.address_family = family(guest);
        route.header.destination_prefix_length = bits(guest);
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = RouteProtocol::Static;
        route.header.scope = if guest.is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
        route.header.kind = RouteType::Unicast;
        route.attributes.push(RouteAttribute::Destination(to(guest)));
        route.attributes.push(RouteAttribute::PrefSource(to(self.host)));
        route.attributes.push(RouteAttribute::Oif(index));
        Some(RouteNetlinkMessage::NewRoute(route))
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// The bits of a whole address.
fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

/// A socket on `port` that only this tap reaches. Each tap can have one on the same port.
pub(crate) fn bound(tap: &TapName, kind: SockType, port: u16) -> io::Result<OwnedFd> {
    let fd = socket::socket(socket::AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    socket::setsockopt(&fd, sockopt::BindToDevice, &tap.to_string().into())?;
    socket::bind(fd.as_raw_fd(), &SockaddrIn::new(0, 0, 0, 0, port))?;
    Ok(fd)
}

/// A listener for IPv6 on `port` that only this tap reaches. Each tap can have one on the same port.
pub(crate) fn listener6(tap: &TapName, port: u16) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None)?;
    socket.set_only_v6(true)?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(tap.to_string().as_bytes()))?;
    socket.bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0).into())?;
    socket.listen(64)?;
    Ok(socket.into())
}

/// The link that the default route of this thread's network namespace leaves by; `None` without one.
pub fn default_link() -> Option<String> {
    let table = std::fs::read_to_string("/proc/thread-self/net/route").ok()?;
    let default = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        fields.next() == Some("00000000") && fields.nth(5) == Some("00000000")
    };
    table.lines().skip(1).find(default)?.split_ascii_whitespace().next().map(str::to_owned)
}

/// A conversation with the kernel about links, addresses, routes and neighbours.
pub(crate) struct Route(Socket);

impl Route {
    pub(crate) fn open() -> io::Result<Route> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Route(socket))
    }

    pub(crate) fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) => error.code.map_or(Ok(()), |_| Err(error.to_io())),
            _ => Err(io::Error::other("the kernel answered something else")),
        }
    }
}
