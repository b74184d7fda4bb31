//! What `--disk` and `IMAGE` name: files and their formats, opened for the machine.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, bail};
use hutch_blockdev::store::lock;
use hutch_blockdev::{Disk, Format, Layer, open_layers, qcow2};
use nix::fcntl::OFlag;

/// What may be done with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Written and kept.
    Write,
    /// Only read.
    ReadOnly,
    /// Written, and all that forgotten at the end.
    Ephemeral,
}

/// `FILE[:ro|:ephemeral]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArg {
    path: PathBuf,
    how: Use,
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskArg, String> {
        let (path, how) = match text.rsplit_once(':') {
            Some((path, "ro")) => (path, Use::ReadOnly),
            Some((path, "ephemeral")) => (path, Use::Ephemeral),
            _ => (text, Use::Write),
        };
        if path.is_empty() {
            return Err("no file is named; write FILE, FILE:ro or FILE:ephemeral".into());
        }
        Ok(DiskArg { path: path.into(), how })
    }
}

/// The format that a file's name states: it is never read off bytes that a guest can write.
pub fn format_of(path: &Path) -> Format {
    if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("qcow2")) {
        Format::Qcow2
    } else {
        Format::Raw
    }
}

/// Opens a file of a disk, which no other machine may be writing.
pub fn layer(path: &Path, write: bool) -> anyhow::Result<Layer> {
    let what = || format!("the disk {}", path.display());
    // A pipe would be waited for.
    let kind = std::fs::metadata(path).with_context(|| format!("cannot open {}", what()))?.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        bail!("{} is no image file and no block device; name one", what());
    }
    let file = File::options().read(true).write(write).open(path);
    let file = file.with_context(|| format!("cannot open {}", what()))?;
    lock(&file, !write).with_context(what)?;
    Ok((file, format_of(path)).into())
}

/// The layers of `arg`, the top one first.
pub fn layers(arg: &DiskArg) -> anyhow::Result<Vec<Layer>> {
    match arg.how {
        Use::Write => Ok(vec![layer(&arg.path, true)?]),
        Use::ReadOnly => Ok(vec![layer(&arg.path, false)?]),
        Use::Ephemeral => on_top(layer(&arg.path, false)?, &arg.path, unnamed(&arg.path)?),
    }
}

/// The layers of an image's root disk: `volume` (made when it is not there yet), or one that is forgotten.
pub fn root_layers(image: &Path, volume: Option<&Path>) -> anyhow::Result<Vec<Layer>> {
    let base = layer(image, false)?;
    let Some(path) = volume else {
        return on_top(base, image, unnamed(image)?);
    };
    if path.exists() {
        return Ok(vec![(layer(path, true)?.file, Format::Qcow2).into(), base]);
    }
    let made = File::options().read(true).write(true).create_new(true).open(path);
    let made = made.with_context(|| format!("cannot make the volume {}", path.display()))?;
    on_top(base, image, made).inspect_err(|_| {
        // Half a volume is worth nothing.
        let _ = std::fs::remove_file(path);
    })
}

/// Makes `top`, an empty file, a volume on `base`.
fn on_top(base: Layer, path: &Path, top: File) -> anyhow::Result<Vec<Layer>> {
    let base = vec![base];
    let size = open(&base).with_context(|| format!("the image {}", path.display()))?.size();
    qcow2::create(&top, size).context("cannot make a volume")?;
    let mut layers = base;
    layers.insert(0, (top, Format::Qcow2).into());
    Ok(layers)
}

/// A file without a name, which is gone when the last process closes it; where there is room for a disk.
pub fn unnamed(for_what: &Path) -> anyhow::Result<File> {
    let dir = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let file = File::options().read(true).write(true).custom_flags(OFlag::O_TMPFILE.bits()).open(&dir);
    file.with_context(|| {
        let dir = dir.display();
        format!("cannot keep what is written to {} in {dir}; set TMPDIR to a directory", for_what.display())
    })
}

/// The disk that the layers make, to be read here and now.
pub fn open(layers: &[Layer]) -> anyhow::Result<Arc<dyn Disk>> {
    let layers = layers.iter().map(Layer::try_clone).collect::<std::io::Result<Vec<_>>>()?;
    Ok(open_layers(layers, true)?)
}

impl DiskArg {
    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.how == Use::ReadOnly
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_with_its_use() {
        let parse = |text: &str| text.parse::<DiskArg>().map(|d| (d.path, d.how));
        assert_eq!(parse("a.raw"), Ok(("a.raw".into(), Use::Write)));
        assert_eq!(parse("a:b.qcow2:ro"), Ok(("a:b.qcow2".into(), Use::ReadOnly)));
        assert_eq!(parse("/dev/sdb:ephemeral"), Ok(("/dev/sdb".into(), Use::Ephemeral)));
        assert!(parse(":ro").is_err() && parse("").is_err());
    }

    #[test]
    fn only_the_name_tells_the_format() {
        let format = |name: &str| format_of(Path::new(name));
        assert_eq!([format("a.qcow2"), format("b.QCOW2")], [Format::Qcow2; 2]);
        assert_eq!([format("qcow2"), format("a.img"), format("a.qcow2.raw")], [Format::Raw; 3]);
    }
}
