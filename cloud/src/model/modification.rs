//! What a volume is, and how it becomes another while it is in use.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Volume;

/// A volume's type, size and speed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Its size in GiB.
    pub gib: u64,
    /// The volume type.
    pub kind: String,
    /// I/O operations a second, where the type has them.
    pub iops: Option<u64>,
    /// MiB a second, where the type has it.
    pub throughput: Option<u64>,
}

/// How far a change of a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Progress {
    /// It is to be done.
    Modifying,
    /// It is done: the volume is what it was to be. Another has to wait a little.
    Optimizing,
    /// It is over.
    Completed,
    /// It could not be done; the volume is as it was.
    Failed,
}

impl Progress {
    /// EC2's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Progress::Modifying => "modifying",
            Progress::Optimizing => "optimizing",
            Progress::Completed => "completed",
            Progress::Failed => "failed",
        }
    }

    /// Nothing more comes of it.
    pub fn is_over(self) -> bool {
        matches!(self, Progress::Completed | Progress::Failed)
    }
}

/// A change of a volume's size, type or speed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Modification {
    /// When it was asked for.
    pub started: Timestamp,
    /// How far it is.
    pub progress: Progress,
    /// Since when it is there.
    pub since: Timestamp,
    /// What the volume was.
    pub original: Shape,
    /// What it is to be.
    pub target: Shape,
    /// Why it failed.
    pub failed: Option<String>,
}

impl Volume {
    /// What it is.
    pub fn shape(&self) -> Shape {
        let Volume { gib, kind, iops, throughput, .. } = self;
        Shape { gib: *gib, kind: kind.clone(), iops: *iops, throughput: *throughput }
    }

    /// The change that is to be done.
    pub fn pending(&self) -> Option<&Modification> {
        self.modification.as_ref().filter(|change| change.progress == Progress::Modifying)
    }

    /// Its size in GiB, or what it may have already while it grows.
    pub fn most_gib(&self) -> u64 {
        self.gib.max(self.pending().map_or(0, |change| change.target.gib))
    }
}
