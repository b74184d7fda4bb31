//! Payloads of a few instructions on the local /dev/kvm: real exits, a real console, real ends. They are short enough
//! for a KVM that emulates each instruction; where there is no /dev/kvm they say so and pass.

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use hutch_vmm::board::Backends;
use hutch_vmm::config::{End, MachineConfig, Report};
use hutch_vmm::machine::{Files, Handle, Machine};
use hutch_vmm::plan::Plan;

/// `mov dx, port; mov al, value; out dx, al`
fn out8(port: u16, value: u8) -> Vec<u8> {
    let p = port.to_le_bytes();
    vec![0x66, 0xba, p[0], p[1], 0xb0, value, 0xee]
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|b| out8(0x3f8, b)).collect()
}

/// Halts for good.
const HANG: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// A kernel of the boot protocol whose 64-bit entry is `code`.
fn kernel(code: &[u8]) -> File {
    let mut image = vec![0u8; 1024 + 0x200];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x1000u32.to_le_bytes());
    image.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

/// Runs `code`, at most twenty seconds; `None` where there is no KVM.
fn run(code: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Option<(Report, String)> {
    run_for(Duration::from_secs(20), code, change)
}

fn run_for(
    limit: Duration,
    code: &[u8],
    change: impl FnOnce(&mut MachineConfig),
) -> Option<(Report, String)> {
    let mut machine = machine(code, change)?;
    let console = machine.console();
    let (done, over) = std::sync::mpsc::channel::<()>();
    let report = machine.run(|handle| {
        std::thread::spawn(move || {
            if over.recv_timeout(limit).is_err() {
                handle.kill();
            }
        });
    });
    let _ = done.send(());
    let text = console.lock().unwrap().tail(10);
    Some((report, text))
}

/// A machine that is to run `code`; `None` where there is no KVM.
fn machine(code: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Option<Machine> {
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(e) => {
            eprintln!("SKIPPED: /dev/kvm: {e}");
            return None;
        }
    };
    let config = serde_json::json!({
        "id": "i-0123456789abcdef0", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef",
        "cpus": 1, "memory_mib": 32, "kvm": 0, "exit_port": true,
        "boot": { "kernel": 0, "cmdline": "" },
    });
    let mut config: MachineConfig = serde_json::from_value(config).unwrap();
    change(&mut config);
    let plan = Plan::new(config).unwrap();
    let files =
        Files { kvm, kernel: kernel(code), initrd: None, console_log: None, backends: Backends::default() };
    Some(Machine::new(plan, files).unwrap())
}

/// Runs `code` while `act` acts on the machine from another thread, then kills it; `act` also gets a way to see how
/// many bytes the guest has written so far. `None` where there is no KVM.
fn run_with(
    code: &[u8],
    change: impl FnOnce(&mut MachineConfig),
    act: impl FnOnce(&Handle, &dyn Fn() -> u64) + Send + 'static,
) -> Option<Report> {
    let mut machine = machine(code, change)?;
    let console = machine.console();
    let (tell, told) = std::sync::mpsc::channel();
    let report = machine.run(|handle| {
        std::thread::spawn(move || {
            let acted = catch_unwind(AssertUnwindSafe(|| {
                act(&handle, &|| console.lock().unwrap().total());
            }));
            handle.kill();
            let _ = tell.send(acted);
        });
    });
    told.recv().unwrap().unwrap();
    Some(report)
}

/// Waits until the guest has written more than `before`, at most twenty seconds.
fn goes_on(written: &dyn Fn() -> u64, before: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while written() <= before {
        assert!(Instant::now() < deadline, "the guest does not go on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asserts that the guest writes nothing for a while and returns how much it had written.
fn stands_still(written: &dyn Fn() -> u64) -> u64 {
    let before = written();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(written(), before, "the guest runs while it is paused");
    before
}

#[test]
fn the_exit_code_comes_back() {
    let code = [print("hi\n"), out8(0xf5, 1), out8(0xf4, 42), HANG.to_vec()].concat();
    let Some((report, text)) = run(&code, |_| ()) else { return };
    assert_eq!(report.end, End::Command { code: 42 }, "{text}");
    assert_eq!(text, "hi");
    assert_eq!(report.counters.exits["pio"], 5);
    assert_eq!(report.counters.exits_to_user_space, Some(4));
    assert_eq!(report.counters.console_bytes, 3);
}

#[test]
fn power_off_ends_the_machine() {
    let code = [out8(0x600, 5 << 2 | 1 << 5), HANG.to_vec()].concat();
    let Some((report, _)) = run(&code, |_| ()) else { return };
    assert_eq!(report.end, End::PowerOff);
}

#[test]
fn reset_reboots_unless_that_is_refused() {
    let code = [print("boot\n"), out8(0x602, 1), HANG.to_vec()].concat();
    let Some((report, text)) = run(&code, |c| c.no_reboot = true) else { return };
    assert_eq!((report.end, text.as_str()), (End::Reboot, "boot"));
}

#[test]
fn a_triple_fault_and_a_panic_are_told_apart() {
    // No IDT: ud2 cannot be delivered, nor the double fault after it.
    let Some((report, _)) = run(&[0x0f, 0x0b], |_| ()) else { return };
    assert_eq!(report.end, End::TripleFault);
    let code = [print("Kernel panic - not syncing: no root\n"), vec![0x0f, 0x0b]].concat();
    let Some((report, _)) = run(&code, |_| ()) else { return };
    assert_eq!(report.end, End::Panic { message: "Kernel panic - not syncing: no root".into() });
}

#[test]
fn a_hung_panic_ends_at_its_last_word() {
    let code = [print("Kernel panic - not syncing: x\n---[ end Kernel panic ]\n"), HANG.to_vec()].concat();
    let Some((report, _)) = run(&code, |_| ()) else { return };
    assert!(matches!(report.end, End::Panic { .. }), "{:?}", report.end);
}

#[test]
fn a_hung_guest_can_be_killed_with_all_its_vcpus() {
    let Some((report, _)) = run_for(Duration::from_millis(300), &HANG, |c| c.cpus = 2) else { return };
    assert_eq!(report.end, End::Killed);
}

/// Prints a dot, over and over.
fn dots() -> Vec<u8> {
    [out8(0x3f8, b'.'), vec![0xeb, 0xf7]].concat()
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_when_resumed() {
    let report = run_with(
        &dots(),
        |c| c.cpus = 2,
        |handle, written| {
            goes_on(written, 0);
            for _ in 0..3 {
                handle.pause();
                handle.pause();
                assert!(handle.is_paused());
                let before = stands_still(written);
                handle.resume();
                assert!(!handle.is_paused());
                goes_on(written, before);
            }
        },
    );
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
}

#[test]
fn a_paused_guest_can_be_killed() {
    let report = run_with(
        &dots(),
        |c| c.cpus = 2,
        |handle, written| {
            goes_on(written, 0);
            handle.pause();
        },
    );
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
}

#[test]
fn a_guest_that_reboots_all_the_time_can_be_paused() {
    let code = [print("."), out8(0x602, 1), HANG.to_vec()].concat();
    let report = run_with(
        &code,
        |_| (),
        |handle, written| {
            for _ in 0..5 {
                goes_on(written, written());
                handle.pause();
                let before = stands_still(written);
                handle.resume();
                goes_on(written, before);
            }
        },
    );
    let Some(report) = report else { return };
    assert_eq!(report.end, End::Killed);
    assert!(report.counters.reboots >= 5, "{}", report.counters.reboots);
}
