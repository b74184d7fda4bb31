//! Files that somebody made up so that looking at them, or repairing them, takes all there is.

mod support;

use std::fs::File;
use std::io;

use hutch_blockdev::qcow2::{Header, check, create, repair};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskErrorKind, Qcow2Disk};
use support::MemStore;

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const LARGEST: u64 = 64 << 40;

fn put(store: &dyn Store, at: u64, values: impl Iterator<Item = u64>) {
    store.write_bytes(at, &values.flat_map(u64::to_be_bytes).collect::<Vec<_>>()).unwrap();
}

fn get(store: &dyn Store, at: u64) -> u64 {
    let mut bytes = [0; 8];
    store.read_bytes(at, &mut bytes).unwrap();
    u64::from_be_bytes(bytes)
}

fn table(store: &dyn Store, header: &Header, index: u64) -> u64 {
    get(store, header.l1_offset + index * 8) & !COPIED
}

fn largest() -> (File, Header) {
    let file = tempfile::tempfile().unwrap();
    create(&file, LARGEST).unwrap();
    let header = Header::read(&file).unwrap();
    (file, header)
}

/// The most memory that this process ever had, in KiB.
fn most_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A billion entries, of some KiB: each of all tables, which are one, leads to one cluster.
#[test]
fn one_cluster_for_all_takes_neither_memory_nor_the_hosts_room() {
    let (file, header) = largest();
    let first = table(&file, &header, 0);
    let end = file.metadata().unwrap().len();
    file.set_len(end + CLUSTER).unwrap();
    put(&file, first, (0..8192).map(|_| COPIED | end));
    put(&file, header.l1_offset, (0..LARGEST / (8192 * CLUSTER)).map(|_| COPIED | first));
    let found = check(&file, &(0..=LARGEST)).unwrap().unwrap();
    assert_eq!(&found.shared[..], std::slice::from_ref(&(0..LARGEST)));
    assert!(!repair(&file, false, &(0..=LARGEST), 1 << 40).unwrap().unwrap().done);
    let refused = repair(&file, true, &(0..=LARGEST), 1 << 40).unwrap_err();
    assert_eq!((refused.kind, file.metadata().unwrap().len()), (DiskErrorKind::NoSpace, end + CLUSTER));
    assert_eq!(table(&file, &header, 1), first, "nothing is written");
    assert!(most_memory() < 1 << 20, "{} KiB", most_memory());
}

#[test]
fn without_an_end_to_the_damage_there_is_none_to_what_is_kept_of_it() {
    let (file, header) = largest();
    for index in 0..200 {
        put(&file, table(&file, &header, index), (0..8192).map(|_| COPIED | 1 << 55));
    }
    let refused = repair(&file, true, &(0..=LARGEST), u64::MAX).unwrap_err();
    assert!(refused.kind == DiskErrorKind::Format && refused.to_string().contains("snapshot"), "{refused}");
    assert_eq!(get(&file, table(&file, &header, 0)), COPIED | 1 << 55, "nothing is written");
    assert!(most_memory() < 1 << 20, "{} KiB", most_memory());
}

#[test]
fn a_disk_of_another_size_than_its_record_says_is_not_looked_at() {
    let (file, _) = largest();
    for sizes in [1..=LARGEST - 512, LARGEST + 512..=u64::MAX] {
        let refused = check(&file, &sizes).unwrap_err();
        assert!(refused.kind == DiskErrorKind::Format && refused.to_string().contains("its record"));
        repair(&file, true, &sizes, u64::MAX).unwrap_err();
    }
}

/// A store that says it is longer than it is.
struct Claims(MemStore, u64);

impl Store for Claims {
    unsafe fn read(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.read(offset, bufs) }
    }
    unsafe fn write(&self, offset: u64, bufs: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.write(offset, bufs) }
    }
    fn zero(&self, offset: u64, len: u64, punch: bool) -> io::Result<()> {
        self.0.zero(offset, len, punch)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn size(&self) -> io::Result<u64> {
        Ok(self.1)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }
}

#[test]
fn where_no_more_can_be_counted_nothing_is_written() {
    let store = MemStore::default();
    create(&store, 1 << 30).unwrap();
    let disk = Qcow2Disk::on(std::sync::Arc::new(store.clone()), None, false).unwrap();
    disk.write_at(0, &[1; 512]).unwrap();
    drop(disk);
    let header = Header::read(&store).unwrap();
    // All that a refcount table of one cluster counts.
    let all = 8192 * 32768 * CLUSTER;
    put(&store, table(&store, &header, 0) + 8, [COPIED | (all - CLUSTER)].into_iter());
    put(&store, header.l1_offset + 8, [0].into_iter());
    let before = store.0.lock().unwrap().bytes.clone();
    // However long the file is.
    for claim in [all, u64::MAX / 2] {
        let claims = Claims(store.clone(), claim);
        let refused = repair(&claims, true, &(0..=LARGEST), u64::MAX).unwrap_err();
        assert!(refused.kind == DiskErrorKind::OutOfRange, "{refused}");
        assert!(store.0.lock().unwrap().bytes == before);
    }
}
