//! What this host has at one moment, and how it is copied.
//!
//! Files are pinned by one more name each below `pinned/`, so that what is removed meanwhile can be copied all the same.
//! What a crash leaves of that is removed when the host is opened.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::{End, HostError, Result};
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
/// How long a volume may be neither free nor of a machine that runs: while one starts or ends.
const UNSETTLED: Duration = Duration::from_secs(120);
/// How often it is looked at then.
const LOOK: Duration = Duration::from_millis(100);

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
    // The records first: what they name is there, unless it is being removed.
    moment.pin(own.directory(), &volumes, "json")?;
    moment.pin(own.snapshots_directory(), &snapshots, "json")?;
    moment.pin(own.keys_directory(), &keys, "json")?;
    for kind in ["qcow2", "raw"] {
        moment.pin(own.layers_directory(), &layers, kind)?;
    }
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
        self.shared.volumes.release();
        if let Some(Err(error)) = self.pinned.parent().map(unpin) {
            tracing::warn!(%error, "what a backup pinned stays until the next start");
        }
    }
}

impl Captured for Moment {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn copy(&self, target: &mut Target<'_>, dir: &str) -> backup::Result<()> {
        // Templates first: volumes and snapshots are other names of their bytes, mostly.
        for (id, mode) in &self.images {
            target.directory(&format!("{IMAGES}/{id}"), *mode)?;
            for file in files(&self.pinned.join(IMAGES).join(id))? {
                target.file(&file, &below(&format!("{IMAGES}/{id}"), &file), true)?;
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
        let (mut named, mut left, mut done) = (BTreeSet::new(), BTreeMap::new(), BTreeSet::new());
        for kind in ["snapshots", "volumes"] {
            for record in files(&self.pinned.join(kind))? {
                let chain = volumes::layers_of(&record)?;
                // One that was being removed when it was pinned is none.
                if !chain.iter().all(|layer| layers.join(layer).exists()) {
                    continue;
                }
                target.file(&record, &below(&format!("{dir}/{kind}"), &record), false)?;
                if kind == "volumes" {
                    let id = record.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                    left.insert(id, chain.clone());
                }
                named.extend(chain);
            }
        }
        // The first is written, and the second where its machine has not heard of a cut.
        let written: BTreeSet<String> =
            left.values().flat_map(|chain| chain.iter().take(2)).cloned().collect();
        for layer in named.difference(&written) {
            target.file(&layers.join(layer), &format!("{to}/{layer}"), true)?;
        }
        while let Some(first) = left.keys().next().cloned() {
            let until = Instant::now() + UNSETTLED;
            let mut copied = Vec::new();
            // All volumes of a machine at one moment: they may belong together.
            self.shared.hold(&[first], until, LOOK, |together| {
                for (id, chain) in together.iter().filter_map(|id| left.get_key_value(id)) {
                    for layer in chain.iter().take(2) {
                        if done.insert(layer.clone()) {
                            target.file(&layers.join(layer), &format!("{to}/{layer}"), false)?;
                        }
                    }
                    copied.push(id.clone());
                }
                Ok::<_, BackupError>(())
            })?;
            left.retain(|id, _| !copied.contains(id));
        }
        Ok(())
    }
}

/// The name of a file below a directory of the target.
fn below(dir: &str, path: &Path) -> String {
    format!("{dir}/{}", path.file_name().unwrap_or_default().to_string_lossy())
}

impl Shared {
    /// Does `job` while nobody writes to the volumes `ids`, nor to the others of the machines that have them; all of these
    /// are handed to it. A machine that runs is held with its disks flushed, one that is to start waits.
    ///
    /// # Errors
    /// The job's; a machine cannot be held.
    pub fn hold<E: From<HostError>>(
        &self,
        ids: &[String],
        until: Instant,
        look: Duration,
        job: impl FnOnce(&[String]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        loop {
            let users = self.users(ids);
            let of_users = users.iter().flat_map(|(_, volumes)| volumes);
            let together: BTreeSet<String> = ids.iter().chain(of_users).cloned().collect();
            let together: Vec<String> = together.into_iter().collect();
            let taken = self.volumes.hold(together.iter().map(String::as_str));
            // One may have begun or ended before all of them were ours.
            let now = self.users(ids);
            if !now.iter().map(|(_, volumes)| volumes).eq(users.iter().map(|(_, volumes)| volumes)) {
                continue;
            }
            let held = users.iter().map(|(dir, _)| super::Held::new(dir).map_err(|e| e.to_string()));
            let held = held.collect::<std::result::Result<Vec<_>, String>>();
            let mut unused = ids.iter().filter(|id| !users.iter().any(|(_, volumes)| volumes.contains(id)));
            let busy = unused.try_fold(false, |busy, id| Ok::<_, E>(busy || !self.volumes.is_free(id)?))?;
            let why = match held {
                Ok(_held) if !busy => return job(&together),
                Ok(_) => "some process has it".into(),
                Err(error) => error,
            };
            drop(taken);
            if Instant::now() >= until {
                let ids = ids.join(", ");
                let why = format!("the volume {ids} cannot be held still: {why}");
                return Err(HostError::Failed(why).into());
            }
            std::thread::sleep(look);
        }
    }

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
