//! Whether an account's limits let something be made. Where one is set, verbs are done one at a time, so that what is
//! counted holds still.

use crate::fault::{Fault, Result};
use crate::model::{Elastic, Group, Instance, InstanceState, Volume};

use super::{Launch, Region, Work};

fn raise(code: &'static str, what: &str, most: u32) -> Fault {
    let why =
        format!("You have reached your limit of {most} {what}; remove some, or raise it in limits.toml");
    Fault::new(code, why)
}

impl Region {
    pub(super) fn vcpus(&self, kind: &str) -> u32 {
        self.settings.types.get(kind).map_or(0, |kind| kind.vcpus)
    }

    /// How many virtual CPUs the account may have run beside those that do; `None`: any number.
    pub(super) fn vcpus_left(&self, work: &mut Work<'_>, account: &str) -> Result<Option<u32>> {
        let Some(most) = self.settings.limits.vcpus else { return Ok(None) };
        let mut used = 0_u32;
        for instance in work.all::<Instance>("")?.iter().filter(|instance| instance.account == account) {
            // As this call has left it so far.
            let now = work.get::<Instance>(&instance.id)?;
            let runs = |i: &Instance| matches!(i.state, InstanceState::Pending | InstanceState::Running);
            used = used.saturating_add(now.filter(runs).map_or(0, |i| self.vcpus(&i.instance_type)));
        }
        Ok(Some(most.saturating_sub(used)))
    }

    pub(super) fn no_vcpus(&self) -> Fault {
        let most = self.settings.limits.vcpus.unwrap_or(0);
        let why = format!(
            "You have requested more vCPU capacity than your current vCPU limit of {most} allows; stop instances, or raise vcpus in limits.toml"
        );
        Fault::new("VcpuLimitExceeded", why)
    }

    /// How many instances a launch may make, at least as many as it has to.
    pub(super) fn room_for(
        &self,
        work: &mut Work<'_>,
        account: &str,
        launch: &Launch,
        disks: usize,
    ) -> Result<u32> {
        let mut most = launch.max;
        if let Some(limit) = self.settings.limits.instances {
            let alive = |i: &&Instance| i.account == account && i.state != InstanceState::Terminated;
            let have = work.all::<Instance>("")?.iter().filter(alive).count() as u32;
            most = most.min(limit.saturating_sub(have));
            if most < launch.min {
                return Err(raise("InstanceLimitExceeded", "instances", limit));
            }
        }
        if let Some(left) = self.vcpus_left(work, account)? {
            most = most.min(left / self.vcpus(&launch.instance_type).max(1));
            if most < launch.min {
                return Err(self.no_vcpus());
            }
        }
        self.check_volumes(work, account, most as usize * disks)?;
        Ok(most)
    }

    pub(super) fn check_volumes(&self, work: &Work<'_>, account: &str, more: usize) -> Result<()> {
        let Some(limit) = self.settings.limits.volumes else { return Ok(()) };
        let have = work.all::<Volume>("")?.iter().filter(|volume| volume.account == account).count();
        match have + more > limit as usize {
            true => Err(raise("VolumeLimitExceeded", "volumes", limit)),
            false => Ok(()),
        }
    }

    /// To be asked while no other verb is done: what is counted has to hold still.
    pub(super) fn check_elastic(&self, work: &Work<'_>, account: &str) -> Result<()> {
        let limit = self.settings.limits.elastic_addresses;
        let have = work.all::<Elastic>("")?.iter().filter(|elastic| elastic.account == account).count();
        match have >= limit as usize {
            true => Err(raise("AddressLimitExceeded", "elastic addresses", limit)),
            false => Ok(()),
        }
    }

    pub(super) fn check_groups(&self, work: &Work<'_>, vpc: &str) -> Result<()> {
        let Some(limit) = self.settings.limits.security_groups else { return Ok(()) };
        let have = work.all::<Group>("")?.iter().filter(|group| group.vpc == vpc).count();
        match have >= limit as usize {
            true => Err(raise("SecurityGroupLimitExceeded", "security groups of a VPC", limit)),
            false => Ok(()),
        }
    }
}
