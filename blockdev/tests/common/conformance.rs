//! The suite that every backend passes: random requests against a shadow of the disk. What is in range must succeed
//! and read back exactly; what is not must fail with `OutOfRange` and change nothing.

use hutch_blockdev::disk::SECTOR;
use hutch_blockdev::{Disk, DiskErrorKind};

use super::rng::Rng;

/// How a backend is put through the suite.
pub struct Subject<'a> {
    /// Opens the disk for writing. Called again after each close: everything must still be there.
    pub open: &'a dyn Fn() -> Box<dyn Disk>,
    /// Looks at the image while it is closed; gets what it must hold.
    pub closed: &'a dyn Fn(&[u8]),
    /// What the disk holds at first.
    pub content: Vec<u8>,
    /// How large the disk may be made, in bytes.
    pub limit: u64,
}

/// Whole sectors within the disk: mostly small, sometimes many clusters, sometimes aligned to clusters.
fn span(rng: &mut Rng, size: u64) -> (u64, u64) {
    let unit = *[SECTOR, SECTOR, 4096, 1 << 16].get(rng.below(4) as usize).expect("below 4");
    let offset = rng.below(size) / unit * unit;
    let most = if rng.once_in(4) { 1 << 20 } else { 40 << 10 };
    let len = (rng.below(most) / unit + 1) * unit;
    (offset, len.min(size - offset))
}

fn area(shadow: &mut [u8], (offset, len): (u64, u64)) -> &mut [u8] {
    &mut shadow[offset as usize..(offset + len) as usize]
}

/// Asserts that the disk holds `expected`, and nothing else.
pub fn assert_holds(disk: &dyn Disk, expected: &[u8], when: &str) {
    assert_eq!(disk.size(), expected.len() as u64, "{when}: the disk's size");
    let mut found = vec![0xa5; 1 << 20];
    for (i, want) in expected.chunks(1 << 20).enumerate() {
        let got = &mut found[..want.len()];
        disk.read_at((i as u64) << 20, got).unwrap_or_else(|e| panic!("{when}: read: {e:?}"));
        if got != want {
            let at = got.iter().zip(want).position(|(g, w)| g != w).expect("they differ");
            panic!("{when}: byte {} is {:#x}, not {:#x}", (i << 20) + at, got[at], want[at]);
        }
    }
    for at in (0..expected.len()).step_by(128 * SECTOR as usize) {
        let zeros = disk.zeros_at(at as u64).unwrap_or_else(|e| panic!("{when}: zeros: {e:?}")) as usize;
        let known = &expected[at..][..zeros.min(64 << 10)];
        assert!(known.iter().all(|b| *b == 0), "{when}: {zeros} bytes at {at} are not all zeros");
    }
}

/// Takes over what a discard left: each sector its old bytes or zeros.
fn settle_discard(disk: &dyn Disk, shadow: &mut [u8], at: (u64, u64), when: &str) {
    let mut found = vec![0xa5; at.1 as usize];
    disk.read_at(at.0, &mut found).expect("read what was discarded");
    for (got, old) in found.chunks(512).zip(area(shadow, at).chunks_mut(512)) {
        assert!(got == old || got.iter().all(|b| *b == 0), "{when}: a discarded sector holds something else");
        old.copy_from_slice(got);
    }
}

/// Requests that must be refused, whatever the disk holds.
fn refusals(disk: &dyn Disk) {
    let size = disk.size();
    let mut sector = [0u8; 512];
    let cases = [
        disk.read_at(size, &mut sector),
        disk.read_at(1, &mut sector),
        disk.read_at(0, &mut sector[..100]),
        disk.read_at(u64::MAX - 511, &mut sector),
        disk.write_at(size, &sector),
        disk.write_at(size - 511, &sector),
        disk.write_at(u64::MAX - 511, &sector),
        disk.write_at(0, &sector[..511]),
        disk.write_zeroes(size - 512, 1024, true),
        disk.write_zeroes(3, 512, false),
        disk.write_zeroes(512, u64::MAX - 511, false),
        disk.discard(size, 512),
        disk.discard(512, u64::MAX - 1023),
        disk.grow(size - 512),
        disk.grow(size + 1),
        disk.grow(u64::MAX - 511),
    ];
    for (i, case) in cases.into_iter().enumerate() {
        let kind = case.expect_err(&format!("request {i} of the refusals")).kind;
        assert_eq!(kind, DiskErrorKind::OutOfRange, "request {i} of the refusals");
    }
}

fn write(disk: &dyn Disk, shadow: &mut [u8], at: (u64, u64), rng: &mut Rng) {
    let bytes = rng.bytes(at.1 as usize);
    // In two pieces where it can be: a request's buffers have any length.
    let middle = rng.below(at.1) as usize;
    let (head, tail) = bytes.split_at(middle);
    let piece = |p: &[u8]| libc::iovec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() };
    // SAFETY: both slices outlive the call, and a write only reads them.
    unsafe { disk.write_vectored(at.0, &[piece(head), piece(tail)]) }.expect("write in range");
    area(shadow, at).copy_from_slice(&bytes);
}

/// Runs `rounds` random requests from `seed`, and closes and opens the disk now and then.
pub fn random_requests(subject: &Subject<'_>, seed: u64, rounds: usize) {
    let mut rng = Rng(seed);
    let mut shadow = subject.content.clone();
    let mut disk = (subject.open)();
    assert_holds(&*disk, &shadow, "at first");
    refusals(&*disk);
    for round in 0..rounds {
        let when = format!("seed {seed}, round {round}");
        let at = span(&mut rng, shadow.len() as u64);
        match rng.below(20) {
            0..8 => write(&*disk, &mut shadow, at, &mut rng),
            8..13 => {
                let mut found = vec![0xa5; at.1 as usize];
                disk.read_at(at.0, &mut found).expect("read in range");
                assert!(found == area(&mut shadow, at), "{when}: read of {at:?}");
            }
            13..15 => {
                disk.write_zeroes(at.0, at.1, rng.once_in(2)).expect("zero in range");
                area(&mut shadow, at).fill(0);
            }
            15..17 => {
                disk.discard(at.0, at.1).expect("discard in range");
                settle_discard(&*disk, &mut shadow, at, &when);
            }
            17 => disk.flush().expect("flush"),
            18 if rng.once_in(4) => {
                let size = (shadow.len() as u64 + rng.below(2048) * SECTOR).min(subject.limit);
                disk.grow(size).expect("grow");
                shadow.resize(size as usize, 0);
            }
            19 if rng.once_in(4) => {
                disk.flush().expect("flush before closing");
                drop(disk);
                (subject.closed)(&shadow);
                disk = (subject.open)();
                assert_holds(&*disk, &shadow, &when);
            }
            _ => {}
        }
    }
    refusals(&*disk);
    assert_holds(&*disk, &shadow, "at the end");
    disk.flush().expect("flush at the end");
    drop(disk);
    (subject.closed)(&shadow);
}

/// Several threads at once, each with its own sectors that share clusters with the others': nobody disturbs anybody.
pub fn concurrent_requests(subject: &Subject<'_>, seed: u64, rounds: usize) {
    const THREADS: u64 = 4;
    let disk = (subject.open)();
    let sectors = subject.content.len() as u64 / SECTOR;
    let shares: Vec<_> = std::thread::scope(|scope| {
        let run = |id: u64| {
            let disk = &*disk;
            let content = &subject.content;
            move || {
                let mut rng = Rng(seed + id);
                let mut mine = content.clone();
                for _ in 0..rounds {
                    let sector = rng.below(sectors / THREADS) * THREADS + id;
                    let at = (sector * SECTOR, SECTOR);
                    match rng.below(8) {
                        0 => disk.flush().expect("flush"),
                        1 => {
                            disk.write_zeroes(at.0, at.1, rng.once_in(2)).expect("zero");
                            area(&mut mine, at).fill(0);
                        }
                        2..5 => {
                            let mut found = [0xa5; 512];
                            disk.read_at(at.0, &mut found).expect("read");
                            assert!(found == area(&mut mine, at), "thread {id}: sector {sector}");
                        }
                        _ => write(disk, &mut mine, at, &mut rng),
                    }
                }
                mine
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|id| scope.spawn(run(id))).collect();
        threads.into_iter().map(|t| t.join().expect("a thread's requests")).collect()
    });
    let merged: Vec<u8> = (0..sectors)
        .flat_map(|s| {
            shares[(s % THREADS) as usize][(s * SECTOR) as usize..((s + 1) * SECTOR) as usize].iter()
        })
        .copied()
        .collect();
    assert_holds(&*disk, &merged, "after all threads");
    disk.flush().expect("flush at the end");
    drop(disk);
    (subject.closed)(&merged);
}
