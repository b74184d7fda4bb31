//! Bundles: images whose root is in a bucket, and how they come there.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Reason;
use crate::host::Source;

/// What an image's, or an instance's, root on instance store begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bundle {
    /// Where its manifest is: `BUCKET/PREFIX.manifest.xml`.
    pub location: String,
    /// SHA-256 of the manifest, in hexadecimal: another one is another bundle.
    pub digest: String,
    /// The root disk's size in bytes.
    pub bytes: u64,
}

impl Bundle {
    /// The bucket, and the manifest's name in it.
    pub fn place(&self) -> (&str, &str) {
        self.location.split_once('/').unwrap_or((&self.location, ""))
    }

    /// What the host calls what it keeps of it.
    pub fn template(&self) -> String {
        crate::id::of("snap", &self.digest)
    }
}

/// A bundle that the host may keep, so that it is fetched once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleTemplate {
    /// What the host calls it.
    pub id: String,
    /// When an image of it came or went last.
    pub changed: Timestamp,
}

/// A root disk that is, or was, written to a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleTask {
    /// Its id, `bun-…`.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// The instance whose root it is; `None`: an image's.
    pub instance: Option<String>,
    /// What the disk is: the snapshot that is taken of the volume named beside it, or what is there.
    pub source: Source,
    /// The volume.
    pub volume: Option<String>,
    /// The kernel that it boots.
    pub kernel: Option<String>,
    /// The RAM disk that it boots.
    pub ramdisk: Option<String>,
    /// Where it goes.
    pub bucket: String,
    /// What its objects are called: `PREFIX.manifest.xml`, `PREFIX.part.0` and so on.
    pub prefix: String,
    /// When it was asked for.
    pub started: Timestamp,
    /// When its state changed last.
    pub updated: Timestamp,
    /// How far it is.
    pub state: BundleState,
    /// How many of its parts may be there, at most: what is removed of one that is not to be.
    #[serde(default)]
    pub parts: usize,
    /// All of it is there, and its manifest: what was kept for it may go.
    #[serde(default)]
    pub written: bool,
    /// Why it failed, or is about to.
    pub failed: Option<Reason>,
}

/// How far a bundle is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BundleState {
    /// It has not begun.
    Pending,
    /// The disk is being kept as it is at an instant.
    Bundling,
    /// It is being written.
    Storing,
    /// It is not to be.
    Cancelling,
    /// It is there.
    Complete,
    /// It is not.
    Failed,
}

impl BundleState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            BundleState::Pending => "pending",
            BundleState::Bundling => "bundling",
            BundleState::Storing => "storing",
            BundleState::Cancelling => "cancelling",
            BundleState::Complete => "complete",
            BundleState::Failed => "failed",
        }
    }

    /// Nothing more becomes of it.
    pub fn is_over(self) -> bool {
        matches!(self, BundleState::Complete | BundleState::Failed)
    }
}
