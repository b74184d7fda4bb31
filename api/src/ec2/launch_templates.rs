//! Launch templates: kept requests to launch. A version's data are the parameters as they were sent; RunInstances reads
//! them as its own, and the answers tell them by the names that answers have.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_cloud::model::{Instance, Interface, LaunchTemplate, LaunchTemplateVersion};
use hutch_cloud::region::{NewTemplate, TemplateData, TemplateName};

use super::{Answer, Context, Operation, chosen, tag_set, time};
use crate::node;
use crate::query::{Fault, Node, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("CreateLaunchTemplate", create),
    ("CreateLaunchTemplateVersion", create_version),
    ("DescribeLaunchTemplates", describe),
    ("DescribeLaunchTemplateVersions", describe_versions),
    ("ModifyLaunchTemplate", modify),
    ("DeleteLaunchTemplate", delete),
    ("DeleteLaunchTemplateVersions", delete_versions),
    ("GetLaunchTemplateData", of_instance),
];

/// Lists whose names in answers are not the one in requests with `Set` behind it.
const SETS: &[(&str, &str)] = &[
    ("NetworkInterface.SecurityGroupId", "groupSet"),
    ("NetworkInterface.Ipv6Addresses", "ipv6AddressesSet"),
    ("NetworkInterface.PrivateIpAddresses", "privateIpAddressesSet"),
    ("LicenseSpecification", "licenseSet"),
];

fn template(c: &Context<'_>, t: &LaunchTemplate) -> Node {
    node! {
        "launchTemplateId": &t.id,
        "launchTemplateName": &t.name,
        "createTime": time(t.created),
        "createdBy": format!("arn:aws:iam::{}:root", c.account),
        "defaultVersionNumber": t.default_version,
        "latestVersionNumber": t.latest_version,
        "tagSet": tag_set(&t.tags),
    }
}

fn version(c: &Context<'_>, t: &LaunchTemplate, v: &LaunchTemplateVersion) -> Result<Node, Fault> {
    Ok(node! {
        "launchTemplateId": &t.id,
        "launchTemplateName": &t.name,
        "versionNumber": v.version,
        "versionDescription": (!v.description.is_empty()).then_some(&v.description),
        "createTime": time(v.created),
        "createdBy": format!("arn:aws:iam::{}:root", c.account),
        "defaultVersion": v.version == t.default_version,
        "launchTemplateData": data("", &params(&v.data)?),
    })
}

fn params(data: &TemplateData) -> Result<Params, Fault> {
    Params::of(data.iter().map(|(name, value)| (name.clone(), value.clone())).collect())
}

/// A request's parameters as answers have them: `BlockDeviceMapping.1.DeviceName` is `deviceName` of an item of
/// `blockDeviceMappingSet`.
fn data(path: &str, p: &Params) -> Node {
    let mut all = Node::empty();
    for (name, below) in p.names() {
        let whole = if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let mut lower = name.chars();
        let first = lower.next().map(|c| c.to_ascii_lowercase()).into_iter();
        let lower: String = first.chain(lower).collect();
        let items = p.list(name);
        let node = match below.text() {
            Some(text) => Node::Text(text.into()),
            None if items.is_empty() => data(&whole, below),
            None => {
                let set = SETS.iter().find(|(from, _)| *from == whole).map(|(_, to)| (*to).to_owned());
                let items = Node::list(items, |item| match item.text() {
                    Some(text) => Node::Text(text.into()),
                    None => data(&whole, item),
                });
                all = all.with(set.unwrap_or(format!("{lower}Set")), items);
                continue;
            }
        };
        all = all.with(lower, node);
    }
    all
}

/// The template that parameters name by id or by name.
fn named(p: &Params) -> Result<TemplateName<'_>, Fault> {
    match (p.str("LaunchTemplateId"), p.str("LaunchTemplateName")) {
        (Some(id), None) => Ok(TemplateName::Id(id)),
        (None, Some(name)) => Ok(TemplateName::Name(name)),
        (Some(_), Some(_)) => {
            Err(Fault::combination("Name a launch template by its id or by its name, not both."))
        }
        (None, None) => Err(Fault::missing("LaunchTemplateId or LaunchTemplateName")),
    }
}

/// The request, over what the launch template says that it names; the template's id and version.
///
/// # Errors
/// The template or its version are not there.
pub(super) fn merged(c: &Context<'_>) -> Result<(Params, Option<(String, u64)>), Fault> {
    let Some(ask) = c.params.sub("LaunchTemplate") else { return Ok((c.params.clone(), None)) };
    let (template, version) = c.region.launch_template_version(c.account, named(ask)?, ask.str("Version"))?;
    Ok((c.params.over(&params(&version.data)?), Some((template.id, version.version))))
}

fn given(c: &Context<'_>) -> TemplateData {
    c.params.sub("LaunchTemplateData").map(Params::flat).unwrap_or_default().into_iter().collect()
}

fn create(c: &Context<'_>) -> Answer {
    let p = c.params;
    let new = NewTemplate {
        name: p.required("LaunchTemplateName")?.into(),
        description: p.str("VersionDescription").unwrap_or_default().into(),
        data: given(c),
        tags: c.tag_specifications()?.remove("launch-template").unwrap_or_default(),
        client_token: p.str("ClientToken").filter(|token| !token.is_empty()).map(str::to_owned),
        request: c.digest(),
    };
    let (made, _) = c.region.create_launch_template(c.account, &new)?;
    Ok(node! { "launchTemplate": template(c, &made) })
}

fn create_version(c: &Context<'_>) -> Answer {
    let p = c.params;
    let new = params(&given(c))?;
    let (t, v) = c.region.create_launch_template_version(
        c.account,
        named(p)?,
        p.str("SourceVersion").filter(|version| !version.is_empty()),
        p.str("VersionDescription").unwrap_or_default(),
        // What was stored was read before, so it can be read again.
        |before| {
            params(&before).map(|before| new.over(&before)).unwrap_or_default().flat().into_iter().collect()
        },
    )?;
    Ok(node! { "launchTemplateVersion": version(c, &t, &v)? })
}

fn own(c: &Context<'_>) -> Result<Vec<LaunchTemplate>, Fault> {
    let mut all = c.region.all::<LaunchTemplate>()?;
    all.retain(|template| template.account == c.account);
    Ok(all)
}

fn describe(c: &Context<'_>) -> Answer {
    let (ids, names) = (c.ids("LaunchTemplateId"), c.params.strings("LaunchTemplateName"));
    for name in &names {
        c.region.launch_template(c.account, TemplateName::Name(name))?;
    }
    let kind = ("lt", "InvalidLaunchTemplateId", "launch template ID");
    let mut found = chosen(own(c)?, &ids, |template| &template.id, kind)?;
    found.retain(|template| names.is_empty() || names.contains(&template.name));
    c.describe("launchTemplates", found.iter().map(|t| (t.id.clone(), template(c, t))).collect(), &ids)
}

fn describe_versions(c: &Context<'_>) -> Answer {
    let p = c.params;
    let asked = p.strings("LaunchTemplateVersion");
    let one = p.sub("LaunchTemplateId").or(p.sub("LaunchTemplateName")).is_some();
    if !one && (asked.is_empty() || !asked.iter().all(|v| matches!(v.as_str(), "$Latest" | "$Default"))) {
        let why = "Without a launch template, ask for the versions $Latest or $Default of all.";
        return Err(Fault::new("MissingParameter", why));
    }
    let templates = if one { vec![c.region.launch_template(c.account, named(p)?)?] } else { own(c)? };
    let bound = |name: &str, t: &LaunchTemplate| p.str(name).map(|v| t.version(Some(v))).transpose();
    let mut told = Vec::new();
    for t in &templates {
        let mut found = Vec::new();
        for v in &asked {
            found.push(c.region.launch_template_version(c.account, TemplateName::Id(&t.id), Some(v))?.1);
        }
        if asked.is_empty() {
            let (least, most) = (bound("MinVersion", t)?, bound("MaxVersion", t)?);
            found = c.region.all_of::<LaunchTemplateVersion>(&format!("{}/", t.id))?;
            found.retain(|v| least.is_none_or(|n| v.version >= n) && most.is_none_or(|n| v.version <= n));
        }
        found.sort_by_key(|v| v.version);
        found.dedup_by_key(|v| v.version);
        for v in found {
            told.push((v.id.clone(), version(c, t, &v)?));
        }
    }
    c.describe("launchTemplateVersionSet", told, &asked)
}

fn modify(c: &Context<'_>) -> Answer {
    let t =
        c.region.set_default_version(c.account, named(c.params)?, c.params.required("SetDefaultVersion")?)?;
    Ok(node! { "launchTemplate": template(c, &t) })
}

fn delete(c: &Context<'_>) -> Answer {
    let t = c.region.delete_launch_template(c.account, named(c.params)?)?;
    Ok(node! { "launchTemplate": template(c, &t) })
}

fn delete_versions(c: &Context<'_>) -> Answer {
    let asked = c.params.strings("LaunchTemplateVersion");
    let (t, done) = c.region.delete_launch_template_versions(c.account, named(c.params)?, &asked)?;
    let of = |number: u64| {
        node! { "launchTemplateId": &t.id, "launchTemplateName": &t.name, "versionNumber": number }
    };
    let (mut gone, mut kept) = (Vec::new(), Vec::new());
    for (asked, result) in done {
        match result {
            Ok(number) => gone.push(of(number)),
            Err(fault) => kept.push(
                of(t.version(Some(&asked)).unwrap_or(0))
                    .with("responseError", node! { "code": &*fault.code, "message": fault.message }),
            ),
        }
    }
    Ok(node! {
        "successfullyDeletedLaunchTemplateVersionSet": Node::List(gone),
        "unsuccessfullyDeletedLaunchTemplateVersionSet": Node::List(kept),
    })
}

/// What would launch an instance like this one.
fn of_instance(c: &Context<'_>) -> Answer {
    let id = c.params.required("InstanceId")?;
    hutch_cloud::id::check(id, "i", "InvalidInstanceID")?;
    let found = c.region.get::<Instance>(id)?.filter(|i| i.account == c.account);
    let i = found.ok_or_else(|| Fault::not_found("InvalidInstanceID", "instance ID", id))?;
    let devices = Node::list(&i.devices, |device| {
        node! {
            "deviceName": &device.name,
            "ebs": node! { "deleteOnTermination": device.delete_on_termination },
        }
    });
    let mut interfaces = Vec::new();
    for (index, id) in i.interfaces.iter().enumerate() {
        let Some(e) = c.region.get::<Interface>(id)? else { continue };
        interfaces.push(node! {
            "deviceIndex": e.attachment.as_ref().map_or(index, |a| a.device_index as usize),
            "description": &e.description,
            "deleteOnTermination": e.attachment.as_ref().is_none_or(|a| a.delete_on_termination),
            "groupSet": Node::list(&e.groups, |group| Node::Text(group.clone())),
            "subnetId": &e.subnet,
        });
    }
    let data = node! {
        "imageId": &i.image,
        "kernelId": i.kernel.as_ref(),
        "ramDiskId": i.ramdisk.as_ref(),
        "instanceType": &i.instance_type,
        "keyName": i.key_name.as_ref(),
        "ebsOptimized": i.ebs_optimized,
        "monitoring": node! { "enabled": i.monitoring },
        "placement": node! { "availabilityZone": &i.zone, "tenancy": "default" },
        "disableApiTermination": i.termination_protection,
        "disableApiStop": i.stop_protection,
        "instanceInitiatedShutdownBehavior": if i.shutdown_terminates { "terminate" } else { "stop" },
        "userData": i.user_data.as_ref().map(|data| BASE64_STANDARD.encode(data)),
        "blockDeviceMappingSet": devices,
        "networkInterfaceSet": Node::List(interfaces),
        "metadataOptions": super::instances::metadata_options(&i.metadata, true),
        "tagSpecificationSet": tag_set(&i.tags).map(|tags| Node::List(vec![node! { "resourceType": "instance", "tagSet": tags }])),
    };
    Ok(node! { "launchTemplateData": data })
}
