//! What an instance is told about itself.

use crate::host;
use crate::metadata::{Metadata, Options};
use crate::model::{Group, Instance, KeyPair, Subnet, Vpc};

use super::Region;

/// The zone's id: the same for every account, where its letter need not be.
pub fn zone_id(region: &Region, zone: &str) -> String {
    let at = region.zones().iter().position(|known| known == zone).unwrap_or(0);
    format!("{}-az{}", region.settings().name, at + 1)
}

/// The private DNS name of an address.
pub fn private_name(region: &Region, ip: std::net::Ipv4Addr) -> String {
    format!("ip-{}.{}.internal", ip.to_string().replace('.', "-"), region.settings().name)
}

/// The public DNS name of an address.
pub fn public_name(region: &Region, ip: std::net::Ipv4Addr) -> String {
    format!("ec2-{}.{}.internal", ip.to_string().replace('.', "-"), region.settings().name)
}

pub(super) fn describe(
    region: &Region,
    instance: &Instance,
    interfaces: &[host::Interface],
    groups: &[Group],
    key: Option<&KeyPair>,
) -> Metadata {
    let primary = interfaces.first();
    let public = primary.and_then(|interface| interface.public).map(|public| public.ip);
    let subnet = region.get::<Subnet>(&instance.subnet).ok().flatten();
    let vpc = region.get::<Vpc>(&instance.vpc).ok().flatten();
    let mut disks =
        vec![("ami".to_owned(), instance.root_device.clone()), ("root".into(), instance.root_device.clone())];
    let more = instance.devices.iter().filter(|device| device.name != instance.root_device).enumerate();
    disks.extend(
        more.map(|(n, device)| (format!("ebs{}", n + 1), device.name.trim_start_matches("/dev/").to_owned())),
    );
    Metadata {
        options: Options {
            enabled: instance.metadata.enabled,
            tokens_required: instance.metadata.tokens_required,
            hop_limit: instance.metadata.hop_limit,
            ipv6: instance.metadata.ipv6,
        },
        account_id: instance.account.clone(),
        ami_id: instance.image.clone(),
        ami_launch_index: instance.launch_index,
        availability_zone: instance.zone.clone(),
        availability_zone_id: zone_id(region, &instance.zone),
        block_device_mapping: disks,
        hostname: primary.map(|interface| private_name(region, interface.ip)).unwrap_or_default(),
        instance_id: instance.id.clone(),
        instance_type: instance.instance_type.clone(),
        interface_id: primary.map(|interface| interface.id.clone()).unwrap_or_default(),
        kernel_id: instance.kernel.clone().unwrap_or_default(),
        ramdisk_id: instance.ramdisk.clone().unwrap_or_default(),
        life_cycle: "on-demand".into(),
        pending_time: instance.launched.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        local_ipv4: primary.map(|interface| interface.ip),
        public_ipv4: public,
        public_hostname: public.map(|ip| public_name(region, ip)).unwrap_or_default(),
        mac: primary.map(|interface| interface.mac.clone()).unwrap_or_default(),
        public_keys: key.map(|key| (key.name.clone(), key.public.clone())).into_iter().collect(),
        region: region.settings().name.clone(),
        reservation_id: instance.reservation.clone(),
        security_groups: groups.iter().map(|group| (group.id.clone(), group.name.clone())).collect(),
        subnet_id: instance.subnet.clone(),
        subnet_cidr: subnet.map(|subnet| subnet.cidr.to_string()).unwrap_or_default(),
        tags: if instance.metadata.tags { instance.tags.clone() } else { Default::default() },
        user_data: instance.user_data.clone(),
        vpc_id: instance.vpc.clone(),
        vpc_cidr: vpc.map(|vpc| vpc.cidr.to_string()).unwrap_or_default(),
    }
}
