//! What a guest disk is made of: bytes, clusters and flushes.
//!
//! ```text
//!   virtio-blk (vmm)            import, boot reading (imagestore)
//!          └──────────┬──────────────────┘
//!                   Disk                     the contract, `disk.rs`
//!             ┌───────┴────────┐
//!          RawDisk           Stack           a volume: a top layer on sealed ones, `stack.rs`
//!             │            ┌───┴────┐
//!             │        Qcow2Disk  Chain      the layer that is written; those that are only read, looked through at once
//!             └───────┬────┴────────┘
//!                   Store                    one file: whole transfers, holes, durability, lock
//! ```
//!
//! Nothing here knows about instances or KVM, and nothing here opens a path that an image's header names.

pub mod crypt;
mod cursor;
pub mod disk;
pub mod later;
pub mod layers;
pub mod qcow2;
pub mod raw;
pub mod stack;
pub mod store;

pub use crypt::Key;
pub use disk::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Result, SECTOR};
pub use later::Later;
pub use layers::{Format, Layer, Opened, open_layers};
pub use qcow2::Qcow2Disk;
pub use raw::RawDisk;
pub use stack::Stack;
