//! Raw disks: the shared suite, the lock, and a host that fails.

mod common;

use common::conformance::{Subject, concurrent_requests, random_requests};
use common::faulty::{Faulty, Plan};
use common::rng::Rng;
use common::rw;
use hutch_blockdev::{Disk, DiskErrorKind, RawDisk};

fn with_subject(content: Vec<u8>, run: impl Fn(&Subject<'_>)) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, &content).expect("first content");
    let open = || -> Box<dyn Disk> { Box::new(RawDisk::open(rw(&path), false).expect("open the disk")) };
    let closed =
        |want: &[u8]| assert!(std::fs::read(&path).expect("read the file") == want, "the file's bytes");
    run(&Subject { open: &open, closed: &closed, content, limit: 12 << 20 });
}

#[test]
fn keeps_the_contract() {
    for seed in 1..5 {
        with_subject(Rng(seed).bytes((4 << 20) + 512), |s| random_requests(s, seed, 300));
    }
}

#[test]
fn threads_do_not_disturb_each_other() {
    with_subject(Rng(7).bytes(1 << 20), |s| concurrent_requests(s, 7, 500));
}

#[test]
fn one_writer_or_many_readers() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, [0; 4096]).expect("content");
    let kind = |read_only| RawDisk::open(rw(&path), read_only).err().map(|e| e.kind);
    let writer = RawDisk::open(rw(&path), false).expect("the first writer");
    assert_eq!((kind(false), kind(true)), (Some(DiskErrorKind::Busy), Some(DiskErrorKind::Busy)));
    drop(writer);
    let reader = RawDisk::open(rw(&path), true).expect("a reader");
    assert_eq!((kind(false), kind(true)), (Some(DiskErrorKind::Busy), None));
    let refused = reader.write_at(0, &[1; 512]).expect_err("read-only");
    assert_eq!(refused.kind, DiskErrorKind::ReadOnly);
    assert_eq!(reader.grow(8192).expect_err("read-only").kind, DiskErrorKind::ReadOnly);
}

#[test]
fn a_failing_host_leaves_old_or_new_sectors() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, [1; 65536]).expect("content");
    let plan = Plan::new();
    let disk = RawDisk::on(Faulty(rw(&path), plan.clone()), false).expect("open");
    for (errno, kind) in [(libc::ENOSPC, DiskErrorKind::NoSpace), (libc::EIO, DiskErrorKind::Io)] {
        plan.fail(0, errno);
        assert_eq!(disk.write_at(4096, &[2; 8192]).expect_err("the host failed").kind, kind);
        assert_eq!(disk.write_zeroes(0, 512, true).expect_err("the host failed").kind, kind);
        assert_eq!(disk.flush().expect_err("the host failed").kind, kind);
        assert_eq!(disk.grow(1 << 20).expect_err("the host failed").kind, kind);
        assert_eq!(disk.size(), 65536);
        plan.relent();
        let mut now = vec![0; 65536];
        disk.read_at(0, &mut now).expect("read");
        assert!(now[..4096].iter().chain(&now[12288..]).all(|b| *b == 1), "what was not written");
        for sector in now[4096..12288].chunks(512) {
            assert!(sector.iter().all(|b| *b == sector[0]) && [1, 2].contains(&sector[0]), "a torn sector");
        }
    }
    disk.write_at(4096, &[2; 8192]).expect("again, with room");
    disk.flush().expect("flush");
}

#[test]
fn what_a_cut_file_leaves_behind_the_last_sector_is_not_seen_after_growth() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    std::fs::write(&path, [7; 700]).expect("content");
    let disk = RawDisk::open(rw(&path), false).expect("open");
    assert_eq!(disk.size(), 512);
    disk.grow(1536).expect("grow");
    let mut now = vec![1; 1024];
    disk.read_at(512, &mut now).expect("read");
    assert_eq!(now, vec![0; 1024]);
}
