//! The endpoint over real sockets: who says too much, too little or nonsense is told so, and nobody else notices.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use hutch_api::query::server::{Listener, serve};
use hutch_api::query::{Backend, Call, Credential, Fault, Node};
use sha2::{Digest, Sha256};

const SECRET: &str = "secret";

struct Echo;

impl Backend for Echo {
    fn credential(&self, access_key: &str) -> Option<Credential> {
        (access_key == "AKID").then(|| Credential { secret: SECRET.into(), account: "000000000001".into() })
    }

    fn call(&self, call: &Call) -> Result<Node, Fault> {
        match call.action.as_str() {
            "Panic" => panic!("as asked"),
            "Fail" => Err(Fault::value("x", "<&>", "As asked.")),
            _ => Ok(Node::empty()
                .with("account", &call.identity.account)
                .with("text", call.params.str("Text"))),
        }
    }
}

fn start() -> SocketAddr {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        runtime.block_on(serve(Listener::Tcp(listener), Arc::new(Echo), std::future::pending())).unwrap();
    });
    address
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Signs as a client does, written anew: nothing of the server's is used.
fn signed(body: &str, head: &str) -> Vec<u8> {
    let now = jiff::Timestamp::now();
    let (time, date) = (now.strftime("%Y%m%dT%H%M%SZ").to_string(), now.strftime("%Y%m%d").to_string());
    let canonical =
        format!("POST\n/\n\nhost:h\nx-amz-date:{time}\n\nhost;x-amz-date\n{}", hex(&Sha256::digest(body)));
    let scope = format!("{date}/home-1/ec2/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
    let mac = |key: &[u8], text: &str| {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(key).unwrap();
        mac.update(text.as_bytes());
        mac.finalize().into_bytes().to_vec()
    };
    let key = [&date, "home-1", "ec2", "aws4_request"]
        .iter()
        .fold(format!("AWS4{SECRET}").into_bytes(), |k, part| mac(&k, part));
    let signature = hex(&mac(&key, &text));
    format!(
        "POST / HTTP/1.1\r\nHost: h\r\nX-Amz-Date: {time}\r\nContent-Length: {}\r\n{head}Authorization: AWS4-HMAC-SHA256 \
         Credential=AKID/{scope}, SignedHeaders=host;x-amz-date, Signature={signature}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Sends bytes, and reads until the server hangs up or `enough` is in what it said.
fn exchange(address: SocketAddr, bytes: &[u8], enough: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // It may hang up before all of it is sent.
    let _ = stream.write_all(bytes);
    let (mut said, mut part) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut part) {
        said.extend_from_slice(&part[..n]);
        if String::from_utf8_lossy(&said).contains(enough) {
            break;
        }
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn calls_are_answered_and_faults_are_told() {
    let address = start();
    let said =
        exchange(address, &signed("Action=Echo&Version=2016-11-15&Text=a+%3Cb%3E", ""), "</EchoResponse>");
    assert!(said.starts_with("HTTP/1.1 200") && said.contains("<text>a &lt;b&gt;</text>"), "{said}");
    assert!(said.contains("<account>000000000001</account>") && said.contains("x-amzn-requestid"), "{said}");
    for (body, status, code) in [
        ("Action=Fail", "400", "<Code>InvalidParameterValue</Code>"),
        ("Action=Panic", "500", "<Code>InternalError</Code>"),
        ("Action=Echo&Version=2000-01-01", "400", "<Code>NoSuchVersion</Code>"),
        ("Version=2016-11-15", "400", "<Code>MissingAction</Code>"),
        ("Action=Echo&A=1&A=2", "400", "<Code>MalformedQueryString</Code>"),
        ("Action=Echo&A=%zz", "400", "<Code>MalformedQueryString</Code>"),
    ] {
        let said = exchange(address, &signed(body, ""), "</Response>");
        assert!(said.starts_with(&format!("HTTP/1.1 {status}")) && said.contains(code), "{body}: {said}");
    }
}

#[test]
fn nothing_is_done_for_strangers() {
    let address = start();
    let good = String::from_utf8(signed("Action=Echo", "")).unwrap();
    for (bytes, code) in [
        (good.replace("Action=Echo", "Action=Evil"), "SignatureDoesNotMatch"),
        (good.replace("AKID", "AKIX"), "AuthFailure"),
        (good.replace("X-Amz-Date: 2", "X-Amz-Date: 1"), "SignatureDoesNotMatch"),
        (good.replace("Host: h", "Host: i"), "SignatureDoesNotMatch"),
        (good.replace("Authorization", "Other"), "MissingAuthenticationToken"),
        (
            String::from_utf8(signed("Action=Echo", "X-Amz-Security-Token: x\r\n")).unwrap(),
            "SignatureDoesNotMatch",
        ),
    ] {
        let said = exchange(address, bytes.as_bytes(), "</Response>");
        assert!(said.contains(&format!("<Code>{code}</Code>")), "{bytes}: {said}");
    }
}

#[test]
fn who_says_too_much_or_nonsense_harms_nobody() {
    let address = start();
    let large = signed(&format!("Action=Echo&Text={}", "x".repeat(2 << 20)), "");
    let said = exchange(address, &large, "</Response>");
    assert!(said.starts_with("HTTP/1.1 413"), "{}", &said[..said.len().min(300)]);
    // Somebody who never finishes, many times, while others are served.
    let slow: Vec<_> = (0..50)
        .map(|_| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf").unwrap();
            stream
        })
        .collect();
    for nonsense in [
        "\0\0\0\0\r\n\r\n",
        "GET\r\n\r\n",
        "PUT / HTTP/1.1\r\nHost: h\r\n\r\n",
        "GET /../x HTTP/1.1\r\nHost: h\r\n\r\n",
    ] {
        let said = exchange(address, nonsense.as_bytes(), "</Response>");
        assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{nonsense:?}: {said}");
    }
    let threads: Vec<_> = (0..16)
        .map(|_| std::thread::spawn(move || exchange(address, &signed("Action=Echo", ""), "</EchoResponse>")))
        .collect();
    for thread in threads {
        assert!(thread.join().unwrap().starts_with("HTTP/1.1 200"));
    }
    assert!(
        exchange(address, b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n", "ok\n").starts_with("HTTP/1.1 200")
    );
    drop(slow);
}
