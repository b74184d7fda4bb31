//! A real machine at its control socket: its console followed and typed into, its disk changed. The guest is a payload of a few
//! instructions; where there is no /dev/kvm the tests say so and pass.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use hutch_blockdev::Format;
use hutch_vmm::board::Backends;
use hutch_vmm::config::{End, MachineConfig, Report};
use hutch_vmm::control::Control;
use hutch_vmm::devices::serial;
use hutch_vmm::drives::Drive;
use hutch_vmm::machine::{Files, Machine};
use hutch_vmm::plan::Plan;

const LIMIT: Duration = Duration::from_secs(20);
const FOLLOW: &str = r#"{"command":"console","follow":true}"#;

/// Prints `>`, then echoes what it reads, and resets the machine after an `r`.
const ECHO: [u8; 35] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, b'>', // mov al, '>'
    0xee, // out dx, al
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd (line status)
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1 (data ready)
    0x74, 0xf7, // jz again
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0x3c, b'r', // cmp al, 'r'
    0x75, 0xed, // jne again
    0x66, 0xba, 0x02, 0x06, // mov dx, 0x602 (reset register)
    0xb0, 0x01, // mov al, 1
    0xee, // out dx, al
    0xeb, 0xfe, // jmp here
];

/// Prints dots and reads nothing.
const DEAF: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd];

/// Runs `code` while `act` uses its control socket, then kills it. `None` where there is no KVM.
fn with_socket(code: &[u8], act: impl FnOnce(&Path) + Send + 'static) -> Option<Report> {
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(e) => {
            eprintln!("SKIPPED: /dev/kvm: {e}");
            return None;
        }
    };
    let config = serde_json::json!({
        "id": "i-0123456789abcdef0", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef",
        "cpus": 1, "memory_mib": 32, "kvm": 0, "boot": { "kernel": 0, "cmdline": "" },
        "disks": [{ "serial": "vol1", "layers": [{ "fd": 9, "format": "raw" }] }],
    });
    let plan = Plan::new(serde_json::from_value::<MachineConfig>(config).unwrap()).unwrap();
    let bytes = tempfile::tempfile().unwrap();
    bytes.set_len(1 << 20).unwrap();
    let backends = Backends::default();
    let drive = Drive::open("i-1", "vol1", vec![(bytes, Format::Raw).into()], false).unwrap();
    assert!(backends.drives.add(drive));
    let files = Files { kvm, kernel: support::kernel(code), initrd: None, console_log: None, backends };
    let mut machine = Machine::new(plan, files).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let (console, input) = (machine.console(), machine.input());
    let (counts, devices) = (machine.counts(), machine.devices());
    let (disks_limit, nets) = (machine.disks_limit(), machine.net_limits());
    let mut acting = None;
    let report = machine.run(|handle| {
        let id = "i-0123456789abcdef0".into();
        let handle_too = handle.clone();
        Control { id, handle: handle_too, console, input, counts, devices, disks_limit, nets }
            .serve(listener)
            .unwrap();
        acting = Some(std::thread::spawn(move || {
            let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(&path)));
            handle.kill();
            acted
        }));
    });
    acting.unwrap().join().unwrap().unwrap();
    Some(report)
}

/// Sends one request and returns the stream behind its answer.
fn ask(path: &Path, request: &str) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    // One that refuses hangs up without reading.
    let _ = writeln!(stream, "{request}");
    let answer = until(&mut stream, b"\n");
    (stream, String::from_utf8(answer).unwrap())
}

fn follow(path: &Path) -> UnixStream {
    let (stream, answer) = ask(path, FOLLOW);
    assert_eq!(answer, "{\"ok\":true}\n");
    stream
}

/// Reads up to and including `end`.
fn until(stream: &mut UnixStream, end: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    let mut byte = [0];
    while !all.ends_with(end) {
        stream.read_exact(&mut byte).unwrap_or_else(|e| panic!("{e} after {all:?}"));
        all.push(byte[0]);
    }
    all
}

#[test]
fn what_one_types_the_guest_reads_and_all_see() {
    let report = with_socket(&ECHO, |path| {
        let (mut one, mut two) = (follow(path), follow(path));
        assert_eq!(until(&mut one, b">"), b">");
        one.write_all(b"hello").unwrap();
        assert_eq!(until(&mut one, b"hello"), b"hello");
        assert_eq!(until(&mut two, b"o"), b">hello");
        two.write_all(b"!").unwrap();
        assert_eq!(until(&mut one, b"!"), b"!");
        assert_eq!(until(&mut follow(path), b"!"), b">hello!", "who comes late reads the ring first");
        let long: Vec<u8> = (0..500).map(|i| b'A' + (i % 26) as u8).chain(*b"#").collect();
        one.write_all(&long).unwrap();
        assert_eq!(until(&mut one, b"#"), long, "more than the FIFO holds, in order");
    });
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
}

#[test]
fn typing_goes_on_over_a_reboot() {
    let report = with_socket(&ECHO, |path| {
        let mut client = follow(path);
        until(&mut client, b">");
        client.write_all(b"arb").unwrap();
        assert_eq!(until(&mut client, b">"), b"ar>");
        client.write_all(b"c").unwrap();
        until(&mut client, b"c");
    });
    let Some(report) = report else { return };
    assert_eq!((report.end, report.counters.reboots), (End::Killed, 1));
}

#[test]
fn clients_are_bounded_and_one_that_hangs_up_frees_its_place() {
    let report = with_socket(&DEAF, |path| {
        let mut clients: Vec<_> = (0..16).map(|_| follow(path)).collect();
        // One of them types more than the guest's queue holds, and then is gone.
        let mut stuck = clients.pop().unwrap();
        stuck.write_all(&vec![b'x'; serial::INPUT * 2]).unwrap();
        let (_, refused) = ask(path, FOLLOW);
        assert!(refused.contains("16 clients are connected"), "{refused}");
        drop(stuck);
        let deadline = Instant::now() + LIMIT;
        while ask(path, FOLLOW).1.contains("clients are connected") {
            assert!(Instant::now() < deadline, "the place is not freed");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
}

#[test]
fn a_disk_grows_and_gets_a_rate_and_what_is_wrong_is_said() {
    let report = with_socket(&DEAF, |path| {
        let disk = |more: &str| ask(path, &format!(r#"{{"command":"disk",{more}}}"#)).1;
        let rate = r#""rate":{"ops":[{"per_second":100,"burst":10}]}"#;
        for good in [
            format!(r#""serial":"vol1","size":4194304,{rate}"#),
            format!(r#""serial":"vol1",{rate}"#),
            // It is that large.
            r#""serial":"vol1","size":2097152"#.into(),
            r#""serial":"vol1","rate":{}"#.into(),
        ] {
            assert_eq!(disk(&good), "{\"ok\":true}\n", "{good}");
        }
        for (bad, why) in [
            (r#""serial":"vol2","size":4194304"#, "no disk vol2"),
            (r#""serial":"vol1","size":4194305"#, "cannot become 4194305"),
            (r#""serial":"vol1","size":8388608,"rate":{"ops":[{"per_second":0,"burst":1}]}"#, "0"),
            (r#""serial":"vol1","rate":{"iops":1}"#, "unknown field"),
            (r#""size":4194304"#, "serial"),
        ] {
            let said = disk(bad);
            assert!(said.contains("\"ok\":false") && said.contains(why), "{said}");
        }
        let all = format!(r#"{{"command":"disks",{rate}}}"#);
        assert_eq!(ask(path, &all).1, "{\"ok\":true}\n");
        let (_, said) = ask(path, &format!(r#"{{"command":"net","mac":"02:00:00:00:00:01",{rate}}}"#));
        assert!(said.contains("no interface 02:00:00:00:00:01"), "{said}");
    });
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
}
