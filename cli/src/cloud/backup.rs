//! All that hutchd keeps, copied while it serves; and a state made of such a copy.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use hutch_cloud::backup::{self, BackupError, Manifest, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::client::{Client, Connection, text_of};
use super::param;
use crate::output::{Output, record};

/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(200);
/// How often that is said where there is no terminal.
const SAY: Duration = Duration::from_secs(10);

/// Arguments of `hutch backup`.
#[derive(clap::Args)]
pub struct Backup {
    /// A new directory on hutchd's machine, outside of the state.
    #[arg(value_name = "DIR")]
    to: PathBuf,
    /// How to print what was made.
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    output: Output,
    #[command(flatten)]
    at: Connection,
}

/// Arguments of `hutch restore`.
#[derive(clap::Args)]
pub struct Restore {
    /// The backup.
    #[arg(value_name = "BACKUP")]
    from: PathBuf,
    /// The state to make: a directory that is not there, or empty.
    #[arg(long, value_name = "DIR", env = "HUTCH_STATE", default_value = "/var/lib/hutch")]
    state: PathBuf,
    /// Only check that the backup is whole.
    #[arg(long)]
    check: bool,
    /// How to print what was made.
    #[arg(long, short, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What was made, or checked.
#[derive(Serialize)]
struct Made {
    /// Where it is.
    path: PathBuf,
    /// When the backup was made, in RFC 3339.
    created: String,
    /// Its files.
    files: u64,
    /// Their bytes, each file counted once.
    bytes: u64,
    /// The instances of all regions.
    instances: u64,
    /// The volumes of all regions.
    volumes: u64,
    /// The keys of encrypted volumes, wrapped.
    keys: u64,
}

impl Made {
    fn of(manifest: &Manifest, path: PathBuf) -> Made {
        let sum =
            |of: fn(&backup::RegionEntry) -> usize| manifest.regions.iter().map(of).sum::<usize>() as u64;
        Made {
            path,
            created: manifest.created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            files: manifest.files.len() as u64,
            bytes: manifest.bytes(),
            instances: sum(|region| region.instances),
            volumes: sum(|region| region.volumes),
            keys: manifest.keys() as u64,
        }
    }

    fn print(&self, output: Output, what: &str) -> anyhow::Result<()> {
        if matches!(output, Output::Json | Output::Yaml) {
            return record(output, self);
        }
        let Made { path, files, bytes, instances, volumes, .. } = self;
        let (path, mib) = (path.display(), bytes.div_ceil(1 << 20));
        println!("{path} {what}: {instances} instances, {volumes} volumes, {files} files, {mib} MiB");
        Ok(())
    }
}

/// Shows how far it is: as a bar on a terminal, else a line from time to time.
pub struct Shown {
    what: &'static str,
    bar: Option<ProgressBar>,
    /// It is told bytes, not hundredths.
    bytes: bool,
    said: Instant,
}

impl Shown {
    /// It is told bytes.
    pub fn new(what: &'static str) -> anyhow::Result<Shown> {
        Shown::styled(what, true, "{msg} {bytes:>10} of {total_bytes} {wide_bar} {eta}")
    }

    /// It is told hundredths.
    pub fn percent(what: &'static str) -> anyhow::Result<Shown> {
        Shown::styled(what, false, "{msg} {percent:>3} % {wide_bar} {eta}")
    }

    fn styled(what: &'static str, bytes: bool, style: &str) -> anyhow::Result<Shown> {
        let style = ProgressStyle::with_template(style)?;
        let terminal = std::io::stderr().is_terminal();
        let bar = terminal.then(|| ProgressBar::new(0).with_style(style).with_message(what));
        Ok(Shown { what, bar, bytes, said: Instant::now() })
    }

    /// How much is done, of how much.
    pub fn tell(&mut self, (done, total): (u64, u64)) {
        match &self.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            None if self.said.elapsed() >= SAY => {
                self.said = Instant::now();
                match self.bytes {
                    true => {
                        eprintln!("hutch: {}: {} of {} MiB", self.what, done >> 20, total.div_ceil(1 << 20))
                    }
                    false => eprintln!("hutch: {}: {done} %", self.what),
                }
            }
            None => {}
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `hutch backup`.
pub fn backup(args: &Backup) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let to = std::path::absolute(&args.to).context("the directory has no whole path")?;
    let to = to.to_str().context("the directory's name is not UTF-8")?;
    let begun = client.own("CreateBackup", &[param("Path", to)])?;
    let id = text_of(&begun["backupId"]).to_owned();
    let mut shown = Shown::new("copying")?;
    let answer = loop {
        let answer = client.own("DescribeBackup", &[param("BackupId", &id)])?;
        let number = |name: &str| text_of(&answer[name]).parse().unwrap_or(0);
        match text_of(&answer["state"]) {
            "running" => shown.tell((number("doneBytes"), number("totalBytes"))),
            "failed" => {
                drop(shown);
                bail!("no backup was made: {}", text_of(&answer["message"]));
            }
            _ => break answer,
        }
        std::thread::sleep(LOOK);
    };
    drop(shown);
    let number = |name: &str| text_of(&answer[name]).parse().unwrap_or(0);
    let made = Made {
        path: text_of(&answer["path"]).into(),
        created: text_of(&answer["created"]).to_owned(),
        files: number("files"),
        bytes: number("bytes"),
        instances: number("instances"),
        volumes: number("volumes"),
        keys: number("keys"),
    };
    made.print(args.output, "is a backup")?;
    if made.keys > 0 && args.output == Output::Text {
        println!(
            "{} encrypted volumes are in it, with their keys wrapped; what wraps these is not: keep hutchd's STATE/keys \
             (or what its --key-command asks) apart from it, and safe",
            made.keys
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `hutch restore`.
pub fn restore(args: &Restore) -> anyhow::Result<ExitCode> {
    let progress = Arc::new(Progress::default());
    let work = {
        let (progress, from, state, check) =
            (progress.clone(), args.from.clone(), args.state.clone(), args.check);
        move || -> Result<Manifest, BackupError> {
            match check {
                true => backup::check(&from, &progress),
                false => backup::restore(&from, &state, &progress),
            }
        }
    };
    let mut shown = Shown::new(if args.check { "checking" } else { "checking and copying" })?;
    let worker = std::thread::spawn(work);
    while !worker.is_finished() {
        shown.tell(progress.figures());
        std::thread::sleep(LOOK / 10);
    }
    drop(shown);
    let done = worker.join().map_err(|_| anyhow::anyhow!("it ended badly"))?;
    let (path, what) = match args.check {
        true => (args.from.clone(), "is whole"),
        false => (args.state.clone(), "is restored"),
    };
    let made = Made::of(&done?, path);
    made.print(args.output, what)?;
    if !args.check && args.output == Output::Text {
        let state = args.state.display();
        println!("start it: hutchd --state {state} (with --resume, instances that ran are started)");
        if made.keys > 0 {
            println!(
                "put the keys that were kept apart into {state}/keys before: encrypted volumes need them"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
