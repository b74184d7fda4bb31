//! Any bytes: an answer that blames the client, or none; never a silence, and never an end for others.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hutch_api::query::server::Limits;
use proptest::collection::vec;
use proptest::prelude::*;

use super::client::{exchange, hear, signed, start};

/// Panics of the server's own code: to the client one looks like a hang-up.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn address() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.location().is_some_and(|location| location.file().contains("src/query/")) {
                PANICS.fetch_add(1, Ordering::Relaxed);
            }
            told(panic);
        }));
        start(Limits { patience: Duration::from_millis(500), ..Limits::default() }).address
    })
}

fn one_of(all: &'static [&'static str]) -> impl Strategy<Value = String> {
    proptest::sample::select(all).prop_map(str::to_owned)
}

/// What looks like a request.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let line = one_of(&[
        "POST / HTTP/1.1",
        "GET /?Action=Echo HTTP/1.1",
        "GET /?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKID/20150830/r/ec2/aws4_request&X-Amz-Signature=%ff&\
         X-Amz-SignedHeaders=host&X-Amz-Expires=99999999999999999999&X-Amz-Date=20150830T123600Z HTTP/1.1",
        "HEAD / HTTP/1.0",
        "\u{e9} / HTTP/1.1",
    ]);
    let header = one_of(&[
        "Host: h",
        "X-Amz-Date: 20150830T123600Z",
        "X-Amz-Date: 99999999T999999Z",
        "Date: Sun, 99 Aug 2015 12:36:00 GMT",
        "Authorization: AWS4-HMAC-SHA256",
        "Authorization: AWS4-HMAC-SHA256 Credential=////, SignedHeaders=;, Signature=",
        "Authorization: AWS4-HMAC-SHA256 Credential=AKID/20150830/r/ec2/aws4_request, SignedHeaders=host, Signature=0g",
        "Authorization: AWS4-HMAC-SHA256 Credential=AKID/20150830/r/ec2/aws4_request, SignedHeaders=host, Signature=\
         5fa00fa31553b73ebf1942676e86291e8372ff2a2260956d9b8aae1d763fbf31",
        "Content-Length: 4",
        "Content-Length: 18446744073709551615",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "\u{e9}: \u{e9}",
        "X-Amz-Other: \u{e9}",
    ]);
    let body = one_of(&[
        "",
        "Action=Echo",
        "4\r\nabcd\r\n0\r\n\r\n",
        "ffffffffffffffffff\r\n",
        "A=%f&A.=&.",
        "\u{e9}",
    ]);
    (line, vec(header, 0..6), body).prop_map(|(line, headers, body)| {
        format!("{line}\r\n{}\r\n\r\n{body}", headers.join("\r\n")).into_bytes()
    })
}

/// A call that would be answered, with some of it changed.
fn changed() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    (vec(change, 1..4), any::<prop::sample::Index>()).prop_map(|(changes, cut)| {
        let mut call = signed("Action=Echo&Text=%C3%A9&Filter.1.Value.2=x", "");
        for (place, byte) in changes {
            let place = place.index(call.len());
            call[place] = byte;
        }
        call.truncate(cut.index(call.len() * 2));
        call
    })
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![1 => vec(any::<u8>(), 0..200), 3 => request(), 2 => changed()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn noise_harms_nobody(noise in vec(bytes(), 100)) {
        // All at once, as who says half of something is waited for.
        let mut streams: Vec<_> = noise.iter().map(|_| TcpStream::connect(address()).unwrap()).collect();
        for (stream, bytes) in streams.iter_mut().zip(&noise) {
            // It may hang up before all of it is sent.
            let _ = stream.write_all(bytes);
        }
        for (stream, bytes) in streams.iter_mut().zip(&noise) {
            // It fails where nothing is heard, not even a hang-up.
            let said = hear(stream, "nothing ends it but the end");
            let failed = said.lines().any(|line| line.starts_with("HTTP/1.1 5"));
            prop_assert!(!failed, "{}: {}", String::from_utf8_lossy(bytes), said);
        }
        prop_assert_eq!(PANICS.load(Ordering::Relaxed), 0);
        let well = exchange(address(), &signed("Action=Echo&Text=well", ""), "</EchoResponse>");
        prop_assert!(well.contains("<text>well</text>"), "{}", well);
    }
}
