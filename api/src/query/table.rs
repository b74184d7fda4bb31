//! The parameters that each operation takes, and of what type: what is not in the table is refused, not overlooked.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use super::{Fault, Params, params};

/// A parameter's type.
#[derive(Debug)]
enum Kind {
    Text,
    Integer,
    Float,
    Boolean,
    Blob,
    Time,
    List(Box<Kind>),
    Structure(Members),
}

/// The members of a structure: their types, and whether they have to be there.
type Members = BTreeMap<&'static str, (Kind, bool)>;

static TABLE: LazyLock<HashMap<&str, Members>> = LazyLock::new(|| {
    let lines = include_str!("operations.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
            (name, members(&mut &*rest))
        })
        .collect()
});

/// Reads `NAME:TYPE NAME:TYPE! …` up to the end or a closing brace.
fn members(rest: &mut &'static str) -> Members {
    let mut all = Members::new();
    while let Some((name, after)) =
        rest.trim_start().split_once(':').filter(|_| !rest.trim_start().starts_with('}'))
    {
        *rest = after;
        let kind = kind(rest);
        let required = rest.starts_with('!');
        *rest = rest.trim_start_matches('!');
        all.insert(name, (kind, required));
    }
    *rest = rest.trim_start();
    all
}

fn kind(rest: &mut &'static str) -> Kind {
    if let Some(inner) = rest.strip_prefix('[') {
        *rest = inner;
        let item = kind(rest);
        *rest = rest.strip_prefix(']').unwrap_or(rest);
        return Kind::List(Box::new(item));
    }
    if let Some(inner) = rest.strip_prefix('{') {
        *rest = inner;
        let all = members(rest);
        *rest = rest.strip_prefix('}').unwrap_or(rest);
        return Kind::Structure(all);
    }
    let end = rest.find(|c: char| !c.is_ascii_lowercase()).unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    *rest = after;
    match word {
        "int" => Kind::Integer,
        "float" => Kind::Float,
        "bool" => Kind::Boolean,
        "blob" => Kind::Blob,
        "time" => Kind::Time,
        _ => Kind::Text,
    }
}

/// Whether an operation's parameters are its own, and of their types.
///
/// # Errors
/// `UnknownParameter`, `MissingParameter`, `InvalidParameterValue`.
pub fn check(action: &str, params: &Params) -> Result<(), Fault> {
    let Some(known) = TABLE.get(action) else { return Ok(()) };
    structure("", known, params, &["Action", "Version"])
}

/// The flat names of all parameters of an operation, each list with one member.
pub fn names(action: &str) -> Vec<String> {
    fn walk(path: &str, kind: &Kind, all: &mut Vec<String>) {
        match kind {
            Kind::List(item) => walk(&format!("{path}.1"), item, all),
            Kind::Structure(members) => {
                members.iter().for_each(|(name, (kind, _))| walk(&format!("{path}.{name}"), kind, all));
            }
            _ => all.push(path.to_owned()),
        }
    }
    let mut all = Vec::new();
    for (name, (kind, _)) in TABLE.get(action).into_iter().flatten() {
        walk(name, kind, &mut all);
    }
    all
}

fn structure(path: &str, known: &Members, given: &Params, more: &[&str]) -> Result<(), Fault> {
    let whole = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for (name, below) in given.names().filter(|(name, _)| !more.contains(name)) {
        match known.get(name) {
            Some((kind, _)) => value(&whole(name), kind, below)?,
            None => {
                let why = format!("The parameter {} is not recognized", whole(name));
                return Err(Fault::new("UnknownParameter", why));
            }
        }
    }
    let missing = known.iter().find(|(name, (_, required))| *required && given.sub(name).is_none());
    missing.map_or(Ok(()), |(name, _)| Err(Fault::missing(&whole(name))))
}

fn value(path: &str, kind: &Kind, given: &Params) -> Result<(), Fault> {
    let wrong = |why: &str| Err(Fault::value(path, given.text().unwrap_or("…"), why));
    match kind {
        Kind::List(item) => {
            // A list without members is sent as an empty text.
            if given.text().is_some_and(|text| !text.is_empty()) {
                return wrong("It is a list: number its members.");
            }
            for (number, below) in given.names() {
                if params::index(number).is_none() {
                    return wrong("A list's members have numbers, from 1 to 10000.");
                }
                value(&format!("{path}.{number}"), item, below)?;
            }
            Ok(())
        }
        Kind::Structure(known) => match given.text() {
            Some(text) if !text.is_empty() => wrong("It is a structure: name its members."),
            _ => structure(path, known, given, &[]),
        },
        scalar => {
            let Some(text) = given.text() else { return wrong("It is one value.") };
            let fits = match scalar {
                Kind::Integer => text.parse::<i64>().is_ok(),
                Kind::Float => text.parse().is_ok_and(f64::is_finite),
                Kind::Boolean => matches!(text.to_ascii_lowercase().as_str(), "true" | "false" | "1" | "0"),
                Kind::Time => text.parse::<jiff::Timestamp>().is_ok(),
                // Base64 is looked at where it is read; all else is text.
                _ => true,
            };
            if fits { Ok(()) } else { wrong("It is of another type.") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operation_does_not_know_is_refused() {
        let code = |action, form: &str| {
            check(action, &Params::parse(form).unwrap()).map_err(|fault| fault.code.into_owned())
        };
        let refused = |code: &str| Err(code.to_owned());
        assert_eq!(code("StopInstances", "Action=x&InstanceId.1=i-1&Force=true"), Ok(()));
        assert_eq!(code("StopInstances", "Force=true"), refused("MissingParameter"));
        assert_eq!(code("StopInstances", "InstanceId.1=i-1&Force=perhaps"), refused("InvalidParameterValue"));
        assert_eq!(code("StopInstances", "InstanceId=i-1"), refused("InvalidParameterValue"));
        assert_eq!(code("StopInstances", "InstanceId.a=i-1"), refused("InvalidParameterValue"));
        for number in ["0", "01", "%2B1", "10001"] {
            assert_eq!(
                code("StopInstances", &format!("InstanceId.{number}=i-1")),
                refused("InvalidParameterValue")
            );
        }
        assert_eq!(code("StopInstances", "InstanceId.1=i-1&Nothing=1"), refused("UnknownParameter"));
        let run = "ImageId=a&MinCount=1&MaxCount=1";
        assert_eq!(code("RunInstances", &format!("{run}&BlockDeviceMapping.1.Ebs.VolumeSize=8")), Ok(()));
        assert_eq!(
            code("RunInstances", &format!("{run}&BlockDeviceMapping.1.Ebs.Size=8")),
            refused("UnknownParameter")
        );
        assert_eq!(
            code(
                "RunInstances",
                &format!(
                    "{run}&Placement.AvailabilityZone=a&SecurityGroupId.1=s&TagSpecification.1.Tag.1.Key=k"
                )
            ),
            Ok(())
        );
        assert_eq!(code("RunInstances", &format!("{run}&Placement=a")), refused("InvalidParameterValue"));
    }

    #[test]
    fn every_operation_that_is_served_is_in_the_table() {
        for name in crate::ec2::served() {
            assert!(TABLE.contains_key(name), "{name}: run tools/operations.py");
        }
        assert!(TABLE.len() > 60);
    }
}
