//! What the tests with payloads share: a kernel that is one, and a machine that runs it for a while.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use hutch_vmm::board::Backends;
use hutch_vmm::config::{MachineConfig, Report};
use hutch_vmm::machine::{Files, Handle, Machine};
use hutch_vmm::plan::Plan;

/// A kernel of the boot protocol whose 64-bit entry is `code`.
pub fn kernel(code: &[u8]) -> File {
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
pub fn run(code: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Option<(Report, String)> {
    run_for(Duration::from_secs(20), code, change)
}

pub fn run_for(
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
pub fn machine(code: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Option<Machine> {
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
pub fn run_with(
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

/// The memory of the running machine of this process that has `bytes` of it.
pub fn guest_memory(bytes: u64) -> File {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    // Other tests close theirs meanwhile: what is gone is not it.
    let mut found = descriptors.filter_map(|entry| {
        let path = entry.ok()?.path();
        let name = std::fs::read_link(&path).ok()?;
        name.to_str()?.starts_with("/memfd:hutch-guest").then_some(())?;
        File::open(path).ok().filter(|file| file.metadata().is_ok_and(|m| m.len() == bytes))
    });
    found.next().expect("no machine has so much memory")
}

/// Waits until the guest has written more than `before`, at most twenty seconds.
pub fn goes_on(written: &dyn Fn() -> u64, before: u64) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while written() <= before {
        assert!(Instant::now() < deadline, "the guest does not go on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asserts that the guest writes nothing for a while and returns how much it had written.
pub fn stands_still(written: &dyn Fn() -> u64) -> u64 {
    let before = written();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(written(), before, "the guest runs while it is paused");
    before
}
