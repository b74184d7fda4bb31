//! Images that others made: what qemu-img writes is read right, and what must be refused is, each with its reason.

mod common;

use std::path::{Path, PathBuf};

use common::conformance::assert_holds;
use common::corpus::{self, content};
use common::rng::Rng;
use common::{convert, qemu_img, rw};
use hutch_blockdev::{Disk, DiskError, DiskErrorKind, Format, Qcow2Disk, open_layers, qcow2};

fn open(path: &Path) -> Result<Qcow2Disk, DiskError> {
    Qcow2Disk::open(rw(path), None, true)
}

/// Random requests on a disk that holds `want`; what is written of it changes that, too.
fn requests(disk: &dyn Disk, want: &mut [u8], write: bool, what: &str) {
    let mut rng = Rng(1);
    let sectors = want.len() as u64 / 512;
    for _ in 0..100 {
        let count = (rng.below(64) + 1).min(sectors);
        let at = (rng.below(sectors - count + 1) * 512) as usize;
        let held = &mut want[at..at + count as usize * 512];
        if write && rng.once_in(3) {
            held.copy_from_slice(&rng.bytes(held.len()));
            disk.write_at(at as u64, held).expect("write");
        } else {
            let mut piece = vec![0xa5; held.len()];
            disk.read_at(at as u64, &mut piece).expect("read");
            assert!(piece == held, "{what} at {at}");
        }
    }
}

/// Each by itself, and beneath a volume that is written, where it stays as it is.
#[test]
fn images_of_qemu_img_are_read_right_or_refused() {
    let content = content();
    let mut taken = 0;
    for kind in corpus::qcow2() {
        let (dir, what) = (tempfile::tempdir().expect("a directory"), format!("{:?}", kind.commands));
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("raw"), &content).expect("the raw file");
        let Some(image) = kind.make(dir.path()) else { continue };
        if !kind.refused.is_empty() {
            let refused = open(&image).err().unwrap_or_else(|| panic!("{what} is taken"));
            assert!(
                refused.kind == DiskErrorKind::Format && refused.context.contains(kind.refused),
                "{refused}"
            );
            continue;
        }
        taken += 1;
        let mut want = kind.content(dir.path());
        let disk = open(&image).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(disk.size(), want.len() as u64, "{what}");
        // Where the disk was made large, what there is is in front.
        want.truncate(8 << 20);
        assert_holds_first(&disk, &want, &what);
        requests(&disk, &mut want, false, &what);
        let size = disk.size() + (1 << 20);
        drop(disk);

        let before = std::fs::read(&image).expect("the template");
        qcow2::create(&rw(&path("volume")), size).expect("create");
        let layers = || vec![(rw(&path("volume")), Format::Qcow2), (rw(&image), Format::Qcow2)];
        let disk = open_layers(layers(), false).expect("open");
        requests(&*disk, &mut want, true, &what);
        disk.flush().expect("flush");
        drop(disk);
        let disk = open_layers(layers(), false).expect("open again");
        assert_holds_first(&*disk, &want, &what);
        drop(disk);
        assert!(std::fs::read(&image).expect("the template") == before, "{what}: the template changed");
        common::assert_clean(&path("volume"));
        // And QEMU sees the same in both.
        let files = [path("volume"), image];
        let of = |i: usize| {
            format!(r#""driver":"qcow2","file":{{"driver":"file","filename":"{}"}}"#, files[i].display())
        };
        let volume = format!("json:{{{},\"backing\":{{{}}}}}", of(0), of(1));
        let mut raw = want.clone();
        raw.resize(want.len().next_multiple_of(512), 0);
        std::fs::write(path("want"), raw).expect("the oracle's file");
        // Only zeros may follow in the longer one.
        let (code, said) = qemu_img(&[
            "compare",
            &volume,
            &format!(
                "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}",
                path("want").display()
            ),
        ]);
        assert_eq!(code, 0, "{what}: qemu-img compare: {said}");
    }
    assert!(taken > 60, "only {taken} were taken");
}

/// The first bytes of a disk, those that `want` has.
fn assert_holds_first(disk: &dyn Disk, want: &[u8], what: &str) {
    let mut found = vec![0xee; want.len()];
    disk.read_at(0, &mut found).expect("read");
    let wrong = found.iter().zip(want).position(|(is, want)| is != want);
    assert!(wrong.is_none(), "{what}: byte {wrong:?} is wrong");
}

#[test]
fn a_volume_on_a_compressed_template_leaves_it_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let mut want = content();
    std::fs::write(path("raw"), &want).expect("the raw file");
    convert(&["-c", "-o", "compression_type=zstd"], &path("raw"), &path("template"));
    let before = std::fs::read(path("template")).expect("the template's bytes");
    want.resize(8 << 20, 0);
    qcow2::create(&rw(&path("volume")), 8 << 20).expect("create");
    let layers = || vec![(rw(&path("volume")), Format::Qcow2), (rw(&path("template")), Format::Qcow2)];
    let disk = open_layers(layers(), false).expect("open");
    let mut rng = Rng(3);
    for _ in 0..100 {
        let at = rng.below((8 << 20) / 512 - 16) * 512;
        let len = (rng.below(16) as usize + 1) * 512;
        let bytes = rng.bytes(len);
        disk.write_at(at, &bytes).expect("write");
        want[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    disk.flush().expect("flush");
    assert_holds(&*disk, &want, "after the writes");
    drop(disk);
    let disk = open_layers(layers(), false).expect("open again");
    assert_holds(&*disk, &want, "opened again");
    drop(disk);
    assert!(std::fs::read(path("template")).expect("the template's bytes") == before, "the template changed");
    common::assert_clean(&path("volume"));
}

#[test]
fn a_foreign_image_is_not_written() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image");
    for kind in [&["-o", "compat=0.10"][..], &["-o", "cluster_size=4k"], &["-o", "refcount_bits=8"]] {
        let _ = std::fs::remove_file(&image);
        let args = [&["create", "-q", "-f", "qcow2"], kind, &[image.to_str().expect("UTF-8"), "1M"]].concat();
        assert_eq!(qemu_img(&args).0, 0);
        let refused = Qcow2Disk::open(rw(&image), None, false).err().expect("not ours");
        assert_eq!(refused.kind, DiskErrorKind::Format, "{kind:?}");
        open(&image).expect("but it is read");
    }
}

/// Where, and which bytes instead.
type Patches<'a> = &'a [(u64, &'a [u8])];

/// An image of qemu-img's, with some bytes replaced.
fn patched(dir: &Path, patches: Patches<'_>) -> PathBuf {
    let image = dir.join("patched");
    let _ = std::fs::remove_file(&image);
    let made = qemu_img(&["create", "-q", "-f", "qcow2", image.to_str().expect("UTF-8"), "64M"]);
    assert_eq!(made.0, 0, "{}", made.1);
    let mut bytes = std::fs::read(&image).expect("the image's bytes");
    for (at, patch) in patches {
        bytes[*at as usize..*at as usize + patch.len()].copy_from_slice(patch);
    }
    std::fs::write(&image, bytes).expect("the patched image");
    image
}

#[test]
fn the_gate_names_what_it_refuses() {
    let dir = tempfile::tempdir().expect("a directory");
    let be32 = u32::to_be_bytes;
    let be64 = u64::to_be_bytes;
    let huge = be64(u64::MAX);
    let cases: &[(&str, Patches<'_>)] = &[
        ("not a qcow2", &[(0, b"QFJ\xfb")]),
        ("version 4", &[(4, &be32(4))]),
        ("backing", &[(8, &be64(1024)), (16, &be32(9))]),
        ("backing", &[(16, &be32(9))]),
        ("2^8 bytes", &[(20, &be32(8))]),
        ("2^22 bytes", &[(20, &be32(22))]),
        ("2^4294967295 bytes", &[(20, &be32(u32::MAX))]),
        ("64 TiB", &[(24, &be64((64 << 40) + 512))]),
        ("64 TiB", &[(24, &huge)]),
        ("64 TiB", &[(24, &be64(1 << 63))]),
        ("multiple of 512", &[(24, &be64(1000))]),
        ("encrypted", &[(32, &be32(2))]),
        ("L1 table", &[(36, &be32(0))]),
        ("L1 table", &[(36, &be32(u32::MAX))]),
        ("L1 table", &[(40, &huge)]),
        ("L1 table", &[(40, &be64(0))]),
        ("L1 table", &[(40, &be64(3 * 65536 + 512))]),
        ("L1 table", &[(40, &be64(1 << 40))]),
        ("refcount table", &[(48, &huge)]),
        ("refcount table", &[(48, &be64(65537))]),
        ("refcount table", &[(48, &be64(1 << 40))]),
        ("refcount table", &[(56, &be32(u32::MAX))]),
        ("refcount table", &[(56, &be32(0x00ff_ffff))]),
        ("snapshots", &[(60, &be32(1))]),
        ("dirty", &[(72, &be64(1))]),
        ("corrupt", &[(72, &be64(2))]),
        ("another file", &[(72, &be64(4))]),
        ("extended L2", &[(72, &be64(16))]),
        ("not known", &[(72, &be64(1 << 40))]),
        ("compressed", &[(72, &be64(8)), (104, &[7])]),
        ("reference counts", &[(96, &be32(7))]),
        ("header", &[(100, &be32(50))]),
        ("header", &[(100, &be32(u32::MAX))]),
    ];
    for (reason, patches) in cases {
        let image = patched(dir.path(), patches);
        let refused = open(&image).err().unwrap_or_else(|| panic!("{reason}: {patches:?} was opened"));
        assert_eq!(refused.kind, DiskErrorKind::Format, "{reason}: {refused}");
        assert!(refused.context.contains(reason), "{patches:?}: \"{refused}\" does not say \"{reason}\"");
    }
    open(&patched(dir.path(), &[])).expect("the image as it was");
}

#[test]
fn a_cut_image_is_refused_or_says_so_when_read() {
    let dir = tempfile::tempdir().expect("a directory");
    let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
    let content = content();
    std::fs::write(&raw, &content).expect("the raw file");
    for kind in [&["-o", "compat=1.1"][..], &["-c"]] {
        let _ = std::fs::remove_file(&image);
        convert(kind, &raw, &image);
        let whole = std::fs::read(&image).expect("the image's bytes");
        for keep in [0, 4, 71, 200, 65536, 4 * 65536, whole.len() / 2, whole.len() - 4096] {
            std::fs::write(&image, &whole[..keep]).expect("the cut image");
            let mut found = vec![0; content.len()];
            let read = open(&image).and_then(|disk| disk.read_at(0, &mut found));
            match read {
                Err(e) => assert_eq!(e.kind, DiskErrorKind::Format, "{kind:?} cut at {keep}: {e}"),
                Ok(()) => assert!(found == content, "{kind:?} cut at {keep}: other bytes, without an error"),
            }
        }
    }
}
