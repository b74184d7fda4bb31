//! Registers of vCPU 0 at the kernel's entry. The 64-bit boot protocol (boot.rst) wants long mode, the low 4 GiB identity
//! mapped, interrupts off, RSI at the zero page; PVH (Xen, docs/misc/pvh.pandoc) wants flat protected mode without
//! paging, EBX at hvm_start_info. The other vCPUs wait for their SIPI in KVM.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::boot::{Loaded, Protocol};

const GDT: u64 = 0x500;
/// One PML4, one page directory pointer table, four page directories of 2 MiB pages.
const PML4: u64 = 0x9000;
const PDPT: u64 = PML4 + 0x1000;
const PD: u64 = PDPT + 0x1000;
/// boot.rst: __BOOT_CS and __BOOT_DS.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
/// Flat 4 GiB segments (AMD APM volume 2, 4.8): 64-bit code, then data, both present, accessed.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;

const PRESENT_WRITE: u64 = 3;
const PAGE_2M: u64 = 1 << 7;
const CR0_PE_ET: u64 = 1 | (1 << 4);
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Writes the GDT and the page tables that [`sregs`] points to.
pub fn write_tables(memory: &GuestMemoryMmap<()>, protocol: Protocol) -> Result<(), GuestMemoryError> {
    let code = match protocol {
        Protocol::Linux64 => CODE64,
        Protocol::Pvh => CODE32,
    };
    for (i, descriptor) in [0, 0, code, DATA].into_iter().enumerate() {
        memory.write_obj::<u64>(descriptor, GuestAddress(GDT + 8 * i as u64))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITE, GuestAddress(PML4))?;
    for gib in 0..4 {
        let pd = PD + gib * 0x1000;
        memory.write_obj(pd | PRESENT_WRITE, GuestAddress(PDPT + 8 * gib))?;
        for page in 0..512 {
            let address = (gib << 30) | (page << 21);
            memory.write_obj(address | PRESENT_WRITE | PAGE_2M, GuestAddress(pd + 8 * page))?;
        }
    }
    Ok(())
}

/// Turns the registers KVM gave a fresh vCPU into those of vCPU 0 at the kernel's entry.
pub fn sregs(mut s: kvm_sregs, protocol: Protocol) -> kvm_sregs {
    let segment = |selector, type_, l, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db,
        g: 1,
        ..Default::default()
    };
    let long = u8::from(protocol == Protocol::Linux64);
    s.cs = segment(BOOT_CS, 0xb, long, 1 - long);
    let data = segment(BOOT_DS, 0x3, 0, 1);
    (s.ds, s.es, s.fs, s.gs, s.ss) = (data, data, data, data, data);
    s.gdt.base = GDT;
    s.gdt.limit = 4 * 8 - 1;
    s.idt.limit = 0;
    s.cr0 |= CR0_PE_ET;
    match protocol {
        Protocol::Linux64 => {
            s.cr3 = PML4;
            s.cr4 |= CR4_PAE;
            s.cr0 |= CR0_PG;
            s.efer |= EFER_LME_LMA;
        }
        // A busy 32-bit TSS at 0, as the protocol has it.
        Protocol::Pvh => {
            s.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
        }
    }
    s
}

/// General registers of vCPU 0 at the kernel's entry.
pub fn regs(loaded: &Loaded) -> kvm_regs {
    let regs = kvm_regs { rip: loaded.entry.0, rflags: 2, ..Default::default() };
    match loaded.protocol {
        Protocol::Linux64 => kvm_regs { rsi: loaded.info.0, ..regs },
        Protocol::Pvh => kvm_regs { rbx: loaded.info.0, ..regs },
    }
}

/// Model specific registers that firmware would set: fast strings, and write-back as the default memory type.
pub const MSRS: [kvm_msr_entry; 2] =
    [msr(MSR_MISC_ENABLE, 1), msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];

const fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, reserved: 0, data }
}
