//! What a machine is on x86_64: what a vCPU believes about itself, and how it stands before its first instruction.

pub mod cpuid;
pub mod regs;
