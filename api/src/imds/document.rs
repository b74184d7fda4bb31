//! What a guest may know of itself: a tree of texts, with EC2's names, and how a path is looked up in it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use hutch_cloud::metadata::{Card, Metadata, Options};
use serde_json::json;

/// All that the service says, ready to be looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    options: Options,
    instance_id: String,
    /// Whole paths below the version, without slashes at the ends. One that ends in `/` is a listing of its own.
    leaves: BTreeMap<String, Vec<u8>>,
}

/// What `/` lists; every other version with a date is answered too.
const VERSIONS: &str = "1.0\n2009-04-04\n2016-09-02\n2018-09-24\n2021-03-23\nlatest";
const TEXT: &str = "text/plain";

impl Document {
    pub(super) fn options(&self) -> Options {
        self.options
    }

    pub(super) fn instance_id(&self) -> &str {
        &self.instance_id
    }

    /// The content type and the body at a path of the service: a leaf, or the listing of a directory.
    pub(super) fn get(&self, path: &str) -> Option<(&'static str, Vec<u8>)> {
        let mut parts = path.split('/').filter(|part| !part.is_empty());
        let Some(version) = parts.next() else { return Some((TEXT, VERSIONS.into())) };
        let dated = |v: &str| {
            v.len() == 10
                && v.bytes()
                    .enumerate()
                    .all(|(i, b)| if i == 4 || i == 7 { b == b'-' } else { b.is_ascii_digit() })
        };
        if version != "latest" && version != "1.0" && !dated(version) {
            return None;
        }
        let path = parts.collect::<Vec<_>>().join("/");
        if let Some(leaf) = self.leaves.get(&path) {
            let kind = if path == "user-data" { "application/octet-stream" } else { TEXT };
            return Some((kind, leaf.clone()));
        }
        let directory = if path.is_empty() { String::new() } else { format!("{path}/") };
        if let Some(listing) = self.leaves.get(&directory) {
            return Some((TEXT, listing.clone()));
        }
        let below =
            self.leaves.range(directory.clone()..).map_while(|(leaf, _)| leaf.strip_prefix(&directory));
        let names: BTreeSet<&str> =
            below.map(|rest| rest.find('/').map_or(rest, |slash| &rest[..=slash])).collect();
        (!names.is_empty()).then(|| (TEXT, names.into_iter().collect::<Vec<_>>().join("\n").into_bytes()))
    }
}

impl From<&Metadata> for Document {
    fn from(m: &Metadata) -> Document {
        let mut leaves = BTreeMap::new();
        let mut leaf = |path: &str, text: &str| {
            if !text.is_empty() {
                leaves.insert(path.to_owned(), text.as_bytes().to_vec());
            }
        };
        let ip = |ip: Option<Ipv4Addr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
        type Groups = [(String, String)];
        let lines = |texts: Vec<&str>| texts.join("\n");
        let names = |groups: &Groups| lines(groups.iter().map(|(_, name)| name.as_str()).collect());
        let ids = |groups: &Groups| lines(groups.iter().map(|(id, _)| id.as_str()).collect());
        let manifest = Some(m.ami_manifest_path.as_str()).filter(|path| !path.is_empty());
        for (name, text) in [
            ("ami-id", m.ami_id.as_str()),
            ("ami-launch-index", &m.ami_launch_index.to_string()),
            ("ami-manifest-path", manifest.unwrap_or("(unknown)")),
            ("hostname", &m.hostname),
            ("instance-action", "none"),
            ("instance-id", &m.instance_id),
            ("instance-life-cycle", &m.life_cycle),
            ("instance-type", &m.instance_type),
            ("kernel-id", &m.kernel_id),
            ("local-hostname", &m.hostname),
            ("local-ipv4", &ip(m.local_ipv4)),
            ("mac", &m.mac),
            ("placement/availability-zone", &m.availability_zone),
            ("placement/availability-zone-id", &m.availability_zone_id),
            ("placement/region", &m.region),
            ("profile", "default-hvm"),
            ("public-hostname", &m.public_hostname),
            ("public-ipv4", &ip(m.public_ipv4)),
            ("ramdisk-id", &m.ramdisk_id),
            ("reservation-id", &m.reservation_id),
            ("security-groups", &names(&m.security_groups)),
            ("services/domain", "amazonaws.com"),
            ("services/partition", "aws"),
        ] {
            leaf(&format!("meta-data/{name}"), text);
        }
        for (name, device) in &m.block_device_mapping {
            leaf(&format!("meta-data/block-device-mapping/{name}"), device);
        }
        let only = [the_one(m)];
        for card in if m.cards.is_empty() { &only[..] } else { &m.cards[..] } {
            let at = format!("meta-data/network/interfaces/macs/{}", card.mac);
            let ips: Vec<String> = card.local_ipv4s.iter().map(ToString::to_string).collect();
            for (name, text) in [
                ("device-number", card.device_number.to_string().as_str()),
                ("interface-id", &card.interface_id),
                ("local-hostname", &card.local_hostname),
                ("local-ipv4s", &ips.join("\n")),
                ("mac", &card.mac),
                ("owner-id", &m.account_id),
                ("public-hostname", &card.public_hostname),
                ("public-ipv4s", &ip(card.public_ipv4)),
                ("security-group-ids", &ids(&card.security_groups)),
                ("security-groups", &names(&card.security_groups)),
                ("subnet-id", &card.subnet_id),
                ("subnet-ipv4-cidr-block", &card.subnet_cidr),
                ("vpc-id", &card.vpc_id),
                ("vpc-ipv4-cidr-block", &card.vpc_cidr),
                ("vpc-ipv4-cidr-blocks", &card.vpc_cidr),
            ] {
                leaf(&format!("{at}/{name}"), text);
            }
            if let Some(public) = card.public_ipv4 {
                leaf(&format!("{at}/ipv4-associations/{public}"), &ip(card.local_ipv4s.first().copied()));
            }
        }
        for (key, value) in &m.tags {
            leaf(&format!("meta-data/tags/instance/{key}"), value);
        }
        for (index, (_, key)) in m.public_keys.iter().enumerate() {
            leaf(&format!("meta-data/public-keys/{index}/openssh-key"), key.trim());
        }
        let keys = m.public_keys.iter().enumerate().map(|(index, (name, _))| format!("{index}={name}"));
        leaf("meta-data/public-keys/", &keys.collect::<Vec<_>>().join("\n"));
        leaf("dynamic/instance-identity/document", &identity(m));
        if let Some(data) = &m.user_data {
            leaves.insert("user-data".into(), data.clone());
        }
        Document { options: m.options, instance_id: m.instance_id.clone(), leaves }
    }
}

/// The one interface of an instance that tells of none.
fn the_one(m: &Metadata) -> Card {
    Card {
        device_number: 0,
        interface_id: m.interface_id.clone(),
        mac: m.mac.clone(),
        local_hostname: m.hostname.clone(),
        local_ipv4s: m.local_ipv4.into_iter().collect(),
        public_ipv4: m.public_ipv4,
        public_hostname: m.public_hostname.clone(),
        security_groups: m.security_groups.clone(),
        subnet_id: m.subnet_id.clone(),
        subnet_cidr: m.subnet_cidr.clone(),
        vpc_id: m.vpc_id.clone(),
        vpc_cidr: m.vpc_cidr.clone(),
    }
}

/// The instance identity document.
fn identity(m: &Metadata) -> String {
    let named = |id: &String| (!id.is_empty()).then(|| id.clone());
    let document = json!({
        "accountId": m.account_id,
        "architecture": "x86_64",
        "availabilityZone": m.availability_zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "marketplaceProductCodes": null,
        "imageId": m.ami_id,
        "instanceId": m.instance_id,
        "instanceType": m.instance_type,
        "kernelId": named(&m.kernel_id),
        "pendingTime": m.pending_time,
        "privateIp": m.local_ipv4.map(|ip| ip.to_string()),
        "ramdiskId": named(&m.ramdisk_id),
        "region": m.region,
        "version": "2017-09-30",
    });
    format!("{document:#}")
}
