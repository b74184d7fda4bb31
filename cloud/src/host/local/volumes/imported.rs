//! Snapshots of files that are imported: raw, or encrypted on their way from the process that reads them, so that no byte
//! of theirs is ever on the disk as it was.

use std::fs::File;
use std::io;
use std::sync::Arc;

use hutch_blockdev::qcow2::create_encrypted;
use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Key, Qcow2Disk};
use hutch_imagestore::import::{Limits, Sink, Target};

use super::super::super::Result;
use super::Volumes;
use super::chains::new_name;
use super::files::{disk_failed, path, sync_dir, write};
use super::snapshots::Kept;

/// A layer that takes a disk, and encrypts it.
struct Encrypting<'a> {
    file: &'a File,
    key: &'a Key,
    disk: Option<Qcow2Disk>,
}

fn io_failed(error: DiskError) -> io::Error {
    match error.kind {
        DiskErrorKind::NoSpace => io::ErrorKind::StorageFull.into(),
        _ => io::Error::other(super::chain(&error)),
    }
}

impl Encrypting<'_> {
    /// The disk; of `size` bytes, if it is not there yet.
    fn disk(&mut self, size: u64) -> io::Result<&Qcow2Disk> {
        let disk = match self.disk.take() {
            Some(disk) => disk,
            None => {
                create_encrypted(self.file, size, self.key).map_err(io_failed)?;
                Qcow2Disk::with_key(Arc::new(self.file.try_clone()?), None, Some(self.key), false)
                    .map_err(io_failed)?
            }
        };
        Ok(self.disk.insert(disk))
    }
}

impl Sink for Encrypting<'_> {
    fn size(&mut self, bytes: u64) -> io::Result<()> {
        self.disk(bytes)?.shrink(bytes).map_err(io_failed)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        // Its size shows at its end: until then it is as large as any may be. What nobody writes takes no room.
        self.disk(Limits::default().virtual_bytes)?.write_at(at, bytes).map_err(io_failed)
    }
}

impl Volumes {
    /// See [`Host::import_snapshot`](super::super::super::Host::import_snapshot). `fill` makes the disk.
    ///
    /// # Errors
    /// Those of `fill`; [`HostError::NoRoom`](super::super::super::HostError::NoRoom), [`HostError::Key`](super::super::super::HostError::Key).
    pub fn import_snapshot(
        &self,
        id: &str,
        key: Option<&str>,
        fill: impl FnOnce(&mut Target<'_>) -> Result<u64>,
    ) -> Result<u64> {
        if path(&self.snapshots, id, "json")?.exists() {
            // Whoever gave it the name may have been killed before the name was durable.
            sync_dir(&self.snapshots)?;
            return Ok(self.snapshot(id)?.size);
        }
        let name = if key.is_some() { new_name(id) } else { format!("{id}.raw") };
        // Before it is there: what no chain has is removed.
        self.chains().snapshots.insert(id.to_owned(), vec![name.clone()]);
        let made = self.new_key(id, key).and_then(|()| self.take_in(&name, fill));
        match made.and_then(|size| self.keep(id, Kept { size, layers: vec![name] }).map(|()| size)) {
            Ok(size) => Ok(size),
            Err(error) => {
                self.delete_snapshot(id)?;
                Err(error)
            }
        }
    }

    /// Makes a layer; tells the disk's size.
    fn take_in(&self, name: &str, fill: impl FnOnce(&mut Target<'_>) -> Result<u64>) -> Result<u64> {
        let key = self.key_of(name)?;
        let mut size = 0;
        write(&self.layers.join(name), |file| {
            let mut sink = key.as_ref().map(|key| Encrypting { file, key, disk: None });
            let into = sink.as_mut().map(|sink| sink as &mut dyn Sink);
            size = fill(&mut Target { disk: file, directory: &self.layers, sink: into })?;
            match sink.and_then(|sink| sink.disk) {
                Some(disk) => disk.flush().map_err(|e| disk_failed(name, &e)),
                None => Ok(()),
            }
        })?;
        Ok(size)
    }
}
