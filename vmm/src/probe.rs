//! What this machine's KVM is worth: a guest of three instructions counts a loop, timed.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Loops the probe guest counts: a quarter of a second where each instruction is emulated, nothing where it is not.
const LOOPS: u32 = 200_000;
/// Fewer loops a second than this is no processor. Emulating KVMs reach some 0.7 million, a KVM inside QEMU's TCG over
/// 50 million, hardware thousands of millions.
const LOOPS_REAL: f64 = 10e6;

/// What was found.
#[derive(Debug)]
pub enum Probe {
    /// Hardware virtualisation on the bare machine.
    Hardware(f64),
    /// A real KVM inside another hypervisor's guest.
    Nested(f64),
    /// KVM opens and creates machines, but runs them by emulating each instruction: a stock kernel crawls.
    Emulating(f64),
    /// There is no usable /dev/kvm.
    Absent(io::Error),
}

impl Probe {
    /// Whether a stock kernel boots in reasonable time.
    pub fn usable(&self) -> bool {
        matches!(self, Probe::Hardware(_) | Probe::Nested(_))
    }

    /// One line for people: what it is, and what to do.
    pub fn advice(&self) -> String {
        let speed = |l: &f64| format!("{:.1} million loops a second", l / 1e6);
        match self {
            Probe::Hardware(l) => format!("hardware: guests run natively ({})", speed(l)),
            Probe::Nested(l) => {
                format!("nested: a real KVM inside another machine ({}); guests run", speed(l))
            }
            Probe::Emulating(l) => format!(
                "emulating: /dev/kvm opens but emulates each instruction ({}); a stock kernel would take minutes to hours: use the lab (tests/lab/up), or a machine with VMX or SVM",
                speed(l)
            ),
            Probe::Absent(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                "absent: no permission to open /dev/kvm; add yourself to the group kvm, or run as root".into()
            }
            Probe::Absent(e) => format!(
                "absent: /dev/kvm: {e}; enable virtualisation in the firmware and load kvm_intel or kvm_amd, or use the lab (tests/lab/up)"
            ),
        }
    }
}

/// Finds out; takes under a second.
pub fn probe() -> Probe {
    let file = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => file,
        Err(e) => return Probe::Absent(e),
    };
    drop(file);
    let virtual_machine = std::fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|text| text.split_ascii_whitespace().any(|w| w == "hypervisor"));
    match measure() {
        Err(e) => Probe::Absent(e),
        Ok(speed) if speed < LOOPS_REAL => Probe::Emulating(speed),
        Ok(speed) if virtual_machine => Probe::Nested(speed),
        Ok(speed) => Probe::Hardware(speed),
    }
}

/// Loops a second of a guest in real mode.
fn measure() -> io::Result<f64> {
    // mov ecx, LOOPS; again: dec ecx; jnz again; out 0x10, al; hlt
    let mut code = vec![0x66, 0xb9];
    code.extend_from_slice(&LOOPS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xfc, 0xe6, 0x10, 0xf4]);

    let vm = Kvm::new()?.create_vm()?;
    let page = std::num::NonZeroUsize::new(4096).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a fresh private mapping at an address of the kernel's choice touches no memory of ours.
    let memory = unsafe {
        mmap_anonymous(None, page, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)?
    };
    // SAFETY: the page is ours and longer than the code.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.as_ptr().cast(), code.len()) };
    let run = || -> io::Result<Duration> {
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0x1000,
            memory_size: 4096,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the page stays mapped until after the VM's last instruction: `measure` unmaps it at its end.
        unsafe { vm.set_user_memory_region(slot)? };
        let mut vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        regs.rip = 0x1000;
        regs.rflags = 2;
        vcpu.set_regs(&regs)?;
        let start = Instant::now();
        match vcpu.run()? {
            VcpuExit::IoOut(0x10, _) => Ok(start.elapsed()),
            other => Err(io::Error::other(format!("the probe guest ended with {other:?}"))),
        }
    };
    let taken = run();
    // SAFETY: the mapping made above; no vCPU runs any more and no reference into it is left.
    unsafe { munmap(memory, 4096)? };
    Ok(f64::from(LOOPS) / taken?.as_secs_f64().max(1e-6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_guest_runs_wherever_kvm_opens() {
        match probe() {
            Probe::Absent(e) => eprintln!("SKIPPED: /dev/kvm: {e}"),
            found => assert!(!found.advice().is_empty(), "{found:?}"),
        }
    }
}
