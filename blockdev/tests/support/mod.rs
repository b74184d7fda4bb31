//! What the disk tests share: a store in memory that records, fails and loses power; random work with a full oracle.

#![allow(dead_code)]

use std::collections::HashSet;
use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex};

use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskErrorKind, Key, SECTOR};

/// A key that is made of `seed`.
pub fn key(seed: u8) -> Key {
    Key::new(&std::array::from_fn::<u8, 64, _>(|i| seed.wrapping_mul(41).wrapping_add(i as u8))).unwrap()
}

/// xorshift64: the same work from the same seed, everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound.max(1)
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// One thing that reached the store.
#[derive(Clone)]
pub enum Event {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Size(u64),
    Sync,
}

/// How the n-th change fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    Errno(i32),
    /// Half of it is written, then ENOSPC.
    Short,
}

#[derive(Default, Clone)]
pub struct State {
    pub bytes: Vec<u8>,
    pub log: Vec<Event>,
    pub record: bool,
    /// Changes until the fault, the fault, and whether all later ones fail too.
    pub fault: Option<(u64, Fault, bool)>,
    pub faults: u64,
}

#[derive(Default, Clone)]
pub struct MemStore(pub Arc<Mutex<State>>);

impl State {
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(at, bytes) => {
                let end = *at as usize + bytes.len();
                if end > self.bytes.len() {
                    self.bytes.resize(end, 0);
                }
                self.bytes[*at as usize..end].copy_from_slice(bytes);
            }
            Event::Zero(at, len) => {
                let end = (at + len).min(self.bytes.len() as u64) as usize;
                let start = (*at as usize).min(end);
                self.bytes[start..end].fill(0);
            }
            Event::Size(len) => self.bytes.resize(*len as usize, 0),
            Event::Sync => {}
        }
    }

    fn change(&mut self, event: Event) -> io::Result<()> {
        if let Some((left, fault, sticky)) = self.fault.as_mut() {
            if *left == 0 {
                self.faults += 1;
                let (fault, sticky) = (*fault, *sticky);
                if !sticky {
                    self.fault = None;
                }
                return match (fault, &event) {
                    (Fault::Errno(errno), _) => Err(io::Error::from_raw_os_error(errno)),
                    (Fault::Short, Event::Write(at, bytes)) => {
                        let half = Event::Write(*at, bytes[..bytes.len() / 1024 * 512].to_vec());
                        self.apply(&half);
                        Err(io::Error::from_raw_os_error(libc::ENOSPC))
                    }
                    (Fault::Short, _) => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
                };
            }
            *left -= 1;
        }
        self.apply(&event);
        if self.record {
            self.log.push(event);
        }
        Ok(())
    }
}

impl Store for MemStore {
    unsafe fn read(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        let state = self.0.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            let have = state.bytes.len().saturating_sub(at).min(buf.iov_len);
            // SAFETY: the caller promises mapped buffers, which are not the store's own memory.
            unsafe {
                buf.iov_base.cast::<u8>().write_bytes(0, buf.iov_len);
                if have > 0 {
                    state.bytes[at..].as_ptr().copy_to_nonoverlapping(buf.iov_base.cast(), have);
                }
            }
            at += buf.iov_len;
        }
        Ok(())
    }
    unsafe fn write(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for buf in bufs {
            // SAFETY: the caller promises mapped buffers.
            bytes.extend(unsafe { std::slice::from_raw_parts(buf.iov_base.cast::<u8>(), buf.iov_len) });
        }
        self.0.lock().unwrap().change(Event::Write(offset, bytes))
    }
    fn zero(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.0.lock().unwrap().change(Event::Zero(offset, len))
    }
    fn sync(&self) -> io::Result<()> {
        self.0.lock().unwrap().change(Event::Sync)
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().bytes.len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().change(Event::Size(len))
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let state = self.0.lock().unwrap();
        let rest = state.bytes.get(offset as usize..).unwrap_or_default();
        // By comparing memory, which is fast in a debug build, too.
        let first = (512 - offset as usize % 512).min(rest.len());
        let (head, tail) = rest.split_at(first);
        if head.iter().any(|b| *b != 0) {
            return Ok(Some(offset));
        }
        let sector = tail.chunks(512).position(|sector| sector != &[0; 512][..sector.len()]);
        Ok(sector.map(|i| offset + first as u64 + i as u64 * 512))
    }
}

/// What a disk must hold, and every sector's contents since the last flush.
pub struct Oracle {
    pub bytes: Vec<u8>,
    pub since: Vec<HashSet<Vec<u8>>>,
}

impl Oracle {
    pub fn new(bytes: Vec<u8>) -> Oracle {
        let sectors = bytes.len() / SECTOR as usize;
        let mut oracle = Oracle { bytes, since: vec![HashSet::new(); sectors] };
        oracle.flushed();
        oracle
    }
    fn sector(&self, sector: usize) -> Vec<u8> {
        self.bytes[sector * 512..(sector + 1) * 512].to_vec()
    }
    pub fn flushed(&mut self) {
        for sector in 0..self.since.len() {
            if self.since[sector].len() != 1 {
                self.since[sector] = HashSet::from([self.sector(sector)]);
            }
        }
    }
    pub fn written(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        for sector in at as usize / 512..(at as usize + bytes.len()) / 512 {
            let content = self.sector(sector);
            self.since[sector].insert(content);
        }
    }
    /// After a write of `bytes`: they are there; or, where it failed, each sector is as before or as asked.
    pub fn outcome(&mut self, disk: &dyn Disk, at: u64, bytes: &[u8], ok: bool) {
        let mut now = bytes.to_vec();
        if !ok {
            disk.read_at(at, &mut now).unwrap();
            let old = &self.bytes[at as usize..at as usize + bytes.len()];
            for ((now, old), new) in now.chunks(512).zip(old.chunks(512)).zip(bytes.chunks(512)) {
                assert!(now == old || now == new, "a failed write left something else");
            }
        }
        self.written(at, bytes);
        self.written(at, &now);
    }
    pub fn grown(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.since.resize(size as usize / 512, HashSet::from([vec![0; 512]]));
    }
    /// Every sector of `disk` is one of those it may be after a loss of power.
    pub fn check_survivors(&self, disk: &dyn Disk) {
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(0, &mut bytes).unwrap();
        for (sector, content) in bytes.chunks(512).enumerate().take(self.since.len()) {
            assert!(self.since[sector].contains(content), "sector {sector} holds what it never held");
        }
    }
    pub fn check(&self, disk: &dyn Disk) {
        assert_eq!(disk.size(), self.bytes.len() as u64);
        let mut bytes = vec![0xee; self.bytes.len()];
        disk.read_at(0, &mut bytes).unwrap();
        if let Some(at) = bytes.iter().zip(&self.bytes).position(|(a, b)| a != b) {
            panic!("byte {at} is {:#x}, not {:#x}", bytes[at], self.bytes[at]);
        }
    }
}

/// One random operation, on the disk and on the oracle. Whether the disk carried it out; a failure leaves sectors old or new.
pub fn step(
    random: &mut Random,
    disk: &dyn Disk,
    oracle: &mut Oracle,
    stamp: u32,
) -> Result<(), DiskErrorKind> {
    let size = oracle.bytes.len() as u64;
    let sectors = size / SECTOR;
    // Short ones often, long ones over several clusters sometimes; hot places, so that things meet.
    let at = if random.one_in(3) { random.below(sectors.min(300)) } else { random.below(sectors) };
    let most = if random.one_in(4) { 700 } else { 17 };
    let count = (1 + random.below(most)).min(sectors - at);
    let (at, len) = (at * SECTOR, count * SECTOR);
    let range = at as usize..(at + len) as usize;
    match random.below(20) {
        0..=8 => {
            let bytes: Vec<u8> = (0..len).map(|i| (u64::from(stamp) * 31 + i / 512 * 7 + 1) as u8).collect();
            let result = disk.write_at(at, &bytes);
            oracle.outcome(disk, at, &bytes, result.is_ok());
            result.map_err(|e| e.kind)
        }
        9..=13 => {
            let mut bytes = vec![0xee; len as usize];
            disk.read_at(at, &mut bytes).map_err(|e| e.kind)?;
            let wrong = bytes.iter().zip(&oracle.bytes[range]).position(|(a, b)| a != b);
            assert!(wrong.is_none(), "a read of {len} bytes at {at} is wrong from byte {wrong:?} on");
            Ok(())
        }
        14..=15 => {
            let result = disk.write_zeroes(at, len, random.one_in(2));
            oracle.outcome(disk, at, &vec![0; len as usize], result.is_ok());
            result.map_err(|e| e.kind)
        }
        16 => {
            let result = disk.discard(at, len);
            // Zeros or the old content: what it is now is what it stays.
            let mut now = vec![0; len as usize];
            disk.read_at(at, &mut now).map_err(|e| e.kind)?;
            for (new, old) in now.chunks(512).zip(oracle.bytes[range.clone()].chunks(512)) {
                assert!(new == old || new.iter().all(|b| *b == 0), "a discard showed something else");
            }
            let before = oracle.bytes[range].to_vec();
            oracle.written(at, &vec![0; len as usize]);
            oracle.written(at, &before);
            oracle.written(at, &now);
            result.map_err(|e| e.kind)
        }
        17..=18 => {
            disk.flush().map_err(|e| e.kind)?;
            oracle.flushed();
            Ok(())
        }
        _ => {
            for (at, len) in [(size, 512), (size - 512, 1024), (u64::MAX - 511, 512), (1, 512), (0, 100)] {
                let mut bytes = vec![0; len];
                let kinds = [
                    disk.read_at(at, &mut bytes).unwrap_err().kind,
                    disk.write_at(at, &bytes).unwrap_err().kind,
                    disk.write_zeroes(at, len as u64, true).unwrap_err().kind,
                    disk.discard(at, len as u64).unwrap_err().kind,
                ];
                if kinds.contains(&DiskErrorKind::Failed) {
                    return Err(DiskErrorKind::Failed);
                }
                assert_eq!(kinds, [DiskErrorKind::OutOfRange; 4]);
            }
            Ok(())
        }
    }
}

/// `qemu-img check` of an image's bytes: its exit status (0 whole, 2 corrupt, 3 leaks only), and what it says.
pub fn qemu_check(bytes: &[u8]) -> Option<(i32, String)> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let out = match Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(file.path()).output() {
        Ok(out) => out,
        Err(e) => {
            eprintln!("SKIPPED: qemu-img: {e}");
            return None;
        }
    };
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    Some((out.status.code().unwrap_or(-1), text))
}
