//! What every host has to do: one suite, run by each of them.

use std::path::Path;
use std::time::Duration;

use hutch_cloud::host::{Host, HostError, Interface, Machine, Simulated, Source};
use hutch_cloud::metadata::Metadata;

const GIB: u64 = 1 << 30;

/// A host, opened anew on what the last one left where `again` says so.
type Open<'a> = &'a dyn Fn() -> Box<dyn Host>;

fn machine(id: &str, run: u64, volumes: &[&str]) -> Machine {
    Machine {
        id: id.into(),
        run,
        uuid: "ec2e1b6a-0000-4000-8000-000000000001".into(),
        vcpus: 1,
        memory_mib: 512,
        volumes: volumes.iter().map(|volume| (*volume).into()).collect(),
        interfaces: vec![Interface {
            id: "eni-12345678".into(),
            mac: "02:00:00:00:00:01".into(),
            ip: [172, 31, 0, 4].into(),
            open_tcp: vec![(80, 80)],
        }],
        metadata: Metadata { instance_id: id.into(), ..Metadata::default() },
    }
}

fn runs(host: &dyn Host, id: &str) -> Option<(u64, bool)> {
    let one = host.machine(id).unwrap().map(|status| (status.run, status.end.is_none()));
    let all = host.machines().unwrap();
    let listed = all.iter().find(|status| status.id == id).map(|status| (status.run, status.end.is_none()));
    assert_eq!(one, listed, "both tell the same");
    one
}

fn suite(open: Open<'_>, outlives: bool) {
    let host = open();
    let template = host.templates().unwrap().first().expect("a template").clone();
    let source = Source::Template(template.name.clone());

    // Volumes: made once, whatever is asked again; a source that is not there is told so.
    for _ in 0..2 {
        host.create_volume("vol-a", template.size.max(GIB), &source).unwrap();
        host.create_volume("vol-b", GIB, &Source::Empty).unwrap();
    }
    let missing = host.create_volume("vol-c", GIB, &Source::Snapshot("snap-none".into()));
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
    host.reboot("i-a").unwrap();
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

    // Stopped, it is known and can be started anew: as another run.
    host.create_snapshot("snap-a", "vol-a").unwrap();
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

    // What is not needed goes; what was made of it stays.
    host.create_volume("vol-d", template.size.max(GIB), &Source::Snapshot("snap-a".into())).unwrap();
    for _ in 0..2 {
        host.forget("i-a").unwrap();
        host.delete_snapshot("snap-a").unwrap();
        host.delete_volume("vol-a").unwrap();
        host.delete_volume("vol-b").unwrap();
    }
    assert_eq!(host.machines().unwrap(), []);
    assert_eq!(host.console("i-a").unwrap(), b"");
    host.start(&machine("i-b", 1, &["vol-d"])).unwrap();
    host.stop("i-b", Duration::ZERO).unwrap();
    host.forget("i-b").unwrap();
    host.delete_volume("vol-d").unwrap();

    // Nothing happened: it waits, and not for ever.
    let seen = host.wait(0, Duration::from_millis(1));
    assert_eq!(host.wait(seen, Duration::from_millis(20)), seen);
}

#[test]
fn the_simulated_host_in_memory() {
    suite(&|| Box::new(Simulated::memory(Duration::ZERO)), false);
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
