//! One virtual machine: memory, vCPUs, PCI, devices, boot.
//!
//! ```text
//!   MachineConfig (asked) ──► Plan (checked, laid out) ──► Machine (running)
//! ```
pub mod boot;
pub mod config;
pub mod memory;
pub mod plan;
pub mod virtio;
