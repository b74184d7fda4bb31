//! A PVH kernel of a few instructions on the local /dev/kvm; where there is none the test says so and passes.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

use hutch_vmm::board::Backends;
use hutch_vmm::config::{End, MachineConfig};
use hutch_vmm::machine::{Files, Machine};
use hutch_vmm::plan::Plan;

/// Ends with 33 when EBX points to hvm_start_info, with 1 when not; the code is 32-bit.
const CODE: [u8; 23] = [
    0x31, 0xc9, // xor ecx, ecx
    0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, // cmp dword [ebx], 0x336ec578
    0xb0, 1, // mov al, 1
    0x75, 0x06, // jne out
    // In 64-bit mode the next byte is a prefix of the one after, and ecx stays 0.
    0x41, // inc ecx
    0x90, // nop
    0x88, 0xc8, // mov al, cl
    0x04, 32, // add al, 32
    // out:
    0xe6, 0xf4, // out 0xf4, al
    0xf4, 0xeb, 0xfd, // hlt, over and over
];

/// An ELF file with the code at 1 MiB and a note that names it.
fn kernel() -> File {
    let mut file = vec![0u8; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..20].copy_from_slice(&[2, 0, 62, 0]);
    file[32] = 64;
    file[54..58].copy_from_slice(&[56, 0, 2, 0]);
    let at = 64 + 2 * 56;
    for (kind, offset, len) in [(1, at, CODE.len() as u64), (4, at + CODE.len() as u64, 20)] {
        for word in [kind, offset, 0, 0x10_0000, len, len, 4u64] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(CODE);
    for word in [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000] {
        file.extend(word.to_le_bytes());
    }
    let mut out = tempfile::tempfile().unwrap();
    out.write_all(&file).unwrap();
    out
}

#[test]
fn a_pvh_kernel_finds_its_start_info_in_protected_mode() {
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(kvm) => kvm,
        Err(e) => return eprintln!("SKIPPED: /dev/kvm: {e}"),
    };
    let config = serde_json::json!({
        "id": "i-0123456789abcdef0", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef",
        "cpus": 1, "memory_mib": 32, "kvm": 0, "exit_port": true,
        "boot": { "kernel": 0, "cmdline": "" },
    });
    let plan = Plan::new(serde_json::from_value::<MachineConfig>(config).unwrap()).unwrap();
    let files =
        Files { kvm, kernel: kernel(), initrd: None, console_log: None, backends: Backends::default() };
    let report = Machine::new(plan, files).unwrap().run(|handle| {
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(20));
            handle.kill();
        });
    });
    assert_eq!(report.end, End::Command { code: 33 });
}
