//! Snapshots that are taken from time to time, and kept so many: what EC2's Data Lifecycle Manager does, by the owner's file.
//!
//! What was done is read off the snapshots themselves, by the tags that EC2's have: whoever comes after a crash, or after
//! a night that the machine was off, takes what is missing, once.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::civil::Time;
use serde::Deserialize;

use crate::fault::{Fault, Result};
use crate::model::{Instance, InstanceState, Snapshot, Tags, Volume, VolumeState};

use super::snapshots::{NewSnapshots, begun};
use super::{Region, tags};

/// EC2's tags of a policy's snapshots: which policy's, and that it is one's.
const POLICY: &str = "aws:dlm:lifecycle-policy-id";
const MANAGED: &str = "dlm:managed";
/// The instance that a snapshot was taken with.
const INSTANCE: &str = "instance-id";

/// What a policy takes snapshots of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Each volume that has the tags.
    #[default]
    Volumes,
    /// All volumes of each instance that has the tags, at one instant.
    Instances,
}

/// When snapshots are taken, of what, and how many are kept.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Policy {
    /// What has one of these tags.
    pub tags: Tags,
    /// What they are looked for at.
    #[serde(default)]
    pub of: Target,
    /// Hours from one to the next: 1, 2, 3, 4, 6, 8, 12, or whole days.
    pub every: u32,
    /// A time of the day (UTC) at which one is taken, such as `03:00`.
    #[serde(default)]
    pub at: Time,
    /// How many are kept of each volume: 1 to 1000, as EC2 has it.
    pub keep: u32,
    /// The volume's tags come along.
    #[serde(default)]
    pub copy_tags: bool,
    /// Of an instance: not of its root volume.
    #[serde(default)]
    pub without_root: bool,
    /// Tags that they are given.
    #[serde(default)]
    pub add_tags: Tags,
}

/// Policies by their names.
pub type Policies = BTreeMap<String, Policy>;

/// Reads `lifecycle.toml`: a table for each policy.
///
/// # Errors
/// What is wrong, and with which policy.
pub fn read(text: &str) -> std::result::Result<Policies, String> {
    let policies: Policies = toml::from_str(text).map_err(|e| e.to_string())?;
    for (name, policy) in &policies {
        let why = policy.wrong().or_else(|| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
            let named = (1..=64).contains(&name.len()) && name.chars().all(plain);
            (!named).then(|| "has no name of 1 to 64 letters, digits, - and _".to_owned())
        });
        if let Some(why) = why {
            return Err(format!("the policy {name} {why}"));
        }
    }
    Ok(policies)
}

impl Policy {
    fn wrong(&self) -> Option<String> {
        let every = self.every;
        if self.tags.is_empty() {
            return Some("names no tags: of what is it to take snapshots?".into());
        }
        if !([1, 2, 3, 4, 6, 8, 12].contains(&every)
            || every > 0 && every <= 8760 && every.is_multiple_of(24))
        {
            return Some(format!("is every {every} hours; it can be 1, 2, 3, 4, 6, 8, 12, or whole days"));
        }
        if !(1..=1000).contains(&self.keep) {
            return Some(format!("keeps {}; it can keep 1 to 1000", self.keep));
        }
        tags::check(&self.add_tags).err().map(|fault| format!("adds what can be no tag: {fault}"))
    }

    /// The latest time until `now` at which snapshots were to be taken.
    fn due(&self, now: Timestamp) -> Timestamp {
        let period = i64::from(self.every) * 3600;
        let first = i64::from(self.at.hour()) * 3600 + i64::from(self.at.minute()) * 60;
        let since = (now.as_second() - first).rem_euclid(period);
        Timestamp::from_second(now.as_second() - since).unwrap_or(now)
    }

    fn wants(&self, tags: &Tags) -> bool {
        self.tags.iter().any(|(key, value)| tags.get(key) == Some(value))
    }

    /// The tags of snapshots of this policy.
    fn own_tags(&self, name: &str, of: &Tags) -> Tags {
        let mut own = if self.copy_tags { of.clone() } else { Tags::new() };
        own.retain(|key, _| !key.starts_with("aws:"));
        own.extend(self.add_tags.clone());
        own.insert(POLICY.into(), name.into());
        own.insert(MANAGED.into(), "true".into());
        own
    }
}

impl Region {
    /// Takes the snapshots that are due at `now`, and deletes those that are too many. What cannot be done is logged, and
    /// tried again the next time.
    ///
    /// # Errors
    /// The store's.
    pub fn follow(&self, policies: &Policies, now: Timestamp) -> Result<()> {
        for (name, policy) in policies {
            let of_policy = |snapshot: &Snapshot| snapshot.tags.get(POLICY) == Some(name);
            let mut have: Vec<Snapshot> = self.all()?;
            have.retain(|snapshot| of_policy(snapshot) && snapshot.failed.is_none());
            let due = policy.due(now);
            let taken = |volume: &str| have.iter().any(|s| s.volume == volume && s.started >= due);
            let result = match policy.of {
                Target::Volumes => self.of_volumes(name, policy, now, &|volume| {
                    !taken(&volume.id) && volume.created <= due && policy.wants(&volume.tags)
                }),
                Target::Instances => self.of_instances(name, policy, now, &|instance| {
                    let done = instance.devices.iter().any(|device| taken(&device.volume));
                    !done && instance.launched <= due && policy.wants(&instance.tags)
                }),
            };
            result?;
            self.delete_old(name, policy, have)?;
        }
        Ok(())
    }

    fn of_volumes(
        &self,
        name: &str,
        policy: &Policy,
        now: Timestamp,
        wanted: &dyn Fn(&Volume) -> bool,
    ) -> Result<()> {
        for volume in self.all::<Volume>()?.into_iter().filter(|volume| wanted(volume)) {
            let taken = self.transact(|work| {
                let Some(volume) = work.get::<Volume>(&volume.id)? else { return Ok(None) };
                if volume.state != VolumeState::Ready {
                    return Ok(None);
                }
                let of = format!("Created for policy: {name}");
                let mut snapshot = begun(&volume, &of, policy.own_tags(name, &volume.tags))?;
                snapshot.started = now;
                work.put(&snapshot)?;
                Ok(Some(snapshot.id))
            });
            told(name, &volume.id, taken.map(|id| id.into_iter().collect()));
        }
        Ok(())
    }

    fn of_instances(
        &self,
        name: &str,
        policy: &Policy,
        now: Timestamp,
        wanted: &dyn Fn(&Instance) -> bool,
    ) -> Result<()> {
        let lives = |i: &Instance| matches!(i.state, InstanceState::Running | InstanceState::Stopped);
        for instance in self.all::<Instance>()?.into_iter().filter(|i| lives(i) && wanted(i)) {
            let mut own = policy.own_tags(name, &Tags::new());
            own.insert(INSTANCE.into(), instance.id.clone());
            let new = NewSnapshots {
                instance: instance.id.clone(),
                without_root: policy.without_root,
                description: format!("Created for policy: {name}"),
                copy_tags: policy.copy_tags,
                ..NewSnapshots::default()
            };
            let taken = self.take_snapshots(&instance.account, &new, &own, now);
            told(name, &instance.id, taken.map(|all| all.into_iter().map(|s| s.id).collect()));
        }
        Ok(())
    }

    /// Of each volume the latest are kept; only those count that are whole.
    fn delete_old(&self, name: &str, policy: &Policy, have: Vec<Snapshot>) -> Result<()> {
        let mut of_volume = BTreeMap::<String, Vec<Snapshot>>::new();
        for snapshot in have.into_iter().filter(|s| s.complete && !s.deleting) {
            of_volume.entry(snapshot.volume.clone()).or_default().push(snapshot);
        }
        for mut snapshots in of_volume.into_values() {
            snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.started));
            for old in snapshots.into_iter().skip(policy.keep as usize) {
                match self.delete_snapshot(&old.account, &old.id) {
                    Ok(()) => tracing::info!(policy = name, snapshot = old.id, "it is deleted, being old"),
                    // An image may need it.
                    Err(fault) => tracing::info!(policy = name, snapshot = old.id, %fault, "it stays"),
                }
            }
        }
        Ok(())
    }
}

fn told(policy: &str, of: &str, taken: std::result::Result<Vec<String>, Fault>) {
    match taken {
        Ok(snapshots) if snapshots.is_empty() => {}
        Ok(snapshots) => tracing::info!(policy, of, ?snapshots, "its time has come"),
        Err(fault) => tracing::warn!(policy, of, %fault, "no snapshot is taken"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_says_when() {
        let read = |every: u32, at: &str| {
            let text =
                format!("[p]\ntags = {{ Backup = \"yes\" }}\nevery = {every}\nat = \"{at}\"\nkeep = 3\n");
            read(&text).map(|policies| policies["p"].clone())
        };
        let due = |every, at, now: &str| read(every, at).unwrap().due(now.parse().unwrap()).to_string();
        assert_eq!(due(24, "03:00", "2026-11-25T02:59:59Z"), "2026-11-24T03:00:00Z");
        assert_eq!(due(24, "03:00", "2026-11-25T03:00:00Z"), "2026-11-25T03:00:00Z");
        assert_eq!(due(6, "09:30", "2026-11-25T02:00:00Z"), "2026-11-24T21:30:00Z");
        assert_eq!(due(1, "00:15", "2026-11-25T02:14:00Z"), "2026-11-25T01:15:00Z");
        let week = due(168, "03:00", "2026-11-25T03:00:00Z");
        assert!(("2026-11-18T03:00:01Z"..="2026-11-25T03:00:00Z").contains(&&*week), "{week}");
        for bad in [5, 0, 36, 24 * 366] {
            assert!(read(bad, "03:00").unwrap_err().contains("the policy p"), "{bad}");
        }
        assert!(read(24, "25:00").is_err());
    }

    #[test]
    fn what_is_wrong_with_a_policy_is_told() {
        for (text, why) in [
            ("[p]\ntags = {}\nevery = 24\nkeep = 1", "names no tags"),
            ("[p]\ntags = { a = \"b\" }\nevery = 24\nkeep = 0", "keeps 0"),
            ("[p]\ntags = { a = \"b\" }\nevery = 24\nkeep = 1\nadd-tags = { \"aws:x\" = \"y\" }", "aws:x"),
            ("[\"a b\"]\ntags = { a = \"b\" }\nevery = 24\nkeep = 1", "has no name"),
            ("[p]\ntags = { a = \"b\" }\nevery = 24\nkeep = 1\nsometimes = true", "sometimes"),
        ] {
            assert!(read(text).unwrap_err().contains(why), "{why}");
        }
        assert_eq!(read("").unwrap(), Policies::new());
    }
}
