//! Tags.

use std::collections::BTreeMap;

use super::{Answer, Context, Operation, done};
use crate::node;
use crate::query::{Fault, Params};

pub(super) const OPERATIONS: &[(&str, Operation)] =
    &[("CreateTags", create), ("DeleteTags", delete), ("DescribeTags", describe)];

/// The tags below `Tag.N`.
pub(super) fn read(params: &Params) -> Result<BTreeMap<String, String>, Fault> {
    let mut tags = BTreeMap::new();
    for tag in params.list("Tag") {
        let key = tag.str("Key").ok_or_else(|| Fault::missing("Tag.Key"))?;
        if tags.insert(key.into(), tag.str("Value").unwrap_or_default().into()).is_some() {
            let why = format!("Duplicate tag key '{key}' specified.");
            return Err(Fault::new("InvalidParameterValue", why));
        }
    }
    Ok(tags)
}

fn resources(c: &Context<'_>) -> Result<Vec<String>, Fault> {
    match c.ids("ResourceId") {
        ids if ids.is_empty() => Err(Fault::missing("ResourceId")),
        ids => Ok(ids),
    }
}

fn create(c: &Context<'_>) -> Answer {
    let tags = read(c.params)?;
    if tags.is_empty() {
        return Err(Fault::missing("Tag"));
    }
    c.region.create_tags(c.account, &resources(c)?, &tags)?;
    Ok(done())
}

fn delete(c: &Context<'_>) -> Answer {
    let one = |tag: &&Params| {
        let key = tag.str("Key").ok_or_else(|| Fault::missing("Tag.Key"))?;
        Ok((key.to_owned(), tag.str("Value").map(str::to_owned)))
    };
    let tags = c.params.list("Tag").iter().map(one).collect::<Result<Vec<_>, Fault>>()?;
    c.region.delete_tags(c.account, &resources(c)?, &tags)?;
    Ok(done())
}

fn describe(c: &Context<'_>) -> Answer {
    let told = c.region.tags(c.account)?.into_iter().map(|tag| {
        let node = node! {
            "resourceId": &tag.resource, "resourceType": tag.kind, "key": &tag.key, "value": &tag.value,
        };
        (format!("{}/{}", tag.resource, tag.key), node)
    });
    let mut told: Vec<_> = told.collect();
    told.sort_by(|a, b| a.0.cmp(&b.0));
    c.describe("tagSet", told, &[])
}
