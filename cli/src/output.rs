//! How answers are printed: for people, or for programs.

use anyhow::Result;
use clap::ValueEnum;
use comfy_table::Table;
use comfy_table::presets::NOTHING;

/// The forms of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Lines of `name value`, or of words with a tab between.
    Text,
    /// A table with a heading.
    Table,
    /// JSON.
    Json,
}

/// Prints a list: `rows` for people, `records` as JSON.
pub fn list<const N: usize>(
    output: Output,
    heading: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
    records: &impl serde::Serialize,
) -> Result<()> {
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(records)?),
        Output::Text => rows.for_each(|row| println!("{}", row.join("\t"))),
        Output::Table => {
            let mut table = Table::new();
            table.load_style(NOTHING).set_header(heading).add_rows(rows);
            println!("{}", table.trim_fmt());
        }
    }
    Ok(())
}

/// A time in seconds since 1970, as UTC (RFC 3339).
pub fn time(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| "unknown".into(), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(u64::MAX), "unknown");
    }
}
