//! Volumes.

use crate::fault::{Fault, Result};
use crate::host::Source;
use crate::id;
use crate::model::{Shape, Tags, Volume, VolumeState};

use super::{Encryption, Region, now, recall, remember, snapshots, tags};

/// Type, least and most GiB, IOPS (least, most, default), throughput (least, most, default).
type Kind = (&'static str, (u64, u64), Option<(u64, u64, u64)>, Option<(u64, u64, u64)>);

/// As EC2 documents them.
const KINDS: &[Kind] = &[
    ("gp3", (1, 65_536), Some((3_000, 80_000, 3_000)), Some((125, 2_000, 125))),
    ("gp2", (1, 16_384), None, None),
    ("io1", (4, 16_384), Some((100, 64_000, 0)), None),
    ("io2", (4, 65_536), Some((100, 256_000, 0)), None),
    ("st1", (125, 16_384), None, None),
    ("sc1", (125, 16_384), None, None),
    ("standard", (1, 1_024), None, None),
];

/// The most operations a second for each GiB. gp3 has what it has by default whatever its size.
fn iops_per_gib(kind: &str) -> u64 {
    match kind {
        "io1" => 50,
        "io2" => 1000,
        _ => 500,
    }
}

impl Shape {
    /// A shape that EC2 has; what is not said is as the type has it.
    pub(crate) fn new(
        kind: Option<&str>,
        gib: u64,
        iops: Option<u64>,
        throughput: Option<u64>,
    ) -> Result<Shape> {
        let name = kind.unwrap_or("gp2");
        let known = || KINDS.iter().map(|kind| kind.0).collect::<Vec<_>>().join(", ");
        let kind = KINDS.iter().find(|kind| kind.0 == name);
        let (_, (least, most), speeds, flows) =
            kind.ok_or_else(|| Fault::value("volumeType", name, &format!("There are: {}.", known())))?;
        if !(*least..=*most).contains(&gib) {
            let why = format!("A volume of the type {name} has {least} to {most} GiB.");
            return Err(Fault::value("size", &gib.to_string(), &why));
        }
        let iops = match (speeds, iops, name) {
            (None, None, "gp2") => Some((gib * 3).clamp(100, 16_000)),
            (None, None, _) => None,
            (None, Some(_), _) => {
                return Err(Fault::combination(format!(
                    "The parameter iops is not supported for {name} volumes."
                )));
            }
            (Some((_, _, 0)), None, _) => {
                return Err(Fault::new(
                    "MissingParameter",
                    format!("The parameter iops must be specified for {name} volumes."),
                ));
            }
            (Some((least, most, default)), given, _) => {
                let iops = given.unwrap_or(*default);
                if !(*least..=*most).contains(&iops) {
                    let why = format!("A volume of the type {name} has {least} to {most} IOPS.");
                    return Err(Fault::value("iops", &iops.to_string(), &why));
                }
                let (ratio, per_gib) = (iops as f64 / gib as f64, iops_per_gib(name));
                if iops > *default && iops > gib.saturating_mul(per_gib) {
                    let why =
                        format!("Iops to volume size ratio of {ratio:.6} is too high; maximum is {per_gib}");
                    return Err(Fault::new("InvalidParameterValue", why));
                }
                Some(iops)
            }
        };
        let throughput = match (flows, throughput) {
            (None, None) => None,
            (None, Some(_)) => {
                let why = format!("The parameter throughput is not supported for {name} volumes.");
                return Err(Fault::combination(why));
            }
            (Some((least, most, default)), given) => {
                let flow = given.unwrap_or(*default);
                if !(*least..=*most).contains(&flow) {
                    let why = format!("A volume of the type {name} has {least} to {most} MiB/s.");
                    return Err(Fault::value("throughput", &flow.to_string(), &why));
                }
                let iops = iops.unwrap_or_default();
                if flow * 4 > iops {
                    let ratio = flow as f64 / iops as f64;
                    let why = format!(
                        "Throughput (MiBps) to iops ratio of {ratio:.6} is too high; maximum is 0.250000 MiBps per iops"
                    );
                    return Err(Fault::new("InvalidParameterValue", why));
                }
                Some(flow)
            }
        };
        Ok(Shape { gib, kind: name.into(), iops, throughput })
    }
}

/// What CreateVolume asks for.
#[derive(Debug, Clone, Default)]
pub struct NewVolume {
    /// The zone's name.
    pub zone: String,
    /// The size in GiB; by default the snapshot's.
    pub gib: Option<u64>,
    /// The snapshot to begin with.
    pub snapshot: Option<String>,
    /// The volume type.
    pub kind: Option<String>,
    /// I/O operations a second.
    pub iops: Option<u64>,
    /// MiB a second.
    pub throughput: Option<u64>,
    /// Whether it is encrypted.
    pub encryption: Encryption,
    /// Its tags.
    pub tags: Tags,
    /// What makes the call idempotent.
    pub client_token: Option<String>,
    /// A digest of the request.
    pub request: String,
}

impl Region {
    /// Makes a volume. It is `creating` when this returns.
    ///
    /// # Errors
    /// Whatever of the request cannot be.
    pub fn create_volume(&self, account: &str, new: &NewVolume) -> Result<Volume> {
        tags::check(&new.tags)?;
        if !self.zones().contains(&new.zone) {
            let why = format!("The zone '{}' does not exist.", new.zone);
            return Err(Fault::new("InvalidZone.NotFound", why));
        }
        let token = new.client_token.as_ref().map(|token| format!("CreateVolume/{account}/{token}"));
        self.transact(|work| {
            let made = recall(work, token.as_deref(), &new.request)?;
            if let Some(volume) = made.and_then(|made| made.first().cloned()) {
                return work
                    .get::<Volume>(&volume)?
                    .ok_or_else(|| Fault::not_found("InvalidVolume", "volume", &volume));
            }
            let of = match &new.snapshot {
                Some(id) => Some(snapshots::readable(work, account, id)?),
                None => None,
            };
            let key = self.key_for(work, account, &new.encryption, of.as_ref())?;
            let (source, least) = of.map_or((Source::Empty, 0), |of| (of.source, of.gib));
            let given = new.gib.or((least > 0).then_some(least));
            let gib = given.ok_or_else(|| {
                Fault::new("MissingParameter", "The request must contain the parameter size or snapshotId")
            })?;
            if gib < least {
                let why = format!("It is smaller than the snapshot, which has {least} GiB.");
                return Err(Fault::value("size", &gib.to_string(), &why));
            }
            let shape = Shape::new(new.kind.as_deref(), gib, new.iops, new.throughput)?;
            self.check_volumes(work, account, 1)?;
            let volume = Volume {
                id: id::new("vol"),
                account: account.into(),
                gib,
                kind: shape.kind,
                iops: shape.iops,
                throughput: shape.throughput,
                zone: new.zone.clone(),
                snapshot: new.snapshot.clone(),
                source,
                created: now(),
                state: VolumeState::Creating,
                key,
                failed: None,
                instance: None,
                client_token: new.client_token.clone(),
                modification: None,
                modified: Vec::new(),
                tags: new.tags.clone(),
            };
            work.put(&volume)?;
            remember(work, token.as_deref(), &new.request, vec![volume.id.clone()])?;
            Ok(volume)
        })
    }

    /// Deletes a volume that no instance has.
    ///
    /// # Errors
    /// `VolumeInUse`, `IncorrectState`, `InvalidVolume.*`.
    pub fn delete_volume(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            let mut volume: Volume = tags::own(work, account, id)?;
            if let Some(instance) = &volume.instance {
                let why = format!("Volume {id} is currently attached to {instance}");
                return Err(Fault::new("VolumeInUse", why));
            }
            match volume.state {
                VolumeState::Creating => {
                    let why = format!("The volume '{id}' is 'creating'; wait until it is 'available'");
                    Err(Fault::new("IncorrectState", why))
                }
                VolumeState::Deleting => Err(Fault::not_found("InvalidVolume", "volume", id)),
                _ => {
                    volume.state = VolumeState::Deleting;
                    work.put(&volume)
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_speeds_are_ec2s() {
        assert_eq!(Shape::new(None, 8, None, None).unwrap().iops, Some(100));
        let gp3 = Shape::new(Some("gp3"), 1, None, None).unwrap();
        assert_eq!((gp3.iops, gp3.throughput), (Some(3000), Some(125)));
        for (kind, gib, iops, throughput, code) in [
            ("gp4", 1, None, None, "InvalidParameterValue"),
            ("gp3", 0, None, None, "InvalidParameterValue"),
            ("gp3", 1, Some(100), None, "InvalidParameterValue"),
            ("gp3", 1, None, Some(9000), "InvalidParameterValue"),
            ("gp2", 1, Some(100), None, "InvalidParameterCombination"),
            ("io1", 4, None, None, "MissingParameter"),
            ("st1", 1, None, None, "InvalidParameterValue"),
            ("gp3", 6, Some(3001), None, "InvalidParameterValue"),
            ("gp3", 100, None, Some(751), "InvalidParameterValue"),
            ("io1", 4, Some(201), None, "InvalidParameterValue"),
            ("io2", 4, Some(4001), None, "InvalidParameterValue"),
        ] {
            let fault = Shape::new(Some(kind), gib, iops, throughput).unwrap_err();
            assert_eq!(fault.code, code, "{kind} {gib} {iops:?} {throughput:?}");
        }
        for (kind, gib, iops, throughput) in
            [("gp3", 8, Some(4000), Some(1000)), ("io1", 4, Some(200), None), ("io2", 4, Some(4000), None)]
        {
            assert!(Shape::new(Some(kind), gib, iops, throughput).is_ok(), "{kind}");
        }
    }
}
