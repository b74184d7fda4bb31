//! What is in the kernel: whether the tables are as they were left, and what each tap was refused.
//!
//! Every transaction of whatever program gives the ruleset of a network namespace the next generation. Who remembers the
//! generation of his own last one knows that nobody came after him; else the tables are listed and counted.

use std::collections::BTreeMap;
use std::io;
use std::process::Command;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use serde::Deserialize;
use serde_json::Value;

use super::{NftError, TABLE, run};
use crate::name::{GroupId, TapName};

/// Netlink numbers (linux/netfilter/nfnetlink.h, nf_tables.h): the messages that ask for the generation and tell it, its attribute.
const GET_GENERATION: u16 = (10 << 8) | 16;
const NEW_GENERATION: u16 = (10 << 8) | 15;
const GENERATION_ID: u16 = 1;
/// linux/netlink.h: `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// A netlink header, and the header of netfilter's messages.
const HEADERS: usize = 16 + 4;

/// How many rules each chain has, and how many elements each set, under `FAMILY chain NAME` and `FAMILY set NAME`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    pub(super) counts: BTreeMap<String, usize>,
}

impl Listing {
    /// The chains and sets that are there for groups and networks, each with its kind: for those who take them away.
    pub(super) fn of_groups(&self) -> Vec<(&str, &str)> {
        let mut found = Vec::new();
        for key in self.counts.keys() {
            let mut words = key.splitn(3, ' ');
            let (Some("inet"), Some(kind), Some(name)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            let Some((id, end)) = name.rsplit_once('-') else { continue };
            // Whatever else is called is not ours to put into a text.
            let id = id.strip_prefix("c_").map_or(id, |_| "c");
            let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if plain
                && id.parse::<GroupId>().is_ok()
                && matches!(end, "in" | "out" | "4" | "6" | "wall" | "taps")
            {
                found.push((kind, name));
            }
        }
        found
    }
}

/// The counts that a text makes which has a rule a line in blocks of tables and chains.
pub(super) fn counting(constants: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    let (mut family, mut chain) = ("", None);
    for line in constants.lines().map(str::trim) {
        let words: Vec<_> = line.split(' ').collect();
        match words.as_slice() {
            ["table", name, ..] => family = *name,
            ["chain", name, "{"] => {
                let key = format!("{family} chain {name}");
                counts.insert(key.clone(), 0);
                chain = Some(key);
            }
            ["}"] => chain = None,
            [""] => {}
            _ => {
                if let Some(count) = chain.as_ref().and_then(|key| counts.get_mut(key)) {
                    *count += 1;
                }
            }
        }
    }
    counts
}

#[derive(Deserialize)]
struct Listed {
    nftables: Vec<BTreeMap<String, Value>>,
}

fn list(what: &[&str]) -> Result<Vec<BTreeMap<String, Value>>, NftError> {
    let text = run(Command::new("nft").arg("-j").arg("list").args(what), "")?;
    let listed: Listed = serde_json::from_slice(&text).map_err(|e| NftError::Refused(e.to_string()))?;
    Ok(listed.nftables)
}

/// What is in our tables, in the network namespace of the calling thread; nothing where they are not there.
///
/// # Errors
/// nft's.
pub fn listing() -> Result<Listing, NftError> {
    let mut counts = BTreeMap::new();
    let tables = [("inet", TABLE), ("arp", TABLE), ("ip", super::nat::TABLE)];
    let tables = tables.map(|(family, table)| list(&["table", family, table]));
    let tables = tables.into_iter().filter(
        |listed| !matches!(listed, Err(NftError::Refused(why)) if why.contains("No such file or directory")),
    );
    for item in tables.collect::<Result<Vec<_>, _>>()?.into_iter().flatten() {
        for (kind, value) in item {
            let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
            let family = text("family");
            match kind.as_str() {
                "chain" => drop(counts.entry(format!("{family} chain {}", text("name"))).or_insert(0)),
                "rule" => *counts.entry(format!("{family} chain {}", text("chain"))).or_insert(0) += 1,
                // The kernel's own.
                "set" if text("name") == "flows" => {}
                "set" | "map" => {
                    let elements = value.get("elem").and_then(Value::as_array).map_or(0, Vec::len);
                    counts.insert(format!("{family} set {}", text("name")), elements);
                }
                _ => {}
            }
        }
    }
    Ok(Listing { counts })
}

/// Packets that a tap's guest was refused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refused {
    /// Sent to it.
    pub inbound: u64,
    /// Sent by it, with a wrong source among them.
    pub outbound: u64,
}

/// What the guest of a tap was refused since it was brought up, or since the tables were put anew.
///
/// # Errors
/// nft's: no right, no tables.
pub fn refused(tap: &TapName) -> Result<Refused, NftError> {
    let count = |set: &str| -> Result<u64, NftError> {
        let tap = tap.to_string();
        for item in list(&["set", "inet", TABLE, set])? {
            let elements = item.get("set").and_then(|set| set.get("elem")).and_then(Value::as_array);
            for element in elements.into_iter().flatten().filter_map(|element| element.get("elem")) {
                if element.get("val").and_then(Value::as_str) == Some(&tap) {
                    let packets = element.get("counter").and_then(|counter| counter.get("packets"));
                    return Ok(packets.and_then(Value::as_u64).unwrap_or(0));
                }
            }
        }
        Ok(0)
    };
    Ok(Refused { inbound: count("refused_in")?, outbound: count("refused_out")? })
}

/// The generation of the ruleset of this thread's network namespace.
///
/// # Errors
/// The kernel's.
pub fn generation() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut ask = Vec::with_capacity(HEADERS);
    ask.extend((HEADERS as u32).to_ne_bytes());
    ask.extend(GET_GENERATION.to_ne_bytes());
    ask.extend(REQUEST.to_ne_bytes());
    // Sequence, port; then any family, version 0, no resource.
    ask.extend([0; 8 + 4]);
    socket.send(&ask, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    told(&answer).ok_or_else(|| io::Error::other("the kernel does not tell the generation of its ruleset"))
}

fn told(answer: &[u8]) -> Option<u32> {
    let word = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    if word(4)? != NEW_GENERATION {
        return None;
    }
    let mut at = HEADERS;
    loop {
        let (len, kind) = (usize::from(word(at)?), word(at + 2)?);
        if kind == GENERATION_ID {
            return Some(u32::from_be_bytes(answer.get(at + 4..at + 8)?.try_into().ok()?));
        }
        if len < 4 {
            return None;
        }
        at += len.next_multiple_of(4);
    }
}
