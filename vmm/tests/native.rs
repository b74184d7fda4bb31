//! Payloads of a few instructions on the local /dev/kvm: real exits, a real console, real ends. They are short enough
//! for a KVM that emulates each instruction; where there is no /dev/kvm they say so and pass.

mod support;

use std::time::Duration;

use hutch_vmm::config::End;
use support::{goes_on, run, run_for, run_with, stands_still};

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

#[test]
fn a_panicked_kernel_that_is_paused_keeps_its_last_words() {
    // It says more and more, so that whoever looks sees whether it lives.
    let dots = [&out8(0x3f8, b'.')[..], &[0xeb, 0xf7]].concat();
    let code = [print("Kernel panic - not syncing: x\n"), dots].concat();
    run_with(
        &code,
        |_| (),
        |handle, written| {
            goes_on(written, 30);
            handle.pause();
            // Longer than such a kernel is given.
            std::thread::sleep(Duration::from_millis(5600));
            let before = stands_still(written);
            handle.resume();
            goes_on(written, before);
        },
    );
}
