//! `hutch control`: one request to a running machine.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
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
    let (_, _, mut answer) = ask(&args.socket, &json!({ "command": name }))?;
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
    let (reader, stream, _) = ask(socket, &json!({ "command": "console", "follow": true }))?;
    // A guest may be silent for as long as it likes.
    stream.set_read_timeout(None)?;
    Ok((reader, stream))
}

/// Sends a request and waits for the answer, which is no refusal.
fn ask(socket: &Path, request: &Value) -> anyhow::Result<(BufReader<UnixStream>, UnixStream, Value)> {
    let what = || format!("no machine answers at {}", socket.display());
    let mut stream = UnixStream::connect(socket).with_context(what)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let sent = stream.write_all(format!("{request}\n").as_bytes());
    let mut answer = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    // A machine with too many clients says so and hangs up before it has read anything.
    if reader.read_line(&mut answer).with_context(what)? == 0 {
        sent.with_context(what)?;
    }
    let answer: Value = serde_json::from_str(&answer).with_context(what)?;
    if answer["ok"] != Value::Bool(true) {
        bail!("{}", answer["error"].as_str().unwrap_or("the machine refused"));
    }
    Ok((reader, stream, answer))
}
