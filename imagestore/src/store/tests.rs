use std::os::unix::fs::FileExt;

use super::*;

fn origin() -> Origin {
    Origin { format: Format::Qcow2, sha256: "0".repeat(64), architecture: Architecture::X86_64 }
}

fn add(store: &Store, name: &str) -> Image {
    let pending = store.begin(Kind::Machine, name).unwrap();
    pending.disk().set_len(1 << 20).unwrap();
    pending.disk().write_all_at(name.as_bytes(), 512).unwrap();
    pending.commit(origin()).unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_template_is_kept_whole_and_nobody_can_write_it() {
    let room = tempfile::tempdir().unwrap();
    let image = add(&Store::open(room.path()).unwrap(), "debian");
    assert_eq!(Kind::of_id(&image.record.id), Some(Kind::Machine), "{}", image.record.id);
    assert_eq!(image.record.virtual_size, 1 << 20);
    assert_eq!((mode(&image.disk()), mode(&image.directory)), (0o444, 0o555));
    assert_eq!(mode(&image.directory.join(RECORD)), 0o444);

    let store = Store::open(room.path()).unwrap();
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&image));
    assert_eq!(&fs::read(store.get("debian").unwrap().disk()).unwrap()[512..518], b"debian");
}

#[test]
fn images_go_by_id_by_name_and_by_the_only_prefix() {
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let first = add(&store, "one");
    assert_eq!(store.get(&first.record.id[..6]).unwrap(), first);
    assert!(matches!(store.get("ami-"), Err(StoreError::NotFound(_))));
    assert!(matches!(store.get("on"), Err(StoreError::NotFound(_))), "names are not abbreviated");

    // 17 images and 16 digits: two begin alike.
    let ids: Vec<_> = (0..16).map(|n| add(&store, &format!("image {n}")).record.id).collect();
    let alike = |id: &&String| ids.iter().chain([&first.record.id]).filter(|o| o[..5] == id[..5]).count() > 1;
    let id = ids.iter().chain([&first.record.id]).find(alike).unwrap();
    match store.get(&id[..5]) {
        Err(StoreError::Ambiguous { ids, .. }) => assert!(ids.len() > 1 && ids.contains(id)),
        other => panic!("{other:?}"),
    }
    assert_eq!(store.get(id).unwrap().record.id, *id);
}

#[test]
fn names_are_checked_and_unique() {
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let racing = store.begin(Kind::Machine, "debian").unwrap();
    let image = add(&store, "debian");
    match (store.begin(Kind::Machine, "debian"), racing.commit(origin())) {
        (Err(StoreError::NameTaken { id, .. }), Err(StoreError::NameTaken { .. })) => {
            assert_eq!(id, image.record.id);
        }
        other => panic!("{other:?}"),
    }
    for name in ["", "ab", "ami-debian", "a/../\0b", "zeile\n2", &"x".repeat(129)] {
        assert!(matches!(store.begin(Kind::Machine, name), Err(StoreError::BadName(_))), "{name:?}");
    }
    assert_eq!(store.names().unwrap().len(), 2, "the lock and one image");
}

#[test]
fn removed_is_gone_though_who_has_it_open_reads_on() {
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let image = add(&store, "debian");
    let open = File::open(image.disk()).unwrap();
    assert_eq!(store.remove("debian").unwrap(), image.record);
    assert!(matches!(store.remove("debian"), Err(StoreError::NotFound(_))));
    assert_eq!(store.names().unwrap(), [".lock"]);
    let mut word = [0; 6];
    open.read_exact_at(&mut word, 512).unwrap();
    assert_eq!(&word, b"debian");
}

#[test]
fn the_next_start_takes_away_what_a_crash_left_and_nothing_that_is_alive() {
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let image = add(&store, "debian");
    let alive = store.begin(Kind::Machine, "alive").unwrap();
    let mut dead = store.begin(Kind::Machine, "dead").unwrap();
    dead.committed = true; // As a killed process: nothing is deleted, and the lock goes with the file.
    drop(dead);
    let gone = store.root.join(format!("{GONE}{}", new_id(Kind::Machine)));
    fs::create_dir(&gone).unwrap();
    fs::write(gone.join(Kind::Machine.file()), b"half").unwrap();
    fs::set_permissions(&gone, Permissions::from_mode(0o555)).unwrap();
    fs::create_dir(store.root.join(format!("{NEW}{}", new_id(Kind::Machine)))).unwrap();
    assert_eq!(store.names().unwrap().len(), 6);

    let store = Store::open(room.path()).unwrap();
    let mut names = store.names().unwrap();
    names.sort();
    assert_eq!(names, [".lock", &format!("{NEW}{}", alive.id), &image.record.id]);
    alive.commit(origin()).unwrap();
    assert_eq!(store.list().unwrap().len(), 2);
}

#[test]
fn a_broken_record_is_named() {
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let directory = store.root.join(new_id(Kind::Machine));
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join(RECORD), b"{}").unwrap();
    match store.list() {
        Err(StoreError::BadRecord { path, .. }) => assert_eq!(path, directory.join(RECORD)),
        other => panic!("{other:?}"),
    }
}
