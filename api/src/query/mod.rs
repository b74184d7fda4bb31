//! The EC2 Query protocol: forms in, XML out, each call signed.
//!
//! ```text
//!   server ─► sigv4: who is it? ─► params: the form as a tree ─► Backend::call ─► xml
//! ```

pub mod params;
pub mod server;
pub mod sigv4;
pub mod table;
pub mod xml;

pub use params::Params;
pub use xml::Node;

/// An error that goes to the client; the HTTP status follows from the code.
pub use hutch_cloud::fault::Fault;

/// Who calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The access key.
    pub access_key: String,
    /// The account, 12 digits.
    pub account: String,
}

/// One authenticated call.
#[derive(Debug, Clone)]
pub struct Call {
    /// The service of the credential scope, such as `ec2`.
    pub service: String,
    /// The region of the credential scope.
    pub region: String,
    /// Who calls.
    pub identity: Identity,
    /// The operation.
    pub action: String,
    /// Its parameters.
    pub params: Params,
    /// The request's id, a UUID.
    pub request_id: String,
}

/// The secret of an access key, and whose it is.
#[derive(Clone)]
pub struct Credential {
    /// The secret.
    pub secret: String,
    /// The account.
    pub account: String,
}

/// What serves the calls, on blocking threads.
pub trait Backend: Send + Sync + 'static {
    /// The secret of an access key, and whose it is.
    fn credential(&self, access_key: &str) -> Option<Credential>;

    /// Whether the account may call that now.
    fn admit(&self, _account: &str, _region: &str, _action: &str) -> bool {
        true
    }

    /// Counts a call that was answered: the action (empty where it was not even read), the error's code.
    fn note(&self, _action: &str, _code: Option<&str>, _took: std::time::Duration) {}

    /// What is counted, in Prometheus' text format.
    fn metrics(&self) -> String {
        String::new()
    }

    /// Does the call.
    ///
    /// # Errors
    /// What the client is told.
    fn call(&self, call: &Call) -> Result<Node, Fault>;
}
