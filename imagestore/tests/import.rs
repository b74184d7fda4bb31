//! Imports by the real worker of images that qemu-img makes, and of bad ones.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use hutch_imagestore::import::{ImportError, Limits, Request, import};
use hutch_imagestore::store::{Architecture, Format, Image, Store};

const MIB: u64 = 1 << 20;

fn request(format: Option<Format>) -> Request {
    Request {
        name: "image".to_owned(),
        format,
        architecture: Architecture::X86_64,
        limits: Limits::default(),
    }
}

fn run(room: &Path, source: &Path, request: &Request) -> Result<Image, ImportError> {
    let store = Store::open(room).unwrap();
    let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
    let mut last = (0, 0);
    let image = import(&store, &File::open(source).unwrap(), request, worker, &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })?;
    assert_eq!(last, (image.record.virtual_size, image.record.virtual_size));
    Ok(image)
}

/// Nothing but the store's lock is there.
fn assert_nothing_left(room: &Path) {
    let names: Vec<_> = fs::read_dir(room.join("images")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [".lock"]);
}

/// A sparse raw disk of 40 MiB with data in a few places.
fn raw(room: &Path) -> PathBuf {
    let path = room.join("source");
    let file = File::create(&path).unwrap();
    file.set_len(40 * MIB).unwrap();
    let noise: Vec<u8> = (0..200_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for at in [0, 5 * MIB + 512, 39 * MIB] {
        file.write_all_at(&noise, at).unwrap();
    }
    path
}

fn qemu_img(arguments: &[&str], from: &Path, to: &Path) {
    let status = Command::new("qemu-img").args(arguments).args([from, to]).status();
    assert!(status.expect("qemu-img (package qemu-utils)").success());
}

#[test]
fn each_format_becomes_the_same_sparse_template() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let content = fs::read(&source).unwrap();
    let image = run(&room.path().join("raw"), &source, &request(None)).unwrap();
    assert_eq!(image.record.source_format, Format::Raw);
    assert!(fs::read(image.disk()).unwrap() == content);

    let kinds: [&[&str]; 4] = [
        &["-o", "compat=0.10"],
        &["-o", "compat=1.1"],
        &["-c", "-o", "compression_type=zlib"],
        &["-c", "-o", "compression_type=zstd"],
    ];
    for (index, kind) in kinds.iter().enumerate() {
        let qcow2 = room.path().join(format!("{index}.qcow2"));
        qemu_img(&[&["convert", "-O", "qcow2"], *kind].concat(), &source, &qcow2);
        let image = run(&room.path().join(format!("state{index}")), &qcow2, &request(None)).unwrap();
        assert_eq!(image.record.source_format, Format::Qcow2, "{kind:?}");
        assert!(fs::read(image.disk()).unwrap() == content, "{kind:?}");
        let meta = fs::metadata(image.disk()).unwrap();
        assert!(meta.blocks() * 512 < 2 * MIB, "{kind:?}: zeros are holes");
        let sum = Command::new("sha256sum").arg(&qcow2).output().unwrap().stdout;
        assert!(sum.starts_with(image.record.source_sha256.as_bytes()), "{kind:?}");
    }
}

#[test]
fn a_raw_disk_that_looks_like_another_format_is_raw_when_that_is_said() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("source");
    let mut bytes = vec![0; MIB as usize];
    for magic in [b"QFI\xfb".as_slice(), b"KDMV", b"\xfd7zXZ\0"] {
        bytes[..magic.len()].copy_from_slice(magic);
        fs::write(&path, &bytes).unwrap();
        let state = room.path().join("state");
        assert!(matches!(run(&state, &path, &request(None)), Err(ImportError::Refused(_))), "{magic:?}");
        assert_nothing_left(&state);
        let image = run(&state, &path, &request(Some(Format::Raw))).unwrap();
        assert!(fs::read(image.disk()).unwrap() == bytes);
        Store::open(&state).unwrap().remove("image").unwrap();
    }
}

#[test]
fn bad_images_are_refused_with_the_reason_and_nothing_is_left() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let good = room.path().join("good.qcow2");
    qemu_img(&["convert", "-O", "qcow2"], &source, &good);
    let good = fs::read(good).unwrap();
    let patched = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let bad: [(&str, Vec<u8>); 8] = [
        ("empty", Vec::new()),
        ("a header cut short", good[..50].to_vec()),
        ("version 9", patched(4, &9_u32.to_be_bytes())),
        ("a backing file", patched(8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 4])),
        ("2^63 bytes", patched(24, &(1_u64 << 63).to_be_bytes())),
        ("L1 past the end", patched(40, &(1_u64 << 40).to_be_bytes())),
        ("an unknown feature", patched(72, &(1_u64 << 40).to_be_bytes())),
        ("marked corrupt", patched(72, &2_u64.to_be_bytes())),
    ];
    let (path, state) = (room.path().join("bad"), room.path().join("state"));
    for (what, bytes) in bad {
        fs::write(&path, bytes).unwrap();
        match run(&state, &path, &request(None)) {
            Err(ImportError::Refused(why)) => assert!(!why.is_empty(), "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        assert_nothing_left(&state);
    }
}

#[test]
fn limits_end_an_import() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let state = room.path().join("state");
    let small = Limits { virtual_bytes: 8 * MIB, ..Limits::default() };
    let bomb = Limits { data_bytes: 100_000, ..Limits::default() };
    let slow = Limits { wall_seconds: 0, ..Limits::default() };
    for limits in [small, bomb, slow] {
        let request = Request { limits, ..request(None) };
        let result = run(&state, &source, &request);
        assert!(matches!(result, Err(ImportError::Limit(_))), "{limits:?}: {result:?}");
        assert_nothing_left(&state);
    }
}

#[test]
fn a_worker_that_breaks_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let store = Store::open(room.path()).unwrap();
    let result =
        import(&store, &File::open(source).unwrap(), &request(None), Command::new("false"), &mut |_, _| {});
    assert!(matches!(result, Err(ImportError::Worker { .. })), "{result:?}");
    assert_nothing_left(room.path());
}
