//! What room volumes and snapshots take.

use std::process::ExitCode;

use serde::Serialize;

use super::client::{Client, Connection, items, text_of};
use super::top::human;
use crate::output::{Form, Output};

/// What can be said of `hutch usage`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    form: Form,
    #[command(flatten)]
    at: Connection,
}

/// A volume or a snapshot and its room, in bytes.
#[derive(Serialize)]
struct Row {
    id: String,
    name: String,
    size_gib: u64,
    /// What would be free without it.
    alone: u64,
    /// What others have too.
    shared: u64,
    layers: u64,
}

const HEADING: [&str; 6] = ["ID", "NAME", "SIZE", "ALONE", "SHARED", "LAYERS"];

/// `hutch usage`.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let client = Client::new(&args.at)?;
    let answer = client.own("GetUsage", &[])?;
    let number = |value: &serde_json::Value| text_of(value).parse().unwrap_or(0);
    let row = |one: &serde_json::Value| Row {
        id: text_of(&one["resourceId"]).to_owned(),
        name: text_of(&one["name"]).to_owned(),
        size_gib: number(&one["sizeGiB"]),
        alone: number(&one["aloneBytes"]),
        shared: number(&one["sharedBytes"]),
        layers: number(&one["layers"]),
    };
    let mut rows: Vec<Row> = items(&answer["roomSet"]).iter().map(row).collect();
    rows.sort_by(|a, b| b.alone.cmp(&a.alone).then_with(|| a.id.cmp(&b.id)));
    let words = |row: &Row| {
        let name = if row.name.is_empty() { "-".to_owned() } else { row.name.clone() };
        let size = format!("{} GiB", row.size_gib);
        [row.id.clone(), name, size, human(row.alone), human(row.shared), row.layers.to_string()]
    };
    args.form.list(HEADING, rows.iter().map(words), &rows)?;
    if args.form.is(Output::Table) {
        let [used, free] = [&answer["usedBytes"], &answer["freeBytes"]].map(number);
        println!("{} in use, {} free", human(used), human(free));
    }
    Ok(ExitCode::SUCCESS)
}
