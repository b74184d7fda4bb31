//! Filters: what an answer would say of a thing decides whether it is told. Filter names become paths in the answer, so
//! that the two never disagree.

use std::collections::HashMap;
use std::sync::LazyLock;

use crate::query::{Fault, Node, Params};

/// The names that each operation takes.
static NAMES: LazyLock<HashMap<&str, Vec<&str>>> = LazyLock::new(|| {
    let lines = include_str!("filters.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once(' '))
        .map(|(op, names)| (op, names.split(' ').collect()))
        .collect()
});

/// Where a filter's name does not say where its value is: the name's beginning, and the path it stands for.
const PATHS: &[(&str, &str, &str)] = &[
    ("DescribeInstances", "instance-state-name", "instanceState.name"),
    ("DescribeInstances", "instance-state-code", "instanceState.code"),
    ("DescribeInstances", "availability-zone", "placement.availabilityZone"),
    ("DescribeInstances", "availability-zone-id", "placement.availabilityZoneId"),
    ("DescribeInstances", "tenancy", "placement.tenancy"),
    ("DescribeInstances", "monitoring-state", "monitoring.state"),
    ("DescribeInstances", "launch-index", "amiLaunchIndex"),
    ("DescribeInstances", "instance.group-id", "groupSet.groupId"),
    ("DescribeInstances", "instance.group-name", "groupSet.groupName"),
    ("DescribeInstances", "state-reason-code", "stateReason.code"),
    ("DescribeInstances", "state-reason-message", "stateReason.message"),
    ("DescribeInstances", "metadata-options.", "metadataOptions."),
    ("DescribeInstances", "block-device-mapping.device-name", "blockDeviceMapping.deviceName"),
    ("DescribeInstances", "block-device-mapping.", "blockDeviceMapping.ebs."),
    (
        "DescribeInstances",
        "network-interface.public-dns-name",
        "networkInterfaceSet.association.publicDnsName",
    ),
    ("DescribeInstances", "network-interface.addresses.", "networkInterfaceSet.privateIpAddressesSet."),
    ("DescribeInstances", "network-interface.attachment.", "networkInterfaceSet.attachment."),
    ("DescribeInstances", "network-interface.group-", "networkInterfaceSet.groupSet.group-"),
    ("DescribeInstances", "network-interface.", "networkInterfaceSet."),
    ("DescribeInstanceStatus", "instance-state-name", "instanceState.name"),
    ("DescribeInstanceStatus", "instance-state-code", "instanceState.code"),
    ("DescribeInstanceStatus", "instance-status.reachability", "instanceStatus.details.status"),
    ("DescribeInstanceStatus", "system-status.reachability", "systemStatus.details.status"),
    ("DescribeBundleTasks", "error-", "error."),
    ("DescribeBundleTasks", "s3-", "storage.S3."),
    ("DescribeStoreImageTasks", "task-state", "storeTaskState"),
    ("DescribeImages", "owner-id", "imageOwnerId"),
    ("DescribeImages", "owner-alias", "imageOwnerAlias"),
    ("DescribeImages", "state", "imageState"),
    ("DescribeImages", "block-device-mapping.device-name", "blockDeviceMapping.deviceName"),
    ("DescribeImages", "block-device-mapping.", "blockDeviceMapping.ebs."),
    ("DescribeInstanceTypes", "instance-storage-info.disk.size-in-gb", "instanceStorageInfo.disks.sizeInGB"),
    ("DescribeInstanceTypes", "instance-storage-info.disk.", "instanceStorageInfo.disks."),
    ("DescribeInstanceTypes", "instance-storage-info.total-size-in-gb", "instanceStorageInfo.totalSizeInGB"),
    ("DescribeVolumes", "attachment.attach-time", "attachmentSet.attachTime"),
    ("DescribeVolumes", "attachment.", "attachmentSet."),
    ("DescribeSecurityGroups", "description", "groupDescription"),
    ("DescribeSecurityGroups", "egress.ip-permission.", "ipPermissionsEgress."),
    ("DescribeSecurityGroups", "ip-permission.", "ipPermissions."),
    ("DescribeKeyPairs", "fingerprint", "keyFingerprint"),
    ("DescribeLaunchTemplateVersions", "is-default-version", "defaultVersion"),
    ("DescribeLaunchTemplateVersions", "image-id", "launchTemplateData.imageId"),
    ("DescribeLaunchTemplateVersions", "instance-type", "launchTemplateData.instanceType"),
    ("DescribeLaunchTemplateVersions", "kernel-id", "launchTemplateData.kernelId"),
    ("DescribeLaunchTemplateVersions", "ram-disk-id", "launchTemplateData.ramDiskId"),
    ("DescribeLaunchTemplateVersions", "ebs-optimized", "launchTemplateData.ebsOptimized"),
    ("DescribeLaunchTemplateVersions", "http-", "launchTemplateData.metadataOptions.http-"),
    ("DescribeAvailabilityZones", "state", "zoneState"),
    ("DescribeRegions", "endpoint", "regionEndpoint"),
    ("DescribeVpcs", "cidr", "cidrBlock"),
    ("DescribeVpcs", "cidr-block-association.state", "cidrBlockAssociationSet.cidrBlockState.state"),
    ("DescribeVpcs", "cidr-block-association.", "cidrBlockAssociationSet."),
    ("DescribeSubnets", "cidr", "cidrBlock"),
    ("DescribeSubnets", "default-for-az", "defaultForAz"),
    (
        "DescribeNetworkInterfaces",
        "addresses.association.owner-id",
        "privateIpAddressesSet.association.ipOwnerId",
    ),
    ("DescribeNetworkInterfaces", "addresses.", "privateIpAddressesSet."),
    ("DescribeNetworkInterfaces", "group-", "groupSet.group-"),
    ("DescribeRouteTables", "association.", "associationSet."),
    ("DescribeRouteTables", "route.", "routeSet."),
    ("DescribeInternetGateways", "attachment.", "attachmentSet."),
    ("DescribeNetworkAcls", "association.", "associationSet."),
    ("DescribeNetworkAcls", "entry.cidr", "entrySet.cidrBlock"),
    ("DescribeNetworkAcls", "entry.", "entrySet."),
    ("DescribeDhcpOptions", "key", "dhcpConfigurationSet.key"),
    ("DescribeDhcpOptions", "value", "dhcpConfigurationSet.valueSet.value"),
    ("DescribeInstanceTypes", "vcpu-info.default-vcpus", "vCpuInfo.defaultVCpus"),
    ("DescribeInstanceTypes", "memory-info.size-in-mib", "memoryInfo.sizeInMiB"),
    (
        "DescribeInstanceTypes",
        "processor-info.supported-architecture",
        "processorInfo.supportedArchitectures",
    ),
    (
        "DescribeInstanceTypes",
        "ebs-info.ebs-optimized-info.baseline-throughput-in-mbps",
        "ebsInfo.ebsOptimizedInfo.baselineThroughputInMBps",
    ),
    (
        "DescribeInstanceTypes",
        "ebs-info.ebs-optimized-info.maximum-throughput-in-mbps",
        "ebsInfo.ebsOptimizedInfo.maximumThroughputInMBps",
    ),
    ("DescribeInstanceTypes", "supported-root-device-type", "supportedRootDeviceTypes"),
    ("DescribeInstanceTypes", "supported-usage-class", "supportedUsageClasses"),
    ("DescribeInstanceTypes", "supported-virtualization-type", "supportedVirtualizationTypes"),
];

/// Below `ipPermissions`, where names and the tree part ways.
const PERMISSIONS: &[(&str, &str)] = &[
    ("cidr", "ipRanges.cidrIp"),
    ("ipv6-cidr", "ipv6Ranges.cidrIpv6"),
    ("group-id", "groups.groupId"),
    ("user-id", "groups.userId"),
    ("prefix-list-id", "prefixListIds.prefixListId"),
    ("protocol", "ipProtocol"),
];

/// The filters of a call.
pub struct Filters(Vec<Filter>);

struct Filter {
    wanted: Wanted,
    values: Vec<String>,
}

enum Wanted {
    /// The value at a path of the answer.
    Path(String),
    /// The value of a tag.
    Tag(String),
}

impl Filters {
    /// The filters of a call of `operation`.
    ///
    /// # Errors
    /// `InvalidParameterValue`: one that the operation does not have, `FilterLimitExceeded`.
    pub fn new(operation: &str, params: &Params) -> Result<Filters, Fault> {
        let known = NAMES.get(operation).map(Vec::as_slice).unwrap_or_default();
        let mut filters = Vec::new();
        for filter in params.list("Filter") {
            let name = filter.required("Name").map_err(|_| Fault::missing("Filter.Name"))?;
            // EC2 takes the older form, too: `isDefault` for `is-default`; Ansible and Terraform use it.
            let older = |known: &&str| **known == *name || dotted(known) == name;
            let name = known.iter().copied().find(older).unwrap_or(name);
            let tag = name.strip_prefix("tag:").filter(|_| known.contains(&"tag:"));
            if tag.is_none() && !known.contains(&name) {
                let why = format!("The filter '{name}' is invalid");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let values = filter.strings("Value");
            if values.is_empty() {
                let why = format!("The filter '{name}' has no value");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            if values.len() > 200 {
                return Err(Fault::new("FilterLimitExceeded", "The maximum number of filter values is 200"));
            }
            let wanted =
                tag.map_or_else(|| Wanted::Path(path(operation, name)), |key| Wanted::Tag(key.into()));
            filters.push(Filter { wanted, values });
        }
        Ok(Filters(filters))
    }

    /// Whether all of them hold of a thing, as the answer would tell it.
    pub fn hold(&self, node: &Node) -> bool {
        self.0.iter().all(|filter| {
            let mut found = Vec::new();
            match &filter.wanted {
                Wanted::Path(path) => collect(node, &path.split('.').collect::<Vec<_>>(), &mut found),
                Wanted::Tag(key) => {
                    if let Some(Node::List(tags)) = node.get("tagSet") {
                        let of =
                            |tag: &&Node| matches!(tag.get("key"), Some(Node::Text(name)) if name == key);
                        tags.iter().filter(of).for_each(|tag| collect(tag, &["value"], &mut found));
                    }
                }
            }
            found.iter().any(|text| filter.values.iter().any(|pattern| matches(pattern, text)))
        })
    }
}

fn path(operation: &str, name: &str) -> String {
    if name == "tag-key" {
        return "tagSet.key".into();
    }
    let mut name = name.to_owned();
    let exact = PATHS.iter().find(|(op, from, _)| *op == operation && *from == name);
    let prefix = || {
        PATHS
            .iter()
            .find(|(op, from, _)| *op == operation && from.ends_with(['.', '-']) && name.starts_with(from))
    };
    if let Some((_, from, to)) = exact.or_else(prefix) {
        let rest = name.strip_prefix(from).unwrap_or_default();
        let rest = match PERMISSIONS.iter().find(|(from, _)| to.starts_with("ipPermissions") && *from == rest)
        {
            Some((_, path)) => path,
            None => rest,
        };
        name = format!("{to}{rest}");
    }
    dotted(&name)
}

/// `a-b.c-d` as `aB.cD`.
fn dotted(name: &str) -> String {
    name.split('.').map(camel).collect::<Vec<_>>().join(".")
}

/// `a-b-c` as `aBC`.
fn camel(name: &str) -> String {
    let mut parts = name.split('-');
    let mut whole = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut chars = part.chars();
        whole.extend(chars.next().map(|c| c.to_ascii_uppercase()));
        whole.push_str(chars.as_str());
    }
    whole
}

/// The texts at a path; lists are passed through.
fn collect<'a>(node: &'a Node, path: &[&str], found: &mut Vec<&'a str>) {
    match (node, path) {
        (Node::List(items), _) => items.iter().for_each(|item| collect(item, path, found)),
        (Node::Text(text), []) => found.push(text),
        (Node::Map(_), [name, rest @ ..]) => {
            if let Some(below) = node.get(name) {
                collect(below, rest, found);
            }
        }
        _ => {}
    }
}

/// Whether a text is what a pattern says: `*` any characters, `?` one, a backslash takes the next as it is.
pub fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    // Where to go on when what follows the last star does not fit there.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        let (literal, step) = match pattern.get(p) {
            Some('\\') if p + 1 < pattern.len() => (pattern.get(p + 1), 2),
            other => (other, 1),
        };
        match (pattern.get(p), literal) {
            (Some('*'), _) => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            (Some('?'), _) => (p, t) = (p + 1, t + 1),
            (Some(_), Some(c)) if Some(c) == text.get(t) => (p, t) = (p + step, t + 1),
            _ => match star {
                Some((after, at)) => {
                    star = Some((after, at + 1));
                    (p, t) = (after, at + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node;

    #[test]
    fn patterns() {
        for (pattern, text, yes) in [
            ("", "", true),
            ("*", "", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a?c", "abc", true),
            ("a*b*c", "aXbYbZc", true),
            ("a", "A", false),
            ("a?", "a", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("*-*", "a", false),
            ("ab", "abc", false),
        ] {
            assert_eq!(matches(pattern, text), yes, "{pattern} {text}");
        }
    }

    #[test]
    fn names_are_paths_in_the_answer() {
        for (operation, name, is) in [
            ("DescribeInstances", "image-id", "imageId"),
            ("DescribeInstances", "instance-state-name", "instanceState.name"),
            ("DescribeInstances", "block-device-mapping.volume-id", "blockDeviceMapping.ebs.volumeId"),
            (
                "DescribeInstances",
                "network-interface.addresses.private-ip-address",
                "networkInterfaceSet.privateIpAddressesSet.privateIpAddress",
            ),
            ("DescribeInstances", "network-interface.group-id", "networkInterfaceSet.groupSet.groupId"),
            ("DescribeSecurityGroups", "ip-permission.cidr", "ipPermissions.ipRanges.cidrIp"),
            ("DescribeSecurityGroups", "egress.ip-permission.from-port", "ipPermissionsEgress.fromPort"),
            ("DescribeVolumes", "attachment.instance-id", "attachmentSet.instanceId"),
        ] {
            assert_eq!(path(operation, name), is);
        }
    }

    #[test]
    fn all_filters_and_one_of_their_values_hold() {
        let thing = node! {
            "imageId": "ami-1",
            "tagSet": Node::List(vec![node! { "key": "Name", "value": "web-1" }]),
        };
        let hold = |form: &str| {
            Filters::new("DescribeInstances", &Params::parse(form).unwrap()).map(|f| f.hold(&thing))
        };
        assert_eq!(hold("Filter.1.Name=image-id&Filter.1.Value.1=ami-2&Filter.1.Value.2=ami-1"), Ok(true));
        assert_eq!(hold("Filter.1.Name=tag:Name&Filter.1.Value.1=web-*"), Ok(true));
        assert_eq!(
            hold("Filter.1.Name=tag-key&Filter.1.Value.1=Name&Filter.2.Name=image-id&Filter.2.Value.1=x"),
            Ok(false)
        );
        assert_eq!(hold("Filter.1.Name=outpost-arn&Filter.1.Value.1=*"), Ok(false));
        assert_eq!(
            hold("Filter.1.Name=nothing&Filter.1.Value.1=x").unwrap_err().code,
            "InvalidParameterValue"
        );
    }
}
