//! Guest memory: one memfd, mapped once per region, shared so that another process may map it too.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::plan::{Plan, Region};

/// Why guest memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The memfd could not be made or sized.
    #[error("{id}: cannot reserve {bytes} bytes of guest memory{hint}")]
    Reserve {
        /// The machine.
        id: String,
        /// Bytes wanted.
        bytes: u64,
        /// What to do next.
        hint: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The memory could not be mapped.
    #[error("{id}: cannot map {bytes} bytes of guest memory: {why}; ask for less memory")]
    Map {
        /// The machine.
        id: String,
        /// Bytes wanted.
        bytes: u64,
        /// vm-memory's words.
        why: String,
    },
}

/// Reserves and maps the RAM of `plan`. Pages come into being when the guest touches them.
pub fn allocate(plan: &Plan) -> Result<GuestMemoryMmap<()>, MemoryError> {
    let config = plan.config();
    let bytes: u64 = plan.ram().iter().map(|r| r.len).sum();
    let id = || config.id.clone();
    let (huge, hint) = if config.hugepages {
        (MFdFlags::MFD_HUGETLB, "; reserve huge pages (sysctl vm.nr_hugepages) or leave hugepages off")
    } else {
        (MFdFlags::empty(), "")
    };
    let reserve = |source| MemoryError::Reserve { id: id(), bytes, hint, source };
    let fd: OwnedFd =
        memfd_create(c"hutch-guest", MFdFlags::MFD_CLOEXEC | huge).map_err(|e| reserve(e.into()))?;
    let file = File::from(fd);
    file.set_len(bytes).map_err(reserve)?;
    let file = std::sync::Arc::new(file);
    let mut offset = 0;
    let ranges: Vec<_> = plan
        .ram()
        .iter()
        .map(|&Region { start, len }| {
            let at = FileOffset::from_arc(file.clone(), offset);
            offset += len;
            (GuestAddress(start), len as usize, Some(at))
        })
        .collect();
    GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|e| MemoryError::Map {
        id: id(),
        bytes,
        why: e.to_string(),
    })
}
