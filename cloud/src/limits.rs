//! What an account may have at most: EC2's quotas, which the owner of the machine sets.

use serde::Deserialize;

/// The limits of each account in each region. What is not set has none but the host's own room.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// Virtual CPUs of the instances that run or are to run.
    pub vcpus: Option<u32>,
    /// Instances that are not terminated.
    pub instances: Option<u32>,
    /// Volumes.
    pub volumes: Option<u32>,
    /// Security groups of a network.
    pub security_groups: Option<u32>,
    /// Rules of a security group, inbound and outbound each: EC2 has 60.
    pub rules_per_group: u32,
    /// Security groups of an interface: EC2 has 5.
    pub groups_per_interface: u32,
    /// Elastic addresses: EC2 has 5.
    pub elastic_addresses: u32,
    /// Changes of a volume within 24 hours: EC2 has 4.
    pub changes_per_volume: u32,
    /// Volumes, and instances to their volumes and their network, are held to the speed of their types. If not, everything
    /// is as fast as the host.
    pub speed: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            vcpus: None,
            instances: None,
            volumes: None,
            security_groups: None,
            rules_per_group: 60,
            groups_per_interface: 5,
            elastic_addresses: 5,
            changes_per_volume: 4,
            speed: true,
        }
    }
}

impl Limits {
    /// Reads `limits.toml`: a name and what it is a line.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(text: &str) -> Result<Limits, toml::de::Error> {
        toml::from_str(text)
    }

    /// A limit that is at least checked by looking through all there is, alone.
    pub(crate) fn counts(&self) -> bool {
        [self.vcpus, self.instances, self.volumes, self.security_groups].iter().any(Option::is_some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_is_ec2s() {
        assert_eq!(Limits::read("").unwrap(), Limits::default());
        let some = Limits::read("vcpus = 8\nrules-per-group = 100").unwrap();
        assert_eq!((some.vcpus, some.rules_per_group, some.groups_per_interface), (Some(8), 100, 5));
        let free = Limits::read("speed = false\nchanges-per-volume = 1000").unwrap();
        assert_eq!((free.speed, free.changes_per_volume), (false, 1000));
        for bad in ["speed = 1", "vcpu = 8", "vcpus = -1", "vcpus = \"8\"", "vcpus"] {
            assert!(Limits::read(bad).is_err(), "{bad}");
        }
    }
}
