//! AMIs: templates, import, and reading the boot configuration off a guest disk.
//!
//! ```text
//!   import         a file with a disk, read by a confined process, becomes a template
//!   foreign        disks as other programs keep them
//!   kernels        a kernel or a RAM disk of one's own, copied, digested and looked at
//!   store          all of them, which nobody can write, each with its record
//!   partition      GPT, MBR or none: where on the disk file systems are
//!   boot/disk      finds the configuration on ext2/3/4, loads what it names
//!   boot/grub      grub.cfg, as grub-mkconfig writes it ┐
//!   boot/bls       Boot Loader Specification entries    ├─► BootEntry: kernel, initrds, command line
//!   boot/extlinux  syslinux's configuration             ┘
//! ```
//!
//! Every byte read here was written by a guest or came with a downloaded image: all work is bounded, and what is
//! not understood is an error that names it, never a panic.

#![forbid(unsafe_code)]

pub mod boot;
pub mod foreign;
pub mod import;
pub mod kernels;
pub mod partition;
pub mod store;
