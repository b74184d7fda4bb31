//! Snapshots: of volumes, and copies of other snapshots.

use crate::fault::{Fault, Result};
use crate::host::Source;
use crate::id;
use crate::model::{Copied, Image, Snapshot, Tags, Volume, VolumeState};

use super::{Region, Work, now, tags};

/// EC2's name of the volume where there was none.
pub(super) const NO_VOLUME: &str = "vol-ffffffff";

/// What CopySnapshot asks for.
#[derive(Debug, Clone, Default)]
pub struct SnapshotCopy {
    /// The snapshot's id in its region.
    pub snapshot: String,
    /// What the copy is said to be.
    pub description: String,
    /// The copy's tags.
    pub tags: Tags,
}

/// A snapshot that the account may read, and that is complete.
pub(super) fn readable(work: &mut Work<'_>, account: &str, id: &str) -> Result<Snapshot> {
    id::check(id, "snap", "InvalidSnapshotID")?;
    let missing = || Fault::not_found("InvalidSnapshot", "snapshot", id);
    let known = |s: &Snapshot| s.readable(account) && !s.deleting;
    let snapshot = work.get::<Snapshot>(id)?.filter(known).ok_or_else(missing)?;
    match snapshot.complete {
        true => Ok(snapshot),
        false => Err(Fault::new(
            "IncorrectState",
            format!("The snapshot '{id}' is not completed; wait until it is"),
        )),
    }
}

/// A snapshot of a volume, begun.
pub(super) fn begun(volume: &Volume, description: &str, tags: Tags) -> Result<Snapshot> {
    if volume.state != VolumeState::Ready {
        let why = format!("The volume '{}' is not 'available' or 'in-use'", volume.id);
        return Err(Fault::new("IncorrectState", why));
    }
    let id = id::new("snap");
    Ok(Snapshot {
        source: Source::Snapshot(id.clone()),
        id,
        account: volume.account.clone(),
        volume: volume.id.clone(),
        gib: volume.gib,
        started: now(),
        description: description.into(),
        copy_of: None,
        public: false,
        shared: Vec::new(),
        complete: false,
        failed: None,
        deleting: false,
        tags,
    })
}

/// A copy of a snapshot of another region, or of the same, begun.
pub(super) fn copied(
    from: &Region,
    of: &Snapshot,
    account: &str,
    description: String,
    tags: Tags,
) -> Snapshot {
    let id = id::new("snap");
    Snapshot {
        source: Source::Snapshot(id.clone()),
        id,
        account: account.into(),
        volume: NO_VOLUME.into(),
        gib: of.gib,
        started: now(),
        description,
        copy_of: Some(Copied { region: from.settings.name.clone(), source: of.source.clone() }),
        public: false,
        shared: Vec::new(),
        complete: false,
        failed: None,
        deleting: false,
        tags,
    }
}

impl Region {
    /// Takes a snapshot of a volume. It is `pending` when this returns.
    ///
    /// # Errors
    /// `IncorrectState`, `InvalidVolume.*`.
    pub fn create_snapshot(
        &self,
        account: &str,
        volume: &str,
        description: &str,
        tags: &Tags,
    ) -> Result<Snapshot> {
        tags::check(tags)?;
        self.transact(|work| {
            let volume: Volume = tags::own(work, account, volume)?;
            let snapshot = begun(&volume, description, tags.clone())?;
            work.put(&snapshot)?;
            Ok(snapshot)
        })
    }

    /// Copies a snapshot of `from`, which may be this region. It is `pending` when this returns.
    ///
    /// # Errors
    /// `InvalidSnapshot.*`, `IncorrectState`.
    pub fn copy_snapshot(&self, account: &str, from: &Region, ask: &SnapshotCopy) -> Result<Snapshot> {
        tags::check(&ask.tags)?;
        let of = from.transact(|work| readable(work, account, &ask.snapshot))?;
        let copy = copied(from, &of, account, ask.description.clone(), ask.tags.clone());
        self.transact(|work| {
            work.put(&copy)?;
            Ok(copy.clone())
        })
    }

    /// Changes who may make volumes of a snapshot.
    ///
    /// # Errors
    /// `InvalidSnapshot.*`.
    pub fn modify_snapshot(&self, account: &str, id: &str, job: impl Fn(&mut Snapshot)) -> Result<()> {
        self.transact(|work| {
            let mut snapshot: Snapshot = tags::own(work, account, id)?;
            job(&mut snapshot);
            work.put(&snapshot)
        })
    }

    /// Deletes a snapshot that no image needs.
    ///
    /// # Errors
    /// `InvalidSnapshot.InUse`, `InvalidSnapshot.*`.
    pub fn delete_snapshot(&self, account: &str, id: &str) -> Result<()> {
        self.transact_alone(|work| {
            let mut snapshot: Snapshot = tags::own(work, account, id)?;
            if snapshot.deleting {
                return Err(Fault::not_found("InvalidSnapshot", "snapshot", id));
            }
            let uses =
                |image: &Image| image.devices.iter().any(|device| device.snapshot.as_deref() == Some(id));
            if let Some(image) = work.all::<Image>("")?.iter().find(|image| uses(image)) {
                let why = format!("The snapshot {id} is currently in use by {}", image.id);
                return Err(Fault::new("InvalidSnapshot.InUse", why));
            }
            snapshot.deleting = true;
            work.put(&snapshot)
        })
    }
}
