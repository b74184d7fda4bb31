//! The table that leads public addresses to guests: translation only. It drops nothing and accepts nothing: what it leads
//! somewhere passes the firewall there, which sees a guest's own address.
//!
//! ```text
//!   guest, LAN ─► prerouting:  public becomes private ─► forward: the groups ─► postrouting: private becomes public
//!   host       ─► output:      likewise, if it is routed to the guest's tap already ─► output: the groups
//! ```
//! - The filter of what the host sends looks at the link that was routed to before this table changed the address. So the
//!   change is made for packets that go to the guest's tap anyway, by the route of the public address, and for no others.
//! - Guests speak to each other's public addresses as the world does: under their own, where they have one.
//! - To the uplink a guest has its public address only if others there know the way back.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::name::{TapName, Uplink};

/// The table.
pub const TABLE: &str = "hutch_public";

/// A public address and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The address.
    pub public: Ipv4Addr,
    /// The guest's own.
    pub private: Ipv4Addr,
    /// The guest's tap.
    pub tap: TapName,
    /// Others on the uplink's network reach it.
    pub lan: bool,
}

/// The maps, and what is looked up in them.
const MAPS: [(&str, &str); 4] = [
    ("to_private", "ipv4_addr : ipv4_addr"),
    ("on_tap", "ifname . ipv4_addr : ipv4_addr"),
    ("to_public", "ipv4_addr : ipv4_addr"),
    ("to_world", "ipv4_addr : ipv4_addr"),
];

/// The text that makes the table exactly this, in one transaction, whatever was in it before.
pub fn render(pairs: &[Pair], uplink: Option<&Uplink>) -> String {
    let mut text = String::from("add table ip hutch_public\n");
    for (chain, hook) in [
        ("prerouting", "prerouting priority -100"),
        ("output", "output priority -100"),
        // Before the firewall's own, which has the host's address for whoever is left.
        ("postrouting", "postrouting priority 99"),
    ] {
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "add chain ip hutch_public {chain} {{ type nat hook {hook}; policy accept; }}");
    }
    for (map, kind) in MAPS {
        let _ = writeln!(
            text,
            "add map ip hutch_public {map} {{ type {kind}; }}\nflush map ip hutch_public {map}"
        );
    }
    let world =
        uplink.map(|up| format!("oifname \"{up}\" snat to ip saddr map @to_world")).unwrap_or_default();
    let _ = write!(
        text,
        r#"flush table ip hutch_public
table ip hutch_public {{
	chain prerouting {{
		dnat to ip daddr map @to_private
	}}
	chain output {{
		oifname "hu*" dnat to oifname . ip daddr map @on_tap
	}}
	chain postrouting {{
		oifname "hu*" ct status dnat snat to ip saddr map @to_public
		{world}
	}}
}}
"#
    );
    for pair in pairs {
        text.push_str(&elements("add", pair));
    }
    text
}

/// The text that has these addresses lead where they should, from where those `before` led.
pub(super) fn change(before: &[Pair], after: &[Pair]) -> String {
    let gone = before.iter().filter(|pair| !after.contains(pair)).map(|pair| elements("delete", pair));
    let new = after.iter().filter(|pair| !before.contains(pair)).map(|pair| elements("add", pair));
    gone.chain(new).collect()
}

/// Adds how many rules each chain has, and how many elements each map.
pub(super) fn count(pairs: &[Pair], uplink: Option<&Uplink>, counts: &mut BTreeMap<String, usize>) {
    let out = if uplink.is_some() { 2 } else { 1 };
    for (chain, rules) in [("prerouting", 1), ("output", 1), ("postrouting", out)] {
        counts.insert(format!("ip chain {chain}"), rules);
    }
    let lan = pairs.iter().filter(|pair| pair.lan).count();
    for (map, _) in MAPS {
        counts.insert(format!("ip set {map}"), if map == "to_world" { lan } else { pairs.len() });
    }
}

fn elements(verb: &str, pair: &Pair) -> String {
    let Pair { public, private, tap, lan } = pair;
    let mut text = format!(
        "{verb} element ip hutch_public to_private {{ {public} : {private} }}\n\
         {verb} element ip hutch_public on_tap {{ \"{tap}\" . {public} : {private} }}\n\
         {verb} element ip hutch_public to_public {{ {private} : {public} }}\n"
    );
    if *lan {
        let _ = writeln!(text, "{verb} element ip hutch_public to_world {{ {private} : {public} }}");
    }
    text
}

/// The text that takes the table away, present or not.
pub fn render_teardown() -> &'static str {
    "add table ip hutch_public\ndelete table ip hutch_public\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(lan: bool) -> Pair {
        Pair {
            public: Ipv4Addr::new(198, 19, 0, 1),
            private: Ipv4Addr::new(172, 31, 0, 4),
            tap: "huac1f0004".parse().unwrap(),
            lan,
        }
    }

    #[test]
    fn an_address_is_only_elements() {
        let text = change(&[], &[pair(false)]);
        assert_eq!(
            text,
            "add element ip hutch_public to_private { 198.19.0.1 : 172.31.0.4 }\n\
             add element ip hutch_public on_tap { \"huac1f0004\" . 198.19.0.1 : 172.31.0.4 }\n\
             add element ip hutch_public to_public { 172.31.0.4 : 198.19.0.1 }\n"
        );
        let world = "add element ip hutch_public to_world { 172.31.0.4 : 198.19.0.1 }\n";
        assert_eq!(change(&[], &[pair(true)]), text.clone() + world);
        assert_eq!(change(&[pair(false)], &[]), text.replace("add ", "delete "));
        assert_eq!(change(&[pair(true)], &[pair(true)]), "");
    }

    #[test]
    fn it_translates_and_decides_nothing() {
        let up = "up0".parse().unwrap();
        let text = render(&[pair(true)], Some(&up));
        let rules: Vec<_> = text.lines().filter(|line| line.starts_with("\t\t")).map(str::trim).collect();
        assert_eq!(
            rules,
            [
                "dnat to ip daddr map @to_private",
                "oifname \"hu*\" dnat to oifname . ip daddr map @on_tap",
                "oifname \"hu*\" ct status dnat snat to ip saddr map @to_public",
                "oifname \"up0\" snat to ip saddr map @to_world",
            ]
        );
        assert!(!render(&[], None).contains("@to_world"));
    }
}
