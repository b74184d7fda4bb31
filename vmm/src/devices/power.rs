//! Power of a hardware-reduced ACPI machine: sleep control and status (ACPI 6.5, 4.8.3.7), and the reset register (4.8.3.6).

use std::sync::Arc;

use crate::bus::Registers;
use crate::ending::{Ending, Outcome};

/// First port of the block; it has [`LEN`].
pub const PORT: u64 = 0x600;
/// Ports in the block.
pub const LEN: u64 = 4;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// What resets when written to the reset register.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5, as `\_S5` names it.
pub const S5: u8 = 5;
const SLP_EN: u8 = 1 << 5;

/// The keyboard controller's command port, and its command that pulses the reset line.
pub const KEYBOARD_PORT: u64 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// Where a BIOS has its reset entry, F000:FFF0. Linux, told that hardware is reduced, wants to reset by EFI; without
/// one it jumps here in real mode (arch/x86/kernel/reboot.c, BOOT_BIOS), whatever the reset register says.
pub const RESET_ENTRY: u64 = 0xf_fff0;
/// What is there: `mov dx, PORT + RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp $-1`, in 16-bit code.
pub const RESET_CODE: [u8; 9] = [0xba, 0x02, 0x06, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
const _: () = assert!(PORT + RESET == 0x602, "RESET_CODE names the port");

/// The register block at [`PORT`].
pub struct Power(pub Arc<Ending>);

impl Registers for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SLEEP_CONTROL, [v]) if v & SLP_EN != 0 && (v >> 2) & 7 == S5 => self.0.set(Outcome::PowerOff),
            (RESET, [RESET_VALUE]) => self.0.set(Outcome::Reset),
            _ => {}
        }
    }
}

/// The keyboard controller's port without a keyboard: it only resets.
pub struct KeyboardReset(pub Arc<Ending>);

impl Registers for KeyboardReset {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data == [KEYBOARD_RESET] {
            self.0.set(Outcome::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(offset: u64, data: &[u8]) -> Option<Outcome> {
        let ending = Arc::new(Ending::default());
        Power(ending.clone()).write(offset, data);
        ending.get()
    }

    #[test]
    fn only_s5_and_the_reset_value_end_the_machine() {
        assert_eq!(after(SLEEP_CONTROL, &[S5 << 2 | SLP_EN]), Some(Outcome::PowerOff));
        assert_eq!(after(SLEEP_CONTROL, &[S5 << 2]), None);
        assert_eq!(after(SLEEP_CONTROL, &[3 << 2 | SLP_EN]), None);
        assert_eq!(after(SLEEP_CONTROL, &[S5 << 2 | SLP_EN, 0]), None);
        assert_eq!(after(RESET, &[RESET_VALUE]), Some(Outcome::Reset));
        assert_eq!(after(RESET, &[0]), None);
    }
}
