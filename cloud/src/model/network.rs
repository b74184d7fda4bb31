//! The records of networks: what an account has of addresses, and what leads from where to where.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::{Tags, yes};

/// An account that has been here: what it begins with was made then, and is its own to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Its number.
    pub id: String,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vpc {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its addresses.
    pub cidr: Ipv4Net,
    /// The account's default network.
    pub default: bool,
    /// The ids of what comes with it and is no record of its own.
    pub parts: VpcParts,
    /// `enableDnsSupport`.
    #[serde(default = "yes")]
    pub dns_support: bool,
    /// `enableDnsHostnames`.
    #[serde(default = "yes")]
    pub dns_hostnames: bool,
    /// `enableNetworkAddressUsageMetrics`.
    #[serde(default)]
    pub usage_metrics: bool,
    /// Its tags.
    pub tags: Tags,
}

/// What comes with a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VpcParts {
    /// `dopt-…`
    pub dhcp_options: String,
    /// `acl-…`
    pub network_acl: String,
    /// `vpc-cidr-assoc-…`
    pub cidr_association: String,
}

/// Which subnets of the default networks' range a region has, where several regions may share a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// There is one.
    pub id: String,
    /// The place of each zone's default subnet among those of its size, from 0.
    pub zones: BTreeMap<String, u8>,
}

/// A subnet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its network.
    pub vpc: String,
    /// Its addresses.
    pub cidr: Ipv4Net,
    /// The zone's name.
    pub zone: String,
    /// The zone's default.
    pub default: bool,
    /// Whether instances are given a public address; `None`: as default subnets are.
    #[serde(default)]
    pub map_public: Option<bool>,
    /// Its tags.
    pub tags: Tags,
}

/// An internet gateway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gateway {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// The network it is attached to.
    pub vpc: Option<String>,
    /// Its tags.
    pub tags: Tags,
}

/// A route table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTable {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub account: String,
    /// Its network.
    pub vpc: String,
    /// Where packets go; those to the network itself stay in it, without a route here.
    pub routes: BTreeMap<Ipv4Net, Target>,
    /// For whom, by the associations' ids: a subnet; `None`: every subnet that has none (the main table).
    pub associations: BTreeMap<String, Option<String>>,
    /// Its tags.
    pub tags: Tags,
}

impl RouteTable {
    /// Whether it is its network's main one.
    pub fn is_main(&self) -> bool {
        self.associations.values().any(Option::is_none)
    }
}

/// Where a route leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// An internet gateway.
    Gateway(String),
    /// A network interface.
    Interface(String),
}
