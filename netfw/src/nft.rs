//! The firewall: from a checked [`Ruleset`] to text for `nft -f -`.
//!
//! Two tables, both named `hutch`: `inet` for IPv4, IPv6 and translation, `arp` for who may say which address is his
//! (an `inet` table never sees ARP). The rules here are constant; guests are elements of sets and maps ([`content`]), and
//! what security groups let through is a chain a group and way ([`crate::groups`]).
//!
//! ```text
//!   from a tap ─► unspoofed ─► conntrack ─► wall ─► leaving: a reply, a kept connection, or the chains of its groups, out ─► through
//!   to a tap   ─► through, or the host's own ─► arriving: a reply, a kept connection, or the chains of its groups, in
//! ```
//! - **Fail-closed.** Whatever comes from or goes to a link named `hu*` ends in a drop, known or not; so the tables are
//!   complete before the first tap is, and a tap without its elements is mute. Traffic that is not ours is untouched.
//! - **Anti-spoofing first.** It runs at priority raw, before conntrack, so no `established` can come before it.
//! - **Networks are apart.** Before any group is asked, a guest's packet to another guest is dropped unless both are in the same
//!   network, or it goes by a public address; then only rules for everyone let it through ([`STRANGER`]). What goes to the
//!   uplink and comes from there is what a network's routes lead through its internet gateway.
//! - **A replace never opens.** Chains are refilled, not deleted, in one transaction; each accept matches a constant, and a
//!   lookup that finds nothing leads to a drop.
//! - **Connections as EC2 tracks them.** What a rule let through is marked, and stays when the rule goes; but not what EC2
//!   leaves untracked: TCP and UDP of a rule for everyone, where all may go the other way. That is looked at again and again.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Command, Stdio};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::groups::Group;
use crate::guest::VPC;
use crate::name::{GroupId, MacAddr, TapName, Uplink};
use crate::ra::{GATEWAY6, METADATA6, PREFIX6, ROUTER};

mod content;
mod listing;
pub mod nat;

use content::Content;
pub use listing::{Listing, Refused, generation, listing, refused};

/// The name of our tables.
pub const TABLE: &str = "hutch";

/// The port of the host where a guest's metadata service listens, on the guest's tap only. Guests reach it by no other
/// address than 169.254.169.254 and fd00:ec2::254, port 80; the host's own way to the former, where it has one, stays as it
/// was. To IPv6 whatever the host sends to itself comes from the link that has the address, so that is told apart by the firewall.
pub const METADATA_PORT: u16 = 16925;

/// Connections that one guest may have begun at a time: the host's table is everybody's.
pub const FLOWS: u32 = 16_384;

/// The bits of a connection's mark that say: what sent it, or what it is sent to, goes on without its rule.
const KEPT_OUT: u32 = 0x1000_0000;
const KEPT_IN: u32 = 0x2000_0000;
/// The bit that says: it is between guests of two networks, by a public address. The firewall sees their own addresses, which
/// mean nothing in each other's network: a rule for a range of addresses is not about them.
pub(crate) const STRANGER: u32 = 0x4000_0000;

/// The network that a guest is in: a VPC, and the way out of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its id: guests of other networks are not reached.
    pub id: GroupId,
    /// Its addresses: nothing to or from them passes the uplink.
    pub cidr: Ipv4Net,
    /// What the guest's routes lead through the internet gateway: nothing else passes the uplink.
    pub routes: Vec<Ipv4Net>,
}

impl Network {
    /// The network of guests without a daemon, from which everything is reached that the host reaches.
    pub fn alone() -> Network {
        Network { id: GroupId::alone(), cidr: VPC, routes: vec![Ipv4Net::default()] }
    }
}

/// One guest as the firewall knows it. It may speak from this tap, with this MAC, from these addresses; nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its tap.
    pub tap: TapName,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Its IPv4 address (a /32).
    pub ip4: Ipv4Addr,
    /// More of them, by which it may be spoken to and speak.
    pub more: Vec<Ipv4Addr>,
    /// Its one global IPv6 address (a /128), if it has any; link-local neighbour discovery works without.
    pub ip6: Option<Ipv6Addr>,
    /// The host's address on its tap.
    pub gateway: Ipv4Addr,
    /// Its network.
    pub network: Network,
    /// Its security groups: it sends and is sent what one of them lets through. Of none that is not known.
    pub groups: Vec<GroupId>,
}

impl Guest {
    /// All its IPv4 addresses.
    pub fn ips(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        std::iter::once(self.ip4).chain(self.more.iter().copied())
    }
}

/// All that the firewall of one network namespace says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    range: Ipv4Net,
    uplink: Option<Uplink>,
    guests: Vec<Guest>,
    groups: Vec<Group>,
    public: Vec<nat::Pair>,
}

/// Why a ruleset cannot be, or could not be put into the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// An address outside the guest's network.
    #[error("{what} {ip} is not an address for a host within {range}: choose one inside")]
    OutOfRange {
        /// Whose address it is.
        what: String,
        /// The address.
        ip: Ipv4Addr,
        /// The network's addresses.
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
    /// Nobody on the uplink speaks from an address of `range`. Without `uplink` nothing is forwarded out or translated.
    pub fn new(range: Ipv4Net, uplink: Option<Uplink>) -> Self {
        let (guests, groups, public) = Default::default();
        Self { range: range.trunc(), uplink, guests, groups, public }
    }

    /// What security groups say; a group that is not named lets nothing through.
    #[must_use]
    pub fn with_groups(self, groups: Vec<Group>) -> Self {
        Self { groups, ..self }
    }

    /// Where public addresses lead.
    #[must_use]
    pub fn with_public(self, public: Vec<nat::Pair>) -> Self {
        Self { public, ..self }
    }

    /// Adds a guest.
    ///
    /// # Errors
    /// [`NftError::OutOfRange`], [`NftError::BadIpv6`], or [`NftError::Twice`] if something of it is taken.
    pub fn add(&mut self, guest: Guest) -> Result<(), NftError> {
        let range = guest.network.cidr;
        for ip in guest.ips() {
            check_range(&format!("address of {}", guest.tap), ip, range)?;
        }
        check_range(&format!("gateway of {}", guest.tap), guest.gateway, range)?;
        if guest.ips().any(|ip| ip == guest.gateway) {
            let what = format!("the gateway's, asked for {}:", guest.tap);
            return Err(NftError::OutOfRange { what, ip: guest.gateway, range });
        }
        if let Some(ip) = guest.ip6
            && (ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || ip.is_unicast_link_local())
        {
            return Err(NftError::BadIpv6 { tap: guest.tap, ip });
        }
        let same = |g: &&Guest| {
            g.tap == guest.tap
                || g.mac == guest.mac
                || g.ips().any(|ip| guest.ips().any(|own| own == ip))
                || (g.ip6.is_some() && g.ip6 == guest.ip6)
        };
        if let Some(other) = self.guests.iter().find(same) {
            return Err(NftError::Twice(other.tap.clone(), guest.tap));
        }
        self.guests.push(guest);
        Ok(())
    }

    /// The text that makes the kernel's tables exactly this, in one transaction, whatever was in them before. The same
    /// guests and groups make the same text. `present` are chains and sets that are there; what is left of them goes.
    pub fn render(&self, present: &Listing) -> String {
        let content = Content::of(self);
        let mut text = declarations();
        text.push_str(&content.forget_others(present));
        text.push_str(&content.empty_sets());
        text.push_str(&self.constants());
        text.push_str(&content.change(&Content::empty()));
        text.push_str(&nat::render(&self.public, self.uplink.as_ref()));
        text
    }

    /// The text that makes the kernel's tables this where they are `before`, in one transaction that touches nothing
    /// else; empty where they are the same. `None`: nothing less than [`render`](Ruleset::render) does it.
    pub fn change(&self, before: &Ruleset) -> Option<String> {
        let same = (before.range, &before.uplink) == (self.range, &self.uplink);
        let public = || nat::change(&before.public, &self.public);
        same.then(|| Content::of(self).change(&Content::of(before)) + &public())
    }

    /// Whether this is what is there, as far as counting goes: each chain, its rules, each set, its elements.
    pub fn is_there(&self, present: &Listing) -> bool {
        let mut wanted = listing::counting(&self.constants());
        Content::of(self).count(&mut wanted);
        nat::count(&self.public, self.uplink.as_ref(), &mut wanted);
        wanted == present.counts
    }

    /// What tells the rules that never change from those of another version of this program.
    pub fn version(&self) -> u64 {
        fnv(&[declarations(), self.constants(), nat::render(&[], self.uplink.as_ref())].concat())
    }

    fn constants(&self) -> String {
        let range = self.range;
        let (mut out, mut come, mut forged, mut nat) = <(String, String, String, String)>::default();
        if let Some(up) = &self.uplink {
            out = format!(
                "iifname . ip daddr @inside counter name guest_to_world goto refused_out\n\t\tiifname . ip daddr @routes oifname \"{up}\" accept"
            );
            come = format!(
                "iifname \"{up}\" oifname . ip saddr @inside counter name spoofed goto refused_in\n\t\tiifname \"{up}\" oifname . ip saddr @routes goto arriving"
            );
            forged = format!(
                "iifname \"{up}\" ip saddr {range} counter name spoofed drop\n\t\tiifname \"{up}\" ip6 saddr {PREFIX6} counter name spoofed drop"
            );
            nat = format!("iifname \"hu*\" oifname \"{up}\" masquerade");
        }
        format!(
            r#"table inet hutch {{
	chain unspoofed {{
		iifname . ether saddr . ip saddr @from4 accept
		iifname . ether saddr . ip6 saddr @from6 accept
		iifname . ether saddr @macs ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
		iifname . ether saddr @macs ip6 saddr {{ ::, fe80::/10 }} ip6 hoplimit 255 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
		meta pkttype {{ broadcast, multicast }} counter name spoofed drop
		counter name spoofed goto refused_out
	}}
	chain guest_to_host {{
		iifname "hu*" udp sport 68 udp dport 67 accept
		iifname "hu*" ct state new add @flows {{ iifname ct count over {FLOWS} }} counter name too_many goto refused_out
		iifname "hu*" ct status dnat ct original ip daddr 169.254.169.254 tcp dport {METADATA_PORT} accept
		iifname "hu*" ct status dnat ct original ip6 daddr {METADATA6} tcp dport {METADATA_PORT} accept
		iifname "hu*" ip daddr 169.254.169.254 counter name guest_to_host goto refused_out
		iifname "hu*" ct state established,related accept
		iifname . ip daddr @gateways icmp type echo-request accept
		iifname "hu*" ip6 daddr {GATEWAY6} icmpv6 type echo-request accept
		iifname "hu*" ip6 hoplimit 255 icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
		meta pkttype {{ broadcast, multicast }} counter name guest_to_host drop
		counter name guest_to_host goto refused_out
	}}
	chain host_to_guest {{
		oifname "hu*" udp sport 67 udp dport 68 accept
		oifname "hu*" ip6 hoplimit 255 icmpv6 type {{ nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }} accept
		oifname . ip daddr @to4 tcp dport 22 accept
		oifname . ip6 daddr @to6 tcp dport 22 accept
		goto arriving
	}}
	chain stranger {{
		ct direction reply ct mark and {STRANGER:#x} != 0 return
		iifname . ct original ip daddr @routes oifname . ip saddr @routes ct mark set ct mark or {STRANGER:#x} return
		counter name walled goto refused_out
	}}
	chain wall {{
		iifname vmap @walls
		counter name walled goto refused_out
	}}
	chain leaving {{
		oifname "hu*" jump wall
		iifname "hu*" ct state new add @flows {{ iifname ct count over {FLOWS} }} counter name too_many goto refused_out
		iifname "hu*" ip daddr 169.254.0.0/16 counter name guest_to_world goto refused_out
		iifname "hu*" ct direction reply ct state established,related accept
		iifname "hu*" ct state related accept
		iifname "hu*" ct state established ct mark and {KEPT_OUT:#x} != 0 accept
		iifname vmap @groups_out
		counter name leaving goto refused_out
	}}
	chain through {{
		oifname "hu*" goto to_guest
		ct state invalid counter name invalid goto refused_out
		{out}
		counter name guest_to_world goto refused_out
	}}
	chain to_guest {{
		iifname "hu*" goto arriving
		{come}
		counter name world_to_guest goto refused_in
	}}
	chain arriving {{
		oifname . ip daddr @to4 goto admitted
		oifname . ip6 daddr @to6 goto admitted
		counter name arriving drop
	}}
	chain admitted {{
		oifname "hu*" ct direction reply ct state established,related accept
		oifname "hu*" ct state related accept
		oifname "hu*" ct state established ct mark and {KEPT_IN:#x} != 0 accept
		oifname vmap @groups_in
		counter name arriving goto refused_in
	}}
	chain pass_in {{
		oifname . meta nfproto . meta l4proto @untracked_in accept
		goto keep_in
	}}
	chain keep_in {{
		ct mark set ct mark or {KEPT_IN:#x}
		oifname "hu*" accept
	}}
	chain pass_out {{
		iifname . meta nfproto . meta l4proto @untracked_out accept
		goto keep_out
	}}
	chain keep_out {{
		ct mark set ct mark or {KEPT_OUT:#x}
		iifname "hu*" accept
	}}
	chain refused_in {{
		oifname @refused_in drop
		drop
	}}
	chain refused_out {{
		iifname @refused_out drop
		drop
	}}
	chain prerouting {{
		iifname "hu*" jump unspoofed
		{forged}
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
	chain forward_out {{
		iifname "hu*" jump leaving
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
        )
    }
}

fn check_range(what: &str, ip: Ipv4Addr, range: Ipv4Net) -> Result<(), NftError> {
    if range.contains(&ip) && ![range.network(), range.broadcast()].contains(&ip) {
        return Ok(());
    }
    Err(NftError::OutOfRange { what: what.into(), ip, range })
}

/// Tables, sets, counters and hooks, present and empty after this. `add` keeps what is there, so hooks never go away.
fn declarations() -> String {
    let mut text = String::from("add table inet hutch\nadd table arp hutch\n");
    for (chain, hook) in [
        ("prerouting", "filter hook prerouting priority -300"),
        ("metadata", "nat hook prerouting priority -100"),
        ("input", "filter hook input priority 0"),
        ("output", "filter hook output priority 0"),
        // What a guest sends another has to be let out, and then in: an accept ends the first chain only.
        ("forward_out", "filter hook forward priority -5"),
        ("forward", "filter hook forward priority 0"),
        ("postrouting", "nat hook postrouting priority 100"),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "add chain inet hutch {chain} {{ type {hook}; policy accept; }}");
    }
    text.push_str("add chain arp hutch input { type filter hook input priority 0; policy accept; }\n");
    for (family, kind, set, of) in SETS {
        let _ =
            writeln!(text, "add {kind} {family} hutch {set} {{ {of}; }}\nflush {kind} {family} hutch {set}");
    }
    // The kernel's own: it forgets what has ended.
    text.push_str("add set inet hutch flows { type ifname; size 65535; flags dynamic; }\n");
    for counter in COUNTERS {
        let _ = writeln!(text, "add counter inet hutch {counter}");
    }
    text.push_str("add counter arp hutch spoofed\nflush table inet hutch\nflush table arp hutch\n");
    text
}

/// What is always there, filled by [`content`].
const SETS: [(&str, &str, &str, &str); 16] = [
    ("inet", "set", "macs", "type ifname . ether_addr"),
    ("inet", "set", "from4", "type ifname . ether_addr . ipv4_addr"),
    ("inet", "set", "from6", "type ifname . ether_addr . ipv6_addr"),
    ("inet", "set", "to4", "type ifname . ipv4_addr"),
    ("inet", "set", "to6", "type ifname . ipv6_addr"),
    ("inet", "set", "gateways", "type ifname . ipv4_addr"),
    ("inet", "set", "inside", "type ifname . ipv4_addr; flags interval"),
    ("inet", "set", "routes", "type ifname . ipv4_addr; flags interval"),
    ("inet", "map", "walls", "type ifname : verdict"),
    ("inet", "map", "groups_in", "type ifname : verdict"),
    ("inet", "map", "groups_out", "type ifname : verdict"),
    ("inet", "set", "untracked_in", "type ifname . nf_proto . inet_proto"),
    ("inet", "set", "untracked_out", "type ifname . nf_proto . inet_proto"),
    ("inet", "set", "refused_in", "type ifname; counter"),
    ("inet", "set", "refused_out", "type ifname; counter"),
    ("arp", "set", "senders", "type ifname . ether_addr . ether_addr . ipv4_addr"),
];

/// What is counted where it is dropped, in the `inet` table; ARP has a `spoofed` of its own. What each tap was refused is
/// counted by the elements of `refused_in` and `refused_out`.
pub const COUNTERS: [&str; 9] = [
    "spoofed",
    "guest_to_host",
    "guest_to_world",
    "world_to_guest",
    "walled",
    "leaving",
    "arriving",
    "invalid",
    "too_many",
];

/// A number that tells one text from another, the same wherever it is computed (FNV-1a).
fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The text that takes all tables away, present or not. Only when no tap of ours is left.
pub fn render_teardown() -> String {
    let tables =
        "add table inet hutch\ndelete table inet hutch\nadd table arp hutch\ndelete table arp hutch\n";
    tables.to_owned() + nat::render_teardown()
}

/// Puts text into the kernel, in the network namespace of the calling thread: all of it, or nothing.
///
/// # Errors
/// [`NftError::Run`] without the program, [`NftError::Refused`] with nft's words.
pub fn apply(text: &str) -> Result<(), NftError> {
    run(Command::new("nft").args(["-f", "-"]), text).map(drop)
}

fn run(command: &mut Command, text: &str) -> Result<Vec<u8>, NftError> {
    // Its words are looked at.
    let mut child = command
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(NftError::Refused(String::from_utf8_lossy(&output.stderr).trim().into()));
    }
    written?;
    Ok(output.stdout)
}

#[cfg(test)]
mod packets;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wire;
