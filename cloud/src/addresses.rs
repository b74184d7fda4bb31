//! Public addresses: those that the owner of the machine has, or that mean something on this host only.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::Deserialize;

/// Addresses of benchmarks (RFC 2544, RFC 6890): nobody's in any network, so they can be routed on this host alone. The upper
/// half, since programs that make addresses up like to begin with the lower one.
const HOST_ONLY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 19, 0, 0), 20);
/// The most addresses of a pool.
const MOST: u64 = 1 << 16;

/// Where public addresses are taken from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// First and last of each range, in order, apart.
    ranges: Vec<(u32, u32)>,
    lan: bool,
}

/// Why `addresses.toml` cannot be.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// It is no such file.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// One of its lines.
    #[error("{0:?} {1}")]
    Range(String, &'static str),
    /// The file as a whole.
    #[error("{0}")]
    Whole(&'static str),
}

/// `addresses.toml`.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[derive(Default)]
struct File {
    lan: Vec<String>,
    host_only: Vec<String>,
}

impl Default for Pool {
    fn default() -> Pool {
        let ends = (u32::from(HOST_ONLY.network()), u32::from(HOST_ONLY.broadcast()));
        Pool { ranges: vec![ends], lan: false }
    }
}

impl Pool {
    /// Reads `addresses.toml`: `lan`, addresses of the local network that nobody else has, or `host-only`, others than the
    /// built-in ones; each a list of addresses, `FIRST-LAST` or `ADDRESS/BITS`.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(text: &str) -> Result<Pool, PoolError> {
        let file: File = toml::from_str(text)?;
        let lan = !file.lan.is_empty();
        let lines = match (lan, file.host_only.is_empty()) {
            (true, false) => return Err(PoolError::Whole("lan and host-only: say one of them")),
            (true, true) => file.lan,
            (false, false) => file.host_only,
            (false, true) => return Ok(Pool::default()),
        };
        let mut all = lines.iter().map(|line| range(line)).collect::<Result<Vec<_>, _>>()?;
        all.sort_unstable();
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for (first, last) in all {
            match ranges.last_mut() {
                Some(before) if u64::from(first) <= u64::from(before.1) + 1 => before.1 = before.1.max(last),
                _ => ranges.push((first, last)),
            }
        }
        let pool = Pool { ranges, lan };
        match pool.len() > MOST {
            true => Err(PoolError::Whole("these are more than 65536 addresses")),
            false => Ok(pool),
        }
    }

    /// Whether its addresses are of the local network: others there reach instances by them.
    pub fn is_lan(&self) -> bool {
        self.lan
    }

    /// Whether it has this address.
    pub fn has(&self, ip: Ipv4Addr) -> bool {
        let ip = u32::from(ip);
        usable(ip) && self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&ip))
    }

    /// Whether it has some of these.
    pub fn overlaps(&self, net: Ipv4Net) -> bool {
        let (from, to) = (u32::from(net.network()), u32::from(net.broadcast()));
        self.ranges.iter().any(|(first, last)| *first <= to && from <= *last)
    }

    /// All its addresses, beginning with the one at `from` and coming round to it.
    pub(crate) fn from(&self, from: u64) -> impl Iterator<Item = (u64, Ipv4Addr)> + '_ {
        let len = self.len();
        (0..len).filter_map(move |step| {
            let at = (from + step) % len;
            let mut left = at;
            for (first, last) in &self.ranges {
                let size = u64::from(last - first) + 1;
                if left < size {
                    let ip = first.saturating_add(u32::try_from(left).ok()?);
                    return usable(ip).then(|| (at, ip.into()));
                }
                left -= size;
            }
            None
        })
    }

    fn len(&self) -> u64 {
        self.ranges.iter().map(|(first, last)| u64::from(last - first) + 1).sum()
    }
}

/// Nobody is given a network's or a broadcast address, whatever the prefix there is.
fn usable(ip: u32) -> bool {
    !matches!(ip & 0xff, 0 | 255)
}

fn range(line: &str) -> Result<(u32, u32), PoolError> {
    let bad = |why| PoolError::Range(line.into(), why);
    let no = || bad("is neither an address nor FIRST-LAST nor ADDRESS/BITS");
    let ip = |text: &str| text.trim().parse::<Ipv4Addr>().map(u32::from).map_err(|_| no());
    let (first, last) = match (line.split_once('-'), line.contains('/')) {
        (Some((first, last)), _) => (ip(first)?, ip(last)?),
        (None, true) => {
            let net: Ipv4Net = line.trim().parse().map_err(|_| no())?;
            (u32::from(net.network()), u32::from(net.broadcast()))
        }
        (None, false) => (ip(line)?, ip(line)?),
    };
    if first > last {
        return Err(bad("ends before it begins"));
    }
    let vpc = crate::region::DEFAULT_CIDR;
    // What no interface of a network can have, and what guests have themselves.
    let never = [
        Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 8),
        Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8),
        Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
        Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
    ];
    let meets = |net: &Ipv4Net| first <= u32::from(net.broadcast()) && last >= u32::from(net.network());
    if meets(&vpc) {
        return Err(bad("has addresses of 172.31.0.0/16, which are the instances' private ones"));
    }
    match never.iter().any(meets) {
        true => Err(bad("has addresses that no machine can have")),
        false => Ok((first, last)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pool: &Pool) -> Vec<String> {
        pool.from(0).map(|(_, ip)| ip.to_string()).collect()
    }

    #[test]
    fn without_a_file_addresses_are_the_hosts_own() {
        let pool = Pool::read("").unwrap();
        assert_eq!(pool, Pool::default());
        assert!(!pool.is_lan() && pool.has([198, 19, 15, 254].into()) && !pool.has([198, 19, 16, 1].into()));
        assert_eq!(pool.from(0).next().unwrap().1, Ipv4Addr::new(198, 19, 0, 1));
    }

    #[test]
    fn ranges_are_joined_and_come_round() {
        let pool = Pool::read(
            "lan = [\"192.168.1.253-192.168.2.1\", \"192.168.1.250\", \"10.0.0.4/30\", \"192.168.2.1\"]",
        )
        .unwrap();
        assert!(pool.is_lan());
        let ips = all(&pool);
        let rest = ["192.168.1.250", "192.168.1.253", "192.168.1.254", "192.168.2.1"];
        assert_eq!(ips, [&["10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.7"], &rest[..]].concat());
        assert!(!pool.has([192, 168, 1, 255].into()) && pool.has([192, 168, 2, 1].into()));
        let last = pool.from(0).last().unwrap();
        assert_eq!(
            pool.from(last.0).map(|(_, ip)| ip.to_string()).take(2).collect::<Vec<_>>(),
            ["192.168.2.1", "10.0.0.4"]
        );
        assert!(!Pool::read("host-only = [\"100.64.7.0/24\"]").unwrap().is_lan());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for bad in [
            "pool = []",
            "lan = \"192.168.1.1\"",
            "lan = [\"192.168.1.9-192.168.1.1\"]",
            "lan = [\"192.168.1.0/33\"]",
            "lan = [\"x\"]",
            "lan = [\"172.31.3.4\"]",
            "lan = [\"172.0.0.0/8\"]",
            "lan = [\"127.0.0.1\"]",
            "lan = [\"224.0.0.1-224.0.0.9\"]",
            "lan = [\"10.0.0.0/8\"]",
            "lan = [\"10.0.0.1\"]\nhost-only = [\"198.18.0.1\"]",
        ] {
            assert!(Pool::read(bad).is_err(), "{bad}");
        }
    }
}
