//! One virtual machine: memory, vCPUs, PCI, devices, boot.
pub mod config;
pub mod virtio;
