//! Sealed layers, looked through at once: however many there are, where a cluster lies is one lookup when it is known.
//!
//! ```text
//!   layer 0   ·  a  ·  ·  b          a piece of the map (512 clusters), resolved when it is first needed:
//!   layer 1   c  d  ·  0  ·    ──►   c1 a0 ·  0  b0  …
//!   bottom    e  f  g  h  i          · is the bottom's
//! ```
//! A sealed layer is a volume's file that nobody writes to any more.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use super::layout::{CLUSTER, CLUSTER_BITS, ENTRIES, L2_REACH, is_ours};
use super::payload::Payload;
use super::{Header, LOOK, OFFSET, ZERO, cipher, read_base, read_l1};
use crate::cursor::{self, Cursor};
use crate::disk::{check_range, check_write};
use crate::later::Room;
use crate::raw::total;
use crate::store::Store;
use crate::{Disk, DiskError, IoBuf, IoBufMut, Key, Later, Result};

/// Clusters of a piece: those of 4 KiB of an L2 table.
const WIDTH: u64 = 512;
/// Pieces that are kept: 2 MiB, which map 16 GiB.
const PIECES: usize = 512;

/// A layer that nobody writes to any more.
pub struct Sealed {
    store: Arc<dyn Store>,
    payload: Payload,
    header: Header,
    l1: Vec<u64>,
    /// Where the file ended when it was last looked at: what is merged into it makes it longer, before any entry says so.
    end: AtomicU64,
}

impl Sealed {
    /// Opens a layer to be looked through; `None` when it is a qcow2 that hutch did not lay out. `key` as of
    /// [`Qcow2Disk::with_key`](super::Qcow2Disk::with_key).
    ///
    /// # Errors
    /// `Format` with the reason, `Key`, `Io`.
    pub fn open(store: Arc<dyn Store>, key: Option<&Key>) -> Result<Option<Sealed>> {
        let header = Header::read(&*store)?;
        let payload = Payload::new(store.clone(), cipher(&header, key)?);
        let l1 = read_l1(&*store, &header)?;
        Sealed::new(store, payload, header, l1)
    }

    pub(super) fn new(
        store: Arc<dyn Store>,
        payload: Payload,
        header: Header,
        l1: Vec<u64>,
    ) -> Result<Option<Sealed>> {
        let tables = header.size.div_ceil(L2_REACH) as usize;
        let ours = header.cluster_bits == CLUSTER_BITS
            && header.version == 3
            && header.refcount_order == 4
            && u64::from(header.l1_entries).is_multiple_of(ENTRIES)
            && l1.len() >= tables
            && l1.iter().take(tables).all(|offset| *offset != 0);
        let end = store.size().map_err(|e| DiskError::io("find the image's size", e))?;
        Ok(ours.then_some(Sealed { store, payload, header, l1, end: end.into() }))
    }

    /// Its size in bytes, as a guest would see it.
    pub fn size(&self) -> u64 {
        self.header.size
    }
}

/// Where a cluster lies, as a piece of the map has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Bottom,
    Zero,
    /// The entry means nothing: the layer is damaged.
    Wrong,
    /// In a layer, there.
    Data(usize, u64),
}

impl Place {
    /// Cluster offsets leave 16 bits above and below for the rest.
    const DATA: u64 = 1 << 48;

    fn pack(self) -> u64 {
        match self {
            Place::Bottom => 0,
            Place::Zero => 1,
            Place::Wrong => 2,
            Place::Data(layer, host) => ((layer as u64 + 1) * Self::DATA) | host,
        }
    }

    fn unpack(packed: u64) -> Place {
        match packed {
            0 => Place::Bottom,
            1 => Place::Zero,
            packed if packed < Self::DATA => Place::Wrong,
            packed => Place::Data((packed / Self::DATA - 1) as usize, packed % Self::DATA),
        }
    }
}

struct Piece {
    places: Vec<u64>,
    used: AtomicU64,
}

/// Sealed layers on a bottom, as one disk that is only read.
pub struct Chain {
    layers: Vec<Arc<Sealed>>,
    bottom: Option<Arc<dyn Disk>>,
    pieces: RwLock<HashMap<u64, Arc<Piece>>>,
    clock: AtomicU64,
    size: u64,
}

impl Chain {
    /// These layers, the top one first, on `bottom`.
    ///
    /// # Errors
    /// `Format`: one is larger than what lies on it, or there are none.
    pub fn new(layers: Vec<Arc<Sealed>>, bottom: Option<Arc<dyn Disk>>) -> Result<Chain> {
        let mut sizes: Vec<u64> = layers.iter().map(|layer| layer.size()).collect();
        sizes.extend(bottom.as_ref().map(|bottom| bottom.size()));
        if !sizes.is_sorted_by(|upper, lower| upper >= lower) {
            return Err(DiskError::format(format!("layers of {sizes:?} bytes cannot lie on each other")));
        }
        let size = sizes.first().copied();
        let size = size.ok_or_else(|| DiskError::format("a disk has at least one layer"))?;
        let (pieces, clock) = Default::default();
        Ok(Chain { layers, bottom, pieces, clock, size })
    }

    /// The piece of the map with this number.
    fn piece(&self, number: u64) -> Result<Arc<Piece>> {
        let now = self.clock.fetch_add(1, Relaxed);
        let known = self.pieces.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned();
        let piece = match known {
            Some(piece) => piece,
            None => {
                let piece = Arc::new(Piece { places: self.resolve(number)?, used: now.into() });
                let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
                if pieces.len() >= PIECES {
                    let oldest = pieces.iter().min_by_key(|(_, piece)| piece.used.load(Relaxed));
                    if let Some(oldest) = oldest.map(|(number, _)| *number) {
                        pieces.remove(&oldest);
                    }
                }
                pieces.insert(number, piece.clone());
                piece
            }
        };
        piece.used.store(now, Relaxed);
        Ok(piece)
    }

    /// Looks through all layers, as deep as something is left to be found.
    fn resolve(&self, number: u64) -> Result<Vec<u64>> {
        let mut places = vec![Place::Bottom.pack(); WIDTH as usize];
        let mut bytes = vec![0; WIDTH as usize * 8];
        for (depth, layer) in self.layers.iter().enumerate() {
            let (first, clusters) = (number * WIDTH, layer.header.size.div_ceil(CLUSTER));
            let Some(&table) = layer.l1.get((first / ENTRIES) as usize).filter(|_| first < clusters) else {
                // Those below are no larger.
                break;
            };
            if table == 0 {
                continue;
            }
            let read = layer.store.read_bytes(table + first % ENTRIES * 8, &mut bytes);
            read.map_err(|e| DiskError::io("read an L2 table", e))?;
            let entries = bytes.as_chunks().0.iter().map(|b| u64::from_be_bytes(*b));
            let mut left = false;
            for (place, (index, entry)) in places.iter_mut().zip((first..clusters).zip(entries)) {
                if *place == Place::Bottom.pack() {
                    let found = layer.place(depth, index, entry)?;
                    *place = found.pack();
                    left |= found == Place::Bottom;
                }
            }
            if !left && first + WIDTH <= clusters {
                break;
            }
        }
        Ok(places)
    }

    /// The longest piece of `at..end` that lies together: where, and its length.
    fn run(&self, at: u64, end: u64) -> Result<(Place, u64)> {
        let mut index = at / CLUSTER;
        let mut piece = self.piece(index / WIDTH)?;
        let place = |piece: &Piece, index: u64| {
            Place::unpack(piece.places.get((index % WIDTH) as usize).copied().unwrap_or_default())
        };
        let first = place(&piece, index);
        let mut end = end;
        if let Place::Data(layer, _) = first {
            // A layer that was smaller ends within its last cluster; what follows there is nobody's.
            let size = self.layers.get(layer).map_or(0, |layer| layer.size());
            if at >= size {
                return Ok((Place::Zero, ((index + 1) * CLUSTER).min(end) - at));
            }
            end = end.min(size);
        }
        let mut reach = ((index + 1) * CLUSTER).min(end);
        while reach < end {
            index += 1;
            if index.is_multiple_of(WIDTH) {
                piece = self.piece(index / WIDTH)?;
            }
            let together = match (first, place(&piece, index)) {
                (Place::Data(layer, host), Place::Data(other, next)) => {
                    layer == other && host + (index - at / CLUSTER) * CLUSTER == next
                }
                (first, next) => first == next,
            };
            if !together {
                break;
            }
            reach = ((index + 1) * CLUSTER).min(end);
        }
        Ok((first, reach - at))
    }
}

impl Chain {
    /// # Safety
    /// As [`Disk::read_or_later`].
    unsafe fn read(&self, offset: u64, bufs: &[IoBufMut], mut room: Room<'_>) -> Result<()> {
        check_range(offset, total(bufs), self.size)?;
        let (mut at, end) = (offset, offset.saturating_add(total(bufs)));
        let mut cursor = Cursor::new(bufs);
        while at < end {
            let (place, len) = self.run(at, end)?;
            let (part, room) = (cursor.take(len), room.as_deref_mut());
            // SAFETY: the parts are of the caller's buffers; that holds for each of these.
            unsafe {
                match place {
                    Place::Bottom => read_base(self.bottom.as_ref(), at, &part, room)?,
                    Place::Zero => cursor::zero(&part),
                    Place::Data(layer, host) => {
                        let layer = self.layers.get(layer).ok_or_else(|| wrong(at))?;
                        let read = layer.payload.read(host + at % CLUSTER, at, &part, room, None);
                        read.map_err(|e| DiskError::io("read the disk", e))?;
                    }
                    Place::Wrong => return Err(wrong(at)),
                }
            }
            at += len;
        }
        Ok(())
    }
}

impl Sealed {
    fn end(&self) -> u64 {
        self.end.load(Relaxed)
    }

    fn find_end(&self) -> Result<u64> {
        let end = self.store.size().map_err(|e| DiskError::io("find a layer's size", e))?;
        Ok(self.end.fetch_max(end, Relaxed).max(end))
    }

    /// What an entry of cluster `index` says.
    fn place(&self, depth: usize, index: u64, entry: u64) -> Result<Place> {
        let offset = entry & OFFSET;
        if !is_ours(entry) || !offset.is_multiple_of(CLUSTER) || offset >= Place::DATA {
            return Ok(Place::Wrong);
        }
        Ok(match offset {
            0 if entry & ZERO != 0 => Place::Zero,
            0 => Place::Bottom,
            offset if offset >= self.end() && offset >= self.find_end()? => Place::Wrong,
            offset if index * CLUSTER < self.size() => Place::Data(depth, offset),
            _ => Place::Bottom,
        })
    }
}

impl Disk for Chain {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        true
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

    unsafe fn write_vectored(&self, _offset: u64, _bufs: &[IoBuf]) -> Result<()> {
        check_write(true)
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<()> {
        check_write(true)
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        check_write(true)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn grow(&self, _new_size: u64) -> Result<()> {
        check_write(true)
    }

    fn zeros_at(&self, offset: u64) -> Result<u64> {
        check_range(offset, 0, self.size)?;
        let (mut at, mut known) = (offset, true);
        while known && at < self.size {
            let (place, len) = self.run(at, self.size.min(at.saturating_add(LOOK)))?;
            let zeros = match (place, &self.bottom) {
                (Place::Zero, _) | (Place::Bottom, None) => len,
                (Place::Bottom, Some(bottom)) => zeros_below(&**bottom, at, len)?,
                _ => 0,
            };
            at += zeros;
            known = zeros == len;
        }
        Ok(at - offset)
    }
}

fn wrong(at: u64) -> DiskError {
    let cluster = at / CLUSTER;
    DiskError::format(format!("the L2 entry of cluster {cluster} means nothing; a layer is damaged"))
}

/// How many of the `len` bytes from `at` on are known to be zeros of what lies below.
pub(super) fn zeros_below(below: &dyn Disk, at: u64, len: u64) -> Result<u64> {
    if at >= below.size() {
        return Ok(len);
    }
    let zeros = below.zeros_at(at)?;
    Ok(if zeros >= below.size() - at { len } else { zeros.min(len) })
}
