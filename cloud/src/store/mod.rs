//! Where the cloud's state is: ordered keys that change together or not at all.
//!
//! ```text
//!   get, range ──► what is           commit ──► what is to be, if what was read still holds
//!   changes, wait ──► what has changed since      lease ──► keys that go when their owner does not come back
//! ```
//! On one machine it is [`Sqlite`]; on many it will be etcd, and nothing above sees the difference.

mod sqlite;

use std::path::Path;
use std::time::Duration;

pub use sqlite::{Sqlite, VERSION};

/// Counts committed transactions: 0 before the first; never goes back.
pub type Revision = u64;
/// Names a lease.
pub type LeaseId = i64;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 1024;
/// The longest value, in bytes.
pub const MAX_VALUE: usize = 1 << 20;

/// A key and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// What it holds.
    pub value: Vec<u8>,
    /// The transaction that wrote it last.
    pub revision: Revision,
}

/// One thing that a transaction did to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The transaction.
    pub revision: Revision,
    /// The key.
    pub key: String,
    /// What it holds since; `None`: it is gone.
    pub value: Option<Vec<u8>>,
}

/// What is to be checked, and done if all checks hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    checks: Vec<(String, Option<Revision>)>,
    writes: Vec<Write>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Write {
    Put { key: String, value: Vec<u8>, lease: Option<LeaseId> },
    Delete { key: String },
}

impl Transaction {
    /// An empty one.
    pub fn new() -> Transaction {
        Transaction::default()
    }

    /// Only if `entry` is as it was read.
    #[must_use]
    pub fn unchanged(mut self, entry: &Entry) -> Transaction {
        self.checks.push((entry.key.clone(), Some(entry.revision)));
        self
    }

    /// Only if there is no such key.
    #[must_use]
    pub fn absent(mut self, key: impl Into<String>) -> Transaction {
        self.checks.push((key.into(), None));
        self
    }

    /// Writes a key. Of several writes to one key the last counts.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Transaction {
        self.writes.push(Write::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Writes a key that goes when `lease` ends.
    #[must_use]
    pub fn put_leased(
        mut self,
        key: impl Into<String>,
        value: impl Into<Vec<u8>>,
        lease: LeaseId,
    ) -> Transaction {
        self.writes.push(Write::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Removes a key, if it is there.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Transaction {
        self.writes.push(Write::Delete { key: key.into() });
        self
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is done, and survives loss of power.
    Committed(Revision),
    /// Nothing of it is done: this key was not as it was to be.
    Conflict(String),
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A newer hutch wrote this store.
    #[error(
        "the store {path} has version {found}, this hutch knows versions up to {known}; use the newer hutch"
    )]
    Newer {
        /// The store.
        path: String,
        /// Its version.
        found: i64,
        /// The latest one that is known here.
        known: i64,
    },
    /// Some other program's database.
    #[error("{0} is a database, but not one of hutch's; name another directory with --state")]
    Foreign(String),
    /// The changes asked for are not kept any more.
    #[error("changes before revision {oldest} are forgotten; read everything anew")]
    Compacted {
        /// The first that is kept.
        oldest: Revision,
    },
    /// The lease has ended, or never was.
    #[error("there is no lease {0}; it has ended")]
    NoSuchLease(LeaseId),
    /// A key or a value that cannot be.
    #[error("the key {key:?} is empty or longer than {MAX_KEY} bytes, or its value than {MAX_VALUE}")]
    TooLarge {
        /// The key, or its beginning.
        key: String,
    },
    /// The database refused: a full disk, most likely, or a broken one.
    #[error("the store {path} failed; check the disk that it is on")]
    Database {
        /// The store.
        path: String,
        /// What it said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What this module's functions return.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Ordered keys under transactions.
///
/// Callers may rely on:
/// - a commit is whole or not at all, and durable when it returns; transactions happen one after the other;
/// - reads see every transaction that was committed before them;
/// - keys are ordered by their bytes;
/// - every change of a key shows in [`Store::changes`] once, in the order of the transactions.
///
/// Implementers return an error only where nothing was done.
pub trait Store: Send + Sync {
    /// What `key` holds.
    ///
    /// # Errors
    /// The database's.
    fn get(&self, key: &str) -> Result<Option<Entry>>;

    /// Up to `limit` entries whose keys begin with `prefix` and lie behind `after`, in order.
    ///
    /// # Errors
    /// The database's.
    fn range(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Entry>>;

    /// Does a transaction if its checks hold.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`], [`StoreError::NoSuchLease`], the database's.
    fn commit(&self, transaction: &Transaction) -> Result<Outcome>;

    /// The latest transaction.
    ///
    /// # Errors
    /// The database's.
    fn revision(&self) -> Result<Revision>;

    /// Up to `limit` changes of keys that begin with `prefix`, by transactions after `after`; a transaction's changes come
    /// together, though they be more than `limit`.
    ///
    /// # Errors
    /// [`StoreError::Compacted`], the database's.
    fn changes(&self, prefix: &str, after: Revision, limit: usize) -> Result<Vec<Change>>;

    /// Waits until there is a transaction after `after`, for at most `limit`; returns the latest.
    ///
    /// # Errors
    /// The database's.
    fn wait(&self, after: Revision, limit: Duration) -> Result<Revision>;

    /// Begins a lease: the keys under it go when it is not renewed for `ttl`.
    ///
    /// # Errors
    /// The database's.
    fn grant(&self, ttl: Duration) -> Result<LeaseId>;

    /// Begins the lease's time anew.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLease`], the database's.
    fn renew(&self, lease: LeaseId) -> Result<()>;

    /// Ends a lease; the keys under it go.
    ///
    /// # Errors
    /// [`StoreError::NoSuchLease`], the database's.
    fn revoke(&self, lease: LeaseId) -> Result<()>;

    /// Writes a copy of all that is committed to the new file `to`, which can be opened as a store; others go on meanwhile.
    ///
    /// # Errors
    /// There is such a file already, or no room; the database's.
    fn backup(&self, to: &Path) -> Result<()>;
}
