//! The disks of a machine over all its runs: those of the plan, and those that come and leave while it runs.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hutch_blockdev::{Disk, Format, open_layers};

use crate::config::DiskFormat;
use crate::rate::Limiter;
use crate::virtio::blk::DiskCounts;

/// How long a guest has before it is asked to let a disk go once more. One that is asked while it does so could take the
/// second time for the disk that comes next.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most files a disk may lie on.
pub const LAYERS_MAX: usize = 16;

/// A disk.
#[derive(Clone)]
pub struct Drive {
    /// What the guest reads as its serial: the volume's id.
    pub serial: String,
    /// What it is made of.
    pub disk: Arc<dyn Disk>,
    /// What it did.
    pub counts: Arc<DiskCounts>,
    /// What it may do.
    pub limit: Arc<Limiter>,
    /// When the guest was last asked to let it go.
    pub leaving: Option<Instant>,
}

impl Drive {
    /// Opens a disk without a limit on files that the parent opened, the top one first. `id` names the machine in messages.
    ///
    /// # Errors
    /// What is wrong with the serial or the files.
    pub fn open(
        id: &str,
        serial: &str,
        layers: Vec<(File, DiskFormat)>,
        read_only: bool,
    ) -> Result<Drive, String> {
        if let Some(why) = wrong(serial, layers.len()) {
            return Err(format!("{id}: disk {serial:?} {why}"));
        }
        let format = |format| match format {
            DiskFormat::Raw => Format::Raw,
            DiskFormat::Qcow2 => Format::Qcow2,
        };
        let layers = layers.into_iter().map(|(file, kind)| (file, format(kind))).collect();
        let disk = open_layers(layers, read_only).map_err(|e| {
            let cause = e.source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
            format!("{id}: disk {serial}: {e}{cause}")
        })?;
        let (counts, limit) = Default::default();
        Ok(Drive { serial: serial.to_owned(), disk, counts, limit, leaving: None })
    }
}

/// What is wrong with a disk of this serial on so many files.
pub fn wrong(serial: &str, layers: usize) -> Option<&'static str> {
    if layers == 0 {
        Some("has no layers")
    } else if layers > LAYERS_MAX {
        Some("has more than 16 layers; flatten it")
    } else if serial.is_empty() || serial.len() > 20 || !serial.bytes().all(|b| b.is_ascii_alphanumeric()) {
        Some("has a serial that is not 1 to 20 ASCII letters and digits (virtio 1.2, 5.2.6)")
    } else {
        None
    }
}

/// All disks, in the order the guest finds them.
#[derive(Clone, Default)]
pub struct Drives(Arc<Mutex<Vec<Drive>>>);

impl Drives {
    fn lock(&self) -> MutexGuard<'_, Vec<Drive>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them now.
    pub fn all(&self) -> Vec<Drive> {
        self.lock().clone()
    }

    /// Adds one; false where there is one of this serial already.
    #[must_use]
    pub fn add(&self, drive: Drive) -> bool {
        let mut drives = self.lock();
        if drives.iter().any(|have| have.serial == drive.serial) {
            return false;
        }
        drives.push(drive);
        true
    }

    /// Marks one as leaving, and tells whether its guest is to be asked now. `None` where there is none of this serial.
    #[must_use]
    pub fn leave(&self, serial: &str) -> Option<bool> {
        let mut drives = self.lock();
        let drive = drives.iter_mut().find(|drive| drive.serial == serial)?;
        let ask = drive.leaving.is_none_or(|asked| asked.elapsed() >= PATIENCE);
        if ask {
            drive.leaving = Some(Instant::now());
        }
        Some(ask)
    }

    /// Lets one go that is leaving: all that was written to it is durable, and its files are closed with the last user.
    /// One that was not asked to leave stays, whatever its guest says.
    pub fn remove(&self, serial: &str) {
        let leaves = |drive: &Drive| drive.leaving.is_some() && drive.serial == serial;
        // It is one of the machine's until all of it is durable, which may take a while.
        let Some(disk) = self.lock().iter().find(|drive| leaves(drive)).map(|drive| drive.disk.clone())
        else {
            return;
        };
        let flushed = disk.flush();
        self.lock().retain(|drive| !leaves(drive));
        if let Err(e) = flushed {
            let cause = e.source.as_ref().map(|s| format!(": {s}")).unwrap_or_default();
            eprintln!(
                "hutch-vmm: {serial} is detached, but what its guest did not flush may be lost: {e}{cause}"
            );
        }
    }

    /// Lets all go that are leaving: their guest is gone.
    pub fn remove_leaving(&self) {
        let leaving = self.all().into_iter().filter(|drive| drive.leaving.is_some());
        leaving.for_each(|drive| self.remove(&drive.serial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(serial: &str) -> Drive {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        Drive::open("i-1", serial, vec![(file, DiskFormat::Raw)], false).unwrap()
    }

    #[test]
    fn only_what_was_asked_to_leave_can_be_let_go() {
        let drives = Drives::default();
        assert!(drives.add(drive("vol1")) && drives.add(drive("vol2")) && !drives.add(drive("vol1")));
        let serials = || drives.all().into_iter().map(|drive| drive.serial).collect::<Vec<_>>();
        drives.remove("vol1");
        assert_eq!(serials(), ["vol1", "vol2"], "a guest cannot detach its disk");
        assert_eq!((drives.leave("vol1"), drives.leave("vol3")), (Some(true), None));
        assert_eq!(drives.leave("vol1"), Some(false), "it has just been asked");
        drives.remove("vol1");
        assert_eq!(serials(), ["vol2"]);
        assert!(drives.leave("vol2").is_some() && drives.add(drive("vol1")));
        drives.remove_leaving();
        assert_eq!(serials(), ["vol1"]);
    }

    #[test]
    fn a_wrong_disk_is_refused_with_the_reason() {
        let file = || (tempfile::tempfile().unwrap(), DiskFormat::Qcow2);
        for (serial, layers, why) in [
            ("", vec![file()], "serial"),
            ("vol-1", vec![file()], "serial"),
            ("vol1", vec![], "no layers"),
            ("vol1", (0..17).map(|_| file()).collect(), "16 layers"),
            ("vol1", vec![file()], "vol1"),
        ] {
            let said = Drive::open("i-1", serial, layers, false).err().unwrap();
            assert!(said.contains(why) && said.contains("i-1"), "{said}");
        }
    }
}
