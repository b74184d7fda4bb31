//! `hutch control`: one request to a running machine.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::ValueEnum;
use hutch_vmm::launch::ask;
use serde_json::{Value, json};

use crate::attach;

/// A machine that does not answer for so long does not answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `hutch control`.
#[derive(clap::Args)]
pub struct Args {
    /// The socket that `hutch boot --control` made.
    socket: PathBuf,
    /// What to ask.
    request: Request,
    /// With `console`: stay, show what comes and send what is typed, over reboots of the guest. On a terminal, Ctrl-]
    /// detaches.
    #[arg(long)]
    attach: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Request {
    /// Its state and counters, as JSON.
    Status,
    /// Press the power button: the guest decides.
    PowerButton,
    /// Hold it where it is.
    Pause,
    /// Let it go on.
    Resume,
    /// End it at once.
    Kill,
    /// What its console's ring holds.
    Console,
}

/// Asks and prints.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let name = args.request.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
    if args.attach {
        if !matches!(args.request, Request::Console) {
            bail!("--attach goes with console, not with {name}");
        }
        let (reader, stream) = console(&args.socket)?;
        attach::run(reader, stream)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (_, _, mut answer) = ask(&args.socket, &json!({ "command": name }), LIMIT)?;
    if let Some(fields) = answer.as_object_mut() {
        fields.remove("ok");
        match fields.get("text").and_then(Value::as_str) {
            Some(text) => print!("{text}"),
            None if fields.is_empty() => {}
            None => println!("{}", serde_json::to_string_pretty(&answer)?),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Both ends of a machine's console, from now on.
pub fn console(socket: &Path) -> anyhow::Result<(BufReader<UnixStream>, UnixStream)> {
    let (reader, stream, _) = ask(socket, &json!({ "command": "console", "follow": true }), LIMIT)?;
    // A guest may be silent for as long as it likes.
    stream.set_read_timeout(None)?;
    Ok((reader, stream))
}
