//! Snapshots: a volume's layers at one instant. Its machine goes on, with a new top layer.
//!
//! ```text
//!   record: a new top, cut     whoever comes after a crash carries on from here
//!   machine: cut, seal         the new top is written; what is beneath becomes durable
//!   record: not cut            and the snapshot's, which names what is beneath
//! ```

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hutch_blockdev::{DiskErrorKind, Format, SECTOR, open_layers};
use serde::{Deserialize, Serialize};

use super::super::super::{Content, HostError, Layer, Reader, Result, Source};
use super::chains::{self, Chain, Chains, MOST};
use super::files::{copy, disk_failed, failed, link, path, remove, sync_dir, write};
use super::{Place, Record, Running, Volumes, open_sealed, read_record, template_layer, write_record};

/// What is kept of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// In bytes, a multiple of 512.
    pub(super) size: u64,
    /// Its layers, the top one first.
    pub(super) layers: Chain,
}

/// Layers that are read: until this is dropped none of them changes or goes.
#[derive(Debug)]
pub struct Reading {
    chains: Arc<Mutex<Chains>>,
    layers: PathBuf,
    number: u64,
}

impl Reading {
    fn new(volumes: &Volumes, chains: &mut Chains, names: Chain) -> Reading {
        let number = chains.read.last_key_value().map_or(0, |(last, _)| last + 1);
        chains.read.insert(number, names);
        Reading { chains: volumes.chains.clone(), layers: volumes.layers.clone(), number }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        let had = chains.read.remove(&self.number).unwrap_or_default();
        for layer in chains.unused(&had) {
            if let Err(error) = remove(&self.layers.join(layer)) {
                tracing::warn!(layer, %error, "it stays until the next start");
            }
        }
    }
}

/// A machine that runs, and the volumes of it that are meant.
pub type User<'a> = (&'a dyn Running, Vec<String>);

impl Volumes {
    /// See [`Host::create_snapshots`](super::super::super::Host::create_snapshots). Who calls it holds the volumes. `users`
    /// are the machines that have some of them, which go on; what a guest has not flushed may be missing, as after loss
    /// of power. The instant takes no longer than requests that are under way; then what was written before is made
    /// durable.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume, [`HostError::NoRoom`]; none of the snapshots is there then.
    pub fn create_snapshots(&self, snapshots: &[(&str, &str)], users: &[User<'_>]) -> Result<()> {
        let paths = snapshots.iter().map(|(id, _)| path(&self.snapshots, id, "json"));
        let paths = paths.collect::<Result<Vec<_>>>()?;
        if paths.iter().all(|path| path.exists()) {
            // Whoever gave them their names may have been killed before the names were durable.
            return sync_dir(&self.snapshots);
        }
        // One that is there is of another instant than those that are missing.
        snapshots.iter().try_for_each(|(id, _)| self.delete_snapshot(id))?;
        let volumes: Vec<&str> = snapshots.iter().map(|(_, volume)| *volume).collect();
        self.cut(&volumes, users)?;
        let made = snapshots.iter().try_for_each(|(id, volume)| {
            let record = self.record(volume)?;
            let layers = record.layers.get(1..).unwrap_or_default().to_vec();
            self.keep(id, Kept { size: record.growing.unwrap_or(record.size), layers })
        });
        if made.is_err() {
            snapshots.iter().try_for_each(|(id, _)| self.delete_snapshot(id))?;
        }
        self.tidying.wake();
        made
    }

    pub(super) fn keep(&self, id: &str, kept: Kept) -> Result<()> {
        self.chains().snapshots.insert(id.to_owned(), kept.layers.clone());
        write_record(&path(&self.snapshots, id, "json")?, &kept)
    }

    /// Gives volumes new top layers at one instant; what they were until then is sealed when this returns. Who calls it holds
    /// them.
    ///
    /// # Errors
    /// [`HostError::Missing`] volume, [`HostError::NoRoom`]; [`HostError::Busy`]: some process has one.
    pub fn cut(&self, volumes: &[&str], users: &[User<'_>]) -> Result<()> {
        let user = |volume: &str| {
            let user = users.iter().find(|(_, volumes)| volumes.iter().any(|have| have == volume));
            user.map(|(machine, _)| *machine)
        };
        let mut records = Vec::new();
        for volume in volumes {
            // What an earlier one left.
            self.end_cut(volume, user(volume))?;
            let record = self.record(volume)?;
            if record.layers.len() >= MOST {
                let why = format!(
                    "the volume {volume} has {MOST} layers, which are being made fewer; try again later"
                );
                return Err(HostError::Failed(why));
            }
            records.push(record);
        }
        let mut cut = Vec::new();
        for (volume, record) in volumes.iter().zip(records) {
            if record.growing.is_some() && user(volume).is_none() {
                self.grow(volume, &record)?;
            }
            let top = chains::new_name(volume);
            // A machine that has grown it already makes the new layer as large.
            let size = record.growing.filter(|_| user(volume).is_some()).unwrap_or(record.size);
            self.create_layer(&top, size)?;
            let mut layers = record.layers.clone();
            layers.insert(0, top);
            cut.push((*volume, Record { layers, cut: true, ..record }));
        }
        for (volume, record) in &cut {
            self.put(volume, record)?;
        }
        for (machine, having) in users {
            let of = |(volume, _): &&(&str, Record)| having.iter().any(|have| have == volume);
            let tops = cut.iter().filter(of).map(|(volume, record)| self.top(volume, record));
            machine.cut(&tops.collect::<Result<Vec<_>>>()?)?;
        }
        volumes.iter().try_for_each(|volume| self.end_cut(volume, user(volume)))
    }

    /// The new top layer of a volume, for its machine.
    fn top(&self, volume: &str, record: &Record) -> Result<(String, String, File)> {
        let name = record.layers.first().cloned().unwrap_or_default();
        let path = self.layers.join(&name);
        let file = File::options().read(true).write(true).open(&path).map_err(|e| failed(&path, e))?;
        Ok((super::serial(volume), name, file))
    }

    /// Ends a cut that was begun: the machine that has the volume, if one does, writes to the new top layer, and what is
    /// beneath is durable. Who calls it holds the volume.
    ///
    /// # Errors
    /// [`HostError::Missing`]; the machine does not do it, or some process has the volume.
    pub fn end_cut(&self, volume: &str, machine: Option<&dyn Running>) -> Result<()> {
        let record = self.record(volume)?;
        if !record.cut {
            return Ok(());
        }
        match machine {
            Some(machine) => {
                machine.cut(&[self.top(volume, &record)?])?;
                machine.seal(volume)?;
            }
            // What its machine left is whole; opened to be written, it is as it should be, too.
            None => {
                let beneath = record.layers.get(1..).unwrap_or_default().to_vec();
                let files = super::Files { layers: self.places(&beneath)?, top: String::new() };
                if beneath.first().is_some_and(|layer| chains::is_volume(layer)) {
                    let busy = |e: hutch_blockdev::DiskError| match e.kind {
                        DiskErrorKind::Busy => HostError::Busy(format!("the volume {volume}: {e}")),
                        _ => disk_failed(volume, &e),
                    };
                    let disk = open_layers(files.opened()?, false).map_err(busy)?;
                    disk.flush().map_err(|e| disk_failed(volume, &e))?;
                }
            }
        }
        self.put(volume, &Record { cut: false, ..record })
    }

    pub(super) fn snapshot(&self, id: &str) -> Result<Kept> {
        let missing = || HostError::Missing(format!("snapshot {id}"));
        read_record(&path(&self.snapshots, id, "json")?)?.ok_or_else(missing)
    }

    /// See [`Host::content`](super::super::super::Host::content).
    ///
    /// # Errors
    /// [`HostError::Missing`].
    pub fn content(&self, source: &Source) -> Result<Content> {
        match source {
            Source::Empty => Err(HostError::Missing("content of an empty volume".into())),
            Source::Template(name) => {
                let image = self.template(name)?;
                let (path, layer) = (image.disk(), template_layer(&image));
                let size = path.metadata().map_err(|e| failed(&path, e))?.len();
                Ok(Content::Layers {
                    size,
                    layers: vec![Layer { name: layer, path, format: Format::Raw, key: None }],
                    reading: None,
                })
            }
            Source::Snapshot(id) => {
                let (size, names, reading) = {
                    let mut chains = self.chains();
                    let (size, names) = self.below(&chains, source)?;
                    (size, names.clone(), Reading::new(self, &mut chains, names))
                };
                let layer = |name: &String| {
                    let (path, key) = (self.layers.join(name), self.wrapped(name)?);
                    Ok(Layer { name: name.clone(), path, format: super::format_of(name), key })
                };
                match names.is_empty() {
                    true => Err(HostError::Failed(format!("the snapshot {id} has no layers"))),
                    false => {
                        let layers = names.iter().map(layer).collect::<Result<_>>()?;
                        Ok(Content::Layers { size, layers, reading: Some(Arc::new(reading)) })
                    }
                }
            }
        }
    }

    /// See [`Host::copy_snapshot`](super::super::super::Host::copy_snapshot). On one file system the copy has other names of
    /// the same layers, which never change, so it takes no time and no room; on another all data are copied, and also where
    /// `key` is not what wraps the keys of what is encrypted of them.
    ///
    /// # Errors
    /// [`HostError::NoRoom`]; it cannot be read. There is no snapshot then.
    pub fn copy_snapshot(&self, id: &str, content: &Content, key: Option<&str>) -> Result<()> {
        let record = path(&self.snapshots, id, "json")?;
        let Content::Layers { size, layers, .. } = content else {
            return Err(HostError::Failed("a simulated snapshot has no bytes to copy".into()));
        };
        if record.exists() {
            // Whoever gave it the name may have been killed before the name was durable.
            return sync_dir(&self.snapshots);
        }
        let mut by = layers.iter().filter_map(|layer| Some(layer.key.as_ref()?.by.as_str())).peekable();
        let same = match key {
            Some(key) => by.peek().is_some() && by.all(|by| by == key),
            None if by.peek().is_some() => {
                return Err(HostError::Key(format!("{id}: a copy of what is encrypted is encrypted, too")));
            }
            None => true,
        };
        let shared = if same { self.share(id, *size, layers) } else { Ok(false) };
        let made = shared.and_then(|shared| match shared {
            true => Ok(()),
            false => self.copy_layers(id, *size, layers, key),
        });
        if made.is_err() {
            self.delete_snapshot(id)?;
        }
        made
    }

    /// Gives layers names here; false where they are on another file system.
    fn share(&self, id: &str, size: u64, layers: &[Layer]) -> Result<bool> {
        let mut chains = self.chains();
        let device = |path: &Path| path.metadata().map(|about| about.dev()).map_err(|e| failed(path, e));
        let here = device(&self.layers)?;
        for layer in layers {
            if device(&layer.path)? != here {
                return Ok(false);
            }
        }
        let names: Chain = layers.iter().map(|layer| layer.name.clone()).collect();
        // Before they are there: who gives up takes away what nobody else has of them.
        chains.snapshots.insert(id.to_owned(), names.clone());
        for Layer { name, path: from, key, .. } in layers {
            let to = self.layers.join(name);
            if *from != to {
                link(from, &to)?;
            }
            self.share_key(name, key.as_ref())?;
        }
        sync_dir(&self.layers)?;
        drop(chains);
        self.keep(id, Kept { size, layers: names })?;
        Ok(true)
    }

    /// See [`Host::read`](super::super::super::Host::read).
    ///
    /// # Errors
    /// [`HostError::Missing`]; it cannot be read.
    pub fn read(&self, source: &Source) -> Result<Reader> {
        let id = match source {
            Source::Snapshot(id) => id,
            Source::Empty => return Err(HostError::Missing("content of an empty volume".into())),
            Source::Template(name) => {
                let path = self.template(name)?.disk();
                let open = || File::open(&path).map_err(|e| failed(&path, e));
                let disk =
                    open_layers(vec![(open()?, Format::Raw)], true).map_err(|e| disk_failed(name, &e))?;
                let layers = vec![(name.clone(), open()?, Format::Raw)];
                return Ok(Reader { disk, layers, _reading: None });
            }
        };
        let (names, reading) = {
            let mut chains = self.chains();
            let names = chains.snapshots.get(id).filter(|names| !names.is_empty()).cloned();
            let names = names.ok_or_else(|| HostError::Missing(format!("snapshot {id}")))?;
            (names.clone(), Reading::new(self, &mut chains, names))
        };
        let places = self.places(&names)?;
        let disk = open_layers(open_sealed(&places)?, true).map_err(|e| disk_failed(id, &e))?;
        let layer = |(name, place): (&String, &Place)| {
            let opened = place.open(false)?;
            Ok((name.clone(), opened.file, opened.format))
        };
        let layers = names.iter().zip(&places).map(layer).collect::<Result<_>>()?;
        Ok(Reader { disk, layers, _reading: Some(reading) })
    }

    fn copy_layers(&self, id: &str, size: u64, layers: &[Layer], key: Option<&str>) -> Result<()> {
        let place = |layer: &Layer| {
            let key = layer.key.as_ref().map(|wrapped| self.unwrap(&layer.name, wrapped)).transpose()?;
            Ok(Place { path: layer.path.clone(), format: layer.format, key })
        };
        let places = layers.iter().map(place).collect::<Result<Vec<_>>>()?;
        let disk = open_layers(open_sealed(&places)?, true).map_err(|e| disk_failed(id, &e))?;
        let name = if key.is_some() { chains::new_name(id) } else { format!("{id}.raw") };
        // Before it is there: what no chain has is removed.
        self.chains().snapshots.insert(id.to_owned(), vec![name.clone()]);
        self.new_key(id, key)?;
        if key.is_some() {
            let size = size.next_multiple_of(SECTOR).max(disk.size());
            self.write_layer(&name, size, &*disk, &|| Ok(()))?;
            return self.keep(id, Kept { size, layers: vec![name] });
        }
        write(&self.layers.join(&name), |file| {
            copy(&*disk, file).map_err(|e| disk_failed(id, &e))?;
            let size = size.next_multiple_of(SECTOR).max(disk.size());
            file.set_len(size).map_err(|e| failed(&self.layers, e))
        })?;
        self.keep(id, Kept { size, layers: vec![name] })
    }

    /// Removes a snapshot, if it is there, and the layers that only it had. What others need of its layers stays, and
    /// becomes one with theirs by and by.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn delete_snapshot(&self, id: &str) -> Result<()> {
        remove(&path(&self.snapshots, id, "json")?)?;
        sync_dir(&self.snapshots)?;
        let mut chains = self.chains();
        let Some(had) = chains.snapshots.remove(id) else { return Ok(()) };
        self.remove_unused(&chains, &had)?;
        let on = had.first().map(|head| chains.lying_on(head)).unwrap_or_default();
        drop(chains);
        self.tidying.want(on);
        Ok(())
    }
}
