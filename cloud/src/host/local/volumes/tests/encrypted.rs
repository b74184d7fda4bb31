//! Volumes that are encrypted: what is in their files, and what is refused.

use super::*;

const MARKER: &[u8] = b"plain for all to see";

/// In how many files below the layers a text is.
fn seen(home: &tempfile::TempDir, text: &[u8]) -> usize {
    let layers = files(&home.path().join("layers")).unwrap();
    let has = |path: &PathBuf| fs::read(path).unwrap().windows(text.len()).any(|part| part == text);
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
    let layer = home.path().join("layers/vol-a.1.qcow2");
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
