//! What a machine boots.
//!
//! ```text
//!   kernel named?   RAM disk named?   kernel        RAM disk    command line
//!   no              no                the disk's    the disk's  the disk's
//!   no              yes               the disk's    named       the disk's
//!   yes             no                named         none        the disk's, with a root that this kernel finds
//!   yes             yes               named         named       the disk's
//! ```
//! A disk that has no boot loader's configuration gives a kernel that was named nothing but its root. What was named has
//! one more name in the machine's directory, so that it outlives its image.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_blockdev::{Disk, Layer, open_layers};
use hutch_imagestore::boot::{self, ReadError};
use hutch_imagestore::store::Kind;
use hutch_vmm::config::{BootConfig, FdNumber};
use hutch_vmm::launch::Inherit;

use super::super::{HostError, Machine, Result, no_boot_file};
use super::machine::{Dir, launch_failed};
use super::volumes::{Volumes, cannot_link, chain, failed, files, has_extension, remove, sync_dir};

/// The extension of kernels and RAM disks in a machine's directory.
pub const EXTENSION: &str = "raw";

fn path(dir: &Dir, id: &str) -> PathBuf {
    dir.0.join(format!("{id}.{EXTENSION}"))
}

/// Has the machine's directory keep what the machine was told to boot.
///
/// # Errors
/// [`HostError::Missing`]: it is gone from the images, and was not kept before.
pub fn keep(machine: &Machine, dir: &Dir, volumes: &Volumes) -> Result<()> {
    for (kind, id) in [(Kind::Kernel, &machine.kernel), (Kind::Ramdisk, &machine.ramdisk)] {
        let Some(id) = id else { continue };
        if Kind::of_id(id) != Some(kind) {
            return Err(HostError::Failed(format!("{id} is no id of a {}", kind.name())));
        }
        let link = path(dir, id);
        if link.exists() {
            continue;
        }
        let image = volumes.images()?.into_iter().find(|image| image.record.id == *id);
        let image = image.ok_or_else(|| no_boot_file(id))?.disk();
        fs::hard_link(&image, &link).map_err(|e| match e.kind() {
            // Removed this moment.
            io::ErrorKind::NotFound => no_boot_file(id),
            _ => cannot_link(&image, &link, e),
        })?;
        sync_dir(&dir.0)?;
    }
    Ok(())
}

/// Lets go what the machine was told to boot before. It runs with what it is told now.
///
/// # Errors
/// It cannot be removed.
pub fn let_go(machine: &Machine, dir: &Dir) -> Result<()> {
    let own: Vec<PathBuf> =
        [&machine.kernel, &machine.ramdisk].into_iter().flatten().map(|id| path(dir, id)).collect();
    let all = files(&dir.0)?.into_iter();
    all.filter(|file| has_extension(file, EXTENSION) && !own.contains(file))
        .try_for_each(|file| remove(&file))
}

/// What the machine boots now: what it was told to, else what the boot loader of its first disk would load.
///
/// # Errors
/// There is nothing to boot, or it cannot be read.
pub fn config(
    machine: &Machine,
    dir: &Dir,
    root: Option<&[Layer]>,
    inherit: &mut Inherit,
) -> Result<BootConfig> {
    let no = |why: String| HostError::Failed(format!("{} cannot boot: {why}", machine.id));
    let layers = root.ok_or_else(|| no("it has no root volume".into()))?;
    let layers =
        layers.iter().map(Layer::try_clone).collect::<io::Result<_>>().map_err(|e| no(e.to_string()))?;
    let disk = open_layers(layers, true).map_err(|e| no(chain(&e)))?;
    let mut initrd = machine.ramdisk.as_ref().map(|id| open(dir, id, inherit)).transpose()?;
    let (kernel, line) = match &machine.kernel {
        Some(id) => {
            let line = foreign_cmdline(machine, &disk).map_err(|e| no(chain(&*e)))?;
            (open(dir, id, inherit)?, line)
        }
        None => {
            let files = boot::read(&disk).map_err(|e| no(chain(&e)))?;
            let mut give = |bytes: &[u8]| inherit.bytes(bytes).map_err(|e| launch_failed(&e));
            if initrd.is_none() && !files.initrd.is_empty() {
                initrd = Some(give(&files.initrd)?);
            }
            (give(&files.kernel)?, files.entry.cmdline)
        }
    };
    let mut cmdline = boot::with_serial_console(&line);
    if let Some((_, key)) = machine.metadata.public_keys.first() {
        // For images without cloud-init, whose own init looks for it here.
        cmdline.push_str(" hutch.key=");
        cmdline.push_str(&BASE64_STANDARD.encode(key));
    }
    Ok(BootConfig { kernel, initrd, cmdline })
}

fn open(dir: &Dir, id: &str, inherit: &mut Inherit) -> Result<FdNumber> {
    let path = path(dir, id);
    File::open(&path).map(|file| inherit.give(file.into())).map_err(|e| failed(&path, e))
}

/// The command line for a kernel that is not the disk's.
fn foreign_cmdline(
    machine: &Machine,
    disk: &Arc<dyn Disk>,
) -> std::result::Result<String, Box<dyn std::error::Error>> {
    let own = match boot::entry(disk) {
        Ok(entry) => Some(entry.cmdline),
        Err(ReadError::Disk(error)) => return Err(error.into()),
        // Its kernel needs none.
        Err(error) => {
            let error = chain(&error);
            tracing::info!(
                instance = machine.id,
                error,
                "its disk says no command line: it is told its root"
            );
            None
        }
    };
    Ok(boot::foreign_cmdline(disk, own.as_deref(), machine.ramdisk.is_some())?)
}
