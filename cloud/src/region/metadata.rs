//! What an instance is told about itself.

use crate::metadata::{Card, Metadata, Options};
use crate::model::{Group, Instance, Interface, KeyPair, Subnet, Vpc};

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

/// What an instance is told about one of its interfaces, which is in these groups.
pub(super) fn card(region: &Region, interface: &Interface, groups: &[Group]) -> Card {
    let public = interface.public.as_ref().map(|public| public.ip);
    let subnet = region.get::<Subnet>(&interface.subnet).ok().flatten();
    let vpc = region.get::<Vpc>(&interface.vpc).ok().flatten();
    Card {
        device_number: interface.attachment.as_ref().map_or(0, |attachment| attachment.device_index),
        interface_id: interface.id.clone(),
        mac: interface.mac.clone(),
        local_hostname: private_name(region, interface.ip),
        local_ipv4s: interface.ips().collect(),
        public_ipv4: public,
        public_hostname: public.map(|ip| public_name(region, ip)).unwrap_or_default(),
        security_groups: groups.iter().map(|group| (group.id.clone(), group.name.clone())).collect(),
        subnet_id: interface.subnet.clone(),
        subnet_cidr: subnet.map(|subnet| subnet.cidr.to_string()).unwrap_or_default(),
        vpc_id: interface.vpc.clone(),
        vpc_cidr: vpc.map(|vpc| vpc.cidr.to_string()).unwrap_or_default(),
    }
}

pub(super) fn describe(
    region: &Region,
    instance: &Instance,
    cards: Vec<Card>,
    key: Option<&KeyPair>,
) -> Metadata {
    let primary = cards.first().cloned().unwrap_or_default();
    let mut disks =
        vec![("ami".to_owned(), instance.root_device.clone()), ("root".into(), instance.root_device.clone())];
    let more = instance.devices.iter().filter(|device| device.name != instance.root_device).enumerate();
    disks.extend(
        more.map(|(n, device)| (format!("ebs{}", n + 1), device.name.trim_start_matches("/dev/").to_owned())),
    );
    let kind = region.settings().types.get(&instance.instance_type);
    for index in 0..kind.map_or(0, |kind| kind.instance_store.len()) {
        let name = format!("ephemeral{index}");
        // By default as on EC2: behind the root.
        let own = format!("sd{}", char::from(b'b'.saturating_add(index as u8)));
        let device =
            instance.stores.get(&name).map_or(own, |device| device.trim_start_matches("/dev/").to_owned());
        disks.push((name, device));
    }
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
        ami_manifest_path: instance.bundle.as_ref().map(|b| b.location.clone()).unwrap_or_default(),
        availability_zone: instance.zone.clone(),
        availability_zone_id: zone_id(region, &instance.zone),
        block_device_mapping: disks,
        hostname: primary.local_hostname,
        instance_id: instance.id.clone(),
        instance_type: instance.instance_type.clone(),
        interface_id: primary.interface_id,
        kernel_id: instance.kernel.clone().unwrap_or_default(),
        ramdisk_id: instance.ramdisk.clone().unwrap_or_default(),
        life_cycle: "on-demand".into(),
        pending_time: instance.launched.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        local_ipv4: primary.local_ipv4s.first().copied(),
        public_ipv4: primary.public_ipv4,
        public_hostname: primary.public_hostname,
        mac: primary.mac,
        public_keys: key.map(|key| (key.name.clone(), key.public.clone())).into_iter().collect(),
        region: region.settings().name.clone(),
        reservation_id: instance.reservation.clone(),
        security_groups: primary.security_groups,
        subnet_id: instance.subnet.clone(),
        subnet_cidr: primary.subnet_cidr,
        tags: if instance.metadata.tags { instance.tags.clone() } else { Default::default() },
        user_data: instance.user_data.clone(),
        cards,
        vpc_id: instance.vpc.clone(),
        vpc_cidr: primary.vpc_cidr,
    }
}
