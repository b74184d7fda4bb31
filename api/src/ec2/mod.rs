//! EC2's operations: a call's parameters become a verb of `cloud`, and what that gives becomes an answer.
//!
//! ```text
//!   Call ─► OPERATIONS (by name) ─► instances, instance_attributes, launch_templates, images, imports, stored, bundles, snapshots, volumes, groups, keys, network, addresses, places, tags, account ─► Node
//!                                        └── filters: what the answer would say decides
//! ```

mod account;
mod addresses;
mod bundles;
mod filters;
mod groups;
mod images;
mod imports;
mod instance_attributes;
mod instances;
mod interfaces;
mod keys;
mod launch_templates;
mod network;
mod places;
mod routes;
mod snapshots;
mod stored;
mod tags;
mod volumes;
mod vpcs;

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hutch_cloud::region::{Encryption, Region};
use jiff::Timestamp;

use crate::node;
use crate::query::{Call, Fault, Node, Params, table};
use filters::Filters;

/// What an operation gives.
type Answer = Result<Node, Fault>;
type Operation = fn(&Context<'_>) -> Answer;

/// What an operation is told.
struct Context<'a> {
    region: &'a Region,
    regions: &'a Regions,
    account: &'a str,
    action: &'a str,
    params: &'a Params,
}

/// The regions of an endpoint, by name.
pub type Regions = BTreeMap<String, Arc<Region>>;

/// The operations that are served, by name.
static OPERATIONS: &[&[(&str, Operation)]] = &[
    instances::OPERATIONS,
    instance_attributes::OPERATIONS,
    launch_templates::OPERATIONS,
    images::OPERATIONS,
    imports::OPERATIONS,
    stored::OPERATIONS,
    bundles::OPERATIONS,
    snapshots::OPERATIONS,
    volumes::OPERATIONS,
    groups::OPERATIONS,
    keys::OPERATIONS,
    vpcs::OPERATIONS,
    routes::OPERATIONS,
    network::OPERATIONS,
    addresses::OPERATIONS,
    interfaces::OPERATIONS,
    places::OPERATIONS,
    tags::OPERATIONS,
    account::OPERATIONS,
];

/// Operations of EC2 that hutch is to have, and has not yet: said so, where a wrong name is said to be wrong.
const LATER: &[&str] = &[
    "RequestSpotInstances",
    "CancelSpotInstanceRequests",
    "PurchaseReservedInstancesOffering",
    "AssignPrivateIpAddresses",
    "UnassignPrivateIpAddresses",
];

/// The names of EC2's operations that are served.
pub fn served() -> impl Iterator<Item = &'static str> {
    OPERATIONS.iter().flat_map(|part| part.iter()).map(|(name, _)| *name)
}

/// Serves a call of EC2 or STS.
///
/// # Errors
/// What the client is told.
pub fn serve(regions: &Regions, call: &Call) -> Answer {
    match call.service.as_str() {
        "sts" if call.action == "GetCallerIdentity" => Ok(caller(call)),
        "ec2" => ec2(regions, call),
        service => Err(invalid_action(&format!("{service}:{}", call.action))),
    }
}

fn invalid_action(action: &str) -> Fault {
    Fault::new("InvalidAction", format!("The action {action} is not valid for this web service."))
}

fn caller(call: &Call) -> Node {
    let account = &call.identity.account;
    node! { "Arn": format!("arn:aws:iam::{account}:root"), "UserId": account, "Account": account }
}

fn ec2(regions: &Regions, call: &Call) -> Answer {
    let operation = OPERATIONS.iter().flat_map(|part| part.iter()).find(|(name, _)| *name == call.action);
    let Some((action, operation)) = operation else {
        return Err(match LATER.contains(&call.action.as_str()) {
            true => Fault::new("UnsupportedOperation", format!("hutch does not have {} yet", call.action)),
            false => invalid_action(&call.action),
        });
    };
    let region = regions.get(&call.region).ok_or_else(|| {
        let known = regions.keys().cloned().collect::<Vec<_>>().join(", ");
        Fault::new("AuthFailure", format!("There is no region {}; there are: {known}", call.region))
    })?;
    table::check(action, &call.params)?;
    if call.params.boolean("DryRun")? == Some(true) {
        return Err(Fault::new("DryRunOperation", "Request would have succeeded, but DryRun flag is set."));
    }
    let account = &call.identity.account;
    operation(&Context { region, regions, account, action, params: &call.params })
}

/// The token that a page ends with whose last thing has this key.
fn token(key: &str) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(key)
}

/// A time as EC2 writes it.
fn time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

/// `<return>true</return>`: what operations answer that have nothing to tell.
fn done() -> Node {
    node! { "return": true }
}

/// A resource's tags; like EC2, nothing where there are none.
/// What a request says of encryption.
fn encryption(p: &Params, under: &str) -> Result<Encryption, Fault> {
    let key = p.str(&format!("{under}KmsKeyId")).filter(|key| !key.is_empty()).map(str::to_owned);
    Ok(Encryption { encrypted: p.boolean(&format!("{under}Encrypted"))?, key })
}

fn tag_set(tags: &BTreeMap<String, String>) -> Option<Node> {
    (!tags.is_empty()).then(|| Node::list(tags, |(key, value)| node! { "key": key, "value": value }))
}

impl Context<'_> {
    fn filters(&self) -> Result<Filters, Fault> {
        Filters::new(self.action, self.params)
    }

    /// The ids that are asked for at a name.
    fn ids(&self, name: &str) -> Vec<String> {
        self.params.strings(name)
    }

    /// The region that a copy is made of.
    fn source_region(&self) -> Result<&Region, Fault> {
        let name = self.params.required("SourceRegion")?;
        let known = || self.regions.keys().cloned().collect::<Vec<_>>().join(", ");
        let missing = || {
            Fault::value("sourceRegion", name, &format!("There is no such region; there are: {}", known()))
        };
        self.regions.get(name).map(Arc::as_ref).ok_or_else(missing)
    }

    /// The tags that are asked for, by type of resource.
    fn tag_specifications(&self) -> Result<BTreeMap<String, BTreeMap<String, String>>, Fault> {
        let mut all: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for specification in self.params.list("TagSpecification") {
            let kind = specification.required("ResourceType")?;
            all.entry(kind.into()).or_default().extend(tags::read(specification)?);
        }
        Ok(all)
    }

    /// A digest of the request but for what may differ when it is sent again.
    fn digest(&self) -> String {
        use sha2::Digest;
        let mut names: Vec<_> = self.params.names().filter(|(name, _)| *name != "ClientToken").collect();
        names.sort_by_key(|(name, _)| *name);
        format!("{:x}", sha2::Sha256::digest(format!("{names:?}")))
    }

    /// How many things a page may tell, and the key behind which it begins.
    fn page_asked(&self, ids: &[String]) -> Result<(usize, String), Fault> {
        let most = match self.params.int("MaxResults")? {
            Some(_) if !ids.is_empty() => {
                return Err(Fault::combination("The parameter MaxResults cannot be used with ids"));
            }
            Some(n) if n < 5 => {
                return Err(Fault::value("maxResults", &n.to_string(), "Expecting a value of at least 5"));
            }
            Some(n) => usize::try_from(n).unwrap_or(usize::MAX).min(1000),
            None => usize::MAX,
        };
        let Some(token) = self.params.str("NextToken").filter(|token| !token.is_empty()) else {
            return Ok((most, String::new()));
        };
        let decoded =
            BASE64_URL_SAFE_NO_PAD.decode(token).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let bad = || Fault::value("nextToken", token, "It is none of ours.");
        Ok((most, decoded.ok_or_else(bad)?))
    }

    /// One page of things that are told: those of `found` after the token, up to MaxResults; the next token.
    ///
    /// `found` is in the order of its keys. A token is the key of the last one told, so that it holds whatever comes and goes.
    fn page(&self, found: Vec<(String, Node)>, ids: &[String]) -> Result<(Vec<Node>, Option<String>), Fault> {
        let (most, after) = self.page_asked(ids)?;
        let mut rest = found.into_iter().filter(|(key, _)| *key > after);
        let page: Vec<_> = rest.by_ref().take(most).collect();
        let more = rest.next().is_some();
        let token = page.last().filter(|_| more).map(|(key, _)| token(key));
        Ok((page.into_iter().map(|(_, node)| node).collect(), token))
    }

    /// The answer of a Describe operation: those things that the ids name and the filters let through, page by page.
    fn describe(&self, set: &'static str, things: Vec<(String, Node)>, ids: &[String]) -> Answer {
        let filters = self.filters()?;
        let found = things.into_iter().filter(|(_, node)| filters.hold(node)).collect();
        let (page, token) = self.page(found, ids)?;
        Ok(Node::empty().with(set, Node::List(page)).with("nextToken", token))
    }
}

/// Those of `all` that `ids` name, or all of them; an id that nothing has is an error.
///
/// # Errors
/// `ERROR.Malformed`, `ERROR.NotFound`.
fn chosen<T>(
    all: Vec<T>,
    ids: &[String],
    id: impl Fn(&T) -> &str,
    (prefix, error, what): (&str, &'static str, &str),
) -> Result<Vec<T>, Fault> {
    for wanted in ids {
        hutch_cloud::id::check(wanted, prefix, error)?;
        if !all.iter().any(|thing| id(thing) == wanted) {
            return Err(Fault::not_found(error, what, wanted));
        }
    }
    Ok(all
        .into_iter()
        .filter(|thing| ids.is_empty() || ids.iter().any(|wanted| wanted == id(thing)))
        .collect())
}
