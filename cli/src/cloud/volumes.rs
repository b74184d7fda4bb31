//! Volumes as files of other machines: export and import; and whether one is whole.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::backup::Shown;
use super::client::{Client, Connection, items, text_of};
use super::{numbered, param};
use crate::image::{FormatArg, size};
use crate::output::{Output, record};

/// How often it is looked how far something is.
const LOOK: Duration = Duration::from_millis(200);

/// What can be done with volumes.
#[derive(Subcommand)]
pub enum Command {
    /// Write what a volume or a snapshot holds to a file, with holes, and its checksum beside it (FILE.sha256).
    ///
    /// hutchd writes it, as the administrator: FILE is new, on its machine. A guest that has the volume goes on: it is written
    /// from a snapshot, which is taken for that and removed. What is encrypted is written as the guest sees it.
    Export {
        /// A volume, by id or name, or a snapshot.
        what: String,
        /// The file.
        file: PathBuf,
        /// The file's format. [default: by its name: qcow2 where that ends in .qcow2, else raw]
        #[arg(long, value_enum)]
        format: Option<Form>,
        /// How to print what was made.
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        at: Connection,
    },
    /// Make a volume of a file: raw, also compressed by gzip, xz or zstd, qcow2, VMDK, VHD or VHDX.
    ///
    /// A process without rights reads it, within limits, as for `hutch image import`; hutchd has that done, as the
    /// administrator: FILE is on its machine.
    Import {
        /// The file.
        file: PathBuf,
        /// The file's format; looked at once, now, when it is not said.
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// A name (the tag `Name`).
        #[arg(long)]
        name: Option<String>,
        /// The zone. [default: the region's first]
        #[arg(long)]
        zone: Option<String>,
        /// The volume type.
        #[arg(long = "type", value_name = "TYPE", default_value = "gp3")]
        kind: String,
        /// The size in GiB. [default: the file's disk's]
        #[arg(long, value_name = "GIB")]
        size: Option<u64>,
        #[command(flatten)]
        at: Connection,
    },
    /// Check that a volume or a snapshot is whole: the tables of its layers, and that all it holds can be read.
    ///
    /// A guest that has the volume goes on: a snapshot is checked, which is taken for that and removed. Nothing is repaired. Of a
    /// volume that is so damaged that it cannot be opened, `hutch volume repair` tells more.
    Check {
        /// A volume, by id or name, or a snapshot.
        what: String,
        /// How to print what was found.
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        at: Connection,
    },
    /// Repair a volume that no running instance has: free what is lost of its room, count anew, and mend its tables.
    ///
    /// Where bytes of the guest's are lost, nothing is written, and their places on its disk are told; a snapshot or a backup may
    /// have them. With --discard-broken it is done all the same: as with `qemu-img check -r all`, entries that lead nowhere
    /// read as zeros, and a cluster that several have becomes a copy for each, of which at most one is right. Layers that
    /// snapshots or other volumes have too are never written: such damage is told, with who has it.
    Repair {
        /// A volume, by id or name.
        volume: String,
        /// Repair also what cannot be repaired without loss.
        #[arg(long)]
        discard_broken: bool,
        /// How to print what was done.
        #[arg(long, short, value_enum, default_value_t = Output::Text)]
        output: Output,
        #[command(flatten)]
        at: Connection,
    },
}

/// The format of an exported file.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    Raw,
    Qcow2,
}

/// A snapshot to be read; one that was taken for that goes when this is dropped.
struct Taken<'a> {
    client: &'a Client,
    id: String,
    ours: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.ours
            && let Err(error) = self.client.call("DeleteSnapshot", &[param("SnapshotId", &self.id)])
        {
            eprintln!("hutch: the snapshot {} stays: {error:#}", self.id);
        }
    }
}

/// The volume of this id or name.
fn volume(client: &Client, name: &str) -> anyhow::Result<String> {
    if name.starts_with("vol-") {
        return Ok(name.to_owned());
    }
    let params = [param("Filter.1.Name", "tag:Name"), param("Filter.1.Value.1", name)];
    let found = client.all("DescribeVolumes", &params, "volumeSet")?;
    match found.as_slice() {
        [] => bail!("there is no volume {name}"),
        [one] => Ok(text_of(&one["volumeId"]).to_owned()),
        several => bail!("{} volumes are called {name}: say which by its id", several.len()),
    }
}

impl<'a> Taken<'a> {
    fn of(client: &'a Client, what: &str, why: &str) -> anyhow::Result<Taken<'a>> {
        if what.starts_with("snap-") {
            return Ok(Taken { client, id: what.to_owned(), ours: false });
        }
        let params = [param("VolumeId", volume(client, what)?), param("Description", why)];
        let id = text_of(&client.call("CreateSnapshot", &params)?["snapshotId"]).to_owned();
        let taken = Taken { client, id, ours: true };
        loop {
            let told = client.call("DescribeSnapshots", &numbered("SnapshotId", [&*taken.id]))?;
            let snapshot = items(&told["snapshotSet"]).first().cloned().unwrap_or_default();
            match text_of(&snapshot["status"]) {
                "completed" => return Ok(taken),
                "error" => bail!("no snapshot could be taken: {}", text_of(&snapshot["statusMessage"])),
                _ => std::thread::sleep(LOOK),
            }
        }
    }
}

/// Waits for a job; what came of it.
fn result(client: &Client, job: &Value, what: &'static str) -> anyhow::Result<Value> {
    let id = text_of(&job["jobId"]).to_owned();
    let mut shown = Shown::new(what)?;
    loop {
        let answer = client.own("DescribeJob", &[param("JobId", &id)])?;
        let number = |name: &str| text_of(&answer[name]).parse().unwrap_or(0);
        match text_of(&answer["state"]) {
            "running" => shown.tell((number("doneBytes"), number("totalBytes"))),
            "failed" => {
                drop(shown);
                bail!("{}", text_of(&answer["message"]));
            }
            _ => return Ok(answer["result"].clone()),
        }
        std::thread::sleep(LOOK);
    }
}

fn number(value: &Value) -> u64 {
    text_of(value).parse().unwrap_or(0)
}

fn whole(file: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(file).context("the file has no whole path")?;
    Ok(path.to_str().context("the file's name is not UTF-8")?.to_owned())
}

/// Carries the command out.
pub fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Export { what, file, format, output, at } => export(what, file, *format, *output, at),
        Command::Check { what, output, at } => check(what, *output, at),
        Command::Repair { volume, discard_broken, output, at } => {
            repair(volume, *discard_broken, *output, at)
        }
        Command::Import { .. } => import(command),
    }
}

fn export(
    what: &str,
    file: &Path,
    format: Option<Form>,
    output: Output,
    at: &Connection,
) -> anyhow::Result<ExitCode> {
    let client = Client::new(at)?;
    let path = whole(file)?;
    let by_name = if file.extension().is_some_and(|e| e == "qcow2") { Form::Qcow2 } else { Form::Raw };
    let format = if format.unwrap_or(by_name) == Form::Qcow2 { "qcow2" } else { "raw" };
    let taken = Taken::of(&client, what, "Taken by hutch volume export")?;
    let params = [param("SnapshotId", &taken.id), param("Path", &path), param("Format", format)];
    let made = result(&client, &client.own("CreateExport", &params)?, "exporting")?;
    let (bytes, disk, sum) = (number(&made["bytes"]), number(&made["size"]), text_of(&made["sha256"]));
    if matches!(output, Output::Json | Output::Yaml) {
        let told = json!({ "path": path, "format": format, "bytes": bytes, "size": disk, "sha256": sum });
        record(output, &told)?;
    } else {
        println!("{sum}  {path}");
        eprintln!("hutch: a disk of {} as {format}; the checksum is in {path}.sha256", size(disk));
    }
    Ok(ExitCode::SUCCESS)
}

fn check(what: &str, output: Output, at: &Connection) -> anyhow::Result<ExitCode> {
    let client = Client::new(at)?;
    let taken = Taken::of(&client, what, "Taken by hutch volume check")?;
    let job = client.own("CreateCheck", &[param("SnapshotId", &taken.id)])?;
    let found = result(&client, &job, "checking")?;
    let layers = items(&found["layerSet"]);
    let wrong: u64 = layers.iter().map(|layer| number(&layer["wrong"])).sum();
    if matches!(output, Output::Json | Output::Yaml) {
        let layers = layers.iter().map(|layer| {
            let count = |name: &str| layer.get(name).map(number);
            let faults = items(&layer["faultSet"]).iter().map(text_of).collect::<Vec<_>>();
            json!({ "name": text_of(&layer["name"]), "clusters": count("clusters"), "leaked": count("leaked"),
                    "wrong": count("wrong"), "faults": faults })
        });
        let layers = layers.collect::<Vec<_>>();
        record(output, &json!({ "whole": wrong == 0, "bytes": number(&found["bytes"]), "layers": layers }))?;
    } else {
        for layer in layers {
            let name = text_of(&layer["name"]);
            match layer.get("clusters") {
                None => println!("{name}: raw, without tables"),
                Some(clusters) => {
                    let (leaked, wrong) = (text_of(&layer["leaked"]), text_of(&layer["wrong"]));
                    println!("{name}: {} clusters, {leaked} lost, {wrong} faults", text_of(clusters));
                }
            }
            for fault in items(&layer["faultSet"]) {
                println!("  {}", text_of(fault));
            }
        }
        match wrong {
            0 => println!("{what} is whole: {} of data were read", size(number(&found["bytes"]))),
            wrong => {
                println!(
                    "{what} is damaged: {wrong} faults; `hutch volume repair`, or a snapshot or a backup"
                );
            }
        }
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn repair(what: &str, discard: bool, output: Output, at: &Connection) -> anyhow::Result<ExitCode> {
    let client = Client::new(at)?;
    let params = [param("VolumeId", volume(&client, what)?), param("DiscardBroken", discard.to_string())];
    let done = result(&client, &client.own("CreateRepair", &params)?, "repairing")?;
    let layers = items(&done["layerSet"]);
    let good = |layer: &Value| layer.get("done").is_none_or(|done| text_of(done) == "true");
    let whole = layers.iter().all(good);
    if matches!(output, Output::Json | Output::Yaml) {
        let ranges = |of: &Value| {
            let range = |range: &Value| json!({ "offset": number(&range["offset"]), "bytes": number(&range["bytes"]) });
            items(of).iter().map(range).collect::<Vec<_>>()
        };
        let texts = |of: &Value| items(of).iter().map(text_of).map(str::to_owned).collect::<Vec<_>>();
        let layer = |layer: &Value| {
            let count = |name: &str| layer.get(name).map(number);
            json!({ "name": text_of(&layer["name"]), "whole": good(layer), "leaked": count("leaked"), "wrong": count("wrong"),
                    "faults": texts(&layer["faultSet"]), "used-by": texts(&layer["userSet"]),
                    "lost-bytes": count("lostBytes"), "lost": ranges(&layer["lostSet"]),
                    "shared-bytes": count("sharedBytes"), "shared": ranges(&layer["sharedSet"]) })
        };
        record(output, &json!({ "whole": whole, "layers": layers.iter().map(layer).collect::<Vec<_>>() }))?;
    } else {
        layers.iter().for_each(|layer| tell_repaired(layer, good(layer)));
        let needs = |layer: &Value| !good(layer) && items(&layer["userSet"]).is_empty();
        match whole {
            true => println!("{what} is whole"),
            false if !discard && layers.iter().any(needs) => println!(
                "{what} is as it was: what is lost stays lost by a repair; have it from a snapshot or a backup, or repair it \
                 with --discard-broken"
            ),
            false => println!("{what} is damaged still; restore it from a backup"),
        }
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell_repaired(layer: &Value, good: bool) {
    let (name, users) = (text_of(&layer["name"]), items(&layer["userSet"]));
    let (leaked, wrong) = (number(&layer["leaked"]), number(&layer["wrong"]));
    match layer.get("done") {
        None => println!("{name}: raw, without tables"),
        Some(_) if wrong == 0 && leaked == 0 => println!("{name}: whole"),
        Some(_) if !users.is_empty() => {
            let users = users.iter().map(text_of).collect::<Vec<_>>().join(", ");
            println!("{name}: {wrong} faults; left as it is, for it is of {users}, too");
        }
        Some(_) if good => println!("{name}: {wrong} faults repaired, {leaked} clusters freed"),
        Some(_) => println!("{name}: {wrong} faults, {leaked} clusters lost"),
    }
    for fault in items(&layer["faultSet"]) {
        println!("  {}", text_of(fault));
    }
    for (ranges, all, words) in [("lostSet", "lostBytes", "lost"), ("sharedSet", "sharedBytes", "of several")]
    {
        for range in items(&layer[ranges]) {
            println!("  {words}: {} bytes at {}", text_of(&range["bytes"]), text_of(&range["offset"]));
        }
        if number(&layer[all]) > 0 {
            println!("  {words} in all: {}", size(number(&layer[all])));
        }
    }
}

fn import(command: &Command) -> anyhow::Result<ExitCode> {
    let Command::Import { file, format, name, zone, kind, size, at } = command else {
        bail!("it is no import");
    };
    let client = Client::new(at)?;
    let mut params = vec![param("Path", whole(file)?)];
    let format = format.and_then(|format| Some(format.to_possible_value()?.get_name().to_owned()));
    params.extend(format.map(|format| param("Format", format)));
    let task = text_of(&client.own("ImportDisk", &params)?["importTaskId"]).to_owned();
    let mut shown = Shown::percent("importing")?;
    let snapshot = loop {
        let told = client.call("DescribeImportSnapshotTasks", &numbered("ImportTaskId", [&*task]))?;
        let one = items(&told["importSnapshotTaskSet"]).first().cloned().unwrap_or_default();
        let detail = &one["snapshotTaskDetail"];
        match text_of(&detail["status"]) {
            "active" => shown.tell((number(&detail["progress"]), 100)),
            "completed" => break text_of(&detail["snapshotId"]).to_owned(),
            "deleting" => {}
            _ => {
                drop(shown);
                let why = text_of(&detail["statusMessage"]);
                bail!("nothing is imported: {}", why.trim_start_matches("ClientError: "));
            }
        }
        std::thread::sleep(LOOK);
    };
    drop(shown);
    let taken = Taken { client: &client, id: snapshot, ours: true };
    let zone = match zone {
        Some(zone) => zone.clone(),
        None => {
            let zones = client.call("DescribeAvailabilityZones", &[])?;
            let first = items(&zones["availabilityZoneInfo"]).first().map(|zone| text_of(&zone["zoneName"]));
            first.context("the region has no zone")?.to_owned()
        }
    };
    let mut params =
        vec![param("SnapshotId", &taken.id), param("AvailabilityZone", zone), param("VolumeType", kind)];
    params.extend(size.map(|gib| param("Size", gib.to_string())));
    if let Some(name) = name {
        params.extend([
            param("TagSpecification.1.ResourceType", "volume"),
            param("TagSpecification.1.Tag.1.Key", "Name"),
            param("TagSpecification.1.Tag.1.Value", name),
        ]);
    }
    let id = text_of(&client.call("CreateVolume", &params)?["volumeId"]).to_owned();
    loop {
        let told = client.call("DescribeVolumes", &numbered("VolumeId", [&*id]))?;
        match items(&told["volumeSet"]).first().map(|volume| text_of(&volume["status"])) {
            Some("creating") => std::thread::sleep(LOOK),
            Some("available") => break,
            state => bail!("the volume {id} is {}", state.unwrap_or("gone")),
        }
    }
    println!("{id}");
    Ok(ExitCode::SUCCESS)
}
