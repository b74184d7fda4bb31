//! Attributes of instances, one at a time.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_cloud::model::ImageKind;
use hutch_cloud::region::Attribute;

use super::instances::{Around, shutdown, the};
use super::{Answer, Context, Operation, done, time};
use crate::node;
use crate::query::{Fault, Node};

pub(super) const OPERATIONS: &[(&str, Operation)] = &[
    ("DescribeInstanceAttribute", attribute),
    ("ModifyInstanceAttribute", modify),
    ("ResetInstanceAttribute", reset),
];

fn attribute(c: &Context<'_>) -> Answer {
    let i = the(c)?;
    let name = c.params.required("Attribute")?;
    let value = |value: Node| node! { "value": value };
    let truth = |on: bool| value(Node::Text(on.to_string()));
    let answer = Node::empty().with("instanceId", &i.id);
    Ok(match name {
        "instanceType" => answer.with("instanceType", value(Node::Text(i.instance_type))),
        "userData" => {
            let data = i.user_data.map(|data| value(Node::Text(BASE64_STANDARD.encode(data))));
            answer.with("userData", data.unwrap_or(Node::empty()))
        }
        "disableApiTermination" => answer.with("disableApiTermination", truth(i.termination_protection)),
        "disableApiStop" => answer.with("disableApiStop", truth(i.stop_protection)),
        "instanceInitiatedShutdownBehavior" => {
            let text = if i.shutdown_terminates { "terminate" } else { "stop" };
            answer.with("instanceInitiatedShutdownBehavior", value(Node::Text(text.into())))
        }
        "rootDeviceName" => answer.with("rootDeviceName", value(Node::Text(i.root_device))),
        "sourceDestCheck" => answer.with("sourceDestCheck", truth(i.source_dest_check)),
        "ebsOptimized" => answer.with("ebsOptimized", truth(i.ebs_optimized)),
        "enaSupport" => answer.with("enaSupport", truth(true)),
        "kernel" => answer.with("kernel", i.kernel.map(|id| value(Node::Text(id)))),
        "ramdisk" => answer.with("ramdisk", i.ramdisk.map(|id| value(Node::Text(id)))),
        "sriovNetSupport" => answer,
        "productCodes" => answer.with("productCodes", Node::List(vec![])),
        "enclaveOptions" => answer.with("enclaveOptions", node! { "enabled": false }),
        "groupSet" => {
            let around = Around::of(c, std::slice::from_ref(&i))?;
            let primary = i.interfaces.first().and_then(|id| around.interfaces.get(id));
            answer.with("groupSet", around.groups(primary.map_or(&[], |e| &e.groups)))
        }
        "blockDeviceMapping" => answer.with(
            "blockDeviceMapping",
            Node::list(&i.devices, |device| {
                node! {
                    "deviceName": &device.name,
                    "ebs": node! {
                        "volumeId": &device.volume, "status": device.state.name(), "attachTime": time(device.attached),
                        "deleteOnTermination": device.delete_on_termination,
                    },
                }
            }),
        ),
        _ => return Err(Fault::value("attribute", name, "It is no attribute of an instance.")),
    })
}

fn modify(c: &Context<'_>) -> Answer {
    let p = c.params;
    let id = p.required("InstanceId")?;
    let truth = |name: &str| -> Result<Option<bool>, Fault> { p.boolean(&format!("{name}.Value")) };
    // The older form names the attribute and gives the value apart.
    let older = |name: &str| p.str("Attribute").filter(|have| *have == name).and(p.str("Value"));
    let text = |upper: &str, lower: &str| {
        p.str(&format!("{upper}.Value")).or_else(|| p.str(upper)).or_else(|| older(lower)).map(str::to_owned)
    };
    let switch = |upper: &str, lower: &str| match (truth(upper)?, older(lower)) {
        (Some(on), _) => Ok(Some(on)),
        (None, Some("true")) => Ok(Some(true)),
        (None, Some("false")) => Ok(Some(false)),
        (None, Some(other)) => Err(Fault::value(lower, other, "It is neither true nor false.")),
        (None, None) => Ok(None),
    };
    let mut set = Vec::new();
    set.extend(text("InstanceType", "instanceType").map(Attribute::InstanceType));
    let data = match p.sub("UserData") {
        Some(data) if data.str("Value").is_some() => data.blob("Value")?,
        Some(_) => p.blob("UserData")?,
        None => older("userData").map(|_| p.blob("Value")).transpose()?.flatten(),
    };
    set.extend(data.map(|data| Attribute::UserData((!data.is_empty()).then_some(data))));
    set.extend(text("Kernel", "kernel").map(|id| Attribute::Boots(ImageKind::Kernel, Some(id))));
    set.extend(text("Ramdisk", "ramdisk").map(|id| Attribute::Boots(ImageKind::Ramdisk, Some(id))));
    set.extend(switch("EbsOptimized", "ebsOptimized")?.map(Attribute::EbsOptimized));
    set.extend(
        switch("DisableApiTermination", "disableApiTermination")?.map(Attribute::TerminationProtection),
    );
    set.extend(switch("DisableApiStop", "disableApiStop")?.map(Attribute::StopProtection));
    set.extend(switch("SourceDestCheck", "sourceDestCheck")?.map(Attribute::SourceDestCheck));
    if let Some(text) = text("InstanceInitiatedShutdownBehavior", "instanceInitiatedShutdownBehavior") {
        set.push(Attribute::ShutdownTerminates(shutdown(&text)?));
    }
    let groups = p.strings("GroupId");
    if !groups.is_empty() {
        set.push(Attribute::Groups(groups));
    }
    let mut answers = Vec::new();
    for mapping in p.list("BlockDeviceMapping") {
        if let Some(answer) = mapping.boolean("Ebs.DeleteOnTermination")? {
            answers.push((mapping.required("DeviceName")?.to_owned(), answer));
        }
    }
    if !answers.is_empty() {
        set.push(Attribute::DeleteOnTermination(answers));
    }
    match set.as_slice() {
        [] => Err(Fault::new("InvalidParameterCombination", "No attributes specified.")),
        [attribute] => {
            c.region.modify_instance(c.account, id, attribute)?;
            Ok(done())
        }
        _ => Err(Fault::combination("Fields for multiple attribute types specified")),
    }
}

fn reset(c: &Context<'_>) -> Answer {
    let name = c.params.required("Attribute")?;
    let attribute = match name {
        "kernel" => Attribute::Boots(ImageKind::Kernel, None),
        "ramdisk" => Attribute::Boots(ImageKind::Ramdisk, None),
        "sourceDestCheck" => Attribute::SourceDestCheck(true),
        _ => {
            let why = "kernel, ramdisk and sourceDestCheck can be reset.";
            return Err(Fault::value("attribute", name, why));
        }
    };
    c.region.modify_instance(c.account, c.params.required("InstanceId")?, &attribute)?;
    Ok(done())
}
