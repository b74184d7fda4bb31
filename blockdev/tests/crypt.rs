//! Volumes that are encrypted: the shared suite, with QEMU's map of the file and another implementation of the cipher as
//! the judge of what is in it; the bytes that are in the file, and those that a guest's memory gets.

mod common;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::conformance::{Subject, assert_holds, concurrent_requests, random_requests};
use common::rng::Rng;
use common::{assert_clean, key, qemu_img, rw};
use hutch_blockdev::store::Store;
use hutch_blockdev::{Disk, DiskErrorKind, Format, Layer, Qcow2Disk, open_layers, qcow2};
use libc::iovec;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

fn layer(path: &Path, seed: Option<u8>) -> Layer {
    Layer { file: rw(path), format: Format::Qcow2, key: seed.map(key) }
}

fn raw(path: &Path) -> Layer {
    (rw(path), Format::Raw).into()
}

/// A volume of `size` bytes on a base of `base` bytes (0: alone), which is raw, or encrypted with another key.
fn with_subject(size: u64, base: u64, below_is_encrypted: bool, run: impl Fn(&Subject<'_>)) {
    let dir = tempfile::tempdir().expect("a directory");
    let (top, below) = (dir.path().join("top"), dir.path().join("below"));
    let mut content = Rng(base).bytes(base as usize);
    if below_is_encrypted {
        qcow2::create_encrypted(&rw(&below), base, &key(2)).expect("create the base");
        let disk = open_layers(vec![layer(&below, Some(2))], false).expect("open the base");
        disk.write_at(0, &content).expect("the base");
        disk.flush().expect("flush the base");
    } else {
        std::fs::write(&below, &content).expect("the base");
    }
    content.resize(size as usize, 0);
    qcow2::create_encrypted(&rw(&top), size, &key(1)).expect("create");
    let base_layer = || match below_is_encrypted {
        true => layer(&below, Some(2)),
        false => raw(&below),
    };
    let open = || -> Box<dyn Disk> {
        let base = (base > 0).then(|| open_layers(vec![base_layer()], true).expect("open the base"));
        let disk = Qcow2Disk::with_key(Arc::new(rw(&top)), base, Some(&key(1)), false);
        Box::new(disk.expect("open the volume"))
    };
    let closed = |want: &[u8]| {
        assert_clean(&top);
        assert_others_read(&top, want);
    };
    run(&Subject { open: &open, closed: &closed, content, limit: size + 6 * MIB });
}

/// Where QEMU finds data of the image: guest offset, length, offset in the file.
fn extents(image: &Path) -> Vec<[u64; 3]> {
    let (code, said) = qemu_img(&["map", "-f", "qcow2", "--output=json", image.to_str().expect("UTF-8")]);
    assert_eq!(code, 0, "qemu-img map: {said}");
    let field = |line: &str, name: &str| -> u64 {
        let (_, rest) = line.split_once(&format!("\"{name}\": ")).expect("the field");
        rest[..rest.find(|c: char| !c.is_ascii_digit()).expect("its end")].parse().expect("a number")
    };
    let data = said.lines().filter(|line| line.contains("\"data\": true"));
    data.map(|line| [field(line, "start"), field(line, "length"), field(line, "offset")]).collect()
}

/// Asserts that what the file holds by itself is `want`, by QEMU's map of it and the cipher of `xts-mode`.
fn assert_others_read(image: &Path, want: &[u8]) {
    use aes::cipher::KeyInit;
    let key = key(1);
    let half = |half: &[u8]| aes::Aes256::new(half.try_into().expect("32 bytes"));
    let (data, tweak) = key.bytes().split_at(32);
    let cipher = xts_mode::Xts128::new(half(data), half(tweak));
    let file = std::fs::read(image).expect("the file");
    let extents = extents(image);
    assert!(!extents.is_empty(), "nothing was written");
    for [start, len, offset] in extents {
        let end = (offset + len).min(file.len() as u64);
        let mut bytes = file[offset as usize..end as usize].to_vec();
        bytes.resize(len as usize, 0);
        cipher.decrypt_area(&mut bytes, 512, u128::from(start / 512), xts_mode::get_tweak_default);
        let want = &want[start as usize..(start + len) as usize];
        assert!(bytes == want, "{len} bytes at {start} are not what was written");
    }
}

#[test]
fn keeps_the_contract_alone() {
    for seed in 1..3 {
        with_subject(4 * MIB + 512 * seed, 0, false, |s| random_requests(s, seed, 300));
    }
}

#[test]
fn keeps_the_contract_on_a_smaller_base() {
    with_subject(4 * MIB, 2 * MIB + 512, false, |s| random_requests(s, 1, 300));
    with_subject(4 * MIB, 2 * MIB + 1024, true, |s| random_requests(s, 2, 300));
}

#[test]
fn threads_do_not_disturb_each_other() {
    with_subject(MIB, 0, false, |s| concurrent_requests(s, 11, 200));
    with_subject(MIB, MIB / 2, true, |s| concurrent_requests(s, 12, 200));
}

/// Layers of one key, of another, and of none; each fills the rest of a cluster from those below.
#[test]
fn each_layer_has_its_own_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |i: usize| dir.path().join(format!("layer{i}"));
    let keys = [None, Some(1), Some(1), Some(2), None, Some(3)];
    let layers = |upto: usize| (0..upto).rev().map(|i| layer(&path(i), keys[i])).collect::<Vec<_>>();
    let mut want = vec![0; MIB as usize];
    for (i, seed) in keys.iter().enumerate() {
        match seed {
            Some(seed) => qcow2::create_encrypted(&rw(&path(i)), MIB, &key(*seed)),
            None => qcow2::create(&rw(&path(i)), MIB),
        }
        .expect("create");
        let disk = open_layers(layers(i + 1), false).expect("open");
        for at in [i as u64 * 61 * 512, i as u64 * CLUSTER * 2 + 512] {
            disk.write_at(at, &[i as u8 + 1; 2048]).expect("write");
            want[at as usize..at as usize + 2048].fill(i as u8 + 1);
        }
        disk.flush().expect("flush");
        assert_holds(&*disk, &want, "after a layer more");
        drop(disk);
        assert_clean(&path(i));
    }
}

/// A cluster that is moved between files of one key as it is, is the same to the guest.
#[test]
fn the_tweak_is_the_guests_sector_and_not_the_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let paths = [dir.path().join("one"), dir.path().join("other")];
    let mut found = Vec::new();
    for (path, before) in paths.iter().zip([0, 5]) {
        qcow2::create_encrypted(&rw(path), MIB, &key(1)).expect("create");
        let disk = open_layers(vec![layer(path, Some(1))], false).expect("open");
        // Elsewhere in the file.
        disk.write_at(CLUSTER, &vec![9; before * CLUSTER as usize]).expect("write");
        disk.write_at(9 * CLUSTER, &[7; CLUSTER as usize]).expect("write");
        drop(disk);
        let [_, len, offset] = *extents(path).last().expect("data");
        let file = std::fs::read(path).expect("the file");
        let end = (offset + len) as usize;
        found.push((offset, file[end - CLUSTER as usize..end].to_vec()));
    }
    assert!(found[0].1 == found[1].1 && found[0].0 != found[1].0);
}

const MARKER: &[u8; 16] = b"plain for to see";

/// The marker in all ways that bytes reach the file: none of it may be there.
#[test]
fn no_plain_byte_is_in_the_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let (top, below) = (dir.path().join("top"), dir.path().join("below"));
    let marked = |len: u64| MARKER.repeat(len as usize / MARKER.len());
    for seed in [None, Some(1)] {
        // A base that is plain: copying up a part of a cluster encrypts the rest.
        std::fs::write(&below, marked(MIB)).expect("the base");
        let _ = std::fs::remove_file(&top);
        match seed {
            Some(seed) => qcow2::create_encrypted(&rw(&top), 4 * MIB + 512, &key(seed)),
            None => qcow2::create(&rw(&top), 4 * MIB + 512),
        }
        .expect("create");
        let disk = open_layers(vec![layer(&top, seed), raw(&below)], false).expect("open");
        for at in (0..4).map(|i| i * 5 * CLUSTER + 1024) {
            disk.write_at(at, &marked(512)).expect("write");
            disk.write_at(at + 2 * CLUSTER, &marked(3 * CLUSTER)).expect("write");
        }
        disk.write_at(2048, &marked(512)).expect("write in place");
        disk.write_at(4 * MIB, &marked(512)).expect("write the last sector");
        disk.write_zeroes(CLUSTER + 512, 1024, false).expect("zero a part");
        disk.flush().expect("flush");
        disk.discard(10 * CLUSTER, 2 * CLUSTER).expect("discard");
        disk.write_at(11 * CLUSTER, &marked(1024)).expect("write again");
        disk.grow(6 * MIB).expect("grow");
        let mut tail = vec![1; 2 * CLUSTER as usize];
        disk.read_at(4 * MIB + 512, &mut tail).expect("read behind the old end");
        assert!(tail.iter().all(|b| *b == 0), "what grew is not zeros");
        disk.write_at(6 * MIB - CLUSTER, &marked(CLUSTER)).expect("write what grew");
        let mut back = vec![0; 512];
        disk.read_at(4 * MIB, &mut back).expect("read");
        assert_eq!(back, marked(512));
        drop(disk);
        assert_clean(&top);
        let file = std::fs::read(&top).expect("the file");
        let plain = file.windows(8).filter(|bytes| *bytes == &MARKER[..8]).count();
        assert_eq!(plain > 0, seed.is_none(), "{plain} markers with the key {seed:?}");
    }
}

#[test]
fn a_missing_a_wrong_and_a_needless_key_are_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (plain, secret) = (dir.path().join("plain"), dir.path().join("secret"));
    qcow2::create(&rw(&plain), MIB).expect("create");
    qcow2::create_encrypted(&rw(&secret), MIB, &key(1)).expect("create");
    let bytes = std::fs::read(&secret).expect("the file");
    for (path, seed, why) in
        [(&secret, None, "encrypted"), (&secret, Some(2), "another key"), (&plain, Some(1), "not encrypted")]
    {
        for read_only in [false, true] {
            let refused = open_layers(vec![layer(path, seed)], read_only).err().expect("refused");
            assert!(refused.kind == DiskErrorKind::Key && refused.context.contains(why), "{refused:?}");
        }
    }
    let raw = Layer { key: Some(key(1)), ..raw(&plain) };
    assert_eq!(open_layers(vec![raw], false).err().expect("refused").kind, DiskErrorKind::Key);
    assert!(std::fs::read(&secret).expect("the file") == bytes, "a refusal changed the file");
    // Growth writes the header anew.
    open_layers(vec![layer(&secret, Some(1))], false).expect("open").grow(2 * MIB).expect("grow");
    let refused = open_layers(vec![layer(&secret, None)], false).err().expect("refused");
    assert_eq!(refused.kind, DiskErrorKind::Key);
    open_layers(vec![layer(&secret, Some(1))], false).expect("open");
}

/// A file that notes whose memory it is given.
struct Noted {
    file: File,
    guest: Range<usize>,
    given: Mutex<Vec<bool>>,
}

impl Noted {
    fn note(&self, bufs: &[iovec]) {
        let mut given = self.given.lock().expect("no panics");
        given.extend(bufs.iter().map(|buf| self.guest.contains(&buf.iov_base.addr())));
    }
}

impl Store for Noted {
    unsafe fn read(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        self.note(bufs);
        // SAFETY: the caller's promise.
        unsafe { self.file.read(offset, bufs) }
    }
    unsafe fn write(&self, offset: u64, bufs: &[iovec]) -> io::Result<()> {
        self.note(bufs);
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

/// The kernel never gets to see a guest's memory: neither would it be encrypted there, nor would ciphertext come there.
#[test]
fn a_guests_memory_only_ever_has_plain_bytes() {
    for seed in [None, Some(1)] {
        let file = tempfile::tempfile().expect("a file");
        match seed {
            Some(seed) => qcow2::create_encrypted(&file, 2 * MIB, &key(seed)),
            None => qcow2::create(&file, 2 * MIB),
        }
        .expect("create");
        let mut guest = Rng(5).bytes(MIB as usize);
        let want = guest.clone();
        let start = guest.as_ptr().addr();
        let store = Arc::new(Noted { file, guest: start..start + guest.len(), given: Mutex::default() });
        let disk = Qcow2Disk::with_key(store.clone(), None, seed.map(key).as_ref(), false).expect("open");
        disk.write_at(512, &guest).expect("write fresh clusters");
        disk.write_at(512, &guest).expect("write in place");
        assert!(guest == want, "a write changed the guest's memory");
        guest.fill(0);
        disk.read_at(512, &mut guest).expect("read");
        assert!(guest == want);
        let given = store.given.lock().expect("no panics");
        assert_eq!(given.contains(&true), seed.is_none(), "with the key {seed:?}");
    }
}

/// A guest that changes its memory while it is written: what reaches the disk is something that it held, and the same each time that it is read.
#[test]
fn a_guest_that_changes_its_buffers_spoils_nothing_but_them() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let file = tempfile::tempfile().expect("a file");
    qcow2::create_encrypted(&file, 2 * MIB, &key(1)).expect("create");
    let disk = Qcow2Disk::with_key(Arc::new(file), None, Some(&key(1)), false).expect("open");
    let guest = vec![0x11_u8; CLUSTER as usize];
    let (start, len, stop) = (guest.as_ptr().expose_provenance(), guest.len(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut now = 0x11;
            while !stop.load(Ordering::Relaxed) {
                now ^= 0x33;
                for at in (0..len).step_by(8) {
                    let at = std::ptr::with_exposed_provenance_mut::<u64>(start + at);
                    // SAFETY: within the buffer, which outlives the scope.
                    unsafe { at.write_volatile(u64::from_ne_bytes([now; 8])) };
                }
            }
        });
        for round in 0..200 {
            let buf = iovec { iov_base: std::ptr::with_exposed_provenance_mut(start), iov_len: len };
            // SAFETY: as above; a guest's memory is shared just so.
            unsafe { disk.write_vectored(round % 4 * CLUSTER, &[buf]) }.expect("write");
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (mut first, mut again) = (vec![0; 4 * len], vec![0; 4 * len]);
    disk.read_at(0, &mut first).expect("read");
    disk.read_at(0, &mut again).expect("read again");
    assert!(first == again);
    for bytes in first.chunks(8) {
        assert!(bytes == [0x11; 8] || bytes == [0x22; 8], "{bytes:x?} is nothing that the guest had");
    }
}
