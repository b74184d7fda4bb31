//! What is kept of networks while they are up, for who comes next: guests and security groups, as files; and the firewall
//! that follows from them.
//!
//! ```text
//!   hu….json     a guest                groups-OWNER.json   what the security groups of a region say
//!   applied      the firewall as we left it: the ruleset's generation, the version of its constant rules
//!   net.lock     held by who changes any of it
//! ```
//! The kernel is changed by the difference of what follows from the files before and after. Where something else may have
//! changed it since, it is listed and counted first; where that does not fit, or the difference is refused, all of it is
//! put anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::flows;
use crate::groups::Group;
use crate::guest::elastic::{self, Published};
use crate::guest::{NetError, SUBNET, VPC};
use crate::name::{GroupId, TAP_PREFIX, Uplink};
use crate::nft::{self, Guest, Listing, Network, NftError, Ruleset};
use crate::served::{Served, TICK};
use crate::tap;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// How often the firewall is looked at though nothing was heard of a change.
const LOOK: u32 = 150;
/// linux/netfilter/nfnetlink.h: `NFNLGRP_NFTABLES`.
const CHANGES: u32 = 7;

/// A guest, as recorded for those who come after a crash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub tap: String,
    pub mac: String,
    pub ip: Ipv4Addr,
    #[serde(default)]
    pub more: Vec<Ipv4Addr>,
    #[serde(default)]
    pub ip6: Option<Ipv6Addr>,
    #[serde(default = "first_subnet")]
    pub subnet: Ipv4Net,
    #[serde(default = "Network::alone")]
    pub network: Network,
    #[serde(default = "alone")]
    pub groups: Vec<GroupId>,
    #[serde(default)]
    pub public: Option<Published>,
    /// Forwarding was off before the first guest came.
    pub forwarding_was_off: bool,
}

impl Record {
    pub fn guest(&self) -> Option<Guest> {
        Some(Guest {
            tap: self.tap.parse().ok()?,
            mac: self.mac.parse().ok()?,
            ip4: self.ip,
            more: self.more.clone(),
            ip6: self.ip6,
            gateway: gateway(self.subnet),
            network: self.network.clone(),
            groups: self.groups.clone(),
        })
    }

    /// Whether it has the address.
    pub fn has(&self, ip: Ipv4Addr) -> bool {
        self.ip == ip || self.more.contains(&ip)
    }

    fn alive(&self) -> bool {
        nix::net::if_::if_nametoindex(self.tap.as_str()).is_ok()
    }
}

fn first_subnet() -> Ipv4Net {
    SUBNET
}

fn alone() -> Vec<GroupId> {
    vec![GroupId::alone()]
}

/// The gateway of a subnet's guests: its first address, as in EC2.
pub(crate) fn gateway(subnet: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(subnet.network()).saturating_add(1))
}

/// The firewall as we left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Applied {
    generation: u32,
    version: u64,
}

/// Groups, by who told of them; `None` is who was the only one, in an earlier version.
type Told = BTreeMap<Option<String>, Vec<Group>>;

/// What is kept, read and locked.
pub(crate) struct Kept {
    dir: PathBuf,
    _lock: Flock<File>,
    pub records: Vec<Record>,
    /// What each who tells of groups has told.
    groups: Told,
    pub uplink: Option<Uplink>,
    /// What the files say.
    written: (Vec<Record>, Told),
    /// What the kernel should have.
    before: Ruleset,
    /// Guests that the firewall knows though their taps are gone.
    pub dead: Vec<Record>,
}

impl Kept {
    /// Waits for the lock and reads. Guests whose taps are gone are [`dead`](Kept::dead), and go with the next change.
    ///
    /// # Errors
    /// [`NetError::State`].
    pub fn open(dir: &Path) -> Result<Kept, NetError> {
        let lock = lock(dir)?;
        let groups = told(dir)?;
        let uplink = tap::default_link().and_then(|name| name.parse().ok());
        let recorded = records(dir)?;
        // Guests that clash were never up together: there is nothing that could be told from them.
        let before = ruleset(&recorded, &groups, uplink.clone()).unwrap_or_else(|_| Ruleset::new(VPC, None));
        let written = (recorded.clone(), groups.clone());
        let (records, dead) = recorded.into_iter().partition(Record::alive);
        Ok(Kept { dir: dir.to_owned(), _lock: lock, records, groups, uplink, written, before, dead })
    }

    /// Makes the firewall what is kept now, and then the files.
    ///
    /// # Errors
    /// [`NetError::Firewall`]: both are as they were. [`NetError::State`]: the next call mends it.
    pub fn put(&mut self) -> Result<(), NetError> {
        let after = ruleset(&self.records, &self.groups, self.uplink.clone())?;
        let (applied, version) = (self.dir.join("applied"), after.version());
        let left = read::<Applied>(&applied).filter(|left| left.version == version);
        let now = generation();
        let ours = left.is_some_and(|left| Some(left.generation) == now);
        let looks_right = || nft::listing().is_ok_and(|there| self.before.is_there(&there));
        let known = ours || left.is_some() && looks_right();
        if left.is_some() && !known {
            tracing::error!("another program has changed the firewall: it is put anew");
        }
        let change = after.change(&self.before).filter(|_| known);
        let mut transactions = 1;
        // Until the files say what the kernel has, nobody may believe them.
        let doubt = || match fs::remove_file(&applied) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(NetError::State { path: applied.clone(), source })
            }
            _ => Ok(()),
        };
        let mut done = false;
        if let Some(change) = change {
            if change.is_empty() {
                (done, transactions) = (true, 0);
            } else {
                doubt()?;
                match nft::apply(&change) {
                    Ok(()) => done = true,
                    Err(error) => {
                        tracing::error!(%error, "the firewall is not as it was left: it is put anew")
                    }
                }
            }
        }
        if !done {
            doubt()?;
            nft::apply(&after.render(&nft::listing().unwrap_or_default()))?;
        }
        self.before = after;
        self.write()?;
        // If another program was at it at the same time, who comes next has to look: a generation before its own.
        if let Some(now) = now {
            let generation = now.wrapping_add(transactions);
            write(&applied, &Applied { generation, version })?;
        }
        Ok(())
    }

    /// Makes the files what is kept.
    fn write(&mut self) -> Result<(), NetError> {
        for (owner, groups) in &self.groups {
            if self.written.1.get(owner) != Some(groups) {
                write(&groups_path(&self.dir, owner.as_deref()), groups)?;
            }
        }
        for owner in self.written.1.keys().filter(|owner| !self.groups.contains_key(*owner)) {
            let path = groups_path(&self.dir, owner.as_deref());
            fs::remove_file(&path).map_err(|source| NetError::State { path, source })?;
        }
        for record in self.records.iter().filter(|record| !self.written.0.contains(record)) {
            self.write_record(record)?;
        }
        for record in std::mem::take(&mut self.dead) {
            elastic::withdraw(&record);
            elastic::forget(&record);
            // Who gets its address next is another guest: what was let through to this one is nothing to that. Where the kernel
            // does not tell its connections, they end by their time.
            for ip in std::iter::once(&record.ip).chain(&record.more) {
                let _ = flows::forget(*ip);
            }
            if self.records.iter().any(|other| other.tap == record.tap) {
                // Its place has been taken already.
                continue;
            }
            let path = record_path(&self.dir, &record.tap);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(NetError::State { path, source });
                }
                _ => {}
            }
        }
        self.written = (self.records.clone(), self.groups.clone());
        Ok(())
    }

    /// Records a guest that is to be: whatever happens to it next can be undone by someone else.
    ///
    /// # Errors
    /// [`NetError::State`].
    pub fn announce(&self, record: &Record) -> Result<(), NetError> {
        // The kernel does not have it yet, and who comes after a crash must not believe that it has.
        match fs::remove_file(self.dir.join("applied")) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(NetError::State { path: self.dir.join("applied"), source });
            }
            _ => {}
        }
        self.write_record(record)
    }

    fn write_record(&self, record: &Record) -> Result<(), NetError> {
        if record.forwarding_was_off {
            let path = self.dir.join("forwarding-was-off");
            fs::write(&path, "").map_err(|source| NetError::State { path, source })?;
        }
        write(&record_path(&self.dir, &record.tap), record)
    }

    /// Counts the guest of a tap among the dead.
    pub fn forget(&mut self, tap: &str) {
        self.dead.extend(self.records.extract_if(.., |record| record.tap == tap));
    }

    /// Whether there is a guest, or a tap of ours without one: then the tables are there.
    pub fn in_use(&self) -> bool {
        !self.records.is_empty() || any_tap()
    }

    /// Puts the firewall, or takes it away: without guests there are no tables, and forwarding is as it was. While any tap
    /// of ours is there, its machine alive though its record be lost, the tables stay: they are what drops by the prefix.
    ///
    /// # Errors
    /// See [`Kept::put`].
    pub fn settle(&mut self) -> Result<(), NetError> {
        if self.in_use() {
            return self.put();
        }
        nft::apply(&nft::render_teardown())?;
        self.write()?;
        let _ = fs::remove_file(self.dir.join("applied"));
        let was_off = self.dir.join("forwarding-was-off");
        if was_off.exists() {
            let _ = fs::write(FORWARDING, "0");
            let _ = fs::remove_file(was_off);
        }
        Ok(())
    }
}

/// Whether the host forwards nothing.
pub(crate) fn forwarding_is_off() -> bool {
    fs::read_to_string(FORWARDING).unwrap_or_default().trim() == "0"
}

/// Has the host forward.
pub(crate) fn forward() -> Result<(), NetError> {
    fs::write(FORWARDING, "1").map_err(|source| NetError::State { path: FORWARDING.into(), source })
}

/// What a kernel does not tell is never ours.
fn generation() -> Option<u32> {
    nft::generation().ok()
}

fn ruleset(records: &[Record], groups: &Told, uplink: Option<Uplink>) -> Result<Ruleset, NftError> {
    let rules = Ruleset::new(VPC, uplink).with_groups(groups.values().flatten().cloned().collect());
    let mut rules = rules.with_public(elastic::pairs(records));
    for guest in records.iter().filter_map(Record::guest) {
        rules.add(guest)?;
    }
    Ok(rules)
}

/// Whether a link of this namespace is named like our taps.
pub(crate) fn any_tap() -> bool {
    let Ok(links) = nix::net::if_::if_nameindex() else { return true };
    links.iter().any(|link| link.name().to_bytes().starts_with(TAP_PREFIX.as_bytes()))
}

fn lock(dir: &Path) -> Result<Flock<File>, NetError> {
    let path = dir.join("net.lock");
    let error = |source| NetError::State { path: path.clone(), source };
    fs::create_dir_all(dir).map_err(error)?;
    let file = File::options().create(true).append(true).open(&path).map_err(error)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| error(e.into()))
}

fn record_path(dir: &Path, tap: &str) -> PathBuf {
    dir.join(format!("{tap}.json"))
}

fn groups_path(dir: &Path, owner: Option<&str>) -> PathBuf {
    dir.join(owner.map_or("groups.json".into(), |owner| format!("groups-{owner}.json")))
}

/// What is told of groups, by all who tell of them.
fn told(dir: &Path) -> Result<Told, NetError> {
    let error = |source| NetError::State { path: dir.to_owned(), source };
    let mut told = Told::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let path = entry.map_err(error)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let owner = match name.strip_suffix(".json").and_then(|name| name.strip_prefix("groups")) {
            Some("") => None,
            Some(rest) if rest.starts_with('-') => Some(rest.trim_start_matches('-').to_owned()),
            _ => continue,
        };
        told.insert(owner, read(&path).unwrap_or_default());
    }
    Ok(told)
}

/// What a file holds; `None` where it is not there or is something else.
fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Writes a file whole or not at all: a record cut short would hide a living guest.
fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), NetError> {
    let error = |source| NetError::State { path: path.to_owned(), source };
    let bytes = serde_json::to_vec(value).map_err(|e| error(e.into()))?;
    let half = path.with_extension("new");
    fs::write(&half, bytes).and_then(|()| fs::rename(&half, path)).map_err(error)
}

/// The records, in order of their taps; what is no record is passed over.
fn records(dir: &Path) -> Result<Vec<Record>, NetError> {
    let error = |source| NetError::State { path: dir.to_owned(), source };
    let mut records: Vec<Record> = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let path = entry.map_err(error)?.path();
        if path.extension().is_some_and(|e| e == "json") {
            records.extend(read(&path));
        }
    }
    records.sort_by(|a, b| a.tap.cmp(&b.tap));
    Ok(records)
}

/// Tells what the security groups of `owner`, a region's name, say: all there are, those that are not among them let nothing
/// through. Those of other owners stay. What is the same already is not touched.
///
/// # Errors
/// [`NetError::Firewall`], [`NetError::State`]: then the rules are as they were, or are mended by the next call.
pub fn set_groups(dir: &Path, owner: &str, groups: &[Group]) -> Result<(), NetError> {
    let mut kept = Kept::open(dir)?;
    // It is a file's name, too.
    owner.parse::<GroupId>().map_err(|e| NetError::State {
        path: groups_path(dir, Some(owner)),
        source: io::Error::new(io::ErrorKind::InvalidInput, e),
    })?;
    let ids: BTreeSet<&GroupId> = groups.iter().map(|group| &group.id).collect();
    // Told before there were owners: by this one, if one of its groups is among them.
    kept.groups
        .retain(|owner, groups| owner.is_some() || !groups.iter().any(|group| ids.contains(&group.id)));
    kept.groups.insert(Some(owner.to_owned()), groups.to_vec());
    // Without a guest there is no firewall that would have to know.
    if kept.in_use() || !kept.dead.is_empty() { kept.settle() } else { kept.write() }
}

/// Takes out what machines left that died without a word, and mends the firewall where it is not as it should be. Returns
/// how many guests were taken out.
///
/// # Errors
/// See [`NetError`].
pub fn repair(dir: &Path) -> Result<usize, NetError> {
    let mut kept = Kept::open(dir)?;
    let dead = kept.dead.len();
    // An uplink that went down has forgotten what it announces; one that is gone must not keep the firewall from being mended.
    let announced = kept.records.iter().map(elastic::republish).collect::<Vec<_>>();
    // Without tables there is nothing to be taken away, and perhaps no right to.
    if kept.in_use() || dead > 0 || nft::listing().is_ok_and(|there| there != Listing::default()) {
        kept.settle()?;
    }
    announced.into_iter().collect::<Result<(), _>>()?;
    Ok(dead)
}

/// Looks whether another program has changed the firewall, and if it has, puts it right.
///
/// # Errors
/// See [`Kept::put`].
fn mend(dir: &Path) -> Result<(), NetError> {
    let left = read::<Applied>(&dir.join("applied"));
    if left.is_some_and(|left| Some(left.generation) == generation()) {
        return Ok(());
    }
    let mut kept = Kept::open(dir)?;
    if kept.in_use() { kept.put() } else { Ok(()) }
}

/// Mends the firewall when another program changes it, until it is dropped.
pub struct Watch {
    _served: Served,
}

impl Watch {
    /// Watches the firewall of this thread's network namespace, whose networks are recorded in `dir`.
    ///
    /// # Errors
    /// The kernel does not tell of changes.
    pub fn start(dir: &Path) -> io::Result<Watch> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.add_membership(CHANGES)?;
        socket.set_non_blocking(true)?;
        let dir = dir.to_owned();
        let mut ticks = 0;
        let turn = move || {
            std::thread::sleep(TICK);
            ticks += 1;
            let mut heard = ticks >= LOOK;
            loop {
                match socket.recv_from_full() {
                    Ok(_) => heard = true,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    // Changes came too fast for us.
                    Err(_) => {
                        heard = true;
                        break;
                    }
                }
            }
            if heard {
                ticks = 0;
                if let Err(error) = mend(&dir) {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the firewall cannot be mended"
                    );
                    // The next tick tries again.
                    ticks = LOOK;
                }
            }
        };
        Ok(Watch { _served: Served::start("firewall".into(), turn)? })
    }
}
