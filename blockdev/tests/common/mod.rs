//! What every disk backend is tested with: a random source, a shadow of the disk's bytes as the full oracle, and
//! stores that fail or remember.

#![allow(dead_code, reason = "each test program uses a part")]

pub mod conformance;
pub mod corpus;
pub mod faulty;
pub mod rng;

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Command;

use hutch_blockdev::Key;

/// A key that is made of `seed`.
pub fn key(seed: u8) -> Key {
    Key::new(&std::array::from_fn::<u8, 64, _>(|i| seed.wrapping_mul(41).wrapping_add(i as u8)))
        .expect("a key")
}

/// Runs `qemu-img` with `args`; returns its exit code and what it said.
pub fn qemu_img(args: &[&str]) -> (i32, String) {
    let out =
        Command::new("qemu-img").args(args).output().expect("qemu-img is installed by tests/lab/deps.sh");
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    (out.status.code().unwrap_or(-1), said)
}

/// Asserts that `qemu-img check` finds nothing at all: neither corruption nor leaks.
pub fn assert_clean(image: &Path) {
    let (code, said) = qemu_img(&["check", "-f", "qcow2", image.to_str().expect("UTF-8 path")]);
    assert_eq!(code, 0, "qemu-img check of {}: {said}", image.display());
}

/// Opens `path` for reading and writing; it is made where it is missing.
pub fn rw(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).expect("open the file")
}

/// Makes an image with `qemu-img`; `args` are those between the command and the files.
pub fn convert(args: &[&str], raw: &Path, image: &Path) {
    let files = [raw.to_str().expect("UTF-8 path"), image.to_str().expect("UTF-8 path")];
    let all = [&["convert", "-f", "raw", "-O", "qcow2"], args, &files].concat();
    let (code, said) = qemu_img(&all);
    assert_eq!(code, 0, "qemu-img {all:?}: {said}");
}

/// Asserts that QEMU reads `want` from `image`, which lies on `base` (raw) where there is one.
pub fn assert_qemu_reads(image: &Path, base: Option<&Path>, want: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let oracle = dir.path().join("oracle");
    std::fs::write(&oracle, want).expect("the oracle's file");
    let file = |driver: &str, path: &Path, more: &str| {
        let path = path.display();
        format!(r#"{{"driver":"{driver}","file":{{"driver":"file","filename":"{path}"}}{more}}}"#)
    };
    let backing = base.map_or(String::new(), |b| format!(r#","backing":{}"#, file("raw", b, "")));
    let image = format!("json:{}", file("qcow2", image, &backing));
    let (code, said) = qemu_img(&["compare", &image, &format!("json:{}", file("raw", &oracle, ""))]);
    assert_eq!(code, 0, "qemu-img compare: {said}");
}
