//! One virtual machine: memory, vCPUs, PCI, devices, boot.
//!
//! ```text
//!   MachineConfig (asked) ──► Plan (checked, laid out) ──► Machine (running) ──► Report
//!                                                             │
//!                     memory · boot · x86_64 · vcpu · bus ────┴──── devices · board (pci · virtio) · console
//! ```
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod board;
pub mod boot;
pub mod bus;
pub mod complaint;
pub mod config;
pub mod console;
pub mod control;
pub mod counts;
pub mod devices;
pub mod drives;
pub mod ending;
pub mod gate;
pub mod launch;
pub mod machine;
pub mod memory;
pub mod passing;
pub mod pci;
pub mod plan;
pub mod probe;
pub mod rate;
pub mod secret;
pub mod vcpu;
pub mod virtio;
pub mod x86_64;
