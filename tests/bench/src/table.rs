//! The samples of a run, and their medians as Markdown and JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

/// The one that is compared with the others.
pub const HUTCH: &str = "hutch";

/// Which way a number is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Less is better.
    Lower,
    /// More is better.
    Higher,
}

/// All samples, in the order in which their metrics first came.
#[derive(Default)]
pub struct Table(Vec<Metric>);

struct Metric {
    name: String,
    unit: &'static str,
    better: Better,
    samples: BTreeMap<String, Vec<f64>>,
}

/// One metric's medians.
#[derive(Serialize)]
struct Row<'a> {
    metric: &'a str,
    unit: &'a str,
    better: Better,
    hutch: f64,
    peers: BTreeMap<&'a str, f64>,
}

impl Table {
    /// Takes one sample of `who`.
    pub fn add(&mut self, name: &str, unit: &'static str, better: Better, who: &str, value: f64) {
        let at = self.0.iter().position(|m| m.name == name).unwrap_or_else(|| {
            self.0.push(Metric { name: name.into(), unit, better, samples: BTreeMap::new() });
            self.0.len() - 1
        });
        if let Some(metric) = self.0.get_mut(at) {
            metric.samples.entry(who.into()).or_default().push(value);
        }
    }

    /// The metrics of which hutch has a number.
    fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        self.0.iter().filter_map(|m| {
            let hutch = median(m.samples.get(HUTCH)?);
            let peers = m.samples.iter().filter(|(who, _)| *who != HUTCH);
            let peers = peers.map(|(who, samples)| (who.as_str(), median(samples))).collect();
            Some(Row { metric: &m.name, unit: m.unit, better: m.better, hutch, peers })
        })
    }

    /// A table of medians; each peer's number comes with how many times better hutch's is.
    pub fn markdown(&self) -> String {
        let mut text =
            String::from("| metric | unit | better | hutch | peers (hutch is so many times better) |\n");
        text.push_str("|---|---|---|---:|---|\n");
        for row in self.rows() {
            let peers = row.peers.iter().map(|(who, peer)| {
                let (good, bad) =
                    if row.better == Better::Lower { (*peer, row.hutch) } else { (row.hutch, *peer) };
                let ratio = if bad == 0.0 { String::new() } else { format!(" ({:.2}×)", good / bad) };
                format!("{who} {}{ratio}", number(*peer))
            });
            let peers = peers.collect::<Vec<_>>().join(", ");
            let better = if row.better == Better::Lower { "lower" } else { "higher" };
            // A String takes all that is written to it.
            let _ = writeln!(
                text,
                "| {} | {} | {better} | {} | {peers} |",
                row.metric,
                row.unit,
                number(row.hutch)
            );
        }
        text
    }

    /// Writes the medians as a list of JSON objects.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let rows = self.rows().collect::<Vec<_>>();
        let text = serde_json::to_string_pretty(&rows)?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Four digits are more than any of this is worth.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// The median; 0 of nothing.
fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    match sorted.len() {
        n if n > 0 && n.is_multiple_of(2) => (upper + sorted.get(n / 2 - 1).copied().unwrap_or(upper)) / 2.0,
        _ => upper,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_samples() {
        assert_eq!(median(&[9.0, 1.0, 5.0]), 5.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), 3.0);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn a_ratio_above_one_says_that_hutch_is_better_either_way() {
        let mut table = Table::default();
        for (name, better) in [("exits", Better::Lower), ("speed", Better::Higher)] {
            table.add(name, "n", better, HUTCH, if better == Better::Lower { 10.0 } else { 40.0 });
            table.add(name, "n", better, "qemu", 20.0);
        }
        table.add("only a peer has it", "n", Better::Lower, "qemu", 1.0);
        let text = table.markdown();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert_eq!(text.matches("(2.00×)").count(), 2, "{text}");
    }

    #[test]
    fn the_json_has_the_shape_that_is_promised() {
        let mut table = Table::default();
        table.add("exits", "exits", Better::Lower, HUTCH, 10.0);
        table.add("exits", "exits", Better::Lower, "qemu", 20.0);
        let rows = serde_json::to_value(table.rows().collect::<Vec<_>>()).unwrap();
        let expected = serde_json::json!([
            {"metric": "exits", "unit": "exits", "better": "lower", "hutch": 10.0, "peers": {"qemu": 20.0}}
        ]);
        assert_eq!(rows, expected);
    }
}
