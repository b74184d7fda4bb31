//! Instance types: what a name such as `t3.micro` stands for.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The table that hutch comes with, `instance-types.toml`.
const BUILT_IN: &str = include_str!("../instance-types.toml");

/// The most instance stores of a type.
const STORES: usize = 4;
/// Bytes of a GB, which instance stores are measured in.
pub const GB: u64 = 1_000_000_000;

/// What an instance of a type gets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct InstanceType {
    /// Virtual CPUs, 1 to 32.
    pub vcpus: u32,
    /// Memory in MiB.
    #[serde(rename = "memory")]
    pub memory_mib: u64,
    /// Mbit a second of each interface, each way; without it there is no limit.
    #[serde(default)]
    pub network_mbit: Option<Span>,
    /// Mbit a second of all volumes together, likewise.
    #[serde(default)]
    pub volume_mbit: Option<Span>,
    /// Operations a second of all volumes together, likewise.
    #[serde(default)]
    pub volume_iops: Option<Span>,
    /// Its instance stores, in GB each.
    #[serde(default)]
    pub instance_store: Vec<u64>,
}

/// A speed that an instance always has, and the one that it has for a while: `64` or `[64, 5000]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(from = "SpanText")]
pub struct Span {
    /// Always.
    pub baseline: u64,
    /// For a while.
    pub burst: u64,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a speed is a number, or two: the lasting one and the one for a while")]
enum SpanText {
    One(u64),
    Two([u64; 2]),
}

impl From<SpanText> for Span {
    fn from(text: SpanText) -> Span {
        match text {
            SpanText::One(speed) => Span { baseline: speed, burst: speed },
            SpanText::Two([baseline, burst]) => Span { baseline, burst },
        }
    }
}

impl InstanceType {
    /// What is wrong with it, if anything is.
    fn wrong(&self) -> Option<&'static str> {
        if !(1..=32).contains(&self.vcpus) || !(128..=1 << 20).contains(&self.memory_mib) {
            return Some("has 1 to 32 vcpus and a memory of 128 to 1048576 MiB");
        }
        let stored = |gb: &u64| (1..=16_000).contains(gb);
        if self.instance_store.len() > STORES || !self.instance_store.iter().all(stored) {
            return Some("has at most 4 instance stores of 1 to 16000 GB");
        }
        let speeds = [self.network_mbit, self.volume_mbit, self.volume_iops];
        let sane = |span: Span| (1..=10_000_000).contains(&span.baseline) && span.baseline <= span.burst;
        let sane = |span: Span| sane(span) && span.burst <= 10_000_000;
        let all = speeds.into_iter().flatten().all(sane);
        (!all).then_some("has speeds of 1 to 10000000, the lasting one first and no more than the other")
    }
}

/// All types by family and size.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Table(BTreeMap<String, BTreeMap<String, InstanceType>>);

/// A type that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no instance type {name:?}; there are {known}")]
pub struct NoSuchType {
    name: String,
    known: String,
}

impl Table {
    /// The table that hutch comes with.
    ///
    /// # Panics
    /// Never: a test reads it.
    pub fn built_in() -> Table {
        toml::from_str(BUILT_IN).expect("the built-in table is well-formed")
    }

    /// The built-in table, with the types of `text` beside them or in their place: `[family]`, then
    /// `size = { vcpus = 1, memory = 512 }`.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(text: &str) -> Result<Table, String> {
        let own: Table = toml::from_str(text).map_err(|e| e.to_string())?;
        let mut table = Table::built_in();
        for (family, sizes) in own.0 {
            for (size, kind) in sizes {
                if let Some(why) = kind.wrong() {
                    return Err(format!("{family}.{size} {why}"));
                }
                table.0.entry(family.clone()).or_default().insert(size, kind);
            }
        }
        Ok(table)
    }

    /// All of them, by their whole names.
    pub fn all(&self) -> Vec<(String, &InstanceType)> {
        let family = |(family, sizes): (&String, &'_ BTreeMap<String, InstanceType>)| {
            let family = family.clone();
            sizes.keys().map(move |size| format!("{family}.{size}")).collect::<Vec<_>>()
        };
        let names = self.0.iter().flat_map(family);
        names.zip(self.0.values().flat_map(BTreeMap::values)).collect()
    }

    /// What `name` stands for.
    ///
    /// # Errors
    /// [`NoSuchType`], with the sizes of the family if there is one of this name.
    pub fn get(&self, name: &str) -> Result<&InstanceType, NoSuchType> {
        let (family, size) = name.split_once('.').unwrap_or((name, ""));
        self.0.get(family).and_then(|sizes| sizes.get(size)).ok_or_else(|| {
            let known = match self.0.get_key_value(family) {
                Some((family, sizes)) => {
                    sizes.keys().map(|size| format!("{family}.{size}")).collect::<Vec<_>>()
                }
                None => self.0.keys().map(|family| format!("{family}.*")).collect(),
            };
            NoSuchType { name: name.to_owned(), known: known.join(", ") }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_is_ec2s() {
        let table = Table::built_in();
        let span = |baseline, burst| Some(Span { baseline, burst });
        let micro = InstanceType {
            vcpus: 2,
            memory_mib: 1024,
            network_mbit: span(64, 5000),
            volume_mbit: span(87, 2085),
            volume_iops: span(500, 11_800),
            instance_store: Vec::new(),
        };
        assert_eq!(table.get("t3.micro"), Ok(&micro));
        for (family, sizes) in &table.0 {
            for (size, kind) in sizes {
                assert_eq!(kind.wrong(), None, "{family}.{size}");
                // Either all of it is documented, or nothing.
                assert_eq!(kind.network_mbit.is_some(), kind.volume_iops.is_some(), "{family}.{size}");
                assert_eq!(kind.volume_mbit.is_some(), kind.volume_iops.is_some(), "{family}.{size}");
            }
        }
    }

    #[test]
    fn the_owners_table_lies_over_the_built_in_one() {
        let table = Table::read(
            "[t3]\nmicro = { vcpus = 1, memory = 256 }\n[own]\nbig = { vcpus = 3, memory = 3000 }",
        );
        let table = table.unwrap();
        let plain = |vcpus, memory_mib| InstanceType { vcpus, memory_mib, ..InstanceType::default() };
        assert_eq!(table.get("t3.micro"), Ok(&plain(1, 256)));
        assert_eq!(table.get("own.big"), Ok(&plain(3, 3000)));
        assert!(table.get("t3.small").is_ok());
        for bad in ["[t3]\nmicro = { vcpus = 99, memory = 256 }", "[t3]\nmicro = { vcpu = 1 }", "t3 = 1"] {
            assert!(Table::read(bad).is_err(), "{bad}");
        }
        let speed = |text: &str| Table::read(&format!("[a]\nb = {{ vcpus = 1, memory = 256, {text} }}"));
        let table = speed("network-mbit = 100, volume-iops = [10, 100]").unwrap();
        let kind = table.get("a.b").unwrap();
        assert_eq!(kind.network_mbit, Some(Span { baseline: 100, burst: 100 }));
        assert_eq!(kind.volume_iops, Some(Span { baseline: 10, burst: 100 }));
        let table = speed("instance-store = [75, 150]").unwrap();
        assert_eq!(table.get("a.b").unwrap().instance_store, [75, 150]);
        assert_eq!(Table::built_in().get("m5d.large").unwrap().instance_store, [75]);
        for bad in ["instance-store = 75", "instance-store = [0]", "instance-store = [1, 1, 1, 1, 1]"] {
            assert!(speed(bad).is_err(), "{bad}");
        }
        for bad in
            ["network-mbit = 0", "volume-mbit = [2, 1]", "volume-iops = [1]", "volume-mbit = -1", "iops = 1"]
        {
            assert!(speed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_unknown_type_is_told_what_there_is() {
        let table = Table::built_in();
        let said = |name| table.get(name).unwrap_err().to_string();
        assert!(said("t3.huge").contains("t3.micro") && !said("t3.huge").contains("m5"));
        assert!(said("q1.small").contains("t3.*") && said("").contains("m5.*"));
    }
}
