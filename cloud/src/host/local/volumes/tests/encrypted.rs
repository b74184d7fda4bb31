//! Volumes that are encrypted: what is in their files, and what is refused.

use hutch_blockdev::store::Store as _;

use super::*;

const MARKER: &[u8] = b"plain for all to see";

/// In how many files below the layers a text is.
fn seen(home: &tempfile::TempDir, text: &[u8]) -> usize {
    let layers = files(&home.path().join("layers")).unwrap();
    let mut bytes = vec![0; 256 << 10];
    let mut has = |path: &&PathBuf| {
        let (file, mut at) = (File::open(path).unwrap(), 0);
        // Holes may be as large as anything.
        while let Some(data) = file.next_data(at).unwrap() {
            file.read_bytes(data, &mut bytes).unwrap();
            if bytes.windows(text.len()).any(|part| part == text) {
                return true;
            }
            at = data + (bytes.len() - text.len()) as u64;
        }
        false
    };
    layers.iter().filter(|path| has(path)).count()
}

fn content_of(volumes: &Volumes, id: &str, at: u64) -> Vec<u8> {
    let mut sector = vec![0; 512];
    disk(volumes, id).read_at(at, &mut sector).unwrap();
    sector
}

fn sector(text: &[u8]) -> Vec<u8> {
    let mut sector = text.to_vec();
    sector.resize(512, 0);
    sector
}

#[test]
fn what_is_written_to_an_encrypted_volume_is_in_no_file_whatever_becomes_of_it() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    volumes.create("vol-a", 64 * MIB, &Source::Template("micro".into()), Some(&key)).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    let write = |at: u64| machine.stack("vol-a").write_at(at, &sector(MARKER)).unwrap();
    write(5 * MIB);
    // A snapshot while it runs; what is written afterwards is not in it.
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[(&machine, vec!["vol-a".into()])]).unwrap();
    write(6 * MIB);
    machine.stack("vol-a").flush().unwrap();
    drop(machine);
    assert_eq!(content_of(&volumes, "vol-a", 6 * MIB), sector(MARKER));
    let of = Source::Snapshot("snap-a".into());
    let plain = volumes.create("vol-p", 0, &of, None).unwrap_err();
    assert!(matches!(plain, HostError::Key(_)), "{plain}");
    volumes.create("vol-b", 0, &of, Some(&key)).unwrap();
    assert_eq!(content_of(&volumes, "vol-b", 5 * MIB), sector(MARKER));
    assert_eq!(content_of(&volumes, "vol-b", 6 * MIB), vec![0; 512]);
    assert_eq!(start_of(&*disk(&volumes, "vol-b")), "template");
    // Layers become one, and chains short.
    volumes.delete_snapshot("snap-a").unwrap();
    volumes.delete("vol-b").unwrap();
    tidy(&volumes, None);
    assert_eq!(content_of(&volumes, "vol-a", 5 * MIB), sector(MARKER));
    assert_eq!(seen(&home, MARKER), 0);
    // Found again by the next daemon; gone, its key goes too.
    drop(volumes);
    let volumes = open(&home);
    assert_eq!(content_of(&volumes, "vol-a", 6 * MIB), sector(MARKER));
    volumes.delete("vol-a").unwrap();
    assert!(files(&home.path().join("keys")).unwrap().is_empty());
}

#[test]
fn a_long_chain_of_an_encrypted_volume_is_made_short_and_stays_encrypted() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    volumes.create("vol-a", 64 * MIB, &Source::Empty, Some(&key)).unwrap();
    for i in 0..42 {
        disk(&volumes, "vol-a").write_at(i * MIB, &sector(MARKER)).unwrap();
        volumes.create_snapshots(&[(&format!("snap-{i}"), "vol-a")], &[]).unwrap();
    }
    tidy(&volumes, None);
    assert!(volumes.files("vol-a").unwrap().layers.len() < 42);
    for i in 0..42 {
        assert_eq!(content_of(&volumes, "vol-a", i * MIB), sector(MARKER));
    }
    assert_eq!(seen(&home, MARKER), 0);
}

#[test]
fn a_plain_snapshot_is_encrypted_by_a_copy_and_beneath_an_encrypted_volume() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    volumes.create("vol-a", 8 * MIB, &Source::Empty, None).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &sector(MARKER)).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    let content = volumes.content(&Source::Snapshot("snap-a".into())).unwrap();
    volumes.copy_snapshot("snap-b", &content, Some(&key)).unwrap();
    volumes.create("vol-b", 0, &Source::Snapshot("snap-a".into()), Some(&key)).unwrap();
    disk(&volumes, "vol-b").write_at(2 * MIB, &sector(b"its own")).unwrap();
    assert_eq!(seen(&home, MARKER), 1, "the plain one's");
    // An encrypted copy is not copied to a plain one, and a copy of it takes no room.
    let encrypted = volumes.content(&Source::Snapshot("snap-b".into())).unwrap();
    assert!(matches!(volumes.copy_snapshot("snap-c", &encrypted, None), Err(HostError::Key(_))));
    volumes.copy_snapshot("snap-c", &encrypted, Some(&key)).unwrap();
    volumes.delete_snapshot("snap-b").unwrap();
    volumes.create("vol-c", 0, &Source::Snapshot("snap-c".into()), Some(&key)).unwrap();
    drop((content, encrypted));
    // The plain ones go: what the encrypted volume lies on is written anew with its key.
    volumes.delete("vol-a").unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    tidy(&volumes, None);
    assert_eq!(seen(&home, MARKER), 0);
    for id in ["vol-b", "vol-c"] {
        assert_eq!(content_of(&volumes, id, MIB), sector(MARKER), "{id}");
    }
    assert_eq!(content_of(&volumes, "vol-b", 2 * MIB), sector(b"its own"));
}

#[test]
fn without_its_key_a_volume_is_not_opened_and_not_changed() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    for id in ["vol-a", "vol-b"] {
        volumes.create(id, 8 * MIB, &Source::Empty, Some(&key)).unwrap();
    }
    assert!(matches!(volumes.create("vol-x", MIB, &Source::Empty, Some("none")), Err(HostError::Key(_))));
    assert!(matches!(volumes.files("vol-x"), Err(HostError::Missing(_))));
    let layer = home.path().join("layers").join(&volumes.record("vol-a").unwrap().layers[0]);
    let before = fs::read(&layer).unwrap();
    let refused = |volumes: &Volumes, text: &str| {
        let opened = volumes
            .ready("vol-a")
            .and_then(|(files, _)| open_layers(files.open()?, false).map_err(|e| disk_failed("vol-a", &e)));
        match opened {
            Err(HostError::Key(why)) => assert!(why.contains("vol-a") && why.contains(text), "{why}"),
            other => panic!("{:?}", other.err()),
        }
    };
    let keys = home.path().join("keys");
    // Another volume's key is not taken for it; without any it is not taken for plain.
    let own = fs::read(keys.join("vol-a.json")).unwrap();
    fs::copy(keys.join("vol-b.json"), keys.join("vol-a.json")).unwrap();
    refused(&volumes, "wrapped for it");
    fs::remove_file(keys.join("vol-a.json")).unwrap();
    refused(&volumes, "give its key");
    fs::write(keys.join("vol-a.json"), own).unwrap();
    volumes.ready("vol-a").unwrap();
    // What wraps it is gone.
    drop(volumes);
    fs::rename(home.path().join("wrapping/ebs.json"), home.path().join("kept-apart")).unwrap();
    refused(&open(&home), "put its file back");
    assert!(fs::read(&layer).unwrap() == before);
    fs::rename(home.path().join("kept-apart"), home.path().join("wrapping/old.json")).unwrap();
    assert_eq!(content_of(&open(&home), "vol-a", 0), vec![0; 512]);
    // A machine that was broken into cannot have it taken for plain either.
    let mut bytes = before;
    bytes[104..112].fill(0);
    fs::write(&layer, bytes).unwrap();
    refused(&open(&home), "not encrypted");
}

/// A volume that became one with a layer of another that is gone keeps its key, and what it writes from then on is encrypted.
#[test]
fn a_volume_stays_encrypted_whatever_it_becomes_one_with() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    volumes.create("vol-a", 8 * MIB, &Source::Empty, Some(&key)).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &vec![1; 2 << 20]).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    volumes.create("vol-b", 8 * MIB, &Source::Snapshot("snap-a".into()), Some(&key)).unwrap();
    put(&*disk(&volumes, "vol-b"), b"first");
    volumes.delete("vol-a").unwrap();
    volumes.delete_snapshot("snap-a").unwrap();
    volumes.settle(&["vol-b".into()]);
    tidy(&volumes, None);
    assert_eq!(volumes.record("vol-b").unwrap().layers.len(), 1);
    volumes.create_snapshots(&[("snap-b", "vol-b")], &[]).unwrap();
    let secret = b"nobody reads this";
    put(&*disk(&volumes, "vol-b"), secret);
    let volumes = open(&home);
    assert_eq!(start_of(&*disk(&volumes, "vol-b")).as_bytes(), secret);
    for path in files(&home.path().join("layers")).unwrap() {
        let bytes = fs::read(&path).unwrap();
        assert!(!bytes.windows(secret.len()).any(|part| part == secret), "{}", path.display());
    }
}

#[test]
fn what_is_imported_encrypted_is_never_plain_in_a_file() {
    let home = home();
    let volumes = open(&home);
    let key = volumes.wrapping_keys().remove(0);
    // Its size is told before it, as of most disks, or behind it, as of a compressed one; or somebody pulls the plug.
    for (id, first, cut) in [("snap-a", true, false), ("snap-b", false, false), ("snap-c", true, true)] {
        let made = volumes.import_snapshot(id, Some(&key), |to| {
            let sink = to.sink.as_mut().unwrap();
            let failed = |e: std::io::Error| HostError::Failed(e.to_string());
            if first {
                sink.size(8 * MIB).map_err(failed)?;
            }
            sink.write(5 * MIB, &sector(MARKER)).map_err(failed)?;
            assert_eq!(seen(&home, MARKER), 0, "not while it is written, either");
            if cut {
                return Err(HostError::Busy("it was to stop".into()));
            }
            if !first {
                sink.size(8 * MIB).map_err(failed)?;
            }
            Ok(8 * MIB)
        });
        if cut {
            assert!(matches!(made, Err(HostError::Busy(_))));
            assert!(matches!(volumes.read(&Source::Snapshot(id.into())), Err(HostError::Missing(_))));
            continue;
        }
        assert_eq!(made.unwrap(), 8 * MIB);
        let again = volumes.import_snapshot(id, Some(&key), |_| panic!("it is there"));
        assert_eq!(again.unwrap(), 8 * MIB);
        let of = Source::Snapshot(id.into());
        let mut bytes = vec![1; 512];
        let reader = volumes.read(&of).unwrap();
        reader.disk.read_at(5 * MIB, &mut bytes).unwrap();
        assert_eq!((bytes, reader.disk.size()), (sector(MARKER), 8 * MIB));
        assert!(matches!(volumes.create("vol-p", 0, &of, None), Err(HostError::Key(_))));
        let volume = format!("vol-{id}");
        volumes.create(&volume, 16 * MIB, &of, Some(&key)).unwrap();
        assert_eq!(content_of(&volumes, &volume, 5 * MIB), sector(MARKER));
        volumes.delete(&volume).unwrap();
    }
    assert_eq!(seen(&home, MARKER), 0);
    // A daemon that was killed left a file and a key; the next one tidies.
    let left = home.path().join("layers/snap-d.1.qcow2.new");
    fs::write(&left, MARKER).unwrap();
    volumes.new_key("snap-d", Some(&key)).unwrap();
    drop(volumes);
    let volumes = open(&home);
    assert!(!left.exists() && !home.path().join("keys/snap-d.json").exists());
    for id in ["snap-a", "snap-b"] {
        volumes.delete_snapshot(id).unwrap();
    }
    assert!(files(&home.path().join("keys")).unwrap().is_empty());
}
