//! `--root IMAGE|DIR`: the root of a machine that runs one command, under hutch's own init.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use hutch_blockdev::{Format, Layer};
use hutch_vmm::launch;

use crate::disks;
use crate::image;

/// Where our init is in the initrd that is put before the kernel's own.
pub const INIT: &str = "/hutch-init";

/// The disk that `root` names, to be read only: an image, or a directory, copied into a file system of its own.
pub fn layers(root: &Path) -> anyhow::Result<Vec<Layer>> {
    if root.is_dir() {
        let made = file_system(root).with_context(|| format!("cannot take {} as a root", root.display()))?;
        return Ok(vec![(made, Format::Raw).into()]);
    }
    Ok(vec![disks::layer(&image::disk(root)?, false)?])
}

/// An ext4 file system with all that is in `dir`, in a file without a name.
fn file_system(dir: &Path) -> anyhow::Result<File> {
    let file = disks::unnamed(dir)?;
    let (files, bytes) = measure(dir)?;
    // Holes cost nothing: rather too large than too small.
    let kib = (bytes / 1024).saturating_mul(5) / 4 + 16 * 1024;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let mut mkfs = Command::new("mke2fs");
    mkfs.args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1", "-N"]);
    mkfs.arg((files + 1024).to_string()).arg("-d").arg(dir).arg(path).arg(format!("{kib}k"));
    let made = mkfs.output().context("cannot run mke2fs; install the package e2fsprogs")?;
    if !made.status.success() {
        bail!("mke2fs: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    Ok(file)
}

/// How many files are below `dir`, and their bytes in whole blocks of 4 KiB. Links are not followed.
fn measure(dir: &Path) -> anyhow::Result<(u64, u64)> {
    let (mut files, mut bytes) = (0, 0_u64);
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        let what = || format!("cannot read {}", dir.display());
        for entry in fs::read_dir(&dir).with_context(what)? {
            let entry = entry.with_context(what)?;
            let about = entry.metadata().with_context(what)?;
            files += 1;
            bytes += about.len().next_multiple_of(4096);
            if about.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok((files, bytes))
}

/// Our init, and after it the kernel's own initrd, if there is one (kernel, driver-api/early-userspace/buffer-format).
pub fn initrd(own: Option<File>) -> anyhow::Result<File> {
    let path = match std::env::var_os("HUTCH_INIT") {
        Some(path) => PathBuf::from(path),
        None => std::env::current_exe()?.with_file_name("hutch-init"),
    };
    let init = fs::read(&path).with_context(|| {
        format!(
            "cannot read hutch's init {}; images/build-micro makes it, HUTCH_INIT tells where it is",
            path.display()
        )
    })?;
    let mut archive = Vec::new();
    entry(&mut archive, INIT.trim_start_matches('/'), 0o100755, &init);
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    let mut all: Box<dyn Read> = Box::new(&archive[..]);
    if let Some(mut own) = own {
        own.rewind()?;
        // Ours first: nothing can come behind an archive packed with lz4, whose end only the end of all tells.
        all = Box::new(all.chain(own));
    }
    Ok(launch::in_memory(&mut all)?)
}

/// One entry of a cpio archive in the "newc" format; name and data are each padded to 4 bytes.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn cpio_reads_our_archive() {
        let mut archive = Vec::new();
        entry(&mut archive, "hutch-init", 0o100755, b"12345");
        entry(&mut archive, "TRAILER!!!", 0, &[]);
        let mut list = Command::new("cpio");
        list.arg("-itv").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let Ok(mut list) = list.spawn() else {
            eprintln!("SKIPPED: no cpio");
            return;
        };
        list.stdin.take().unwrap().write_all(&archive).unwrap();
        let said = String::from_utf8(list.wait_with_output().unwrap().stdout).unwrap();
        assert!(said.starts_with("-rwxr-xr-x") && said.trim_end().ends_with("hutch-init"), "{said}");
    }

    #[test]
    fn a_directory_becomes_a_file_system() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        for n in 0..300 {
            fs::write(dir.path().join(format!("bin/{n}")), vec![b'x'; 5000]).unwrap();
        }
        std::os::unix::fs::symlink("/nowhere", dir.path().join("link")).unwrap();
        assert_eq!(measure(dir.path()).unwrap().0, 302);
        let file = file_system(dir.path()).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let check = Command::new("e2fsck").args(["-fn"]).arg(&path).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        assert!(file_system(&dir.path().join("none")).is_err());
    }
}
