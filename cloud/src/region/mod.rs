//! A region: one store, one host, and the verbs of EC2 on them.
//!
//! ```text
//!   verbs ── check everything, then write what is to be ──► store (one transaction: work.rs)
//!   reconcile ── what is to be against what the host has ──► host, and what came of it ──► store
//! ```
//!
//! | file | nouns |
//! |---|---|
//! | launch.rs, instances.rs | instances: run; start, stop, reboot, terminate, attributes |
//! | launch_templates.rs | requests to launch, kept |
//! | imports.rs | disks of other machines that become snapshots and images |
//! | stored.rs | images that are written to a bucket, and made of what is in one |
//! | bundles.rs | images whose root is on instance store: bundled to a bucket, launched from there |
//! | kernels.rs | kernels and RAM disks: those of the host, and which of them instances boot |
//! | images.rs, snapshots.rs, volumes.rs, attachments.rs, keys.rs | images; snapshots; volumes, and who has them; key pairs |
//! | encryption.rs | which volumes and snapshots are encrypted, and by which key |
//! | modify.rs | changes of volumes that are there, and what the host is told of any |
//! | quota.rs, account.rs | what an account may have at most; what it has set for itself |
//! | addresses.rs | elastic addresses, and public ones that come and go with instances |
//! | vpcs.rs, routes.rs | what each account begins with, networks and subnets; internet gateways and route tables |
//! | interfaces.rs, cards.rs, network.rs | network interfaces; those of a launch beside the first; the addresses they have |
//! | neighbours.rs | what regions of one machine share: addresses; what the host is told of networks |
//! | groups.rs, firewall.rs, tags.rs | security groups, and what the host is told of them; tags |

mod account;
mod addresses;
mod attachments;
mod bundles;
mod cards;
mod encryption;
mod firewall;
mod groups;
mod images;
mod imports;
mod instances;
mod interfaces;
mod kernels;
mod keys;
mod launch;
mod launch_templates;
pub mod lifecycle;
mod machine;
pub mod metadata;
mod modify;
mod neighbours;
mod network;
mod quota;
mod reconcile;
mod routes;
mod snapshots;
mod stored;
mod tags;
#[cfg(test)]
mod testing;
mod volumes;
mod vpcs;
mod work;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};

use jiff::Timestamp;

use crate::addresses::Pool;
use crate::fault::{Fault, Result};
use crate::host::Host;
use crate::limits::Limits;
use crate::model::Record;
use crate::objects::Objects;
use crate::store::Store;
use crate::types::Table;

pub use account::{AccountSettings, MetadataDefaults};
pub use addresses::{Allocation, Target, Which};
pub use bundles::BundleAsk;
pub use cards::InterfaceAsk;
pub use encryption::Encryption;
pub use groups::RuleAsk;
pub use images::{ImageCopy, NewImage, Registration};
pub use imports::{DiskAsk, DiskFrom, NewImport};
pub use instances::{Attribute, Change};
pub use interfaces::{InterfaceAttribute, MAX_INTERFACES, NewInterface};
pub use keys::{Algorithm, NewKey};
pub use launch::{DeviceAsk, Launch};
pub use launch_templates::{Data as TemplateData, NewTemplate, TemplateName};
pub use modify::VolumeChange;
pub use network::{MAX_ADDRESSES, Secondary};
pub use reconcile::Reconciler;
pub use routes::RouteChange;
pub use snapshots::{NewSnapshots, SnapshotCopy};
pub use stored::{RestoreAsk, StoreAsk};
pub use volumes::NewVolume;
pub use vpcs::{DEFAULT_CIDR, NewSubnet};
pub use work::Work;

/// How a region is set up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its name, such as `home-1`.
    pub name: String,
    /// The letters of its zones.
    pub zones: Vec<char>,
    /// The instance types.
    pub types: Table,
    /// What each account may have at most.
    pub limits: Limits,
    /// The public addresses there are.
    pub addresses: Pool,
    /// The account that owns the images of the host's templates.
    pub owner: String,
    /// Start instances again that ran when the host went down.
    pub resume: bool,
    /// The directory below which files may be imported by a URL: a whole path.
    pub import_dir: Option<std::path::PathBuf>,
}

/// One region.
pub struct Region {
    settings: Settings,
    store: Arc<dyn Store>,
    host: Arc<dyn Host>,
    /// Where stored images are; `None`: nowhere.
    objects: Option<Arc<Objects>>,
    /// Where the next free address of a subnet is looked for.
    hints: Mutex<HashMap<String, u32>>,
    /// The regions beside this one, from which it may copy, and which may be on its machine.
    neighbours: OnceLock<neighbours::Neighbours>,
    /// Held by verbs that are right only if nothing new comes meanwhile, and shared by the others: a check that nobody uses
    /// a thing is no record that could hold still.
    turn: RwLock<()>,
    /// What the host has been told of security groups.
    firewall: firewall::Firewall,
    /// The imports that are under way here.
    imports: imports::Imports,
}

impl Region {
    /// A region on its store and its host.
    pub fn new(settings: Settings, store: Arc<dyn Store>, host: Arc<dyn Host>) -> Region {
        let (hints, neighbours, turn, firewall, imports) = Default::default();
        Region { settings, store, host, objects: None, hints, neighbours, turn, firewall, imports }
    }

    /// Has it write images to an object store, and make them of what is there.
    #[must_use]
    pub fn with_objects(self, objects: Arc<Objects>) -> Region {
        Region { objects: Some(objects), ..self }
    }

    /// The host of the region of this name.
    fn host_of(&self, region: &str) -> Result<Arc<dyn Host>> {
        if region == self.settings.name {
            return Ok(self.host.clone());
        }
        let found = self.neighbours.get().and_then(|met| met.all.get(region)).and_then(Weak::upgrade);
        let missing = || Fault::value("sourceRegion", region, "There is no such region.");
        found.map(|found| found.host.clone()).ok_or_else(missing)
    }

    /// How it is set up.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What runs its machines.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// Its store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The names of its zones.
    pub fn zones(&self) -> Vec<String> {
        self.settings.zones.iter().map(|letter| format!("{}{letter}", self.settings.name)).collect()
    }

    /// The record of this id, if it is the account's.
    ///
    /// # Errors
    /// The store's.
    pub fn get<T: Record>(&self, id: &str) -> Result<Option<T>> {
        work::get(&*self.store, id)
    }

    /// All records of a kind, in the order of their ids.
    ///
    /// # Errors
    /// The store's.
    pub fn all<T: Record>(&self) -> Result<Vec<T>> {
        work::all(&*self.store, "")
    }

    /// Up to `limit` records of a kind behind the one of the id `after`, in the order of their ids.
    ///
    /// # Errors
    /// The store's.
    pub fn page<T: Record>(&self, after: &str, limit: usize) -> Result<Vec<T>> {
        work::page(&*self.store, after, limit)
    }

    /// All records of a kind whose ids begin so.
    ///
    /// # Errors
    /// The store's.
    pub fn all_of<T: Record>(&self, prefix: &str) -> Result<Vec<T>> {
        work::all(&*self.store, prefix)
    }

    /// What `job` gives while no verb of these regions is done, so that their records and hosts hold still together.
    pub fn at_rest<R>(regions: &BTreeMap<String, Arc<Region>>, job: impl FnOnce() -> R) -> R {
        let turns = regions.values().map(|region| region.turn.write());
        let _turns: Vec<_> = turns.map(|turn| turn.unwrap_or_else(PoisonError::into_inner)).collect();
        job()
    }

    fn transact<R>(&self, job: impl FnMut(&mut Work<'_>) -> Result<R>) -> Result<R> {
        if self.settings.limits.counts() {
            return self.transact_alone(job);
        }
        let _together = self.taking_turns();
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        Work::on(&*self.store, job)
    }

    /// Likewise, while no other verb is done: for those that look through all records of a kind.
    fn transact_alone<R>(&self, job: impl FnMut(&mut Work<'_>) -> Result<R>) -> Result<R> {
        let _together = self.taking_turns();
        let _turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        Work::on(&*self.store, job)
    }
}

/// How many records of a kind, such as `which`, a store has.
///
/// # Errors
/// The store's.
pub fn count<T: Record>(store: &dyn Store, which: impl Fn(&T) -> bool) -> Result<usize> {
    Ok(work::all::<T>(store, "")?.into_iter().filter(which).count())
}

/// Now, to the millisecond, which is what EC2 tells.
fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// What a client token stood for: `None` when it is new.
///
/// # Errors
/// `IdempotentParameterMismatch`: it stood for another request.
fn recall(work: &mut Work<'_>, token: Option<&str>, request: &str) -> Result<Option<Vec<String>>> {
    let Some(token) = token else { return Ok(None) };
    match work.get::<crate::model::Token>(token)? {
        Some(known) if known.request == request => Ok(Some(known.made)),
        Some(_) => Err(Fault::new(
            "IdempotentParameterMismatch",
            "The client token has been used with different parameters; use a new one",
        )),
        None => Ok(None),
    }
}

/// Remembers what a client token stands for.
fn remember(work: &mut Work<'_>, token: Option<&str>, request: &str, made: Vec<String>) -> Result<()> {
    let Some(token) = token else { return Ok(()) };
    work.put(&crate::model::Token { id: token.into(), request: request.into(), made, at: now() })
}
