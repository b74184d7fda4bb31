//! A guest's public address: where it leads is a route and a few elements of maps; on the host's own network it is announced
//! by a neighbour entry of the uplink.
//!
//! The host does not take the address itself: it would be the host's services that answer there whenever no guest does. It
//! routes it to the guest's tap, and has the uplink answer for it and for no other (proxy ARP for one address, which the
//! kernel does where an address is routed to another link).

use std::io;
use std::net::Ipv4Addr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use serde::{Deserialize, Serialize};

use super::{GuestNet, NetError};
use crate::flows;
use crate::kept::{Kept, Record, gateway};
use crate::name::TapName;
use crate::nft::nat;
use crate::tap::{Route, TapError};

/// A public address that leads to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Public {
    /// The address.
    pub ip: Ipv4Addr,
    /// It is of the uplink's network: announced there, and what the guest is known by there.
    pub lan: bool,
}

/// It as recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Published {
    ip: Ipv4Addr,
    lan: bool,
    /// Where it is announced.
    uplink: Option<String>,
}

impl Published {
    pub(super) fn told(&self) -> Public {
        Public { ip: self.ip, lan: self.lan }
    }

    fn pair(&self, record: &Record) -> Option<nat::Pair> {
        let tap = record.tap.parse().ok()?;
        Some(nat::Pair { public: self.ip, private: record.ip, tap, lan: self.lan })
    }
}

/// Where the public addresses of these guests lead.
pub(crate) fn pairs(records: &[Record]) -> Vec<nat::Pair> {
    records.iter().filter_map(|record| record.public.as_ref()?.pair(record)).collect()
}

/// Takes the route to a guest's public address away, and what announces it; where they are not, nothing happens.
pub(crate) fn withdraw(record: &Record) {
    let Some(published) = &record.public else { return };
    if let Ok(mut kernel) = Route::open() {
        if let Ok(route) = route(record, published.ip) {
            let _ = kernel.ask(RouteNetlinkMessage::DelRoute(route), 0);
        }
        if let Some(Ok(announced)) = published.uplink.as_deref().map(|link| announced(published.ip, link)) {
            let _ = kernel.ask(RouteNetlinkMessage::DelNeighbour(announced), 0);
        }
    }
}

/// Ends the connections by a guest's public address, once the firewall leads nothing there any more: those that are open
/// would go on, and come back before. Where the kernel does not tell them, they do.
pub(crate) fn forget(record: &Record) {
    if let Some(published) = &record.public {
        let _ = flows::forget(published.ip);
    }
}

/// Routes a guest's public address to its tap, and announces it.
fn publish(record: &Record, published: &Published) -> Result<(), NetError> {
    let tap: TapName = record.tap.parse().map_err(|_| NetError::Gone(record.ip))?;
    let refused = |what| {
        let tap = tap.clone();
        move |source| TapError::Refused { tap, what, source }
    };
    let mut kernel = Route::open().map_err(refused("talk to the kernel"))?;
    let what = "route the guest's public address";
    let route = route(record, published.ip).map_err(refused(what))?;
    let anew = NLM_F_CREATE | NLM_F_REPLACE;
    kernel.ask(RouteNetlinkMessage::NewRoute(route), anew).map_err(refused(what))?;
    if let Some(link) = &published.uplink {
        let what = "announce the guest's public address";
        let announced = announced(published.ip, link).map_err(refused(what))?;
        kernel.ask(RouteNetlinkMessage::NewNeighbour(announced), anew).map_err(refused(what))?;
    }
    Ok(())
}

pub(super) fn route(record: &Record, public: Ipv4Addr) -> io::Result<RouteMessage> {
    let index = nix::net::if_::if_nametoindex(record.tap.as_str())?;
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.destination_prefix_length = 32;
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.protocol = RouteProtocol::Static;
    route.header.scope = RouteScope::Link;
    route.header.kind = RouteType::Unicast;
    let host = gateway(record.subnet);
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(public)),
        RouteAttribute::PrefSource(RouteAddress::Inet(host)),
        RouteAttribute::Oif(index),
    ];
    Ok(route)
}

fn announced(public: Ipv4Addr, link: &str) -> io::Result<NeighbourMessage> {
    let mut neighbour = NeighbourMessage::default();
    neighbour.header.family = AddressFamily::Inet;
    neighbour.header.ifindex = nix::net::if_::if_nametoindex(link)?;
    neighbour.header.flags = NeighbourFlags::Proxy;
    neighbour.attributes = vec![NeighbourAttribute::Destination(NeighbourAddress::Inet(public))];
    Ok(neighbour)
}

/// Whether the host itself has the address.
fn is_own(ip: Ipv4Addr) -> bool {
    let addresses = nix::ifaddrs::getifaddrs().into_iter().flatten();
    addresses.filter_map(|a| Some(a.address?.as_sockaddr_in()?.ip())).any(|own| own == ip)
}

impl GuestNet {
    /// The public address that leads to the guest.
    pub fn public(&self) -> Option<Public> {
        self.public.as_ref().map(Published::told)
    }

    /// Has this public address lead to the guest, and no other. The firewall stays as it is.
    ///
    /// # Errors
    /// [`NetError::Led`]: it leads to another guest, which has to let it go first; [`NetError::Own`]: it is the host's. Then
    /// none leads to the guest; so it is with other errors, or the next call mends it.
    pub fn lead(&mut self, public: Option<Public>) -> Result<(), NetError> {
        if self.public() == public {
            return Ok(());
        }
        let mut kept = Kept::open(&self.state)?;
        let led = |record: &&Record| {
            record.ip != self.ip
                && public.is_some_and(|public| record.public.as_ref().is_some_and(|p| p.ip == public.ip))
        };
        let led = kept.records.iter().find(led).map(|record| record.ip);
        self.retract(&mut kept)?;
        let Some(Public { ip, lan }) = public else { return Ok(()) };
        if let Some(by) = led {
            return Err(NetError::Led { ip, by });
        }
        if is_own(ip) {
            return Err(NetError::Own(ip));
        }
        let uplink = kept.uplink.as_ref().filter(|_| lan).map(ToString::to_string);
        let own = self.own(&mut kept)?;
        own.public = Some(Published { ip, lan, uplink });
        let own = own.clone();
        // Recorded before it is routed, so that whatever happens next can be undone by someone else.
        let done = kept.put().and_then(|()| republish(&own));
        if done.is_err() {
            self.retract(&mut kept)?;
            return done;
        }
        self.public = own.public;
        Ok(())
    }

    /// Routes and announces what is recorded, also where whoever recorded it was killed before that was done. What cannot be
    /// is let go, and asked for again by whoever knows that it should be.
    pub(super) fn take_up(&mut self, kept: &mut Kept, public: Option<Published>) {
        let Ok(own) = self.own(kept) else { return };
        if republish(own).is_ok() {
            self.public = public;
        } else {
            withdraw(own);
            own.public = None;
        }
    }

    pub(super) fn own<'a>(&self, kept: &'a mut Kept) -> Result<&'a mut Record, NetError> {
        kept.records.iter_mut().find(|record| record.ip == self.ip).ok_or(NetError::Gone(self.ip))
    }

    /// Has no public address lead to the guest, and records that.
    fn retract(&mut self, kept: &mut Kept) -> Result<(), NetError> {
        let own = self.own(kept)?;
        let was = own.clone();
        withdraw(own);
        own.public = None;
        self.public = None;
        kept.put()?;
        forget(&was);
        Ok(())
    }
}

/// Routes and announces what is recorded.
pub(crate) fn republish(record: &Record) -> Result<(), NetError> {
    record.public.as_ref().map_or(Ok(()), |published| publish(record, published))
}

#[cfg(test)]
mod tests;
