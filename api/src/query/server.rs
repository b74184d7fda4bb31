//! The endpoint: HTTP/1.1 in, calls to the backend, answers out.
//!
//! Whoever connects may be anybody: connections, heads, bodies and times are bounded, and nothing is done before the
//! signature holds.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use jiff::Timestamp;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

use super::sigv4::{Authorization, Request};
use super::{Backend, Call, Fault, Identity, Node, Params};

/// Connections at a time.
const CONNECTIONS: usize = 512;
/// Calls at a time: each has a thread.
const CALLS: usize = 64;
/// The largest head and the largest body, in bytes.
const HEAD: usize = 64 << 10;
const BODY: usize = 1 << 20;
/// How long a client may take to say what it wants, and how long a connection may idle.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long calls that run may go on when the server is to end.
const GRACE: Duration = Duration::from_secs(10);

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
    calls: Semaphore,
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
    let server = Arc::new(Server { backend, calls: Semaphore::new(CALLS) });
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(HEAD);
    tokio::pin!(shutdown);
    macro_rules! attend {
        ($stream:expr) => {{
            let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
            let server = server.clone();
            let service = service_fn(move |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            let connection = graceful.watch(http.serve_connection(TokioIo::new($stream), service));
            tokio::spawn(async move {
                let _slot = slot;
                // A client that goes away in the middle is no error of ours.
                let _ = connection.await;
            });
        }};
    }
    loop {
        let accepted = async {
            match &listener {
                Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| Ok(stream)),
                Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| Err(stream)),
            }
        };
        tokio::select! {
            () = &mut shutdown => break,
            accepted = accepted => match accepted {
                Ok(Ok(stream)) => attend!(stream),
                Ok(Err(stream)) => attend!(stream),
                // Out of descriptors, most likely: those that are open will end.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
    drop(listener);
    let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
    Ok(())
}

type Reply = Response<Full<Bytes>>;

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Reply {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    reply
}

impl Server {
    async fn answer(&self, request: hyper::Request<Incoming>) -> Reply {
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::GET, "/healthz") => return reply(StatusCode::OK, "text/plain", "ok\n".into()),
            (&Method::GET, "/metrics") => {
                return reply(StatusCode::OK, "text/plain; version=0.0.4", self.backend.metrics());
            }
            _ => {}
        }
        let id = uuid::Uuid::new_v4().to_string();
        let started = std::time::Instant::now();
        let (service, action, result) = match self.call(request, &id, &path).await {
            Ok((service, action, result)) => (service, action, result),
            Err(fault) => ("ec2".to_owned(), String::new(), Err(fault)),
        };
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

    /// Reads a call, checks who signed it, and does it.
    async fn call(
        &self,
        request: hyper::Request<Incoming>,
        id: &str,
        path: &str,
    ) -> Result<(String, String, Result<Node, Fault>), Fault> {
        let method = request.method().as_str().to_owned();
        if !matches!(method.as_str(), "GET" | "POST") || path != "/" {
            return Err(Fault::new(
                "InvalidRequest",
                format!("There is nothing at {method} {path}; calls go to POST /"),
            ));
        }
        let query = request.uri().query().unwrap_or_default().to_owned();
        let headers: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| {
                (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned())
            })
            .collect();
        let body = tokio::time::timeout(PATIENCE, Limited::new(request.into_body(), BODY).collect()).await;
        let body = match body {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => {
                let why = format!("The request is larger than {BODY} bytes, or was cut off");
                return Err(Fault::new("RequestEntityTooLarge", why));
            }
            Err(_) => return Err(Fault::new("RequestTimeout", "The body did not come in time")),
        };
        let signed = Request { method: &method, query: &query, headers: &headers, body: &body };
        let authorization = Authorization::read(&signed)?;
        let unknown =
            || Fault::new("AuthFailure", "AWS was not able to validate the provided access credentials");
        let credential = self.backend.credential(&authorization.access_key).ok_or_else(unknown)?;
        authorization.verify(&signed, &credential.secret, Timestamp::now())?;
        // From here on it is somebody we know.
        let form = match method.as_str() {
            "GET" => {
                query.split('&').filter(|pair| !pair.starts_with("X-Amz-")).collect::<Vec<_>>().join("&")
            }
            _ => String::from_utf8(body.to_vec())
                .map_err(|_| Fault::new("MalformedQueryString", "The body is not UTF-8"))?,
        };
        let params = Params::parse(&form)?;
        let missing = || Fault::new("MissingAction", "The request must contain the parameter Action");
        let action = params.str("Action").ok_or_else(missing)?.to_owned();
        let (service, region) = (authorization.service, authorization.region);
        let version = if service == "sts" { STS } else { EC2 };
        if let Some(other) = params.str("Version").filter(|have| *have != version) {
            let why = format!("The API version {other} is not served; {version} is");
            return Err(Fault::new("NoSuchVersion", why));
        }
        if !self.backend.admit(&credential.account, &region, &action) {
            return Err(Fault::new("RequestLimitExceeded", "Request limit exceeded."));
        }
        let identity = Identity { access_key: authorization.access_key, account: credential.account };
        let call = Call {
            service: service.clone(),
            region,
            identity,
            action: action.clone(),
            params,
            request_id: id.to_owned(),
        };
        let _permit = self.calls.acquire().await.map_err(Fault::internal)?;
        let backend = self.backend.clone();
        let result = tokio::task::spawn_blocking(move || backend.call(&call)).await;
        // A panic is ours to repair; it ends this call only.
        let result =
            result.unwrap_or_else(|_| Err(Fault::internal("the call ended badly; the log says more")));
        Ok((service, action, result))
    }
}

fn status(code: &str) -> StatusCode {
    match code {
        "AuthFailure" => StatusCode::UNAUTHORIZED,
        "UnauthorizedOperation"
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
