//! Each format as QEMU writes it, whole, cut off and damaged.

use std::path::Path;
use std::process::Command;

use super::*;

const MIB: u64 = 1 << 20;
/// Of a VHD's table: a block that was never written.
const NOWHERE: u32 = u32::MAX;

/// A file of the format, which holds a disk of 9 MiB and half a KiB with data in a few places.
fn made(room: &Path, format: Format) -> (Vec<u8>, Vec<u8>) {
    let (raw, made) = (room.join("raw"), room.join("made"));
    let mut disk = vec![0; (9 * MIB + 512) as usize];
    for at in [0, 3 * MIB - 700, 5 * MIB, 9 * MIB] {
        let noise = (0..1212_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1);
        disk.iter_mut().skip(at as usize).zip(noise).for_each(|(to, from)| *to = from);
    }
    std::fs::write(&raw, &disk).unwrap();
    let words: &[&str] = match format {
        Format::Vmdk => &["-O", "vmdk", "-o", "subformat=streamOptimized"],
        Format::Vhd => &["-O", "vpc", "-o", "force_size=on"],
        Format::Vhdx => &["-O", "vhdx", "-o", "block_size=1M,log_size=1M"],
        Format::Qcow2 => &["-O", "qcow2"],
        _ => &["-O", "vmdk"],
    };
    let from = ["convert", "-f", "raw"];
    let done = Command::new("qemu-img").args(from).args(words).args([&raw, &made]).status();
    assert!(done.expect("qemu-img (package qemu-utils)").success());
    (disk, std::fs::read(made).unwrap())
}

/// What a file with these bytes holds, read in steps.
fn read(bytes: &[u8], format: Format) -> Result<Vec<u8>> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    let mut content = open(file, format)?;
    let size = content.size().expect("a size");
    if size > 64 * MIB {
        // A worker has its limits.
        return bad("it is larger than a test's");
    }
    let mut disk = vec![0; size as usize];
    for (index, step) in disk.chunks_mut(300 << 10).enumerate() {
        let len = step.len();
        assert_eq!(content.read(index as u64 * (300 << 10), step)?, len);
    }
    Ok(disk)
}

#[test]
fn parts_lie_each_in_one_unit() {
    let mut buf = [0; 20];
    let parts: Vec<_> = by_units(6, &mut buf, 8).map(|(n, at, part)| (n, at, part.len())).collect();
    assert_eq!(parts, [(0, 6, 2), (1, 0, 8), (2, 0, 8), (3, 0, 2)]);
    assert_eq!(by_units(0, &mut [], 8).count(), 0);
}

/// VMDK is taken in both of its forms: `RawGz` stands for the one that is not made for streams.
const FORMATS: [(Format, Format); 4] = [
    (Format::Vmdk, Format::Vmdk),
    (Format::RawGz, Format::Vmdk),
    (Format::Vhd, Format::Vhd),
    (Format::Vhdx, Format::Vhdx),
];

#[test]
fn each_is_read_as_it_was_written_and_no_shorter_file_is() {
    let room = tempfile::tempdir().unwrap();
    for (made_as, format) in FORMATS {
        let (disk, file) = made(room.path(), made_as);
        let found = read(&file, format).unwrap();
        assert!(found.iter().take(disk.len()).eq(&disk), "{made_as:?}");
        assert!(found.len() - disk.len() < 1 << 20 && found.iter().skip(disk.len()).all(|byte| *byte == 0));
        for part in 0..20 {
            let cut = &file[..file.len() * part / 20];
            match read(cut, format) {
                Err(Fault::Bad(why)) => assert!(!why.is_empty()),
                // What was cut off was room that the format leaves.
                Ok(again) => assert!(again == found, "{made_as:?} at {}", cut.len()),
                Err(Fault::Host(why)) => panic!("{why}"),
            }
        }
    }
}

/// Damages what says where bytes are, a few bytes at a time, by a fixed sequence: each read ends without a panic, in
/// bounds.
#[test]
fn damaged_files_never_panic() {
    let room = tempfile::tempdir().unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for (made_as, format) in FORMATS {
        let (_, file) = made(room.path(), made_as);
        // Where no byte is there is nothing to be damaged; numbers are made large, too.
        let used: Vec<usize> = (0..file.len()).filter(|at| file[*at] != 0).collect();
        let mut refused = 0;
        for round in 0..80 {
            let mut damaged = file.clone();
            for _ in 0..1 + next() % 6 {
                let at =
                    used[if round % 2 == 0 { next() % used.len().min(600) } else { next() % used.len() }];
                damaged[at] = if next() % 3 == 0 { 0xff } else { next() as u8 };
            }
            if format == Format::Vhd && round % 4 < 2 {
                // So that more than the sums is looked at.
                for (start, len, sum) in [(0, 512, 64), (512, 1024, 36), (damaged.len() - 512, 512, 64)] {
                    let part = &mut damaged[start..start + len];
                    part[sum..sum + 4].fill(0);
                    let all = !part.iter().map(|byte| u32::from(*byte)).sum::<u32>();
                    part[sum..sum + 4].copy_from_slice(&all.to_be_bytes());
                }
            }
            refused += usize::from(read(&damaged, format).is_err());
        }
        // What else is damaged is data, or a name that qemu-img makes up anew each time.
        assert!(refused > 0, "{made_as:?}: none of 80 is refused");
    }
}

/// A VHD's blocks may lead anywhere, to the file's begin too; what is there does not depend on what was read before.
#[test]
fn blocks_that_lead_to_one_place_hold_the_same() {
    let room = tempfile::tempdir().unwrap();
    let (_, mut file) = made(room.path(), Format::Vhd);
    let table = be64(&file, 512 + 16) as usize;
    for block in [0, 2] {
        file[table + block * 4..][..4].fill(0);
    }
    assert_ne!(be32(&file, table + 4), NOWHERE, "a block between them is another");
    let disk = read(&file, Format::Vhd).unwrap();
    let block = be32(&file, 512 + 32) as usize;
    assert!(disk[..block] == disk[2 * block..3 * block]);
}

#[test]
fn what_needs_another_file_is_refused() {
    let room = tempfile::tempdir().unwrap();
    let path = |name: &str| room.path().join(name);
    let run = |words: &[&str]| {
        assert!(Command::new("qemu-img").current_dir(room.path()).args(words).status().unwrap().success());
    };
    for (format, kind) in [("vmdk", Format::Vmdk), ("vpc", Format::Vhd), ("vhdx", Format::Vhdx)] {
        run(&["create", "-q", "-f", format, "base", "4M"]);
        read(&std::fs::read(path("base")).unwrap(), kind).unwrap();
    }
    run(&["create", "-q", "-f", "vmdk", "base.vmdk", "4M"]);
    run(&["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "top.vmdk"]);
    match read(&std::fs::read(path("top.vmdk")).unwrap(), Format::Vmdk) {
        Err(Fault::Bad(why)) => assert!(why.contains("lies on another"), "{why}"),
        other => panic!("{other:?}"),
    }
    run(&["create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "split.vmdk", "4M"]);
    match read(&std::fs::read(path("split-s001.vmdk")).unwrap(), Format::Vmdk) {
        Err(Fault::Bad(why)) => assert!(why.contains("one of several files"), "{why}"),
        other => panic!("{other:?}"),
    }
}
