//! Where bundles and stored images are: buckets of objects, in a directory or in S3.
//!
//! ```text
//!   BUCKET/KEY             an object: whole or not there
//!   BUCKET/.hutch-owner    the account that used the bucket first, whose it is
//! ```
//! A bucket is there once somebody uses it. What comes from here was somebody else's to write meanwhile: readers check it.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::future::Future;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, Error, ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions,
    RetryConfig, TagSet,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use url::Url;

use crate::fault::{Fault, Result as Checked};

mod errors;
mod streams;

pub use errors::ObjectError;
use errors::{Result, error, failed, whole};
pub use streams::{ObjectReader, ObjectWriter};

/// The object that says whose a bucket is.
const OWNER: &str = ".hutch-owner";
/// The most bytes of that.
const OWNER_MOST: u64 = 1024;
/// An object is read in pieces of so many bytes, each within a request's time.
const PIECE: u64 = 8 << 20;
/// An object is written in parts of at least so many bytes.
const PART: u64 = 8 << 20;
/// S3's most parts of an object, with some to spare.
const PARTS: u64 = 9_000;
/// S3's largest object.
pub const LARGEST: u64 = 5 << 40;
/// How long a request may take, and how often and how long it is tried again.
const TIMEOUT: &str = "60 seconds";
const RETRIES: usize = 5;
const RETRY_FOR: Duration = Duration::from_secs(90);
/// How long a call of somebody may wait for the store in all, and how many may: others are to be answered meanwhile.
const PATIENCE: Duration = Duration::from_secs(15);
const CALLS: usize = 16;

/// Whose a bucket is, as its object says.
#[derive(Serialize, Deserialize)]
struct Owner {
    account: String,
}

/// An object store.
#[derive(Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    /// What lies above all buckets.
    below: Path,
    /// The directory it is, where it is one.
    dir: Option<PathBuf>,
    runtime: Handle,
    /// What this process writes.
    writing: Writing,
    /// Calls that may wait for it, and how long.
    calls: Arc<Semaphore>,
    patience: Duration,
    /// The call that this is for.
    call: Option<Arc<Call>>,
    told: String,
}

/// A call of somebody, until this is dropped.
struct Call {
    until: Instant,
    _one_of_all: OwnedSemaphorePermit,
}

type Writing = Arc<Mutex<HashSet<Path>>>;

fn lock(writing: &Writing) -> MutexGuard<'_, HashSet<Path>> {
    writing.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name that nobody else of this process writes to until this is dropped.
pub struct Claim {
    writing: Writing,
    place: Path,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.writing).remove(&self.place);
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.told)
    }
}

/// What an environment says of S3.
fn environment(
    all: impl Iterator<Item = (OsString, OsString)>,
) -> std::result::Result<Vec<(AmazonS3ConfigKey, String)>, String> {
    let mut said = Vec::new();
    for (name, value) in all {
        let Some(name) = name.to_str().filter(|name| name.starts_with("AWS_")) else { continue };
        if let Ok(key) = name.to_ascii_lowercase().parse() {
            said.push((key, value.into_string().map_err(|_| format!("{name} is not UTF-8"))?));
        }
    }
    Ok(said)
}

/// What a bucket may be called: S3's rules.
///
/// # Errors
/// `InvalidBucketName`.
pub fn check_bucket(name: &str) -> Checked<()> {
    let edge = |c: Option<u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let known = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'-' | b'.');
    let plain = (3..=63).contains(&name.len()) && name.bytes().all(known);
    let edges = edge(name.bytes().next()) && edge(name.bytes().last());
    match plain && edges && !name.contains("..") && name.parse::<std::net::Ipv4Addr>().is_err() {
        true => Ok(()),
        false => {
            let why = "it has 3 to 63 lower-case letters, digits, dashes and dots";
            Err(Fault::new("InvalidBucketName", format!("The bucket name '{name}' is not valid: {why}")))
        }
    }
}

/// What an object may be called: S3's safe characters, in parts that are no directory's `.` or `..`.
///
/// # Errors
/// `InvalidParameterValue`.
pub fn check_key(parameter: &str, key: &str) -> Checked<()> {
    let known = |c: char| c.is_ascii_alphanumeric() || "!-_.'()/".contains(c);
    // A directory's entry has 255 bytes at most, and one that is being written a few more.
    let part = |part: &str| {
        !part.is_empty() && part.len() <= 200 && part != "." && part != ".." && !part.starts_with(".hutch-")
    };
    match key.len() <= 1000 && key.chars().all(known) && key.split('/').all(part) {
        true => Ok(()),
        false => Err(Fault::value(
            parameter,
            key,
            "It is like images/web-1: letters, digits and !-_.'(), with / between.",
        )),
    }
}

impl Objects {
    /// The store of a URL: `file:///DIR`, or `s3://BUCKET/PREFIX` with AWS's environment and what the URL's query says.
    ///
    /// # Errors
    /// There is no such store, in words for whoever set it up.
    pub fn open(url: &str, runtime: Handle) -> std::result::Result<Objects, String> {
        let parsed =
            Url::parse(url).map_err(|e| format!("{e}; it is like file:///DIR or s3://BUCKET/PREFIX"))?;
        match parsed.scheme() {
            "file" => {
                let dir = parsed.to_file_path().map_err(|()| "it is like file:///DIR".to_owned())?;
                Objects::directory(&dir, runtime)
            }
            "s3" => Objects::s3(&parsed, runtime),
            other => {
                Err(format!("{other} is no store that is known; it is file:///DIR or s3://BUCKET/PREFIX"))
            }
        }
    }

    /// What a directory holds, which is made where it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn directory(dir: &FilePath, runtime: Handle) -> std::result::Result<Objects, String> {
        let made = std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .recursive(true)
            .create(dir)
            .and_then(|()| dir.canonicalize());
        let dir = made.map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let store = LocalFileSystem::new_with_prefix(&dir).map_err(|e| whole(&e))?;
        let told = dir.display().to_string();
        Ok(Objects::new(Arc::new(store.with_fsync(true)), Path::default(), Some(dir), runtime, told))
    }

    /// What is gone with the process.
    pub fn memory(runtime: Handle) -> Objects {
        Objects::new(Arc::new(InMemory::new()), Path::default(), None, runtime, "memory".into())
    }

    fn new(
        store: Arc<dyn ObjectStore>,
        below: Path,
        dir: Option<PathBuf>,
        runtime: Handle,
        told: String,
    ) -> Objects {
        let (writing, calls) = (Writing::default(), Arc::new(Semaphore::new(CALLS)));
        Objects { store, below, dir, runtime, writing, calls, patience: PATIENCE, call: None, told }
    }

    /// The store for a call that somebody waits for. It gives up soon.
    ///
    /// # Errors
    /// `Unavailable`: too many wait for it.
    pub fn for_call(&self) -> Checked<Objects> {
        let permit = self.calls.clone().try_acquire_owned().map_err(|_| {
            Fault::new("Unavailable", "Too many calls are waiting for the object store; try again later")
        })?;
        let call = Call { until: Instant::now() + self.patience, _one_of_all: permit };
        Ok(Objects { call: Some(Arc::new(call)), ..self.clone() })
    }

    /// What the store answers, as far as there is time for it.
    fn wait<T>(&self, place: &Path, asked: impl Future<Output = std::result::Result<T, Error>>) -> Result<T> {
        let answer = self.runtime.block_on(async {
            match &self.call {
                Some(call) => tokio::time::timeout_at(call.until, asked).await,
                None => Ok(asked.await),
            }
        });
        answer.map_err(|_| failed("it does not answer in time"))?.map_err(|e| error(&e, self.named(place)))
    }

    /// What an object is called by those who have its bucket.
    fn named<'a>(&self, place: &'a Path) -> &'a str {
        let place = place.as_ref();
        place.strip_prefix(self.below.as_ref()).unwrap_or(place).trim_start_matches('/')
    }

    fn s3(url: &Url, runtime: Handle) -> std::result::Result<Objects, String> {
        // Somebody else of this process may have chosen one before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let bucket = url.host_str().unwrap_or_default();
        let below = Path::parse(url.path().trim_matches('/')).map_err(|e| e.to_string())?;
        let timeout = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
        let mut builder = AmazonS3Builder::new().with_config(timeout, TIMEOUT);
        for (key, value) in environment(std::env::vars_os())? {
            builder = builder.with_config(key, value);
        }
        for (name, value) in url.query_pairs() {
            let key = name.parse().map_err(|_| format!("there is no option {name}"))?;
            builder = builder.with_config(key, value);
        }
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
        let built = builder.with_bucket_name(bucket).with_retry(retry).build();
        let store = built.map_err(|e| whole(&e))?;
        let told = format!("s3://{bucket}/{below}");
        Ok(Objects::new(Arc::new(store), below, None, runtime, told))
    }

    fn place(&self, bucket: &str, key: &str) -> Result<Path> {
        // Checked where it came from; this is for what a later version may let through.
        let inside = check_bucket(bucket).and_then(|()| match key {
            OWNER => Ok(()),
            key => check_key("Key", key),
        });
        inside.map_err(|fault| ObjectError::Failed(fault.message))?;
        let path = Path::parse(format!("{}/{bucket}/{key}", self.below))
            .map_err(|e| ObjectError::Failed(e.to_string()))?;
        Ok(path)
    }

    /// The account whose bucket it is; `None`: nobody has used it.
    ///
    /// # Errors
    /// [`ObjectError::Failed`].
    pub fn owner(&self, bucket: &str) -> Result<Option<String>> {
        let text = match self.small(bucket, OWNER, OWNER_MOST) {
            Err(ObjectError::Missing(_)) => return Ok(None),
            text => text?,
        };
        let owner: Owner = serde_json::from_slice(&text)
            .map_err(|e| ObjectError::Failed(format!("{bucket}/{OWNER} does not say whose it is: {e}")))?;
        Ok(Some(owner.account))
    }

    /// Takes a bucket that nobody has used.
    ///
    /// # Errors
    /// `AccessDenied`: it is another account's, or nobody's though there is something in it; `Unavailable`.
    pub fn take(&self, bucket: &str, account: &str) -> Checked<()> {
        if self.owner(bucket)?.is_none() {
            if !self.is_empty(bucket)? {
                // Another may have taken it this moment; else it is the machine owner's to say whose it is.
                return match self.owner(bucket)? {
                    Some(_) => self.check(bucket, account),
                    None => Err(Fault::new(
                        "AccessDenied",
                        format!("The bucket '{bucket}' is not empty, and nobody's here; name another one"),
                    )),
                };
            }
            let owner = serde_json::to_vec(&Owner { account: account.into() }).map_err(Fault::internal)?;
            let place = self.place(bucket, OWNER)?;
            let mode = PutOptions::from(PutMode::Create);
            self.wait(&place, async {
                match self.store.put_opts(&place, owner.into(), mode).await {
                    // Another was first: then it says whose it is.
                    Ok(_) | Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
                    Err(other) => Err(other),
                }
            })?;
        }
        self.check(bucket, account)
    }

    /// Whether there is nothing in a bucket.
    fn is_empty(&self, bucket: &str) -> Result<bool> {
        let mut place = self.place(bucket, OWNER)?;
        let parts = place.parts_count().saturating_sub(1);
        place = place.parts().take(parts).collect();
        let first = self.wait(&place, async { self.store.list(Some(&place)).next().await.transpose() })?;
        Ok(first.is_none())
    }

    /// Has nobody else of this process write to this name, or, where it is no object's, to what is called after it.
    ///
    /// # Errors
    /// [`ObjectError::Busy`]: somebody does.
    pub fn claim(&self, bucket: &str, key: &str) -> Result<Claim> {
        let place = self.place(bucket, key)?;
        match lock(&self.writing).insert(place.clone()) {
            true => Ok(Claim { writing: self.writing.clone(), place }),
            false => Err(ObjectError::Busy(format!("{bucket}/{key}"))),
        }
    }

    /// Whether an account may use a bucket that is there.
    ///
    /// # Errors
    /// `NoSuchBucket`; `AccessDenied`: it is another account's; `Unavailable`.
    pub fn check(&self, bucket: &str, account: &str) -> Checked<()> {
        match self.owner(bucket)? {
            None => Err(Fault::new("NoSuchBucket", format!("The bucket '{bucket}' does not exist"))),
            Some(owner) if owner == account => Ok(()),
            Some(_) => Err(Fault::new(
                "AccessDenied",
                format!("The bucket '{bucket}' belongs to another account; name one of your own"),
            )),
        }
    }

    /// All of an object of at most `most` bytes.
    ///
    /// # Errors
    /// [`ObjectError`]; also where it is larger.
    pub fn small(&self, bucket: &str, key: &str, most: u64) -> Result<Vec<u8>> {
        let mut reader = self.read(bucket, key)?;
        if reader.size > most {
            let why = format!("{bucket}/{key} has {} bytes, which is more than {most}", reader.size);
            return Err(ObjectError::Failed(why));
        }
        reader.fetch()?;
        Ok(std::mem::take(&mut reader.piece))
    }

    /// Writes a small object, whole or not at all.
    ///
    /// # Errors
    /// [`ObjectError::Failed`], [`ObjectError::Busy`].
    pub fn put(&self, bucket: &str, key: &str, bytes: Vec<u8>) -> Result<()> {
        let claim = self.claim(bucket, key)?;
        self.sweep(&claim);
        self.wait(&claim.place, self.store.put(&claim.place, bytes.into())).map(drop)
    }

    /// Removes an object, if it is there.
    ///
    /// # Errors
    /// [`ObjectError::Failed`].
    pub fn delete(&self, bucket: &str, key: &str) -> Result<()> {
        let place = self.place(bucket, key)?;
        match self.wait(&place, self.store.delete(&place)) {
            Err(ObjectError::Missing(_)) => Ok(()),
            done => done,
        }
    }

    /// Begins to read an object. What is read is all of one version of it, or reading fails.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn read(&self, bucket: &str, key: &str) -> Result<ObjectReader<'_>> {
        let place = self.place(bucket, key)?;
        let about = self.wait(&place, self.store.head(&place))?;
        Ok(ObjectReader {
            objects: self,
            size: about.size,
            version: about.e_tag,
            place,
            at: 0,
            piece: Vec::new(),
            used: 0,
        })
    }

    /// Begins to write an object, of about `bytes` bytes, in the place of one that may be there. It is there once it is
    /// [finished](ObjectWriter::finish). Nobody else of this process writes it meanwhile.
    ///
    /// # Errors
    /// [`ObjectError::Failed`], [`ObjectError::Busy`].
    pub fn write<'a>(
        &self,
        bucket: &str,
        key: &str,
        bytes: u64,
        tags: impl Iterator<Item = (&'a String, &'a String)>,
    ) -> Result<ObjectWriter<'_>> {
        let claim = self.claim(bucket, key)?;
        self.sweep(&claim);
        let mut set = TagSet::default();
        tags.for_each(|(key, value)| set.push(key, value));
        let how = PutMultipartOptions { tags: set, ..PutMultipartOptions::default() };
        let upload = self.wait(&claim.place, self.store.put_multipart_opts(&claim.place, how))?;
        let part = PART.max((bytes / PARTS).next_multiple_of(1 << 20)) as usize;
        Ok(ObjectWriter {
            objects: self,
            claim,
            upload: Some(upload),
            size: part,
            part: Vec::new(),
            sent: false,
        })
    }

    /// Removes what a daemon that was killed left of an object in a directory; what it left in S3 is for a rule there.
    fn sweep(&self, claim: &Claim) {
        let Some(file) = self.dir.as_ref().map(|dir| dir.join(claim.place.as_ref())) else { return };
        let (Some(dir), Some(name)) = (file.parent(), file.file_name().and_then(|name| name.to_str())) else {
            return;
        };
        let begun = format!("{name}#");
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name.starts_with(&begun)) {
                tracing::info!(path = %entry.path().display(), "removing what was half written");
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests;
