//! Instance stores: disks that one run of a machine has for itself. Each begins as zeros, is there after a reboot of the guest,
//! and is gone when the run has ended, however it did.
//!
//! ```text
//!   machines/i-…/0.3.store     the first one of run 3
//! ```
//! A run's file is made anew and is no other's: the next guest cannot read what was in it. Its extension is its own: those of
//! other files of a machine are swept and backed up.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use hutch_blockdev::store::lock;
use hutch_blockdev::{Format, Layer, SECTOR};

use super::super::{HostError, Machine, Result};
use super::machine::{Kept, Phase};
use super::volumes::{chain, failed, files, has_extension, remove};

/// What a guest reads as the serial of its store: EC2's name of it.
pub fn serial(index: usize) -> String {
    format!("ephemeral{index}")
}

/// The extension of stores in a machine's directory.
const EXTENSION: &str = "store";

fn path(dir: &Path, machine: &Machine, index: usize) -> PathBuf {
    dir.join(format!("{index}.{}.{EXTENSION}", machine.run))
}

/// The stores of a machine that is being started, locked: new ones for a new run, its own where its guest reboots.
///
/// # Errors
/// They cannot be made or opened, or somebody has them.
pub fn open(kept: &Kept, dir: &Path) -> Result<Vec<Layer>> {
    let again = kept.phase == Phase::Restarting;
    if !again {
        clear(dir)?;
    }
    let machine = &kept.machine;
    let one = |(index, size): (usize, &u64)| {
        let path = path(dir, machine, index);
        let how = |new: bool| File::options().read(true).write(true).create_new(new).mode(0o600).open(&path);
        let file = match how(!again) {
            // Somebody took it away: it is as after an end.
            Err(e) if again && e.kind() == io::ErrorKind::NotFound => how(true),
            file => file,
        };
        let file = file.map_err(|e| failed(&path, e))?;
        let size = size.next_multiple_of(SECTOR);
        if file.metadata().map_err(|e| failed(&path, e))?.len() != size {
            file.set_len(size).map_err(|e| failed(&path, e))?;
        }
        lock(&file, false).map_err(|e| HostError::Failed(format!("{}: {}", path.display(), chain(&e))))?;
        Ok(Layer::from((file, Format::Raw)))
    };
    machine.stores.iter().enumerate().map(one).collect()
}

/// Removes the stores of a machine that does not run.
///
/// # Errors
/// One cannot be removed.
pub fn clear(dir: &Path) -> Result<()> {
    files(dir)?.iter().filter(|path| has_extension(path, EXTENSION)).try_for_each(|path| remove(path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, PermissionsExt};

    use super::super::boot;
    use super::super::machine::Dir;
    use super::*;

    fn kept(run: u64, phase: Phase) -> Kept {
        let machine = serde_json::json!({
            "id": "i-1", "run": run, "uuid": "", "vcpus": 1, "memory_mib": 512, "volumes": [], "interfaces": [],
            "stores": [1 << 20, 1000], "metadata": crate::metadata::Metadata::default(),
        });
        Kept { phase, ..Kept::new(serde_json::from_value(machine).unwrap()) }
    }

    fn start(layer: &Layer) -> Vec<u8> {
        let mut bytes = vec![1; 512];
        layer.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// In how many files of the directory, or in what a machine has open, a text is.
    fn seen(dir: &Path, open: &[Layer], text: &[u8]) -> usize {
        let has = |bytes: &[u8]| bytes.windows(text.len()).any(|part| part == text);
        let named = files(dir).unwrap().iter().filter(|path| has(&std::fs::read(path).unwrap())).count();
        let opened = open.iter().filter(|layer| {
            let mut bytes = vec![0; layer.file.metadata().unwrap().len() as usize];
            layer.file.read_exact_at(&mut bytes, 0).unwrap();
            has(&bytes)
        });
        named + opened.count()
    }

    #[test]
    fn a_store_is_there_after_a_reboot_and_zeros_in_the_next_run() {
        const SECRET: &[u8] = b"the last guest's own";
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        std::fs::write(dir.join("console.log"), "stays").unwrap();
        let first = open(&kept(1, Phase::Starting), dir).unwrap();
        let size = |layer: &Layer| layer.file.metadata().unwrap().len();
        assert_eq!(first.iter().map(size).collect::<Vec<_>>(), [1 << 20, 1024], "whole sectors");
        assert_eq!(first[0].file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(start(&first[0]), [0; 512]);
        first[0].file.write_all_at(SECRET, 0).unwrap();
        // While a process has it nobody else does.
        assert!(open(&kept(1, Phase::Restarting), dir).is_err());
        drop(first);
        // What else of the machine's directory is swept is not it.
        boot::let_go(&kept(1, Phase::Running).machine, &Dir(dir.to_owned())).unwrap();
        let again = open(&kept(1, Phase::Restarting), dir).unwrap();
        assert!(start(&again[0]).starts_with(SECRET));
        assert_eq!(seen(dir, &[], SECRET), 1);
        drop(again);
        // The daemon was killed before it could clear what the run left.
        let second = open(&kept(2, Phase::Starting), dir).unwrap();
        assert_eq!((start(&second[0]), seen(dir, &second, SECRET)), (vec![0; 512], 0));
        second[0].file.write_all_at(SECRET, 0).unwrap();
        drop(second);
        clear(dir).unwrap();
        assert_eq!(seen(dir, &[], SECRET), 0);
        assert_eq!(files(dir).unwrap(), [dir.join("console.log")]);
    }
}
