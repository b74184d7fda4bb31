//! Snapshots written to files, and checked, as QEMU sees them.

use std::process::Command;

use super::*;
use crate::archive;
use crate::backup::Progress;
use crate::export;
use hutch_blockdev::Format;

fn qemu_img(words: &[&str], files: &[&Path]) -> String {
    let done =
        Command::new("qemu-img").args(words).args(files).output().expect("qemu-img (package qemu-utils)");
    assert!(done.status.success(), "{words:?}: {done:?}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// A volume of the template with two layers of its own; the snapshot of both.
fn layered(volumes: &Volumes, key: Option<&str>) -> Source {
    volumes.create("vol-a", 64 * MIB, &Source::Template("micro".into()), key).unwrap();
    for (at, byte, snapshot) in [(8 * MIB, 1, "snap-a"), (40 * MIB, 2, "snap-b")] {
        let disk = disk(volumes, "vol-a");
        disk.write_at(at, &[byte; 100 << 10]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        volumes.create_snapshots(&[(snapshot, "vol-a")], &[]).unwrap();
    }
    Source::Snapshot("snap-b".into())
}

#[test]
fn what_is_exported_is_what_the_guest_wrote() {
    for encrypted in [false, true] {
        let home = home();
        let volumes = open(&home);
        let key = encrypted.then(|| volumes.wrapping_keys().remove(0));
        let reader = volumes.read(&layered(&volumes, key.as_deref())).unwrap();
        // It is deleted while it is read.
        volumes.delete_snapshot("snap-b").unwrap();
        volumes.delete_snapshot("snap-a").unwrap();
        volumes.delete("vol-a").unwrap();
        let (raw, qcow2) = (home.path().join("a.raw"), home.path().join("a.qcow2"));
        for (format, to) in [(Format::Raw, &raw), (Format::Qcow2, &qcow2)] {
            let made = export::export(&reader, format, to, None, &Progress::default()).unwrap();
            assert_eq!(made.size, 64 * MIB);
            assert!(fs::metadata(to).unwrap().blocks() * 512 < 3 * MIB, "zeros are holes");
            let sum = format!("{}.sha256", to.display());
            let mut sums = Command::new("sha256sum");
            sums.current_dir(home.path()).args(["--quiet", "-c", &sum]);
            assert!(sums.output().unwrap().status.success());
        }
        let bytes = fs::read(&raw).unwrap();
        assert!(bytes.starts_with(b"template"));
        for (at, byte) in [(8 * MIB, 1), (40 * MIB, 2)] {
            let part = &bytes[at as usize..][..100 << 10];
            assert!(part.iter().all(|have| *have == byte) && bytes[at as usize + (100 << 10)] == 0);
        }
        qemu_img(&["check", "-q", "-f", "qcow2"], &[&qcow2]);
        qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[&raw, &qcow2]);
    }
}

#[test]
fn a_check_reads_everything_and_names_what_is_damaged() {
    let home = home();
    let volumes = open(&home);
    let source = layered(&volumes, None);
    let check = || export::check(&volumes.read(&source).unwrap(), &Progress::default()).unwrap();
    let (layers, data) = check();
    assert_eq!(layers.len(), 3, "two of its own, and the template");
    assert!(layers.iter().all(|layer| layer.found.as_ref().is_none_or(|f| f.wrong == 0 && f.leaked == 0)));
    let clusters: Vec<_> = layers.iter().map(|layer| layer.found.as_ref().map(|found| found.data)).collect();
    assert_eq!(clusters, [Some(2), Some(2), None]);
    assert_eq!(data, (4 + 1) << 16);
    // One that is counted twice.
    let path = home.path().join("layers").join(&layers[1].name);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let last = fs::metadata(&path).unwrap().len() / (64 << 10) - 1;
    file.write_all_at(&7_u16.to_be_bytes(), be64(be64(48)) + 2 * last).unwrap();
    let (layers, data) = check();
    let found = layers[1].found.as_ref().unwrap();
    assert!(found.wrong == 1 && found.faults[0].contains("counted 7 times"), "{found:?}");
    assert_eq!(data, 0, "what it says is not read");
}

#[test]
fn what_comes_back_of_an_archive_is_what_the_guest_wrote_and_a_root_of_it_is_its_own() {
    const SECRET: &[u8] = b"what the last one wrote on its root";
    let home = home();
    let volumes = open(&home);
    let reader = volumes.read(&layered(&volumes, None)).unwrap();
    let mut bytes = Vec::new();
    archive::write(&mut bytes, &"said", &[&*reader.disk], &mut |_| true).unwrap();
    assert!((bytes.len() as u64) < 3 * MIB, "zeros are left out");
    let import = |id: &str, bytes: &[u8]| {
        volumes.import_snapshot(id, None, |to| {
            let (mut archive, _) = archive::Archive::open::<String>(bytes).unwrap();
            archive.disk(Some(to.disk), &mut |_| true).map_err(|e| HostError::Failed(e.to_string()))
        })
    };
    // One that is not whole leaves nothing.
    let before = names(&home, "layers");
    let broken = [&bytes[..bytes.len() - 1], &[bytes[bytes.len() - 1] ^ 1]].concat();
    assert!(matches!(import("snap-c", &broken), Err(HostError::Failed(_))));
    assert_eq!(names(&home, "layers"), before);
    assert_eq!(import("snap-c", &bytes).unwrap(), 64 * MIB);
    let from = Source::Snapshot("snap-c".into());
    let content = |source: &Source, name: &str| {
        let to = home.path().join(name);
        export::export(&volumes.read(source).unwrap(), Format::Raw, &to, None, &Progress::default())
            .unwrap()
            .sha256
    };
    assert_eq!(content(&from, "a"), content(&Source::Snapshot("snap-b".into()), "b"));
    let found = || {
        let files =
            names(&home, "layers").into_iter().map(|name| fs::read(home.path().join("layers").join(name)));
        files.filter(|bytes| bytes.as_ref().unwrap().windows(SECRET.len()).any(|part| part == SECRET)).count()
    };
    let layers = names(&home, "layers");
    for id in ["eph-0123456789abcdef0", "eph-0123456789abcdef1"] {
        volumes.create(id, 64 * MIB, &from, None).unwrap();
        let root = disk(&volumes, id);
        let mut sector = [0; 512];
        root.read_at(0, &mut sector).unwrap();
        assert!(sector.starts_with(b"template"));
        let mut block = [0; 4096];
        block[..SECRET.len()].copy_from_slice(SECRET);
        root.write_at(MIB, &block).unwrap();
        root.flush().unwrap();
        drop(root);
        assert_eq!(found(), 1);
        volumes.delete(id).unwrap();
        assert_eq!((found(), names(&home, "layers")), (0, layers.clone()));
    }
}
