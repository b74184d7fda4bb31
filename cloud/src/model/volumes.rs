//! Volumes, who has them, and what is kept of them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Modification, Reason, Tags};
use crate::host::Source;

/// A disk of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name, such as `/dev/sdf`.
    pub name: String,
    /// The volume.
    pub volume: String,
    /// When it was attached.
    pub attached: Timestamp,
    /// The volume goes with the instance.
    pub delete_on_termination: bool,
    /// How it stands.
    #[serde(default)]
    pub state: AttachmentState,
}

/// How a volume of an instance stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    /// The machine that runs is to get it.
    Attaching,
    /// The instance has it.
    #[default]
    Attached,
    /// The guest is asked to let it go.
    Detaching,
    /// It is taken from the guest.
    Forced,
}

impl AttachmentState {
    /// EC2's name of the state.
    pub fn name(self) -> &'static str {
        match self {
            AttachmentState::Attaching => "attaching",
            AttachmentState::Attached => "attached",
            AttachmentState::Detaching | AttachmentState::Forced => "detaching",
        }
    }

    /// It is on its way out.
    pub fn leaves(self) -> bool {
        matches!(self, AttachmentState::Detaching | AttachmentState::Forced)
    }
}

/// How a volume stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// The host is to make it.
    Creating,
    /// It is there.
    Ready,
    /// The host is to remove it.
    Deleting,
    /// The host could not make it.
    Error,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its size in GiB.
    pub gib: u64,
    /// The volume type.
    pub kind: String,
    /// I/O operations a second, where the type has them.
    pub iops: Option<u64>,
    /// MiB a second, where the type has it.
    pub throughput: Option<u64>,
    /// The zone's name.
    pub zone: String,
    /// The snapshot it was made of.
    pub snapshot: Option<String>,
    /// Where its bytes came from.
    pub source: Source,
    /// When it was made.
    pub created: Timestamp,
    /// How it stands.
    pub state: VolumeState,
    /// The key that it is encrypted with; `None`: it is not.
    #[serde(default)]
    pub key: Option<String>,
    /// Why it could not be made.
    #[serde(default)]
    pub failed: Option<Reason>,
    /// The instance that has it.
    pub instance: Option<String>,
    /// What made it idempotent.
    pub client_token: Option<String>,
    /// The latest change of its size, type or speed.
    #[serde(default)]
    pub modification: Option<Modification>,
    /// When the changes of the last 24 hours were asked for.
    #[serde(default)]
    pub modified: Vec<Timestamp>,
    /// Its tags.
    pub tags: Tags,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// The volume it was taken of; EC2's `vol-ffffffff` where there was none.
    pub volume: String,
    /// The volume's size in GiB.
    pub gib: u64,
    /// When it was begun.
    pub started: Timestamp,
    /// What its owner says of it.
    pub description: String,
    /// What a volume of it begins with.
    pub source: Source,
    /// Those that are taken at one instant, this one among them; the first of them stands for all.
    #[serde(default)]
    pub together: Vec<String>,
    /// What it is a copy of, rather than of its volume.
    #[serde(default)]
    pub copy_of: Option<Copied>,
    /// The key that it is encrypted with; `None`: it is not.
    #[serde(default)]
    pub key: Option<String>,
    /// Every account may make volumes of it.
    #[serde(default)]
    pub public: bool,
    /// These accounts may.
    #[serde(default)]
    pub shared: Vec<String>,
    /// It is complete.
    pub complete: bool,
    /// Why it could not be made.
    pub failed: Option<String>,
    /// It is to go.
    pub deleting: bool,
    /// Its tags.
    pub tags: Tags,
}

impl Snapshot {
    /// It is still to be made.
    pub fn is_pending(&self) -> bool {
        !self.complete && self.failed.is_none()
    }

    /// Whether an account may read it. A template's is the host's, for everyone.
    pub fn readable(&self, account: &str) -> bool {
        let template = matches!(self.source, Source::Template(_));
        self.account == account || self.public || template || self.shared.iter().any(|have| have == account)
    }
}

/// What a copy is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// The region it is in.
    pub region: String,
    /// What holds the bytes there.
    pub source: Source,
}
