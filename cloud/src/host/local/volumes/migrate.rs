//! What earlier versions kept: a volume as one file and a base of its own, a snapshot as a raw file.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::chains::Chain;
use super::files::{failed, files, has_extension, link, remove, sync_dir};
use super::snapshots::Kept;
use super::{Result, Volumes, write_record};

/// Gives their files names of layers, and names these in the records. Cut off anywhere, it is done again.
pub(super) fn migrate(all: &Volumes) -> Result<()> {
    for path in files(&all.volumes)? {
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if !has_extension(&path, "json") {
            continue;
        }
        let text = fs::read(&path).map_err(|e| failed(&path, e))?;
        let mut record: Value = serde_json::from_slice(&text).map_err(|e| failed(&path, e.into()))?;
        let based = record.as_object_mut().and_then(|record| record.remove("based"));
        if record.get("layers").is_some() {
            continue;
        }
        let mut layers = Chain::new();
        for (kind, name, is) in [
            ("qcow2", format!("{id}.1.qcow2"), true),
            ("base", format!("{id}.raw"), based == Some(json!(true))),
        ] {
            if is {
                take(&path.with_extension(kind), &all.layers.join(&name))?;
                layers.push(name);
            }
        }
        if let Some(record) = record.as_object_mut() {
            record.insert("layers".into(), json!(layers));
        }
        sync_dir(&all.layers)?;
        write_record(&path, &record)?;
        tracing::info!(volume = id, "its files are layers now");
    }
    for path in files(&all.snapshots)? {
        let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        if !has_extension(&path, "raw") {
            continue;
        }
        let layer = format!("{id}.raw");
        take(&path, &all.layers.join(&layer))?;
        sync_dir(&all.layers)?;
        let size = fs::metadata(&path).map_err(|e| failed(&path, e))?.len();
        write_record(&path.with_extension("json"), &Kept { size, layers: vec![layer] })?;
        remove(&path)?;
    }
    Ok(())
}

/// One more name; a machine may have the file open.
fn take(from: &Path, to: &Path) -> Result<()> {
    match from.exists() {
        true => link(from, to),
        false => Ok(()),
    }
}
