//! qcow2 images: read whatever qemu-img makes, write volumes that are laid out by [`layout`].
//!
//! ```text
//!   Qcow2Disk ── mapping (L1 → L2, cached in slices) ──► data in the file │ zeros │ compressed │ the base
//!        └────── volume: allocator and the order of metadata writes
//! ```
//!
//! Why not qcow2-rs for the data path: tried bare, it returned stale memory past a backing file's end, underflowed
//! reference counts of compressed clusters, ignored encryption and destroyed snapshots, and a hostile header crashed it
//! from safe code. The tests read headers with it beside our own gate, and data with qemu-img; the path a guest's bytes
//! take is here.
//!
//! One request at a time holds the metadata: it looks up, allocates and links. The bytes of clusters that are mapped move
//! outside of that, many at a time; each holds the `moving` of the time when it looked, and a cluster that was freed is used
//! anew only when nobody has one that is as old as that.

mod base;
mod cache;
mod chain;
mod check;
mod compressed;
mod header;
mod layout;
mod linked;
mod merge;
mod payload;
mod repair;
mod volume;

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use chain::{Chain, Sealed};
pub use check::{Checked, check};
pub use header::{Header, MAX_SIZE};
pub use layout::{create, create_encrypted};
pub use merge::{commit, pull};
pub use repair::{Repaired, repair};

use crate::crypt::Cipher;
use crate::cursor::{self, Cursor};
use crate::disk::{check_range, check_write};
use crate::later::{Moving, Room};
use crate::raw::total;
use crate::store::{Store, lock};
use crate::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Key, Later, Result};
use base::Base;
use cache::Cache;
use chain::zeros_below;
use payload::Payload;
use volume::Volume;

/// Bits of an L2 entry.
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Zeros are looked for in steps of so many bytes: each holds up who writes.
const LOOK: u64 = 1 << 30;

/// Where the bytes of a guest cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    /// Never written: the base's.
    Hole,
    /// Zeros, with the cluster that is still theirs, if any (0: none).
    Zero(u64),
    /// In the file, at this offset.
    Data(u64),
    /// Packed: the entry.
    Compressed(u64),
}

/// A qcow2 image, alone or on a base.
pub struct Qcow2Disk {
    inner: Mutex<Inner>,
    payload: Payload,
    base: Arc<Base>,
    size: AtomicU64,
    read_only: bool,
}

/// The file's way to the disk.
struct Syncs {
    store: Arc<dyn Store>,
    /// A sync failed. The kernel tells that once and forgets what it did not write: there is no second try, and no other one
    /// may pass meanwhile that began later.
    failed: Mutex<bool>,
}

impl Syncs {
    fn sync(&self) -> Result<()> {
        let context = "cannot flush the disk";
        self.try_sync().map_err(|e| DiskError {
            kind: DiskErrorKind::Io,
            context: context.into(),
            source: Some(e),
        })
    }

    fn try_sync(&self) -> std::io::Result<()> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if *failed {
            return Err(std::io::Error::other("an earlier flush failed"));
        }
        self.store.sync().inspect_err(|_| *failed = true)
    }
}

/// What a request holds.
struct Inner {
    store: Arc<dyn Store>,
    syncs: Arc<Syncs>,
    payload: Payload,
    /// Held by whoever moves bytes of clusters that were mapped when it was taken; another one from each commit on.
    moving: Moving,
    header: Header,
    l1: Vec<u64>,
    base: Arc<Base>,
    cache: Cache,
    /// For writing; `None` in images that are only read.
    volume: Option<Volume>,
    /// The cluster that was unpacked last.
    unpacked: Option<(u64, Vec<u8>)>,
    /// Where the file ends, in images that are only read.
    end: Option<u64>,
    /// A metadata write or a sync failed: what is on the disk is not known any more.
    failed: bool,
}

impl Qcow2Disk {
    /// Opens an image, which it locks; where it holds nothing, `base` is read (zeros past its end). To be
    /// written, the image must be a volume that [`create`] made; space that a crash left unlinked is freed.
    ///
    /// # Errors
    /// `Format` with the reason, `Busy` when another machine has it, `Io` from the host.
    pub fn open(file: File, base: Option<Arc<dyn Disk>>, read_only: bool) -> Result<Qcow2Disk> {
        lock(&file, read_only)?;
        Qcow2Disk::on(Arc::new(file), base, read_only)
    }

    /// An image on any store, without a lock.
    ///
    /// # Errors
    /// As [`Qcow2Disk::open`].
    pub fn on(store: Arc<dyn Store>, base: Option<Arc<dyn Disk>>, read_only: bool) -> Result<Qcow2Disk> {
        Qcow2Disk::with_key(store, base, None, read_only)
    }

    /// An image on any store, without a lock, whose guest's bytes are encrypted with `key`. What lies below has its own.
    ///
    /// # Errors
    /// As [`Qcow2Disk::open`]; `Key` when it is missing, another's, or of an image that is not encrypted.
    pub fn with_key(
        store: Arc<dyn Store>,
        base: Option<Arc<dyn Disk>>,
        key: Option<&Key>,
        read_only: bool,
    ) -> Result<Qcow2Disk> {
        let header = Header::read(&*store)?;
        let payload = Payload::new(store.clone(), cipher(&header, key)?);
        let l1 = read_l1(&*store, &header)?;
        let cache = Cache::new(header.cluster_bits);
        let volume = if read_only { None } else { Some(Volume::open(&*store, &header, &l1)?) };
        let base = Arc::new(Base::new(base, header.size)?);
        let file = store.size().map_err(|e| DiskError::io("find the image's size", e))?;
        let end = read_only.then_some(file);
        let size = AtomicU64::new(header.size);
        let syncs = Arc::new(Syncs { store: store.clone(), failed: Mutex::default() });
        let inner = Inner {
            store,
            syncs,
            payload: payload.clone(),
            moving: Moving::default(),
            header,
            l1,
            base: base.clone(),
            cache,
            volume,
            unpacked: None,
            end,
            failed: false,
        };
        Ok(Qcow2Disk { inner: Mutex::new(inner), payload, base, size, read_only })
    }

    /// Makes the disk smaller, behind which nothing was ever written: of one that is made before its size is known.
    ///
    /// # Errors
    /// `OutOfRange`; `Io`.
    pub fn shrink(&self, size: u64) -> Result<()> {
        let mut inner = self.writable(0, 0)?;
        inner.shrink(size)?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Lays it on something else, which must hold the same bytes.
    ///
    /// # Errors
    /// `Format`: it lay on nothing, or the new base is larger than the disk; nothing changed.
    pub fn set_base(&self, base: Arc<dyn Disk>) -> Result<()> {
        self.base.set(base, self.size())
    }

    /// Whether no error left the disk in doubt.
    ///
    /// # Errors
    /// `Failed`: one did.
    pub(crate) fn usable(&self) -> Result<()> {
        self.lock().alive()
    }

    /// The layer as it is on the disk, to be looked through: what was not flushed is not in it. Nobody may write any more.
    ///
    /// # Errors
    /// `Format`: hutch did not lay it out. `Failed`, `Io`.
    pub fn sealed(&self) -> Result<Sealed> {
        let mut inner = self.lock();
        inner.alive()?;
        // What was freed is punched while the file is still ours.
        let until = Instant::now() + PATIENCE;
        while !inner.reclaim()? {
            if Instant::now() > until {
                return Err(slow());
            }
            drop(inner);
            std::thread::sleep(Duration::from_millis(1));
            inner = self.lock();
        }
        inner.sync()?;
        inner.volume = None;
        let sealed =
            Sealed::new(inner.store.clone(), inner.payload.clone(), inner.header.clone(), inner.l1.clone())?;
        sealed.ok_or_else(|| DiskError::format("the image was not made by hutch, so it has no layers"))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writable(&self, offset: u64, len: u64) -> Result<MutexGuard<'_, Inner>> {
        check_write(self.read_only)?;
        check_range(offset, len, self.size())?;
        let inner = self.lock();
        inner.alive()?;
        Ok(inner)
    }

    /// # Safety
    /// As [`Disk::read_or_later`].
    unsafe fn read(&self, offset: u64, bufs: &[IoBufMut], mut room: Room<'_>) -> Result<()> {
        check_range(offset, total(bufs), self.size())?;
        let (mut at, end) = (offset, offset.saturating_add(total(bufs)));
        let mut cursor = Cursor::new(bufs);
        while at < end {
            let mut inner = self.lock();
            let cluster = inner.header.cluster();
            let (mapping, len) = inner.run(at, end)?;
            let (part, room) = (cursor.take(len), room.as_deref_mut());
            // SAFETY: the parts are of the caller's buffers; that holds for each of these.
            unsafe {
                match mapping {
                    Mapping::Hole => {
                        drop(inner);
                        read_base(self.base.get().as_ref(), at, &part, room)?;
                    }
                    Mapping::Zero(_) => {
                        drop(inner);
                        cursor::zero(&part);
                    }
                    Mapping::Data(host) => {
                        let moving = inner.moving.clone();
                        drop(inner);
                        let read = self.payload.read(host + at % cluster, at, &part, room, Some(&moving));
                        read.map_err(|e| DiskError::io("read the disk", e))?;
                    }
                    Mapping::Compressed(entry) => inner.read_packed(entry, at, &part)?,
                }
            }
            at += len;
        }
        Ok(())
    }

    /// Zeros for a part of a cluster.
    fn write_zero_bytes(&self, from: u64, to: u64) -> Result<()> {
        if from >= to || self.writable(from, to - from)?.is_zero(from)? {
            return Ok(());
        }
        let zeros = vec![0; (to - from) as usize];
        // SAFETY: the buffer is ours.
        unsafe { self.write_vectored(from, &[cursor::buffer(&zeros)]) }
    }
}

/// How long a layer that is to be sealed waits for who still reads it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// Somebody still reads it.
pub(crate) fn slow() -> DiskError {
    let context = "the host's disk has not answered reads from before the cut for 5 s; try again";
    DiskError { kind: DiskErrorKind::Busy, context: context.into(), source: None }
}

/// What a layer is encrypted with.
fn cipher(header: &Header, key: Option<&Key>) -> Result<Option<Arc<Cipher>>> {
    let wrong = match (key.map(Cipher::new), header.key_check) {
        (None, None) => return Ok(None),
        (Some(cipher), Some(check)) if cipher.check() == check => return Ok(Some(Arc::new(cipher))),
        (Some(_), Some(_)) => "the image is encrypted with another key than this one; give it its own",
        (None, Some(_)) => "the image is encrypted; give its key",
        (Some(_), None) => "the image is not encrypted, and there is a key for it; its record is wrong",
    };
    Err(DiskError::key(wrong))
}

/// The L1 table, every entry of it checked against the file.
fn read_l1(store: &dyn Store, header: &Header) -> Result<Vec<u64>> {
    let len = store.size().map_err(|e| DiskError::io("find the image's size", e))?;
    let mut bytes = vec![0; header.l1_entries as usize * 8];
    store.read_bytes(header.l1_offset, &mut bytes).map_err(|e| DiskError::io("read the L1 table", e))?;
    let entries = bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b));
    let check = |(index, entry): (usize, u64)| {
        let offset = entry & OFFSET;
        let known = entry & !(OFFSET | layout::COPIED) == 0;
        let fits = offset.checked_add(header.cluster()).is_some_and(|end| end <= len);
        if entry == 0 || known && fits && offset.is_multiple_of(header.cluster()) && offset != 0 {
            return Ok(offset);
        }
        Err(DiskError::format(format!(
            "entry {index} of the image's L1 table ({entry:#x}) points where no L2 table can be; the image is damaged"
        )))
    };
    entries.enumerate().map(check).collect()
}

impl Inner {
    fn alive(&self) -> Result<()> {
        let context =
            "an earlier error left the disk in doubt; stop the machine, check the host's disk, start again";
        match self.failed {
            true => Err(DiskError { kind: DiskErrorKind::Failed, context: context.into(), source: None }),
            false => Ok(()),
        }
    }

    /// Where guest cluster `index` is.
    fn mapping(&mut self, index: u64) -> Result<Mapping> {
        let (table, _) = self.place(index);
        let Some(&l2) = self.l1.get(table) else { return Ok(Mapping::Hole) };
        if l2 == 0 {
            return Ok(Mapping::Hole);
        }
        let entry = self.entry(index)?;
        if entry & COMPRESSED != 0 {
            if self.payload.encrypted() {
                let why =
                    format!("cluster {index} is compressed, and the image encrypted; the image is damaged");
                return Err(DiskError::format(why));
            }
            return Ok(Mapping::Compressed(entry));
        }
        let zero = if self.header.version >= 3 { ZERO } else { 0 };
        let offset = entry & OFFSET;
        let known = entry & !(OFFSET | layout::COPIED | zero) == 0;
        // Nothing lies at the header's place, so nothing is there alone.
        let nowhere = offset == 0 && entry & layout::COPIED != 0;
        if !known || nowhere || !offset.is_multiple_of(self.header.cluster()) {
            return Err(DiskError::format(format!(
                "the L2 entry of cluster {index} ({entry:#x}) has bits that mean nothing; the image is damaged"
            )));
        }
        Ok(match (entry & zero != 0, offset) {
            (true, offset) => Mapping::Zero(offset),
            (false, 0) => Mapping::Hole,
            (false, offset) if self.end.is_some_and(|end| offset >= end) => {
                return Err(DiskError::format(format!(
                    "cluster {index} lies at {offset:#x}, past the end of the file; the image was cut off, copy it again"
                )));
            }
            (false, offset) => Mapping::Data(offset),
        })
    }

    /// Index into L1, and into the L2 table there.
    fn place(&self, index: u64) -> (usize, u64) {
        let bits = self.header.cluster_bits - 3;
        (usize::try_from(index >> bits).unwrap_or(usize::MAX), index & ((1 << bits) - 1))
    }

    /// The longest piece of `at..end` that lies together: how it is mapped and its length. `Data` and
    /// `Compressed` are of the first cluster.
    fn run(&mut self, at: u64, end: u64) -> Result<(Mapping, u64)> {
        let cluster = self.header.cluster();
        let mut index = at / cluster;
        let first = self.mapping(index)?;
        let mut reach = ((index + 1) * cluster).min(end);
        while reach < end && !matches!(first, Mapping::Compressed(_)) {
            index += 1;
            let together = match (first, self.mapping(index)?) {
                (Mapping::Data(a), Mapping::Data(b)) => {
                    a.checked_add((index - at / cluster) * cluster) == Some(b)
                }
                (Mapping::Zero(_), Mapping::Zero(_)) | (Mapping::Hole, Mapping::Hole) => true,
                _ => false,
            };
            if !together {
                break;
            }
            reach = ((index + 1) * cluster).min(end);
        }
        Ok((first, reach - at))
    }

    /// Reads a part of the packed cluster at guest offset `at`.
    ///
    /// # Safety
    /// As [`Disk::read_vectored`].
    unsafe fn read_packed(&mut self, entry: u64, at: u64, part: &[IoBufMut]) -> Result<()> {
        let (index, within) = (at / self.header.cluster(), at % self.header.cluster());
        if self.unpacked.as_ref().is_none_or(|(have, _)| *have != index) {
            self.unpacked = None;
            self.unpacked = Some((index, compressed::unpack(&*self.store, &self.header, entry)?));
        }
        let bytes = self.unpacked.as_ref().map_or(&[][..], |(_, bytes)| bytes);
        // SAFETY: the caller's promise; the bytes are ours, so they do not overlap.
        unsafe { cursor::copy(bytes.get(within as usize..).unwrap_or_default(), part) };
        Ok(())
    }
}

/// Reads the base; past its end, zeros.
///
/// # Safety
/// As [`Disk::read_or_later`].
unsafe fn read_base(base: Option<&Arc<dyn Disk>>, at: u64, bufs: &[IoBufMut], room: Room<'_>) -> Result<()> {
    let have = base.map_or(0, |b| b.size().saturating_sub(at)).min(total(bufs));
    let mut cursor = Cursor::new(bufs);
    if let Some(base) = base.filter(|_| have > 0) {
        let part = cursor.take(have);
        // SAFETY: the caller's promise; the rest below likewise.
        unsafe {
            match room {
                None => base.read_vectored(at, &part),
                Some(later) => base.read_or_later(at, &part, later),
            }
        }?;
    }
    // SAFETY: as above.
    unsafe { cursor::zero(&cursor.rest()) };
    Ok(())
}

impl Disk for Qcow2Disk {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn parallelism(&self) -> usize {
        8
    }

    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.read(offset, bufs, None) }
    }

    unsafe fn read_or_later(&self, offset: u64, bufs: &[IoBufMut], later: &mut Vec<Later>) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.read(offset, bufs, Some(later)) }
    }

    unsafe fn write_vectored(&self, offset: u64, bufs: &[IoBuf]) -> Result<()> {
        let (mut at, end) = (offset, offset.saturating_add(total(bufs)));
        let mut cursor = Cursor::new(bufs);
        check_write(self.read_only)?;
        check_range(offset, total(bufs), self.size())?;
        while at < end {
            let mut inner = self.writable(at, end - at)?;
            let cluster = inner.header.cluster();
            let (mapping, len) = inner.run(at, end)?;
            // SAFETY: the parts are of the caller's buffers; that holds for both.
            at += unsafe {
                match mapping {
                    Mapping::Data(host) => {
                        let _moving = inner.moving.clone();
                        drop(inner);
                        let written = self.payload.write(host + at % cluster, at, &cursor.take(len));
                        written.map_err(|e| DiskError::io("write the disk", e))?;
                        len
                    }
                    _ => inner.write_fresh(at, len, &mut cursor)?,
                }
            };
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let (from, to) = self.writable(offset, len)?.write_zero_clusters(offset, offset + len, unmap)?;
        self.write_zero_bytes(offset, from)?;
        self.write_zero_bytes(to, offset + len)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.writable(offset, len)?.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        let mut inner = self.writable(0, 0)?;
        inner.commit()?;
        // The rest is only bytes of mapped clusters, which nobody else has to wait for.
        let syncs = inner.syncs.clone();
        drop(inner);
        syncs.sync().inspect_err(|_| self.lock().failed = true)
    }

    fn zeros_at(&self, offset: u64) -> Result<u64> {
        check_range(offset, 0, self.size())?;
        let end = self.size();
        let (mut at, mut known) = (offset, true);
        while known && at < end {
            let (mapping, len) = self.lock().run(at, end.min(at.saturating_add(LOOK)))?;
            let zeros = match (mapping, &self.base.get()) {
                (Mapping::Zero(_), _) | (Mapping::Hole, None) => len,
                (Mapping::Hole, Some(base)) => zeros_below(&**base, at, len)?,
                _ => 0,
            };
            at += zeros;
            known = zeros == len;
        }
        Ok(at - offset)
    }

    fn grow(&self, new_size: u64) -> Result<()> {
        let mut inner = self.writable(0, 0)?;
        inner.grow(new_size)?;
        self.size.store(new_size, Ordering::Release);
        Ok(())
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        let mut inner = self.lock();
        if inner.volume.is_some() && !inner.failed {
            // Nothing was promised beyond the last flush; what can be kept is.
            let _ = inner.commit().and_then(|()| inner.sync());
        }
    }
}
