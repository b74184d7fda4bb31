//! What a disk lies on. It may be exchanged for something else of the same bytes while the disk is in use.

use std::sync::{Arc, PoisonError, RwLock};

use crate::{Disk, DiskError, Result};

/// The base of a disk, if it has one.
pub(super) struct Base(RwLock<Option<Arc<dyn Disk>>>);

impl Base {
    /// The base of a disk of `size` bytes.
    pub(super) fn new(base: Option<Arc<dyn Disk>>, size: u64) -> Result<Base> {
        if let Some(base) = &base {
            fits(&**base, size)?;
        }
        Ok(Base(RwLock::new(base)))
    }

    pub(super) fn get(&self) -> Option<Arc<dyn Disk>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn size(&self) -> u64 {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |base| base.size())
    }

    /// Whether there is one never changes: entries mean something else then.
    pub(super) fn set(&self, base: Arc<dyn Disk>, size: u64) -> Result<()> {
        fits(&*base, size)?;
        let mut have = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if have.is_none() {
            return Err(DiskError::format("a disk that lies on nothing cannot be laid on something"));
        }
        *have = Some(base);
        Ok(())
    }
}

fn fits(base: &dyn Disk, size: u64) -> Result<()> {
    let base = base.size();
    match base > size {
        true => {
            Err(DiskError::format(format!("a disk of {size} bytes lies on a base of {base}; make it larger")))
        }
        false => Ok(()),
    }
}
