//! What comes from clients and guests over the network: forms, signatures, DHCP.

use hutch_api::query::sigv4::{Authorization, Request, escape, sign};
use hutch_api::query::{Params, table};
use hutch_netfw::dhcp::Lease;
use hutch_netfw::name::MacAddr;

pub fn run(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    match first % 4 {
        0 => form(rest),
        1 => signature(rest),
        2 => signed(rest),
        _ => dhcp(rest, first & 0x80 != 0),
    }
}

/// A form is refused, or a tree that is the same when it is written and read again.
fn form(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(params) = Params::parse(text) else { return };
    let pairs = params.flat();
    let again = pairs.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value)));
    let again = Params::parse(&again.collect::<Vec<_>>().join("&"));
    assert_eq!(again.expect("what was read can be read"), params);
    for action in ["RunInstances", "DescribeInstances", "AuthorizeSecurityGroupIngress", "CreateVolume"] {
        let _ = table::check(params.str("Action").unwrap_or(action), &params);
        for (name, _) in params.names() {
            let _ = (params.int(name), params.boolean(name), params.blob(name), params.strings(name));
        }
    }
}

/// Headers and a query of anybody's: what is said of a signature is refused, or is no signature of ours.
fn signature(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = text.split('\n');
    let query = lines.next().unwrap_or_default();
    let header = |line: &str| {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        (name.to_ascii_lowercase(), value.to_owned())
    };
    let headers: Vec<_> = lines.map(header).collect();
    for (method, body) in [("GET", &b""[..]), ("POST", bytes)] {
        let request = Request { method, query, headers: &headers, body };
        if let Ok(said) = Authorization::read(&request) {
            let now = "2026-01-01T00:00:00Z".parse().expect("a time");
            assert!(said.verify(&request, "a secret nobody knows", now).is_err());
        }
    }
}

/// What we sign is ours, and no longer when anything of it is changed.
fn signed(bytes: &[u8]) {
    let (secret, rest) = bytes.split_at(bytes.len().min(4));
    let secret = escape(&String::from_utf8_lossy(secret));
    let (&[at, by], body) = rest.split_first_chunk().unwrap_or((&[0, 1], &[]));
    let mut headers = sign("AKIA", &secret, "eu-x-1", "ec2", "localhost:4566", body);
    let now = jiff::Timestamp::now();
    let verified = |headers: &[(String, String)], body: &[u8], secret: &str| {
        let request = Request { method: "POST", query: "", headers, body };
        Authorization::read(&request).and_then(|said| said.verify(&request, secret, now)).is_ok()
    };
    assert!(verified(&headers, body, &secret));
    assert!(!verified(&headers, body, &format!("{secret}1")));
    if by == 0 {
        return;
    }
    let mut other = body.to_vec();
    match other.get_mut(usize::from(at)) {
        Some(byte) => *byte ^= by,
        None => other.push(by),
    }
    assert!(!verified(&headers, &other, &secret));
    headers[usize::from(at) % 2].1.push('1');
    assert!(!verified(&headers, body, &secret));
}

/// A packet is answered to whom it concerns, whole, or not.
fn dhcp(bytes: &[u8], raw: bool) {
    let mac = [2, 0, 0, 0, 0, 1];
    let lease = Lease {
        mac: MacAddr::new(mac).expect("an address"),
        ip: [172, 31, 0, 5].into(),
        subnet: "172.31.0.0/20".parse().expect("a network"),
        gateway: [172, 31, 0, 1].into(),
        dns: vec![[172, 31, 0, 2].into()],
        mtu: 1500,
    };
    let mut packet = vec![0; 240];
    packet[..3].copy_from_slice(&[1, 1, 6]);
    packet[28..34].copy_from_slice(&mac);
    packet[236..].copy_from_slice(&[99, 130, 83, 99]);
    if raw {
        packet.clear();
    }
    packet.extend_from_slice(bytes);
    if let Some(answer) = lease.answer(&packet) {
        assert!(answer.len() >= 300 && answer[0] == 2, "{} bytes", answer.len());
        assert!(answer[4..8] == packet[4..8] && answer[28..34] == mac, "it is another's answer");
    }
}
