//! A driver of some eighty instructions on the local /dev/kvm: it finds the entropy device by ECAM, sets up its queue and its
//! MSI-X vector, and is interrupted. Where there is no /dev/kvm it says so and passes.

mod support;

use std::os::unix::fs::FileExt;

use hutch_vmm::config::End;
use iced_x86::code_asm::*;

/// Where the payload keeps its things, in guest memory.
const STACK: u64 = 0x28_0000;
const DESCRIPTORS: u64 = 0x30_0000;
const AVAILABLE: u64 = 0x30_1000;
const USED: u64 = 0x30_2000;
const BUFFER: u64 = 0x30_4000;
const IDT: u64 = 0x29_0000;
const IDTR: u64 = 0x29_1000;
/// Interrupts so far.
const COUNT: u64 = 0x29_1100;
/// Entries of the queue, and the most bytes that the device gives to one request.
const QUEUE: u32 = 64;
const MOST: u32 = 64 << 10;

const ECAM: u64 = hutch_vmm::plan::ECAM.start;
const LOCAL_APIC: u64 = 0xfee0_0000;
const VECTOR: u32 = 0x40;
/// Vendor and device of a modern entropy device (virtio 1.2, 4.1.2).
const ENTROPY: u32 = 0x1044_1af4;
/// Offsets in the common configuration (virtio 1.2, 4.1.4.3), and where hutch has the doorbells and the MSI-X table.
const DRIVER_FEATURE_SELECT: i32 = 0x08;
const DRIVER_FEATURE: i32 = 0x0c;
const STATUS: i32 = 0x14;
const QUEUE_SELECT: i32 = 0x16;
const QUEUE_SIZE: i32 = 0x18;
const QUEUE_VECTOR: i32 = 0x1a;
const QUEUE_ENABLE: i32 = 0x1c;
const QUEUE_DESCRIPTORS: i32 = 0x20;
const QUEUE_DRIVER: i32 = 0x28;
const QUEUE_DEVICE: i32 = 0x30;
const DOORBELL: i32 = 0x1000;
const TABLE: i32 = 0x2000;

/// Stores that a compiler would make.
fn put64(a: &mut CodeAssembler, at: u64, value: u64) -> Result<(), IcedError> {
    a.mov(rdi, at)?;
    a.mov(rax, value)?;
    a.mov(qword_ptr(rdi), rax)
}

/// Asks for 16 random bytes and exits with 42 after the interrupt, if all is as it is to be; or asks `for_ever`, a whole
/// queue of long requests at a time and a dot after each, so that the device is at work nearly always.
fn driver(for_ever: bool) -> Result<Vec<u8>, IcedError> {
    let (batch, bytes) = if for_ever { (QUEUE, MOST) } else { (1, 16) };
    let mut a = CodeAssembler::new(64)?;
    let (mut handler, mut scan, mut found) = (a.create_label(), a.create_label(), a.create_label());
    let (mut capability, mut msix) = (a.create_label(), a.create_label());
    let (mut ask, mut wait, mut wrong) = (a.create_label(), a.create_label(), a.create_label());
    let mut interrupt = a.create_label();
    a.mov(rsp, STACK)?;
    // An interrupt gate of 64 bits (Intel SDM 3, 6.14.1).
    a.lea(rax, ptr(handler))?;
    a.mov(rdi, IDT + u64::from(VECTOR) * 16)?;
    a.mov(word_ptr(rdi), ax)?;
    a.mov(word_ptr(rdi + 2), 0x10)?;
    a.mov(word_ptr(rdi + 4), 0x8e00)?;
    a.shr(rax, 16)?;
    a.mov(word_ptr(rdi + 6), ax)?;
    a.shr(rax, 16)?;
    a.mov(dword_ptr(rdi + 8), eax)?;
    put64(&mut a, IDTR, 0xfff)?;
    put64(&mut a, IDTR + 2, IDT)?;
    a.mov(rdi, IDTR)?;
    a.lidt(ptr(rdi))?;
    // The local APIC takes interrupts (spurious vector register, SDM 3, 10.9).
    a.mov(rdi, LOCAL_APIC + 0xf0)?;
    a.mov(dword_ptr(rdi), 0x1ff)?;

    a.mov(rsi, ECAM)?;
    a.set_label(&mut scan)?;
    a.cmp(dword_ptr(rsi), ENTROPY as i32)?;
    a.je(found)?;
    a.add(rsi, 0x8000)?;
    a.jmp(scan)?;
    a.set_label(&mut found)?;
    a.mov(ebx, dword_ptr(rsi + 0x10))?;
    a.and(ebx, !0xf)?;
    a.jz(wrong)?;
    a.mov(word_ptr(rsi + 4), 6)?;
    a.movzx(eax, byte_ptr(rsi + 0x34))?;
    a.set_label(&mut capability)?;
    a.cmp(byte_ptr(rsi + rax), 0x11)?;
    a.je(msix)?;
    a.movzx(eax, byte_ptr(rsi + rax + 1))?;
    a.jmp(capability)?;
    a.set_label(&mut msix)?;
    a.mov(word_ptr(rsi + rax + 2), 0x8000)?;
    a.mov(dword_ptr(rbx + TABLE), LOCAL_APIC as u32 as i32)?;
    a.mov(dword_ptr(rbx + TABLE + 4), 0)?;
    a.mov(dword_ptr(rbx + TABLE + 8), VECTOR)?;
    a.mov(dword_ptr(rbx + TABLE + 12), 0)?;

    a.mov(byte_ptr(rbx + STATUS), 3)?;
    a.mov(dword_ptr(rbx + DRIVER_FEATURE_SELECT), 1)?;
    a.mov(dword_ptr(rbx + DRIVER_FEATURE), 1)?;
    a.mov(byte_ptr(rbx + STATUS), 0xb)?;
    a.mov(word_ptr(rbx + QUEUE_SELECT), 0)?;
    a.mov(word_ptr(rbx + QUEUE_SIZE), QUEUE)?;
    a.mov(word_ptr(rbx + QUEUE_VECTOR), 0)?;
    for (at, ring) in [(QUEUE_DESCRIPTORS, DESCRIPTORS), (QUEUE_DRIVER, AVAILABLE), (QUEUE_DEVICE, USED)] {
        a.mov(dword_ptr(rbx + at), ring as u32)?;
        a.mov(dword_ptr(rbx + at + 4), 0)?;
    }
    a.mov(word_ptr(rbx + QUEUE_ENABLE), 1)?;
    a.mov(byte_ptr(rbx + STATUS), 0xf)?;
    // One descriptor, which the device writes; every entry of the ring is it.
    put64(&mut a, DESCRIPTORS, BUFFER)?;
    put64(&mut a, DESCRIPTORS + 8, u64::from(bytes) | 2 << 32)?;
    a.sti()?;

    a.xor(ecx, ecx)?;
    a.set_label(&mut ask)?;
    a.add(ecx, batch)?;
    a.mov(rdi, AVAILABLE)?;
    a.mov(word_ptr(rdi + 2), cx)?;
    a.mov(word_ptr(rbx + DOORBELL), 0)?;
    if !for_ever {
        // Of a batch, several interrupts may become one: there only the ring tells.
        a.mov(rdi, COUNT)?;
        a.set_label(&mut interrupt)?;
        a.pause()?;
        a.cmp(dword_ptr(rdi), ecx)?;
        a.jne(interrupt)?;
    }
    a.mov(rdi, USED)?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(word_ptr(rdi + 2), cx)?;
    a.jne(if for_ever { wait } else { wrong })?;
    a.cmp(dword_ptr(rdi + 8), bytes)?;
    a.jne(wrong)?;
    if for_ever {
        a.mov(dx, 0x3f8)?;
        a.mov(al, i32::from(b'.'))?;
        a.out(dx, al)?;
        a.jmp(ask)?;
    }
    // Sixteen random bytes are zeros once in 2^128 times.
    a.mov(rdi, BUFFER)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.or(rax, qword_ptr(rdi + 8))?;
    a.jz(wrong)?;
    a.mov(dx, 0xf4)?;
    a.mov(al, 42)?;
    a.out(dx, al)?;
    a.set_label(&mut wrong)?;
    a.mov(dx, 0xf4)?;
    a.mov(al, 1)?;
    a.out(dx, al)?;

    a.set_label(&mut handler)?;
    a.push(rdi)?;
    a.mov(rdi, COUNT)?;
    a.inc(dword_ptr(rdi))?;
    a.mov(rdi, LOCAL_APIC + 0xb0)?;
    a.mov(dword_ptr(rdi), 0)?;
    a.pop(rdi)?;
    a.iretq()?;
    a.assemble(0x10_0200)
}

#[test]
fn a_device_found_by_ecam_interrupts_by_msix() {
    let Some((report, said)) = support::run(&driver(false).unwrap(), |_| {}) else { return };
    assert_eq!(report.end, End::Command { code: 42 }, "{said}");
}

#[test]
fn a_paused_machine_serves_no_queue_and_goes_on_afterwards() {
    // A size of its own, by which its memory is found among those of other tests in this process.
    const MIB: u64 = 33;
    let change = |c: &mut hutch_vmm::config::MachineConfig| c.memory_mib = MIB;
    let report = support::run_with(&driver(true).unwrap(), change, |handle, written| {
        support::goes_on(written, 0);
        let memory = support::guest_memory(MIB << 20);
        // The rings and the buffer, as they are now.
        let held = || {
            let mut bytes = vec![0; (BUFFER - DESCRIPTORS) as usize + MOST as usize];
            memory.read_exact_at(&mut bytes, DESCRIPTORS).unwrap();
            bytes
        };
        for _ in 0..5 {
            handle.pause();
            let then = held();
            let before = support::stands_still(written);
            assert!(held() == then, "the device works while the machine is paused");
            handle.resume();
            // Not only what was under way: more batches.
            support::goes_on(written, before + 3);
        }
    });
    if let Some(report) = report {
        assert_eq!(report.end, End::Killed);
    }
}
