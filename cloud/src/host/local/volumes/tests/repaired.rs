//! Volumes that are damaged and repaired, alone and on what others have too.

use super::*;

/// Damages the entry of the guest's first megabyte in a layer: it leads out of the file.
fn damage(home: &tempfile::TempDir, layer: &str) {
    let file = File::options().read(true).write(true).open(home.path().join("layers").join(layer)).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(1_u64 << 63 | 1 << 40).to_be_bytes(), table + 16 * 8).unwrap();
}

fn layers(volumes: &Volumes, id: &str) -> Vec<String> {
    volumes.record(id).unwrap().layers
}

fn marks(volumes: &Volumes, id: &str) -> (u8, u8) {
    let mut bytes = vec![0; 2 << 20];
    disk(volumes, id).read_at(0, &mut bytes).unwrap();
    (bytes[MIB as usize], bytes[MIB as usize + 65536])
}

#[test]
fn the_top_layer_is_repaired_and_what_others_have_is_only_told() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Template("micro".into()), None).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &[1; 131072]).unwrap();
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &[2; 131072]).unwrap();
    let names = layers(&volumes, "vol-a");
    let whole = volumes.repair("vol-a", false).unwrap();
    assert!(whole.iter().all(|layer| layer.repaired.as_ref().is_none_or(|r| r.done && r.found.wrong == 0)));
    assert_eq!(whole[1].users, ["snap-a"]);
    assert!(whole[2].repaired.is_none(), "the template has no tables");

    damage(&home, &names[0]);
    let refused = volumes
        .files("vol-a")
        .unwrap()
        .open()
        .and_then(|layers| open_layers(layers, false).map(drop).map_err(|e| disk_failed("vol-a", &e)));
    assert!(refused.unwrap_err().to_string().contains("hutch volume repair"));
    let before = fs::read(home.path().join("layers").join(&names[0])).unwrap();
    let told = volumes.repair("vol-a", false).unwrap();
    let top = told[0].repaired.as_ref().unwrap();
    let lost = MIB..MIB + 65536;
    assert!(!top.done && top.found.lost == std::slice::from_ref(&lost), "{top:?}");
    assert!(fs::read(home.path().join("layers").join(&names[0])).unwrap() == before);
    assert!(volumes.repair("vol-a", true).unwrap()[0].repaired.as_ref().unwrap().done);
    assert_eq!(marks(&volumes, "vol-a"), (0, 2), "zeros, and not what lies beneath");

    // What a snapshot has is left as it is, though it is the volume's as well.
    damage(&home, &names[1]);
    let told = volumes.repair("vol-a", true).unwrap();
    let sealed = told[1].repaired.as_ref().unwrap();
    assert!(!sealed.done && sealed.found.wrong > 0 && told[1].users == ["snap-a"]);
    assert!(
        !volumes.repair("vol-a", true).unwrap()[1].repaired.as_ref().unwrap().done,
        "it is never written"
    );
    volumes.delete_snapshot("snap-a").unwrap();
    assert!(volumes.repair("vol-a", true).unwrap()[1].repaired.as_ref().unwrap().done, "nobody else has it");
    assert_eq!(marks(&volumes, "vol-a"), (0, 2));
    // A backup has another name of each layer, as another region has.
    let (own, pinned) = (home.path().join("layers").join(&names[0]), home.path().join("pinned"));
    fs::hard_link(&own, &pinned).unwrap();
    let told = volumes.repair("vol-a", true).unwrap();
    assert!(told[0].users.concat().contains("a backup") && told[0].users.concat().contains("region"));
    fs::remove_file(pinned).unwrap();
    tidy(&volumes, None);
    assert_eq!((layers(&volumes, "vol-a").len(), marks(&volumes, "vol-a")), (2, (0, 2)));
}

#[test]
fn a_volume_whose_snapshot_failed_for_the_damage_is_repaired_and_goes_on() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Empty, None).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &[1; 131072]).unwrap();
    damage(&home, &layers(&volumes, "vol-a")[0]);
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap_err();
    drop(volumes);
    let volumes = open(&home);
    assert!(volumes.repair("vol-a", true).unwrap().iter().all(|layer| layer.repaired.as_ref().unwrap().done));
    volumes.create_snapshots(&[("snap-a", "vol-a")], &[]).unwrap();
    assert_eq!(marks(&volumes, "vol-a"), (0, 1));
}

/// The header's size decides what is looked at and what is behind the disk's end.
#[test]
fn a_layer_of_another_size_than_the_volumes_is_told_and_left_alone() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Empty, None).unwrap();
    disk(&volumes, "vol-a").write_at(MIB, &[1; 131072]).unwrap();
    let top = home.path().join("layers").join(&layers(&volumes, "vol-a")[0]);
    let file = File::options().read(true).write(true).open(&top).unwrap();
    for size in [MIB, 65 * MIB] {
        file.write_all_at(&size.to_be_bytes(), 24).unwrap();
        let before = fs::read(&top).unwrap();
        let told = volumes.repair("vol-a", true).unwrap();
        let found = told[0].repaired.as_ref().unwrap();
        assert!(!found.done && found.found.faults.concat().contains("its record"), "{found:?}");
        assert!(fs::read(&top).unwrap() == before);
    }
    file.write_all_at(&(64 * MIB).to_be_bytes(), 24).unwrap();
    assert!(volumes.repair("vol-a", false).unwrap()[0].repaired.as_ref().unwrap().done);
    // A growth that was cut short: the record is written first.
    let record = volumes.record("vol-a").unwrap();
    volumes.put("vol-a", &Record { size: 65 * MIB, growing: Some(record.size), ..record }).unwrap();
    assert!(volumes.repair("vol-a", false).unwrap()[0].repaired.as_ref().unwrap().done);
    assert_eq!(marks(&volumes, "vol-a"), (1, 1));
}

#[test]
fn a_volume_that_a_machine_has_is_not_repaired() {
    let home = home();
    let volumes = open(&home);
    volumes.create("vol-a", 64 * MIB, &Source::Empty, None).unwrap();
    let machine = Fake::start(&volumes, &["vol-a"]);
    assert!(matches!(volumes.repair("vol-a", true), Err(HostError::Busy(_))));
    drop(machine);
    volumes.repair("vol-a", true).unwrap();
    assert!(matches!(volumes.repair("vol-b", true), Err(HostError::Missing(_))));
    // Without a header nothing can be done, and nothing is.
    let top = home.path().join("layers").join(&layers(&volumes, "vol-a")[0]);
    File::options().write(true).open(&top).unwrap().write_all_at(b"none", 0).unwrap();
    let told = volumes.repair("vol-a", true).unwrap();
    assert!(!told[0].repaired.as_ref().unwrap().done && told[0].repaired.as_ref().unwrap().found.wrong == 1);
}
