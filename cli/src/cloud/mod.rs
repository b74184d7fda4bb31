//! The cloud for people: the same API as everybody's, with names for ids.
//!
//! ```text
//!   client.rs     signed calls, answers as JSON
//!   instances.rs  run, ps, start, stop, reboot, terminate, tag, logs
//!   reach.rs      console, cp, env, aws; where `hutch ssh` goes
//!   images.rs     AMIs: create, copy, share, deregister
//!   events.rs     what changes, as it comes
//!   top.rs        what instances use
//!   volumes.rs    volumes as files, and whether they are whole
//!   backup.rs     all that hutchd keeps, copied; a state made of that
//! ```

pub mod backup;
pub mod client;
pub mod events;
pub mod firewall;
pub mod images;
pub mod instances;
pub mod reach;
pub mod top;
pub mod usage;
pub mod volumes;

use anyhow::bail;
use serde::Serialize;
use serde_json::Value;

use client::{Client, items, text_of};

/// An instance as it is listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// Its id.
    pub id: String,
    /// Its tag `Name`.
    pub name: String,
    /// Its state.
    pub state: String,
    /// Its instance type.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its AMI's id.
    pub image: String,
    /// Its private address.
    pub ip: String,
    /// Its public address, where it has one.
    pub public_ip: String,
    /// Its zone.
    pub zone: String,
    /// When it was launched, in RFC 3339.
    pub launched: String,
    /// Why it is in its state, where there is a reason.
    pub reason: String,
}

impl From<&Value> for Instance {
    fn from(value: &Value) -> Instance {
        let text = |value: &Value| text_of(value).to_owned();
        let tags = items(&value["tagSet"]).iter();
        let name = tags.filter(|tag| text_of(&tag["key"]) == "Name").map(|tag| text(&tag["value"])).next();
        Instance {
            id: text(&value["instanceId"]),
            name: name.unwrap_or_default(),
            state: text(&value["instanceState"]["name"]),
            kind: text(&value["instanceType"]),
            image: text(&value["imageId"]),
            ip: text(&value["privateIpAddress"]),
            public_ip: text(&value["ipAddress"]),
            zone: text(&value["placement"]["availabilityZone"]),
            launched: text(&value["launchTime"]),
            reason: text(&value["stateReason"]["message"]),
        }
    }
}

/// A parameter.
pub fn param(name: impl Into<String>, value: impl Into<String>) -> (String, String) {
    (name.into(), value.into())
}

/// A list of parameters: `NAME.1`, `NAME.2`, …
pub fn numbered<'a>(name: &str, values: impl IntoIterator<Item = &'a str>) -> Vec<(String, String)> {
    values.into_iter().enumerate().map(|(i, value)| param(format!("{name}.{}", i + 1), value)).collect()
}

/// All instances that the caller sees.
pub fn instances(client: &Client, params: &[(String, String)]) -> anyhow::Result<Vec<Instance>> {
    let reservations = client.all("DescribeInstances", params, "reservationSet")?;
    Ok(reservations.iter().flat_map(|r| items(&r["instancesSet"])).map(Instance::from).collect())
}

/// The instances of these ids or names, each once, in their order. Terminated ones have no name any more.
pub fn find(client: &Client, wanted: &[String]) -> anyhow::Result<Vec<Instance>> {
    let all = instances(client, &[])?;
    let mut found: Vec<Instance> = Vec::new();
    for name in wanted {
        let by_id = all.iter().filter(|i| i.id == *name);
        let by_name = all.iter().filter(|i| i.id != *name && i.name == *name && i.state != "terminated");
        let matches: Vec<_> = by_id.chain(by_name).collect();
        match matches.as_slice() {
            [] => bail!("there is no instance {name}; `hutch ps -a` lists them"),
            [one] if found.iter().any(|have| have.id == one.id) => {}
            [one] => found.push((*one).clone()),
            many => {
                let ids: Vec<_> = many.iter().map(|i| i.id.as_str()).collect();
                bail!("{} instances are called {name}: say which by its id: {}", many.len(), ids.join(", "));
            }
        }
    }
    Ok(found)
}

/// The one instance of this id or name.
pub fn find_one(client: &Client, wanted: &str) -> anyhow::Result<Instance> {
    let found = find(client, &[wanted.to_owned()])?.into_iter().next();
    found.ok_or_else(|| anyhow::anyhow!("there is no instance {wanted}"))
}
