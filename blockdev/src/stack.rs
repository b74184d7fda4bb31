//! A volume that is written: its top layer, on sealed ones. A new top layer keeps what was there until then.
//!
//! ```text
//!   cut     top ─► unsealed     a new, empty top lies on it: an instant, whatever the size
//!   seal    unsealed ─► sealed  once all that was written to it is durable
//! ```

use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, Instant};

use crate::later::Moving;
use crate::qcow2::{Chain, PATIENCE, Sealed, slow};
use crate::store::Store;
use crate::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Key, Later, Qcow2Disk, Result};

/// What lies under a top layer.
#[derive(Clone, Default)]
pub(crate) struct Under {
    /// The top one first.
    pub(crate) sealed: Vec<Arc<Sealed>>,
    pub(crate) bottom: Option<Arc<dyn Disk>>,
}

impl Under {
    /// As one disk; `None` when there is nothing.
    pub(crate) fn disk(&self) -> Result<Option<Arc<dyn Disk>>> {
        match self.sealed.is_empty() {
            true => Ok(self.bottom.clone()),
            false => Ok(Some(Arc::new(Chain::new(self.sealed.clone(), self.bottom.clone())?))),
        }
    }
}

#[derive(Clone)]
struct Unsealed {
    layer: Arc<Qcow2Disk>,
    store: Arc<dyn Store>,
    /// Held by reads from before the cut. They may be of clusters that a merge uses anew, once it is sealed.
    asked: Weak<()>,
}

struct State {
    top: Arc<Qcow2Disk>,
    /// The layer that was the top, until it is sealed.
    unsealed: Option<Unsealed>,
    /// Held by reads that wait for the host's disk; another one from each cut on.
    asked: Moving,
    store: Arc<dyn Store>,
    /// The top layer's, and that of those to come.
    key: Option<Key>,
    under: Under,
}

/// A volume's layers, the top one of which is written.
///
/// Requests hold the state while they read and write, so that a cut falls between them.
pub struct Stack(RwLock<State>);

impl Stack {
    pub(crate) fn open(file: File, key: Option<Key>, under: Under) -> Result<Stack> {
        crate::store::lock(&file, false)?;
        Stack::with_key(Arc::new(file), key, under.sealed, under.bottom)
    }

    /// A top layer on any store, without a lock, on sealed layers (the top one first) and a bottom.
    ///
    /// # Errors
    /// Those of [`Qcow2Disk::on`].
    pub fn on(
        store: Arc<dyn Store>,
        sealed: Vec<Arc<Sealed>>,
        bottom: Option<Arc<dyn Disk>>,
    ) -> Result<Stack> {
        Stack::with_key(store, None, sealed, bottom)
    }

    /// As [`on`](Stack::on), where the top layer is encrypted with `key`. So are the new ones that it is given.
    ///
    /// # Errors
    /// Those of [`Qcow2Disk::with_key`].
    pub fn with_key(
        store: Arc<dyn Store>,
        key: Option<Key>,
        sealed: Vec<Arc<Sealed>>,
        bottom: Option<Arc<dyn Disk>>,
    ) -> Result<Stack> {
        let under = Under { sealed, bottom };
        let top = Arc::new(Qcow2Disk::with_key(store.clone(), under.disk()?, key.as_ref(), false)?);
        Ok(Stack(RwLock::new(State { top, unsealed: None, asked: Moving::default(), store, key, under })))
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all layers under the top one are sealed.
    pub fn is_sealed(&self) -> bool {
        self.state().unsealed.is_none()
    }

    /// Makes the layer that was cut off last durable and seals it. Requests go on meanwhile.
    ///
    /// # Errors
    /// Those of [`Disk::flush`]. It is not sealed then; one that [`Failed`](DiskErrorKind::Failed) never will be. `Busy`: reads from
    /// before the cut are still being waited for.
    pub fn seal(&self) -> Result<()> {
        let Some(Unsealed { layer: old, store, asked }) = self.state().unsealed.clone() else {
            return Ok(());
        };
        old.flush()?;
        let until = Instant::now() + PATIENCE;
        while asked.strong_count() > 0 {
            if Instant::now() > until {
                return Err(slow());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let sealed = Arc::new(old.sealed()?);
        // Others may read it from now on.
        store.share()?;
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if state.unsealed.as_ref().is_none_or(|have| !Arc::ptr_eq(&have.layer, &old)) {
            return Ok(());
        }
        let mut under = state.under.clone();
        under.sealed.insert(0, sealed);
        if let Some(disk) = under.disk()? {
            state.top.set_base(disk)?;
        }
        state.under = under;
        state.unsealed = None;
        Ok(())
    }

    /// Lays the top layer on other files that hold the same bytes as what it lies on, the top one first.
    ///
    /// # Errors
    /// `Busy` while a layer is not sealed, `Format`, `Io`; nothing changed.
    pub fn rebase(&self, layers: Vec<crate::Layer>) -> Result<()> {
        let Under { sealed, bottom } = crate::layers::under(layers)?;
        self.rebase_on(sealed, bottom)
    }

    /// As [`rebase`](Stack::rebase), on layers that are open.
    ///
    /// # Errors
    /// Those of [`rebase`](Stack::rebase).
    pub fn rebase_on(&self, sealed: Vec<Arc<Sealed>>, bottom: Option<Arc<dyn Disk>>) -> Result<()> {
        let under = Under { sealed, bottom };
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        unsealed(&state)?;
        let none = || DiskError::format("a disk that lies on something cannot be laid on nothing");
        let disk = under.disk()?.ok_or_else(none)?;
        state.top.set_base(disk)?;
        state.under = under;
        Ok(())
    }
}

fn unsealed(state: &State) -> Result<()> {
    let context = "the layer that was cut off last is not durable yet; try again";
    match state.unsealed {
        Some(_) => Err(DiskError { kind: DiskErrorKind::Busy, context: context.into(), source: None }),
        None => Ok(()),
    }
}

/// Gives each of these disks a new top layer, a volume that [`create`](crate::qcow2::create) just made (or
/// [`create_encrypted`](crate::qcow2::create_encrypted), with the key of the top one that is there), all at one instant:
/// whatever was written before is in the layers beneath, and what is written from then on is not. Nobody waits longer for
/// it than requests take that are under way.
///
/// # Errors
/// `Busy` while the last cut of one is not sealed, `Failed` where it is in doubt; `Format`, `Key`, `Io` of a new layer. Nothing changed then.
pub fn cut(cuts: Vec<(&Stack, Arc<dyn Store>)>) -> Result<()> {
    // Two at once could wait for each other.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut tops = Vec::new();
    for (stack, store) in &cuts {
        let state = stack.state();
        unsealed(&state)?;
        state.top.usable()?;
        let key = state.key.as_ref();
        // Whoever made it may not know yet how large the disk has become.
        let top = Qcow2Disk::with_key(store.clone(), None, key, false)?;
        if top.size() < state.top.size() {
            top.grow(state.top.size())?;
        }
        drop(top);
        let top = Qcow2Disk::with_key(store.clone(), Some(state.top.clone()), key, false)?;
        tops.push(Arc::new(top));
    }
    let mut states = Vec::new();
    for (stack, _) in &cuts {
        states.push(stack.0.write().unwrap_or_else(PoisonError::into_inner));
    }
    for (state, top) in states.iter().zip(&tops) {
        if state.top.size() > top.size() {
            let (size, new) = (state.top.size(), top.size());
            return Err(DiskError::format(format!("a layer of {new} bytes cannot lie on one of {size}")));
        }
    }
    for ((state, top), (_, store)) in states.iter_mut().zip(tops).zip(cuts) {
        let layer = std::mem::replace(&mut state.top, top);
        let store = std::mem::replace(&mut state.store, store);
        let asked = Arc::downgrade(&std::mem::take(&mut state.asked));
        state.unsealed = Some(Unsealed { layer, store, asked });
    }
    Ok(())
}

impl Disk for Stack {
    fn size(&self) -> u64 {
        self.state().top.size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn parallelism(&self) -> usize {
        self.state().top.parallelism()
    }

    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.state().top.read_vectored(offset, bufs) }
    }

    unsafe fn read_or_later(&self, offset: u64, bufs: &[IoBufMut], later: &mut Vec<Later>) -> Result<()> {
        let (state, before) = (self.state(), later.len());
        // SAFETY: the caller's promise.
        unsafe { state.top.read_or_later(offset, bufs, later) }?;
        later.iter_mut().skip(before).for_each(|piece| piece.hold(&state.asked));
        Ok(())
    }

    unsafe fn write_vectored(&self, offset: u64, bufs: &[IoBuf]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.state().top.write_vectored(offset, bufs) }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.state().top.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.state().top.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        // It may take long, and a cut does not wait for it.
        let (top, unsealed) = {
            let state = self.state();
            (state.top.clone(), state.unsealed.clone())
        };
        if let Some(old) = unsealed {
            old.layer.flush()?;
        }
        top.flush()
    }

    fn grow(&self, new_size: u64) -> Result<()> {
        self.state().top.grow(new_size)
    }

    fn zeros_at(&self, offset: u64) -> Result<u64> {
        self.state().top.zeros_at(offset)
    }
}
