//! Keys of layers: each volume that is encrypted has one, and so have all layers that were made for it. A layer's name
//! says whose it is; with a key here it is encrypted, whatever its file says, and without one it is not.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use hutch_blockdev::qcow2::{create, create_encrypted};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskError, Key, Qcow2Disk};

use super::super::super::{HostError, Result};
use super::chains::Chains;
use super::files::{disk_failed, failed, path, remove, sweep, sync_dir, write};
use super::{Volumes, read_record, write_record};
use crate::export::each_piece;
use crate::keyring::{KeyError, Wrapped};

/// Whose layer it is: a volume's, a copied snapshot's, a template's.
fn owner(layer: &str) -> &str {
    layer.split_once('.').map_or(layer, |(owner, _)| owner)
}

/// Whose keys are needed: of the layers there are, and of those that volumes will be given.
fn owners(chains: &Chains) -> BTreeSet<&str> {
    let of_layers = chains.all().flatten().map(|layer| owner(layer));
    of_layers.chain(chains.volumes.keys().chain(chains.snapshots.keys()).map(String::as_str)).collect()
}

fn key_failed(owner: &str, error: &KeyError) -> HostError {
    HostError::Key(format!("{owner}: {error}"))
}

impl Volumes {
    /// The ids of the keys that may wrap others, the default one first.
    pub fn wrapping_keys(&self) -> Vec<String> {
        self.keyring.ids()
    }

    fn key_path(&self, owner: &str) -> Result<PathBuf> {
        path(&self.keys, owner, "json")
    }

    /// What a layer is encrypted with, as it is kept.
    pub(super) fn wrapped(&self, layer: &str) -> Result<Option<Wrapped>> {
        read_record(&self.key_path(owner(layer))?)
    }

    /// What a layer is encrypted with.
    pub(super) fn key_of(&self, layer: &str) -> Result<Option<Key>> {
        let unwrap = |wrapped: Wrapped| self.unwrap(layer, &wrapped);
        self.wrapped(layer)?.map(unwrap).transpose()
    }

    pub(super) fn unwrap(&self, layer: &str, wrapped: &Wrapped) -> Result<Key> {
        let owner = owner(layer);
        self.keyring.unwrap(wrapped, owner).map_err(|e| key_failed(owner, &e))
    }

    /// Gives a volume or a snapshot that has no record yet a new key, or none. What has a key there is a crash's.
    pub(super) fn new_key(&self, owner: &str, by: Option<&str>) -> Result<()> {
        let path = self.key_path(owner)?;
        match by {
            Some(by) => {
                let wrapped = self.keyring.make(by, owner).map_err(|e| key_failed(owner, &e))?;
                write_record(&path, &wrapped)
            }
            None if path.exists() => {
                remove(&path)?;
                sync_dir(&self.keys)
            }
            None => Ok(()),
        }
    }

    /// Takes over the key of a layer of another region.
    pub(super) fn share_key(&self, layer: &str, wrapped: Option<&Wrapped>) -> Result<()> {
        let path = self.key_path(owner(layer))?;
        match wrapped {
            Some(wrapped) if !path.exists() => write_record(&path, wrapped),
            _ => Ok(()),
        }
    }

    /// Makes `file` an empty layer of this name.
    pub(super) fn fill_layer(&self, file: &dyn Store, layer: &str, size: u64) -> Result<()> {
        let made = match self.key_of(layer)? {
            Some(key) => create_encrypted(file, size, &key),
            None => create(file, size),
        };
        made.map_err(|e| disk_failed(layer, &e))
    }

    /// Makes a layer of this name that holds what `from` does; `go_on` may end it by an error.
    pub(super) fn write_layer(
        &self,
        layer: &str,
        size: u64,
        from: &dyn Disk,
        go_on: &dyn Fn() -> std::result::Result<(), DiskError>,
    ) -> Result<()> {
        let key = self.key_of(layer)?;
        let wrong = |e: DiskError| disk_failed(layer, &e);
        write(&self.layers.join(layer), |file| {
            self.fill_layer(file, layer, size)?;
            let file = file.try_clone().map_err(|e| failed(&self.layers, e))?;
            let to = Qcow2Disk::with_key(Arc::new(file), None, key.as_ref(), false).map_err(wrong)?;
            each_piece(from, |_| go_on(), |at, piece| to.write_at(at, piece))
                .and_then(|()| to.flush())
                .map_err(wrong)
        })
    }

    /// Removes the keys of whose layers none is left of these.
    pub(super) fn remove_unused_keys<'a>(
        &self,
        chains: &Chains,
        of: impl IntoIterator<Item = &'a String>,
    ) -> Result<()> {
        let used = owners(chains);
        let unused: BTreeSet<&str> =
            of.into_iter().map(|layer| owner(layer)).filter(|owner| !used.contains(owner)).collect();
        unused.into_iter().try_for_each(|owner| remove(&self.key_path(owner)?))
    }

    /// Removes what a crash left.
    pub(super) fn sweep_keys(&self, chains: &Chains) -> Result<()> {
        let used = owners(chains);
        sweep(&self.keys, |path| {
            path.file_stem().and_then(|stem| stem.to_str()).is_none_or(|owner| !used.contains(owner))
        })
    }
}
