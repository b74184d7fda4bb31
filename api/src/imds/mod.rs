//! The instance metadata service, versions 1 and 2, for one guest.
//!
//! ```text
//!   a guest's GET ─► serve ─► answer ─┬─ token.rs     who may ask (version 2)
//!    (its own listener, bound         └─ document.rs  what there is to tell: a tree of texts
//!     to its tap by netfw)
//! ```
//! Each guest has a listener of its own, so no request has to say whose it is, and none can ask for another's. A guest is
//! hostile: the number of its connections, the size of a head and the time it may take are bounded; bodies are not read.

mod document;
mod token;

use std::convert::Infallible;
use std::io;
use std::net::TcpListener;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

pub use document::Document;
pub use hutch_cloud::metadata::{Metadata, Options};
pub use token::Secret;

/// The address that guests ask.
pub const ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 254);
/// Connections of one guest at a time; more wait.
const CONNECTIONS: usize = 64;
/// The largest head of a request, in bytes.
const HEAD: usize = 16 << 10;
/// How long a guest may take to say what it wants, and how long a connection may idle.
const PATIENCE: Duration = Duration::from_secs(10);
/// Header with a token, and with its time to live in seconds.
const TOKEN: &str = "x-aws-ec2-metadata-token";
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// What one guest is told; may be exchanged while it is served.
pub type Shared = Arc<RwLock<Arc<Document>>>;

/// Serves `document` on `listener` until the future is dropped. `secret` signs the tokens: with the same one they stay
/// valid over a restart.
///
/// # Errors
/// When the listener cannot be used at all; what fails on one connection ends only that.
pub async fn serve(listener: TcpListener, document: Shared, secret: Secret) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let secret = Arc::new(secret);
    // They end when this future does.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // Out of descriptors, most likely: those that are open will end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let (document, secret) = (document.clone(), secret.clone());
        connections.spawn(async move {
            let _slot = slot;
            // A guest that goes away in the middle is no error of ours.
            let _ = attend(stream, document, secret).await;
        });
    }
}

/// One connection, to its end.
async fn attend(stream: tokio::net::TcpStream, document: Shared, secret: Arc<Secret>) -> io::Result<()> {
    let stream = stream.into_std()?;
    let wire = Arc::new(stream.try_clone()?);
    let stream = tokio::net::TcpStream::from_std(stream)?;
    let ipv6 = stream.local_addr()?.is_ipv6();
    let service = service_fn(move |request: Request<Incoming>| {
        let document = document.read().map(|d| d.clone()).unwrap_or_else(|e| e.into_inner().clone());
        let response = match ipv6 && !document.options().ipv6 {
            true => error(StatusCode::FORBIDDEN),
            false => answer(&document, &secret, request.method(), request.uri().path(), request.headers()),
        };
        if request.method() == Method::PUT {
            // How far the answer with a token may travel from here.
            let hops = document.options().hop_limit.into();
            let _ = match ipv6 {
                true => socket2::SockRef::from(&*wire).set_unicast_hops_v6(hops),
                false => wire.set_ttl(hops),
            };
        }
        async move { Ok::<_, Infallible>(response.map(|body| Full::new(Bytes::from(body)))) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(HEAD);
    // A client that has said all it will, such as `nc`, still hears the answer.
    http.half_close(true);
    http.serve_connection(TokioIo::new(stream), service).await.map_err(io::Error::other)
}

/// The answer to one request: the protocol, without a wire.
fn answer(
    document: &Document,
    secret: &Secret,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
) -> Response<Vec<u8>> {
    if !document.options().enabled {
        return error(StatusCode::FORBIDDEN);
    }
    match *method {
        Method::PUT => put(document, secret, path, headers),
        Method::GET | Method::HEAD => {
            let ttl = match headers.get(TOKEN) {
                None if document.options().tokens_required => return error(StatusCode::UNAUTHORIZED),
                None => None,
                Some(token) => match secret.verify(document.instance_id(), token.as_bytes(), now()) {
                    Some(ttl) => Some(ttl),
                    None => return error(StatusCode::UNAUTHORIZED),
                },
            };
            let Some((content_type, body)) = document.get(path) else { return error(StatusCode::NOT_FOUND) };
            let mut response = Response::new(body);
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            if let Some(ttl) = ttl {
                response.headers_mut().insert(TTL, ttl.into());
            }
            response
        }
        _ => error(StatusCode::METHOD_NOT_ALLOWED),
    }
}

/// A request for a token.
fn put(document: &Document, secret: &Secret, path: &str, headers: &HeaderMap) -> Response<Vec<u8>> {
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    if parts.next().is_none() || !parts.eq(["api", "token"]) {
        return error(StatusCode::METHOD_NOT_ALLOWED);
    }
    // Whoever asks for another is a proxy, which a token is to keep out.
    if headers.contains_key("x-forwarded-for") {
        return error(StatusCode::FORBIDDEN);
    }
    let ttl = headers.get(TTL).and_then(|ttl| ttl.to_str().ok()?.parse::<u32>().ok());
    let Some(ttl) = ttl.filter(|ttl| (1..=21600).contains(ttl)) else {
        return error(StatusCode::BAD_REQUEST);
    };
    let mut response = Response::new(secret.issue(document.instance_id(), ttl, now()).into_bytes());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response.headers_mut().insert(TTL, ttl.into());
    response
}

fn error(status: StatusCode) -> Response<Vec<u8>> {
    let text = status.canonical_reason().unwrap_or_default();
    let number = status.as_u16();
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
         <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\t\
         \"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
         <head>\n  <title>{number} - {text}</title>\n </head>\n <body>\n  <h1>{number} - {text}</h1>\n </body>\n</html>\n"
    );
    let mut response = Response::new(body.into_bytes());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
    response
}

/// Seconds since 1970.
fn now() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
