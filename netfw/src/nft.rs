//! The firewall: from a checked [`Ruleset`] to text for `nft -f -`.
//!
//! Two tables, both named `hutch`: `inet` for IPv4, IPv6 and translation, `arp` for who may say which address is his
//! (an `inet` table never sees ARP). Nothing here names a guest in a rule: rules are constant, guests are elements of sets.
//!
//! - **Fail-closed.** Whatever comes from or goes to a link named `hu*` ends in a drop, known or not; so the tables are
//!   complete before the first tap is, and a tap without its elements is mute. Traffic that is not ours is untouched.
//! - **Anti-spoofing first.** It runs at priority raw, before conntrack, so no `established` can come before it.
//! - **A replace never opens.** Chains are refilled, not deleted, in one transaction; each accept matches a constant.

pub mod nat;

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use ipnet::Ipv4Net;

use crate::name::{MacAddr, TapName, Uplink};
use crate::ra::{GATEWAY6, METADATA6, ROUTER};

/// The name of our tables.
pub const TABLE: &str = "hutch";

/// The port of the host where a guest's metadata service listens, on the guest's tap only. Guests reach it by no other
/// address than 169.254.169.254 and fd00:ec2::254, port 80; the host's own way to the former, where it has one, stays as it
/// was. To IPv6 whatever the host sends to itself comes from the link that has the address, so that is told apart by the firewall.
pub const METADATA_PORT: u16 = 16925;

/// One guest as the firewall knows it. It may speak from this tap, with this MAC, from these addresses; nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its tap.
    pub tap: TapName,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its one IPv4 address (a /32).
    pub ip4: Ipv4Addr,
    /// Its one global IPv6 address (a /128), if it has any; link-local neighbour discovery works without.
    pub ip6: Option<Ipv6Addr>,
    /// The host's address on its tap.
    pub gateway: Ipv4Addr,
    /// Inbound TCP ports that are open to everyone by IPv4, as ranges: to the world, to the other guests and to the host.
    pub open_tcp: Vec<(u16, u16)>,
}

/// All that the firewall of one network namespace says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    range: Ipv4Net,
    uplink: Option<Uplink>,
    guests: Vec<Guest>,
}

/// Why a ruleset cannot be, or could not be put into the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// An address outside the range of guests.
    #[error("{what} {ip} is not an address for a host within {range}: choose one inside")]
    OutOfRange {
        /// Whose address it is.
        what: String,
        /// The address.
        ip: Ipv4Addr,
        /// The range of guests.
        range: Ipv4Net,
    },
    /// An IPv6 address that a guest cannot have.
    #[error(
        "IPv6 address {ip} of {tap} is not a unicast address of wider scope than its link: choose another"
    )]
    BadIpv6 {
        /// The guest's tap.
        tap: TapName,
        /// The address.
        ip: Ipv6Addr,
    },
    /// Two guests with one tap, MAC or address.
    #[error("{0} and {1} share a tap, MAC or IP address: give each its own")]
    Twice(TapName, TapName),
    /// The program could not be started or written to.
    #[error("could not run nft: {0}; install the package nftables")]
    Run(#[from] std::io::Error),
    /// The kernel or nft refused; the rules are as they were.
    #[error("nft refused the rules, those before still hold: {0}")]
    Refused(String),
}

impl Ruleset {
    /// A ruleset without guests: all that must be in the kernel before the first tap is made.
    ///
    /// `range` is where all guests' addresses are from. Without `uplink` nothing is forwarded out or translated.
    pub fn new(range: Ipv4Net, uplink: Option<Uplink>) -> Self {
        Self { range: range.trunc(), uplink, guests: Vec::new() }
    }

    /// Adds a guest.
    ///
    /// # Errors
    /// [`NftError::OutOfRange`], [`NftError::BadIpv6`], or [`NftError::Twice`] if something of it is taken.
    pub fn add(&mut self, guest: Guest) -> Result<(), NftError> {
        self.check_range(&format!("address of {}", guest.tap), guest.ip4)?;
        self.check_range(&format!("gateway of {}", guest.tap), guest.gateway)?;
        if guest.ip4 == guest.gateway {
            let what = format!("the gateway's, asked for {}:", guest.tap);
            return Err(NftError::OutOfRange { what, ip: guest.ip4, range: self.range });
        }
        if let Some(ip) = guest.ip6
            && (ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local())
        {
            return Err(NftError::BadIpv6 { tap: guest.tap, ip });
        }
        let same = |g: &&Guest| {
            g.tap == guest.tap
                || g.mac == guest.mac
                || g.ip4 == guest.ip4
                || (g.ip6.is_some() && g.ip6 == guest.ip6)
        };
        if let Some(other) = self.guests.iter().find(same) {
            return Err(NftError::Twice(other.tap.clone(), guest.tap));
        }
        self.guests.push(guest);
        Ok(())
    }

    fn check_range(&self, what: &str, ip: Ipv4Addr) -> Result<(), NftError> {
        let ends = [self.range.network(), self.range.broadcast()];
        if self.range.contains(&ip) && !ends.contains(&ip) {
            return Ok(());
        }
        Err(NftError::OutOfRange { what: what.into(), ip, range: self.range })
    }

    /// The text that makes the kernel's tables exactly this, in one transaction, whatever was in them before.
    pub fn render(&self) -> String {
        let range = self.range;
        let mut text = declarations();
        let (mut out, mut back, mut come, mut nat) = Default::default();
        if let Some(up) = &self.uplink {
            out = format!("iifname \"hu*\" oifname \"{up}\" ip saddr {range} ip daddr != {range} accept");
            back = format!(
                "iifname \"{up}\" oifname . ip daddr @to4 ip daddr {range} ct state established,related accept"
            );
            come = format!("iifname \"{up}\" oifname . ip daddr . tcp dport @open4 accept");
            nat = format!("oifname \"{up}\" ip saddr {range} ip daddr != {range} masquerade");
        }
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            r#"table inet hutch {{
	chain unspoofed {{
		iifname . ether saddr . ip saddr @from4 accept
		iifname . ether saddr . ip6 saddr @from6 accept
		iifname . ether saddr @macs ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
		iifname . ether saddr @macs ip6 saddr {{ ::, fe80::/10 }} ip6 hoplimit 255 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
		counter name spoofed drop
	}}
	chain guest_to_host {{
		iifname "hu*" udp sport 68 udp dport 67 accept
		iifname "hu*" ct status dnat ct original ip daddr 169.254.169.254 tcp dport {METADATA_PORT} accept
		iifname "hu*" ct status dnat ct original ip6 daddr {METADATA6} tcp dport {METADATA_PORT} accept
		iifname "hu*" ip daddr 169.254.169.254 counter name guest_to_host drop
		iifname "hu*" ct state established,related accept
		iifname . ip daddr @gateways icmp type echo-request accept
		iifname "hu*" ip6 daddr {GATEWAY6} icmpv6 type echo-request accept
		iifname "hu*" ip6 hoplimit 255 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
		counter name guest_to_host drop
	}}
	chain host_to_guest {{
		oifname "hu*" udp sport 67 udp dport 68 accept
		oifname "hu*" ip6 hoplimit 255 icmpv6 type {{ nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }} accept
		oifname . ip daddr @to4 tcp dport 22 accept
		oifname . ip6 daddr @to6 tcp dport 22 accept
		oifname . ip daddr . tcp dport @open4 accept
		oifname "hu*" ct state established,related accept
		counter name host_to_guest drop
	}}
	chain through {{
		iifname "hu*" oifname . ip daddr . tcp dport @open4 accept
		iifname "hu*" oifname "hu*" ct state established,related accept
		iifname "hu*" oifname "hu*" counter name guest_to_guest drop
		iifname "hu*" ip daddr 169.254.0.0/16 counter name guest_to_world drop
		{out}
		{back}
		{come}
		iifname "hu*" counter name guest_to_world drop
		counter name world_to_guest drop
	}}
	chain prerouting {{
		iifname "hu*" jump unspoofed
	}}
	chain metadata {{
		iifname "hu*" ip daddr 169.254.169.254 tcp dport 80 redirect to :{METADATA_PORT}
		iifname "hu*" ip6 daddr {METADATA6} tcp dport 80 redirect to :{METADATA_PORT}
	}}
	chain input {{
		iifname "lo" ip6 daddr {{ {METADATA6}, {GATEWAY6}, {ROUTER} }} tcp dport {METADATA_PORT} drop
		iifname "hu*" jump guest_to_host
	}}
	chain output {{
		oifname "hu*" jump host_to_guest
	}}
	chain forward {{
		iifname "hu*" jump through
		oifname "hu*" jump through
	}}
	chain postrouting {{
		{nat}
	}}
}}
table arp hutch {{
	chain unspoofed {{
		iifname . ether saddr . arp saddr ether . arp saddr ip @senders accept
		counter name spoofed drop
	}}
	chain input {{
		iifname "hu*" jump unspoofed
	}}
}}
"#
        );
        for guest in &self.guests {
            text.push_str(&elements("add", guest));
        }
        text
    }
}

/// Tables, sets, counters and hooks, present and empty after this. `add` keeps what is there, so hooks never go away.
fn declarations() -> String {
    let mut text = String::from("add table inet hutch\nadd table arp hutch\n");
    for (chain, hook) in [
        ("prerouting", "filter hook prerouting priority -300"),
        ("metadata", "nat hook prerouting priority -100"),
        ("input", "filter hook input priority 0"),
        ("output", "filter hook output priority 0"),
        ("forward", "filter hook forward priority 0"),
        ("postrouting", "nat hook postrouting priority 100"),
    ] {
        let _ = writeln!(text, "add chain inet hutch {chain} {{ type {hook}; policy accept; }}");
    }
    text.push_str("add chain arp hutch input { type filter hook input priority 0; policy accept; }\n");
    for (family, set, kind) in [
        ("inet", "macs", "ifname . ether_addr"),
        ("inet", "from4", "ifname . ether_addr . ipv4_addr"),
        ("inet", "from6", "ifname . ether_addr . ipv6_addr"),
        ("inet", "to4", "ifname . ipv4_addr"),
        ("inet", "to6", "ifname . ipv6_addr"),
        ("inet", "gateways", "ifname . ipv4_addr"),
        ("inet", "open4", "ifname . ipv4_addr . inet_service; flags interval"),
        ("arp", "senders", "ifname . ether_addr . ether_addr . ipv4_addr"),
    ] {
        let _ =
            writeln!(text, "add set {family} hutch {set} {{ type {kind}; }}\nflush set {family} hutch {set}");
    }
    for counter in COUNTERS {
        let _ = writeln!(text, "add counter inet hutch {counter}");
    }
    text.push_str("add counter arp hutch spoofed\nflush table inet hutch\nflush table arp hutch\n");
    text
}

/// What is counted where it is dropped, in the `inet` table; ARP has a `spoofed` of its own.
pub const COUNTERS: [&str; 6] =
    ["spoofed", "guest_to_host", "host_to_guest", "guest_to_guest", "guest_to_world", "world_to_guest"];

/// The text that lets one more guest speak; the rest of the tables is untouched. They must be there already.
pub fn render_add(guest: &Guest) -> String {
    elements("add", guest)
}

/// The text that makes a guest mute again, whether or not it is known: adding first makes the deletion always valid
/// (`destroy element` needs a newer kernel), and both are one transaction, so nothing passes between.
pub fn render_remove(guest: &Guest) -> String {
    elements("add", guest) + &elements("delete", guest)
}

fn elements(verb: &str, guest: &Guest) -> String {
    let Guest { tap, mac, ip4, ip6, gateway, open_tcp } = guest;
    let mut text = format!(
        "{verb} element inet hutch macs {{ \"{tap}\" . {mac} }}\n\
         {verb} element inet hutch from4 {{ \"{tap}\" . {mac} . {ip4} }}\n\
         {verb} element inet hutch to4 {{ \"{tap}\" . {ip4} }}\n\
         {verb} element inet hutch gateways {{ \"{tap}\" . {gateway} }}\n\
         {verb} element arp hutch senders {{ \"{tap}\" . {mac} . {mac} . {ip4} }}\n\
         {verb} element arp hutch senders {{ \"{tap}\" . {mac} . {mac} . 0.0.0.0 }}\n"
    );
    if let Some(ip6) = ip6 {
        let _ = write!(
            text,
            "{verb} element inet hutch from6 {{ \"{tap}\" . {mac} . {ip6} }}\n\
             {verb} element inet hutch to6 {{ \"{tap}\" . {ip6} }}\n"
        );
    }
    for (first, last) in apart(open_tcp) {
        let _ = writeln!(text, "{verb} element inet hutch open4 {{ \"{tap}\" . {ip4} . {first}-{last} }}");
    }
    text
}

/// The same ports as ranges that neither overlap nor touch: the kernel takes no others into one set. Empty ranges are left out.
fn apart(ranges: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut ranges: Vec<_> = ranges.iter().copied().filter(|(first, last)| first <= last).collect();
    ranges.sort_unstable();
    let mut apart: Vec<(u16, u16)> = Vec::new();
    for (first, last) in ranges {
        match apart.last_mut() {
            Some(before) if u32::from(first) <= u32::from(before.1) + 1 => before.1 = before.1.max(last),
            _ => apart.push((first, last)),
        }
    }
    apart
}

/// The text that takes both tables away, present or not. Only when no tap of ours is left.
pub fn render_teardown() -> &'static str {
    "add table inet hutch\ndelete table inet hutch\nadd table arp hutch\ndelete table arp hutch\n"
}

/// Puts text into the kernel, in the network namespace of the calling thread: all of it, or nothing.
///
/// # Errors
/// [`NftError::Run`] without the program, [`NftError::Refused`] with nft's words.
pub fn apply(text: &str) -> Result<(), NftError> {
    run(Command::new("nft").args(["-f", "-"]), text)
}

/// Whether there are tables of ours in this network namespace.
pub fn is_present() -> bool {
    run(Command::new("nft").args(["list", "table", "inet", TABLE]), "").is_ok()
}

fn run(command: &mut Command, text: &str) -> Result<(), NftError> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(NftError::Refused(String::from_utf8_lossy(&output.stderr).trim().into()));
    }
    Ok(written?)
}

#[cfg(test)]
mod tests;
