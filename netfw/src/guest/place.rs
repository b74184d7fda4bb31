//! Where a guest belongs, which may change while it is up: its groups, its network, its addresses beside the first.

use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;

use super::{Address, GuestNet, NetError, elastic};
use crate::flows;
use crate::kept::{Kept, Record};
use crate::tap::{Route, TapError};

impl GuestNet {
    /// Has it be in these security groups, and no others, in this network, and have these addresses beside its first. What
    /// groups say is told by [`crate::set_groups`].
    ///
    /// # Errors
    /// [`NetError::Led`]: another guest has one of the addresses; it has those that are free, and the rest is done.
    /// [`NetError::State`] or [`NetError::Firewall`]; the rules are then as they were, or are mended by the next call.
    pub fn place(&mut self, address: &Address) -> Result<(), NetError> {
        let Address { groups, network, .. } = address;
        if (&self.guest.groups, &self.guest.network, &self.guest.more) == (groups, network, &address.more) {
            return Ok(());
        }
        let mut kept = Kept::open(&self.state)?;
        let (mut more, mut led) = (address.more.clone(), Ok(()));
        more.retain(|ip| {
            let other = kept.records.iter().find(|record| record.ip != self.ip && record.has(*ip));
            if let Some(other) = other {
                led = Err(NetError::Led { ip: *ip, by: other.ip });
            }
            other.is_none()
        });
        let own = self.own(&mut kept)?;
        let gone: Vec<Ipv4Addr> = own.more.iter().copied().filter(|ip| !more.contains(ip)).collect();
        // Who has it next must not be sent what was this one's.
        gone.iter().for_each(|ip| unroute(own, *ip));
        (own.groups, own.network, own.more) = (groups.clone(), network.clone(), more.clone());
        kept.put()?;
        for ip in gone {
            let _ = flows::forget(ip);
        }
        self.route_more(&mut kept)?;
        self.guest.groups.clone_from(groups);
        (self.guest.network, self.guest.more) = (network.clone(), more);
        led
    }

    /// Its addresses beside the first.
    pub fn more(&self) -> &[Ipv4Addr] {
        &self.guest.more
    }

    /// Routes what is recorded beside its first address, also where whoever recorded it was killed before that was done.
    pub(super) fn route_more(&self, kept: &mut Kept) -> Result<(), NetError> {
        let own = self.own(kept)?;
        if own.more.is_empty() {
            return Ok(());
        }
        let refused = |source| TapError::Refused {
            tap: self.guest.tap.clone(),
            what: "route one more of the guest's addresses",
            source,
        };
        let mut kernel = Route::open().map_err(refused)?;
        for ip in &own.more {
            let route = elastic::route(own, *ip).map_err(refused)?;
            kernel
                .ask(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
                .map_err(refused)?;
        }
        Ok(())
    }
}

/// Takes the route to one more of a guest's addresses away; where it is not, nothing happens.
fn unroute(record: &Record, ip: Ipv4Addr) {
    if let (Ok(mut kernel), Ok(route)) = (Route::open(), elastic::route(record, ip)) {
        let _ = kernel.ask(RouteNetlinkMessage::DelRoute(route), 0);
    }
}
