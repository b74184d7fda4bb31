//! What a machine is on x86_64: what a vCPU believes about itself, how it stands before its first instruction, and
//! the tables in which firmware would describe the machine.

pub mod acpi;
pub mod cpuid;
pub mod regs;
pub mod slots;
pub mod smbios;
