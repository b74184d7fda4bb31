//! How answers are printed: for people, or for programs.

use anyhow::Result;
use clap::ValueEnum;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde_json::Value;

/// The forms of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Lines of `name value`, or of words with a tab between.
    Text,
    /// A table with a heading.
    Table,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// How a list is printed, and what of it.
#[derive(clap::Args)]
pub struct Form {
    /// How to print.
    #[arg(long, short, value_enum, default_value_t = Output::Table)]
    output: Output,
    /// Print what this JMESPath expression makes of the list, as JSON, YAML or text.
    #[arg(long, value_name = "JMESPATH")]
    query: Option<String>,
}

impl Form {
    /// Whether it is printed so, whole.
    pub fn is(&self, output: Output) -> bool {
        self.output == output && self.query.is_none()
    }

    /// Prints a list: `rows` for people, `records` for programs and expressions.
    pub fn list<const N: usize>(
        &self,
        heading: [&str; N],
        rows: impl Iterator<Item = [String; N]>,
        records: &impl serde::Serialize,
    ) -> Result<()> {
        let Some(query) = &self.query else { return list(self.output, heading, rows, records) };
        let found = jmespath::compile(query)
            .and_then(|query| query.search(jmespath::Variable::from_serializable(records)?));
        let found = serde_json::to_value(&*found.map_err(|e| anyhow::anyhow!("--query: {e}"))?)?;
        if self.output == Output::Text {
            print!("{}", lines(&found));
            return Ok(());
        }
        record(self.output, &found)
    }
}

/// Prints one record for programs.
pub fn record(output: Output, record: &impl serde::Serialize) -> Result<()> {
    match output {
        Output::Yaml => print!("{}", serde_yaml_ng::to_string(record)?),
        _ => println!("{}", serde_json::to_string_pretty(record)?),
    }
    Ok(())
}

/// A line for each member of a list, with tabs between the members of that.
fn lines(value: &Value) -> String {
    let plain = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "None".into(),
        value => value.to_string(),
    };
    let words = |value: &Value| match value {
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join("\t"),
        Value::Object(members) => members.values().map(plain).collect::<Vec<_>>().join("\t"),
        value => plain(value),
    };
    match value {
        Value::Array(items) => items.iter().map(|item| words(item) + "\n").collect(),
        value => words(value) + "\n",
    }
}

/// Prints a list: `rows` for people, `records` as JSON.
pub fn list<const N: usize>(
    output: Output,
    heading: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
    records: &impl serde::Serialize,
) -> Result<()> {
    match output {
        Output::Json | Output::Yaml => record(output, records)?,
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
    fn text_is_a_line_for_each() {
        let value = serde_json::json!([["i-1", 2, null], {"a": "x", "b": true}, "y"]);
        assert_eq!(lines(&value), "i-1\t2\tNone\nx\ttrue\ny\n");
        assert_eq!(lines(&serde_json::json!("one")), "one\n");
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(time(u64::MAX), "unknown");
    }
}
