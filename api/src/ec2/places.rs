//! Where things can run, and on what: regions, zones, instance types; what an account may.

use hutch_cloud::region::metadata::zone_id;
use hutch_cloud::region::{MAX_ADDRESSES, MAX_INTERFACES};
use hutch_cloud::types::{InstanceType, Span};

use super::{Answer, Context, Operation};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeRegions", regions),
    ("DescribeAvailabilityZones", zones),
    ("DescribeInstanceTypes", types),
    ("DescribeInstanceTypeOfferings", offerings),
    ("DescribeAccountAttributes", account_attributes),
    ("DescribeSpotInstanceRequests", |c| c.describe("spotInstanceRequestSet", vec![], &[])),
    ("DescribeSpotPriceHistory", |c| c.describe("spotPriceHistorySet", vec![], &[])),
    ("DescribeReservedInstances", |c| c.describe("reservedInstancesSet", vec![], &[])),
    ("DescribeReservedInstancesOfferings", |c| c.describe("reservedInstancesOfferingsSet", vec![], &[])),
];

fn regions(c: &Context<'_>) -> Answer {
    let names = c.ids("RegionName");
    for name in &names {
        if !c.regions.contains_key(name) {
            return Err(Fault::new("InvalidParameterValue", format!("Invalid region name: {name}")));
        }
    }
    let told = c.regions.keys().filter(|name| names.is_empty() || names.contains(name)).map(|name| {
        let node = node! {
            "regionName": name,
            "regionEndpoint": format!("ec2.{name}.amazonaws.com"),
            "optInStatus": "opt-in-not-required",
        };
        (name.clone(), node)
    });
    c.describe("regionInfo", told.collect(), &[])
}

fn zones(c: &Context<'_>) -> Answer {
    let (names, ids) = (c.ids("ZoneName"), c.ids("ZoneId"));
    let all = c.region.zones();
    for name in &names {
        if !all.contains(name) {
            return Err(Fault::new("InvalidParameterValue", format!("Invalid availability zone: [{name}]")));
        }
    }
    let region = &c.region.settings().name;
    let wanted = |zone: &String| {
        let id = zone_id(c.region, zone);
        names.is_empty() && ids.is_empty() || names.contains(zone) || ids.contains(&id)
    };
    let told = all.iter().filter(|zone| wanted(zone)).map(|zone| {
        let node = node! {
            "zoneName": zone,
            "zoneId": zone_id(c.region, zone),
            "zoneState": "available",
            "zoneType": "availability-zone",
            "regionName": region,
            "groupName": region,
            "networkBorderGroup": region,
            "optInStatus": "opt-in-not-required",
            "messageSet": Node::List(vec![]),
        };
        (zone.clone(), node)
    });
    c.describe("availabilityZoneInfo", told.collect(), &[])
}

/// A thousandth of a number, as text: `0.064`, `5`.
fn thousandths(n: u64) -> String {
    (n as f64 / 1000.0).to_string()
}

/// What EC2 says in words of a network's speed.
fn performance(span: Option<Span>) -> String {
    match span {
        None => "Up to the host's".into(),
        Some(span) => {
            let upto = if span.burst > span.baseline { "Up to " } else { "" };
            format!("{upto}{} Gigabit", thousandths(span.burst))
        }
    }
}

/// What an instance of a type gets of its volumes.
fn ebs(kind: &InstanceType) -> Node {
    // A Mbit is an eighth of a MB.
    let mb = |mbit: u64| (mbit as f64 / 8.0).to_string();
    let (mbit, iops) = (kind.volume_mbit, kind.volume_iops);
    let optimized = mbit.is_some() || iops.is_some();
    let info = node! {
        "baselineBandwidthInMbps": mbit.map(|span| span.baseline),
        "baselineThroughputInMBps": mbit.map(|span| mb(span.baseline)),
        "baselineIops": iops.map(|span| span.baseline),
        "maximumBandwidthInMbps": mbit.map(|span| span.burst),
        "maximumThroughputInMBps": mbit.map(|span| mb(span.burst)),
        "maximumIops": iops.map(|span| span.burst),
    };
    node! {
        "ebsOptimizedSupport": if optimized { "default" } else { "unsupported" },
        "encryptionSupport": "supported",
        "ebsOptimizedInfo": optimized.then_some(info),
        "nvmeSupport": "unsupported",
    }
}

/// Disks that are alike are told as one, with their number.
fn stores(kind: &InstanceType) -> Option<Node> {
    let alike = kind.instance_store.chunk_by(|one, next| one == next);
    let disk = |disks: &[u64]| {
        node! { "sizeInGB": disks.first().copied(), "count": disks.len() as u64, "type": "ssd" }
    };
    let info = node! {
        "totalSizeInGB": kind.instance_store.iter().sum::<u64>(),
        "disks": Node::List(alike.map(disk).collect()),
        "nvmeSupport": "unsupported",
        "encryptionSupport": "unsupported",
    };
    (!kind.instance_store.is_empty()).then_some(info)
}

fn told(name: &str, kind: &InstanceType) -> Node {
    let list = |items: &[&'static str]| Node::list(items, |item| Node::Text((*item).into()));
    let burstable = name.starts_with('t');
    node! {
        "instanceType": name,
        "currentGeneration": true,
        "freeTierEligible": false,
        "supportedUsageClasses": list(&["on-demand"]),
        "supportedRootDeviceTypes": list(&["ebs", "instance-store"]),
        "supportedVirtualizationTypes": list(&["hvm"]),
        "bareMetal": false,
        "hypervisor": "nitro",
        "processorInfo": node! { "supportedArchitectures": list(&["x86_64"]) },
        "vCpuInfo": node! {
            "defaultVCpus": kind.vcpus, "defaultCores": kind.vcpus, "defaultThreadsPerCore": 1u32,
        },
        "memoryInfo": node! { "sizeInMiB": kind.memory_mib },
        "instanceStorageSupported": !kind.instance_store.is_empty(),
        "instanceStorageInfo": stores(kind),
        "ebsInfo": ebs(kind),
        "networkInfo": node! {
            "networkPerformance": performance(kind.network_mbit),
            "networkCards": Node::List(vec![node! {
                "networkCardIndex": 0u32,
                "networkPerformance": performance(kind.network_mbit),
                "maximumNetworkInterfaces": MAX_INTERFACES,
                "baselineBandwidthInGbps": kind.network_mbit.map(|span| thousandths(span.baseline)),
                "peakBandwidthInGbps": kind.network_mbit.map(|span| thousandths(span.burst)),
            }]),
            "maximumNetworkInterfaces": MAX_INTERFACES,
            "maximumNetworkCards": 1u32,
            "defaultNetworkCardIndex": 0u32,
            "ipv4AddressesPerInterface": MAX_ADDRESSES,
            "ipv6AddressesPerInterface": 0u32,
            "ipv6Supported": false,
            "enaSupport": "unsupported",
            "efaSupported": false,
        },
        "placementGroupInfo": node! { "supportedStrategies": Node::List(vec![]) },
        "hibernationSupported": false,
        "burstablePerformanceSupported": burstable,
        "dedicatedHostsSupported": false,
        "autoRecoverySupported": false,
        "supportedBootModes": list(&["legacy-bios"]),
    }
}

fn types(c: &Context<'_>) -> Answer {
    let names = c.ids("InstanceType");
    let table = &c.region.settings().types;
    let unknown: Vec<_> = names.iter().filter(|name| table.get(name).is_err()).cloned().collect();
    if !unknown.is_empty() {
        let why = format!("The following supplied instance types do not exist: [{}]", unknown.join(", "));
        return Err(Fault::new("InvalidInstanceType", why));
    }
    let wanted = table.all().into_iter().filter(|(name, _)| names.is_empty() || names.contains(name));
    let mut all: Vec<_> = wanted.map(|(name, kind)| (name.clone(), told(&name, kind))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    c.describe("instanceTypeSet", all, &names)
}

fn offerings(c: &Context<'_>) -> Answer {
    let by = c.params.str("LocationType").unwrap_or("region");
    let places = match by {
        "region" => vec![c.region.settings().name.clone()],
        "availability-zone" => c.region.zones(),
        "availability-zone-id" => c.region.zones().iter().map(|zone| zone_id(c.region, zone)).collect(),
        _ => {
            return Err(Fault::value(
                "locationType",
                by,
                "It is region, availability-zone or availability-zone-id.",
            ));
        }
    };
    let mut all = Vec::new();
    for (name, _) in c.region.settings().types.all() {
        for place in &places {
            let node = node! { "instanceType": &name, "locationType": by, "location": place };
            all.push((format!("{name}/{place}"), node));
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    c.describe("instanceTypeOfferingSet", all, &[])
}

fn account_attributes(c: &Context<'_>) -> Answer {
    let names = c.ids("AttributeName");
    let limits = &c.region.settings().limits;
    let all = [
        ("supported-platforms", "VPC".to_owned()),
        ("default-vpc", c.region.default_vpc(c.account)),
        ("max-instances", limits.instances.unwrap_or(10_000).to_string()),
        ("vpc-max-security-groups-per-interface", limits.groups_per_interface.to_string()),
        ("max-elastic-ips", "5".into()),
        ("vpc-max-elastic-ips", "5".into()),
    ];
    let wanted = all.into_iter().filter(|(name, _)| names.is_empty() || names.iter().any(|n| n == name));
    let set = Node::list(wanted, |(name, value)| {
        let values = Node::List(vec![node! { "attributeValue": value }]);
        node! { "attributeName": name, "attributeValueSet": values }
    });
    Ok(node! { "accountAttributeSet": set })
}
