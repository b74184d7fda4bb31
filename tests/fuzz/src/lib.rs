//! What is fuzzed: functions of bytes that panic where something is wrong.
//!
//! ```text
//!   make fuzz       libFuzzer drives each, with coverage, and keeps what it finds in target/fuzz
//!   cargo test      some thousand inputs of a fixed sequence, in seconds
//! ```

#[path = "../../../blockdev/tests/replay/engine.rs"]
mod engine;
mod foreign;
mod queue;
mod store;
mod wire;
#[path = "../../../blockdev/tests/replay/world.rs"]
mod world;

use std::sync::Arc;

use hutch_blockdev::qcow2::{Chain, Sealed};
use hutch_blockdev::{Disk, Qcow2Disk, RawDisk};
use store::Memory;

/// The most that is done to a volume by one input.
const STEPS: usize = 200;
/// No disk here is read beyond so many bytes.
const LOOK: u64 = 4 << 20;

/// Operations on a volume and its layers, against what the disk has to hold, with losses of power: at each operation, or where
/// the bytes say so. After each the files' reference counts are right.
pub fn volume(bytes: &[u8]) {
    let crash_always = bytes.first().is_some_and(|first| first & 0x10 != 0);
    engine::run(bytes, engine::Run { steps: STEPS, crash_always, judge: &mut |_, _| {} });
}

/// A disk in the format of another program, damaged: it is read, the same however it is read, or refused.
pub fn foreign(bytes: &[u8]) {
    foreign::run(bytes);
}

/// A driver that keeps no rules: its queue is served or given up, and the disk serves the next one.
pub fn queue(bytes: &[u8]) {
    queue::run(bytes);
}

/// What clients and guests send: forms, signatures, DHCP.
pub fn wire(bytes: &[u8]) {
    wire::run(bytes);
}

/// A qcow2 file that anybody may have made: it is read, or refused. One that can be written to keeps what is written, and
/// nothing else changes.
pub fn image(bytes: &[u8]) {
    let open = |read_only| Qcow2Disk::on(Arc::new(Memory::of(bytes)), None, read_only);
    if let Ok(disk) = open(true) {
        read_all(&disk);
    }
    if let Ok(Some(sealed)) = Sealed::open(Arc::new(Memory::of(bytes)), None)
        && let Ok(chain) = Chain::new(vec![Arc::new(sealed)], None)
    {
        read_all(&chain);
    }
    let store = Memory::of(bytes);
    let Ok(disk) = Qcow2Disk::on(Arc::new(store.clone()), None, false) else { return };
    // Whoever passes the gate to be written is a volume: it does all that a volume does.
    let Some(before) = read_all(&disk) else { return };
    let at = disk.size() / 2 / 512 * 512;
    if disk.size() < 512 || disk.write_at(at, &[0xa7; 512]).and_then(|()| disk.flush()).is_err() {
        return;
    }
    drop(disk);
    let again = Qcow2Disk::on(Arc::new(store), None, false).expect("what was flushed can be opened");
    let after = read_all(&again).expect("what was read is read again");
    for (i, (was, is)) in before.iter().zip(&after).enumerate() {
        let written = (at..at + 512).contains(&(i as u64));
        assert_eq!(*is, if written { 0xa7 } else { *was }, "byte {i}");
    }
}

/// The first bytes of a disk, where they can be read.
fn read_all(disk: &dyn Disk) -> Option<Vec<u8>> {
    let mut bytes = vec![0; disk.size().min(LOOK) as usize / 512 * 512];
    let whole = disk.read_at(0, &mut bytes);
    let last = disk.size().saturating_sub(1) / 512 * 512;
    let _ = disk.read_at(last, &mut [0; 512]);
    if let Ok(zeros) = disk.zeros_at(0)
        && whole.is_ok()
    {
        let known = bytes.get(..(zeros as usize).min(bytes.len())).unwrap_or_default();
        assert!(known.iter().all(|byte| *byte == 0), "{zeros} bytes are said to be zeros");
    }
    whole.ok().map(|()| bytes)
}

/// A disk that is to be booted: partitions, a file system, a boot loader's configuration; or only the latter. What it names
/// is found or refused.
pub fn boot(bytes: &[u8]) {
    use hutch_imagestore::boot::{bls, extlinux, grub};
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = bls::parse("an-entry.conf", text);
        let environment = grub::parse_environment(text);
        if let Ok(entry) = extlinux::choose(text, "/boot/extlinux") {
            assert!(entry.kernel.starts_with('/'), "{entry:?}");
        }
        let _ = grub::choose(text, &environment);
        return;
    }
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    if let Ok(disk) = RawDisk::on(Memory::of(&bytes), true) {
        let disk: Arc<dyn Disk> = Arc::new(disk);
        if let Ok(files) = hutch_imagestore::boot::read(&disk) {
            assert!(!files.kernel.is_empty(), "a kernel of no bytes was found");
        }
    }
}

#[cfg(test)]
mod tests;
