//! Volumes and snapshots as files.
//!
//! ```text
//!   layers/vol-….3.qcow2     a layer: the top one of its volume, which is written, or sealed
//!   layers/ami-….raw         a hard link to a template, so that what lies on it outlives it
//!   volumes/vol-….json       the record, written last and removed first: with it there is a volume, without it there is
//!                            none; it names the layers, the top one first
//!   snapshots/snap-….json    likewise of a snapshot, all of whose layers are sealed
//!   keys/vol-….json          the wrapped key of the volume's layers, where they are encrypted
//! ```
//! The format of a layer is in its name, which we gave it; no header names a base. A file is written under another
//! name, made durable and renamed. Layers that no record names go; what a crash left half done is removed when the
//! directories are opened.

mod chains;
mod files;
mod growth;
mod imported;
mod keys;
mod migrate;
mod repair;
mod snapshots;
mod tidy;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use hutch_blockdev::store::lock;
use hutch_blockdev::{Format, Key, Layer, SECTOR};
use hutch_imagestore::store::{Image, Kind, Store, StoreError};
use hutch_vmm::config::Rate;
use serde::{Deserialize, Serialize};

use super::super::{HostError, Result, Room, Source, Template, Usage};
use crate::keyring::Keyring;
use chains::{Chain, Chains};
pub use files::{cannot_link, chain, failed, files, has_extension, remove, sync_dir, write};
use files::{disk_failed, link, path, sweep};
pub use snapshots::{Reading, User};
pub use tidy::Running;

/// What is kept of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// In bytes, a multiple of 512.
    size: u64,
    source: Source,
    /// Its layers, the top one first.
    layers: Chain,
    /// What it may do.
    #[serde(default)]
    rate: Rate,
    /// It is being made larger: its file may still have this size.
    #[serde(default)]
    growing: Option<u64>,
    /// The top layer is new: a machine that runs may still write to the second.
    #[serde(default)]
    cut: bool,
}

/// Where a layer is, and what its bytes mean.
#[derive(Debug, Clone)]
pub struct Place {
    path: PathBuf,
    format: Format,
    key: Option<Key>,
}

impl Place {
    fn open(&self, write: bool) -> Result<Layer> {
        let file = File::options().read(true).write(write).open(&self.path);
        let file = file.map_err(|e| failed(&self.path, e))?;
        Ok(Layer { file, format: self.format, key: self.key.clone() })
    }
}

/// The files of a volume.
#[derive(Debug, Clone)]
pub struct Files {
    /// The top one first, which was written to it; the others are only read.
    pub layers: Vec<Place>,
    /// What the top one is called.
    pub top: String,
}

/// The volumes and snapshots of a host, and the templates that volumes are made of.
pub struct Volumes {
    layers: PathBuf,
    volumes: PathBuf,
    snapshots: PathBuf,
    keys: PathBuf,
    /// Two layers that become one in all records, while they do.
    merging: PathBuf,
    keyring: Keyring,
    templates: Store,
    /// Held while it is decided which layers there are: who opens or links some, and who removes some.
    chains: Arc<Mutex<Chains>>,
    busy: Mutex<BTreeSet<String>>,
    free: Condvar,
    /// Volumes whose machine has been told since this process began what they are.
    told: Mutex<BTreeSet<String>>,
    tidying: tidy::Tidying,
}

/// Asks a machine for a size and a rate of its disk.
pub type Ask<'a> = dyn Fn(u64, &Rate) -> Result<()> + 'a;

/// Volumes that nobody else holds until this is dropped.
pub struct Hold<'a> {
    all: &'a Volumes,
    ids: BTreeSet<String>,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut busy = self.all.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|id| !self.ids.contains(id));
        self.all.free.notify_all();
    }
}

impl Volumes {
    /// Opens `dir/volumes`, `dir/snapshots` and `dir/layers`, makes them where they are not there, and removes what a crash
    /// left.
    ///
    /// # Errors
    /// A directory cannot be made, read or cleaned.
    pub fn open(dir: &Path, templates: Store, keyring: Keyring) -> Result<Volumes> {
        let all = Volumes {
            layers: dir.join("layers"),
            volumes: dir.join("volumes"),
            snapshots: dir.join("snapshots"),
            keys: dir.join("keys"),
            merging: dir.join("merging.json"),
            keyring,
            templates,
            chains: Arc::default(),
            busy: Mutex::default(),
            free: Condvar::new(),
            told: Mutex::default(),
            tidying: tidy::Tidying::default(),
        };
        for dir in [&all.volumes, &all.snapshots, &all.layers, &all.keys] {
            fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        }
        migrate::migrate(&all)?;
        sweep(&all.snapshots, |path| !has_extension(path, "json"))?;
        sweep(&all.volumes, |path| !has_extension(path, "json"))?;
        {
            let mut chains = all.chains();
            for id in recorded(&all.volumes)? {
                let record = all.record(&id)?;
                if record.cut {
                    chains.cut.insert(id.clone());
                }
                chains.volumes.insert(id, record.layers);
            }
            for id in recorded(&all.snapshots)? {
                let kept = all.snapshot(&id)?;
                chains.snapshots.insert(id, kept.layers);
            }
            let named = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
            sweep(&all.layers, |path| named(path).is_none_or(|layer| !chains.unused([&layer]).is_empty()))?;
            all.sweep_keys(&chains)?;
        }
        Ok(all)
    }

    fn chains(&self) -> MutexGuard<'_, Chains> {
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody holds any of these volumes, and holds all of them: while a machine is started on them, while they
    /// are copied, while one grows. None of these may see a half of another.
    pub fn hold<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> Hold<'_> {
        let ids: BTreeSet<String> = ids.into_iter().map(str::to_owned).collect();
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if !busy.is_disjoint(&ids) {
            // Layers can be merged another time.
            self.tidying.put_off();
        }
        let free = self.free.wait_while(busy, |busy| !busy.is_disjoint(&ids));
        free.unwrap_or_else(PoisonError::into_inner).extend(ids.iter().cloned());
        Hold { all: self, ids }
    }

    /// Whether no process may write to a volume now. One that is gone is free.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn is_free(&self, id: &str) -> Result<bool> {
        let Some(chain) = self.chains().volumes.get(id).cloned() else { return Ok(true) };
        // A machine that has not heard of a cut has the second.
        for layer in chain.iter().take(2).filter(|layer| chains::is_volume(layer)) {
            let layer = self.layers.join(layer);
            match File::open(&layer) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                file => {
                    if lock(&file.map_err(|e| failed(&layer, e))?, true).is_err() {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Does `job` while no record of a layer comes, goes or changes, nor a layer goes.
    pub fn at_rest<T>(&self, job: impl FnOnce() -> T) -> T {
        let _chains = self.chains();
        job()
    }

    /// The record of a volume as it was before its top layer, which is new, and the layers it names.
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn before_cut(&self, id: &str) -> Result<(Vec<u8>, Vec<String>)> {
        let record = self.record(id)?;
        let layers = record.layers.get(1..).unwrap_or_default().to_vec();
        let text = serde_json::to_vec(&Record { layers: layers.clone(), ..record });
        Ok((text.map_err(|e| HostError::Failed(e.to_string()))?, layers))
    }

    /// All volumes.
    pub fn ids(&self) -> Vec<String> {
        self.chains().volumes.keys().cloned().collect()
    }

    /// What room volumes and snapshots take.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let chains = self.chains();
        let mut usage = Usage::default();
        let mut layers = BTreeMap::new();
        let all = || chains.volumes.iter().chain(&chains.snapshots);
        for (_, chain) in all() {
            for layer in chain {
                layers.entry(layer).or_insert((0, 0)).1 += 1;
            }
        }
        for (layer, (bytes, _)) in &mut layers {
            let path = self.layers.join(layer);
            match path.metadata() {
                Ok(about) => *bytes = about.blocks() * 512,
                // It is being made.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(failed(&path, e)),
            }
            usage.used += *bytes;
        }
        for (id, chain) in all() {
            let mut room = Room { layers: chain.len(), ..Room::default() };
            for (bytes, users) in chain.iter().filter_map(|layer| layers.get(layer)) {
                let part = if *users == 1 { &mut room.alone } else { &mut room.shared };
                *part += bytes;
            }
            usage.of.insert(id.clone(), room);
        }
        usage.free = self.free_room()?;
        Ok(usage)
    }

    /// How many bytes the host has for more layers.
    fn free_room(&self) -> Result<u64> {
        let about = rustix::fs::statvfs(&self.layers).map_err(|e| failed(&self.layers, e.into()))?;
        Ok(about.f_bavail.saturating_mul(about.f_frsize))
    }

    /// Where volumes are.
    pub fn directory(&self) -> &Path {
        &self.volumes
    }

    /// Where layers are.
    pub fn layers_directory(&self) -> &Path {
        &self.layers
    }

    /// Where keys are.
    pub fn keys_directory(&self) -> &Path {
        &self.keys
    }

    /// Where snapshots are.
    pub fn snapshots_directory(&self) -> &Path {
        &self.snapshots
    }

    /// The templates as they are kept.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn images(&self) -> Result<Vec<Image>> {
        self.templates.list().map_err(|e| HostError::Failed(chain(&e)))
    }

    /// The templates, the oldest first.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn templates(&self) -> Result<Vec<Template>> {
        let images = self.images()?.into_iter().filter(|image| image.record.kind == Kind::Machine);
        let template = |record: hutch_imagestore::store::Record| Template {
            name: record.name,
            digest: record.source_sha256,
            size: record.virtual_size,
        };
        Ok(images.map(|image| template(image.record)).collect())
    }

    /// See [`Host::create_volume`](super::super::Host::create_volume). Takes the same time whatever the size.
    ///
    /// # Errors
    /// [`HostError::Missing`] source, [`HostError::NoRoom`]. The templates have to be on the file system of the volumes.
    pub fn create(&self, id: &str, bytes: u64, source: &Source, key: Option<&str>) -> Result<()> {
        let record_path = path(&self.volumes, id, "json")?;
        if record_path.exists() {
            // As of a snapshot: its name may not be durable yet.
            return sync_dir(&self.volumes);
        }
        let made = self.lay(id, bytes, source, key);
        if made.is_err() {
            self.forget_volume(id)?;
        }
        made
    }

    /// Makes a volume that has no record.
    fn lay(&self, id: &str, bytes: u64, source: &Source, key: Option<&str>) -> Result<()> {
        let (least, layers) = {
            let mut chains = self.chains();
            let (least, below) = self.below(&chains, source)?;
            let top = chains::new_name(id);
            let layers: Chain = [top].into_iter().chain(below).collect();
            // From now on nobody takes them away.
            chains.volumes.insert(id.to_owned(), layers.clone());
            (least, layers)
        };
        let size = bytes.max(least).checked_next_multiple_of(SECTOR);
        let size =
            size.ok_or_else(|| HostError::Failed(format!("the volume {id} cannot have {bytes} bytes")))?;
        if key.is_none() {
            for layer in &layers {
                if layers.first() != Some(layer) && self.wrapped(layer)?.is_some() {
                    return Err(HostError::Key(format!(
                        "{id} is not encrypted, and lies on {layer}, which is"
                    )));
                }
            }
        }
        self.new_key(id, key)?;
        self.create_layer(layers.first().map_or("", |top| top), size)?;
        let (rate, growing, cut) = Default::default();
        self.put(id, &Record { size, source: source.clone(), layers, rate, growing, cut })
    }

    /// Makes an empty layer. Whatever has its name is a crash's, and is replaced.
    fn create_layer(&self, name: &str, size: u64) -> Result<()> {
        write(&self.layers.join(name), |file| self.fill_layer(file, name, size))
    }

    /// What a volume of this source lies on, and its size.
    fn below(&self, chains: &Chains, source: &Source) -> Result<(u64, Chain)> {
        match source {
            Source::Empty => Ok((0, Chain::new())),
            Source::Template(name) => {
                let image = self.template(name)?;
                let layer = template_layer(&image);
                let to = self.layers.join(&layer);
                link(&image.disk(), &to)?;
                Ok((fs::metadata(&to).map_err(|e| failed(&to, e))?.len(), vec![layer]))
            }
            Source::Snapshot(id) => {
                let missing = || HostError::Missing(format!("snapshot {id}"));
                let layers = chains.snapshots.get(id).cloned().ok_or_else(missing)?;
                Ok((self.snapshot(id)?.size, layers))
            }
        }
    }

    fn template(&self, name: &str) -> Result<Image> {
        match self.templates.get(name) {
            Ok(image) if image.record.kind == Kind::Machine => Ok(image),
            Ok(_) | Err(StoreError::NotFound { .. }) => Err(HostError::Missing(format!("template {name}"))),
            Err(e) => Err(HostError::Failed(chain(&e))),
        }
    }

    /// Takes a volume off the books, and removes the layers that only it had.
    fn forget_volume(&self, id: &str) -> Result<()> {
        let mut chains = self.chains();
        chains.cut.remove(id);
        let had = chains.volumes.remove(id).unwrap_or_default();
        self.remove_unused(&chains, &had)
    }

    fn remove_unused(&self, chains: &Chains, of: &Chain) -> Result<()> {
        chains.unused(of).into_iter().try_for_each(|layer| remove(&self.layers.join(layer)))?;
        self.remove_unused_keys(chains, of)
    }

    fn put(&self, id: &str, record: &Record) -> Result<()> {
        let path = path(&self.volumes, id, "json")?;
        if !self.chains().volumes.contains_key(id) {
            return Err(HostError::Missing(format!("volume {id}")));
        }
        write_record(&path, record)?;
        let mut chains = self.chains();
        match record.cut {
            true => chains.cut.insert(id.to_owned()),
            false => chains.cut.remove(id),
        };
        chains.volumes.insert(id.to_owned(), record.layers.clone());
        Ok(())
    }

    fn record(&self, id: &str) -> Result<Record> {
        let missing = || HostError::Missing(format!("volume {id}"));
        read_record(&path(&self.volumes, id, "json")?)?.ok_or_else(missing)
    }

    /// Removes a volume, if it is there. Nobody may have it.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn delete(&self, id: &str) -> Result<()> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        remove(&path(&self.volumes, id, "json")?)?;
        sync_dir(&self.volumes)?;
        self.forget_volume(id)?;
        self.tidying.wake();
        Ok(())
    }

    /// The files of a volume.
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn files(&self, id: &str) -> Result<Files> {
        self.files_of(&self.record(id)?)
    }

    fn files_of(&self, record: &Record) -> Result<Files> {
        let top = record.layers.first().cloned().unwrap_or_default();
        Ok(Files { layers: self.places(&record.layers)?, top })
    }

    fn places(&self, layers: &Chain) -> Result<Vec<Place>> {
        layers.iter().map(|layer| self.place(layer)).collect()
    }

    fn place(&self, layer: &str) -> Result<Place> {
        Ok(Place { path: self.layers.join(layer), format: format_of(layer), key: self.key_of(layer)? })
    }
}

impl Files {
    /// Opens them for a machine, the top one first; no other machine may have the volume.
    ///
    /// # Errors
    /// They cannot be opened, or somebody has them.
    pub fn open(&self) -> Result<Vec<Layer>> {
        let files = self.opened()?;
        for (depth, layer) in files.iter().enumerate() {
            lock(&layer.file, depth > 0).map_err(|e| disk_failed(&self.top, &e))?;
        }
        Ok(files)
    }

    /// Likewise, before anybody has them.
    fn opened(&self) -> Result<Vec<Layer>> {
        self.layers.iter().enumerate().map(|(depth, place)| place.open(depth == 0)).collect()
    }
}

/// What the bytes of a layer of this name mean.
fn format_of(layer: &str) -> Format {
    if chains::is_volume(layer) { Format::Qcow2 } else { Format::Raw }
}

/// What a template is called as a layer.
fn template_layer(image: &Image) -> String {
    format!("{}.raw", image.record.id)
}

/// Opens layers that nobody writes to, the top one first.
fn open_sealed(layers: &[Place]) -> Result<Vec<Layer>> {
    layers.iter().map(|place| place.open(false)).collect()
}

/// What a guest reads as the serial of a volume's disk: its id without the dash, as on EC2.
pub(super) fn serial(volume: &str) -> String {
    volume.replacen('-', "", 1)
}

/// The layers that a record of a volume or a snapshot names.
///
/// # Errors
/// It cannot be read.
pub fn layers_of(record: &Path) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Layers {
        layers: Vec<String>,
    }
    let read = read_record::<Layers>(record)?;
    read.map(|record| record.layers).ok_or_else(|| HostError::Missing(format!("record {}", record.display())))
}

/// The ids of the records in a directory.
fn recorded(dir: &Path) -> Result<Vec<String>> {
    let records = files(dir)?.into_iter().filter(|path| has_extension(path, "json"));
    Ok(records.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect())
}

fn write_record<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let text = serde_json::to_vec(record).map_err(|e| failed(path, e.into()))?;
    write(path, |file| file.write_all_at(&text, 0).map_err(|e| failed(path, e)))
}

fn read_record<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        text => {
            let text = text.map_err(|e| failed(path, e))?;
            serde_json::from_slice(&text).map(Some).map_err(|e| failed(path, e.into()))
        }
    }
}

#[cfg(test)]
mod tests;
