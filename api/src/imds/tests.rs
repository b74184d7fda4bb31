use hutch_cloud::metadata::Card;
use proptest::prelude::*;

use super::*;

fn metadata() -> Metadata {
    Metadata {
        account_id: "123456789012".into(),
        instance_id: "i-0123456789abcdef0".into(),
        instance_type: "t3.micro".into(),
        hostname: "ip-172-31-0-4.home-1.internal".into(),
        local_ipv4: Some([172, 31, 0, 4].into()),
        mac: "02:68:ac:1f:00:04".into(),
        availability_zone: "home-1a".into(),
        region: "home-1".into(),
        public_keys: vec![
            ("me".into(), "ssh-ed25519 AAAA me\n".into()),
            ("you".into(), "ssh-rsa BBBB".into()),
        ],
        user_data: Some(b"#!/bin/sh\n\xff".to_vec()),
        ..Metadata::default()
    }
}

struct Guest(Document, Secret);

impl Guest {
    fn new(metadata: &Metadata) -> Guest {
        Guest(metadata.into(), Secret::random())
    }
    fn ask(&self, method: Method, path: &str, headers: &[(&'static str, &str)]) -> (u16, Vec<u8>) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let response = answer(&self.0, &self.1, &method, path, &map);
        (response.status().as_u16(), response.into_body())
    }
    fn get(&self, path: &str) -> Option<String> {
        match self.ask(Method::GET, path, &[]) {
            (200, body) => Some(String::from_utf8(body).unwrap()),
            (404, _) => None,
            other => panic!("{other:?}"),
        }
    }
}

/// Walks as cloud-init does: a listed name that ends in a slash is a directory, every other one must be there.
fn walk(guest: &Guest, directory: &str, found: &mut Vec<String>) {
    for name in guest.get(directory).unwrap_or_else(|| panic!("{directory} is listed, not served")).lines() {
        match name.split_once('=') {
            Some((index, _)) if directory.ends_with("public-keys/") => {
                found.push(guest.get(&format!("{directory}{index}/openssh-key")).unwrap());
            }
            _ if name.ends_with('/') => walk(guest, &format!("{directory}{name}"), found),
            _ => found.push(guest.get(&format!("{directory}{name}")).unwrap()),
        }
    }
}

#[test]
fn a_kernel_of_its_own_is_told_where_it_has_one() {
    let plain = Guest::new(&metadata());
    let own = Metadata { kernel_id: "aki-1".into(), ramdisk_id: "ari-1".into(), ..metadata() };
    let own = Guest::new(&own);
    for (leaf, id) in [("kernel-id", "aki-1"), ("ramdisk-id", "ari-1")] {
        assert_eq!(plain.get(&format!("/latest/meta-data/{leaf}")), None);
        assert!(!plain.get("/latest/meta-data/").unwrap().contains(leaf), "a listed leaf has to be there");
        assert_eq!(own.get(&format!("/latest/meta-data/{leaf}")).unwrap(), id);
        assert!(own.get("/latest/meta-data/").unwrap().lines().any(|name| name == leaf));
    }
    let document = own.get("/latest/dynamic/instance-identity/document").unwrap();
    assert!(document.contains("\"kernelId\": \"aki-1\"") && document.contains("\"ramdiskId\": \"ari-1\""));
}

#[test]
fn all_that_is_listed_is_served_and_only_that() {
    let guest = Guest::new(&metadata());
    let mut found = Vec::new();
    walk(&guest, "/2021-03-23/meta-data/", &mut found);
    walk(&guest, "/latest/dynamic/", &mut found);
    assert!(
        found.iter().all(|text| !text.is_empty()),
        "an empty leaf breaks the walks of clients: {found:?}"
    );
    assert!(found.contains(&"ssh-ed25519 AAAA me".to_owned()) && found.contains(&"home-1a".to_owned()));
    assert_eq!(guest.get("/latest").unwrap(), "dynamic/\nmeta-data/\nuser-data");
    assert_eq!(guest.get("/latest/meta-data/public-keys").unwrap(), "0=me\n1=you");
    assert_eq!(guest.get("/1.0/meta-data/placement/").unwrap(), "availability-zone\nregion");
    assert_eq!(guest.get("/latest/meta-data/instance-id/"), guest.get("//latest/meta-data//instance-id"));
    for absent in [
        "/latest/meta-data/public-ipv4",
        "/latest/meta-data/inst",
        "/2021-3-23/meta-data/",
        "/x",
        "/latest/spot",
    ] {
        assert_eq!(guest.get(absent), None, "{absent}");
    }
}

#[test]
fn a_public_address_is_told_where_there_is_one() {
    let public = Metadata {
        public_ipv4: Some([198, 19, 0, 1].into()),
        public_hostname: "ec2-198-19-0-1.home-1.internal".into(),
        ..metadata()
    };
    let guest = Guest::new(&public);
    walk(&guest, "/latest/meta-data/", &mut Vec::new());
    let card = "/latest/meta-data/network/interfaces/macs/02:68:ac:1f:00:04";
    assert_eq!(guest.get("/latest/meta-data/public-ipv4").unwrap(), "198.19.0.1");
    assert_eq!(guest.get("/latest/meta-data/public-hostname").unwrap(), "ec2-198-19-0-1.home-1.internal");
    assert_eq!(guest.get(&format!("{card}/public-ipv4s")).unwrap(), "198.19.0.1");
    assert_eq!(guest.get(&format!("{card}/ipv4-associations/")).unwrap(), "198.19.0.1");
    assert_eq!(guest.get(&format!("{card}/ipv4-associations/198.19.0.1")).unwrap(), "172.31.0.4");
}

#[test]
fn each_interface_is_told_with_all_its_addresses() {
    let card = |n: u8, ips: &[u8]| Card {
        device_number: n.into(),
        mac: format!("02:00:00:00:00:0{n}"),
        local_ipv4s: ips.iter().map(|last| [10, 0, 1, *last].into()).collect(),
        subnet_cidr: "10.0.1.0/24".into(),
        security_groups: vec![("sg-1".into(), "web".into())],
        ..Card::default()
    };
    let guest = Guest::new(&Metadata { cards: vec![card(1, &[4, 5]), card(2, &[9])], ..metadata() });
    walk(&guest, "/latest/meta-data/", &mut Vec::new());
    let macs = "/latest/meta-data/network/interfaces/macs/";
    assert_eq!(guest.get(macs).unwrap(), "02:00:00:00:00:01/\n02:00:00:00:00:02/");
    let of = |n, name: &str| guest.get(&format!("{macs}02:00:00:00:00:0{n}/{name}")).unwrap();
    assert_eq!(of(1, "local-ipv4s"), "10.0.1.4\n10.0.1.5");
    assert_eq!(
        [of(2, "local-ipv4s"), of(2, "device-number"), of(2, "security-groups")],
        ["10.0.1.9", "2", "web"]
    );
}

#[test]
fn user_data_are_bytes_and_absent_when_not_given() {
    let guest = Guest::new(&metadata());
    assert_eq!(guest.ask(Method::GET, "/latest/user-data", &[]), (200, b"#!/bin/sh\n\xff".to_vec()));
    let guest = Guest::new(&Metadata { user_data: None, ..metadata() });
    assert_eq!(guest.get("/latest/user-data"), None);
}

#[test]
fn the_identity_document_is_json() {
    let document = Guest::new(&metadata()).get("/latest/dynamic/instance-identity/document").unwrap();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["instanceId"], "i-0123456789abcdef0");
    assert_eq!(document["privateIp"], "172.31.0.4");
}

#[test]
fn version_2_takes_a_token_of_this_instance() {
    let required = Options { tokens_required: true, ..Options::default() };
    let guest = Guest::new(&Metadata { options: required, ..metadata() });
    let path = "/latest/meta-data/instance-id";
    let put = |ttl: &str| guest.ask(Method::PUT, "/latest/api/token", &[(TTL, ttl)]);
    assert_eq!(guest.ask(Method::GET, path, &[]).0, 401);
    let (status, token) = put("21600");
    assert_eq!(status, 200);
    let token = String::from_utf8(token).unwrap();
    assert_eq!(guest.ask(Method::GET, path, &[(TOKEN, &token)]), (200, b"i-0123456789abcdef0".to_vec()));
    for bad in ["0", "21601", "-1", "x", ""] {
        assert_eq!(put(bad).0, 400, "{bad:?}");
    }
    assert_eq!(guest.ask(Method::PUT, "/latest/api/token", &[]).0, 400);
    assert_eq!(
        guest.ask(Method::PUT, "/latest/api/token", &[(TTL, "60"), ("x-forwarded-for", "1.2.3.4")]).0,
        403
    );
    assert_eq!(guest.ask(Method::PUT, path, &[(TTL, "60")]).0, 405);
    assert_eq!(guest.ask(Method::POST, path, &[(TOKEN, &token)]).0, 405);
    // Another instance's, with the same secret; and a wrong one even where none is needed.
    let other = Metadata { instance_id: "i-0123456789abcdef1".into(), ..metadata() };
    let other = Guest((&other).into(), guest.1.clone());
    assert_eq!(other.ask(Method::GET, path, &[(TOKEN, &token)]).0, 401);
    assert_eq!(other.ask(Method::GET, path, &[(TOKEN, "x")]).0, 401);
    assert_eq!(other.ask(Method::GET, path, &[]).0, 200);
}

#[test]
fn tokens_end() {
    let secret = Secret::random();
    let token = secret.issue("i-1", 60, 1000);
    assert_eq!(secret.verify("i-1", token.as_bytes(), 1000), Some(60));
    assert_eq!(secret.verify("i-1", token.as_bytes(), 1059), Some(1));
    assert_eq!(secret.verify("i-1", token.as_bytes(), 1060), None);
    assert_eq!(Secret::random().verify("i-1", token.as_bytes(), 1000), None);
}

#[test]
fn a_service_that_is_off_says_nothing() {
    let off = Options { enabled: false, ..Options::default() };
    let guest = Guest::new(&Metadata { options: off, ..metadata() });
    assert_eq!(guest.ask(Method::GET, "/latest/meta-data/", &[]).0, 403);
    assert_eq!(guest.ask(Method::PUT, "/latest/api/token", &[(TTL, "60")]).0, 403);
}

proptest! {
    #[test]
    fn any_path_and_token_are_survived(path in "[/a-z0-9.é-]{0,40}", token in "[ -~]{0,80}") {
        let guest = Guest::new(&metadata());
        let (status, _) = guest.ask(Method::GET, &path, &[(TOKEN, &token)]);
        prop_assert_eq!(status, 401);
        prop_assert!(matches!(guest.ask(Method::GET, &path, &[]).0, 200 | 404));
    }
}

/// Over a real socket: tokens, a client that says nothing, and one that says too much.
#[test]
fn it_is_served_over_http() {
    use std::io::{Read, Write};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let shared: Shared = Arc::new(RwLock::new(Arc::new((&metadata()).into())));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.spawn(serve(listener, shared.clone(), Secret::random()));
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        // A server that hangs up in the middle of a request may reset the connection.
        let _ = stream.read_to_string(&mut text);
        text
    };
    let close = "Host: h\r\nConnection: close\r\n\r\n";
    let token = ask(&format!("PUT /latest/api/token HTTP/1.1\r\n{TTL}: 60\r\n{close}"));
    let token = token.rsplit("\r\n\r\n").next().unwrap();
    let text = ask(&format!("GET /latest/meta-data/mac HTTP/1.1\r\n{TOKEN}: {token}\r\n{close}"));
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("02:68:ac:1f:00:04"), "{text}");
    let silent = std::net::TcpStream::connect(address).unwrap();
    let text = ask(&format!("GET /{} HTTP/1.1\r\n{close}", "x".repeat(64 << 10)));
    assert!(!text.starts_with("HTTP/1.1 200"), "{text}");
    // It has said all it will, and waits for the answer.
    for _ in 0..200 {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(format!("GET /latest/meta-data/mac HTTP/1.1\r\n{close}").as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
    // What is told may change meanwhile.
    let changed = Metadata { instance_type: "t3.large".into(), ..metadata() };
    *shared.write().unwrap() = Arc::new((&changed).into());
    assert!(ask(&format!("GET /latest/meta-data/instance-type HTTP/1.1\r\n{close}")).ends_with("t3.large"));
    drop(silent);
}

/// By IPv6 it says something only where that is enabled, also while it runs.
#[test]
fn it_is_served_over_ipv6_where_that_is_wanted() {
    use std::io::{Read, Write};
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        eprintln!("SKIPPED: no IPv6 here");
        return;
    };
    let address = listener.local_addr().unwrap();
    let with = |ipv6| Metadata { options: Options { ipv6, ..Options::default() }, ..metadata() };
    let shared: Shared = Arc::new(RwLock::new(Arc::new((&with(false)).into())));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.spawn(serve(listener, shared.clone(), Secret::random()));
    let ask = |request: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "{request} HTTP/1.1\r\n{TTL}: 60\r\nHost: h\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    for (ipv6, status) in [(false, "403"), (true, "200"), (false, "403")] {
        *shared.write().unwrap() = Arc::new((&with(ipv6)).into());
        for request in ["GET /latest/meta-data/mac", "PUT /latest/api/token"] {
            assert!(ask(request).starts_with(&format!("HTTP/1.1 {status}")), "{ipv6}: {request}");
        }
    }
}
