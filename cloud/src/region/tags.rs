//! Tags, on whatever has an id.

use crate::fault::{Fault, Result};
use crate::model::{
    Elastic, Gateway, Group, Image, Instance, Interface, KeyPair, LaunchTemplate, Record, RouteTable,
    Snapshot, Subnet, Tags, Volume, Vpc,
};

use super::{Region, Work};

/// The most tags of one resource.
pub const MAX_TAGS: usize = 50;

/// A record that has tags.
pub trait Tagged: Record {
    /// The type of resource, as EC2 calls it.
    const TYPE: &'static str;
    /// What its ids begin with; see [`check`](crate::id::check).
    const PREFIX: &'static str;
    /// The error's name without `.NotFound`.
    const ERROR: &'static str;
    /// Whose it is.
    fn account(&self) -> &str;
    /// Its tags.
    fn tags(&self) -> &Tags;
    /// Its tags, to be changed.
    fn tags_mut(&mut self) -> &mut Tags;
}

macro_rules! tagged {
    ($($type:ident $name:literal $prefix:literal $error:literal),* $(,)?) => {$(
        impl Tagged for $type {
            const TYPE: &'static str = $name;
            const PREFIX: &'static str = $prefix;
            const ERROR: &'static str = $error;
            fn account(&self) -> &str {
                &self.account
            }
            fn tags(&self) -> &Tags {
                &self.tags
            }
            fn tags_mut(&mut self) -> &mut Tags {
                &mut self.tags
            }
        }
    )*};
}

tagged! {
    Instance "instance" "i" "InvalidInstanceID",
    Image "image" "ami|aki|ari" "InvalidAMIID",
    Volume "volume" "vol" "InvalidVolume",
    Snapshot "snapshot" "snap" "InvalidSnapshot",
    Interface "network-interface" "eni" "InvalidNetworkInterfaceID",
    Vpc "vpc" "vpc" "InvalidVpcID",
    Subnet "subnet" "subnet" "InvalidSubnetID",
    Gateway "internet-gateway" "igw" "InvalidInternetGatewayID",
    RouteTable "route-table" "rtb" "InvalidRouteTableID",
    Group "security-group" "sg" "InvalidGroup",
    LaunchTemplate "launch-template" "lt" "InvalidLaunchTemplateId",
    Elastic "elastic-ip" "eipalloc" "InvalidAllocationID",
}

/// Whether these can be somebody's tags.
///
/// # Errors
/// `InvalidParameterValue`, `TagLimitExceeded`.
pub fn check(tags: &Tags) -> Result<()> {
    for (key, value) in tags {
        if key.is_empty() || key.chars().count() > 128 {
            return Err(Fault::value("Tag.Key", key, "A tag's key has 1 to 128 characters."));
        }
        if value.chars().count() > 256 {
            return Err(Fault::value("Tag.Value", value, "A tag's value has at most 256 characters."));
        }
        if is_reserved(key) {
            return Err(Fault::new(
                "InvalidParameterValue",
                format!("Tag keys starting with 'aws:' are reserved for internal use: {key}"),
            ));
        }
    }
    limit(tags)
}

/// EC2's own tags: nobody gives or takes them, and they do not count.
fn is_reserved(key: &str) -> bool {
    key.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("aws:"))
}

fn limit(tags: &Tags) -> Result<()> {
    match tags.keys().filter(|key| !is_reserved(key)).count() > MAX_TAGS {
        true => Err(Fault::new("TagLimitExceeded", format!("A resource has at most {MAX_TAGS} tags"))),
        false => Ok(()),
    }
}

/// A tag as DescribeTags tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// The type of the resource.
    pub kind: &'static str,
    /// Its id.
    pub resource: String,
    /// The key.
    pub key: String,
    /// The value.
    pub value: String,
}

/// The record of `id`, which is the account's.
///
/// # Errors
/// `….Malformed`, `….NotFound`.
pub fn own<T: Tagged>(work: &mut Work<'_>, account: &str, id: &str) -> Result<T> {
    crate::id::check(id, T::PREFIX, T::ERROR)?;
    let what = T::TYPE.replace('-', " ");
    let missing = || Fault::not_found(T::ERROR, &format!("{what} ID"), id);
    work.get::<T>(id)?.filter(|record| record.account() == account).ok_or_else(missing)
}

impl Region {
    /// Gives each of the resources these tags, or none of them.
    ///
    /// # Errors
    /// A resource that is not there, tags that cannot be.
    pub fn create_tags(&self, account: &str, ids: &[String], tags: &Tags) -> Result<()> {
        check(tags)?;
        self.tag(account, ids, &|have| {
            have.extend(tags.iter().map(|(key, value)| (key.clone(), value.clone())));
        })
    }

    /// Takes tags from each of the resources: by key, or only where the value is this one; all without any.
    ///
    /// # Errors
    /// A resource that is not there.
    pub fn delete_tags(
        &self,
        account: &str,
        ids: &[String],
        tags: &[(String, Option<String>)],
    ) -> Result<()> {
        self.tag(account, ids, &|have| {
            if tags.is_empty() {
                have.retain(|key, _| is_reserved(key));
            }
            for (key, value) in tags.iter().filter(|(key, _)| !is_reserved(key)) {
                if value.as_ref().is_none_or(|value| have.get(key) == Some(value)) {
                    have.remove(key);
                }
            }
        })
    }

    fn tag(&self, account: &str, ids: &[String], change: &dyn Fn(&mut Tags)) -> Result<()> {
        fn one<T: Tagged>(
            work: &mut Work<'_>,
            account: &str,
            id: &str,
            change: &dyn Fn(&mut Tags),
        ) -> Result<()> {
            let mut record: T = own(work, account, id)?;
            change(record.tags_mut());
            limit(record.tags())?;
            work.put(&record)
        }
        self.transact(|work| {
            for id in ids {
                match id.split_once('-').map_or("", |(prefix, _)| prefix) {
                    "i" => one::<Instance>(work, account, id, change),
                    "ami" | "aki" | "ari" => one::<Image>(work, account, id, change),
                    "vol" => one::<Volume>(work, account, id, change),
                    "snap" => one::<Snapshot>(work, account, id, change),
                    "eni" => one::<Interface>(work, account, id, change),
                    "vpc" => one::<Vpc>(work, account, id, change),
                    "subnet" => one::<Subnet>(work, account, id, change),
                    "igw" => one::<Gateway>(work, account, id, change),
                    "rtb" => one::<RouteTable>(work, account, id, change),
                    "sg" => one::<Group>(work, account, id, change),
                    "lt" => one::<LaunchTemplate>(work, account, id, change),
                    "eipalloc" => one::<Elastic>(work, account, id, change),
                    "key" => {
                        let keys = work.all::<KeyPair>(&format!("{account}/"))?;
                        let key = keys.into_iter().find(|key| key.key_id == *id);
                        let key = key.ok_or_else(|| Fault::not_found("InvalidKeyPair", "key pair", id))?;
                        let mut key = work.get::<KeyPair>(&key.id)?.unwrap_or(key);
                        change(&mut key.tags);
                        limit(&key.tags)?;
                        work.put(&key)
                    }
                    "sgr" => {
                        let has = |group: &Group| group.account == account && group.rules.contains_key(id);
                        let group = work.all::<Group>("")?.into_iter().find(has);
                        // As it is now: it has to hold still.
                        let group = group.map(|group| work.get::<Group>(&group.id)).transpose()?.flatten();
                        let mut group = group.filter(has).ok_or_else(|| {
                            Fault::not_found("InvalidSecurityGroupRuleId", "security group rule ID", id)
                        })?;
                        let tags = group.rule_tags.entry(id.clone()).or_default();
                        change(tags);
                        limit(tags)?;
                        group.rule_tags.retain(|_, tags| !tags.is_empty());
                        work.put(&group)
                    }
                    _ => Err(Fault::new("InvalidID", format!("The ID '{id}' is not valid"))),
                }?;
            }
            Ok(())
        })
    }

    /// All tags of the account's resources.
    ///
    /// # Errors
    /// The store's.
    pub fn tags(&self, account: &str) -> Result<Vec<Tag>> {
        fn of<T: Tagged>(region: &Region, account: &str, all: &mut Vec<Tag>) -> Result<()> {
            for record in region.all::<T>()?.iter().filter(|record| record.account() == account) {
                all.extend(record.tags().iter().map(|(key, value)| Tag {
                    kind: T::TYPE,
                    resource: record.id().into(),
                    key: key.clone(),
                    value: value.clone(),
                }));
            }
            Ok(())
        }
        let mut all = Vec::new();
        of::<Instance>(self, account, &mut all)?;
        of::<Image>(self, account, &mut all)?;
        of::<Volume>(self, account, &mut all)?;
        of::<Snapshot>(self, account, &mut all)?;
        of::<Interface>(self, account, &mut all)?;
        of::<Vpc>(self, account, &mut all)?;
        of::<Subnet>(self, account, &mut all)?;
        of::<Gateway>(self, account, &mut all)?;
        of::<RouteTable>(self, account, &mut all)?;
        of::<Group>(self, account, &mut all)?;
        of::<LaunchTemplate>(self, account, &mut all)?;
        of::<Elastic>(self, account, &mut all)?;
        let groups = self.all::<Group>()?;
        for (id, tags) in groups.iter().filter(|group| group.account == account).flat_map(|g| &g.rule_tags) {
            all.extend(tags.iter().map(|(key, value)| Tag {
                kind: "security-group-rule",
                resource: id.clone(),
                key: key.clone(),
                value: value.clone(),
            }));
        }
        for key in self.all_of::<KeyPair>(&format!("{account}/"))? {
            all.extend(key.tags.iter().map(|(name, value)| Tag {
                kind: "key-pair",
                resource: key.key_id.clone(),
                key: name.clone(),
                value: value.clone(),
            }));
        }
        Ok(all)
    }
}
