//! A guest's network as a whole: rules, then the tap, then DHCP; and all of it undone at the end.
//!
//! ```text
//!   GuestNet::up ── firewall (kept.rs) ─► tap ─► address and route, up ─► DHCP, RA
//!   drop         ── DHCP, RA ─► tap ─► the guest's elements; the last one takes the tables along
//! ```
//! Its public address, if it has any, comes and goes meanwhile: elastic.rs. Who dies without saying so leaves elements for a tap that is gone, which lead nowhere; the next start and
//! [`crate::repair`] take them out.

pub(crate) mod apart;
pub(crate) mod elastic;
mod place;

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use nix::sys::socket::{Backlog, SockType, listen};

use crate::dhcp::{Lease, Server};
use crate::kept::{self, Kept, Record, gateway};
use crate::name::{GroupId, MacAddr, NameError, TapName};
use crate::nft::{self, Guest, Network, NftError};
use crate::ra::{self, GATEWAY6, METADATA6, PREFIX6, Router};
use crate::tap::{self, Ends, TapError};

pub use elastic::Public;
use elastic::Published;

/// The default VPC: the addresses of all guests that are in no VPC of somebody's own.
pub const VPC: Ipv4Net = match Ipv4Net::new(Ipv4Addr::new(172, 31, 0, 0), 16) {
    Ok(net) => net,
    Err(_) => panic!("a prefix of 16 bits is one"),
};
/// The default VPC's first subnet.
pub const SUBNET: Ipv4Net = match Ipv4Net::new(Ipv4Addr::new(172, 31, 0, 0), 20) {
    Ok(net) => net,
    Err(_) => panic!("a prefix of 20 bits is one"),
};
/// Addresses that EC2 keeps for itself at the start of a subnet.
const RESERVED: u32 = 4;
/// The MTU of a guest's link, in bytes.
pub const MTU: u16 = 1500;
/// How long a tap may take to go when nobody has it any more.
const GONE: Duration = Duration::from_millis(500);
/// The most queues of a tap.
const QUEUES: u32 = 8;
/// Where networks are recorded.
const RUN_DIR: &str = "/run/hutch";

/// How many queues the tap of a machine with so many virtual CPUs has: one for each, up to 8.
pub fn queues(vcpus: u32) -> usize {
    vcpus.clamp(1, QUEUES) as usize
}

/// Where the networks of this process's network namespace are recorded while they are up: taps of another namespace are
/// not to be seen from here, and would be taken for dead.
///
/// # Errors
/// The namespace cannot be told.
pub fn records_dir() -> io::Result<PathBuf> {
    let namespace = fs::metadata("/proc/self/ns/net")?.ino();
    Ok(Path::new(RUN_DIR).join(format!("net-{namespace}")))
}

/// The host's name servers, but for those that only the host can reach.
pub fn name_servers() -> Vec<Ipv4Addr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver")?.trim().parse().ok());
    servers.filter(|ip: &Ipv4Addr| !ip.is_loopback()).take(3).collect()
}

/// Why a guest has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The firewall.
    #[error(transparent)]
    Firewall(#[from] NftError),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Where networks are recorded.
    #[error("cannot use {path}; run as root, or without a network (--net none)")]
    State {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address that was asked for.
    #[error("{ip} with {mac} cannot be given: another guest has the address or the MAC; end that one first")]
    Taken {
        /// The address.
        ip: Ipv4Addr,
        /// The hardware address.
        mac: MacAddr,
    },
    /// Addresses of the network are somebody else's on this host.
    #[error(
        "the addresses {cidr} of {network} overlap {with}, which this host reaches otherwise; take a VPC with another CIDR block"
    )]
    Overlaps {
        /// The network.
        network: GroupId,
        /// Its addresses.
        cidr: Ipv4Net,
        /// What has some of them.
        with: String,
    },
    /// The public address, or one more private one, is another guest's still.
    #[error("{ip} leads to the guest {by}; disassociate or unassign it there first")]
    Led {
        /// The address.
        ip: Ipv4Addr,
        /// Where it leads.
        by: Ipv4Addr,
    },
    /// The public address is the host's own.
    #[error("{0} is an address of this host; take it out of addresses.toml")]
    Own(Ipv4Addr),
    /// There is nothing to adopt.
    #[error("no guest with the address {0} is up; start it")]
    Gone(Ipv4Addr),
    /// All addresses are taken.
    #[error("all addresses of {SUBNET} are taken; stop a guest")]
    Full,
    /// Nothing can be advertised.
    #[error("cannot advertise IPv6 on {tap}")]
    Router {
        /// The tap.
        tap: TapName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The metadata service has no port.
    #[error(
        "cannot listen on port {} of {tap}, for the metadata service; does another program hold it?",
        nft::METADATA_PORT
    )]
    Metadata {
        /// The tap.
        tap: TapName,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// DHCP cannot be served.
    #[error("cannot serve DHCP on {tap}")]
    Dhcp {
        /// The tap.
        tap: TapName,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The name of the tap of the guest with an address.
///
/// # Errors
/// None that can be: the name is one.
pub fn tap_of(ip: Ipv4Addr) -> Result<TapName, NameError> {
    format!("hu{:08x}", u32::from(ip)).parse()
}

/// What somebody else chose for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Its IPv4 address, of its subnet.
    pub ip: Ipv4Addr,
    /// More of them, that its lease does not tell: the guest takes them by itself.
    pub more: Vec<Ipv4Addr>,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its subnet; the first address is the gateway's.
    pub subnet: Ipv4Net,
    /// The network that the subnet is of.
    pub network: Network,
    /// Its security groups.
    pub groups: Vec<GroupId>,
}

/// A guest's network; dropping it undoes it.
pub struct GuestNet {
    /// The guest's address.
    pub ip: Ipv4Addr,
    /// The IPv6 address that it gives itself, where the host has IPv6.
    pub ip6: Option<Ipv6Addr>,
    /// Its hardware address.
    pub mac: MacAddr,
    guest: Guest,
    subnet: Ipv4Net,
    state: PathBuf,
    taps: Vec<File>,
    public: Option<Published>,
    metadata: Vec<TcpListener>,
    server: Option<Server>,
    router: Option<Router>,
    /// Whether the drop undoes it.
    undone: bool,
}

impl GuestNet {
    /// Gives a guest its network in this process's network namespace: an address of [`SUBNET`] that nobody has, a tap of
    /// so many `queues`, NAT out by the host's default route. `state` is a directory that holds what is to be undone.
    ///
    /// # Errors
    /// See [`NetError`]; nothing is left behind.
    pub fn up(state: &Path, queues: usize, mtu: u16, dns: Vec<Ipv4Addr>) -> Result<GuestNet, NetError> {
        let kept = Kept::open(state)?;
        let taken: Vec<Ipv4Addr> = kept.records.iter().map(|r| r.ip).collect();
        let first = u32::from(SUBNET.network()) + RESERVED;
        // From the end: the daemon, which knows its own guests only, gives addresses from the beginning.
        let free =
            (first..u32::from(SUBNET.broadcast())).rev().map(Ipv4Addr::from).find(|ip| !taken.contains(ip));
        let ip = free.ok_or(NetError::Full)?;
        let [a, b, c, d] = ip.octets();
        let mac = MacAddr::new([0x02, 0x68, a, b, c, d]).ok_or(NetError::Full)?;
        let (network, groups) = (Network::alone(), vec![GroupId::alone()]);
        let address = Address { ip, more: Vec::new(), mac, subnet: SUBNET, network, groups };
        GuestNet::begin(state, kept, &address, queues, mtu, dns)
    }

    /// As [`GuestNet::up`], with the address and the MAC that somebody else chose for it.
    ///
    /// # Errors
    /// [`NetError::Taken`], [`NetError::Overlaps`], or [`NetError::Firewall`] for an address that is not of its network; nothing
    /// is left behind.
    pub fn up_as(
        state: &Path,
        address: &Address,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<GuestNet, NetError> {
        let kept = Kept::open(state)?;
        let Address { ip, mac, subnet, .. } = *address;
        if let Some(ip) = address.more.iter().copied().chain([ip]).find(|ip| !subnet.contains(ip)) {
            let what = "the guest's address".into();
            return Err(NftError::OutOfRange { what, ip, range: subnet }.into());
        }
        let own = mac.to_string();
        let taken = |record: &Record| record.has(ip) || address.more.iter().any(|ip| record.has(*ip));
        // The tap is named by the address: what follows would overwrite the other's record.
        if kept.records.iter().any(|record| taken(record) || record.mac == own) {
            return Err(NetError::Taken { ip, mac });
        }
        apart::check(&kept.records, &address.network)?;
        GuestNet::begin(state, kept, address, queues, mtu, dns)
    }

    /// Serves a guest that an earlier process brought up and left, or was killed: its rules are looked at, its tap, which
    /// its machine holds, stays as it is.
    ///
    /// # Errors
    /// [`NetError::Gone`], and those of the services, which leave the guest as it was.
    pub fn adopt(state: &Path, ip: Ipv4Addr, mtu: u16, dns: Vec<Ipv4Addr>) -> Result<GuestNet, NetError> {
        let mut kept = Kept::open(state)?;
        let record = kept.records.iter().find(|record| record.ip == ip).ok_or(NetError::Gone(ip))?;
        let guest = record.guest().ok_or(NetError::Gone(ip))?;
        let mut net = GuestNet::unserved(state, guest, record.subnet);
        let public = record.public.clone();
        // Until all of it is served, an error must not take the network from a machine that runs.
        net.undone = false;
        net.take_up(&mut kept, public);
        net.route_more(&mut kept)?;
        kept.put()?;
        net.serve(mtu, dns)?;
        net.undone = true;
        Ok(net)
    }

    /// Ends what is served here and leaves the rest as it is, to be adopted.
    pub fn leave(mut self) {
        self.undone = false;
    }

    /// A guest of which nothing is up or served.
    fn unserved(state: &Path, guest: Guest, subnet: Ipv4Net) -> GuestNet {
        GuestNet {
            ip: guest.ip4,
            ip6: guest.ip6,
            mac: guest.mac,
            guest,
            subnet,
            state: state.to_owned(),
            taps: Vec::new(),
            public: None,
            metadata: Vec::new(),
            server: None,
            router: None,
            undone: true,
        }
    }

    /// Records the guest and brings it up.
    fn begin(
        state: &Path,
        mut kept: Kept,
        address: &Address,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<GuestNet, NetError> {
        let Address { ip, mac, subnet, .. } = *address;
        let more = address.more.clone();
        let tap = tap_of(ip).map_err(|_| NetError::Full)?;
        let ip6 = tap::has_ipv6().then(|| ra::address(PREFIX6, mac));
        let (groups, network) = (address.groups.clone(), address.network.clone());
        let guest = Guest {
            tap: tap.clone(),
            mac,
            ip4: ip,
            more: more.clone(),
            ip6,
            gateway: gateway(subnet),
            network: network.clone(),
            groups: groups.clone(),
        };

        let was_off = kept.records.first().map_or_else(kept::forwarding_is_off, |r| r.forwarding_was_off);
        let forwards = kept.uplink.is_some() && was_off;
        let record = Record {
            tap: tap.to_string(),
            mac: mac.to_string(),
            ip,
            more,
            ip6,
            subnet,
            network,
            groups,
            public: None,
            forwarding_was_off: forwards,
        };
        // Recorded first, so that whatever happens next can be undone by someone else.
        kept.announce(&record)?;
        let mut net = GuestNet::unserved(state, guest, subnet);
        kept.records.push(record);
        let done = net.bring_up(&mut kept, forwards, queues, mtu, dns);
        // What was begun is undone by the drop, which takes the lock too.
        drop(kept);
        done.map(|()| net)
    }

    /// Rules, then the tap, then what is served on it.
    fn bring_up(
        &mut self,
        kept: &mut Kept,
        forwards: bool,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<(), NetError> {
        let tap = self.guest.tap.clone();
        kept.put()?;
        self.taps = tap::create(&tap, queues)?;
        let mut ends = vec![Ends { host: self.guest.gateway.into(), guest: Some(self.ip.into()) }];
        if let Some(ip6) = self.ip6 {
            ends.push(Ends { host: ra::ROUTER.into(), guest: None });
            ends.push(Ends { host: METADATA6.into(), guest: None });
            ends.push(Ends { host: GATEWAY6.into(), guest: Some(ip6.into()) });
        }
        tap::configure(&tap, mtu, &ends)?;
        self.route_more(kept)?;
        if forwards {
            kept::forward()?;
        }
        self.serve(mtu, dns)
    }

    /// Opens what is served on the tap, which is up.
    fn serve(&mut self, mtu: u16, dns: Vec<Ipv4Addr>) -> Result<(), NetError> {
        let tap = self.guest.tap.clone();
        let failed = |source| NetError::Metadata { tap: tap.clone(), source };
        self.metadata = vec![metadata_listener(&tap).map_err(failed)?];
        if self.ip6.is_some() {
            self.metadata.push(tap::listener6(&tap, nft::METADATA_PORT).map_err(failed)?);
            let started = Router::start(&tap, PREFIX6, mtu);
            self.router = Some(started.map_err(|source| NetError::Router { tap: tap.clone(), source })?);
        }
        let (subnet, gateway) = (self.subnet, self.guest.gateway);
        let lease = Lease { mac: self.mac, ip: self.ip, subnet, gateway, dns, mtu };
        let served = Server::start(&tap, lease);
        self.server = Some(served.map_err(|source| NetError::Dhcp { tap, source })?);
        Ok(())
    }

    /// Where the guest's requests to 169.254.169.254 arrive, and nobody else's; and, where the host has IPv6, those to
    /// fd00:ec2::254.
    pub fn take_metadata_listeners(&mut self) -> Vec<TcpListener> {
        std::mem::take(&mut self.metadata)
    }

    /// The tap's queues, for the machine; the tap lives as long as anyone holds one.
    pub fn take_taps(&mut self) -> Vec<File> {
        std::mem::take(&mut self.taps)
    }
}

/// The socket to which the firewall leads the guest's requests for metadata.
fn metadata_listener(tap: &TapName) -> io::Result<TcpListener> {
    let fd = tap::bound(tap, SockType::Stream, nft::METADATA_PORT)?;
    listen(&fd, Backlog::new(64)?)?;
    Ok(TcpListener::from(fd))
}

impl Drop for GuestNet {
    fn drop(&mut self) {
        self.server = None;
        self.router = None;
        self.metadata.clear();
        let last = !self.taps.is_empty();
        self.taps.clear();
        if !self.undone {
            return;
        }
        // A process that is just being started holds what we had open, until it is another program.
        let tap = self.guest.tap.to_string();
        let until = Instant::now() + GONE;
        while last && nix::net::if_::if_nametoindex(tap.as_str()).is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        // What cannot be undone now is undone by the next start.
        let Ok(mut kept) = Kept::open(&self.state) else { return };
        kept.forget(&tap);
        if let Err(error) = kept.settle() {
            tracing::warn!(tap = %self.guest.tap, %error, "its rules are left");
        }
    }
}

#[cfg(test)]
mod tests;
