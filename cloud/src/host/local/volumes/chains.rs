//! Which layers there are, and who needs them: nobody but records says so.
//!
//! ```text
//!   vol-1   vol-1.3 ─► vol-1.2 ─► vol-1.1 ─► ami-7.raw
//!   snap-1             vol-1.2 ─► vol-1.1 ─► ami-7.raw
//!   vol-2   vol-2.1 ─────────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};

/// A chain of layers by name, the top one first.
pub(super) type Chain = Vec<String>;

/// The chains of all volumes and snapshots.
#[derive(Debug, Default)]
pub(super) struct Chains {
    pub(super) volumes: BTreeMap<String, Chain>,
    pub(super) snapshots: BTreeMap<String, Chain>,
    /// Volumes whose machine may still write to the second layer.
    pub(super) cut: BTreeSet<String>,
}

/// Two layers that can become one: the upper and the lower one.
pub(super) type Pair = (String, String);

impl Chains {
    pub(super) fn all(&self) -> impl Iterator<Item = &Chain> {
        self.volumes.values().chain(self.snapshots.values())
    }

    /// Which of these layers no chain has.
    pub(super) fn unused<'a>(&self, of: impl IntoIterator<Item = &'a String>) -> Vec<&'a String> {
        let used: BTreeSet<&String> = self.all().flatten().collect();
        of.into_iter().filter(|layer| !used.contains(layer)).collect()
    }

    /// Layers that somebody reads from on the top, with how many different ones lie on each of the others.
    fn needed(&self) -> (BTreeSet<&String>, BTreeMap<&String, BTreeSet<&String>>) {
        let heads = self.snapshots.values().filter_map(|chain| chain.first()).collect();
        let mut above = BTreeMap::<_, BTreeSet<_>>::new();
        for pair in self.all().flat_map(|chain| chain.windows(2)) {
            if let [upper, lower] = pair {
                above.entry(lower).or_default().insert(upper);
            }
        }
        (heads, above)
    }

    /// Sealed layers that only one other sealed layer needs.
    pub(super) fn pairs(&self) -> Vec<Pair> {
        let (heads, above) = self.needed();
        let tops: BTreeSet<&String> = self.volumes.values().filter_map(|chain| chain.first()).collect();
        let second = |volume: &String| self.volumes.get(volume).and_then(|chain| chain.get(1));
        let unsealed: BTreeSet<&String> = self.cut.iter().filter_map(second).collect();
        let mut pairs = Vec::new();
        for (lower, uppers) in above {
            let mut uppers = uppers.into_iter();
            let (Some(upper), None) = (uppers.next(), uppers.next()) else { continue };
            let sealed =
                |layer: &String| is_volume(layer) && !tops.contains(layer) && !unsealed.contains(layer);
            if sealed(upper) && sealed(lower) && !heads.contains(lower) {
                pairs.push((upper.clone(), lower.clone()));
            }
        }
        pairs
    }

    /// The top layer of a volume and the one beneath, where nobody else needs that.
    pub(super) fn fold(&self, volume: &str) -> Option<Pair> {
        let [top, lower, ..] = self.volumes.get(volume)?.as_slice() else { return None };
        let (heads, above) = self.needed();
        let alone = above.get(lower).is_some_and(|uppers| uppers.len() == 1);
        let possible = alone && is_volume(lower) && !heads.contains(lower) && !self.cut.contains(volume);
        possible.then(|| (top.clone(), lower.clone()))
    }

    /// The volumes whose second layer is this one.
    pub(super) fn lying_on(&self, layer: &str) -> Vec<String> {
        let on = |chain: &Chain| chain.get(1).is_some_and(|second| second == layer);
        self.volumes.iter().filter(|(_, chain)| on(chain)).map(|(volume, _)| volume.clone()).collect()
    }
}

/// A chain in which `pair` became `one` of the two; `None` where it has not got them.
pub(super) fn merged(chain: &Chain, pair: &Pair, one: &str) -> Option<Chain> {
    let at = chain.windows(2).position(|two| two == [pair.0.clone(), pair.1.clone()])?;
    let mut chain = chain.clone();
    chain.splice(at..at + 2, [one.to_owned()]);
    Some(chain)
}

/// Whether a layer is a volume's file; else it is raw.
pub(super) fn is_volume(layer: &str) -> bool {
    layer.ends_with(".qcow2")
}

/// The name of the layer after those of a volume's chain.
pub(super) fn next(volume: &str, chain: &Chain) -> String {
    let number = |layer: &String| -> Option<u64> {
        layer.strip_prefix(volume)?.strip_prefix('.')?.strip_suffix(".qcow2")?.parse().ok()
    };
    let last = chain.iter().filter_map(number).max().unwrap_or(0);
    format!("{volume}.{}.qcow2", last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chains(volumes: &[(&str, &[&str])], snapshots: &[(&str, &[&str])]) -> Chains {
        let of = |all: &[(&str, &[&str])]| {
            let own = |layers: &[&str]| layers.iter().map(|l| l.to_string()).collect();
            all.iter().map(|(id, layers)| (id.to_string(), own(layers))).collect()
        };
        Chains { volumes: of(volumes), snapshots: of(snapshots), cut: BTreeSet::new() }
    }

    fn pair(upper: &str, lower: &str) -> Pair {
        (upper.into(), lower.into())
    }

    #[test]
    fn layers_that_one_other_needs_become_one_with_it() {
        let base = "ami.raw";
        let v: &[&str] = &["v.4.qcow2", "v.3.qcow2", "v.2.qcow2", "v.1.qcow2", base];
        // A snapshot of each: all are needed.
        let all = chains(&[("v", v)], &[("s1", &v[3..]), ("s2", &v[2..]), ("s3", &v[1..])]);
        assert_eq!((all.pairs(), all.fold("v")), (vec![], None));
        // Without the first, its layer belongs to the second; the image is never merged.
        let without = chains(&[("v", v)], &[("s2", &v[2..]), ("s3", &v[1..])]);
        assert_eq!(without.pairs(), [pair("v.2.qcow2", "v.1.qcow2")]);
        // The latest went: only the volume needs its layer, and writes to the one above.
        let latest = chains(&[("v", v)], &[("s1", &v[3..]), ("s2", &v[2..])]);
        assert_eq!((latest.pairs(), latest.fold("v")), (vec![], Some(pair("v.4.qcow2", "v.3.qcow2"))));
        assert_eq!(latest.lying_on("v.3.qcow2"), ["v"]);
        // Another volume was made of the first.
        let shared = chains(&[("v", v), ("w", &["w.1.qcow2", "v.1.qcow2", base])], &[]);
        assert_eq!(shared.pairs(), [pair("v.3.qcow2", "v.2.qcow2")]);
        // A machine that has not heard of the cut writes to the second.
        let mut cut = chains(&[("v", v)], &[]);
        assert_eq!(cut.pairs(), [pair("v.2.qcow2", "v.1.qcow2"), pair("v.3.qcow2", "v.2.qcow2")]);
        cut.cut.insert("v".into());
        assert_eq!((cut.pairs(), cut.fold("v")), (vec![pair("v.2.qcow2", "v.1.qcow2")], None));
        let gone = ["v.9.qcow2".to_owned(), base.to_owned()];
        assert_eq!(cut.unused(&gone), [&gone[0]]);
    }

    #[test]
    fn a_pair_is_one_wherever_it_is() {
        let chain: Chain = ["a", "b", "c"].map(String::from).to_vec();
        assert_eq!(merged(&chain, &pair("b", "c"), "c"), Some(vec!["a".into(), "c".into()]));
        assert_eq!(merged(&chain, &pair("a", "c"), "c"), None);
        assert_eq!(
            next("v", &vec!["v.2.qcow2".into(), "v.10.qcow2".into(), "w.99.qcow2".into()]),
            "v.11.qcow2"
        );
        assert_eq!(next("v", &vec!["v.flat7.qcow2".into(), "ami.raw".into()]), "v.1.qcow2");
    }
}
