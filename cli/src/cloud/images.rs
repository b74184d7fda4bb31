//! AMIs of instances: create, copy, bundle, share, deregister.

use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use super::client::{Client, Connection, items, text_of};
use super::instances::image;
use super::{find_one, numbered, param};

/// What can be done with AMIs.
#[derive(Subcommand)]
pub enum Ami {
    /// Make an AMI of an instance.
    Create {
        /// The instance, by id or name.
        instance: String,
        /// The AMI's name.
        #[arg(long)]
        name: String,
        /// What it is for.
        #[arg(long)]
        description: Option<String>,
        /// Do not shut a running guest down for it: what it has not written to its disks is not in the AMI.
        #[arg(long)]
        no_reboot: bool,
        #[command(flatten)]
        at: Connection,
    },
    /// Copy an AMI under another name.
    Copy {
        /// The AMI, by id or name.
        image: String,
        /// The copy's name.
        #[arg(long)]
        name: String,
        /// The region it is in, if it is another.
        #[arg(long, value_name = "REGION")]
        from: Option<String>,
        #[command(flatten)]
        at: Connection,
    },
    /// Write an AMI's root to a bucket, for instances that have it on instance store.
    Bundle {
        /// The AMI, by id or name.
        image: String,
        /// Where it goes: BUCKET/PREFIX.
        #[arg(value_name = "BUCKET/PREFIX")]
        place: String,
        /// Make an AMI of the bundle, of this name, and print its id.
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        at: Connection,
    },
    /// Let other accounts launch an AMI, or no longer.
    Share {
        /// The AMI, by id or name.
        image: String,
        /// Accounts of 12 digits, or `all`.
        #[arg(required = true, value_name = "ACCOUNT")]
        accounts: Vec<String>,
        /// Take the permission away.
        #[arg(long)]
        remove: bool,
        #[command(flatten)]
        at: Connection,
    },
    /// Remove AMIs. Instances of them go on; their snapshots stay.
    Deregister {
        /// AMIs, by id or name.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
        #[command(flatten)]
        at: Connection,
    },
}

/// Carries the command out.
pub fn run(command: &Ami) -> anyhow::Result<ExitCode> {
    match command {
        Ami::Create { instance, name, description, no_reboot, at } => {
            let client = Client::new(at)?;
            let mut params = vec![param("InstanceId", find_one(&client, instance)?.id), param("Name", name)];
            params.extend(description.as_ref().map(|text| param("Description", text)));
            params.push(param("NoReboot", no_reboot.to_string()));
            let made = client.call("CreateImage", &params)?;
            let id = text_of(&made["imageId"]).to_owned();
            available(&client, &id)?;
            println!("{id}");
        }
        Ami::Copy { image: name_or_id, name, from, at } => {
            let client = Client::new(at)?;
            let region = from.clone().unwrap_or_else(|| at.region.clone());
            let source = Connection { region: region.clone(), ..at.clone() };
            let params = [
                param("SourceImageId", image(&Client::new(&source)?, name_or_id)?),
                param("SourceRegion", region),
                param("Name", name),
            ];
            let made = client.call("CopyImage", &params)?;
            let id = text_of(&made["imageId"]).to_owned();
            available(&client, &id)?;
            println!("{id}");
        }
        Ami::Bundle { image: source, place, name, at } => {
            let client = Client::new(at)?;
            let (bucket, prefix) = place.split_once('/').context("name a place like images/web-1")?;
            let params =
                [param("ImageId", image(&client, source)?), param("Bucket", bucket), param("Prefix", prefix)];
            let id = text_of(&client.own("BundleImage", &params)?["bundleId"]).to_owned();
            bundled(&client, &id)?;
            let location = format!("{place}.manifest.xml");
            match name {
                Some(name) => {
                    let params = [param("Name", name), param("ImageLocation", location)];
                    println!("{}", text_of(&client.call("RegisterImage", &params)?["imageId"]));
                }
                None => println!("{location}"),
            }
        }
        Ami::Share { image: name, accounts, remove, at } => {
            let client = Client::new(at)?;
            let mut params = vec![param("ImageId", image(&client, name)?)];
            let verb = if *remove { "Remove" } else { "Add" };
            for (i, account) in accounts.iter().enumerate() {
                let field = if account == "all" { "Group" } else { "UserId" };
                params.push(param(format!("LaunchPermission.{verb}.{}.{field}", i + 1), account));
            }
            client.call("ModifyImageAttribute", &params)?;
        }
        Ami::Deregister { images, at } => {
            let client = Client::new(at)?;
            let ids = images.iter().map(|name| image(&client, name)).collect::<anyhow::Result<Vec<_>>>()?;
            for id in ids {
                client.call("DeregisterImage", &[param("ImageId", id)])?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until an AMI can be launched.
fn available(client: &Client, id: &str) -> anyhow::Result<()> {
    eprintln!("hutch: {id} is being made");
    loop {
        let answer = client.call("DescribeImages", &numbered("ImageId", [id]))?;
        let image = items(&answer["imagesSet"]).first().cloned().unwrap_or_default();
        match text_of(&image["imageState"]) {
            "available" => return Ok(()),
            "pending" => std::thread::sleep(std::time::Duration::from_millis(500)),
            state => anyhow::bail!("{id} is {state}: {}", text_of(&image["stateReason"]["message"])),
        }
    }
}

/// Waits until a bundle is written.
fn bundled(client: &Client, id: &str) -> anyhow::Result<()> {
    loop {
        let answer = client.call("DescribeBundleTasks", &numbered("BundleId", [id]))?;
        let task = items(&answer["bundleInstanceTasksSet"]).first().cloned().unwrap_or_default();
        match text_of(&task["state"]) {
            "complete" => return Ok(()),
            "failed" => anyhow::bail!("nothing is bundled: {}", text_of(&task["error"]["message"])),
            _ => std::thread::sleep(std::time::Duration::from_millis(500)),
        }
    }
}
