//! Kernels and RAM disks of one's own, from a file to the store. Nothing of them is unpacked here, so no worker is needed:
//! they are copied, digested, and looked at where they lie, where nobody changes them any more.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use crate::boot::disk::{MAX_INITRD, MAX_KERNEL};
use crate::import::{CHUNK, ImportError, io_error, source_len, store_error};
use crate::store::{Architecture, Format, Image, Kind, Origin, Store};

/// How what kernels unpack as their first file system begins (kernel, Documentation/driver-api/early-userspace/buffer-format.rst
/// and lib/decompress.c).
const RAMDISKS: [&[u8]; 9] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"BZh",
    b"\x5d\0\0",
    b"\x89LZO\0",
];

/// Imports `source` as a kernel or a RAM disk of this name. `kernel` says why a file is no kernel that could be booted;
/// `progress` is told bytes done and in all.
///
/// # Errors
/// [`ImportError::Refused`]: it is none, or too large; those of the store and of the host. Nothing is left then.
pub fn import(
    store: &Store,
    source: &File,
    kind: Kind,
    name: &str,
    kernel: &dyn Fn(&File) -> Result<(), String>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Image, ImportError> {
    let len = source_len(source)?;
    let most = match kind {
        Kind::Machine => return Err(ImportError::Refused("it is to be a disk, which a worker reads".into())),
        Kind::Kernel => MAX_KERNEL,
        Kind::Ramdisk => MAX_INITRD,
    };
    if len == 0 {
        return Err(ImportError::Refused("it is empty".into()));
    }
    if len > most as u64 {
        let kind = kind.name();
        return Err(ImportError::Refused(format!("it has {len} bytes, more than the {most} of any {kind}")));
    }
    let full = store_error(store);
    let pending = store.begin(kind, name).map_err(&full)?;
    let sha256 = copy(source, len, pending.disk(), progress, &|error| match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            ImportError::Full(store.directory().to_owned())
        }
        _ => io_error("write it")(error),
    })?;
    let wrong = match kind {
        Kind::Ramdisk => ramdisk(pending.disk()).map_err(io_error("look at it"))?,
        _ => kernel(pending.disk()).err(),
    };
    if let Some(why) = wrong {
        return Err(ImportError::Refused(why));
    }
    let origin = Origin { format: Format::Raw, sha256, architecture: Architecture::X86_64 };
    pending.commit(origin).map_err(full)
}

/// Copies the first `len` bytes; tells their checksum.
fn copy(
    source: &File,
    len: u64,
    target: &File,
    progress: &mut dyn FnMut(u64, u64),
    unwritten: &dyn Fn(io::Error) -> ImportError,
) -> Result<String, ImportError> {
    let (mut hash, mut buffer, mut at) = (Sha256::new(), vec![0; CHUNK], 0);
    while at < len {
        let want = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
        let count = match source.read_at(buffer.get_mut(..want).unwrap_or_default(), at) {
            Ok(0) => {
                let short = io::Error::other("it became shorter while it was read");
                return Err(io_error("read it")(short));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(io_error("read it"))?,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        hash.update(bytes);
        target.write_all_at(bytes, at).map_err(unwritten)?;
        at += count as u64;
        progress(at, len);
    }
    Ok(format!("{:x}", hash.finalize()))
}

/// What is wrong with a RAM disk, as far as its first bytes tell.
fn ramdisk(file: &File) -> io::Result<Option<String>> {
    let mut head = [0; 8];
    let count = file.read_at(&mut head, 0)?;
    let head = head.get(..count).unwrap_or_default();
    let known = RAMDISKS.iter().any(|magic| head.starts_with(magic));
    let why = "it is no initramfs: neither a cpio archive (newc) nor one that is compressed by gzip, xz, zstd, lz4, bzip2, lzma or lzo";
    Ok((!known).then(|| why.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn accept(_: &File) -> Result<(), String> {
        Ok(())
    }

    fn add(room: &Path, kind: Kind, name: &str, bytes: &[u8]) -> Result<Image, ImportError> {
        let source = room.join("source");
        fs::write(&source, bytes).unwrap();
        let store = Store::open(room).unwrap();
        let refuse = |file: &File| {
            let mut head = [0; 3];
            file.read_exact_at(&mut head, 0).unwrap();
            if head == *b"bad" { Err("it is bad".to_owned()) } else { accept(file) }
        };
        import(&store, &File::open(source).unwrap(), kind, name, &refuse, &mut |_, _| {})
    }

    #[test]
    fn an_id_says_name_and_content() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let image = add(one.path(), Kind::Kernel, "mainline", b"bytes").unwrap();
        assert_eq!(Kind::of_id(&image.record.id), Some(Kind::Kernel));
        assert_eq!(fs::read(image.disk()).unwrap(), b"bytes");
        assert_eq!(fs::metadata(image.disk()).unwrap().permissions().mode() & 0o777, 0o444);
        let again = add(two.path(), Kind::Kernel, "mainline", b"bytes").unwrap();
        assert_eq!(again.record.id, image.record.id);
        assert_eq!(
            image.record.source_sha256,
            "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
        );
        for (name, bytes) in [("other", b"bytes"), ("mainline-2", b"other")] {
            let other = add(two.path(), Kind::Kernel, name, bytes).unwrap();
            assert_ne!(other.record.id, image.record.id);
        }
        assert!(matches!(add(two.path(), Kind::Kernel, "mainline", b"x"), Err(ImportError::Store(_))));
        let store = Store::open(one.path()).unwrap();
        assert_eq!(store.get(&image.record.id[..6]).unwrap(), image);
        store.remove("mainline").unwrap();
        assert_eq!(store.list().unwrap(), []);
    }

    #[test]
    fn what_is_none_is_refused_with_the_reason_and_nothing_is_left() {
        let room = tempfile::tempdir().unwrap();
        let large = room.path().join("large");
        File::create(&large).unwrap().set_len(MAX_KERNEL as u64 + 1).unwrap();
        for (kind, bytes, words) in [
            (Kind::Kernel, &b""[..], "empty"),
            (Kind::Kernel, b"bad", "it is bad"),
            (Kind::Ramdisk, b"0707", "no initramfs"),
            (Kind::Ramdisk, b"QFI\xfb....", "no initramfs"),
            (Kind::Machine, b"bytes", "a disk"),
        ] {
            match add(room.path(), kind, "name", bytes) {
                Err(ImportError::Refused(why)) => assert!(why.contains(words), "{why}"),
                other => panic!("{words}: {other:?}"),
            }
        }
        let store = Store::open(room.path()).unwrap();
        let file = File::open(&large).unwrap();
        let refused = import(&store, &file, Kind::Kernel, "name", &accept, &mut |_, _| {});
        assert!(matches!(refused, Err(ImportError::Refused(why)) if why.contains("more than")));
        let names: Vec<_> =
            fs::read_dir(room.path().join("images")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [".lock"]);
    }

    #[test]
    fn each_kind_of_ramdisk_is_one() {
        let room = tempfile::tempdir().unwrap();
        for (n, magic) in RAMDISKS.iter().enumerate() {
            let bytes = [magic, &b"...."[..]].concat();
            let image = add(room.path(), Kind::Ramdisk, &format!("ramdisk {n}"), &bytes).unwrap();
            assert_eq!(Kind::of_id(&image.record.id), Some(Kind::Ramdisk));
        }
    }
}
