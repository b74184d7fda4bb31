//! The command line for a kernel that is not the image's: what the image's boot loader would say, with a root that
//! this kernel finds.
//!
//! UUIDs and labels of file systems are looked up by the image's own RAM disk; a kernel by itself knows a disk's name, or
//! that of a partition (kernel, Documentation/admin-guide/kernel-parameters.rst, `root=`).

use std::io;
use std::sync::Arc;

use hutch_blockdev::Disk;

use super::console::split;
use super::root::root_slice;

/// How the guest calls its first disk.
const DISK: &str = "/dev/vda";
/// Roots that only a RAM disk finds.
const LOOKED_UP: [&str; 3] = ["UUID=", "LABEL=", "/dev/disk/"];

/// The command line for a kernel of one's own on `disk`. `own` is the image's, if it has any; with a RAM disk the root
/// that it names is left to that one.
///
/// # Errors
/// The disk's, where it cannot be read.
pub fn cmdline(disk: &Arc<dyn Disk>, own: Option<&str>, ramdisk: bool) -> io::Result<String> {
    let line = own.unwrap_or_default();
    let words = split(line);
    let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
    let (kernel, init) = words.split_at(end);
    // The last one counts.
    let named = kernel.iter().rev().find_map(|word| word.strip_prefix("root="));
    let found = match named {
        Some(root) => ramdisk || !LOOKED_UP.iter().any(|way| root.trim_matches('"').starts_with(way)),
        None => ramdisk && own.is_some(),
    };
    if found {
        return Ok(line.to_owned());
    }
    let root = match root_slice(disk, line)?.and_then(|slice| slice.number()) {
        Some(number) => format!("root={DISK}{number}"),
        None => format!("root={DISK}"),
    };
    let others = kernel.iter().copied().filter(|word| !word.starts_with("root="));
    let words: Vec<&str> = [root.as_str()].into_iter().chain(others).chain(init.iter().copied()).collect();
    Ok(words.join(" "))
}
