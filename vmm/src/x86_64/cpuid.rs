//! CPUID of each vCPU: what KVM supports here, never a fixed list, with the topology of this machine filled in.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// AMD APM volume 3, Fn8000_0001 ECX: legacy multi-core, and topology extensions (leaf 8000_001e is valid).
const AMD_ECX_CMP_LEGACY: u32 = 1 << 1;

/// The CPUID of vCPU `index` of `cpus`: one socket, `cpus` cores of one thread, APIC id = index.
pub fn for_vcpu(supported: &CpuId, index: u32, cpus: u32) -> CpuId {
    let mut cpuid = supported.clone();
    // Bits of an APIC id that number the core.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        patch(entry, index, cpus, core_bits);
    }
    cpuid
}

fn patch(e: &mut kvm_cpuid_entry2, index: u32, cpus: u32, core_bits: u32) {
    match e.function {
        1 => {
            // Intel SDM volume 2, CPUID: EBX 31-24 initial APIC id, 23-16 addressable ids.
            e.ebx = (e.ebx & 0xffff) | ((1 << core_bits) << 16) | (index << 24);
            e.ecx |= LEAF1_ECX_HYPERVISOR | LEAF1_ECX_TSC_DEADLINE;
            set(&mut e.edx, LEAF1_EDX_HTT, cpus > 1);
        }
        // Deterministic cache parameters: EAX 31-26 cores a package - 1, 25-14 threads that share the cache - 1.
        4 if e.eax & 0x1f != 0 => {
            let shared = if (e.eax >> 5) & 7 >= 3 { cpus - 1 } else { 0 };
            e.eax = (e.eax & 0x3fff) | (shared << 14) | ((cpus - 1) << 26);
        }
        // Extended topology: level 0 threads (one a core), level 1 cores.
        0xb | 0x1f => {
            let (bits, count, level) = match e.index {
                0 => (0, 1, 1),
                1 => (core_bits, cpus, 2),
                _ => (0, 0, 0),
            };
            e.eax = bits;
            e.ebx = count;
            e.ecx = (level << 8) | (e.index & 0xff);
            e.edx = index;
        }
        0x8000_0001 => set(&mut e.ecx, AMD_ECX_CMP_LEGACY, cpus > 1),
        // AMD: ECX 15-12 width of the core id, 7-0 cores - 1.
        0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (core_bits << 12) | (cpus - 1),
        // AMD: extended APIC id; core id, one thread a core; node 0.
        0x8000_001e => {
            e.eax = index;
            e.ebx = index;
            e.ecx = 0;
        }
        _ => {}
    }
}

fn set(word: &mut u32, bit: u32, on: bool) {
    if on { *word |= bit } else { *word &= !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let entry = |function, index, eax| kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        CpuId::from_entries(&[
            entry(1, 0, 0xa20f10),
            entry(4, 0, 0x121),
            entry(4, 3, 0x163),
            entry(0xb, 0, 0),
            entry(0xb, 1, 0),
            entry(0x8000_0008, 0, 0x3030),
            entry(0x8000_001e, 0, 0),
        ])
        .unwrap()
    }

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn topology_is_this_machines() {
        let id = for_vcpu(&supported(), 2, 3);
        assert_eq!(leaf(&id, 1, 0).ebx >> 16, 0x204);
        assert_ne!(leaf(&id, 1, 0).ecx & LEAF1_ECX_HYPERVISOR, 0);
        assert_eq!(leaf(&id, 0xb, 1).ebx, 3);
        assert_eq!((leaf(&id, 0xb, 0).edx, leaf(&id, 0xb, 1).eax), (2, 2));
        assert_eq!(leaf(&id, 0x8000_0008, 0).ecx, 0x2002);
        assert_eq!(leaf(&id, 4, 3).eax >> 14 & 0xfff, 2, "the last level cache is shared");
        assert_eq!(leaf(&id, 4, 0).eax >> 14 & 0xfff, 0, "the first level is not");
    }

    #[test]
    fn one_vcpu_has_no_siblings() {
        let id = for_vcpu(&supported(), 0, 1);
        assert_eq!(leaf(&id, 1, 0).edx & LEAF1_EDX_HTT, 0);
        assert_eq!(leaf(&id, 0xb, 1).ebx, 1);
    }
}
