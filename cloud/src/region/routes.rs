//! Internet gateways and route tables.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{Gateway, Interface, RouteTable, Subnet, Tags, Target, Vpc};

use super::vpcs::needed;
use super::{Region, Work, recall, remember, tags};

/// What a change of a route asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteChange {
    /// A new one.
    Create,
    /// Another target for one that is there.
    Replace,
}

impl Region {
    /// A route table, and its network.
    fn table_of(&self, work: &mut Work<'_>, account: &str, table: &str) -> Result<(RouteTable, Vpc)> {
        let table: RouteTable = tags::own(work, account, table)?;
        let vpc: Vpc = tags::own(work, account, &table.vpc)?;
        Ok((table, vpc))
    }

    /// Makes an internet gateway, of no network yet.
    ///
    /// # Errors
    /// Tags that cannot be.
    pub fn create_gateway(&self, account: &str, tags: &Tags) -> Result<Gateway> {
        self.ensure_account(account)?;
        tags::check(tags)?;
        let gateway = Gateway { id: id::new("igw"), account: account.into(), vpc: None, tags: tags.clone() };
        self.transact(|work| work.put(&gateway))?;
        Ok(gateway)
    }

    /// Deletes an internet gateway that is attached to nothing.
    ///
    /// # Errors
    /// `DependencyViolation`, `InvalidInternetGatewayID.*`.
    pub fn delete_gateway(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            if tags::own::<Gateway>(work, account, id)?.vpc.is_some() {
                return Err(needed("internetGateway", id));
            }
            work.delete::<Gateway>(id);
            Ok(())
        })
    }

    /// Attaches an internet gateway to a network that has none.
    ///
    /// # Errors
    /// `Resource.AlreadyAssociated`, `InvalidParameterValue`: the network has one. `InvalidInternetGatewayID.*`, `InvalidVpcID.*`.
    pub fn attach_gateway(&self, account: &str, id: &str, vpc: &str) -> Result<()> {
        self.transact_alone(|work| {
            let mut gateway: Gateway = tags::own(work, account, id)?;
            tags::own::<Vpc>(work, account, vpc)?;
            if let Some(has) = &gateway.vpc {
                let why = format!("resource {id} is already attached to network {has}");
                return Err(Fault::new("Resource.AlreadyAssociated", why));
            }
            if work.all::<Gateway>("")?.iter().any(|other| other.vpc.as_deref() == Some(vpc)) {
                let why = format!("Network {vpc} already has an internet gateway attached");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            gateway.vpc = Some(vpc.into());
            work.put(&gateway)
        })
    }

    /// Detaches an internet gateway. Routes to it are black holes then.
    ///
    /// # Errors
    /// `Gateway.NotAttached`, `DependencyViolation`: public addresses lead through it. `InvalidInternetGatewayID.*`, `InvalidVpcID.*`.
    pub fn detach_gateway(&self, account: &str, id: &str, vpc: &str) -> Result<()> {
        self.transact_alone(|work| {
            let mut gateway: Gateway = tags::own(work, account, id)?;
            tags::own::<Vpc>(work, account, vpc)?;
            if gateway.vpc.as_deref() != Some(vpc) {
                let why = format!("resource {id} is not attached to network {vpc}");
                return Err(Fault::new("Gateway.NotAttached", why));
            }
            let public = |e: &Interface| e.vpc == vpc && e.public.is_some();
            if work.all::<Interface>("")?.iter().any(public) {
                let why = format!(
                    "Network {vpc} has some mapped public address(es). Please unmap those public address(es) before detaching the gateway."
                );
                return Err(Fault::new("DependencyViolation", why));
            }
            gateway.vpc = None;
            work.put(&gateway)
        })
    }

    /// Makes a route table for subnets of a network.
    ///
    /// # Errors
    /// `InvalidVpcID.*`, tags that cannot be, `IdempotentParameterMismatch`.
    pub fn create_route_table(
        &self,
        account: &str,
        vpc: &str,
        tags: &Tags,
        (token, request): (Option<&str>, &str),
    ) -> Result<RouteTable> {
        self.ensure_account(account)?;
        tags::check(tags)?;
        let token = token.map(|token| format!("CreateRouteTable/{account}/{token}"));
        self.transact(|work| {
            let made = recall(work, token.as_deref(), request)?;
            if let Some(made) = made.as_deref().and_then(<[_]>::first) {
                return tags::own(work, account, made);
            }
            tags::own::<Vpc>(work, account, vpc)?;
            let table = RouteTable {
                id: id::new("rtb"),
                account: account.into(),
                vpc: vpc.into(),
                routes: BTreeMap::new(),
                associations: BTreeMap::new(),
                tags: tags.clone(),
            };
            work.put(&table)?;
            remember(work, token.as_deref(), request, vec![table.id.clone()])?;
            Ok(table)
        })
    }

    /// Deletes a route table that no subnet has.
    ///
    /// # Errors
    /// `DependencyViolation`, `InvalidRouteTableID.*`.
    pub fn delete_route_table(&self, account: &str, id: &str) -> Result<()> {
        self.transact(|work| {
            if !tags::own::<RouteTable>(work, account, id)?.associations.is_empty() {
                return Err(needed("routeTable", id));
            }
            work.delete::<RouteTable>(id);
            Ok(())
        })
    }

    /// Has a subnet use a route table; returns the association's id.
    ///
    /// # Errors
    /// `Resource.AlreadyAssociated`, `InvalidParameterValue`: of different networks. `InvalidRouteTableID.*`,
    /// `InvalidSubnetID.*`.
    pub fn associate_route_table(&self, account: &str, table: &str, subnet: &str) -> Result<String> {
        self.transact_alone(|work| {
            let (mut table, _) = self.table_of(work, account, table)?;
            let of: Subnet = tags::own(work, account, subnet)?;
            if of.vpc != table.vpc {
                let why = format!("Route table {} and subnet {subnet} belong to different networks", table.id);
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let has = |table: &RouteTable| table.associations.values().flatten().any(|have| have == subnet);
            if let Some(other) = work.all::<RouteTable>("")?.into_iter().find(has) {
                let why = format!(
                    "the specified association for route table {} conflicts with an existing association: {subnet} has {}",
                    table.id, other.id
                );
                return Err(Fault::new("Resource.AlreadyAssociated", why));
            }
            let id = id::new("rtbassoc");
            table.associations.insert(id.clone(), Some(subnet.into()));
            work.put(&table)?;
            Ok(id)
        })
    }

    /// The table that has an association of this id.
    fn associated(&self, work: &mut Work<'_>, account: &str, id: &str) -> Result<RouteTable> {
        id::check(id, "rtbassoc", "InvalidAssociationID")?;
        let has = |table: &RouteTable| table.account == account && table.associations.contains_key(id);
        let found = work.all::<RouteTable>("")?.into_iter().find(has);
        let found = found.ok_or_else(|| Fault::not_found("InvalidAssociationID", "association ID", id))?;
        Ok(self.table_of(work, account, &found.id)?.0)
    }

    /// Has a subnet use its network's main route table again.
    ///
    /// # Errors
    /// `InvalidAssociationID.*`, `InvalidParameterValue`: it is the main one.
    pub fn disassociate_route_table(&self, account: &str, id: &str) -> Result<()> {
        self.transact_alone(|work| {
            let mut table = self.associated(work, account, id)?;
            if table.associations.remove(id).is_some_and(|subnet| subnet.is_none()) {
                let why = format!("cannot disassociate the main route table association {id}");
                return Err(Fault::new("InvalidParameterValue", why));
            }
            work.put(&table)
        })
    }

    /// Has whoever an association is for use another table of the network; returns the new association's id.
    ///
    /// # Errors
    /// `InvalidAssociationID.*`, `InvalidRouteTableID.*`, `InvalidParameterValue`: of different networks.
    pub fn replace_association(&self, account: &str, id: &str, table: &str) -> Result<String> {
        self.transact_alone(|work| {
            let mut old = self.associated(work, account, id)?;
            let new: RouteTable = tags::own(work, account, table)?;
            if old.vpc != new.vpc {
                let why = format!("Route tables {} and {table} belong to different networks", old.id);
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let whom = old.associations.remove(id).unwrap_or_default();
            work.put(&old)?;
            // The same one as it is now, where it is the old one.
            let mut new: RouteTable = tags::own(work, account, table)?;
            let id = id::new("rtbassoc");
            new.associations.insert(id.clone(), whom);
            work.put(&new)?;
            Ok(id)
        })
    }

    /// Makes or changes a route of a table.
    ///
    /// # Errors
    /// `RouteAlreadyExists`, `UnsupportedOperation`: the host has no way by an interface. `InvalidParameterValue`, `InvalidGatewayID.NotFound`, `InvalidNetworkInterfaceID.*`,
    /// `InvalidRouteTableID.*`.
    pub fn route(
        &self,
        account: &str,
        table: &str,
        destination: Ipv4Net,
        target: &Target,
        change: RouteChange,
    ) -> Result<()> {
        self.transact(|work| {
            let (mut table, vpc) = self.table_of(work, account, table)?;
            if vpc.cidr.contains(&destination) {
                let why = format!(
                    "The destination CIDR block {destination} is equal to or more specific than one of this VPC's CIDR blocks, whose route is local"
                );
                return Err(Fault::new("InvalidParameterValue", why));
            }
            let apart = |what: &str| {
                let why = format!("route table {} and {what} belong to different networks", table.id);
                Fault::new("InvalidParameterValue", why)
            };
            match target {
                Target::Gateway(id) => {
                    let missing = || Fault::not_found("InvalidGatewayID", "gateway ID", id);
                    let gateway = work.get::<Gateway>(id)?.filter(|gateway| gateway.account == account);
                    if gateway.ok_or_else(missing)?.vpc.as_ref() != Some(&vpc.id) {
                        return Err(apart(&format!("network gateway {id}")));
                    }
                }
                Target::Interface(_) if self.host.one_machine() => {
                    let why = "On this host instances route nothing for others: a route leads to an internet gateway";
                    return Err(Fault::new("UnsupportedOperation", why));
                }
                Target::Interface(id) => {
                    if tags::own::<Interface>(work, account, id)?.vpc != vpc.id {
                        return Err(apart(&format!("interface {id}")));
                    }
                }
            }
            match (change, table.routes.get(&destination)) {
                // The same once more is what EC2 lets pass.
                (RouteChange::Create, Some(known)) if known != target => {
                    let why = format!("The route identified by {destination} already exists.");
                    return Err(Fault::new("RouteAlreadyExists", why));
                }
                (RouteChange::Replace, None) => {
                    let why = format!(
                        "There is no route defined for '{destination}' in the route table. Use CreateRoute instead."
                    );
                    return Err(Fault::new("InvalidParameterValue", why));
                }
                _ => {}
            }
            table.routes.insert(destination, target.clone());
            work.put(&table)
        })
    }

    /// Takes a route from a table.
    ///
    /// # Errors
    /// `InvalidRoute.NotFound`, `InvalidParameterValue`: the local one. `InvalidRouteTableID.*`.
    pub fn delete_route(&self, account: &str, table: &str, destination: Ipv4Net) -> Result<()> {
        self.transact(|work| {
            let (mut table, vpc) = self.table_of(work, account, table)?;
            if destination == vpc.cidr {
                let why = format!("cannot remove local route {destination} in route table {}", table.id);
                return Err(Fault::new("InvalidParameterValue", why));
            }
            if table.routes.remove(&destination).is_none() {
                let why =
                    format!("no route with destination-cidr-block {destination} in route table {}", table.id);
                return Err(Fault::new("InvalidRoute.NotFound", why));
            }
            work.put(&table)
        })
    }
}
