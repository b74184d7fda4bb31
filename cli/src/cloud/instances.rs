//! Instances: launch, list, start, stop, reboot, terminate, tag, and what they print.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::client::{Client, Connection, items, text_of};
use super::{find, find_one, instances, numbered, param};
use crate::output::Form;
use crate::ssh;

/// The key pair that `hutch run` gives where none is named: hutch's own.
const OWN_KEY: &str = "hutch";
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// Arguments of `hutch run`.
#[derive(clap::Args)]
pub struct Run {
    /// The AMI, by id or name.
    image: String,
    /// The instance type.
    #[arg(long = "type", value_name = "TYPE", default_value = "t3.micro")]
    kind: String,
    /// The kernel to boot, by id or name, instead of the one on the AMI (`hutch image import --kernel`).
    #[arg(long)]
    kernel: Option<String>,
    /// The RAM disk to boot with, by id or name. [default: with a kernel of one's own, none]
    #[arg(long)]
    ramdisk: Option<String>,
    /// A name (the tag `Name`).
    #[arg(long)]
    name: Option<String>,
    /// The key pair that may log in. [default: hutch's own, which `hutch ssh` uses]
    #[arg(long, value_name = "KEY-PAIR")]
    key: Option<String>,
    /// User data, for cloud-init: a script or a #cloud-config, of 16 KiB at most.
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// How many.
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// One more volume of so many GiB, which goes with the instance.
    #[arg(long = "volume", value_name = "GIB")]
    volumes: Vec<u64>,
    /// A security group, by id or name, instead of the default one.
    #[arg(long = "group", value_name = "GROUP")]
    groups: Vec<String>,
    /// Do not wait until it runs.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch ps`.
#[derive(clap::Args)]
pub struct Ps {
    /// Terminated ones, too.
    #[arg(long, short)]
    all: bool,
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of what is done to instances.
#[derive(clap::Args)]
pub struct Act {
    /// Ids or names.
    #[arg(required = true, value_name = "INSTANCE")]
    instances: Vec<String>,
    /// Do not wait until it is done.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch tag`.
#[derive(clap::Args)]
pub struct Tag {
    /// An instance by id or name, or anything else by its id.
    resource: String,
    /// KEY=VALUE, or KEY- to remove it.
    #[arg(required = true, value_name = "KEY=VALUE|KEY-")]
    tags: Vec<String>,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch logs`.
#[derive(clap::Args)]
pub struct Logs {
    /// Its id or name.
    instance: String,
    /// Go on as more comes.
    #[arg(long, short)]
    follow: bool,
    #[command(flatten)]
    at: Connection,
}

/// What can be done to instances.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Start,
    Stop,
    Reboot,
    Terminate,
}

/// `hutch run`.
pub fn run(args: &Run) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let key = match &args.key {
        Some(key) => key.clone(),
        None => own_key(&client)?,
    };
    let mut params = vec![
        param("ImageId", image_of(&client, &args.image, "machine")?),
        param("InstanceType", &args.kind),
        param("MinCount", args.count.to_string()),
        param("MaxCount", args.count.to_string()),
        param("KeyName", key),
        param("ClientToken", uuid::Uuid::new_v4().to_string()),
    ];
    for (field, kind, name) in [("KernelId", "kernel", &args.kernel), ("RamdiskId", "ramdisk", &args.ramdisk)]
    {
        if let Some(name) = name {
            params.push(param(field, image_of(&client, name, kind)?));
        }
    }
    if let Some(name) = &args.name {
        params.extend([
            param("TagSpecification.1.ResourceType", "instance"),
            param("TagSpecification.1.Tag.1.Key", "Name"),
            param("TagSpecification.1.Tag.1.Value", name),
        ]);
    }
    if let Some(path) = &args.user_data {
        let data = fs::read(path).with_context(|| format!("cannot read the user data {}", path.display()))?;
        params.push(param("UserData", BASE64_STANDARD.encode(data)));
    }
    for (i, gib) in args.volumes.iter().enumerate() {
        // sdf to sdp, as EC2 recommends for volumes.
        let Some(letter) = ('f'..='p').nth(i) else {
            bail!("{} volumes are too many: 11 at most", args.volumes.len())
        };
        let name = format!("BlockDeviceMapping.{}", i + 1);
        params.extend([
            param(format!("{name}.DeviceName"), format!("/dev/sd{letter}")),
            param(format!("{name}.Ebs.VolumeSize"), gib.to_string()),
            param(format!("{name}.Ebs.DeleteOnTermination"), "true"),
        ]);
    }
    let groups = args.groups.iter().map(|name| group(&client, name)).collect::<anyhow::Result<Vec<_>>>()?;
    params.extend(numbered("SecurityGroupId", groups.iter().map(String::as_str)));
    let made = client.call("RunInstances", &params)?;
    let ids: Vec<String> = items(&made["instancesSet"])
        .iter()
        .map(|instance| text_of(&instance["instanceId"]).to_owned())
        .collect();
    if !args.no_wait {
        wait(&client, &ids, "running")?;
    }
    show(&args.form, &client, &numbered("InstanceId", ids.iter().map(String::as_str)), true)?;
    Ok(ExitCode::SUCCESS)
}

/// `hutch ps`.
pub fn ps(args: &Ps) -> anyhow::Result<ExitCode> {
    show(&args.form, &Client::new(&args.at)?, &[], args.all)?;
    Ok(ExitCode::SUCCESS)
}

fn show(form: &Form, client: &Client, params: &[(String, String)], all: bool) -> anyhow::Result<()> {
    let mut listed = instances(client, params)?;
    listed.retain(|instance| all || instance.state != "terminated");
    listed.sort_by(|a, b| (&a.launched, &a.id).cmp(&(&b.launched, &b.id)));
    let row = |i: &super::Instance| {
        let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        [
            i.id.clone(),
            dash(&i.name),
            i.state.clone(),
            i.kind.clone(),
            i.image.clone(),
            dash(&i.ip),
            dash(&i.public_ip),
            i.launched.clone(),
        ]
    };
    let heading = ["ID", "NAME", "STATE", "TYPE", "IMAGE", "ADDRESS", "PUBLIC", "LAUNCHED"];
    form.list(heading, listed.iter().map(row), &listed)
}

/// `hutch start`, `stop`, `reboot`, `terminate`.
pub fn act(verb: Verb, args: &Act) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let ids: Vec<String> = find(&client, &args.instances)?.into_iter().map(|instance| instance.id).collect();
    let (action, state) = match verb {
        Verb::Start => ("StartInstances", Some("running")),
        Verb::Stop => ("StopInstances", Some("stopped")),
        Verb::Terminate => ("TerminateInstances", Some("terminated")),
        Verb::Reboot => ("RebootInstances", None),
    };
    client.call(action, &numbered("InstanceId", ids.iter().map(String::as_str)))?;
    if let Some(state) = state.filter(|_| !args.no_wait) {
        wait(&client, &ids, state)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells of each state that the instances come to, until all are in `state`.
fn wait(client: &Client, ids: &[String], state: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    let params = numbered("InstanceId", ids.iter().map(String::as_str));
    let mut told: BTreeMap<String, String> = BTreeMap::new();
    loop {
        let now = instances(client, &params)?;
        for instance in &now {
            if told.get(&instance.id) != Some(&instance.state) {
                eprintln!(
                    "hutch: {} {} after {:.1} s",
                    instance.id,
                    instance.state,
                    begun.elapsed().as_secs_f64()
                );
                told.insert(instance.id.clone(), instance.state.clone());
            }
        }
        if now.iter().all(|instance| instance.state == state) {
            return Ok(());
        }
        // What has ended does not come to run by waiting.
        let over = |state: &str| matches!(state, "stopped" | "terminated" | "shutting-down");
        if let Some(lost) = now.iter().find(|i| state == "running" && over(&i.state)) {
            bail!("{} is {}: {}", lost.id, lost.state, lost.reason);
        }
        std::thread::sleep(LOOK);
    }
}

/// hutch's own key as a key pair, imported where it is not there yet.
fn own_key(client: &Client) -> anyhow::Result<String> {
    let known = client.call(
        "DescribeKeyPairs",
        &[param("Filter.1.Name", "key-name"), param("Filter.1.Value.1", OWN_KEY)],
    )?;
    if items(&known["keySet"]).is_empty() {
        let public = BASE64_STANDARD.encode(ssh::public_key(None)?);
        client.call("ImportKeyPair", &[param("KeyName", OWN_KEY), param("PublicKeyMaterial", public)])?;
    }
    Ok(OWN_KEY.into())
}

/// The id of the image of this id, or the newest of this name: an AMI, a kernel or a RAM disk.
pub fn image(client: &Client, name: &str) -> anyhow::Result<String> {
    image_of(client, name, "*")
}

/// Likewise, of this type.
fn image_of(client: &Client, name: &str, kind: &str) -> anyhow::Result<String> {
    if ["ami-", "aki-", "ari-"].iter().any(|prefix| name.starts_with(prefix)) {
        return Ok(name.to_owned());
    }
    let params = [
        param("Filter.1.Name", "name"),
        param("Filter.1.Value.1", name),
        param("Filter.2.Name", "image-type"),
        param("Filter.2.Value.1", kind),
    ];
    let mut images = client.all("DescribeImages", &params, "imagesSet")?;
    images.sort_by(|a, b| text_of(&a["creationDate"]).cmp(text_of(&b["creationDate"])));
    let newest = images.last().map(|image| text_of(&image["imageId"]).to_owned());
    newest.with_context(|| {
        let kind = if matches!(kind, "*" | "machine") { "AMI" } else { kind };
        format!("there is no {kind} {name}; `hutch image build` and `hutch image import` make them")
    })
}

/// The id of the security group of this id or name.
fn group(client: &Client, name: &str) -> anyhow::Result<String> {
    if name.starts_with("sg-") {
        return Ok(name.to_owned());
    }
    let params = [param("Filter.1.Name", "group-name"), param("Filter.1.Value.1", name)];
    let groups = client.all("DescribeSecurityGroups", &params, "securityGroupInfo")?;
    let first = groups.first().map(|group| text_of(&group["groupId"]).to_owned());
    first.with_context(|| format!("there is no security group {name}"))
}

/// `hutch tag`.
pub fn tag(args: &Tag) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    // Names are of instances; everything else has its id only.
    let named = find_one(&client, &args.resource);
    let id = match named {
        Ok(instance) => instance.id,
        Err(_) if args.resource.contains('-') => args.resource.clone(),
        Err(error) => return Err(error),
    };
    let (mut put, mut gone) = (vec![param("ResourceId.1", &id)], vec![param("ResourceId.1", &id)]);
    for (i, tag) in args.tags.iter().enumerate() {
        match (tag.split_once('='), tag.strip_suffix('-')) {
            (Some((key, value)), _) => {
                put.extend([
                    param(format!("Tag.{}.Key", i + 1), key),
                    param(format!("Tag.{}.Value", i + 1), value),
                ]);
            }
            (None, Some(key)) => gone.push(param(format!("Tag.{}.Key", i + 1), key)),
            (None, None) => bail!("{tag:?} is neither KEY=VALUE nor KEY-"),
        }
    }
    for (action, params) in [("CreateTags", put), ("DeleteTags", gone)] {
        if params.len() > 1 {
            client.call(action, &params)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `hutch logs`.
pub fn logs(args: &Logs) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let id = find_one(&client, &args.instance)?.id;
    let params = [param("InstanceId", &id), param("Latest", "true")];
    let mut shown: Vec<u8> = Vec::new();
    loop {
        let answer = client.call("GetConsoleOutput", &params)?;
        let text = BASE64_STANDARD
            .decode(text_of(&answer["output"]))
            .context("the console's output is not base64")?;
        let mut out = std::io::stdout();
        let written =
            out.write_all(text.get(overlap(&shown, &text)..).unwrap_or_default()).and_then(|()| out.flush());
        if !args.follow || written.is_err() {
            return Ok(ExitCode::SUCCESS);
        }
        shown = text;
        std::thread::sleep(LOOK * 2);
    }
}

/// How much of `now` is what ends `before`: the console is told as its last 64 KiB.
fn overlap(before: &[u8], now: &[u8]) -> usize {
    let most = before.len().min(now.len());
    (0..=most).rev().find(|&len| before.ends_with(now.get(..len).unwrap_or_default())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_shown_is_not_shown_again() {
        assert_eq!(overlap(b"", b"abc"), 0);
        assert_eq!(overlap(b"abc", b"abcde"), 3);
        assert_eq!(overlap(b"abcdef", b"defgh"), 3, "the oldest was lost");
        assert_eq!(overlap(b"abc", b"xyz"), 0);
        assert_eq!(overlap(b"abc", b"abc"), 3);
    }
}
