//! Images that are written to a bucket, and those that are made of what is in one.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ImageDevice, Tags};
use crate::host::Source;

/// An image that is, or was, written to a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreTask {
    /// Its id, which EC2 does not tell.
    pub id: String,
    /// Who asked for it.
    pub account: String,
    /// Where it goes.
    pub bucket: String,
    /// The object's name there.
    pub key: String,
    /// The object's tags.
    pub object_tags: Tags,
    /// When it was asked for.
    pub started: Timestamp,
    /// What is said of the image.
    pub image: StoredImage,
    /// What its disks hold, in their order.
    pub disks: Vec<Source>,
    /// How far it is.
    pub state: StoreState,
    /// Why it failed.
    pub failed: Option<String>,
}

/// How far the writing of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreState {
    /// It is under way.
    InProgress,
    /// The object is there.
    Completed,
    /// It is not.
    Failed,
}

impl StoreState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            StoreState::InProgress => "InProgress",
            StoreState::Completed => "Completed",
            StoreState::Failed => "Failed",
        }
    }
}

/// An image as its object says it: of somebody else, perhaps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredImage {
    /// Its id where it was stored.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What its owner says of it.
    pub description: String,
    /// The kernel that instances of it boot by default.
    pub kernel: Option<String>,
    /// The RAM disk that they boot by default.
    pub ramdisk: Option<String>,
    /// The root's device name.
    pub root_device: String,
    /// Enhanced networking.
    pub ena_support: bool,
    /// The disks an instance of it gets.
    pub devices: Vec<StoredDevice>,
    /// Its tags.
    pub tags: Tags,
}

/// A disk of a stored image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDevice {
    /// What the image says of it, but for the snapshot's id.
    pub device: ImageDevice,
    /// The snapshot it begins with, whose bytes follow in this order; `None`: it is empty.
    pub snapshot: Option<StoredSnapshot>,
}

/// A snapshot of a stored image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredSnapshot {
    /// Its volume's size in GiB.
    pub gib: u64,
    /// What its owner says of it.
    pub description: String,
    /// Its tags.
    pub tags: Tags,
}

/// An image that is being made of an object: gone once it is made, or cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreTask {
    /// The image's id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Where the object is.
    pub bucket: String,
    /// The object's name there.
    pub key: String,
    /// What the object said.
    pub image: StoredImage,
    /// What its disks become.
    pub disks: Vec<RestoreDisk>,
    /// It is not to be, and what there is of its disks goes: nothing else becomes of it any more.
    #[serde(default)]
    pub undone: bool,
}

/// A disk that is being made of an object's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreDisk {
    /// The snapshot's id.
    pub snapshot: String,
    /// The disk's size in bytes.
    pub bytes: u64,
    /// The snapshot's tags.
    pub tags: Tags,
    /// It is there.
    pub done: bool,
}
