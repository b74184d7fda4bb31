//! `hutch control`: one request to a running machine.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::ValueEnum;
use serde_json::{Value, json};

/// A machine that does not answer for so long does not answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `hutch control`.
#[derive(clap::Args)]
pub struct Args {
    /// The socket that `hutch boot --control` made.
    socket: PathBuf,
    /// What to ask.
    request: Request,
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
    let what = || format!("no machine answers at {}", args.socket.display());
    let mut stream = UnixStream::connect(&args.socket).with_context(what)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let mut line = json!({ "command": name }).to_string();
    line.push('\n');
    stream.write_all(line.as_bytes()).with_context(what)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).with_context(what)?;
    let mut answer: Value = serde_json::from_str(&answer).with_context(what)?;
    if answer["ok"] != Value::Bool(true) {
        bail!("{}", answer["error"].as_str().unwrap_or("the machine refused"));
    }
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
