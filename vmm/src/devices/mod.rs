//! The few legacy devices a stock kernel still wants on its ports.
//!
//! ```text
//!   0x0064  reset by the keyboard controller's port, for kernels without ACPI
//!   0x0070  rtc.rs     CMOS clock
//!   0x00f4  exit.rs    a guest command's exit code, and the mark of user space
//!   0x03f8  serial.rs  16550A
//!   0x0600  power.rs   ACPI sleep control and status, reset
//!   0x0610  hotplug.rs PCI slots that are filled and emptied
//! ```

pub mod exit;
pub mod hotplug;
pub mod power;
pub mod rtc;
pub mod serial;
