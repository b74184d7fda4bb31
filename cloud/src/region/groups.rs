//! Security groups and their rules, as records.

use std::collections::BTreeMap;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Group, Interface, Name, Peer, Rule, Tags};

use super::{Region, Work, firewall, tags};

/// A rule as it is asked for.
pub type RuleAsk = Rule;

/// A group of the account.
pub(super) fn own(work: &mut Work<'_>, account: &str, id: &str) -> Result<Group> {
    id::check(id, "sg", "InvalidGroupId")?;
    let missing = || Fault::new("InvalidGroup.NotFound", format!("The security group '{id}' does not exist"));
    work.get::<Group>(id)?.filter(|group| group.account == account).ok_or_else(missing)
}

impl Region {
    /// Makes a group; it lets everything out and nothing in.
    ///
    /// # Errors
    /// `InvalidGroup.Duplicate`, `InvalidParameterValue`, `InvalidVpcID.*`.
    pub fn create_group(
        &self,
        account: &str,
        name: &str,
        description: &str,
        vpc: Option<&str>,
        tags: &Tags,
    ) -> Result<Group> {
        self.ensure_account(account)?;
        tags::check(tags)?;
        let known = |c: char| c.is_ascii_alphanumeric() || " ._-:/()#,@[]+=&;{}!$*".contains(c);
        for (parameter, text) in [("groupName", name), ("groupDescription", description)] {
            if text.is_empty() || text.len() > 255 || !text.chars().all(known) {
                let why = "It has 1 to 255 letters, digits, spaces and ._-:/()#,@[]+=&;{}!$*.";
                return Err(Fault::value(parameter, text, why));
            }
        }
        if name.starts_with("sg-") {
            return Err(Fault::value("groupName", name, "It may not start with sg-."));
        }
        if name == "default" {
            return Err(Fault::new("InvalidGroup.Reserved", "The security group 'default' is reserved"));
        }
        self.transact(|work| {
            let vpc = self.vpc_or_default(work, account, vpc)?.id;
            let taken = format!("group/{vpc}/{name}");
            if work.get::<Name>(&taken)?.is_some() {
                let why = format!("The security group '{name}' already exists for VPC '{vpc}'");
                return Err(Fault::new("InvalidGroup.Duplicate", why));
            }
            self.check_groups(work, &vpc)?;
            let all = Rule {
                egress: true,
                protocol: "-1".into(),
                from: -1,
                to: -1,
                peer: Peer::Ipv4(ipnet::Ipv4Net::default()),
                description: None,
            };
            let group = Group {
                id: id::new("sg"),
                account: account.into(),
                name: name.into(),
                description: description.into(),
                vpc: vpc.clone(),
                rules: [(id::new("sgr"), all)].into(),
                rule_tags: BTreeMap::new(),
                tags: tags.clone(),
            };
            work.put(&Name { id: taken, of: group.id.clone() })?;
            work.put(&group)?;
            Ok(group)
        })
    }

    /// The group of this id, or of this name in the default network.
    ///
    /// # Errors
    /// `InvalidGroup.NotFound`, `MissingParameter`.
    pub fn group_id(&self, account: &str, id: Option<&str>, name: Option<&str>) -> Result<String> {
        self.ensure_account(account)?;
        match (id, name) {
            (Some(id), _) => Ok(id.into()),
            (None, Some(name)) => {
                let vpc = self.default_vpc(account);
                let why = || format!("The security group '{name}' does not exist in default VPC '{vpc}'");
                let known = self.get::<Name>(&format!("group/{vpc}/{name}"))?;
                Ok(known.ok_or_else(|| Fault::new("InvalidGroup.NotFound", why()))?.of)
            }
            (None, None) => Err(Fault::missing("GroupId")),
        }
    }

    /// Deletes a group that nothing uses.
    ///
    /// # Errors
    /// `DependencyViolation`, `CannotDelete`, `InvalidGroup.NotFound`.
    pub fn delete_group(&self, account: &str, id: &str) -> Result<()> {
        self.transact_alone(|work| {
            let group = own(work, account, id)?;
            if group.name == "default" {
                let why =
                    format!("the specified group: \"{id}\" name: \"default\" cannot be deleted by a user");
                return Err(Fault::new("CannotDelete", why));
            }
            let used = Fault::new("DependencyViolation", format!("resource {id} has a dependent object"));
            if work.all::<Interface>("")?.iter().any(|interface| interface.groups.iter().any(|g| g == id)) {
                return Err(used);
            }
            let names = |rule: &Rule| matches!(&rule.peer, Peer::Group(other) if other == id);
            let others = work.all::<Group>("")?;
            if others.iter().any(|other| other.id != id && other.rules.values().any(names)) {
                return Err(used);
            }
            work.delete::<Name>(&format!("group/{}/{}", group.vpc, group.name));
            work.delete::<Group>(id);
            Ok(())
        })
    }

    /// Adds rules to a group, each with these tags; returns them with their ids.
    ///
    /// # Errors
    /// `InvalidParameterValue`, `InvalidPermission.Duplicate`, `RulesPerSecurityGroupLimitExceeded`, `InvalidGroup.NotFound`.
    pub fn authorize(
        &self,
        account: &str,
        id: &str,
        rules: &[RuleAsk],
        tags: &Tags,
    ) -> Result<Vec<(String, Rule)>> {
        tags::check(tags)?;
        self.transact(|work| {
            let mut group = own(work, account, id)?;
            let mut added = Vec::new();
            for rule in rules {
                check_peer(work, account, &group, rule)?;
                firewall::compiled(rule)?;
                if group.rules.values().any(|have| same(have, rule)) {
                    let why = format!("the specified rule \"{}\" already exists", tell(rule));
                    return Err(Fault::new("InvalidPermission.Duplicate", why));
                }
                let id = id::new("sgr");
                group.rules.insert(id.clone(), rule.clone());
                if !tags.is_empty() {
                    group.rule_tags.insert(id.clone(), tags.clone());
                }
                added.push((id, rule.clone()));
            }
            let most = self.settings.limits.rules_per_group;
            for egress in [false, true] {
                if group.rules.values().filter(|rule| rule.egress == egress).count() > most as usize {
                    let why = format!("A security group has at most {most} rules each way");
                    return Err(Fault::new("RulesPerSecurityGroupLimitExceeded", why));
                }
            }
            work.put(&group)?;
            Ok(added)
        })
    }

    /// Takes rules from a group, by what they say or by their ids.
    ///
    /// # Errors
    /// `InvalidPermission.NotFound`, `InvalidSecurityGroupRuleId.NotFound`, `InvalidGroup.NotFound`.
    pub fn revoke(
        &self,
        account: &str,
        id: &str,
        egress: bool,
        rules: &[RuleAsk],
        ids: &[String],
    ) -> Result<()> {
        self.transact(|work| {
            let mut group = own(work, account, id)?;
            for rule in rules {
                let known = group.rules.iter().find(|(_, have)| same(have, rule)).map(|(id, _)| id.clone());
                let missing = || {
                    let why =
                        format!("The specified rule does not exist in this security group: {}", tell(rule));
                    Fault::new("InvalidPermission.NotFound", why)
                };
                group.rules.remove(&known.ok_or_else(missing)?);
            }
            for rule in ids {
                if group.rules.remove(rule).is_none_or(|had| had.egress != egress) {
                    let why = format!("The security group rule ID '{rule}' does not exist");
                    return Err(Fault::new("InvalidSecurityGroupRuleId.NotFound", why));
                }
            }
            let rules = &group.rules;
            group.rule_tags.retain(|id, _| rules.contains_key(id));
            work.put(&group)
        })
    }

    /// Changes rules of a group: what `job` makes of the rule with each id.
    ///
    /// # Errors
    /// `InvalidParameterValue`, `InvalidSecurityGroupRuleId.NotFound`, `InvalidPermission.NotFound`, `InvalidGroup.NotFound`.
    pub fn modify_rules(
        &self,
        account: &str,
        id: &str,
        job: impl Fn(&mut BTreeMap<String, Rule>) -> Result<()>,
    ) -> Result<()> {
        self.transact(|work| {
            let mut group = own(work, account, id)?;
            let before = group.rules.clone();
            job(&mut group.rules)?;
            for (id, rule) in &group.rules {
                if before.get(id).is_none_or(|had| !same(had, rule)) {
                    firewall::compiled(rule)?;
                    check_peer(work, account, &group, rule)?;
                    if group.rules.iter().any(|(other, have)| other != id && same(have, rule)) {
                        let why = format!("the specified rule \"{}\" already exists", tell(rule));
                        return Err(Fault::new("InvalidPermission.Duplicate", why));
                    }
                }
            }
            work.put(&group)
        })
    }
}

/// A group that a rule names is of the same network: the addresses of another's members mean others here.
fn check_peer(work: &mut Work<'_>, account: &str, group: &Group, rule: &Rule) -> Result<()> {
    let Peer::Group(other) = &rule.peer else { return Ok(()) };
    if own(work, account, other)?.vpc != group.vpc {
        let why = format!("The security groups '{}' and '{other}' belong to different networks.", group.id);
        return Err(Fault::new("InvalidGroup.NotFound", why));
    }
    Ok(())
}

/// Whether two rules say the same; what their owner says of them does not count.
pub fn same(a: &Rule, b: &Rule) -> bool {
    (a.egress, &a.protocol, a.from, a.to, &a.peer) == (b.egress, &b.protocol, b.from, b.to, &b.peer)
}

fn tell(rule: &Rule) -> String {
    let peer = match &rule.peer {
        Peer::Ipv4(net) => net.to_string(),
        Peer::Ipv6(net) => net.to_string(),
        Peer::Group(id) | Peer::PrefixList(id) => id.clone(),
    };
    format!("peer: {peer}, {}, from port: {}, to port: {}, ALLOW", rule.protocol, rule.from, rule.to)
}
