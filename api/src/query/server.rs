//! The endpoint: HTTP/1.1 in, calls to the backend, answers out.
//!
//! Whoever connects may be anybody: connections, heads, bodies and times are bounded, and nothing is done before the
//! signature holds.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, EXPECT, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use jiff::Timestamp;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

use super::sigv4::{Authorization, Request};
use super::{Backend, Call, Credential, Fault, Identity, Node, Params};

/// What strangers may take of us.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time.
    pub connections: usize,
    /// Calls at a time: each has a thread.
    pub calls: usize,
    /// The largest head, in bytes; at least 8 KiB.
    pub head: usize,
    /// The largest body, in bytes.
    pub body: usize,
    /// How long a client may take for a head, for a body and to take in some of an answer, and how long a connection
    /// may idle.
    pub patience: Duration,
    /// How long calls that run may go on when the server is to end.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 512,
            calls: 64,
            head: 64 << 10,
            body: 1 << 20,
            patience: Duration::from_secs(60),
            grace: Duration::from_secs(10),
        }
    }
}

/// How much of a body that is refused is still read: who hears a hang-up while it sends does not hear why.
const REFUSED: usize = 8 << 20;
/// The longest name of an operation, region or service, in bytes.
const NAME: usize = 64;

const EC2: &str = "2016-11-15";
const STS: &str = "2011-06-15";

/// Where clients come.
pub enum Listener {
    /// An address.
    Tcp(TcpListener),
    /// A socket in the file system.
    Unix(UnixListener),
}

struct Server {
    backend: Arc<dyn Backend>,
    limits: Limits,
    calls: Semaphore,
    scrapes: Semaphore,
}

/// Serves calls until `shutdown` is; those that run are ended first.
///
/// # Errors
/// When the listener cannot be used at all; what fails on one connection ends only that.
pub async fn serve(
    listener: Listener,
    backend: Arc<dyn Backend>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    serve_within(Limits::default(), listener, backend, shutdown).await
}

/// As [`serve`], within these limits.
///
/// # Errors
/// As [`serve`].
pub async fn serve_within(
    limits: Limits,
    listener: Listener,
    backend: Arc<dyn Backend>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let (calls, scrapes) = (Semaphore::new(limits.calls), Semaphore::new(1));
    let server = Arc::new(Server { backend, limits, calls, scrapes });
    let slots = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.patience).max_buf_size(limits.head);
    tokio::pin!(shutdown);
    macro_rules! attend {
        ($stream:expr, $slot:expr) => {{
            let (slot, server) = ($slot, server.clone());
            let service = service_fn(move |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            // Who asks and never takes an answer would keep its slot for ever.
            let mut stream = TimeoutStream::new($stream);
            stream.set_write_timeout(Some(limits.patience));
            let connection = graceful.watch(http.serve_connection(TokioIo::new(Box::pin(stream)), service));
            tokio::spawn(async move {
                let _slot = slot;
                // A client that goes away in the middle is no error of ours.
                let _ = connection.await;
            });
        }};
    }
    loop {
        // The slot first: nobody is accepted who cannot be served, and we can end while there is none.
        let accepted = async {
            let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
            match &listener {
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| (Ok(stream), slot)),
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| (Err(stream), slot)),
            }
        };
        tokio::select! {
            () = &mut shutdown => break,
            accepted = accepted => match accepted {
                Ok((Ok(stream), slot)) => attend!(stream, slot),
                Ok((Err(stream), slot)) => attend!(stream, slot),
                // Out of descriptors, most likely: those that are open will end.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(limits.grace, graceful.shutdown()).await;
    Ok(())
}

type Reply = Response<Full<Bytes>>;

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

/// What is known of a call so far: an answer's form depends on the service, also where it is an error.
struct Asked {
    id: String,
    service: String,
    action: String,
}

impl Server {
    async fn answer(&self, request: hyper::Request<Incoming>) -> Reply {
        match (request.method(), request.uri().path()) {
            (&Method::GET, "/healthz") => return reply(StatusCode::OK, "text/plain", "ok\n".into()),
            (&Method::GET, "/metrics") => return self.metrics().await,
            _ => {}
        }
        let id = uuid::Uuid::new_v4().to_string();
        let mut asked = Asked { id, service: "ec2".into(), action: String::new() };
        let started = Instant::now();
        let result = self.call(request, &mut asked).await;
        let Asked { id, service, action } = asked;
        let code = result.as_ref().err().map(|fault| fault.code.to_string());
        self.backend.note(&action, code.as_deref(), started.elapsed());
        tracing::info!(request = id, action, code, micros = started.elapsed().as_micros() as u64, "call");
        let (status, body) = match &result {
            Ok(node) => (StatusCode::OK, success(&service, &action, &id, node)),
            Err(fault) => (status(&fault.code), failure(&service, &id, fault)),
        };
        let mut reply = reply(status, "text/xml;charset=UTF-8", body);
        if let Ok(id) = HeaderValue::from_str(&id) {
            reply.headers_mut().insert("x-amzn-requestid", id);
        }
        reply
    }

    /// Anybody may ask, and it takes a look at all there is: one at a time, and not where connections are attended.
    async fn metrics(&self) -> Reply {
        let _turn = self.scrapes.acquire().await;
        let backend = self.backend.clone();
        match tokio::task::spawn_blocking(move || backend.metrics()).await {
            Ok(text) => reply(StatusCode::OK, "text/plain; version=0.0.4", text),
            Err(_) => reply(StatusCode::INTERNAL_SERVER_ERROR, "text/plain", "the log says more\n".into()),
        }
    }

    /// Reads a call, checks who signed it, and does it.
    async fn call(&self, request: hyper::Request<Incoming>, asked: &mut Asked) -> Result<Node, Fault> {
        let (head, body) = request.into_parts();
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let headers: Vec<_> =
            head.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
        let (method, query) = (head.method.as_str(), head.uri.query().unwrap_or_default());
        let mut signed = Request { method, query, headers: &headers, body: b"" };
        let who = self.who(&signed, head.uri.path(), asked);
        let body = match &who {
            // Who waits to be told to go on need not send what is not wanted.
            Err(_) if head.headers.contains_key(EXPECT) => Ok(Vec::new()),
            _ => {
                let most = if who.is_ok() { self.limits.body } else { 0 };
                let late = |_| Fault::new("RequestTimeout", "The body did not come in time");
                tokio::time::timeout(self.limits.patience, read(body, most)).await.map_err(late).flatten()
            }
        };
        let (authorization, credential) = who?;
        let body = body?;
        signed.body = &body;
        authorization.verify(&signed, &credential.secret, Timestamp::now())?;
        // From here on it is somebody we know.
        let form = match method {
            "GET" => {
                query.split('&').filter(|pair| !pair.starts_with("X-Amz-")).collect::<Vec<_>>().join("&")
            }
            _ => String::from_utf8(body)
                .map_err(|_| Fault::new("MalformedQueryString", "The body is not UTF-8"))?,
        };
        let params = Params::parse(&form)?;
        let missing = || Fault::new("MissingAction", "The request must contain the parameter Action");
        let action = params.str("Action").ok_or_else(missing)?;
        // What is no operation's name is not logged, counted or put into a tag.
        if action.is_empty() || action.len() > NAME || !action.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(Fault::new("InvalidAction", "The action is not valid for this web service."));
        }
        asked.action = action.to_owned();
        let region = authorization.region;
        let version = if asked.service == "sts" { STS } else { EC2 };
        if let Some(other) = params.str("Version").filter(|have| *have != version) {
            let why = format!("The API version {other} is not served; {version} is");
            return Err(Fault::new("NoSuchVersion", why));
        }
        if !self.backend.admit(&credential.account, &region, &asked.action) {
            return Err(Fault::new("RequestLimitExceeded", "Request limit exceeded."));
        }
        let call = Call {
            service: asked.service.clone(),
            region,
            identity: Identity { access_key: authorization.access_key, account: credential.account },
            action: asked.action.clone(),
            params,
            request_id: asked.id.clone(),
        };
        let _permit = self.calls.acquire().await.map_err(Fault::internal)?;
        let backend = self.backend.clone();
        let result = tokio::task::spawn_blocking(move || backend.call(&call)).await;
        // A panic is ours to repair; it ends this call only.
        result.unwrap_or_else(|_| Err(Fault::internal("the call ended badly; the log says more")))
    }

    /// Who says to have signed it. It is not checked yet; but for whom nobody knows, no body is kept.
    fn who(
        &self,
        head: &Request<'_>,
        path: &str,
        asked: &mut Asked,
    ) -> Result<(Authorization, Credential), Fault> {
        if !matches!(head.method, "GET" | "POST") || path != "/" {
            let why = format!("There is nothing at {} {path}; calls go to POST /", head.method);
            return Err(Fault::new("InvalidRequest", why));
        }
        let authorization = Authorization::read(head)?;
        if authorization.region.len() > NAME || authorization.service.len() > NAME {
            return Err(Fault::new(
                "IncompleteSignature",
                "The credential scope's region or service is none",
            ));
        }
        asked.service.clone_from(&authorization.service);
        let unknown =
            || Fault::new("AuthFailure", "AWS was not able to validate the provided access credentials");
        let credential = self.backend.credential(&authorization.access_key).ok_or_else(unknown)?;
        Ok((authorization, credential))
    }
}

/// Reads a body of `most` bytes at most. More of it than that is read, so that its sender hears why, but not kept.
async fn read(mut body: Incoming, most: usize) -> Result<Vec<u8>, Fault> {
    let (mut kept, mut length) = (Vec::new(), 0_usize);
    while let Some(frame) = body.frame().await {
        let cut = |_| Fault::new("InvalidRequest", "The body ended before its announced length");
        let Ok(data) = frame.map_err(cut)?.into_data() else { continue };
        length = length.saturating_add(data.len());
        if length <= most {
            kept.extend_from_slice(&data);
        } else {
            kept = Vec::new();
        }
        if length > most.saturating_add(REFUSED) {
            break;
        }
    }
    if length > most {
        return Err(Fault::new("RequestEntityTooLarge", format!("The request is larger than {most} bytes")));
    }
    Ok(kept)
}

fn status(code: &str) -> StatusCode {
    match code {
        "AuthFailure" => StatusCode::UNAUTHORIZED,
        "UnauthorizedOperation"
        | "AccessDenied"
        | "SignatureDoesNotMatch"
        | "InvalidClientTokenId"
        | "MissingAuthenticationToken"
        | "OptInRequired" => StatusCode::FORBIDDEN,
        "RequestTimeout" => StatusCode::REQUEST_TIMEOUT,
        "DryRunOperation" => StatusCode::PRECONDITION_FAILED,
        "RequestEntityTooLarge" => StatusCode::PAYLOAD_TOO_LARGE,
        "InternalError" => StatusCode::INTERNAL_SERVER_ERROR,
        "RequestLimitExceeded" | "Unavailable" => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    }
}

const HEADER: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

fn success(service: &str, action: &str, id: &str, node: &Node) -> String {
    let mut out = String::from(HEADER);
    if service == "sts" {
        out.push_str(&format!(
            "<{action}Response xmlns=\"https://sts.amazonaws.com/doc/{STS}/\"><{action}Result>"
        ));
        node.write(&mut out);
        out.push_str(&format!("</{action}Result><ResponseMetadata><RequestId>{id}</RequestId></ResponseMetadata></{action}Response>"));
    } else {
        out.push_str(&format!(
            "<{action}Response xmlns=\"http://ec2.amazonaws.com/doc/{EC2}/\"><requestId>{id}</requestId>"
        ));
        node.write(&mut out);
        out.push_str(&format!("</{action}Response>"));
    }
    out
}

fn failure(service: &str, id: &str, fault: &Fault) -> String {
    let error = crate::node! { "Code": fault.code.as_ref(), "Message": &fault.message };
    let mut out = String::from(HEADER);
    if service == "sts" {
        let answer = crate::node! { "Error": error.with("Type", "Sender"), "RequestId": id };
        crate::node! { "ErrorResponse": answer }.write(&mut out);
    } else {
        let errors = crate::node! { "Error": error };
        crate::node! { "Response": crate::node! { "Errors": errors, "RequestID": id } }.write(&mut out);
    }
    out
}
