//! Requests that overlap in time: the bytes of mapped clusters move without holding the rest up, and a cluster that a
//! request is still reading is not used anew.

mod common;

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::rw;
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, Key, Qcow2Disk, qcow2};
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
    let (flushed, is_flushed) = sync_channel(1);
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
        // A flush that frees nothing has nobody to wait for.
        let (durable, is_durable) = sync_channel(1);
        scope.spawn(move || durable.send(disk.flush()));
        let freeing_nothing = is_durable.recv_timeout(Duration::from_secs(20));
        disk.discard(0, CLUSTER).expect("discard");
        // Its cluster would be punched, and be the next one's: not before the read is over.
        scope.spawn(move || {
            disk.flush().expect("flush");
            disk.write_at(6 * CLUSTER, &[6; CLUSTER as usize]).expect("a write to the freed cluster");
            flushed.send(()).expect("the test waits");
        });
        assert!(is_flushed.recv_timeout(Duration::from_millis(300)).is_err(), "the flush did not wait");
        go.send(()).expect("the read waits");
        freeing_nothing.expect("a flush that frees nothing waited").expect("flush");
        assert!(
            slow.join().expect("no panic") == [1; CLUSTER as usize],
            "the read was given another's bytes"
        );
        is_flushed.recv().expect("the flush goes on");
    });
    drop(disk);
    common::assert_clean(&path);
}
