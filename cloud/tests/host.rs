//! What every host has to do: one suite, run by each of them.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hutch_cloud::host::local::{Local, Means, MetadataService, Served};
use hutch_cloud::host::{
    Content, End, Host, HostError, Interface, Machine, Network, Public, Simulated, Source, Speed,
};
use hutch_cloud::keyring::Keyring;
use hutch_cloud::metadata::Metadata;
use hutch_imagestore::store::{Kind, Store};
use hutch_vmm::config::{Flow, Rate};

const GIB: u64 = 1 << 30;

/// A host, opened anew on what the last one left where `again` says so.
type Open<'a> = &'a dyn Fn() -> Box<dyn Host>;

/// The machine with a public address.
fn led(machine: Machine, public: Option<[u8; 4]>) -> Machine {
    let public = public.map(|ip| Public { ip: ip.into(), lan: false });
    let interfaces = machine.interfaces.iter().cloned().map(|interface| Interface { public, ..interface });
    Machine { interfaces: interfaces.collect(), ..machine }
}

/// The machine with an address and a MAC beside the first one's.
fn beside(machine: Machine) -> Machine {
    let other = |interface: Interface| Interface {
        id: "eni-87654321".into(),
        mac: "02:00:00:00:00:02".into(),
        ip: [172, 31, 0, 5].into(),
        ..interface
    };
    Machine { interfaces: machine.interfaces.iter().cloned().map(other).collect(), ..machine }
}

fn machine(id: &str, run: u64, volumes: &[&str]) -> Machine {
    Machine {
        id: id.into(),
        run,
        uuid: "ec2e1b6a-0000-4000-8000-000000000001".into(),
        vcpus: 1,
        memory_mib: 512,
        kernel: None,
        ramdisk: None,
        volumes: volumes.iter().map(|volume| (*volume).into()).collect(),
        stores: vec![],
        interfaces: vec![Interface {
            id: "eni-12345678".into(),
            mac: "02:00:00:00:00:01".into(),
            ip: [172, 31, 0, 4].into(),
            more: Vec::new(),
            subnet: None,
            network: Network::alone(),
            public: None,
            groups: vec!["sg-12345678".into()],
        }],
        speed: Speed::default(),
        metadata: Metadata {
            instance_id: id.into(),
            subnet_cidr: "172.31.0.0/20".into(),
            ..Metadata::default()
        },
    }
}

fn runs(host: &dyn Host, id: &str) -> Option<(u64, bool)> {
    let one = host.machine(id).unwrap().map(|status| (status.run, status.end.is_none()));
    let all = host.machines().unwrap();
    let listed = all.iter().find(|status| status.id == id).map(|status| (status.run, status.end.is_none()));
    assert_eq!(one, listed, "both tell the same");
    one
}

fn size(content: &Content) -> u64 {
    match content {
        Content::Bytes(bytes) => *bytes,
        Content::Layers { size, .. } => *size,
    }
}

/// Imports a kernel and a RAM disk under these names; tells their ids.
fn import(images: &Store, named: [(&str, &Path); 2]) -> [String; 2] {
    let all = [Kind::Kernel, Kind::Ramdisk].into_iter().zip(named);
    let ids: Vec<_> = all
        .map(|(kind, (name, file))| {
            let file = std::fs::File::open(file).unwrap();
            let image =
                hutch_imagestore::kernels::import(images, &file, kind, name, &|_| Ok(()), &mut |_, _| {});
            image.unwrap().record.id
        })
        .collect();
    ids.try_into().unwrap()
}

/// Kernels and RAM disks: one that a machine was started with it has still when it is gone from the images. `files` are
/// a kernel that boots a disk of the template, and a RAM disk.
fn boot_files(host: &dyn Host, images: &Store, files: [&Path; 2]) {
    let [kernel, ramdisk] = import(images, [("kernel", files[0]), ("ramdisk", files[1])]);
    let [other, _] = import(images, [("other", files[0]), ("other ramdisk", files[1])]);
    let mut found: Vec<_> = host.boot_files().unwrap().into_iter().map(|f| (f.kind, f.name, f.id)).collect();
    found.retain(|(_, name, _)| ["kernel", "ramdisk"].contains(&&**name));
    found.sort_by_key(|(_, name, _)| name.clone());
    assert_eq!(
        found,
        [(Kind::Kernel, "kernel".into(), kernel.clone()), (Kind::Ramdisk, "ramdisk".into(), ramdisk.clone())]
    );
    let source = Source::Template(host.templates().unwrap()[0].name.clone());
    host.create_volume("vol-k", GIB, &source, None).unwrap();
    let told = |run, kernel: &str, ramdisk: Option<&str>| Machine {
        kernel: Some(kernel.into()),
        ramdisk: ramdisk.map(str::to_owned),
        ..machine("i-k", run, &["vol-k"])
    };
    let missing = host.start(&told(1, "aki-0123456789abcdef0", None));
    assert!(
        matches!(&missing, Err(HostError::Missing(what)) if what.contains("aki-0123456789abcdef0")),
        "{missing:?}"
    );
    assert_eq!(runs(host, "i-k"), None, "nothing is left of it");
    host.start(&told(1, &kernel, Some(&ramdisk))).unwrap();
    for name in ["kernel", "ramdisk", "other ramdisk"] {
        images.remove(name).unwrap();
    }
    host.stop("i-k", Duration::ZERO).unwrap();
    host.start(&told(2, &kernel, Some(&ramdisk))).unwrap();
    assert_eq!(runs(host, "i-k"), Some((2, true)), "it has them still");
    host.stop("i-k", Duration::ZERO).unwrap();
    assert!(matches!(
        host.start(&told(3, &kernel, Some("ari-0123456789abcdef0"))),
        Err(HostError::Missing(_))
    ));
    host.start(&told(3, &other, Some(&ramdisk))).unwrap();
    host.stop("i-k", Duration::ZERO).unwrap();
    // Another has taken its place: it is let go.
    assert!(matches!(host.start(&told(4, &kernel, None)), Err(HostError::Missing(_))));
    assert_eq!(runs(host, "i-k"), Some((3, false)));
    host.forget("i-k").unwrap();
    host.delete_volume("vol-k").unwrap();
    images.remove("other").unwrap();
}

/// Imports: a file's disk becomes a snapshot, once; nothing is left of a bad one, nor of one that is to stop.
fn imports(host: &dyn Host) {
    let room = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(room.path().join(name), bytes).unwrap();
        std::fs::File::open(room.path().join(name)).unwrap()
    };
    let (good, bad) = (file("good", &[7; 4096]), file("bad", b"QFI\xfb and no more"));
    let mut told = Vec::new();
    for _ in 0..2 {
        let mut go_on = |done, total| {
            told.push((done, total));
            true
        };
        assert_eq!(host.import_snapshot("snap-i", &good, None, None, &mut go_on).unwrap(), 4096);
    }
    assert_eq!(told.last(), Some(&(4096, 4096)));
    assert_eq!(size(&host.content(&Source::Snapshot("snap-i".into())).unwrap()), 4096);
    host.create_volume("vol-i", GIB, &Source::Snapshot("snap-i".into()), None).unwrap();
    let refused = host.import_snapshot("snap-j", &bad, None, None, &mut |_, _| true);
    assert!(matches!(&refused, Err(HostError::Failed(why)) if why.contains("refused")), "{refused:?}");
    let stopped = host.import_snapshot("snap-j", &good, None, None, &mut |_, _| false);
    assert!(matches!(stopped, Err(HostError::Busy(_))), "{stopped:?}");
    let missing = host.content(&Source::Snapshot("snap-j".into()));
    assert!(matches!(missing, Err(HostError::Missing(_))), "{missing:?}");
    host.delete_volume("vol-i").unwrap();
    host.delete_snapshot("snap-i").unwrap();
    // Encrypted.
    let key = host.keys().remove(0);
    assert_eq!(host.import_snapshot("snap-i", &good, None, Some(&key), &mut |_, _| true).unwrap(), 4096);
    host.create_volume("vol-i", GIB, &Source::Snapshot("snap-i".into()), Some(&key)).unwrap();
    host.delete_volume("vol-i").unwrap();
    host.delete_snapshot("snap-i").unwrap();
    let none = host.import_snapshot("snap-i", &good, None, Some("none"), &mut |_, _| true);
    assert!(matches!(none, Err(HostError::Key(_))), "{none:?}");
}

fn suite(open: Open<'_>, outlives: bool) {
    let host = open();
    let template = host.templates().unwrap().first().expect("a template").clone();
    let source = Source::Template(template.name.clone());

    // Volumes: made once, whatever is asked again; a source that is not there is told so.
    for _ in 0..2 {
        host.create_volume("vol-a", template.size.max(GIB), &source, None).unwrap();
        host.create_volume("vol-b", GIB, &Source::Empty, None).unwrap();
    }
    let missing = host.create_volume("vol-c", GIB, &Source::Snapshot("snap-none".into()), None);
    assert!(matches!(missing, Err(HostError::Missing(_))), "{missing:?}");

    // A volume is what it is to be, once it is told; it never becomes smaller.
    let rate = |per_second| Rate { ops: vec![Flow { per_second, burst: 100 }], bytes: vec![] };
    for bytes in [2 * GIB, 2 * GIB, GIB] {
        host.modify_volume("vol-b", bytes, &rate(1000)).unwrap();
    }
    let missing = host.modify_volume("vol-none", GIB, &Rate::default());
    assert!(matches!(missing, Err(HostError::Missing(_))), "{missing:?}");

    // A run is started once; it has all its volumes or does not start.
    assert!(matches!(host.start(&machine("i-x", 1, &["vol-none"])), Err(HostError::Missing(_))));
    assert_eq!(runs(&*host, "i-x"), None, "nothing is left of it");
    let first = machine("i-a", 1, &["vol-a", "vol-b"]);
    host.start(&first).unwrap();
    host.start(&first).unwrap();
    assert_eq!(runs(&*host, "i-a"), Some((1, true)));
    assert!(host.delete_volume("vol-a").is_err(), "a machine has it");
    assert!(host.forget("i-a").is_err(), "it runs");

    // Volumes come and go while it runs, once, whatever is asked again.
    for id in ["vol-h", "vol-i"] {
        host.create_volume(id, GIB, &Source::Empty, None).unwrap();
        assert!(matches!(host.attach("i-none", id), Err(HostError::Missing(_))));
        host.attach("i-a", id).unwrap();
        host.attach("i-a", id).unwrap();
        assert!(host.delete_volume(id).is_err(), "a machine has it");
    }
    assert!(matches!(host.attach("i-a", "vol-none"), Err(HostError::Missing(_))));
    assert!(matches!(host.detach("i-none", "vol-i", true), Err(HostError::Missing(_))));
    for _ in 0..2 {
        assert!(host.detach("i-a", "vol-i", true).unwrap(), "it is taken from the guest");
    }
    host.delete_volume("vol-i").unwrap();
    host.reboot("i-a").unwrap();
    host.update(&first).unwrap();
    // Also while a machine has it, and when somebody asks again who was not there.
    host.modify_volume("vol-b", 3 * GIB, &rate(2000)).unwrap();
    let slower = Speed { volumes: rate(500), network: rate(5000) };
    let first = Machine { speed: slower, ..first };
    host.update(&first).unwrap();
    let host = match outlives {
        true => {
            drop(host);
            open()
        }
        false => host,
    };
    assert_eq!(runs(&*host, "i-a"), Some((1, true)), "it outlives who asked for it");
    host.start(&first).unwrap();
    for bytes in [3 * GIB, 4 * GIB, 4 * GIB] {
        host.modify_volume("vol-b", bytes, &rate(2000)).unwrap();
    }

    // Snapshots of several volumes are all made, or none.
    let missing = host.create_snapshots(&[("snap-x", "vol-a"), ("snap-y", "vol-none")]);
    assert!(matches!(missing, Err(HostError::Missing(_))), "{missing:?}");
    for id in ["snap-x", "snap-y"] {
        assert!(matches!(host.content(&Source::Snapshot(id.into())), Err(HostError::Missing(_))), "{id}");
    }
    for _ in 0..2 {
        host.create_snapshots(&[("snap-a", "vol-a"), ("snap-b", "vol-b")]).unwrap();
    }
    assert_eq!(size(&host.content(&Source::Snapshot("snap-b".into())).unwrap()), 4 * GIB);
    host.delete_snapshot("snap-b").unwrap();

    // Stopped, it is known and can be started anew: as another run.
    host.stop("i-a", Duration::ZERO).unwrap();
    host.stop("i-a", Duration::ZERO).unwrap();
    host.stop("i-never", Duration::ZERO).unwrap();
    assert_eq!(runs(&*host, "i-a"), Some((1, false)));
    host.start(&first).unwrap();
    assert_eq!(runs(&*host, "i-a"), Some((1, false)), "the run is over");
    assert!(matches!(host.reboot("i-a"), Err(HostError::Missing(_))));
    assert!(host.update(&first).is_err());
    host.start(&machine("i-a", 2, &["vol-a"])).unwrap();
    assert_eq!(runs(&*host, "i-a"), Some((2, true)));
    host.stop("i-a", Duration::ZERO).unwrap();
    host.modify_volume("vol-b", 5 * GIB, &Rate::default()).unwrap();
    host.create_snapshots(&[("snap-b", "vol-b")]).unwrap();
    assert_eq!(size(&host.content(&Source::Snapshot("snap-b".into())).unwrap()), 5 * GIB);
    host.delete_snapshot("snap-b").unwrap();

    // What is not needed goes; what was made of it stays.
    host.create_volume("vol-d", template.size.max(GIB), &Source::Snapshot("snap-a".into()), None).unwrap();
    for source in [Source::Snapshot("snap-a".into()), source] {
        let content = host.content(&source).unwrap();
        assert!(size(&content) >= template.size, "{content:?}");
        for _ in 0..2 {
            host.copy_snapshot("snap-copy", &content, None).unwrap();
        }
        // It needs what it was copied of no more than a volume does.
        host.create_volume("vol-e", GIB, &Source::Snapshot("snap-copy".into()), None).unwrap();
        host.delete_snapshot("snap-copy").unwrap();
        host.delete_volume("vol-e").unwrap();
    }
    assert!(matches!(host.content(&Source::Snapshot("snap-copy".into())), Err(HostError::Missing(_))));
    for _ in 0..2 {
        host.forget("i-a").unwrap();
        host.delete_snapshot("snap-a").unwrap();
        host.delete_volume("vol-a").unwrap();
        host.delete_volume("vol-b").unwrap();
        host.delete_volume("vol-h").unwrap();
    }
    assert_eq!(host.machines().unwrap(), []);
    assert_eq!(host.console("i-a").unwrap(), b"");
    host.create_volume("vol-f", template.size.max(GIB), &Source::Template(template.name), None).unwrap();
    let host = addresses(host, open, outlives);
    host.stop("i-b", Duration::ZERO).unwrap();
    host.forget("i-c").unwrap();
    host.delete_volume("vol-f").unwrap();
    host.forget("i-b").unwrap();
    host.delete_volume("vol-d").unwrap();

    // Nothing happened: it waits, and not for ever.
    let seen = host.wait(0, Duration::from_millis(1));
    assert_eq!(host.wait(seen, Duration::from_millis(20)), seen);
}

/// Public addresses: each leads to one machine, as long as that runs. Leaves `i-b` running on `vol-d`, and `i-c`, which ran on
/// `vol-f`.
fn addresses(host: Box<dyn Host>, open: Open<'_>, outlives: bool) -> Box<dyn Host> {
    let (one, two) = ([198, 19, 0, 1], [198, 19, 0, 2]);
    let is = |host: &dyn Host, expected: &[([u8; 4], &str)]| {
        let expected = expected.iter().map(|(ip, id)| ((*ip).into(), (*id).to_owned())).collect();
        assert_eq!(host.public_addresses().unwrap(), expected);
    };
    let b = |run| machine("i-b", run, &["vol-d"]);
    let c = |run| beside(machine("i-c", run, &["vol-f"]));
    host.start(&b(1)).unwrap();
    is(&*host, &[]);
    for _ in 0..2 {
        host.update(&led(b(1), Some(one))).unwrap();
    }
    is(&*host, &[(one, "i-b")]);
    // One that leads elsewhere still is left out at the start, and refused later; the rest is done.
    host.start(&led(c(1), Some(one))).unwrap();
    is(&*host, &[(one, "i-b")]);
    assert!(matches!(host.update(&led(c(1), Some(one))), Err(HostError::Busy(_))));
    host.update(&led(c(1), Some(two))).unwrap();
    is(&*host, &[(one, "i-b"), (two, "i-c")]);
    let host = match outlives {
        true => {
            drop(host);
            open()
        }
        false => host,
    };
    is(&*host, &[(one, "i-b"), (two, "i-c")]);
    // It moves when it is let go.
    assert!(matches!(host.update(&led(c(1), Some(one))), Err(HostError::Busy(_))));
    is(&*host, &[(one, "i-b")]);
    host.update(&b(1)).unwrap();
    is(&*host, &[]);
    host.update(&led(c(1), Some(one))).unwrap();
    is(&*host, &[(one, "i-c")]);
    // It goes with the run, whoever ended it, and comes with the next.
    host.stop("i-c", Duration::ZERO).unwrap();
    is(&*host, &[]);
    host.update(&led(b(1), Some(one))).unwrap();
    host.update(&led(b(1), Some(two))).unwrap();
    host.start(&led(c(2), Some(one))).unwrap();
    is(&*host, &[(one, "i-c"), (two, "i-b")]);
    host.stop("i-c", Duration::ZERO).unwrap();
    is(&*host, &[(two, "i-b")]);
    host
}

#[test]
fn the_simulated_host_in_memory() {
    suite(&|| Box::new(Simulated::memory(Duration::ZERO)), false);
}

#[test]
fn the_simulated_host_boots_kernels_of_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let images = Store::open(dir.path()).unwrap();
    let (kernel, ramdisk) = (dir.path().join("kernel"), dir.path().join("ramdisk"));
    std::fs::write(&kernel, b"kernel").unwrap();
    std::fs::write(&ramdisk, b"070701").unwrap();
    let host = Simulated::memory(Duration::ZERO).with_images(images.clone());
    boot_files(&host, &images, [&kernel, &ramdisk]);
}

#[test]
fn the_simulated_host_in_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let open = |dir: &Path| Simulated::open(dir.to_owned(), Duration::ZERO).unwrap();
    suite(&|| Box::new(open(dir.path())), true);
    // What was half written when a process was killed was never true.
    std::fs::write(dir.path().join("machines/i-half.new"), "{").unwrap();
    assert_eq!(open(dir.path()).machines().unwrap(), []);
}

/// The program is there when the workspace was built.
#[test]
fn the_simulated_host_imports_by_the_same_program() {
    let target = std::env::current_exe().unwrap();
    let importer = target.ancestors().nth(2).unwrap().join("hutch-import-worker");
    if !importer.exists() {
        eprintln!("skipped: {} is not built; tests/clients/run builds it", importer.display());
        return;
    }
    imports(&Simulated::memory(Duration::ZERO).with_importer(importer));
}

/// Guests of the suite are told nothing.
struct Silent;

impl MetadataService for Silent {
    fn serve(&self, listener: TcpListener, _: &Metadata) -> std::io::Result<Box<dyn Served>> {
        Ok(Box::new(Kept(listener)))
    }
}

struct Kept(#[expect(dead_code, reason = "its port is held as long as it is served")] TcpListener);

impl Served for Kept {
    fn update(&self, _: &Metadata) {}
}

/// Real machines, as root, in a network namespace of their own: `HUTCH_STATE` holds the image store, `HUTCH_VMM` and
/// `HUTCH_IMPORTER` are the programs, `HUTCH_MICRO` a directory with a kernel and an initrd. Run by `tests/clients/run real`.
#[test]
#[ignore = "it needs root, KVM that runs a stock kernel, and an image"]
fn the_local_host() {
    let state = PathBuf::from(std::env::var_os("HUTCH_STATE").expect("an image store"));
    let dir = tempfile::tempdir_in(&state).unwrap();
    let open = || {
        let means = Means {
            importer: std::env::var_os("HUTCH_IMPORTER").expect("hutch-import-worker").into(),
            vmm: std::env::var_os("HUTCH_VMM").expect("hutch-vmm").into(),
            networks: dir.path().join("networks"),
            region: "home-1".into(),
            together: Default::default(),
            metadata: Box::new(Silent),
        };
        Local::open(
            dir.path(),
            Store::open(&state).unwrap(),
            Keyring::open(&dir.path().join("keyring")).unwrap(),
            means,
        )
        .unwrap()
    };
    suite(&|| Box::new(open()), true);
    let micro = PathBuf::from(std::env::var_os("HUTCH_MICRO").expect("a kernel and an initrd"));
    let files = [&*micro.join("vmlinuz"), &*micro.join("initrd")];
    boot_files(&open(), &Store::open(&state).unwrap(), files);
    imports(&open());
    let left = |name: &str| std::fs::read_dir(dir.path().join(name)).unwrap().count();
    assert_eq!([left("machines"), left("volumes"), left("snapshots")], [0; 3], "nothing is left");
    let tables = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout), "", "and no address leads anywhere");
    let taps = std::fs::read_dir("/sys/class/net").unwrap();
    assert!(taps.flatten().all(|link| !link.file_name().to_string_lossy().starts_with("hu")));

    // Killed while it started a machine, or removed one: what is half done is nothing, and can be done again.
    std::fs::create_dir_all(dir.path().join("machines/i-half")).unwrap();
    let host = open();
    assert_eq!(host.machines().unwrap(), []);
    assert!(!dir.path().join("machines/i-half").exists());
    let template = host.templates().unwrap().remove(0);
    host.create_volume("vol-a", template.size, &Source::Template(template.name), None).unwrap();
    host.start(&machine("i-a", 1, &["vol-a"])).unwrap();
    let record = dir.path().join("machines/i-a/machine.json");
    drop(host);
    let running = std::fs::read_to_string(&record).unwrap();
    // It answered, but that was not recorded any more: it runs.
    std::fs::write(&record, running.replace("\"running\"", "\"starting\"")).unwrap();
    let host = open();
    assert_eq!(runs(&host, "i-a"), Some((1, true)));
    host.stop("i-a", Duration::ZERO).unwrap();
    drop(host);
    // It never answered, and its process is gone: the run is none, and is started once more.
    std::fs::write(&record, running.replace("\"running\"", "\"starting\"")).unwrap();
    let host = open();
    assert_eq!(runs(&host, "i-a"), None);
    host.start(&machine("i-a", 1, &["vol-a"])).unwrap();
    assert_eq!(runs(&host, "i-a"), Some((1, true)));
    drop(host);
    // Its process died while nobody watched, as all do when a host goes down.
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let pid = found["process"]["pid"].to_string();
    assert!(std::process::Command::new("kill").args(["-9", &pid]).status().unwrap().success());
    let host = open();
    let until = Instant::now() + Duration::from_secs(60);
    while runs(&host, "i-a") != Some((1, false)) {
        assert!(Instant::now() < until, "its end is not noticed");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(matches!(host.machine("i-a").unwrap().unwrap().end, Some(End::Failed(_))));
    drop(host);
    // Killed between the end of a process and the start of the next, in a reboot: the reboot goes on.
    std::fs::write(&record, running.replace("\"running\"", "\"restarting\"")).unwrap();
    let host = open();
    let until = Instant::now() + Duration::from_secs(120);
    while host.update(&machine("i-a", 1, &["vol-a"])).is_err() {
        assert!(Instant::now() < until, "it does not come back from its reboot");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(runs(&host, "i-a"), Some((1, true)));
    host.stop("i-a", Duration::ZERO).unwrap();
    drop(host);
    // As after the host went down: no process of that boot is there.
    let boot = found["process"]["boot"].as_str().unwrap();
    std::fs::write(&record, running.replace(boot, "another")).unwrap();
    let host = open();
    let until = Instant::now() + Duration::from_secs(60);
    while runs(&host, "i-a") != Some((1, false)) {
        assert!(Instant::now() < until, "its end is not noticed");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(host.machine("i-a").unwrap().unwrap().end, Some(End::HostDown));
    host.forget("i-a").unwrap();
    host.delete_volume("vol-a").unwrap();
}
