//! A server of the Query protocol that tells what it was asked, and a client that says whatever it likes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, Mac};
use hutch_api::query::server::{Limits, Listener, serve_within};
use hutch_api::query::{Backend, Call, Credential, Fault, Node};
use sha2::{Digest, Sha256};

/// The secret of the key AKID.
const SECRET: &str = "secret";

/// Tells what it was asked.
struct Echo;

impl Backend for Echo {
    fn credential(&self, access_key: &str) -> Option<Credential> {
        (access_key == "AKID").then(|| Credential { secret: SECRET.into(), account: "000000000001".into() })
    }

    fn call(&self, call: &Call) -> Result<Node, Fault> {
        match call.action.as_str() {
            "Panic" => panic!("as asked"),
            "Slow" => {
                std::thread::sleep(Duration::from_millis(300));
                Ok(Node::empty())
            }
            "Fail" => Err(Fault::value("x", "<&>", "As asked.")),
            _ => Ok(Node::empty()
                .with("account", &call.identity.account)
                .with("text", call.params.str("Text"))),
        }
    }
}

/// A server that runs.
pub struct Served {
    pub address: SocketAddr,
    shutdown: Option<tokio::sync::oneshot::Sender<()>>,
    ended: std::sync::mpsc::Receiver<()>,
}

impl Served {
    /// Tells it to end.
    pub fn shut_down(&mut self) {
        let _ = self.shutdown.take().unwrap().send(());
    }

    /// Waits until it has; a minute is for ever.
    pub fn ended(&self) {
        self.ended.recv_timeout(Duration::from_secs(60)).expect("it does not end");
    }
}

/// Starts one, of its own.
pub fn start(limits: Limits) -> Served {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let (shutdown, told) = tokio::sync::oneshot::channel();
    let (end, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let told = async {
            // Whoever forgets it lets it run.
            if told.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        runtime.block_on(serve_within(limits, Listener::Tcp(listener), Arc::new(Echo), told)).unwrap();
        let _ = end.send(());
    });
    Served { address, shutdown: Some(shutdown), ended }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A call of EC2, see [`signed_for`].
pub fn signed(body: &str, head: &str) -> Vec<u8> {
    signed_for("ec2", body, head)
}

/// Signs as a client does, written anew: nothing of the server's is used.
pub fn signed_for(service: &str, body: &str, head: &str) -> Vec<u8> {
    let now = jiff::Timestamp::now();
    let (time, date) = (now.strftime("%Y%m%dT%H%M%SZ").to_string(), now.strftime("%Y%m%d").to_string());
    let canonical =
        format!("POST\n/\n\nhost:h\nx-amz-date:{time}\n\nhost;x-amz-date\n{}", hex(&Sha256::digest(body)));
    let scope = format!("{date}/home-1/{service}/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
    let mac = |key: &[u8], text: &str| {
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(key).unwrap();
        mac.update(text.as_bytes());
        mac.finalize().into_bytes().to_vec()
    };
    let key = [date.as_str(), "home-1", service, "aws4_request"]
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
pub fn exchange(address: SocketAddr, bytes: &[u8], enough: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    // It may hang up before all of it is sent.
    let _ = stream.write_all(bytes);
    hear(&mut stream, enough)
}

/// Reads until the server hangs up or `enough` is in what it said; a minute of silence fails.
pub fn hear(stream: &mut TcpStream, enough: &str) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let (mut said, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut part) {
            Ok(n @ 1..) => said.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("it says nothing"),
            _ => break,
        }
        if String::from_utf8_lossy(&said).contains(enough) {
            break;
        }
    }
    String::from_utf8_lossy(&said).into_owned()
}
