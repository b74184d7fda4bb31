//! Instances.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_cloud::model::{Device, Group, Instance, InstanceState, Interface, MetadataOptions};
use hutch_cloud::region::metadata::{private_name, public_name, zone_id};
use hutch_cloud::region::{Change, DeviceAsk, Launch};

use super::{Answer, Context, Operation, chosen, done, encryption, tag_set, time};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("RunInstances", run),
    ("DescribeInstances", describe),
    ("DescribeInstanceStatus", status),
    ("StartInstances", start),
    ("StopInstances", stop),
    ("RebootInstances", reboot),
    ("TerminateInstances", terminate),
    ("ModifyInstanceMetadataOptions", modify_metadata),
    ("GetConsoleOutput", console),
    ("GetPasswordData", password),
    ("GetConsoleScreenshot", |c| {
        none(c, "has a serial console and no screen; GetConsoleOutput tells what it wrote")
    }),
    ("GetInstanceUefiData", |c| none(c, "boots without UEFI (legacy-bios): it has no UEFI variables")),
    ("MonitorInstances", |c| monitor(c, true)),
    ("UnmonitorInstances", |c| monitor(c, false)),
    ("DescribeInstanceCreditSpecifications", credits),
    ("DescribeIamInstanceProfileAssociations", |_| {
        Ok(node! { "iamInstanceProfileAssociationSet": Node::List(vec![]) })
    }),
];

/// Instances read at a time.
const BATCH: usize = 1000;

/// What an answer about instances needs beside them.
pub(super) struct Around {
    pub(super) interfaces: BTreeMap<String, Interface>,
    groups: BTreeMap<String, Group>,
}

impl Around {
    pub(super) fn of(c: &Context<'_>, instances: &[Instance]) -> Result<Around, Fault> {
        let mut around = Around { interfaces: BTreeMap::new(), groups: BTreeMap::new() };
        for id in instances.iter().flat_map(|instance| &instance.interfaces) {
            let Some(interface) = c.region.get::<Interface>(id)? else { continue };
            for group in &interface.groups {
                if !around.groups.contains_key(group)
                    && let Some(found) = c.region.get::<Group>(group)?
                {
                    around.groups.insert(group.clone(), found);
                }
            }
            around.interfaces.insert(id.clone(), interface);
        }
        Ok(around)
    }

    pub(super) fn groups(&self, ids: &[String]) -> Node {
        Node::list(ids, |id| {
            node! { "groupId": id, "groupName": self.groups.get(id).map(|group| &*group.name) }
        })
    }
}

pub(super) fn state(state: InstanceState) -> Node {
    node! { "code": state.code(), "name": state.name() }
}

pub(super) fn metadata_options(options: &MetadataOptions, settled: bool) -> Node {
    let switch = |on| if on { "enabled" } else { "disabled" };
    node! {
        "state": if settled { "applied" } else { "pending" },
        "httpTokens": if options.tokens_required { "required" } else { "optional" },
        "httpPutResponseHopLimit": options.hop_limit,
        "httpEndpoint": switch(options.enabled),
        "httpProtocolIpv6": switch(options.ipv6),
        "instanceMetadataTags": switch(options.tags),
    }
}

/// An instance, as answers tell it.
fn instance(c: &Context<'_>, i: &Instance, around: &Around) -> Node {
    let interfaces: Vec<_> = i.interfaces.iter().filter_map(|id| around.interfaces.get(id)).collect();
    let primary = interfaces.first();
    let ip = primary.map(|interface| interface.ip);
    let public = primary.and_then(|interface| Some(interface.public.as_ref()?.ip));
    let private = ip.map(|ip| private_name(c.region, ip)).unwrap_or_default();
    let status = |device: &Device| match i.state {
        InstanceState::Pending => "attaching",
        _ => device.state.name(),
    };
    let devices = Node::list(&i.devices, |device| {
        node! {
            "deviceName": &device.name,
            "ebs": node! {
                "volumeId": &device.volume,
                "status": status(device),
                "attachTime": time(device.attached),
                "deleteOnTermination": device.delete_on_termination,
            },
        }
    });
    let kind = c.region.settings().types.get(&i.instance_type).ok();
    node! {
        "instanceId": &i.id,
        "imageId": &i.image,
        "kernelId": i.kernel.as_ref(),
        "ramdiskId": i.ramdisk.as_ref(),
        "instanceState": state(i.state),
        "privateDnsName": &private,
        "dnsName": public.map(|ip| public_name(c.region, ip)).unwrap_or_default(),
        "reason": &i.transition,
        "stateReason": i.reason.as_ref().map(|reason| node! { "code": &reason.code, "message": &reason.message }),
        "keyName": i.key_name.as_ref(),
        "amiLaunchIndex": i.launch_index,
        "productCodes": Node::List(vec![]),
        "instanceType": &i.instance_type,
        "launchTime": time(i.launched),
        "placement": node! {
            "availabilityZone": &i.zone,
            "availabilityZoneId": zone_id(c.region, &i.zone),
            "groupName": "",
            "tenancy": "default",
        },
        "monitoring": node! { "state": if i.monitoring { "enabled" } else { "disabled" } },
        "subnetId": (!i.state.is_over()).then_some(&i.subnet),
        "vpcId": (!i.state.is_over()).then_some(&i.vpc),
        "privateIpAddress": ip,
        "ipAddress": public,
        "sourceDestCheck": i.source_dest_check,
        "groupSet": primary.map(|primary| around.groups(&primary.groups)),
        "architecture": "x86_64",
        "rootDeviceType": if i.bundle.is_some() { "instance-store" } else { "ebs" },
        "rootDeviceName": &i.root_device,
        "blockDeviceMapping": devices,
        "virtualizationType": "hvm",
        "clientToken": &i.client_token,
        "tagSet": tag_set(&i.tags),
        "hypervisor": "xen",
        "networkInterfaceSet": Node::list(&interfaces, |e| super::network::interface_of_instance(c, e, &around.groups(&e.groups))),
        "ebsOptimized": i.ebs_optimized,
        "enaSupport": true,
        "cpuOptions": kind.map(|kind| node! { "coreCount": kind.vcpus, "threadsPerCore": 1u32 }),
        "capacityReservationSpecification": node! { "capacityReservationPreference": "open" },
        "hibernationOptions": node! { "configured": false },
        "metadataOptions": metadata_options(&i.metadata, i.state != InstanceState::Pending),
        "enclaveOptions": node! { "enabled": false },
        "platformDetails": "Linux/UNIX",
        "usageOperation": "RunInstances",
        "usageOperationUpdateTime": time(i.launched),
        "privateDnsNameOptions": node! {
            "hostnameType": "ip-name",
            "enableResourceNameDnsARecord": false,
            "enableResourceNameDnsAAAARecord": false,
        },
        "maintenanceOptions": node! { "autoRecovery": "default" },
        "currentInstanceBootMode": "legacy-bios",
        "ownerId": &i.account,
        "reservationId": &i.reservation,
    }
}

pub(super) fn device_asks(params: &Params) -> Result<Vec<DeviceAsk>, Fault> {
    let size = |p: &Params, name: &str| -> Result<Option<u64>, Fault> {
        let number = p.int(name)?;
        number
            .map(|n| u64::try_from(n).map_err(|_| Fault::value(name, &n.to_string(), "It is negative.")))
            .transpose()
    };
    let one = |p: &&Params| {
        Ok(DeviceAsk {
            name: p.str("DeviceName").unwrap_or_default().into(),
            none: p.str("NoDevice").is_some(),
            ephemeral: p.str("VirtualName").map(str::to_owned),
            snapshot: p.str("Ebs.SnapshotId").map(str::to_owned),
            gib: size(p, "Ebs.VolumeSize")?,
            kind: p.str("Ebs.VolumeType").map(str::to_owned),
            iops: size(p, "Ebs.Iops")?,
            throughput: size(p, "Ebs.Throughput")?,
            delete_on_termination: p.boolean("Ebs.DeleteOnTermination")?,
            encryption: encryption(p, "Ebs.")?,
        })
    };
    params.list("BlockDeviceMapping").iter().map(one).collect()
}

pub(super) fn shutdown(text: &str) -> Result<bool, Fault> {
    match text {
        "stop" => Ok(false),
        "terminate" => Ok(true),
        _ => Err(Fault::value("instanceInitiatedShutdownBehavior", text, "It is stop or terminate.")),
    }
}

/// The metadata options that are asked for, over those that are.
fn set_metadata(p: &Params, options: &mut MetadataOptions) -> Result<(), Fault> {
    let switch = |name: &str, yes: &str, no: &str| match p.str(name) {
        None => Ok(None),
        Some(text) if text == yes => Ok(Some(true)),
        Some(text) if text == no => Ok(Some(false)),
        Some(text) => Err(Fault::value(name, text, &format!("It is {yes} or {no}."))),
    };
    options.tokens_required =
        switch("HttpTokens", "required", "optional")?.unwrap_or(options.tokens_required);
    options.enabled = switch("HttpEndpoint", "enabled", "disabled")?.unwrap_or(options.enabled);
    options.tags = switch("InstanceMetadataTags", "enabled", "disabled")?.unwrap_or(options.tags);
    options.ipv6 = switch("HttpProtocolIpv6", "enabled", "disabled")?.unwrap_or(options.ipv6);
    if let Some(hops) = p.int("HttpPutResponseHopLimit")? {
        let bad =
            || Fault::value("HttpPutResponseHopLimit", &hops.to_string(), "It is a number from 1 to 64.");
        options.hop_limit = u8::try_from(hops).ok().filter(|n| (1..=64).contains(n)).ok_or_else(bad)?;
    }
    Ok(())
}

/// What would mean something to whoever asks for it is refused, not overlooked.
fn refuse_what_is_to_come(p: &Params) -> Result<(), Fault> {
    let named = ["IamInstanceProfile", "Ipv6AddressCount", "Ipv6Address"];
    let truth = ["HibernationOptions.Configured", "EnclaveOptions.Enabled"];
    let named = named.into_iter().find(|name| p.sub(name).is_some());
    let on = truth.into_iter().find(|name| matches!(p.str(name), Some("true" | "1")));
    let tenancy =
        p.str("Placement.Tenancy").filter(|tenancy| *tenancy != "default").map(|_| "Placement.Tenancy");
    let group = p.str("Placement.GroupName").filter(|name| !name.is_empty()).map(|_| "Placement.GroupName");
    match named.or(on).or(tenancy).or(group) {
        Some(name) => {
            Err(Fault::new("UnsupportedOperation", format!("hutch does not have {name} yet; leave it out")))
        }
        None => Ok(()),
    }
}

fn run(asked: &Context<'_>) -> Answer {
    let (params, template) = super::launch_templates::merged(asked)?;
    let c = &Context { params: &params, ..*asked };
    let p = c.params;
    let count = |name: &str| -> Result<u32, Fault> {
        let n = p.int(name)?.ok_or_else(|| Fault::missing(name))?;
        u32::try_from(n).map_err(|_| Fault::value(name, &n.to_string(), "It is no number of instances."))
    };
    let (min, max) = (count("MinCount")?, count("MaxCount")?);
    if let Some(kind) = p.str("InstanceMarketOptions.MarketType") {
        let why = format!("hutch does not have the market type {kind} yet");
        return Err(Fault::new("UnsupportedOperation", why));
    }
    refuse_what_is_to_come(p)?;
    let owned = |name: &str| p.str(name).filter(|text| !text.is_empty()).map(str::to_owned);
    let mut metadata = c.region.account_settings(c.account)?.metadata.options();
    if let Some(options) = p.sub("MetadataOptions") {
        set_metadata(options, &mut metadata)?;
    }
    let (interface, others) = super::interfaces::cards(p)?;
    let here = |name: &str| interface.and_then(|i| i.str(name)).map(str::to_owned);
    if interface.is_some()
        && (p.sub("SecurityGroupId").is_some()
            || p.sub("SubnetId").is_some()
            || p.sub("SecurityGroup").is_some())
    {
        let why = "Network interfaces and an instance-level subnet ID or security groups may not be specified on the same request";
        return Err(Fault::combination(why));
    }
    let made_before = here("NetworkInterfaceId");
    let ip = owned("PrivateIpAddress");
    let private_ip =
        ip.map(|ip| ip.parse().map_err(|_| Fault::value("privateIpAddress", &ip, "It is no IPv4 address.")));
    let (own_ip, more) = interface.map_or_else(|| Ok(Default::default()), super::interfaces::addresses)?;
    let launch = Launch {
        image: p.required("ImageId")?.into(),
        kernel: owned("KernelId"),
        // A launch template spells it otherwise.
        ramdisk: owned("RamdiskId").or_else(|| owned("RamDiskId")),
        min,
        max,
        instance_type: p.str("InstanceType").unwrap_or("t3.micro").into(),
        key_name: owned("KeyName"),
        groups: match interface {
            Some(interface) => interface.strings("SecurityGroupId"),
            None => p.strings("SecurityGroupId"),
        },
        group_names: p.strings("SecurityGroup"),
        interface: made_before,
        subnet: owned("SubnetId").or_else(|| here("SubnetId")),
        zone: owned("Placement.AvailabilityZone"),
        private_ip: private_ip.transpose()?.or(own_ip),
        more,
        others,
        public_ip: interface.map(|i| i.boolean("AssociatePublicIpAddress")).transpose()?.flatten(),
        interface_description: here("Description").unwrap_or_default(),
        keep_interface: interface
            .map(|i| i.boolean("DeleteOnTermination"))
            .transpose()?
            .flatten()
            .map(|goes| !goes),
        user_data: p.blob("UserData")?,
        devices: device_asks(p)?,
        shutdown_terminates: shutdown(p.str("InstanceInitiatedShutdownBehavior").unwrap_or("stop"))?,
        termination_protection: p.boolean("DisableApiTermination")?.unwrap_or(false),
        stop_protection: p.boolean("DisableApiStop")?.unwrap_or(false),
        ebs_optimized: p.boolean("EbsOptimized")?.unwrap_or(false),
        monitoring: p.boolean("Monitoring.Enabled")?.unwrap_or(false),
        metadata,
        tags: c.tag_specifications()?,
        client_token: owned("ClientToken"),
        request: asked.digest(),
        template,
    };
    if launch.client_token.as_ref().is_some_and(|token| token.len() > 64 || !token.is_ascii()) {
        return Err(Fault::value("clientToken", "…", "It has at most 64 ASCII characters."));
    }
    let made = c.region.run_instances(c.account, &launch)?;
    let around = Around::of(c, &made)?;
    Ok(reservation(c, &made.iter().collect::<Vec<_>>(), &around))
}

fn reservation(c: &Context<'_>, instances: &[&Instance], around: &Around) -> Node {
    let first = instances.first();
    node! {
        "reservationId": first.map(|i| &*i.reservation),
        "ownerId": first.map(|i| &*i.account),
        "groupSet": Node::List(vec![]),
        "instancesSet": Node::list(instances, |i| instance(c, i, around)),
    }
}

/// The account's instances that are named, or all.
fn own(c: &Context<'_>, ids: &[String]) -> Result<Vec<Instance>, Fault> {
    let all = match ids {
        [] => c.region.all::<Instance>()?,
        ids => {
            let found: Result<Vec<_>, Fault> = ids.iter().map(|id| c.region.get::<Instance>(id)).collect();
            found?.into_iter().flatten().collect()
        }
    };
    let all = all.into_iter().filter(|instance| instance.account == c.account).collect();
    chosen(all, ids, |i: &Instance| &i.id, ("i", "InvalidInstanceID", "instance ID"))
}

fn describe(c: &Context<'_>) -> Answer {
    let ids = c.ids("InstanceId");
    let filters = c.filters()?;
    let (most, after) = c.page_asked(&ids)?;
    let mut found: Vec<(Instance, Node)> = Vec::new();
    let mut look = |instances: Vec<Instance>| -> Result<bool, Fault> {
        let around = Around::of(c, &instances)?;
        let told = instances.into_iter().map(|i| (instance(c, &i, &around), i)).map(|(node, i)| (i, node));
        found.extend(told.filter(|(_, node)| filters.hold(node)));
        Ok(found.len() > most)
    };
    if ids.is_empty() {
        // No more is read than is told: there may be many.
        let mut behind = after;
        loop {
            let page = c.region.page::<Instance>(&behind, BATCH)?;
            let Some(last) = page.last().map(|instance| instance.id.clone()) else { break };
            behind = last;
            let whole = page.len() == BATCH;
            if look(page.into_iter().filter(|instance| instance.account == c.account).collect())? || !whole {
                break;
            }
        }
    } else {
        look(own(c, &ids)?)?;
    }
    let more = found.len() > most;
    found.truncate(most);
    let token = found.last().filter(|_| more).map(|(last, _)| super::token(&last.id));
    // A reservation's instances are told together, as far as they are on one page.
    let mut reservations: Vec<(String, String, Vec<Node>)> = Vec::new();
    let mut at = BTreeMap::new();
    for (i, node) in found {
        let index = *at.entry(i.reservation.clone()).or_insert(reservations.len());
        match reservations.get_mut(index) {
            Some((_, _, nodes)) => nodes.push(node),
            None => reservations.push((i.reservation, i.account, vec![node])),
        }
    }
    let reservations = Node::list(reservations, |(id, owner, nodes)| {
        node! { "reservationId": id, "ownerId": owner, "groupSet": Node::List(vec![]), "instancesSet": Node::List(nodes) }
    });
    Ok(Node::empty().with("reservationSet", reservations).with("nextToken", token))
}

fn status(c: &Context<'_>) -> Answer {
    let ids = c.ids("InstanceId");
    let all = c.params.boolean("IncludeAllInstances")?.unwrap_or(false);
    let instances = own(c, &ids)?.into_iter().filter(|i| all || i.state == InstanceState::Running);
    let told = instances.map(|i| {
        let runs = i.state == InstanceState::Running;
        let check = || {
            let (whole, part) = if runs { ("ok", "passed") } else { ("not-applicable", "") };
            let details = runs.then(|| Node::List(vec![node! { "name": "reachability", "status": part }]));
            node! { "status": whole, "details": details }
        };
        let node = node! {
            "instanceId": &i.id,
            "availabilityZone": &i.zone,
            "availabilityZoneId": zone_id(c.region, &i.zone),
            "instanceState": state(i.state),
            "systemStatus": check(),
            "instanceStatus": check(),
        };
        (i.id, node)
    });
    c.describe("instanceStatusSet", told.collect(), &ids)
}

fn required_ids(c: &Context<'_>) -> Result<Vec<String>, Fault> {
    match c.ids("InstanceId") {
        ids if ids.is_empty() => Err(Fault::missing("InstanceId")),
        ids => Ok(ids),
    }
}

fn changes(changes: Vec<Change>) -> Node {
    let one = |change: Change| {
        node! {
            "instanceId": change.id,
            "currentState": state(change.after),
            "previousState": state(change.before),
        }
    };
    node! { "instancesSet": Node::list(changes, one) }
}

fn start(c: &Context<'_>) -> Answer {
    Ok(changes(c.region.start_instances(c.account, &required_ids(c)?)?))
}

fn stop(c: &Context<'_>) -> Answer {
    if c.params.boolean("Hibernate")? == Some(true) {
        return Err(Fault::new("UnsupportedHibernationConfiguration", "hutch does not have hibernation yet"));
    }
    let force = c.params.boolean("Force")?.unwrap_or(false);
    Ok(changes(c.region.stop_instances(c.account, &required_ids(c)?, force)?))
}

fn reboot(c: &Context<'_>) -> Answer {
    c.region.reboot_instances(c.account, &required_ids(c)?)?;
    Ok(done())
}

fn terminate(c: &Context<'_>) -> Answer {
    Ok(changes(c.region.terminate_instances(c.account, &required_ids(c)?)?))
}

fn monitor(c: &Context<'_>, on: bool) -> Answer {
    let ids = required_ids(c)?;
    c.region.monitor_instances(c.account, &ids, on)?;
    let state = if on { "enabled" } else { "disabled" };
    let one = |id: &String| node! { "instanceId": id, "monitoring": node! { "state": state } };
    Ok(node! { "instancesSet": Node::list(&ids, one) })
}

/// The account's instance of an id.
pub(super) fn the(c: &Context<'_>) -> Result<Instance, Fault> {
    let id = c.params.required("InstanceId")?.to_owned();
    let missing = || Fault::not_found("InvalidInstanceID", "instance ID", &id);
    own(c, std::slice::from_ref(&id))?.into_iter().next().ok_or_else(missing)
}

fn modify_metadata(c: &Context<'_>) -> Answer {
    let id = c.params.required("InstanceId")?;
    // What is wrong with it is said before anything is set.
    set_metadata(c.params, &mut MetadataOptions::default())?;
    let options = c.region.modify_metadata_options(c.account, id, |options| {
        let _ = set_metadata(c.params, options);
    })?;
    Ok(node! { "instanceId": id, "instanceMetadataOptions": metadata_options(&options, false) })
}

fn console(c: &Context<'_>) -> Answer {
    let i = the(c)?;
    let output = c.region.host().console(&i.id).map_err(Fault::internal)?;
    let output = output.get(output.len().saturating_sub(64 << 10)..).unwrap_or_default();
    Ok(node! {
        "instanceId": &i.id,
        "timestamp": time(jiff::Timestamp::now()),
        "output": BASE64_STANDARD.encode(output),
    })
}

/// What there is none of, whatever instance it is asked of.
fn none(c: &Context<'_>, why: &str) -> Answer {
    Err(Fault::new("UnsupportedOperation", format!("The instance '{}' {why}", the(c)?.id)))
}

fn password(c: &Context<'_>) -> Answer {
    let i = the(c)?;
    Ok(node! { "instanceId": &i.id, "timestamp": time(i.launched), "passwordData": "" })
}

fn credits(c: &Context<'_>) -> Answer {
    let ids = c.ids("InstanceId");
    let burstable = |i: &Instance| i.instance_type.starts_with('t') && !i.state.is_over();
    let told = own(c, &ids)?.into_iter().filter(burstable).map(|i| {
        let credits = if i.instance_type.starts_with("t2") { "standard" } else { "unlimited" };
        (i.id.clone(), node! { "instanceId": &i.id, "cpuCredits": credits })
    });
    c.describe("instanceCreditSpecificationSet", told.collect(), &ids)
}
