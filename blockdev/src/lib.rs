//! What a guest disk is made of: bytes, clusters and flushes.
//!
//! ```text
//!   virtio-blk (vmm)            import, boot reading (imagestore)
//!          └──────────┬──────────────────┘
//!                   Disk                     the contract, `disk.rs`
//!             ┌───────┴────────┐
//!          RawDisk        Qcow2Disk ── base: Disk (read only, opened by us, by id)
//!             └───────┬────────┘
//!                   Store                    one file: whole transfers, holes, durability, lock
//! ```
//!
//! Nothing here knows about instances or KVM, and nothing here opens a path that an image's header names.

pub mod disk;
pub mod layers;
pub mod qcow2;
pub mod raw;
pub mod store;

pub use disk::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Result, SECTOR};
pub use layers::{Format, open_layers};
pub use qcow2::Qcow2Disk;
pub use raw::RawDisk;
