//! Kernel, initrd and command line off real disks: partitioned by sfdisk, formatted by mke2fs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use hutch_blockdev::{Disk, DiskError, DiskErrorKind, IoBuf, IoBufMut, Result};
use hutch_imagestore::boot::{self, BootError, ReadError};
use hutch_imagestore::partition::partitions;

const MIB: u64 = 1 << 20;
const UUID: &str = "0c5b5e5a-9f1c-4a51-8b0e-d4c8b1ad31f7";
const OTHER: &str = "2d9f4b2a-8f0e-47a5-9d53-4a7d9f5e2b10";

/// A disk held in memory that refuses what the contract forbids.
struct MemDisk(Vec<u8>);

fn refuse<T>() -> Result<T> {
    Err(DiskError { kind: DiskErrorKind::ReadOnly, context: "read-only".to_owned(), source: None })
}

impl Disk for MemDisk {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_only(&self) -> bool {
        true
    }
    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> Result<()> {
        let mut at = offset as usize;
        for buf in bufs {
            assert!(at.is_multiple_of(512) && buf.iov_len.is_multiple_of(512), "an unaligned read");
            let from = &self.0[at..at + buf.iov_len];
            // SAFETY: the caller promises that the buffer is mapped and writable; it cannot overlap our own memory.
            unsafe { from.as_ptr().copy_to_nonoverlapping(buf.iov_base.cast(), buf.iov_len) };
            at += buf.iov_len;
        }
        Ok(())
    }
    unsafe fn write_vectored(&self, _: u64, _: &[IoBuf]) -> Result<()> {
        refuse()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        refuse()
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        refuse()
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn grow(&self, _: u64) -> Result<()> {
        refuse()
    }
}

fn disk(bytes: Vec<u8>) -> Arc<dyn Disk> {
    Arc::new(MemDisk(bytes))
}

/// Writes files below a directory.
fn plant(root: &Path, files: &[(&str, &[u8])]) {
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// An ext4 file system of `size` bytes that holds `files`.
fn ext4(uuid: &str, size: u64, files: &[(&str, &[u8])]) -> Vec<u8> {
    let room = tempfile::tempdir().unwrap();
    let (tree, image) = (room.path().join("tree"), room.path().join("image"));
    fs::create_dir(&tree).unwrap();
    plant(&tree, files);
    File::create(&image).unwrap().set_len(size).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-U", uuid, "-d"])
        .args([&tree, &image])
        .status()
        .expect("mke2fs (package e2fsprogs)");
    assert!(made.success());
    fs::read(image).unwrap()
}

/// A FAT file system of `size` bytes with clusters of one sector, of `bits` bits, that holds `files`.
fn fat(bits: &str, size: u64, files: &[(&str, &[u8])]) -> Vec<u8> {
    let room = tempfile::tempdir().unwrap();
    let (tree, image) = (room.path().join("tree"), room.path().join("image"));
    fs::create_dir(&tree).unwrap();
    plant(&tree, files);
    File::create(&image).unwrap().set_len(size).unwrap();
    let mkfs = Command::new("mkfs.vfat").args(["-F", bits, "-s", "1", "-i", "4f1ca051"]).arg(&image).output();
    assert!(mkfs.expect("mkfs.vfat (package dosfstools)").status.success());
    let tops = fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().path());
    let copied = Command::new("mcopy").arg("-si").arg(&image).args(tops).arg("::/").output();
    assert!(copied.expect("mcopy (package mtools)").status.success());
    fs::read(image).unwrap()
}

/// A disk of `size` bytes: `table` by sfdisk, then each file system at its offset.
fn partitioned(size: u64, table: &str, volumes: &[(u64, Vec<u8>)]) -> Vec<u8> {
    let room = tempfile::tempdir().unwrap();
    let image = room.path().join("disk");
    let file = File::create_new(&image).unwrap();
    file.set_len(size).unwrap();
    let mut sfdisk = Command::new("sfdisk")
        .arg("-q")
        .arg(&image)
        .stdin(Stdio::piped())
        .spawn()
        .expect("sfdisk (package fdisk)");
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    for (offset, bytes) in volumes {
        file.write_all_at(bytes, *offset).unwrap();
    }
    fs::read(image).unwrap()
}

fn grub_cfg() -> String {
    format!(
        "if [ -s $prefix/grubenv ]; then\n  load_env\nfi\n\
         if [ \"${{next_entry}}\" ]; then\n  set default=\"${{next_entry}}\"\nelse\n  set default=\"${{saved_entry}}\"\nfi\n\
         menuentry 'Debian GNU/Linux' --id new {{\n search --no-floppy --fs-uuid --set=root {UUID}\n\
         linux /boot/vmlinuz-2 root=UUID={UUID} ro\n initrd /boot/ucode.img /boot/initrd.img-2\n}}\n\
         menuentry 'Debian GNU/Linux, old' --id old {{\n search --no-floppy --fs-uuid --set=root {UUID}\n\
         linux /boot/vmlinuz-1 root=UUID={UUID} ro\n}}\n"
    )
}

const TABLE: &str = "label: gpt\nstart=2048, size=8192, type=U\nstart=10240, size=32768, type=L\n";

fn debian(env: &str) -> Vec<u8> {
    let kernel: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let config = grub_cfg();
    let files: &[(&str, &[u8])] = &[
        ("boot/grub/grub.cfg", config.as_bytes()),
        ("boot/grub/grubenv", env.as_bytes()),
        ("boot/vmlinuz-2", &kernel),
        ("boot/vmlinuz-1", b"old kernel"),
        ("boot/ucode.img", b"ucode"),
        ("boot/initrd.img-2", b"initrd"),
    ];
    partitioned(32 * MIB, TABLE, &[(5 * MIB, ext4(UUID, 16 * MIB, files))])
}

#[test]
fn a_gpt_disk_boots_its_default_entry_byte_for_byte() {
    let files = boot::read(&disk(debian("# GRUB Environment Block\nnext_entry=old\n####"))).unwrap();
    assert_eq!(files.entry.kernel, "/boot/vmlinuz-2", "a one-time choice is not repeated for ever");
    assert_eq!(files.entry.cmdline, format!("root=UUID={UUID} ro"));
    assert_eq!(files.kernel.len(), 3_000_000);
    assert!(files.kernel.iter().zip(0_u32..).all(|(b, i)| *b == (i.wrapping_mul(2_654_435_761) >> 24) as u8));
    assert_eq!(files.initrd, b"ucode\0\0\0initrd\0\0");

    let saved = boot::read(&disk(debian("# GRUB Environment Block\nsaved_entry=old\n####"))).unwrap();
    assert_eq!((saved.kernel.as_slice(), saved.initrd.len()), (b"old kernel".as_slice(), 0));
}

#[test]
fn the_backup_table_serves_when_the_primary_is_gone() {
    let mut image = debian("");
    image[512..1024].fill(0);
    assert_eq!(boot::read(&disk(image)).unwrap().entry.kernel, "/boot/vmlinuz-2");
}

#[test]
fn loader_entries_on_a_boot_partition_of_an_mbr_disk_are_chosen_by_grubs_default() {
    let entry = |v: &str| {
        format!(
            "title Fedora {v}\nversion {v}\nlinux /vmlinuz-{v}\ninitrd /initramfs-{v}.img\noptions root=UUID={OTHER} $kernelopts\n"
        )
    };
    let (old, new) = (entry("6.9"), entry("6.11"));
    let files: &[(&str, &[u8])] = &[
        ("grub2/grub.cfg", b"load_env\nset default=\"${saved_entry}\"\nblscfg\n"),
        ("grub2/grubenv", b"# GRUB Environment Block\nkernelopts=ro quiet\n"),
        ("loader/entries/m-6.9.conf", old.as_bytes()),
        ("loader/entries/m-6.11.conf", new.as_bytes()),
        ("vmlinuz-6.11", b"new"),
        ("initramfs-6.11.img", b"rd"),
    ];
    let table = "label: dos\nstart=2048, size=16384, type=83, bootable\nstart=18432, size=16384, type=83\n";
    let volumes = [(MIB, ext4(UUID, 8 * MIB, files)), (9 * MIB, ext4(OTHER, 8 * MIB, &[("etc/os", b"")]))];
    let files = boot::read(&disk(partitioned(20 * MIB, table, &volumes))).unwrap();
    assert_eq!(files.entry.title, "Fedora 6.11");
    assert_eq!(files.entry.cmdline, format!("root=UUID={OTHER} ro quiet"));
    assert_eq!((files.kernel.as_slice(), files.initrd.as_slice()), (b"new".as_slice(), b"rd\0\0".as_slice()));
}

/// As systemd-boot has it: entries on the EFI system partition, kernels in the directory of the machine.
fn systemd_boot(bits: &str, size: u64, default: &str) -> Vec<u8> {
    let kernel: Vec<u8> = (0..700_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let entry = |v: &str| {
        format!(
            "title Debian {v}\nversion {v}\nlinux /0123456789abcdef/{v}/linux\ninitrd /0123456789ABCDEF/{v}/initrd.img\noptions root=LABEL=x\n"
        )
    };
    let (old, new, loader) = (entry("6.9"), entry("6.11"), format!("timeout 3\ndefault {default}\n"));
    let files: &[(&str, &[u8])] = &[
        ("loader/loader.conf", loader.as_bytes()),
        ("loader/entries/0123456789abcdef-6.9.conf", old.as_bytes()),
        ("loader/entries/0123456789abcdef-6.11.conf", new.as_bytes()),
        ("0123456789abcdef/6.11/linux", &kernel),
        ("0123456789abcdef/6.11/initrd.img", b"new initrd"),
        ("0123456789abcdef/6.9/linux", b"old"),
        ("0123456789abcdef/6.9/initrd.img", b"old initrd"),
    ];
    let table = format!("label: gpt\nstart=2048, size={}, type=U\n", size / 512);
    partitioned(size + 2 * MIB, &table, &[(MIB, fat(bits, size, files))])
}

#[test]
fn loader_entries_on_an_efi_system_partition_boot() {
    for (bits, size) in [("12", MIB), ("16", 16 * MIB), ("32", 40 * MIB)] {
        let files = boot::read(&disk(systemd_boot(bits, size, "*-6.1?"))).unwrap();
        assert_eq!(
            (files.entry.title.as_str(), files.entry.cmdline.as_str()),
            ("Debian 6.11", "root=LABEL=x")
        );
        assert_eq!(files.kernel.len(), 700_000, "FAT{bits}");
        let same = |(i, b): (u32, &u8)| *b == (i.wrapping_mul(2_654_435_761) >> 24) as u8;
        assert!((0..).zip(&files.kernel).all(same), "FAT{bits}");
        assert_eq!(files.initrd, b"new initrd\0\0");
        let old = boot::read(&disk(systemd_boot(bits, size, "*-6.9"))).unwrap();
        assert_eq!((old.kernel.as_slice(), old.initrd.as_slice()), (&b"old"[..], &b"old initrd\0\0"[..]));
    }
}

#[test]
fn damaged_fat_never_panics_or_runs_on() {
    let image = systemd_boot("16", 16 * MIB, "*");
    let (start, tables) = (MIB as usize, 2048 + 2 * 65536);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for round in 0..200 {
        let mut damaged = image.clone();
        let (at, len) = [(0, 64), (512, 4096), (512, tables), (tables, 65536)][round % 4];
        for _ in 0..1 + next() % 8 {
            damaged[start + at + next() % len] = next() as u8;
        }
        let _ = boot::read(&disk(damaged));
    }
    // A table in which every cluster is followed by itself, and one in which all go round together.
    for step in [0, 1] {
        let mut rings = image.clone();
        for cluster in 2..30_000_usize {
            let to = if step == 0 { cluster } else { 2 + (cluster - 1) % 29_000 };
            rings[start + 512 * 4 + 2 * cluster..][..2].copy_from_slice(&(to as u16).to_le_bytes());
            rings[start + 512 + 2 * cluster..][..2].copy_from_slice(&(to as u16).to_le_bytes());
        }
        let _ = boot::read(&disk(rings));
    }
}

#[test]
fn a_disk_without_a_table_boots_by_extlinux() {
    let files: &[(&str, &[u8])] = &[
        ("boot/extlinux.conf", b"DEFAULT virt\nLABEL virt\n LINUX vmlinuz-virt\n APPEND root=/dev/vda\n"),
        ("boot/vmlinuz-virt", b"kernel"),
    ];
    let files = boot::read(&disk(ext4(UUID, 8 * MIB, files))).unwrap();
    assert_eq!(
        (files.kernel.as_slice(), files.entry.cmdline.as_str()),
        (b"kernel".as_slice(), "root=/dev/vda")
    );
}

#[test]
fn what_is_missing_is_named() {
    assert!(matches!(boot::read(&disk(vec![0; 4096])), Err(ReadError::NoConfig(0))));
    assert!(matches!(boot::read(&disk(Vec::new())), Err(ReadError::NoConfig(0))));

    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    assert!(matches!(boot::read(&disk(xfs)), Err(ReadError::Unread("XFS"))));

    let read = |files: &[(&str, &[u8])]| boot::read(&disk(ext4(OTHER, 8 * MIB, files)));
    assert!(matches!(read(&[("etc/os", b"")]), Err(ReadError::NoConfig(1))));
    match read(&[("boot/grub/grub.cfg", grub_cfg().as_bytes())]) {
        Err(ReadError::NoFileSystem { uuid }) => assert_eq!(uuid, UUID),
        other => panic!("{other:?}"),
    }
    match read(&[("boot/grub/grub.cfg", b"menuentry x {\n linux /gone\n}\n")]) {
        Err(ReadError::File { path, .. }) => assert_eq!(path, "/gone"),
        other => panic!("{other:?}"),
    }
    match read(&[("boot/grub/grub.cfg", b"if")]) {
        Err(ReadError::Config { path, source: BootError::Syntax { .. } }) => {
            assert_eq!(path, "/boot/grub/grub.cfg")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_claims_to_be_huge_is_refused_before_it_is_loaded() {
    let room = tempfile::tempdir().unwrap();
    plant(room.path(), &[("tree/boot/grub/grub.cfg", b"menuentry x {\n linux /huge\n}\n")]);
    File::create(room.path().join("tree/huge")).unwrap().set_len(1 << 40).unwrap();
    let image = room.path().join("image");
    File::create(&image).unwrap().set_len(8 * MIB).unwrap();
    let tree = room.path().join("tree");
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &image]).status().unwrap();
    assert!(made.success());
    match boot::read(&disk(fs::read(image).unwrap())) {
        Err(ReadError::TooLarge { size, .. }) => assert_eq!(size, 1 << 40),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_of_ones_own_is_told_a_root_that_it_finds() {
    let gpt = disk(debian(""));
    let cmdline = |disk: &Arc<dyn Disk>, own, ramdisk| boot::foreign_cmdline(disk, own, ramdisk).unwrap();
    let own = boot::entry(&gpt).unwrap().cmdline;
    assert_eq!(cmdline(&gpt, Some(&own), false), "root=/dev/vda2 ro");
    assert_eq!(cmdline(&gpt, Some(&own), true), own, "a RAM disk looks it up");
    for fine in ["quiet root=PARTUUID=0c5b5e5a-02 ro", "root=/dev/vda1", "a root=UUID=x root=/dev/vdb -- b"] {
        assert_eq!(cmdline(&gpt, Some(fine), false), fine);
    }
    assert_eq!(
        cmdline(&gpt, Some("quiet root=LABEL=cloud -- root=x"), false),
        "root=/dev/vda2 quiet -- root=x"
    );
    assert_eq!(cmdline(&gpt, Some("quiet"), false), "root=/dev/vda2 quiet");
    assert_eq!(cmdline(&gpt, Some("quiet"), true), "quiet");
    assert_eq!(cmdline(&gpt, None, false), "root=/dev/vda2");
    assert_eq!(cmdline(&gpt, None, true), "root=/dev/vda2");
    // Without a table the disk is the file system; of a table that begins with the second entry, it is number 2.
    let whole = disk(ext4(UUID, 8 * MIB, &[]));
    assert!(matches!(boot::entry(&whole), Err(ReadError::NoConfig(1))));
    assert_eq!(cmdline(&whole, None, false), "root=/dev/vda");
    let second = "label: dos\nunit: sectors\n2 : start=2048, size=16384, type=83\n";
    let second = disk(partitioned(16 * MIB, second, &[(MIB, ext4(UUID, 8 * MIB, &[]))]));
    assert_eq!(cmdline(&second, None, false), "root=/dev/vda2");
}

#[test]
fn an_entry_is_told_though_its_files_are_gone() {
    let config = b"menuentry x {\n linux /gone root=/dev/vda1 quiet\n}\n";
    let gone = disk(ext4(UUID, 8 * MIB, &[("boot/grub/grub.cfg", config)]));
    assert!(matches!(boot::read(&gone), Err(ReadError::File { .. })));
    assert_eq!(boot::entry(&gone).unwrap().cmdline, "root=/dev/vda1 quiet");
}

#[test]
fn partitions_are_where_sfdisk_put_them() {
    let image = partitioned(32 * MIB, TABLE, &[]);
    let found: Vec<_> =
        partitions(&disk(image.clone())).unwrap().iter().map(|p| (p.number(), p.start(), p.size())).collect();
    assert_eq!(found, [(Some(1), MIB, 4 * MIB), (Some(2), 5 * MIB, 16 * MIB)]);

    // The same table on a disk cut short: what does not fit is no partition.
    let cut = partitions(&disk(image[..(8 * MIB) as usize].to_vec())).unwrap();
    assert_eq!(cut.iter().map(|p| p.start()).collect::<Vec<_>>(), [MIB]);
}

/// Damages everything that the readers look at, a few bytes at a time, by a fixed sequence: each read ends without a
/// panic, and whatever is still read lies within its bounds.
#[test]
fn damaged_disks_never_panic() {
    let image = debian("");
    let volume = 5 * MIB as usize;
    let regions = [
        (0, 2048),
        (446, 66),
        (512, 92),
        (1024, 256),
        (volume + 1024, 512),
        (volume + 1024, 8192),
        (volume, MIB as usize),
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for round in 0..150 {
        let mut damaged = image.clone();
        let (start, len) = regions[round % regions.len()];
        for _ in 0..1 + next() % 8 {
            damaged[start + next() % len] = next() as u8;
        }
        let _ = boot::read(&disk(damaged));
    }
}
