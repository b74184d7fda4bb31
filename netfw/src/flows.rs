//! The kernel's connection tracking, as far as it has to forget: a connection that was translated once is translated for as
//! long as it lives, whatever became of the rule.
//!
//! linux/netfilter/nfnetlink_conntrack.h; messages are in the machine's byte order, addresses in the network's.

use std::io;
use std::net::Ipv4Addr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

/// `NFNL_SUBSYS_CTNETLINK`, with `IPCTNL_MSG_CT_GET` and `IPCTNL_MSG_CT_DELETE`.
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLM_F_DUMP`; `NLMSG_ERROR`, `NLMSG_DONE`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// `CTA_TUPLE_ORIG`, `CTA_TUPLE_REPLY`; within these `CTA_TUPLE_IP`, and within that `CTA_IP_V4_SRC` and `CTA_IP_V4_DST`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const V4_SRC: u16 = 1;
const V4_DST: u16 = 2;
/// A message's header, and netfilter's behind it; an attribute's.
const HEAD: usize = 16;
const FAMILY_HEAD: usize = 4;
const ATTRIBUTE_HEAD: usize = 4;

/// Forgets the connections to and from an address, as either side sees it. What goes on with them is new to the firewall.
/// Returns how many there were.
///
/// # Errors
/// The kernel does not tell them.
pub(crate) fn forget(address: Ipv4Addr) -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut found = Vec::new();
    socket.send(&message(GET, REQUEST | DUMP, &[]), 0)?;
    'all: loop {
        let (answer, _) = socket.recv_from_full()?;
        for (kind, body) in messages(&answer) {
            match kind {
                DONE => break 'all,
                ERROR => error(body)?,
                _ => found.extend(about(body.get(FAMILY_HEAD..).unwrap_or_default(), address)),
            }
        }
    }
    for tuple in &found {
        socket.send(&message(DELETE, REQUEST | ACK, tuple), 0)?;
        let (answer, _) = socket.recv_from_full()?;
        match messages(&answer).find(|(kind, _)| *kind == ERROR).map_or(Ok(()), |(_, body)| error(body)) {
            // It has ended by itself.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            done => done?,
        }
    }
    Ok(found.len())
}

/// The connection's name, an attribute whole, if it has to do with the address.
fn about(body: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let names = |kind: u16| {
        let addresses = payload(payload(body, kind)?, TUPLE_IP)?;
        let same = |end: u16| payload(addresses, end).is_some_and(|bytes| bytes == address.octets());
        (same(V4_SRC) || same(V4_DST)).then_some(())
    };
    names(ORIGINAL).or_else(|| names(REPLY))?;
    let original = payload(body, ORIGINAL)?;
    let len = u16::try_from(original.len() + ATTRIBUTE_HEAD).ok()?;
    // `NLA_F_NESTED`.
    let head = [len.to_ne_bytes(), (ORIGINAL | 0x8000).to_ne_bytes()].concat();
    Some([&head, original].concat())
}

fn message(kind: u16, flags: u16, attributes: &[u8]) -> Vec<u8> {
    let len = (HEAD + FAMILY_HEAD + attributes.len()) as u32;
    let mut bytes = len.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([libc::AF_INET as u8, 0, 0, 0]);
    bytes.extend(attributes);
    bytes
}

fn error(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code)) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

/// The messages of a datagram: their types and what is behind the header.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
        let body = bytes.get(HEAD..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// What the first attribute of a type holds.
fn payload(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
        let payload = bytes.get(ATTRIBUTE_HEAD..len)?;
        if kind == wanted {
            return Some(payload);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u16 + 4).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple(kind: u16, from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
        let ips = [attribute(1, &from), attribute(V4_DST, &to)].concat();
        let protocol = attribute(0x8002, &attribute(1, &[6]));
        attribute(kind | 0x8000, &[attribute(0x8001, &ips), protocol].concat())
    }

    #[test]
    fn connections_are_told_apart_by_where_they_lead() {
        let (host, guest, public) = ([172, 31, 0, 1], [172, 31, 0, 4], [198, 19, 0, 1]);
        let to = [tuple(ORIGINAL, host, public), tuple(REPLY, guest, host)].concat();
        let from = [tuple(ORIGINAL, guest, [8, 8, 8, 8]), tuple(REPLY, [8, 8, 8, 8], public)].concat();
        let own = [tuple(ORIGINAL, host, guest), tuple(REPLY, guest, host)].concat();
        assert_eq!(about(&to, public.into()), Some(tuple(ORIGINAL, host, public)));
        assert_eq!(about(&from, public.into()), Some(tuple(ORIGINAL, guest, [8, 8, 8, 8])));
        assert_eq!(about(&own, public.into()), None);
        assert_eq!(about(&own, guest.into()), Some(tuple(ORIGINAL, host, guest)));
        assert_eq!(about(&to, guest.into()), Some(tuple(ORIGINAL, host, public)));
        // Cut short anywhere, it is none.
        for len in 0..to.len() {
            let _ = about(&to[..len], public.into());
        }
        assert_eq!(about(&[0; 64], public.into()), None);
    }

    #[test]
    fn messages_end_where_the_datagram_does() {
        let two = [message(GET, REQUEST, &[]), message(DELETE, ACK, &[1, 2, 3, 4])].concat();
        let kinds: Vec<_> = messages(&two).map(|(kind, body)| (kind, body.len())).collect();
        assert_eq!(kinds, [(GET, 4), (DELETE, 8)]);
        for len in 0..two.len() {
            assert!(messages(&two[..len]).count() < 2);
        }
        assert_eq!(messages(&[0; 32]).count(), 0);
    }
}
