//! What this host has at one moment, and how it is copied.
//!
//! Files are pinned by one more name each below `pinned/`, so that what is removed meanwhile can be copied all the same.
//! What a crash leaves of that is removed when the host is opened.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::{End, HostError, OWN_ROOT, Result};
use super::boot;
use super::machine::{Dir, Kept, Phase};
use super::volumes::{self, failed, files, has_extension};
use super::{Shared, Slot, lock};
use crate::backup::{self, BackupError, Captured, Target, allocated};

/// Where files are pinned, below the host's directory.
const PINNED: &str = "pinned";
/// Where machines are, below the host's directory.
const MACHINES: &str = "machines";
/// Where templates are, below a state.
const IMAGES: &str = "images";
/// Where layers are, below the host's directory.
const LAYERS: &str = "layers";
/// Where their keys are, wrapped; what wraps them is not of the host.
const KEYS: &str = "keys";

/// The record of a volume, and the layers that it names.
type Were = (Vec<u8>, Vec<String>);

/// What the host has at one moment.
struct Moment {
    shared: Arc<Shared>,
    pinned: PathBuf,
    /// The templates' ids, and the modes of their directories.
    images: Vec<(String, u32)>,
    machines: Vec<Kept>,
    bytes: u64,
    /// What is counted already: a file may have many names.
    seen: HashSet<(u64, u64)>,
}

/// Removes the pins of a backup that was cut off.
///
/// # Errors
/// They cannot be removed.
pub fn unpin(dir: &Path) -> Result<()> {
    let pinned = dir.join(PINNED);
    match fs::remove_dir_all(&pinned) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(&pinned, e)),
        _ => Ok(()),
    }
}

/// Pins all that is there.
///
/// # Errors
/// It cannot be read, or the file system has no hard links.
pub fn capture(shared: Arc<Shared>) -> Result<Box<dyn Captured>> {
    let dir = shared.machines.parent().unwrap_or(Path::new("/")).to_owned();
    unpin(&dir)?;
    let (images, machines, seen) = Default::default();
    let mut moment = Moment { pinned: dir.join(PINNED), images, machines, bytes: 0, seen, shared };
    let shared = moment.shared.clone();
    let own = &shared.volumes;
    // Dropped with the moment, also where this fails.
    own.keep_still();
    let [volumes, snapshots, layers, keys] =
        ["volumes", "snapshots", LAYERS, KEYS].map(|dir| moment.pinned.join(dir));
    for dir in [&volumes, &snapshots, &layers, &keys] {
        fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
    }
    own.at_rest(|| {
        moment.pin(own.directory(), &volumes, "json")?;
        moment.pin(own.snapshots_directory(), &snapshots, "json")?;
        moment.pin(own.keys_directory(), &keys, "json")?;
        ["qcow2", "raw"].iter().try_for_each(|kind| moment.pin(own.layers_directory(), &layers, kind))
    })?;
    for image in own.images()? {
        let (id, from) = (image.record.id.clone(), image.disk());
        let from = from.parent().unwrap_or(Path::new("/"));
        let mode = match fs::metadata(from) {
            Ok(about) => about.mode(),
            // `hutch image rm` has just removed it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(failed(from, e)),
        };
        let to = moment.pinned.join(IMAGES).join(&id);
        fs::create_dir_all(&to).map_err(|e| failed(&to, e))?;
        moment.pin(from, &to, "raw")?;
        moment.pin(from, &to, "json")?;
        moment.images.push((id, mode));
    }
    let slots: Vec<_> = lock(&moment.shared.slots).values().cloned().collect();
    for slot in slots {
        let kept = slot.state().kept.clone().filter(|kept| kept.phase != Phase::Starting);
        let Some(mut kept) = kept else { continue };
        // Its process is of this host at this time, and must not be taken for one of where it is restored.
        (kept.process, kept.restart, kept.phase) = (None, false, Phase::Running);
        kept.end = kept.end.or(Some(End::HostDown));
        let to = moment.pinned.join(MACHINES).join(&kept.machine.id);
        fs::create_dir_all(&to).map_err(|e| failed(&to, e))?;
        let pinned = ["log", boot::EXTENSION].iter().try_for_each(|kind| moment.pin(&slot.dir.0, &to, kind));
        match pinned {
            // It is being forgotten.
            Err(_) if !slot.dir.0.exists() => continue,
            pinned => pinned?,
        }
        moment.machines.push(kept);
    }
    Ok(Box::new(moment))
}

impl Drop for Moment {
    fn drop(&mut self) {
        let all = self.shared.volumes.ids();
        if let Some(Err(error)) = self.pinned.parent().map(unpin) {
            tracing::warn!(%error, "what a backup pinned stays until the next start");
        }
        self.shared.volumes.release();
        // They were given new layers, which need not be many.
        self.shared.volumes.settle(&all);
    }
}

impl Captured for Moment {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn copy(&self, target: &mut Target<'_>, dir: &str) -> backup::Result<()> {
        // Templates first: volumes and snapshots are other names of their bytes, mostly.
        for (id, mode) in &self.images {
            let to = format!("{IMAGES}/{id}");
            if !target.has(&to) {
                target.directory(&to, *mode)?;
            }
            for file in files(&self.pinned.join(IMAGES).join(id))? {
                let name = below(&to, &file);
                if !target.has(&name) {
                    target.file(&file, &name, true)?;
                }
            }
        }
        self.copy_layers(target, dir)?;
        for kept in &self.machines {
            let pinned = Dir(self.pinned.join(MACHINES).join(&kept.machine.id));
            let dir = format!("{dir}/{MACHINES}/{}", kept.machine.id);
            let text = serde_json::to_vec(kept).map_err(|e| BackupError::Records(e.to_string()))?;
            // What it says meanwhile may begin the file anew: it is read as it is.
            target.bytes(&format!("{dir}/console.log"), &pinned.console(u64::MAX)?)?;
            for file in files(&pinned.0)?.iter().filter(|file| has_extension(file, boot::EXTENSION)) {
                target.file(file, &below(&dir, file), true)?;
            }
            target.bytes(&format!("{dir}/machine.json"), &text)?;
        }
        Ok(())
    }
}

impl Moment {
    /// Gives all files of a kind one more name each.
    fn pin(&mut self, from: &Path, to: &Path, kind: &str) -> Result<()> {
        for path in files(from)?.into_iter().filter(|path| has_extension(path, kind)) {
            let link = to.join(path.file_name().unwrap_or_default());
            match fs::hard_link(&path, &link) {
                Ok(()) => {}
                // It has just been removed.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(failed(&link, e)),
            }
            let about = fs::metadata(&link).map_err(|e| failed(&link, e))?;
            if self.seen.insert((about.dev(), about.ino())) {
                self.bytes += allocated(&about) + about.size();
            }
        }
        Ok(())
    }

    fn copy_layers(&self, target: &mut Target<'_>, dir: &str) -> backup::Result<()> {
        let (layers, to) = (self.pinned.join(LAYERS), format!("{dir}/{LAYERS}"));
        for key in files(&self.pinned.join(KEYS))? {
            target.file(&key, &below(&format!("{dir}/{KEYS}"), &key), true)?;
        }
        let mut copy =
            |name: &str, fixed: bool| target.file(&layers.join(name), &format!("{to}/{name}"), fixed);
        let (mut records, mut named, mut left) = (Vec::new(), BTreeSet::new(), BTreeMap::new());
        let read = |path: &Path| fs::read(path).map_err(|e| BackupError::from(failed(path, e)));
        for kind in ["snapshots", "volumes"] {
            for record in files(&self.pinned.join(kind))? {
                if record.file_name().is_some_and(|name| name.to_string_lossy().starts_with(OWN_ROOT)) {
                    continue;
                }
                let chain = volumes::layers_of(&record)?;
                // One that was being removed when it was pinned is none.
                if !chain.iter().all(|layer| layers.join(layer).exists()) {
                    tracing::info!(record = %record.display(), "it is gone, and not in the backup");
                    continue;
                }
                let (name, text) = (below(&format!("{dir}/{kind}"), &record), read(&record)?);
                if kind == "volumes" {
                    let id = record.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    left.insert(id, (name, text, chain));
                } else {
                    records.push((name, text));
                    named.extend(chain);
                }
            }
        }
        let mut done = BTreeSet::new();
        while let Some(first) = left.keys().next().cloned() {
            // All volumes of a machine at one moment: they may belong together. From then on that is sealed, and who writes to
            // it goes on while it is copied. One that was deleted since it was pinned is as it was.
            let of_machine =
                self.shared.users(std::slice::from_ref(&first)).into_iter().flat_map(|(_, volumes)| volumes);
            let together: BTreeSet<String> =
                of_machine.filter(|id| left.contains_key(id)).chain([first]).collect();
            let now = self.cut(&together)?;
            for id in together {
                let Some((name, was, chain)) = left.remove(&id) else { continue };
                // The first is written where it is restored; the second may be of an older cut.
                let (text, chain, written) = match now.get(&id) {
                    Some((text, chain)) => (text.clone(), chain.clone(), 1),
                    None => (was, chain, 2),
                };
                for layer in chain.iter().take(written) {
                    if done.insert(layer.clone()) {
                        copy(layer, false)?;
                    }
                }
                named.extend(chain);
                records.push((name, text));
            }
        }
        for layer in named.difference(&done) {
            copy(layer, true)?;
        }
        records.iter().try_for_each(|(name, text)| target.bytes(name, text))
    }

    /// Gives volumes new top layers, at one moment; returns the records and the layers of what they were until then, which are
    /// pinned. Those that are gone have none.
    fn cut(&self, volumes: &BTreeSet<String>) -> Result<BTreeMap<String, Were>> {
        let own = &self.shared.volumes;
        let there: Vec<String> = volumes.iter().filter(|id| own.files(id).is_ok()).cloned().collect();
        let were = RefCell::new(BTreeMap::new());
        let cut = self.shared.at_an_instant(&there, &|users| {
            own.cut(&there.iter().map(String::as_str).collect::<Vec<_>>(), users)?;
            for id in &there {
                let (text, chain) = own.before_cut(id)?;
                for layer in &chain {
                    let (from, link) =
                        (own.layers_directory().join(layer), self.pinned.join(LAYERS).join(layer));
                    match fs::hard_link(&from, &link) {
                        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(&link, e)),
                        _ => {}
                    }
                }
                were.borrow_mut().insert(id.clone(), (text, chain));
            }
            Ok(())
        });
        match cut {
            // One was deleted at this moment: then each by itself.
            Err(HostError::Missing(_)) if there.len() > 1 => {
                let each = there.iter().map(|id| self.cut(&BTreeSet::from([id.clone()])));
                Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
            }
            Err(HostError::Missing(_)) => Ok(BTreeMap::new()),
            cut => cut.map(|()| were.into_inner()),
        }
    }
}

/// The name of a file below a directory of the target.
fn below(dir: &str, path: &Path) -> String {
    format!("{dir}/{}", path.file_name().unwrap_or_default().to_string_lossy())
}

impl Shared {
    /// The machines that run and have any of these volumes, each with all volumes that it has.
    pub(super) fn users(&self, ids: &[String]) -> Vec<(Dir, Vec<String>)> {
        let slots: Vec<_> = lock(&self.slots).values().cloned().collect();
        let user = |slot: Arc<Slot>| {
            let mut state = slot.state();
            let (kept, _) = state.running()?;
            let volumes = &kept.machine.volumes;
            volumes.iter().any(|volume| ids.contains(volume)).then(|| (slot.dir.clone(), volumes.clone()))
        };
        slots.into_iter().filter_map(user).collect()
    }
}
