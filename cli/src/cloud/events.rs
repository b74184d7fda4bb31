//! What changes: the states of instances, volumes, snapshots and images, as they come.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::client::{Client, Connection, items, text_of};
use super::{Instance, instances};

/// How often hutchd is asked; what comes and goes between two looks is not told.
const LOOK: Duration = Duration::from_millis(500);

/// What can be said of events.
#[derive(clap::Args)]
pub struct Args {
    /// End after so many seconds; else with Ctrl-C.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// End after so many events.
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// A line of JSON for each.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: Connection,
}

/// A change of a state.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Event {
    /// When it was seen, in RFC 3339.
    time: String,
    /// The id of what changed.
    id: String,
    /// Its name, if it has one.
    name: String,
    /// Its state before; empty: it was not there.
    from: String,
    /// Its state since; empty: it is gone.
    to: String,
    /// Why, where there is a reason.
    reason: String,
}

/// A thing as it was seen: name, state, reason.
type Seen = BTreeMap<String, (String, String, String)>;

/// `hutch events`.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let begun = Instant::now();
    let over = |limit: u64| begun.elapsed() >= Duration::from_secs(limit);
    let mut before = look(&client)?;
    eprintln!("hutch: {} things are watched", before.len());
    let mut told = 0;
    while !args.timeout.is_some_and(over) {
        std::thread::sleep(LOOK);
        let now = look(&client)?;
        let time = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string();
        for event in changes(&before, &now, &time) {
            let line = match args.json {
                true => serde_json::to_string(&event)?,
                false => words(&event),
            };
            let mut out = std::io::stdout();
            // Who reads has enough.
            if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                return Ok(ExitCode::SUCCESS);
            }
            told += 1;
            if args.count.is_some_and(|most| told >= most) {
                return Ok(ExitCode::SUCCESS);
            }
        }
        before = now;
    }
    Ok(ExitCode::SUCCESS)
}

fn words(event: &Event) -> String {
    let or = |text: &str, other: &str| if text.is_empty() { other.to_owned() } else { text.to_owned() };
    let (name, from, to) = (or(&event.name, "-"), or(&event.from, "new"), or(&event.to, "gone"));
    let reason = if event.reason.is_empty() { String::new() } else { format!("\t{}", event.reason) };
    format!("{}\t{}\t{name}\t{from} > {to}{reason}", event.time, event.id)
}

/// Everything that has a state.
fn look(client: &Client) -> anyhow::Result<Seen> {
    let instance = |i: Instance| (i.id, (i.name, i.state, i.reason));
    let mut seen: Seen = instances(client, &[])?.into_iter().map(instance).collect();
    for (action, set, id, state, name, reason) in [
        ("DescribeVolumes", "volumeSet", "volumeId", "status", "", ""),
        ("DescribeSnapshots", "snapshotSet", "snapshotId", "status", "", "statusMessage"),
        ("DescribeImages", "imagesSet", "imageId", "imageState", "name", ""),
    ] {
        for thing in client.all(action, &[], set)? {
            let tag = |tag: &&Value| text_of(&tag["key"]) == "Name";
            let tagged = items(&thing["tagSet"]).iter().find(tag).map(|tag| text_of(&tag["value"]));
            let name = tagged.unwrap_or_else(|| text_of(&thing[name])).to_owned();
            let told = (name, text_of(&thing[state]).to_owned(), text_of(&thing[reason]).to_owned());
            seen.insert(text_of(&thing[id]).to_owned(), told);
        }
    }
    Ok(seen)
}

/// What is in another state than before.
fn changes(before: &Seen, now: &Seen, time: &str) -> Vec<Event> {
    let state = |seen: &Seen, id: &str| seen.get(id).map(|(_, state, _)| state.clone()).unwrap_or_default();
    let ids = before.keys().filter(|id| !now.contains_key(*id)).chain(now.keys());
    let changed = ids.filter(|id| state(before, id) != state(now, id));
    let event = |id: &String| {
        let (name, _, reason) = now.get(id).or(before.get(id)).cloned().unwrap_or_default();
        let reason = if now.contains_key(id) { reason } else { String::new() };
        Event { time: time.into(), id: id.clone(), name, from: state(before, id), to: state(now, id), reason }
    };
    changed.map(event).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_went_and_changed_is_told() {
        let seen = |all: &[(&str, &str)]| -> Seen {
            let one = |(id, state): &(&str, &str)| {
                ((*id).to_owned(), ("web".to_owned(), (*state).to_owned(), "because".to_owned()))
            };
            all.iter().map(one).collect()
        };
        let before = seen(&[("i-1", "running"), ("i-2", "running"), ("vol-1", "in-use")]);
        let now = seen(&[("i-1", "stopping"), ("i-2", "running"), ("i-3", "pending")]);
        let told = changes(&before, &now, "now");
        let lines: Vec<_> = told.iter().map(words).collect();
        assert_eq!(
            lines,
            [
                "now\tvol-1\tweb\tin-use > gone",
                "now\ti-1\tweb\trunning > stopping\tbecause",
                "now\ti-3\tweb\tnew > pending\tbecause",
            ]
        );
        assert_eq!(changes(&now, &now, "now"), []);
    }
}
