//! Imports of disks that are under way, and what came of those that are not.

use std::path::PathBuf;

use hutch_imagestore::store::Format;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Tags;

/// An import of a disk as a snapshot, or of disks as an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportTask {
    /// Its id: `import-snap-…`, or `import-ami-…` of one that makes an image.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// What its owner says of it.
    pub description: String,
    /// When it was asked for.
    pub started: Timestamp,
    /// The disks; an image's, root first.
    pub disks: Vec<ImportDisk>,
    /// The image that is made of them; `None`: none.
    pub image: Option<String>,
    /// How far it is.
    pub state: ImportState,
    /// Why it is where it is.
    pub message: String,
    /// When it was over.
    pub ended: Option<Timestamp>,
    /// What wraps the keys of its snapshots; `None`: they are plain.
    #[serde(default)]
    pub key: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// A disk of an import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportDisk {
    /// The device of an image.
    pub device: String,
    /// What its owner says of it.
    pub description: String,
    /// The file: below the directory that is for imports, or, with a whole path, where the machine's owner has it. `None`:
    /// the snapshot was there before.
    pub file: Option<PathBuf>,
    /// The file's format, where it is said.
    pub format: Option<Format>,
    /// The snapshot that it becomes.
    pub snapshot: String,
    /// The file's size in bytes.
    pub bytes: u64,
    /// The snapshot that it is an encrypted copy of.
    #[serde(default)]
    pub of: Option<String>,
    /// It is a snapshot.
    pub done: bool,
}

impl ImportDisk {
    /// Whether its snapshot is the import's own; else it was there before.
    pub fn is_made(&self) -> bool {
        self.file.is_some() || self.of.is_some()
    }
}

/// How far an import is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImportState {
    /// It is under way.
    Active,
    /// What was made of it is there.
    Completed,
    /// It is to be as if it had never been.
    Deleting,
    /// Nothing came of it.
    Deleted,
}

impl ImportState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            ImportState::Active => "active",
            ImportState::Completed => "completed",
            ImportState::Deleting => "deleting",
            ImportState::Deleted => "deleted",
        }
    }

    /// Nothing more becomes of it.
    pub fn is_over(self) -> bool {
        matches!(self, ImportState::Completed | ImportState::Deleted)
    }
}
