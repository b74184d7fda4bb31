//! The disks of a machine over all its runs: those of the plan, and those that come and leave while it runs.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hutch_blockdev::stack::{self, Stack};
use hutch_blockdev::store::{self, Store};
use hutch_blockdev::{Disk, DiskError, Layer, layers};

use crate::complaint::complain;
use crate::rate::Limiter;
use crate::virtio::blk::DiskCounts;

/// How long a guest has before it is asked to let a disk go once more. One that is asked while it does so could take the
/// second time for the disk that comes next.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most files a disk may lie on.
pub const LAYERS_MAX: usize = layers::MAX_LAYERS;

/// A disk.
#[derive(Clone)]
pub struct Drive {
    /// What the guest reads as its serial: the volume's id.
    pub serial: String,
    /// What it is made of.
    pub disk: Arc<dyn Disk>,
    /// The same, where it is a volume that is written.
    pub stack: Option<Arc<Stack>>,
    /// What whoever opened its files calls the top one.
    pub top: String,
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
    pub fn open(id: &str, serial: &str, layers: Vec<Layer>, read_only: bool) -> Result<Drive, String> {
        if let Some(why) = wrong(serial, layers.len()) {
            return Err(format!("{id}: disk {serial:?} {why}"));
        }
        let opened = layers::open(layers, read_only);
        let opened = opened.map_err(|e| format!("{id}: disk {serial}: {}", told(&e)))?;
        let (top, counts, limit) = Default::default();
        let layers::Opened { disk, stack } = opened;
        Ok(Drive { serial: serial.to_owned(), disk, stack, top, counts, limit, leaving: None })
    }

    fn stack(&self) -> Result<&Arc<Stack>, String> {
        self.stack.as_ref().ok_or_else(|| format!("disk {} is no volume that is written", self.serial))
    }

    /// Makes the layer that was cut off last durable; others may read it then. Takes as long as that.
    ///
    /// # Errors
    /// It is no volume, or cannot be flushed.
    pub fn seal(&self) -> Result<(), String> {
        self.stack()?.seal().map_err(|e| format!("disk {}: {}", self.serial, told(&e)))
    }

    /// Reads what its top layer does not hold from these files from now on, which have the same bytes.
    ///
    /// # Errors
    /// It is no volume, a layer of it is not sealed, or the files are wrong; nothing changed.
    pub fn rebase(&self, layers: Vec<Layer>) -> Result<(), String> {
        let rebased = self.stack()?.rebase(layers);
        rebased.map_err(|e| format!("disk {}: {}", self.serial, told(&e)))
    }
}

/// An error with its cause.
pub fn told(error: &DiskError) -> String {
    let cause = error.source.as_ref().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{cause}")
}

/// What is wrong with a disk of this serial on so many files.
pub fn wrong(serial: &str, layers: usize) -> Option<&'static str> {
    if layers == 0 {
        Some("has no layers")
    } else if layers > LAYERS_MAX {
        Some("has more than 64 layers; flatten it")
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

    /// Gives disks new top layers, all at one instant: the serial, what the new one is called, and its file, of each. A disk
    /// whose top layer is called so is left as it is.
    ///
    /// # Errors
    /// One of them is not there, is no volume, or has a layer that is not sealed; a file is wrong. Nothing changed.
    pub fn cut(&self, cuts: Vec<(String, String, File)>) -> Result<(), String> {
        let mut drives = self.lock();
        let (mut stacks, mut names) = (Vec::new(), Vec::new());
        for (serial, top, file) in cuts {
            let drive = drives.iter().find(|drive| drive.serial == serial);
            let drive = drive.ok_or_else(|| format!("there is no disk {serial}"))?;
            if drive.top == top {
                continue;
            }
            store::lock(&file, false).map_err(|e| format!("the new layer of {serial}: {}", told(&e)))?;
            stacks.push((drive.stack()?.clone(), Arc::new(file) as Arc<dyn Store>));
            names.push((serial, top));
        }
        let cuts = stacks.iter().map(|(stack, file)| (&**stack, file.clone())).collect();
        stack::cut(cuts).map_err(|e| told(&e))?;
        for drive in drives.iter_mut() {
            if let Some((_, top)) = names.iter().find(|(serial, _)| *serial == drive.serial) {
                drive.top.clone_from(top);
            }
        }
        Ok(())
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
            complain(format_args!(
                "{serial} is detached, but what its guest did not flush may be lost: {}",
                told(&e)
            ));
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
    use hutch_blockdev::Format;

    fn drive(serial: &str) -> Drive {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        Drive::open("i-1", serial, vec![(file, Format::Raw).into()], false).unwrap()
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
        let file = || Layer::from((tempfile::tempfile().unwrap(), Format::Qcow2));
        for (serial, layers, why) in [
            ("", vec![file()], "serial"),
            ("vol-1", vec![file()], "serial"),
            ("vol1", vec![], "no layers"),
            ("vol1", (0..65).map(|_| file()).collect(), "64 layers"),
            ("vol1", vec![file()], "vol1"),
        ] {
            let said = Drive::open("i-1", serial, layers, false).err().unwrap();
            assert!(said.contains(why) && said.contains("i-1"), "{said}");
        }
    }
}
