//! Layers that are too many become fewer, while machines run on them: those that only one other needs, and those of
//! chains that are long.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hutch_blockdev::qcow2::{Header, commit, pull};
use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Key, Layer, Qcow2Disk, open_layers};
use hutch_vmm::launch::LaunchError;

use super::super::super::{HostError, Result};
use super::chains::{Chain, Pair, merged, new_name};
use super::files::{disk_failed, failed};
use super::snapshots::Kept;
use super::{Record, Volumes, open_sealed, path, read_record, remove, write_record};

/// A chain so long is made short: well before a machine can open no more.
const LONG: usize = 40;

/// How often chains are looked at though nobody changed them: a backup on the same file system has names of its layers, and
/// nobody tells when it is gone.
const AGAIN: Duration = Duration::from_secs(600);

/// A machine that has volumes.
pub trait Running {
    /// Gives disks new top layers: the serial, the name and the file of each. One that has it already keeps it.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    fn cut(&self, cuts: &[(String, String, File)]) -> Result<()>;

    /// Makes what is beneath the top layer of a volume durable.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    fn seal(&self, volume: &str) -> Result<()>;

    /// Lays the top layer of a volume on other files of the same bytes.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    fn rebase(&self, volume: &str, layers: &[Layer]) -> std::result::Result<(), LaunchError>;
}

/// What there is to do, and whether it may be done now.
#[derive(Default)]
pub(super) struct Tidying {
    state: Mutex<State>,
    changed: Condvar,
    /// Whoever is at it is to let it be.
    stop: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Somebody changed the chains.
    due: bool,
    /// Volumes whose second layer was a snapshot that is gone.
    folds: BTreeSet<String>,
    /// Layers are being written.
    at_work: bool,
    /// So many want no layer to change.
    still: usize,
    closing: bool,
}

impl Tidying {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has all chains looked at.
    pub(super) fn wake(&self) {
        self.state().due = true;
        self.changed.notify_all();
    }

    /// Has these volumes made one with what lies beneath them, where nobody else needs it.
    pub(super) fn want(&self, volumes: impl IntoIterator<Item = String>) {
        self.state().folds.extend(volumes);
        self.wake();
    }

    /// Has what is being written of a layer cut off; it is begun anew later.
    pub(super) fn put_off(&self) {
        let mut state = self.state();
        if state.at_work {
            state.due = true;
            self.stop.store(true, Ordering::Release);
        }
    }

    /// Waits for work; `false` when there will be none.
    fn wait(&self) -> bool {
        let idle = |state: &mut State| !state.closing && (!state.due || state.still > 0);
        let waited = self.changed.wait_timeout_while(self.state(), AGAIN, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.due = false;
        !state.closing
    }

    /// Does `job` unless no layer may change now.
    fn work<T>(&self, job: impl FnOnce() -> T) -> Option<T> {
        {
            let mut state = self.state();
            if state.still > 0 || state.closing {
                state.due = true;
                return None;
            }
            state.at_work = true;
            self.stop.store(false, Ordering::Release);
        }
        let done = job();
        self.state().at_work = false;
        self.changed.notify_all();
        Some(done)
    }

    /// Whether to go on with what was begun.
    fn go_on(&self) -> std::result::Result<(), DiskError> {
        let context = "it is put off";
        match self.stop.load(Ordering::Acquire) {
            true => Err(DiskError { kind: DiskErrorKind::Busy, context: context.into(), source: None }),
            false => Ok(()),
        }
    }
}

/// Finds the machine that runs and has a volume, and does something with it.
pub type WithMachine<'a> =
    dyn Fn(&str, &mut dyn FnMut(Option<&dyn Running>) -> Result<()>) -> Result<()> + 'a;

/// Whether what is in one layer can be written into another: that can be as large.
fn fits(upper: &Path, lower: &Path) -> std::result::Result<bool, DiskError> {
    let header = |path: &Path| {
        let file = File::open(path).map_err(|e| DiskError::io("open a layer", e))?;
        Header::read(&file)
    };
    let lower = header(lower)?;
    Ok(header(upper)?.size <= u64::from(lower.l1_entries).saturating_mul(lower.l2_reach()))
}

impl Volumes {
    /// Has no sealed layer change until [`Volumes::release`]. What is being written of one is cut off.
    pub fn keep_still(&self) {
        let tidying = &self.tidying;
        let mut state = tidying.state();
        state.still += 1;
        tidying.stop.store(true, Ordering::Release);
        drop(tidying.changed.wait_while(state, |state| state.at_work));
    }

    /// Lets layers change again.
    pub fn release(&self) {
        self.tidying.state().still -= 1;
        self.tidying.changed.notify_all();
    }

    /// Has volumes made one with what lies beneath them, where nobody else needs it: they are written to no more.
    pub fn settle(&self, volumes: &[String]) {
        self.tidying.want(volumes.iter().cloned());
    }

    /// Ends [`Volumes::keep_tidy`], soon.
    pub fn close(&self) {
        self.tidying.state().closing = true;
        self.tidying.stop.store(true, Ordering::Release);
        self.tidying.changed.notify_all();
    }

    /// Makes layers fewer whenever there are too many, until [`Volumes::close`].
    pub fn keep_tidy(&self, machine: &WithMachine<'_>) {
        self.tidying.wake();
        while self.tidying.wait() {
            self.tidy(machine);
        }
    }

    /// Makes layers fewer as far as that can be done now.
    pub fn tidy(&self, machine: &WithMachine<'_>) {
        // One after the other: until that is done, no two others become one.
        if let Err(error) = self.carry_on(machine) {
            tracing::warn!(%error, "a merge of layers is not finished");
            return;
        }
        // What cannot be done is tried again when something changes.
        let mut tried: BTreeSet<Pair> = BTreeSet::new();
        loop {
            let folds = std::mem::take(&mut self.tidying.state().folds);
            for volume in folds {
                self.report(&volume, self.fold(&volume, machine));
            }
            let pairs = self.chains().pairs();
            let Some(pair) = pairs.into_iter().find(|pair| !tried.contains(pair)) else { break };
            tried.insert(pair.clone());
            let done = self.merge(&pair, machine);
            let failed = done.is_err();
            self.report(&pair.0, done);
            if failed && self.merging.exists() {
                return;
            }
        }
        let long = |(volume, chain): (&String, &Chain)| (chain.len() > LONG).then(|| volume.clone());
        let long: Vec<String> = self.chains().volumes.iter().filter_map(long).collect();
        for volume in long {
            self.report(&volume, self.flatten(&volume, machine));
        }
    }

    fn report(&self, what: &str, done: Result<()>) {
        if let Err(error) = done {
            tracing::warn!(layer = what, %error, "its layers stay as they are for now");
        }
    }

    /// Merges the top layer of a volume with the one beneath, where nobody else needs that.
    fn fold(&self, volume: &str, machine: &WithMachine<'_>) -> Result<()> {
        if self.chains().fold(volume).is_none() {
            return Ok(());
        }
        machine(volume, &mut |running| {
            let Some(pair) = self.chains().fold(volume) else { return Ok(()) };
            if self.is_shared(&pair.0)? || self.is_shared(&pair.1)? {
                // Until it is not: nobody tells when that is.
                self.tidying.state().folds.insert(volume.to_owned());
                return Ok(());
            }
            match running {
                // Sealed, it can be merged like any other.
                Some(machine) => self.cut(&[volume], &[(machine, vec![volume.to_owned()])]),
                // Nobody has it: it is held here, until it is one.
                None if self.is_free(volume)? => {
                    let one = self.unite(&pair)?;
                    let record = self.record(volume)?;
                    let Some(layers) = merged(&record.layers, &pair, &one).filter(|_| !one.is_empty()) else {
                        return Ok(());
                    };
                    self.put(volume, &Record { layers, ..record })?;
                    self.remove_unused(&self.chains(), &vec![pair.0, pair.1])
                }
                None => Ok(()),
            }
        })
    }

    /// Merges two sealed layers.
    fn merge(&self, pair: &Pair, machine: &WithMachine<'_>) -> Result<()> {
        let one = self.unite(pair)?;
        if one.is_empty() {
            return Ok(());
        }
        // Records are changed one by one: whoever comes after a crash changes the rest, or the two would stay two.
        write_record(&self.merging, &(pair, &one))?;
        self.spread(pair, &one, machine)
    }

    /// Carries on with a merge whose records a crash left half changed.
    fn carry_on(&self, machine: &WithMachine<'_>) -> Result<()> {
        match read_record::<(Pair, String)>(&self.merging)? {
            Some((pair, one)) => self.spread(&pair, &one, machine),
            None => Ok(()),
        }
    }

    /// Has all records of two layers name the one that holds what both did.
    fn spread(&self, pair: &Pair, one: &str, machine: &WithMachine<'_>) -> Result<()> {
        let has = |chain: &Chain| merged(chain, pair, one).is_some();
        let mut done = BTreeSet::new();
        loop {
            let of = |(id, chain): (&String, &Chain)| (has(chain) && !done.contains(id)).then(|| id.clone());
            // One may have been made of a snapshot meanwhile.
            let Some(volume) = self.chains().volumes.iter().find_map(of) else { break };
            machine(&volume, &mut |running| {
                let Ok(record) = self.record(&volume) else { return Ok(()) };
                let Some(layers) = merged(&record.layers, pair, one) else { return Ok(()) };
                self.replace(&volume, Record { layers, ..record }, running)
            })?;
            done.insert(volume);
        }
        let mut chains = self.chains();
        // Whoever began to read one of them meanwhile reads the same bytes in either.
        for (id, chain) in chains.snapshots.clone() {
            if let Some(layers) = merged(&chain, pair, one) {
                let kept = Kept { layers: layers.clone(), ..self.snapshot(&id)? };
                write_record(&path(&self.snapshots, &id, "json")?, &kept)?;
                chains.snapshots.insert(id, layers);
            }
        }
        self.remove_unused(&chains, &vec![pair.0.clone(), pair.1.clone()])?;
        remove(&self.merging)
    }

    /// Records other layers of the same bytes, once a machine that has the volume reads these: as long as it may read the
    /// old ones, they are on record.
    fn replace(&self, volume: &str, record: Record, running: Option<&dyn Running>) -> Result<()> {
        if record.cut {
            return Err(HostError::Busy(format!("a snapshot of {volume} is under way")));
        }
        let below = record.layers.get(1..).unwrap_or_default().to_vec();
        if let Some(machine) = running {
            let layers = open_sealed(&self.places(&below)?)?;
            machine.rebase(volume, &layers).map_err(|e| HostError::Failed(super::chain(&e)))?;
        }
        self.put(volume, &record)
    }

    /// Whether another region, or a backup, has a layer too.
    fn is_shared(&self, layer: &str) -> Result<bool> {
        let path = self.layers.join(layer);
        Ok(path.metadata().map_err(|e| failed(&path, e))?.nlink() > 1)
    }

    /// Writes the smaller of two layers into the other, and returns which holds both then; nothing where that cannot be
    /// now.
    fn unite(&self, pair: &Pair) -> Result<String> {
        let (upper, lower) = (self.layers.join(&pair.0), self.layers.join(&pair.1));
        let about = |path: &Path| path.metadata().map_err(|e| failed(path, e));
        let (above, below) = (about(&upper)?, about(&lower)?);
        // Another region reads them, too.
        if above.nlink() > 1 || below.nlink() > 1 {
            return Ok(String::new());
        }
        let (upper_key, lower_key) = (self.key_of(&pair.0)?, self.key_of(&pair.1)?);
        // What is encrypted stays so, and no file becomes larger than its tables were made for.
        let fits = fits(&upper, &lower).map_err(|e| disk_failed(&pair.1, &e))?;
        let down = match (&upper_key, &lower_key) {
            (Some(_), None) => false,
            (None, Some(_)) if fits => true,
            (None, Some(_)) => return Ok(String::new()),
            _ => fits && above.blocks() <= below.blocks(),
        };
        let (one, other) = if down { (&pair.1, &upper) } else { (&pair.0, &lower) };
        let base = self.beneath(one)?;
        let open = |path: &Path, write: bool| {
            let file = File::options().read(true).write(write).open(path).map_err(|e| failed(path, e))?;
            Ok::<_, HostError>(Arc::new(file))
        };
        let into = self.layers.join(one);
        let (own, others) = if down { (&lower_key, &upper_key) } else { (&upper_key, &lower_key) };
        let disk = |file, base, key: &Option<Key>, read_only| {
            Qcow2Disk::with_key(file, base, key.as_ref(), read_only).map_err(|e| disk_failed(one, &e))
        };
        let done = self.tidying.work(|| {
            let into = disk(open(&into, true)?, base, own, false)?;
            let other = disk(open(other, false)?, None, others, true)?;
            let go_on = &mut |_| self.tidying.go_on();
            let merge = if down { commit(&other, &into, go_on) } else { pull(&into, &other, go_on) };
            match merge {
                Err(e) if e.kind == DiskErrorKind::Busy => Ok(String::new()),
                merge => merge.map(|()| one.clone()).map_err(|e| disk_failed(one, &e)),
            }
        });
        let one = done.unwrap_or_else(|| Ok(String::new()))?;
        if !one.is_empty() {
            tracing::info!(upper = pair.0, lower = pair.1, into = one, "two layers are one");
        }
        Ok(one)
    }

    /// What a layer lies on, as the chains have it.
    fn beneath(&self, layer: &str) -> Result<Option<Arc<dyn Disk>>> {
        let files = {
            let chains = self.chains();
            let mut all = chains.volumes.values().chain(chains.snapshots.values());
            let below = all.find_map(|chain| {
                let at = chain.iter().position(|have| have == layer)?;
                Some(chain.get(at + 1..).unwrap_or_default().to_vec())
            });
            open_sealed(&self.places(&below.unwrap_or_default())?)?
        };
        match files.is_empty() {
            true => Ok(None),
            false => open_layers(files, true).map(Some).map_err(|e| disk_failed(layer, &e)),
        }
    }

    /// Copies what lies beneath the top layer of a volume into one: every layer of it is a snapshot's.
    fn flatten(&self, volume: &str, machine: &WithMachine<'_>) -> Result<()> {
        let (below, cut) = {
            let chains = self.chains();
            let chain = chains.volumes.get(volume).cloned().unwrap_or_default();
            (chain.get(1..).unwrap_or_default().to_vec(), chains.cut.contains(volume))
        };
        if cut || below.len() < LONG {
            return Ok(());
        }
        let name = new_name(volume);
        let files = {
            let _chains = self.chains();
            open_sealed(&self.places(&below)?)?
        };
        let from = open_layers(files, true).map_err(|e| disk_failed(volume, &e))?;
        let copied =
            self.tidying.work(|| self.write_layer(&name, from.size(), &*from, &|| self.tidying.go_on()));
        let Some(copied) = copied else { return Ok(()) };
        copied?;
        let used = |layers: &Chain| layers.ends_with(&below);
        machine(volume, &mut |running| {
            let record = self.record(volume)?;
            if !used(&record.layers) {
                return Ok(());
            }
            let mut layers = record.layers.clone();
            layers.truncate(layers.len() - below.len());
            layers.push(name.clone());
            tracing::info!(volume, layers = below.len(), "its layers are one");
            self.replace(volume, Record { layers, ..record }, running)
        })?;
        let chains = self.chains();
        let old: Chain = below.into_iter().chain([name]).collect();
        self.remove_unused(&chains, &old)
    }
}
