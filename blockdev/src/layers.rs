//! A disk of several files: each reads what it does not hold from the next.

use std::fs::File;
use std::sync::Arc;

use crate::qcow2::{Chain, Sealed};
use crate::stack::{Stack, Under};
use crate::store::lock;
use crate::{Disk, DiskError, Key, Qcow2Disk, RawDisk, Result};

/// The most files of a disk.
pub const MAX_LAYERS: usize = 64;

/// What a file's bytes mean. It is from records, never probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2.
    Qcow2,
}

/// A file of a disk.
#[derive(Debug)]
pub struct Layer {
    /// The file.
    pub file: File,
    /// What its bytes mean.
    pub format: Format,
    /// What the guest's bytes in it are encrypted with.
    pub key: Option<Key>,
}

impl Layer {
    /// Another descriptor of the same open file.
    ///
    /// # Errors
    /// The process has too many.
    pub fn try_clone(&self) -> std::io::Result<Layer> {
        Ok(Layer { file: self.file.try_clone()?, format: self.format, key: self.key.clone() })
    }
}

impl From<(File, Format)> for Layer {
    fn from((file, format): (File, Format)) -> Layer {
        Layer { file, format, key: None }
    }
}

/// A disk that was opened.
#[derive(Clone)]
pub struct Opened {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The same, where it is written and can be given a new layer.
    pub stack: Option<Arc<Stack>>,
}

/// Opens a disk from its files, the top one first. Only the top one is ever written, unless `read_only`.
///
/// # Errors
/// `Format` when there is no layer, more than [`MAX_LAYERS`], or a raw one on another; `Key` when one is missing,
/// another's, or of a layer that is not encrypted; else those of the layer.
pub fn open_layers<L: Into<Layer>>(layers: Vec<L>, read_only: bool) -> Result<Arc<dyn Disk>> {
    Ok(open(layers.into_iter().map(Into::into).collect(), read_only)?.disk)
}

/// As [`open_layers`], for who may give it a new layer.
///
/// # Errors
/// Those of [`open_layers`].
pub fn open(mut layers: Vec<Layer>, read_only: bool) -> Result<Opened> {
    let count = layers.len();
    if layers.is_empty() || count > MAX_LAYERS {
        return Err(DiskError::format(format!("a disk has 1 to {MAX_LAYERS} layers, not {count}")));
    }
    let alone = |disk| Opened { disk, stack: None };
    if read_only {
        let disk = under(layers)?.disk()?;
        return disk.map(alone).ok_or_else(|| DiskError::format("a disk has at least one layer"));
    }
    let Layer { file, format, key } = layers.remove(0);
    match format {
        Format::Qcow2 => {
            let stack = Arc::new(Stack::open(file, key, under(layers)?)?);
            Ok(Opened { disk: stack.clone(), stack: Some(stack) })
        }
        Format::Raw => {
            check_raw(0, count, key.as_ref())?;
            Ok(alone(Arc::new(RawDisk::open(file, false)?)))
        }
    }
}

/// A raw layer lies on nothing, and is plain.
fn check_raw(depth: usize, count: usize, key: Option<&Key>) -> Result<()> {
    let why = |what| format!("layer {depth} of {count} is raw, so it cannot {what}");
    if depth + 1 < count {
        return Err(DiskError::format(why("lie on another")));
    }
    key.map_or(Ok(()), |_| Err(DiskError::key(why("be encrypted"))))
}

/// Layers that are only read.
pub(crate) fn under(layers: Vec<Layer>) -> Result<Under> {
    let mut under = Under::default();
    let count = layers.len();
    for (depth, Layer { file, format, key }) in layers.into_iter().enumerate().rev() {
        lock(&file, true)?;
        if format == Format::Raw {
            check_raw(depth, count, key.as_ref())?;
            under.bottom = Some(Arc::new(RawDisk::on(file, true)?));
            continue;
        }
        let file = Arc::new(file);
        match Sealed::open(file.clone(), key.as_ref())? {
            Some(sealed) => under.sealed.insert(0, Arc::new(sealed)),
            // Others' images may have what a chain does not look for.
            None => {
                let bottom = under.disk()?;
                let disk = Qcow2Disk::with_key(file, bottom, key.as_ref(), true)?;
                under = Under { sealed: Vec::new(), bottom: Some(Arc::new(disk)) };
            }
        }
    }
    // Said here, before anybody relies on it.
    if !under.sealed.is_empty() {
        Chain::new(under.sealed.clone(), under.bottom.clone())?;
    }
    Ok(under)
}
