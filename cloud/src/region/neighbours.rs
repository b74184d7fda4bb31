//! The regions of one machine: its kernel routes the addresses of all of them, so none is given twice.
//!
//! Each default network has the range that EC2's have, and its subnets are apart from those of the other regions. Which ones a
//! region has is settled when it is served first, and recorded with it: they do not move when regions come or go. Public
//! addresses are of one pool. Verbs of regions that share a machine take turns, so that what one sees of another holds.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ipnet::Ipv4Net;

use crate::fault::{Fault, Result};
use crate::host::{HostError, Network};
use crate::model::{Gateway, Interface, Name, Record, RouteTable, Slots, Subnet, Target, Vpc};

use super::vpcs::{DEFAULT_CIDR, SUBNET_BITS};
use super::{Region, Work, work};

/// The id of the one record of its kind.
const SLOTS: &str = "default-subnets";

/// The regions beside one, and what they share.
pub(super) struct Neighbours {
    pub(super) all: BTreeMap<String, Weak<Region>>,
    /// Whether the hosts of several are one machine.
    shared: bool,
    /// Held by the verb whose turn it is, where they share a machine.
    turn: Arc<Mutex<()>>,
    /// The default subnet of each zone; empty where they share no machine: the first ones, then.
    subnets: BTreeMap<String, Ipv4Net>,
}

impl Region {
    /// Tells the regions of each other, once, before any of them is asked for something; and settles what each has of the
    /// machine, where they share one.
    ///
    /// # Errors
    /// Two of them have the same addresses, since they have not always been on one machine; or there are not enough.
    pub fn meet(regions: &BTreeMap<String, Arc<Region>>) -> Result<()> {
        let all: BTreeMap<_, _> = regions.iter().map(|(name, r)| (name.clone(), Arc::downgrade(r))).collect();
        let here: Vec<_> = regions.values().filter(|region| region.host.one_machine()).collect();
        let mut slots = settle(&here)?;
        let (turn, shared) = (Arc::new(Mutex::new(())), here.len() > 1);
        for (name, region) in regions {
            let subnets = slots.remove(name).unwrap_or_default();
            let shared = shared && region.host.one_machine();
            // Told already: they do not change.
            let _ =
                region.neighbours.set(Neighbours { all: all.clone(), shared, turn: turn.clone(), subnets });
        }
        Ok(())
    }

    /// The other regions of this machine.
    fn beside(&self) -> Vec<Arc<Region>> {
        let Some(met) = self.neighbours.get().filter(|met| met.shared) else { return Vec::new() };
        let others = met.all.iter().filter(|(name, _)| **name != self.settings.name);
        others.filter_map(|(_, region)| region.upgrade()).filter(|region| region.host.one_machine()).collect()
    }

    /// Waits for the turn of this region, where it shares its machine.
    pub(super) fn taking_turns(&self) -> Option<MutexGuard<'_, ()>> {
        let met = self.neighbours.get().filter(|met| met.shared)?;
        Some(met.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The default subnet of a zone.
    pub(super) fn default_cidr(&self, zone: &str) -> Option<Ipv4Net> {
        match self.neighbours.get().and_then(|met| met.subnets.get(zone)) {
            Some(cidr) => Some(*cidr),
            None => slot(self.zones().iter().position(|known| known == zone)?.try_into().ok()?),
        }
    }

    /// Whether addresses of default networks are another region's of this machine, and what has them there.
    ///
    /// # Errors
    /// The stores'.
    pub(super) fn taken_beside(&self, cidr: Ipv4Net) -> Result<Option<String>> {
        let overlaps = |net: &Ipv4Net| net.contains(&cidr) || cidr.contains(net);
        for region in self.beside() {
            let own = region.neighbours.get().into_iter().flat_map(|met| &met.subnets);
            let zone = own.map(|(zone, net)| (*net, format!("the default one of {zone}")));
            let made = default_subnets(&region)?.into_iter().map(|s| (s.cidr, s.id));
            if let Some((net, what)) = zone.chain(made).find(|(net, _)| overlaps(net)) {
                return Ok(Some(format!("{what} ({net}), of a region on this machine")));
            }
        }
        Ok(None)
    }

    /// Whether another region of this machine has given a public address.
    ///
    /// # Errors
    /// The stores'.
    pub(super) fn given_beside(&self, ip: Ipv4Addr) -> Result<bool> {
        for region in self.beside() {
            if work::get::<Name>(&*region.store, &super::addresses::name(ip))?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The network of an interface as the host is told of it: what its subnet's routes lead through the internet gateway.
    pub(super) fn network(&self, interface: &Interface) -> Result<Network> {
        let missing = || Fault::internal(format!("{} has no VPC", interface.id));
        let vpc = self.get::<Vpc>(&interface.vpc)?.ok_or_else(missing)?;
        let tables = self.all::<RouteTable>()?.into_iter().filter(|table| table.vpc == vpc.id);
        let tables: Vec<_> = tables.collect();
        let has = |table: &&RouteTable| table.associations.values().flatten().any(|s| *s == interface.subnet);
        let table = tables.iter().find(has).or_else(|| tables.iter().find(|table| table.is_main()));
        // One from before routes were records has what it told then.
        let mut routes = if tables.is_empty() { vec![Ipv4Net::default()] } else { Vec::new() };
        for (destination, target) in table.into_iter().flat_map(|table| &table.routes) {
            // Without the gateway it is a black hole.
            if let Target::Gateway(id) = target
                && self.get::<Gateway>(id)?.is_some_and(|gateway| gateway.vpc.as_ref() == Some(&vpc.id))
            {
                routes.push(*destination);
            }
        }
        Ok(Network { id: vpc.id.parse().map_err(Fault::internal)?, cidr: vpc.cidr, routes })
    }

    /// Whether instances in this subnet can run now.
    ///
    /// # Errors
    /// `Unsupported`: the host reaches others by the network's addresses.
    pub(super) fn runs_in(&self, work: &mut Work<'_>, subnet: &Subnet) -> Result<()> {
        let vpc: Vpc = super::tags::own(work, &subnet.account, &subnet.vpc)?;
        let network =
            Network { id: vpc.id.parse().map_err(Fault::internal)?, cidr: vpc.cidr, routes: Vec::new() };
        let unsupported = |why: String| {
            let id = &subnet.id;
            Fault::new("Unsupported", format!("Instances cannot run in the subnet {id} on this host: {why}"))
        };
        if vpc.default || !self.host.one_machine() {
            return Ok(());
        }
        if DEFAULT_CIDR.contains(&vpc.cidr) || vpc.cidr.contains(&DEFAULT_CIDR) {
            let why = format!("the addresses {} of {} are those of default VPCs", vpc.cidr, vpc.id);
            return Err(unsupported(why));
        }
        if self.settings.addresses.overlaps(vpc.cidr) {
            let why = format!("the addresses {} of {} are among the public ones", vpc.cidr, vpc.id);
            return Err(unsupported(why));
        }
        match self.host.room(&network) {
            Err(HostError::NoRoom(why)) => Err(unsupported(why)),
            Err(error) => Err(Fault::internal(error)),
            Ok(()) => Ok(()),
        }
    }
}

/// The subnets of a region's default networks.
fn default_subnets(region: &Region) -> Result<Vec<Subnet>> {
    let all = region.all::<Subnet>()?.into_iter();
    Ok(all.filter(|subnet| subnet.vpc == region.default_vpc(&subnet.account)).collect())
}

/// A subnet of the default network.
fn slot(n: u8) -> Option<Ipv4Net> {
    DEFAULT_CIDR.subnets(SUBNET_BITS).ok()?.nth(n.into())
}

/// Which default subnets the zones of each of these regions have, by the regions' names; recorded for those that had none.
fn settle(regions: &[&Arc<Region>]) -> Result<BTreeMap<String, BTreeMap<String, Ipv4Net>>> {
    let mut taken: BTreeMap<u8, String> = BTreeMap::new();
    let mut known: BTreeMap<String, Slots> = BTreeMap::new();
    let mut take = |slots: &Slots, name: &str| {
        for n in slots.zones.values() {
            if let Some(other) = taken.insert(*n, name.into()) {
                let net = slot(*n).map(|net| net.to_string()).unwrap_or_default();
                let why = format!(
                    "it has the addresses {net}, as {other} has: both began where the other was not; serve one of them, on another machine or with another --state"
                );
                return Err(Fault::internal(format!("the region {name}: {why}")));
            }
        }
        Ok(())
    };
    for region in regions {
        let name = &region.settings.name;
        let recorded = match region.get::<Slots>(SLOTS)? {
            // Before there could be a second region each zone had the subnet of its place.
            None if !default_subnets(region)?.is_empty() => {
                let zones = region.zones().into_iter().zip(0..).collect();
                Some(Slots { id: SLOTS.into(), zones })
            }
            recorded => recorded,
        };
        if let Some(slots) = recorded {
            take(&slots, name)?;
            known.insert(name.clone(), slots);
        }
    }
    let mut made = Vec::new();
    for region in regions {
        made.extend(default_subnets(region)?.into_iter().map(|subnet| subnet.cidr));
    }
    let mut settled = BTreeMap::new();
    for region in regions {
        let name = &region.settings.name;
        let before = known.remove(name);
        let mut slots = before.clone().unwrap_or_else(|| Slots { id: SLOTS.into(), zones: BTreeMap::new() });
        for zone in region.zones() {
            if slots.zones.contains_key(&zone) {
                continue;
            }
            let apart = |n: &u8| {
                let net = slot(*n);
                let free =
                    |other: &Ipv4Net| net.is_some_and(|net| !net.contains(other) && !other.contains(&net));
                net.is_some() && !taken.contains_key(n) && made.iter().all(free)
            };
            let free = (0..16).find(apart).ok_or_else(|| {
                let why =
                    "the default networks of the regions of one machine have 16 subnets: serve fewer zones";
                Fault::internal(format!("the zone {zone}: {why}"))
            })?;
            taken.insert(free, name.clone());
            slots.zones.insert(zone, free);
        }
        if region.get::<Slots>(SLOTS)?.as_ref() != Some(&slots) {
            region.transact(|work| work.put(&slots))?;
        }
        let nets = slots.zones.iter().filter_map(|(zone, n)| Some((zone.clone(), slot(*n)?)));
        settled.insert(name.clone(), nets.collect());
    }
    Ok(settled)
}

/// Whether a change of this record means other routes, and for whose instances; `None`: for everyone's, since it is gone.
pub(super) fn routes(region: &Region, kind: &str, id: &str) -> Result<Option<Option<String>>> {
    Ok(match kind {
        RouteTable::KIND => Some(region.get::<RouteTable>(id)?.map(|table| table.account)),
        Gateway::KIND => Some(region.get::<Gateway>(id)?.map(|gateway| gateway.account)),
        _ => None,
    })
}
