//! Requests that overlap in time: the bytes of mapped clusters move without holding the rest up, and a cluster that a
//! request is still reading is not used anew.

mod common;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use common::rw;
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, Key, Qcow2Disk, RawDisk, Stack, qcow2, stack};
use libc::iovec;

const CLUSTER: u64 = 64 << 10;

/// A file whose next read of a whole cluster says that it began, and waits.
struct Gated {
    file: File,
    gate: Mutex<Option<(SyncSender<()>, Receiver<()>)>>,
}

impl Store for Gated {
    unsafe fn read(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        if bufs.iter().map(|b| b.iov_len as u64).sum::<u64>() == CLUSTER {
            let gate = self.gate.lock().expect("no panics").take();
            if let Some((began, go)) = gate {
                began.send(()).expect("the test waits");
                go.recv().expect("the test says when");
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.file.read(offset, bufs) }
    }
    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
    unsafe fn write(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.file.write(offset, bufs) }
    }
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        self.file.zero(offset, len, punch)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn size(&self) -> io::Result<u64> {
        Store::size(&self.file)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        Store::set_len(&self.file, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }
}

#[test]
fn a_slow_read_holds_up_only_who_would_take_its_cluster() {
    slow_read(None);
}

#[test]
fn a_slow_read_of_what_is_encrypted_holds_up_only_who_would_take_its_cluster() {
    slow_read(Some(common::key(1)));
}

fn slow_read(key: Option<Key>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("volume");
    let created = match &key {
        Some(key) => qcow2::create_encrypted(&rw(&path), 8 * CLUSTER, key),
        None => qcow2::create(&rw(&path), 8 * CLUSTER),
    };
    created.expect("create");
    let store = Arc::new(Gated { file: rw(&path), gate: Mutex::new(None) });
    let disk = Qcow2Disk::with_key(store.clone(), None, key.as_ref(), false).expect("open");
    for index in 0..2 {
        disk.write_at(index * CLUSTER, &[index as u8 + 1; CLUSTER as usize]).expect("write");
    }
    disk.flush().expect("flush");
    let (began, is_read) = sync_channel(0);
    let (go, may_go) = sync_channel(1);
    *store.gate.lock().expect("no panics") = Some((began, may_go));
    std::thread::scope(|scope| {
        let disk = &disk;
        let slow = scope.spawn(move || {
            let mut found = vec![0; CLUSTER as usize];
            disk.read_at(0, &mut found).expect("the slow read");
            found
        });
        is_read.recv().expect("it is read");
        // Others go on meanwhile, and what is read may be thrown away.
        let mut other = vec![0; CLUSTER as usize];
        disk.read_at(CLUSTER, &mut other).expect("another read");
        assert_eq!(other, [2; CLUSTER as usize]);
        disk.write_at(CLUSTER, &[3; 512]).expect("a write in place");
        disk.write_at(4 * CLUSTER, &[4; 512]).expect("a write to a fresh cluster");
        disk.discard(0, CLUSTER).expect("discard");
        // Its cluster is free, and will be the next one's: not before the read is over.
        disk.flush().expect("a flush waits for nobody who reads");
        disk.write_at(6 * CLUSTER, &[6; CLUSTER as usize]).expect("a write to a cluster of its own");
        disk.flush().expect("flush");
        go.send(()).expect("the read waits");
        assert!(
            slow.join().expect("no panic") == [1; CLUSTER as usize],
            "the read was given another's bytes"
        );
    });
    // Now it is: the file has room for it, and does not grow.
    let holes = || path.metadata().expect("the file").blocks() * 512;
    let before = holes();
    disk.flush().expect("flush");
    assert!(holes() <= before - CLUSTER, "it was not given back");
    disk.write_at(7 * CLUSTER, &[7; CLUSTER as usize]).expect("a write to the freed cluster");
    disk.flush().expect("flush");
    assert!(holes() <= before, "it was not used anew");
    drop(disk);
    common::assert_clean(&path);
}

#[test]
fn what_is_read_later_is_what_was_there_when_it_was_asked_for() {
    for key in [None, Some(common::key(1))] {
        read_later(key);
    }
}

/// A store that never has anything in memory, so that all is left to be read later.
fn read_later(key: Option<Key>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("volume");
    let created = match &key {
        Some(key) => qcow2::create_encrypted(&rw(&path), 8 * CLUSTER, key),
        None => qcow2::create(&rw(&path), 8 * CLUSTER),
    };
    created.expect("create");
    let base = dir.path().join("base");
    std::fs::write(&base, vec![9; CLUSTER as usize + 512]).expect("a base");
    let base = Gated { file: rw(&base), gate: Mutex::new(None) };
    let base = RawDisk::on(base, true).expect("open");
    let store = Arc::new(Gated { file: rw(&path), gate: Mutex::new(None) });
    let disk = Qcow2Disk::with_key(store, Some(Arc::new(base)), key.as_ref(), false).expect("open");
    for index in 2..4 {
        disk.write_at(index * CLUSTER, &[index as u8; CLUSTER as usize]).expect("write");
    }
    disk.flush().expect("flush");
    let mut found = vec![0xff; 5 * CLUSTER as usize - 1024];
    let (first, second) = found.split_at_mut(CLUSTER as usize + 1536);
    let bufs = [first, second].map(|b| iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() });
    let mut later = Vec::new();
    // SAFETY: the buffers outlive what is left for later.
    unsafe { disk.read_or_later(512, &bufs, &mut later) }.expect("read");
    assert!(later.len() >= 2, "nothing was left");
    // Meanwhile its clusters are thrown away, and others written.
    disk.discard(2 * CLUSTER, 2 * CLUSTER).expect("discard");
    disk.flush().expect("flush");
    for index in 5..7 {
        disk.write_at(index * CLUSTER, &[index as u8; CLUSTER as usize]).expect("write");
    }
    disk.flush().expect("flush");
    for (index, piece) in later.into_iter().enumerate() {
        // A part of it as the kernel does it, the rest is left to it; one that was given nothing is read whole.
        let part = piece.bufs().first().map_or(0, |buf| buf.iov_len.min(1000 * index));
        let file = piece.file().expect("a file").as_raw_fd();
        let at = piece.offset() as libc::off_t;
        // SAFETY: as above.
        let got = unsafe { libc::pread(file, piece.bufs()[0].iov_base, part, at) };
        // SAFETY: as above.
        unsafe { piece.finish(usize::try_from(got).expect("pread")) }.expect("finish");
    }
    let expected = |at: usize| match (at + 512) as u64 / CLUSTER {
        0 => 9,
        1 if (at as u64) < CLUSTER => 9,
        index @ 2..4 => index as u8,
        _ => 0,
    };
    let wrong = found.iter().enumerate().find(|(at, byte)| **byte != expected(*at));
    assert_eq!(wrong, None, "{key:?}", key = key.is_some());
    drop(disk);
    common::assert_clean(&path);
}

#[test]
fn a_layer_is_sealed_when_reads_from_before_the_cut_are_done() {
    let dir = tempfile::tempdir().expect("a directory");
    let layer = |name: &str| {
        let path = dir.path().join(name);
        qcow2::create(&rw(&path), 8 * CLUSTER).expect("create");
        Arc::new(Gated { file: rw(&path), gate: Mutex::new(None) })
    };
    let stack = Stack::on(layer("first"), vec![], None).expect("open");
    stack.write_at(0, &[1; 512]).expect("write");
    let mut found = [0u8; 512];
    let buf = iovec { iov_base: found.as_mut_ptr().cast(), iov_len: found.len() };
    let mut later = Vec::new();
    // SAFETY: the buffer outlives what is left for later.
    unsafe { stack.read_or_later(0, &[buf], &mut later) }.expect("read");
    stack::cut(vec![(&stack, layer("second"))]).expect("a cut waits for no read");
    stack.write_at(0, &[2; 512]).expect("write");
    std::thread::scope(|scope| {
        let sealed = scope.spawn(|| stack.seal());
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(!stack.is_sealed() && !sealed.is_finished(), "its clusters could be another's now");
        for piece in later {
            // SAFETY: as above; the kernel was not asked.
            unsafe { piece.finish(0) }.expect("finish");
        }
        sealed.join().expect("no panic").expect("sealed");
    });
    assert_eq!(found, [1; 512], "what was there when it was asked for");
    assert!(stack.is_sealed());
}
