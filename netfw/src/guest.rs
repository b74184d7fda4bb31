//! A guest's network as a whole: rules, then the tap, then DHCP; and all of it undone at the end.
//!
//! ```text
//!   GuestNet::up ── firewall (whole, or one more guest) ─► tap ─► address and route, up ─► DHCP, RA
//!   drop         ── DHCP, RA ─► tap ─► the guest's elements; the last one takes the tables along
//! ```
//! Its public address, if it has any, comes and goes meanwhile: elastic.rs. Who dies without saying so leaves elements for a tap that is gone, which lead nowhere; the next start and
//! [`repair`] take them out.

mod elastic;

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{Backlog, SockType, listen};
use serde::{Deserialize, Serialize};

use crate::dhcp::{Lease, Server};
use crate::name::{MacAddr, TAP_PREFIX, TapName, Uplink};
use crate::nft::{self, Guest, NftError, Ruleset};
use crate::ra::{self, GATEWAY6, METADATA6, PREFIX6, Router};
use crate::tap::{self, Ends, TapError};

pub use elastic::Public;
use elastic::Published;

/// The default VPC: all guests' addresses are from it.
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
/// The most queues of a tap.
const QUEUES: u32 = 8;
/// Where networks are recorded.
const RUN_DIR: &str = "/run/hutch";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

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
    /// There is nothing to adopt.
    #[error("no guest with the address {0} is up; start it")]
    Gone(Ipv4Addr),
    /// The public address is another guest's still.
    #[error("{ip} leads to the guest {by}; disassociate it there first")]
    Led {
        /// The public address.
        ip: Ipv4Addr,
        /// Where it leads.
        by: Ipv4Addr,
    },
    /// The public address is the host's own.
    #[error("{0} is an address of this host; take it out of addresses.toml")]
    Own(Ipv4Addr),
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

/// A guest, as recorded for those who come after a crash.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    tap: String,
    mac: String,
    ip: Ipv4Addr,
    #[serde(default)]
    ip6: Option<Ipv6Addr>,
    #[serde(default = "first_subnet")]
    subnet: Ipv4Net,
    #[serde(default)]
    open_tcp: Vec<(u16, u16)>,
    #[serde(default)]
    public: Option<Published>,
    /// Forwarding was off before the first guest came.
    forwarding_was_off: bool,
}

impl Record {
    fn guest(&self) -> Option<Guest> {
        Some(Guest {
            tap: self.tap.parse().ok()?,
            mac: self.mac.parse().ok()?,
            ip4: self.ip,
            ip6: self.ip6,
            gateway: gateway(self.subnet),
            open_tcp: self.open_tcp.clone(),
        })
    }
    fn alive(&self) -> bool {
        nix::net::if_::if_nametoindex(self.tap.as_str()).is_ok()
    }
}

fn first_subnet() -> Ipv4Net {
    SUBNET
}

/// The gateway of a subnet's guests: its first address, as in EC2.
fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

/// What somebody else chose for a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Its IPv4 address, of its subnet.
    pub ip: Ipv4Addr,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its subnet, of [`VPC`]; the first address is the gateway's.
    pub subnet: Ipv4Net,
    /// Inbound TCP ports that are open to everyone, as ranges.
    pub open_tcp: Vec<(u16, u16)>,
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
        let lock = lock(state)?;
        let records = clean(state)?;
        let taken: Vec<Ipv4Addr> = records.iter().map(|r| r.ip).collect();
        let first = u32::from(SUBNET.network()) + RESERVED;
        // From the end: the daemon, which knows its own guests only, gives addresses from the beginning.
        let free =
            (first..u32::from(SUBNET.broadcast())).rev().map(Ipv4Addr::from).find(|ip| !taken.contains(ip));
        let ip = free.ok_or(NetError::Full)?;
        let [a, b, c, d] = ip.octets();
        let mac = MacAddr::new([0x02, 0x68, a, b, c, d]).ok_or(NetError::Full)?;
        let address = Address { ip, mac, subnet: SUBNET, open_tcp: Vec::new() };
        GuestNet::begin(state, lock, records, &address, queues, mtu, dns)
    }

    /// As [`GuestNet::up`], with the address and the MAC that somebody else chose for it.
    ///
    /// # Errors
    /// [`NetError::Taken`], or [`NetError::Firewall`] for an address that is not of [`VPC`]; nothing is left behind.
    pub fn up_as(
        state: &Path,
        address: &Address,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<GuestNet, NetError> {
        let lock = lock(state)?;
        let records = clean(state)?;
        let Address { ip, mac, subnet, .. } = *address;
        if !subnet.contains(&ip) {
            let what = "the guest's address".into();
            return Err(NftError::OutOfRange { what, ip, range: subnet }.into());
        }
        let own = mac.to_string();
        // The tap is named by the address: what follows would overwrite the other's record.
        if records.iter().any(|record| record.ip == ip || record.mac == own) {
            return Err(NetError::Taken { ip, mac });
        }
        GuestNet::begin(state, lock, records, address, queues, mtu, dns)
    }

    /// Serves a guest that an earlier process brought up and left, or was killed: its rules are put in anew, its tap,
    /// which its machine holds, stays as it is.
    ///
    /// # Errors
    /// [`NetError::Gone`], and those of the services, which leave the guest as it was.
    pub fn adopt(state: &Path, ip: Ipv4Addr, mtu: u16, dns: Vec<Ipv4Addr>) -> Result<GuestNet, NetError> {
        let _lock = lock(state)?;
        let records = clean(state)?;
        let record = records.iter().find(|record| record.ip == ip).ok_or(NetError::Gone(ip))?;
        let guest = record.guest().ok_or(NetError::Gone(ip))?;
        let mut net = GuestNet::unserved(state, guest, record.subnet);
        // Until all of it is served, an error must not take the network from a machine that runs.
        net.undone = false;
        put_rules(&records, default_uplink())?;
        net.take_up(record)?;
        net.serve(mtu, dns)?;
        net.undone = true;
        Ok(net)
    }

    /// Ends what is served here and leaves the rest as it is, to be adopted.
    pub fn leave(mut self) {
        self.undone = false;
    }

    /// Opens these inbound TCP ports to everyone, and no others. What is established stays.
    ///
    /// # Errors
    /// [`NetError::State`] or [`NetError::Firewall`]; the rules are then as they were, or are mended by the next call.
    pub fn open_tcp(&mut self, ports: &[(u16, u16)]) -> Result<(), NetError> {
        if self.guest.open_tcp == ports {
            return Ok(());
        }
        let _lock = lock(&self.state)?;
        let mut records = clean(&self.state)?;
        let own = records.iter_mut().find(|record| record.ip == self.ip).ok_or(NetError::Gone(self.ip))?;
        own.open_tcp = ports.to_vec();
        write_record(&self.state, own)?;
        put_rules(&records, default_uplink())?;
        self.guest.open_tcp = ports.to_vec();
        Ok(())
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
        lock: Flock<File>,
        mut records: Vec<Record>,
        address: &Address,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<GuestNet, NetError> {
        let Address { ip, mac, subnet, .. } = *address;
        let [a, b, c, d] = ip.octets();
        let tap: TapName = format!("hu{a:02x}{b:02x}{c:02x}{d:02x}").parse().map_err(|_| NetError::Full)?;
        let ip6 = tap::has_ipv6().then(|| ra::address(PREFIX6, mac));
        let open_tcp = address.open_tcp.clone();
        let guest = Guest {
            tap: tap.clone(),
            mac,
            ip4: ip,
            ip6,
            gateway: gateway(subnet),
            open_tcp: open_tcp.clone(),
        };

        let uplink = default_uplink();
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let was_off =
            records.first().map_or(text(Path::new(FORWARDING)).trim() == "0", |r| r.forwarding_was_off);
        let record = Record {
            tap: tap.to_string(),
            mac: mac.to_string(),
            ip,
            ip6,
            subnet,
            open_tcp,
            public: None,
            forwarding_was_off: was_off && uplink.is_some(),
        };
        // Recorded first, so that whatever happens next can be undone by someone else.
        write_record(state, &record)?;
        let mut net = GuestNet::unserved(state, guest, subnet);
        records.push(record);
        let done = net.bring_up(&records, uplink, was_off, queues, mtu, dns);
        // What was begun is undone by the drop, which takes the lock too.
        drop(lock);
        done.map(|()| net)
    }

    /// Rules, then the tap, then what is served on it.
    fn bring_up(
        &mut self,
        records: &[Record],
        uplink: Option<Uplink>,
        forwarding_is_off: bool,
        queues: usize,
        mtu: u16,
        dns: Vec<Ipv4Addr>,
    ) -> Result<(), NetError> {
        let tap = self.guest.tap.clone();
        put_rules(records, uplink.clone())?;
        self.taps = tap::create(&tap, queues)?;
        let mut ends = vec![Ends { host: self.guest.gateway.into(), guest: Some(self.ip.into()) }];
        if let Some(ip6) = self.ip6 {
            ends.push(Ends { host: ra::ROUTER.into(), guest: None });
            ends.push(Ends { host: GATEWAY6.into(), guest: Some(ip6.into()) });
            ends.push(Ends { host: METADATA6.into(), guest: None });
        }
        tap::configure(&tap, mtu, &ends)?;
        if uplink.is_some() && forwarding_is_off {
            let path = PathBuf::from(FORWARDING);
            fs::write(&path, "1").map_err(|source| NetError::State { path, source })?;
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

/// Puts the whole firewall of these guests into the kernel.
fn put_rules(records: &[Record], uplink: Option<Uplink>) -> Result<(), NetError> {
    let public = nft::nat::render(&elastic::pairs(records), uplink.as_ref());
    let mut rules = Ruleset::new(VPC, uplink);
    for guest in records.iter().filter_map(Record::guest) {
        rules.add(guest)?;
    }
    Ok(nft::apply(&(rules.render() + &public))?)
}

fn default_uplink() -> Option<Uplink> {
    tap::default_link().and_then(|name| name.parse().ok())
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
        self.taps.clear();
        if !self.undone {
            return;
        }
        // What cannot be undone now is undone by the next start.
        let Ok(_lock) = lock(&self.state) else { return };
        if let Ok(records) = records(&self.state) {
            records.iter().filter(|record| record.ip == self.ip).for_each(elastic::withdraw);
        }
        let _ = fs::remove_file(record_path(&self.state, &self.guest.tap.to_string()));
        let _ = nft::apply(&nft::render_remove(&self.guest));
        let _ = finish(&self.state, true);
    }
}

/// Takes out what machines left that died without a word. Returns how many there were.
///
/// # Errors
/// See [`NetError`].
pub fn repair(state: &Path) -> Result<usize, NetError> {
    let _lock = lock(state)?;
    let before = records(state)?.len();
    let alive = clean(state)?;
    // An uplink that went down has forgotten what it announces.
    alive.iter().try_for_each(elastic::republish)?;
    finish(state, before != alive.len() || nft::is_present())?;
    Ok(before - alive.len())
}

/// Removes records and elements of taps that are gone; returns the others.
fn clean(state: &Path) -> Result<Vec<Record>, NetError> {
    let (alive, dead): (Vec<_>, Vec<_>) = records(state)?.into_iter().partition(Record::alive);
    for record in dead {
        elastic::withdraw(&record);
        if let Some(guest) = record.guest() {
            // Without tables there are no elements either.
            let _ = nft::apply(&nft::render_remove(&guest));
        }
        let path = record_path(state, &record.tap);
        fs::remove_file(&path).map_err(|source| NetError::State { path, source })?;
    }
    Ok(alive)
}

/// Without guests there are no tables, and forwarding is as it was. While any tap of ours is there, its machine alive
/// though its record be lost, the tables stay: they are what drops by the prefix.
fn finish(state: &Path, changed: bool) -> Result<(), NetError> {
    if changed && records(state)?.is_empty() && !any_tap() {
        nft::apply(&[nft::render_teardown(), nft::nat::render_teardown()].concat())?;
        let was_off = state.join("forwarding-was-off");
        if was_off.exists() {
            let _ = fs::write(FORWARDING, "0");
            let _ = fs::remove_file(was_off);
        }
    }
    Ok(())
}

/// Whether a link of this namespace is named like our taps.
fn any_tap() -> bool {
    let Ok(links) = nix::net::if_::if_nameindex() else { return true };
    links.iter().any(|link| link.name().to_bytes().starts_with(TAP_PREFIX.as_bytes()))
}

fn lock(state: &Path) -> Result<Flock<File>, NetError> {
    let path = state.join("net.lock");
    let error = |source| NetError::State { path: path.clone(), source };
    fs::create_dir_all(state).map_err(error)?;
    let file = File::options().create(true).append(true).open(&path).map_err(error)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| error(e.into()))
}

fn record_path(state: &Path, tap: &str) -> PathBuf {
    state.join(format!("{tap}.json"))
}

fn write_record(state: &Path, record: &Record) -> Result<(), NetError> {
    let path = record_path(state, &record.tap);
    let error = |source| NetError::State { path: path.clone(), source };
    if record.forwarding_was_off {
        fs::write(state.join("forwarding-was-off"), "").map_err(error)?;
    }
    let bytes = serde_json::to_vec(record).map_err(|e| error(e.into()))?;
    // Whole or not at all: a record cut short would hide a living guest.
    let half = path.with_extension("new");
    fs::write(&half, bytes).and_then(|()| fs::rename(&half, &path)).map_err(error)
}

/// The records, in order of their taps; what is no record is passed over.
fn records(state: &Path) -> Result<Vec<Record>, NetError> {
    let error = |source| NetError::State { path: state.to_owned(), source };
    let mut records = Vec::new();
    for entry in fs::read_dir(state).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            let record = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Record>(&bytes).ok());
            records.extend(record);
        }
    }
    records.sort_by(|a, b| a.tap.cmp(&b.tap));
    Ok(records)
}

#[cfg(test)]
mod tests;
