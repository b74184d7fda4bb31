//! qcow2-rs as a second reader of headers: what our gate lets through, both understand alike.

mod support;

use hutch_blockdev::qcow2::{self, Header};
use hutch_blockdev::store::Store;
use qcow2_rs::meta::Qcow2Header;
use support::MemStore;

fn agree(bytes: &[u8], ours: &Header) {
    let theirs = Qcow2Header::from_buf(bytes).expect("qcow2-rs reads what we let through");
    assert_eq!(theirs.size(), ours.size);
    assert_eq!(theirs.cluster_bits(), ours.cluster_bits);
    assert_eq!(theirs.l1_table_offset(), ours.l1_offset);
    assert_eq!(theirs.l1_table_entries(), ours.l1_entries as usize);
    assert_eq!(theirs.reftable_offset(), ours.reftable_offset);
    assert_eq!(theirs.reftable_clusters(), ours.reftable_clusters as usize);
    assert_eq!(theirs.refcount_order(), ours.refcount_order);
    assert_eq!(theirs.backing_filename(), None);
}

#[test]
fn the_headers_of_volumes_read_alike() {
    for size in [512, 1 << 20, 10 << 30, 100 << 30] {
        let store = MemStore::default();
        qcow2::create(&store, size).unwrap();
        let mut bytes = vec![0; 4096];
        store.read_bytes(0, &mut bytes).unwrap();
        let ours = Header::read(&store).unwrap();
        assert_eq!(ours.size, size);
        agree(&bytes, &ours);
    }
}
