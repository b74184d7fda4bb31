//! Snapshots: of volumes, and copies of other snapshots.

use std::time::Duration;

use jiff::Timestamp;

use crate::fault::{Fault, Result};
use crate::host::Source;
use crate::id;
use crate::model::{Copied, Device, Image, Instance, InstanceState, Snapshot, Tags, Volume, VolumeState};

use super::{Encryption, Region, Work, now, tags};

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
    /// Whether the copy is encrypted.
    pub encryption: Encryption,
}

/// What CreateSnapshots asks for.
#[derive(Debug, Clone, Default)]
pub struct NewSnapshots {
    /// The instance.
    pub instance: String,
    /// Not of its root volume.
    pub without_root: bool,
    /// Not of these volumes.
    pub without: Vec<String>,
    /// What their owner says of them.
    pub description: String,
    /// Their volumes' tags come along.
    pub copy_tags: bool,
    /// Their tags.
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
        gib: volume.most_gib(),
        started: now(),
        description: description.into(),
        together: Vec::new(),
        key: volume.key.clone(),
        copy_of: None,
        public: false,
        shared: Vec::new(),
        complete: false,
        failed: None,
        deleting: false,
        tags,
    })
}

/// Writes down snapshots that are taken at one instant.
pub(super) fn put_together(work: &mut Work<'_>, snapshots: &mut [Snapshot]) -> Result<()> {
    let together: Vec<String> = snapshots.iter().map(|snapshot| snapshot.id.clone()).collect();
    for snapshot in snapshots {
        snapshot.together.clone_from(&together);
        work.put(snapshot)?;
    }
    Ok(())
}

/// A copy of a snapshot of another region, or of the same, begun.
pub(super) fn copied(
    from: &Region,
    of: &Snapshot,
    account: &str,
    description: String,
    tags: Tags,
    key: Option<String>,
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
        together: Vec::new(),
        key,
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

    /// Takes snapshots of the volumes of an instance, all at one instant. They are `pending` when this returns.
    ///
    /// # Errors
    /// `InvalidInstanceID.*`, `IncorrectState`, `InvalidParameterValue`: what is left out is none of its data volumes, or
    /// nothing is left.
    pub fn create_snapshots(&self, account: &str, new: &NewSnapshots) -> Result<Vec<Snapshot>> {
        tags::check(&new.tags)?;
        self.take_snapshots(account, new, &Tags::new(), now())
    }

    /// Likewise, with tags that only we give, begun at `now`.
    pub(super) fn take_snapshots(
        &self,
        account: &str,
        new: &NewSnapshots,
        own: &Tags,
        now: Timestamp,
    ) -> Result<Vec<Snapshot>> {
        self.transact(|work| {
            let instance: Instance = tags::own(work, account, &new.instance)?;
            if !matches!(instance.state, InstanceState::Running | InstanceState::Stopped) {
                let why = format!("Instance '{}' is not 'running' or 'stopped'.", instance.id);
                return Err(Fault::new("IncorrectState", why));
            }
            let is_root = |device: &Device| device.name == instance.root_device;
            let data = |id: &String| instance.devices.iter().any(|d| d.volume == *id && !is_root(d));
            if let Some(id) = new.without.iter().find(|id| !data(id)) {
                let why = format!("It is no data volume of the instance '{}'.", instance.id);
                return Err(Fault::value("excludeDataVolumeId", id, &why));
            }
            let mut taken = Vec::new();
            for device in &instance.devices {
                if new.without.contains(&device.volume) || new.without_root && is_root(device) {
                    continue;
                }
                let volume: Volume = tags::own(work, account, &device.volume)?;
                let mut tags = if new.copy_tags { volume.tags.clone() } else { Tags::new() };
                tags.retain(|key, _| !key.starts_with("aws:"));
                tags.extend(new.tags.clone());
                tags::check(&tags)?;
                tags.extend(own.clone());
                taken.push(Snapshot { started: now, ..begun(&volume, &new.description, tags)? });
            }
            if taken.is_empty() {
                let why =
                    format!("No volume of the instance '{}' is left to take a snapshot of", instance.id);
                return Err(Fault::new("InvalidParameterValue", why));
            }
            put_together(work, &mut taken)?;
            Ok(taken)
        })
    }

    /// Copies a snapshot of `from`, which may be this region. It is `pending` when this returns.
    ///
    /// # Errors
    /// `InvalidSnapshot.*`, `IncorrectState`.
    pub fn copy_snapshot(&self, account: &str, from: &Region, ask: &SnapshotCopy) -> Result<Snapshot> {
        tags::check(&ask.tags)?;
        let of = from.transact(|work| readable(work, account, &ask.snapshot))?;
        self.transact(|work| {
            let key = self.key_for(work, account, &ask.encryption, Some(&of))?;
            let copy = copied(from, &of, account, ask.description.clone(), ask.tags.clone(), key);
            work.put(&copy)?;
            Ok(copy)
        })
    }

    /// Changes who may make volumes of a snapshot.
    ///
    /// # Errors
    /// `InvalidSnapshot.*`; `OperationNotPermitted`: what is encrypted is not for everyone.
    pub fn modify_snapshot(&self, account: &str, id: &str, job: impl Fn(&mut Snapshot)) -> Result<()> {
        self.transact(|work| {
            let mut snapshot: Snapshot = tags::own(work, account, id)?;
            job(&mut snapshot);
            if snapshot.public && snapshot.key.is_some() {
                let why = format!("The snapshot {id} is encrypted, so it cannot be for all accounts");
                return Err(Fault::new("OperationNotPermitted", why));
            }
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

    /// Looks at a snapshot. Returns when it is to be looked at again without a change.
    pub(super) fn step_snapshot(&self, id: &str) -> Result<Option<Duration>> {
        let Some(snapshot) = self.get::<Snapshot>(id)? else { return Ok(None) };
        let first = snapshot.together.first().filter(|first| *first != id);
        if snapshot.is_pending()
            && let Some(first) = first
            && self.get::<Snapshot>(first)?.is_some_and(|first| first.is_pending())
        {
            // It is taken with that one, and all of them are recorded at once; only then can it go.
            return Ok(snapshot.deleting.then_some(Duration::from_millis(50)));
        }
        let stands_for_others = first.is_none() && snapshot.together.len() > 1;
        if snapshot.deleting && !(snapshot.is_pending() && stands_for_others) {
            // A template stays: it is the image store's.
            if matches!(snapshot.source, Source::Snapshot(_)) {
                self.host.delete_snapshot(id).map_err(Fault::internal)?;
            }
            self.transact(|work| {
                work.delete::<Snapshot>(id);
                Ok(())
            })?;
            return Ok(None);
        }
        if !snapshot.is_pending() {
            return Ok(None);
        }
        let all = match snapshot.together.is_empty() {
            true => vec![snapshot.clone()],
            false => {
                let all = snapshot.together.iter().map(|id| self.get::<Snapshot>(id));
                all.filter_map(Result::transpose).collect::<Result<_>>()?
            }
        };
        let taken = match &snapshot.copy_of {
            None => {
                let all: Vec<_> = all.iter().map(|s| (s.id.as_str(), s.volume.as_str())).collect();
                self.host.create_snapshots(&all)
            }
            Some(from) => self
                .host_of(&from.region)?
                .content(&from.source)
                .and_then(|content| self.host.copy_snapshot(id, &content, snapshot.key.as_deref())),
        };
        self.transact(|work| {
            for snapshot in &all {
                let Some(mut snapshot) = work.get::<Snapshot>(&snapshot.id)? else { continue };
                snapshot.complete = taken.is_ok();
                snapshot.failed = taken.as_ref().err().map(ToString::to_string);
                work.put(&snapshot)?;
            }
            Ok(())
        })?;
        Ok(None)
    }
}
