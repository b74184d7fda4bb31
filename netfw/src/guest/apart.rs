//! Whose addresses are whose: a network's must not be another's here, for one host routes them all.
//!
//! Default networks are the exception: they have the same range, and their subnets are given out so that they differ.

use std::net::Ipv4Addr;
use std::path::Path;

use ipnet::Ipv4Net;

use super::{NetError, VPC, name_servers};
use crate::kept::{Kept, Record};
use crate::name::TAP_PREFIX;
use crate::nft::Network;

/// Whether guests can be in a network on this host now.
///
/// # Errors
/// [`NetError::Overlaps`]; [`NetError::State`].
pub fn room(state: &Path, network: &Network) -> Result<(), NetError> {
    check(&Kept::open(state)?.records, network)
}

pub(super) fn check(records: &[Record], network: &Network) -> Result<(), NetError> {
    let cidr = network.cidr;
    if cidr == VPC {
        return Ok(());
    }
    let overlaps = |net: &Ipv4Net| net.contains(&cidr) || cidr.contains(net);
    let others = records.iter().map(|record| &record.network).filter(|other| other.id != network.id);
    let others = others.map(|other| (other.cidr, format!("{} of {}", other.cidr, other.id)));
    let own = links().into_iter().map(|(net, link)| (net, format!("{net} on the host's link {link}")));
    let servers = name_servers().into_iter().map(|ip| (Ipv4Net::from(ip), format!("the name server {ip}")));
    let default = (VPC, format!("{VPC}, the default networks'"));
    match [default].into_iter().chain(others).chain(own).chain(servers).find(|(net, _)| overlaps(net)) {
        Some((_, with)) => Err(NetError::Overlaps { network: network.id.clone(), cidr, with }),
        None => Ok(()),
    }
}

/// The networks that the host is in or has a route to, but for what it reaches by default; each with its link.
fn links() -> Vec<(Ipv4Net, String)> {
    let mut found: Vec<(Ipv4Net, String)> = Vec::new();
    for address in nix::ifaddrs::getifaddrs().into_iter().flatten() {
        let ip = |address: Option<nix::sys::socket::SockaddrStorage>| Some(address?.as_sockaddr_in()?.ip());
        let (Some(ip), Some(mask)) = (ip(address.address), ip(address.netmask)) else { continue };
        let net = Ipv4Net::with_netmask(ip, mask).map(|net| net.trunc());
        found.extend(net.ok().map(|net| (net, address.interface_name)));
    }
    let table = std::fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    found.extend(table.lines().skip(1).filter_map(route));
    found.retain(|(net, link)| !link.starts_with(TAP_PREFIX) && net.prefix_len() > 0);
    found
}

/// A line of the kernel's table: link, destination, gateway, flags, three more, mask; numbers are in memory's order.
fn route(line: &str) -> Option<(Ipv4Net, String)> {
    let fields: Vec<_> = line.split_ascii_whitespace().collect();
    let ip = |at: usize| {
        let number = u32::from_str_radix(fields.get(at)?, 16).ok()?;
        Some(Ipv4Addr::from(number.to_ne_bytes()))
    };
    let net = Ipv4Net::with_netmask(ip(1)?, ip(7)?).ok()?;
    Some((net, (*fields.first()?).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_table_is_a_route() {
        let line = "eth0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0";
        assert_eq!(route(line), Some(("10.0.0.0/8".parse().unwrap(), "eth0".into())));
        assert_eq!(route("eth0\t0000000A"), None);
    }
}
