//! Images made to break us: whatever bytes the metadata holds, every request ends with an answer or an error.

mod common;

use std::path::Path;

use common::conformance::assert_holds;
use common::rng::Rng;
use common::{convert, rw};
use hutch_blockdev::{Disk, Format, Qcow2Disk, open_layers, qcow2};

/// Touches all of the disk that can be read in a bounded time.
fn use_it(disk: &dyn Disk, write: bool) {
    let mut bytes = vec![0; 256 << 10];
    let size = disk.size();
    for at in [0, 65536, 1 << 20, size / 2, size.saturating_sub(256 << 10)] {
        let _ = disk.read_at(at / 512 * 512, &mut bytes);
        if write {
            let _ = disk.write_at(at / 512 * 512, &bytes[..4096]);
            let _ = disk.write_zeroes(at / 512 * 512, 100 << 10, true);
            let _ = disk.discard(at / 512 * 512, 64 << 10);
            let _ = disk.flush();
        }
    }
    if write {
        let _ = disk.grow(size.saturating_add(1 << 20));
        let _ = disk.flush();
    }
}

/// Breaks some bytes, mostly where the metadata is, often to values that lie at an edge.
fn mutate(rng: &mut Rng, bytes: &mut [u8], places: &[u64]) {
    for _ in 0..=rng.below(3) {
        let place = places[rng.below(places.len() as u64) as usize];
        let at = ((place + rng.below(16) * 8) as usize).min(bytes.len() - 8);
        let edges =
            [0, 1, u64::MAX, 1 << 63, 1 << 62, 1 << 56, 0x00ff_ffff_ffff_fe00, bytes.len() as u64, 65536];
        let value = match rng.below(4) {
            0 => rng.any(),
            1 => (rng.below(64) << 16) | (1 << 63),
            2 => rng.below(64) << 16,
            _ => edges[rng.below(edges.len() as u64) as usize],
        };
        match rng.below(3) {
            0 => bytes[at] = value as u8,
            1 => bytes[at..at + 4].copy_from_slice(&(value as u32).to_be_bytes()),
            _ => bytes[at..at + 8].copy_from_slice(&value.to_be_bytes()),
        }
    }
}

fn rounds(original: &Path, places: &[u64], seed: u64, rounds: usize, read_only: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    let whole = std::fs::read(original).expect("the original");
    let mut rng = Rng(seed);
    let mut opened = 0;
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        mutate(&mut rng, &mut bytes, places);
        std::fs::write(&image, &bytes).expect("the broken image");
        if let Ok(disk) = Qcow2Disk::open(rw(&image), None, read_only) {
            opened += 1;
            use_it(&disk, !read_only);
        }
    }
    assert!(opened > 0, "every image was refused at the door: nothing behind it was tried");
}

#[test]
fn broken_templates_end_in_errors() {
    let dir = tempfile::tempdir().expect("a directory");
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    std::fs::write(&raw, Rng(5).bytes(512 << 10)).expect("the raw file");
    for (kind, seed) in [("zlib", 1), ("zstd", 2)] {
        let _ = std::fs::remove_file(&image);
        convert(&["-c", "-o", &format!("compression_type={kind}")], &raw, &image);
        let header = Qcow2Disk::open(rw(&image), None, true).map(|d| d.size()).expect("whole at first");
        assert_eq!(header, 512 << 10);
        rounds(&image, &[0, 32, 64, 96, 65536, 3 * 65536, 4 * 65536, 5 * 65536], seed, 250, true);
    }
}

#[test]
fn broken_volumes_end_in_errors() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    qcow2::create(&rw(&image), 2 << 20).expect("create");
    let disk = Qcow2Disk::open(rw(&image), None, false).expect("open");
    disk.write_at(0, &[1; 200 << 10]).expect("write");
    disk.write_zeroes(1 << 20, 64 << 10, true).expect("zero");
    disk.flush().expect("flush");
    drop(disk);
    // The file's tail is what was set aside for growth.
    let places: Vec<u64> = (0..8).map(|c| c * 65536).chain([32, 64, 96]).collect();
    rounds(&image, &places, 3, 250, false);
}

#[test]
fn a_guest_that_writes_a_qcow2_header_into_its_raw_disk_gets_it_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    qcow2::create(&rw(&image), 1 << 20).expect("create");
    let mut header = std::fs::read(&image).expect("a header")[..4096].to_vec();
    // With the name of a backing file in it.
    header[8..16].copy_from_slice(&1024_u64.to_be_bytes());
    header[16..20].copy_from_slice(&11_u32.to_be_bytes());
    header[1024..1035].copy_from_slice(b"/some/where");
    let mut want = vec![0; 1 << 20];
    want[..4096].copy_from_slice(&header);
    std::fs::write(&raw, vec![0; 1 << 20]).expect("the raw disk");
    let disk = open_layers(vec![(rw(&raw), Format::Raw)], false).expect("open");
    disk.write_at(0, &header).expect("write");
    disk.flush().expect("flush");
    drop(disk);
    let disk = open_layers(vec![(rw(&raw), Format::Raw)], false).expect("open again");
    assert_holds(&*disk, &want, "a raw disk is raw");
}
