//! A guest's disks: what it writes is in the file, what is ephemeral is forgotten, what is read-only stays.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use hutch_tests::{boot_micro, root, text};

/// A file of this size, below the build directory, which the lab sees too.
fn disk(name: &str, size: u64) -> PathBuf {
    let dir = root().join("target/stories");
    std::fs::create_dir_all(&dir).expect("target is writable");
    let path = dir.join(name);
    File::create(&path).and_then(|f| f.set_len(size)).expect("target has room");
    path
}

fn first(path: &PathBuf, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    File::open(path).and_then(|mut f| f.read_exact(&mut bytes)).expect("the disk is there");
    bytes
}

#[test]
fn what_a_guest_writes_is_where_its_disk_says() {
    let (kept, forgotten, fixed) =
        (disk("kept.raw", 64 << 20), disk("forgotten.raw", 32 << 20), disk("fixed.raw", 16 << 20));
    let script = "cd /sys/block; cat vda/size vdb/size vdc/size vdc/ro vda/serial; \
        for d in vda vdb; do echo written | dd of=/dev/$d conv=fsync,sync bs=512; done; \
        dd if=/dev/vdb bs=7 count=1; dd if=/dev/zero of=/dev/vdc bs=512 count=1 && exit 9; \
        blkdiscard -o 1048576 -l 1048576 /dev/vda && exit 5";
    let (ephemeral, read_only) =
        (format!("{}:ephemeral", forgotten.display()), format!("{}:ro", fixed.display()));
    let out = boot_micro(&[
        "--disk",
        &kept.to_string_lossy(),
        "--disk",
        &ephemeral,
        "--disk",
        &read_only,
        "--",
        "/bin/sh",
        "-c",
        script,
    ]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(5), "{said}");
    for line in ["131072", "65536", "32768", "1", "vol00000000000000000"] {
        assert!(said.contains(line), "{line} is missing: {said}");
    }
    assert!(said.contains("written"), "{said}");
    assert_eq!(first(&kept, 8), b"written\n");
    assert_eq!(first(&forgotten, 8), [0; 8]);
    assert_eq!(first(&fixed, 8), [0; 8]);
}

#[test]
fn a_disk_has_one_machine() {
    let path = disk("busy.raw", 1 << 20);
    let path = path.to_string_lossy();
    let out = boot_micro(&["--disk", &path, "--disk", &path, "--", "/bin/true"]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(240), "{said}");
    assert!(said.contains("in use by another machine") && said.contains("busy.raw"), "{said}");
}
