//! What instances use: processor, memory, disks, network, live.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::client::{Client, Connection, items, text_of};
use super::{Instance, instances};
use crate::output::{Form, Output};

/// What can be said of `hutch top`.
#[derive(clap::Args)]
pub struct Args {
    /// Terminated ones, too.
    #[arg(long, short)]
    all: bool,
    /// Print once, after one interval, and end. So it is also where the output is no terminal or no table.
    #[arg(long)]
    once: bool,
    /// Seconds between two looks: rates are of this time.
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = interval)]
    interval: Duration,
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    at: Connection,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is a number of seconds")?;
    match (0.1..=3600.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err("it is 0.1 to 3600 seconds".into()),
    }
}

/// What hutchd has counted of one instance's run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counted {
    run: u64,
    at: u64,
    cpu: u64,
    memory: u64,
    moved: [u64; 4],
}

impl Counted {
    fn read(value: &Value) -> Counted {
        let number = |name: &str| text_of(&value[name]).parse().unwrap_or(0);
        Counted {
            run: number("run"),
            at: number("atMicros"),
            cpu: number("cpuMicros"),
            memory: number("memoryBytes"),
            moved: ["diskReadBytes", "diskWrittenBytes", "netReceivedBytes", "netSentBytes"].map(number),
        }
    }
}

/// An instance and what it uses; what is not known, as of one that does not run, is not there.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    id: String,
    name: String,
    state: String,
    #[serde(rename = "type")]
    kind: String,
    /// In percent of one processor.
    cpu: Option<f64>,
    /// Bytes of the host's memory.
    memory: Option<u64>,
    /// Bytes a second.
    disk_read: Option<u64>,
    disk_written: Option<u64>,
    net_received: Option<u64>,
    net_sent: Option<u64>,
}

const HEADING: [&str; 9] =
    ["ID", "NAME", "STATE", "CPU %", "MEMORY", "READ/s", "WRITE/s", "NET IN/s", "NET OUT/s"];

impl Row {
    /// What an instance does, by two looks; the first may have been before it ran.
    fn new(instance: Instance, before: Option<&Counted>, now: Option<&Counted>) -> Row {
        // Another run, or another daemon, counts from anew.
        let since = now.zip(before).filter(|(now, before)| now.run == before.run && now.at > before.at);
        let rate = |of: &dyn Fn(&Counted) -> u64| {
            let (now, before) = since?;
            let micros = u128::from(now.at - before.at);
            // After a reboot of the guest its process is a new one.
            let moved = of(now).checked_sub(of(before))?;
            u64::try_from(u128::from(moved) * 1_000_000 / micros).ok()
        };
        Row {
            id: instance.id,
            name: instance.name,
            state: instance.state,
            kind: instance.kind,
            // Microseconds a second, in percent with one digit.
            cpu: rate(&|c| c.cpu).map(|used| (used as f64 / 1000.0).round() / 10.0),
            memory: now.map(|now| now.memory),
            disk_read: rate(&|c| c.moved[0]),
            disk_written: rate(&|c| c.moved[1]),
            net_received: rate(&|c| c.moved[2]),
            net_sent: rate(&|c| c.moved[3]),
        }
    }

    fn words(&self) -> [String; 9] {
        let bytes = |value: Option<u64>| value.map_or_else(|| "-".into(), human);
        let name = if self.name.is_empty() { "-".into() } else { self.name.clone() };
        [
            self.id.clone(),
            name,
            self.state.clone(),
            self.cpu.map_or_else(|| "-".into(), |cpu| format!("{cpu:.1}")),
            bytes(self.memory),
            bytes(self.disk_read),
            bytes(self.disk_written),
            bytes(self.net_received),
            bytes(self.net_sent),
        ]
    }
}

/// Bytes as people read them.
pub fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB"].into_iter().peekable();
    while value >= 1024.0 && units.len() > 1 {
        value /= 1024.0;
        units.next();
    }
    let unit = units.next().unwrap_or_default();
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

type Look = (Vec<Instance>, BTreeMap<String, Counted>);

fn look(client: &Client, all: bool) -> anyhow::Result<Look> {
    let mut listed = instances(client, &[])?;
    listed.retain(|instance| all || instance.state != "terminated");
    let answer = client.own("GetFigures", &[])?;
    let counted = items(&answer["figureSet"]).iter();
    let counted = counted.map(|one| (text_of(&one["instanceId"]).to_owned(), Counted::read(one)));
    Ok((listed, counted.collect()))
}

fn rows(before: &BTreeMap<String, Counted>, (listed, counted): &Look) -> Vec<Row> {
    let row = |i: &Instance| Row::new(i.clone(), before.get(&i.id), counted.get(&i.id));
    let mut rows: Vec<_> = listed.iter().map(row).collect();
    rows.sort_by(|a, b| {
        b.cpu.unwrap_or(-1.0).total_cmp(&a.cpu.unwrap_or(-1.0)).then_with(|| a.id.cmp(&b.id))
    });
    rows
}

/// `hutch top`.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let live = !args.once && args.form.is(Output::Table) && std::io::stdout().is_terminal();
    let mut before = look(&client, args.all)?.1;
    // There is nothing to wait for where nobody counts.
    let mut wait = live || !before.is_empty();
    loop {
        if wait {
            std::thread::sleep(args.interval);
        }
        let now = look(&client, args.all)?;
        let rows = rows(&before, &now);
        if live {
            // Home, and what was below is gone.
            print!("\x1b[H\x1b[2J");
        }
        args.form.list(HEADING, rows.iter().map(Row::words), &rows)?;
        std::io::stdout().flush()?;
        if !live {
            return Ok(ExitCode::SUCCESS);
        }
        (before, wait) = (now.1, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance() -> Instance {
        let value = serde_json::json!({ "instanceId": "i-1", "instanceState": { "name": "running" } });
        Instance::from(&value)
    }

    const FIRST: Counted = Counted { run: 1, at: 1_000_000, cpu: 500, memory: 7, moved: [0, 10, 20, 30] };

    #[test]
    fn rates_are_differences_over_differences() {
        let now = Counted {
            at: 3_000_000,
            cpu: 500 + 3_000_000,
            memory: 9,
            moved: [4096, 10, 20 + 2_000_000, 31],
            ..FIRST
        };
        let row = Row::new(instance(), Some(&FIRST), Some(&now));
        assert_eq!((row.cpu, row.memory), (Some(150.0), Some(9)));
        assert_eq!((row.disk_read, row.disk_written), (Some(2048), Some(0)));
        assert_eq!((row.net_received, row.net_sent), (Some(1_000_000), Some(0)));
        assert_eq!(
            row.words()[3..],
            ["150.0", "9 B", "2.0 KiB", "0 B", "976.6 KiB", "0 B"].map(String::from)
        );
    }

    #[test]
    fn what_is_not_known_is_not_told() {
        let anew = [
            Counted { run: 2, at: 3_000_000, ..FIRST },
            Counted { at: 3_000_000, cpu: 0, moved: [0; 4], ..FIRST },
            Counted { at: 5, ..FIRST },
        ];
        for now in anew {
            let row = Row::new(instance(), Some(&FIRST), Some(&now));
            assert_eq!((row.cpu, row.net_sent, row.memory), (None, None, Some(7)), "{now:?}");
        }
        let row = Row::new(instance(), None, Some(&FIRST));
        assert_eq!((row.cpu, row.memory), (None, Some(7)), "the first look");
        assert_eq!(Row::new(instance(), Some(&FIRST), None).words()[3..], ["-"; 6].map(String::from));
    }

    #[test]
    fn bytes_are_readable() {
        assert_eq!(
            [0, 1023, 1024, 1 << 30].map(human),
            ["0 B", "1023 B", "1.0 KiB", "1.0 GiB"].map(String::from)
        );
        assert_eq!(human(u64::MAX), "16777216.0 TiB");
    }
}
