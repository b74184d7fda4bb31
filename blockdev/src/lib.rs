//! What a guest disk is made of: bytes, clusters and flushes.
//!
//! ```text
//!   virtio-blk (vmm)            import, boot reading (imagestore)
//!          └──────────┬──────────────────┘
//!                   Disk                     the contract, `disk.rs`
//!             ┌───────┴────────┐
//!          RawDisk        Qcow2Disk ── base: Disk (read only, opened by us, by id)
//! ```
//!
//! Nothing here knows about instances or KVM, and nothing here opens a path that an image's header names.

pub mod disk;
pub use disk::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Result};
