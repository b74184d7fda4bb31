//! Ways into an instance, and into the cloud for other programs: console, cp, env, aws, and where `hutch ssh` goes.

use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use super::client::{Client, Connection};
use super::find_one;
use crate::{attach, control, ssh};

/// Arguments of `hutch console`.
#[derive(clap::Args)]
pub struct Console {
    /// Its id or name.
    instance: String,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch cp`.
#[derive(clap::Args)]
pub struct Cp {
    /// FILE, or INSTANCE:FILE.
    #[arg(required = true, num_args = 2.., value_name = "FILE|INSTANCE:FILE")]
    files: Vec<String>,
    /// The user.
    #[arg(long, short = 'l', default_value = "debian")]
    user: String,
    /// A private key instead of hutch's own.
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch env`.
#[derive(clap::Args)]
pub struct Env {
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch aws`.
#[derive(clap::Args)]
pub struct Aws {
    /// What the aws CLI is told.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

/// The address of an instance, by id, name or address.
pub fn address(at: &Connection, name: &str) -> anyhow::Result<Ipv4Addr> {
    if let Ok(address) = name.parse() {
        return Ok(address);
    }
    let instance = find_one(&Client::new(at)?, name)?;
    if instance.state != "running" {
        bail!("{} is {}; start it (hutch start {name})", instance.id, instance.state);
    }
    instance.ip.parse().with_context(|| format!("{} has no address", instance.id))
}

/// `hutch console`: a terminal on the console of an instance of this machine.
pub fn console(args: &Console) -> anyhow::Result<ExitCode> {
    let instance = find_one(&Client::new(&args.at)?, &args.instance)?;
    let machines = args.at.state.join(&args.at.region).join("host/machines");
    let socket = machines.join(&instance.id).join("control.sock");
    let (reader, stream) = control::console(&socket).with_context(|| {
        format!("{} is {}; its console is at {}, for root", instance.id, instance.state, socket.display())
    })?;
    attach::run(reader, stream)?;
    Ok(ExitCode::SUCCESS)
}

/// `hutch cp`: becomes scp.
pub fn cp(args: &Cp) -> anyhow::Result<ExitCode> {
    let place = |file: &String| match file.split_once(':') {
        Some((name, path)) if !name.contains('/') => {
            Ok(format!("{}@{}:{path}", args.user, address(&args.at, name)?))
        }
        _ => Ok(file.clone()),
    };
    let files = args.files.iter().map(place).collect::<anyhow::Result<Vec<_>>>()?;
    let mut scp = Command::new("scp");
    ssh::options(&mut scp, &args.identity.clone().map_or_else(ssh::own_key, Ok)?, "ERROR");
    Err(scp.args(files).exec()).context("cannot run scp; install the package openssh-client")
}

/// What other programs need to know.
fn variables(at: &Connection) -> anyhow::Result<[(&'static str, String); 4]> {
    let key = at.key()?;
    Ok([
        ("AWS_ENDPOINT_URL", at.endpoint.clone()),
        ("AWS_DEFAULT_REGION", at.region.clone()),
        ("AWS_ACCESS_KEY_ID", key.id),
        ("AWS_SECRET_ACCESS_KEY", key.secret),
    ])
}

/// `hutch env`: for `eval "$(hutch env)"`.
pub fn env(args: &Env) -> anyhow::Result<ExitCode> {
    for (name, value) in variables(&args.at)? {
        println!("export {name}='{}'", value.replace('\'', r"'\''"));
    }
    Ok(ExitCode::SUCCESS)
}

/// `hutch aws`: becomes the aws CLI.
pub fn aws(args: &Aws) -> anyhow::Result<ExitCode> {
    // Every option is the aws CLI's, so what concerns us comes by the environment only.
    #[derive(clap::Parser)]
    struct Ours {
        #[command(flatten)]
        at: Connection,
    }
    let at = <Ours as clap::Parser>::parse_from(["hutch"]).at;
    let mut aws = Command::new("aws");
    // Older ones know the endpoint as an argument only.
    aws.envs(variables(&at)?).args(["--endpoint-url", &at.endpoint]).args(&args.arguments);
    Err(aws.exec()).context("cannot run aws; install the package awscli")
}
