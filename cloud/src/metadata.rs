//! What an instance is told about itself: facts; the metadata service gives them their paths.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How the service is to answer, per instance (ModifyInstanceMetadataOptions).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// Whether it answers at all.
    pub enabled: bool,
    /// Whether a token is needed (version 2 only).
    pub tokens_required: bool,
    /// The IP time to live of an answer with a token: 1 to 64.
    pub hop_limit: u8,
    /// Whether it answers by IPv6, too.
    #[serde(default)]
    pub ipv6: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { enabled: true, tokens_required: false, hop_limit: 1, ipv6: false }
    }
}

/// A network interface, as an instance's metadata describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of the metadata categories in EC2's user guide")]
pub struct Card {
    pub device_number: u32,
    pub interface_id: String,
    pub mac: String,
    pub local_hostname: String,
    /// The primary address first.
    pub local_ipv4s: Vec<Ipv4Addr>,
    pub public_ipv4: Option<Ipv4Addr>,
    pub public_hostname: String,
    /// Ids and names.
    pub security_groups: Vec<(String, String)>,
    pub subnet_id: String,
    pub subnet_cidr: String,
    pub vpc_id: String,
    pub vpc_cidr: String,
}

/// An instance as its metadata describe it. Empty texts are left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of the metadata categories in EC2's user guide")]
pub struct Metadata {
    pub options: Options,
    pub account_id: String,
    pub ami_id: String,
    pub ami_launch_index: u32,
    /// Of an image whose root is on instance store.
    #[serde(default)]
    pub ami_manifest_path: String,
    pub availability_zone: String,
    pub availability_zone_id: String,
    /// Names as in a launch request, such as `ami`, `root` or `ebs2`, with their devices.
    pub block_device_mapping: Vec<(String, String)>,
    /// The private DNS name.
    pub hostname: String,
    pub instance_id: String,
    pub instance_type: String,
    /// The network interface `eni-…`.
    pub interface_id: String,
    #[serde(default)]
    pub kernel_id: String,
    #[serde(default)]
    pub ramdisk_id: String,
    /// `on-demand`, `spot` or `scheduled`.
    pub life_cycle: String,
    /// When it was launched, in RFC 3339.
    pub pending_time: String,
    pub local_ipv4: Option<Ipv4Addr>,
    pub public_ipv4: Option<Ipv4Addr>,
    /// The public DNS name.
    #[serde(default)]
    pub public_hostname: String,
    pub mac: String,
    /// Key pairs' names, and their keys in OpenSSH's format.
    pub public_keys: Vec<(String, String)>,
    pub region: String,
    pub reservation_id: String,
    /// Ids and names.
    pub security_groups: Vec<(String, String)>,
    pub subnet_id: String,
    pub subnet_cidr: String,
    /// Told only where InstanceMetadataTags is enabled.
    pub tags: BTreeMap<String, String>,
    pub user_data: Option<Vec<u8>>,
    /// Its interfaces, the first one first; none is told of instances of earlier versions, which have that one only.
    #[serde(default)]
    pub cards: Vec<Card>,
    pub vpc_id: String,
    pub vpc_cidr: String,
}
