use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use crate::keyring::{Keyring, Wrapped};
use hutch_imagestore::store::{Architecture, Format, Kind, Origin, Store as Images};

use super::target::copy;
use super::*;
use crate::addresses::Pool;
use crate::host::local::{Local, Means, MetadataService, Served};
use crate::host::{Content, End, Host, Simulated, Source};
use crate::limits::Limits;
use crate::metadata::Metadata;
use crate::region::Settings;
use crate::store::{Sqlite, Store};
use crate::types::Table;

const MIB: u64 = 1 << 20;

/// Answers no guest.
struct Silent;

impl MetadataService for Silent {
    fn serve(&self, _: TcpListener, _: &Metadata) -> io::Result<Box<dyn Served>> {
        Err(io::Error::other("no guest runs here"))
    }
}

type Regions = BTreeMap<String, Arc<Region>>;

fn region(dir: &Path, host: Arc<dyn Host>) -> Regions {
    region_called("home-1", dir, host)
}

fn region_called(name: &str, dir: &Path, host: Arc<dyn Host>) -> Regions {
    let settings = Settings {
        name: name.into(),
        zones: vec!['a'],
        types: Table::built_in(),
        limits: Limits::default(),
        addresses: Pool::default(),
        owner: "000000000001".into(),
        resume: false,
        import_dir: None,
    };
    let store: Arc<dyn Store> = Arc::new(Sqlite::open(&dir.join(name).join("store.db")).unwrap());
    let region = Region::new(settings, store, host);
    region.adopt_templates().unwrap();
    [(name.to_owned(), Arc::new(region))].into()
}

fn local(state: &Path) -> Arc<Local> {
    local_of("home-1", state)
}

fn local_of(name: &str, state: &Path) -> Arc<Local> {
    let dir = state.join(name).join("host");
    fs::create_dir_all(&dir).unwrap();
    let networks = state.join("networks");
    let means = Means {
        vmm: "/nonexistent/hutch-vmm".into(),
        importer: "/nonexistent/importer".into(),
        networks,
        region: name.into(),
        together: Default::default(),
        metadata: Box::new(Silent),
    };
    let keyring = Keyring::open(&state.join("keys")).unwrap();
    Arc::new(Local::open(&dir, Images::open(state).unwrap(), keyring, means).unwrap())
}

fn simulated(state: &Path) -> Arc<Simulated> {
    fs::create_dir_all(state.join("home-1/host")).unwrap();
    Arc::new(Simulated::open(state.join("home-1/host"), Duration::ZERO).unwrap())
}

/// A state on a simulated host that keeps two volumes.
fn small(home: &Path) -> (PathBuf, Regions) {
    let state = home.join("state");
    let host = simulated(&state);
    host.create_volume("vol-a", 1 << 30, &Source::Empty, None).unwrap();
    host.create_volume("vol-b", 1 << 30, &Source::Empty, None).unwrap();
    fs::write(state.join("keys.json"), "[]").unwrap();
    fs::set_permissions(state.join("keys.json"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(state.join("limits.toml"), "instances = 5").unwrap();
    fs::write(state.join("lock"), "").unwrap();
    let regions = region(&state, host);
    (state, regions)
}

fn make_small(home: &Path) -> PathBuf {
    let (state, regions) = small(home);
    let to = home.join("backup");
    run(&regions, &state, &to, &Progress::default()).unwrap();
    to
}

fn write_to(host: &Path, id: &str, at: u64, text: &[u8]) {
    let record = fs::read(host.join(format!("volumes/{id}.json"))).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let open = |(depth, name): (usize, &serde_json::Value)| {
        let name = name.as_str().unwrap();
        let format = match name.ends_with(".raw") {
            true => hutch_blockdev::Format::Raw,
            false => hutch_blockdev::Format::Qcow2,
        };
        let path = host.join("layers").join(name);
        (File::options().read(true).write(depth == 0).open(path).unwrap(), format)
    };
    let layers = record["layers"].as_array().unwrap().iter().enumerate().map(open).collect();
    let disk = hutch_blockdev::open_layers(layers, false).unwrap();
    let mut sector = vec![0; 512];
    sector[..text.len()].copy_from_slice(text);
    disk.write_at(at, &sector).unwrap();
    disk.flush().unwrap();
}

/// What a volume begins with, by way of a snapshot.
fn content(host: &Local, id: &str, at: u64) -> Vec<u8> {
    let snapshot = format!("snap-of-{id}");
    host.create_snapshots(&[(&snapshot, id)]).unwrap();
    let Content::Layers { layers, .. } = host.content(&Source::Snapshot(snapshot.clone())).unwrap() else {
        panic!("a snapshot of this machine has layers");
    };
    let layers = layers.iter().map(|layer| (File::open(&layer.path).unwrap(), layer.format)).collect();
    let disk = hutch_blockdev::open_layers(layers, true).unwrap();
    let mut sector = vec![0; 512];
    disk.read_at(at, &mut sector).unwrap();
    host.delete_snapshot(&snapshot).unwrap();
    sector[..8].to_vec()
}

#[test]
fn this_machines_disks_are_there_again() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    let pending = Images::open(&state).unwrap().begin(Kind::Machine, "micro").unwrap();
    pending.disk().set_len(64 * MIB).unwrap();
    pending.disk().write_all_at(b"template", MIB).unwrap();
    let origin = Origin { format: Format::Raw, sha256: "0".repeat(64), architecture: Architecture::X86_64 };
    let template = pending.commit(origin).unwrap();
    // A machine that has run; its process' number may be anybody's where it is restored.
    let machines = state.join("home-1/host/machines/i-a");
    fs::create_dir_all(&machines).unwrap();
    let machine = serde_json::json!({
        "machine": { "id": "i-a", "run": 3, "uuid": "ec2", "vcpus": 1, "memory_mib": 512, "volumes": ["vol-a"],
            "interfaces": [], "metadata": Metadata::default() },
        "process": { "pid": std::process::id(), "started": 1, "boot": "another" },
        "phase": "running", "restart": true, "end": "power-off",
    });
    fs::write(machines.join("machine.json"), machine.to_string()).unwrap();
    fs::write(machines.join("console.log"), "login: ").unwrap();
    // What a backup pinned that was killed.
    fs::create_dir_all(state.join("home-1/host/pinned/volumes")).unwrap();
    let host = local(&state);
    assert!(!state.join("home-1/host/pinned").exists());
    // A region beside it, with the same templates.
    let beside = local_of("home-2", &state);
    let mut regions = region(&state, host.clone());
    regions.extend(region_called("home-2", &state, beside.clone()));
    beside.create_volume("vol-c", 64 * MIB, &Source::Template("micro".into()), None).unwrap();
    write_to(&state.join("home-2/host"), "vol-c", 0, b"beside");
    let dir = state.join("home-1/host");
    host.create_volume("vol-a", 64 * MIB, &Source::Template("micro".into()), None).unwrap();
    write_to(&dir, "vol-a", 0, b"written");
    host.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    host.create_volume("vol-b", 64 * MIB, &Source::Snapshot("snap-a".into()), None).unwrap();
    write_to(&dir, "vol-b", 2 * MIB, b"later");

    let progress = Progress::default();
    let to = home.path().join("backup");
    let manifest = run(&regions, &state, &to, &progress).unwrap();
    assert!(!state.join("home-1/host/pinned").exists(), "nothing is pinned any more");
    let (done, total) = progress.figures();
    assert!(done > 0 && done <= total);
    let raw = |name: String| manifest.files[&name].clone();
    let disk = format!("images/{}/disk.raw", template.record.id);
    assert_eq!((raw(disk.clone()).size, raw(disk.clone()).fixed), (64 * MIB, true));
    assert_eq!(
        raw(format!("home-1/host/layers/{}.raw", template.record.id)).link,
        Some(disk.clone()),
        "its bytes are there once"
    );
    let taken = fs::metadata(to.join("state").join(&disk)).unwrap();
    assert!(allocated(&taken) < MIB, "holes stay holes: {} bytes", allocated(&taken));
    assert_eq!(taken.mode() & 0o777, 0o444);

    let again = home.path().join("new/state");
    assert_eq!(restore(&to, &again, &Progress::default()).unwrap(), manifest);
    drop(regions);
    let host = local(&again);
    assert_eq!(host.templates().unwrap().len(), 1);
    assert_eq!(content(&host, "vol-a", 0), b"written\0");
    assert_eq!(content(&host, "vol-a", MIB), b"template");
    assert_eq!(content(&host, "vol-b", 0), b"written\0");
    assert_eq!(content(&host, "vol-b", 2 * MIB), b"later\0\0\0");
    let beside = local_of("home-2", &again);
    assert_eq!(content(&beside, "vol-c", 0), b"beside\0\0");
    assert_eq!(content(&beside, "vol-c", MIB), b"template");
    let kept = host.machine("i-a").unwrap().unwrap();
    assert_eq!((kept.run, kept.end), (3, Some(End::PowerOff)));
    assert_eq!(host.console("i-a").unwrap(), b"login: ");
    let text = fs::read_to_string(again.join("home-1/host/machines/i-a/machine.json")).unwrap();
    assert!(text.contains("\"process\":null") && text.contains("\"restart\":false"), "{text}");
    let images = again.join("images").join(&template.record.id);
    assert_eq!(fs::metadata(&images).unwrap().mode() & 0o777, 0o555);
    // What is written to the one is not in the other.
    write_to(&again.join("home-1/host"), "vol-a", 0, b"changed");
    check(&to, &Progress::default()).unwrap();
}

#[test]
fn a_volume_that_goes_meanwhile_is_in_it() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    let host = local(&state);
    host.create_volume("vol-a", MIB, &Source::Empty, None).unwrap();
    let captured = host.capture().unwrap();
    host.delete_volume("vol-a").unwrap();
    host.create_volume("vol-b", MIB, &Source::Empty, None).unwrap();
    let progress = Progress::default();
    let mut target = Target::new(home.path().join("to"), &progress).unwrap();
    captured.copy(&mut target, "host").unwrap();
    let (files, _) = target.seal().unwrap();
    let names: Vec<_> = files.keys().map(String::as_str).collect();
    assert_eq!((names.len(), names[1]), (2, "host/volumes/vol-a.json"));
    assert!(names[0].starts_with("host/layers/vol-a."), "{names:?}");
}

#[test]
fn a_volume_that_somebody_has_is_waited_for() {
    let home = tempfile::tempdir().unwrap();
    let host = local(&home.path().join("state"));
    host.create_volume("vol-a", MIB, &Source::Empty, None).unwrap();
    let layers = fs::read_dir(home.path().join("state/home-1/host/layers")).unwrap();
    let top = layers.map(|entry| entry.unwrap().path()).next().unwrap();
    let file = File::options().read(true).write(true).open(&top).unwrap();
    hutch_blockdev::store::lock(&file, false).unwrap();
    let begun = Instant::now();
    let free = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(700));
        drop(file);
    });
    host.create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(600), "it was copied while it was written");
    free.join().unwrap();
}

#[test]
fn a_machine_that_ran_has_gone_down_with_its_host() {
    let home = tempfile::tempdir().unwrap();
    let (state, regions) = small(home.path());
    let record = |state: &Path| fs::read_to_string(state.join("home-1/host/machines/i-a"));
    let machine =
        serde_json::from_value(serde_json::json!({ "id": "i-a", "run": 1, "uuid": "ec2", "vcpus": 1,
        "memory_mib": 512, "volumes": ["vol-a"], "interfaces": [], "metadata": Metadata::default() }));
    regions["home-1"].host().start(&machine.unwrap()).unwrap();
    let to = home.path().join("backup");
    let manifest = run(&regions, &state, &to, &Progress::default()).unwrap();
    assert!(record(&state).unwrap().contains("\"end\":null"), "it runs on");
    assert!(record(&to.join("state")).unwrap().contains("host-down"));
    assert!(!manifest.files.contains_key("lock"), "only what is to be kept");
    assert_eq!(manifest.files["keys.json"].mode, 0o600);
    let again = home.path().join("again");
    fs::create_dir(&again).unwrap();
    restore(&to, &again, &Progress::default()).unwrap();
    let host = simulated(&again);
    assert_eq!(host.machine("i-a").unwrap().unwrap().end, Some(End::HostDown));
    assert_eq!(host.volumes(), ["vol-a", "vol-b"]);
    assert_eq!(fs::read_to_string(again.join("limits.toml")).unwrap(), "instances = 5");
    assert_eq!(fs::metadata(again.join("keys.json")).unwrap().mode() & 0o777, 0o600);
    region(&again, host);
}

#[test]
fn a_backup_goes_to_a_place_of_its_own() {
    let home = tempfile::tempdir().unwrap();
    let (state, regions) = small(home.path());
    let make = |to: &Path| run(&regions, &state, to, &Progress::default());
    let inside = make(&state.join("backup"));
    assert!(matches!(inside, Err(BackupError::Inside(_))), "{inside:?}");
    assert!(!state.join("backup").exists());
    let full = home.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    assert!(matches!(make(&full), Err(BackupError::NotEmpty(_))));
    assert!(full.join("mine").exists());

    let stopped = Progress::default();
    stopped.stop();
    let to = home.path().join("stopped");
    let made = run(&regions, &state, &to, &stopped);
    assert!(matches!(made, Err(BackupError::Stopped)), "{made:?}");
    assert!(!to.exists(), "nothing is left of it");
    make(&to).unwrap();
}

#[test]
fn what_is_not_whole_is_not_restored() {
    let home = tempfile::tempdir().unwrap();
    let to = make_small(home.path());
    let state = home.path().join("new");
    let tried = || restore(&to, &state, &Progress::default()).unwrap_err();
    let manifest_path = to.join(MANIFEST);
    let manifest = fs::read_to_string(&manifest_path).unwrap();

    let file = to.join("state/home-1/host/volumes/vol-a");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, [&bytes[..bytes.len() - 1], b"x"].concat()).unwrap();
    assert!(tried().to_string().contains("home-1/host/volumes/vol-a has other bytes"), "{}", tried());
    fs::write(&file, &bytes[1..]).unwrap();
    assert!(tried().to_string().contains("bytes, not"), "{}", tried());
    fs::remove_file(&file).unwrap();
    fs::remove_file(to.join("state/keys.json")).unwrap();
    let said = tried().to_string();
    assert!(said.contains("vol-a is missing") && said.contains("keys.json is missing"), "{said}");
    fs::create_dir(&file).unwrap();
    assert!(tried().to_string().contains("vol-a is no file"), "{}", tried());
    fs::remove_dir(&file).unwrap();
    fs::write(&file, &bytes).unwrap();
    fs::write(to.join("state/keys.json"), "[]").unwrap();

    for (from, into) in [("\"format\": 1", "\"format\": 2"), ("\"store\": 1", "\"store\": 99")] {
        assert!(manifest.contains(from), "{manifest}");
        fs::write(&manifest_path, manifest.replace(from, into)).unwrap();
        assert!(matches!(tried(), BackupError::Newer { .. }), "{}", tried());
    }
    for name in ["../keys.json", "/etc/passwd", ""] {
        fs::write(&manifest_path, manifest.replace("\"keys.json\"", &format!("{name:?}"))).unwrap();
        assert!(matches!(tried(), BackupError::BadName { .. }), "{}", tried());
    }
    fs::write(&manifest_path, &manifest[..manifest.len() / 2]).unwrap();
    assert!(matches!(tried(), BackupError::BadManifest { .. }), "{}", tried());
    fs::remove_file(&manifest_path).unwrap();
    assert!(matches!(tried(), BackupError::NoManifest(_)), "{}", tried());
    assert!(!state.exists(), "nothing was touched");
    fs::write(&manifest_path, &manifest).unwrap();
    restore(&to, &state, &Progress::default()).unwrap();
    assert!(matches!(tried(), BackupError::NotEmpty(_)));
}

#[test]
fn a_restore_that_was_cut_off_is_done_anew() {
    let home = tempfile::tempdir().unwrap();
    let to = make_small(home.path());
    let state = home.path().join("new");
    let left = home.path().join(".new.restore");
    fs::create_dir_all(left.join("images/ami-1")).unwrap();
    fs::write(left.join("images/ami-1/half"), "half").unwrap();
    fs::set_permissions(left.join("images/ami-1"), fs::Permissions::from_mode(0o555)).unwrap();
    let alive = File::open(&left).unwrap();
    alive.try_lock().unwrap();
    let busy = restore(&to, &state, &Progress::default());
    assert!(matches!(busy, Err(BackupError::Busy(_))), "{busy:?}");
    drop(alive);
    let stopped = Progress::default();
    stopped.stop();
    assert!(matches!(restore(&to, &state, &stopped), Err(BackupError::Stopped)));
    restore(&to, &state, &Progress::default()).unwrap();
    assert!(!state.join("images").exists() && state.join("home-1/store.db").exists());
    assert!(!left.exists());
}

#[test]
fn copies_have_the_same_bytes_and_holes() {
    let home = tempfile::tempdir().unwrap();
    let path = |name: &str| home.path().join(name);
    let file = File::create(path("from")).unwrap();
    file.set_len(100 * MIB + 5).unwrap();
    file.write_all_at(b"first", 0).unwrap();
    file.write_all_at(&[7; 200_000], 50 * MIB - 100).unwrap();
    // Zeros that are no hole become one.
    file.write_all_at(&vec![0; 2 * MIB as usize], 70 * MIB).unwrap();
    file.write_all_at(b"last", 100 * MIB + 1).unwrap();
    let from = fs::read(path("from")).unwrap();
    for fixed in [false, true] {
        let to = path(if fixed { "fixed" } else { "copy" });
        copy(&path("from"), &to, fixed, &Progress::default()).unwrap();
        assert!(fs::read(&to).unwrap() == from);
        let about = fs::metadata(&to).unwrap();
        let same = about.ino() == fs::metadata(path("from")).unwrap().ino();
        assert!(!same || fixed, "what may change has bytes of its own");
        assert!(allocated(&about) < 4 * MIB, "{} bytes", allocated(&about));
        assert!(copy(&path("from"), &to, fixed, &Progress::default()).is_err(), "nothing is written over");
    }
}

/// A volume of this machine that is encrypted, opened by what wraps its key.
fn encrypted(state: &Path, id: &str) -> Arc<dyn hutch_blockdev::Disk> {
    let host = state.join("home-1/host");
    let read = |path: PathBuf| fs::read(path).unwrap();
    let wrapped: Wrapped = serde_json::from_slice(&read(host.join(format!("keys/{id}.json")))).unwrap();
    let key = Keyring::open(&state.join("keys")).unwrap().unwrap(&wrapped, id).unwrap();
    let record: serde_json::Value =
        serde_json::from_slice(&read(host.join(format!("volumes/{id}.json")))).unwrap();
    let open = |(depth, name): (usize, &serde_json::Value)| {
        let path = host.join("layers").join(name.as_str().unwrap());
        let file = File::options().read(true).write(depth == 0).open(path).unwrap();
        hutch_blockdev::Layer { file, format: hutch_blockdev::Format::Qcow2, key: Some(key.clone()) }
    };
    let layers = record["layers"].as_array().unwrap().iter().enumerate().map(open).collect::<Vec<_>>();
    hutch_blockdev::open_layers(layers, false).unwrap()
}

#[test]
fn an_encrypted_volume_is_in_it_and_what_wraps_its_key_is_not() {
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    let host = local(&state);
    let secret = b"nobody may read this".repeat(32);
    host.create_volume("vol-a", MIB, &Source::Empty, Some(&host.keys()[0])).unwrap();
    let disk = encrypted(&state, "vol-a");
    disk.write_at(0, &secret[..512]).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let regions = region(&state, host.clone());
    let to = home.path().join("backup");
    let manifest = run(&regions, &state, &to, &Progress::default()).unwrap();
    assert_eq!(manifest.keys(), 1);
    assert!(!manifest.files.keys().any(|name| name.starts_with("keys")), "{:?}", manifest.files.keys());
    let wrapping = fs::read_to_string(state.join("keys/ebs.json")).unwrap();
    let wrapping: serde_json::Value = serde_json::from_str(&wrapping).unwrap();
    for name in manifest.files.keys() {
        let bytes = fs::read(to.join("state").join(name)).unwrap();
        for text in [&secret[..64], wrapping["key"].as_str().unwrap().as_bytes()] {
            assert!(!bytes.windows(text.len()).any(|part| part == text), "{name}");
        }
    }
    drop((regions, host));
    // Without the key that was kept apart it is no volume to read; with it, it is.
    let again = home.path().join("new/state");
    restore(&to, &again, &Progress::default()).unwrap();
    let host = local(&again);
    let refused = host.create_snapshots(&[("snap-a", "vol-a")]).unwrap_err();
    assert!(matches!(refused, HostError::Key(_)), "{refused}");
    drop(host);
    fs::remove_dir_all(again.join("keys")).unwrap();
    fs::rename(state.join("keys"), again.join("keys")).unwrap();
    local(&again).create_snapshots(&[("snap-a", "vol-a")]).unwrap();
    let mut found = vec![0; 512];
    encrypted(&again, "vol-a").read_at(0, &mut found).unwrap();
    assert!(found == secret[..512]);
}
