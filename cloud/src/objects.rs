//! Where bundles and stored images are: buckets of objects, in a directory or in S3.
//!
//! ```text
//!   BUCKET/KEY             an object: whole or not there
//!   BUCKET/.hutch-owner    the account that used the bucket first, whose it is
//! ```
//! A bucket is there once somebody uses it. What comes from here was somebody else's to write meanwhile: readers check it.

use std::fmt;
use std::io::{self, Read, Write};
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientConfigKey, Error, GetOptions, GetRange, MultipartUpload, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, RetryConfig, TagSet,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use url::Url;

use crate::fault::{Fault, Result as Checked};

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
const RETRY_FOR: std::time::Duration = std::time::Duration::from_secs(90);

/// Why an object was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// There is none.
    #[error("there is no object {0}")]
    Missing(String),
    /// The store cannot be had, or refuses.
    #[error("the object store: {0}")]
    Failed(String),
}

impl From<ObjectError> for Fault {
    fn from(error: ObjectError) -> Fault {
        match error {
            ObjectError::Missing(_) => Fault::new("NoSuchKey", error.to_string()),
            ObjectError::Failed(_) => Fault::new("Unavailable", format!("{error}; try again later")),
        }
    }
}

type Result<T> = std::result::Result<T, ObjectError>;

/// Whose a bucket is, as its object says.
#[derive(Serialize, Deserialize)]
struct Owner {
    account: String,
}

/// An object store.
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    /// What lies above all buckets.
    below: Path,
    /// The directory it is, where it is one.
    dir: Option<PathBuf>,
    runtime: Handle,
    /// Held while a bucket is taken.
    taking: Mutex<()>,
    told: String,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.told)
    }
}

fn failed(error: &dyn std::error::Error) -> ObjectError {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Most errors of the store tell their cause themselves.
        if !text.contains(&cause_text) {
            text.push_str(&format!(": {cause_text}"));
        }
        next = cause.source();
    }
    ObjectError::Failed(text)
}

fn error(error: &Error, place: &Path) -> ObjectError {
    match error {
        Error::NotFound { .. } => ObjectError::Missing(place.to_string()),
        error => failed(error),
    }
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
        let store = LocalFileSystem::new_with_prefix(&dir).map_err(|e| failed(&e).to_string())?;
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
        Objects { store, below, dir, runtime, taking: Mutex::default(), told }
    }

    fn s3(url: &Url, runtime: Handle) -> std::result::Result<Objects, String> {
        // Somebody else of this process may have chosen one before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let bucket = url.host_str().unwrap_or_default();
        let below = Path::parse(url.path().trim_matches('/')).map_err(|e| e.to_string())?;
        let timeout = AmazonS3ConfigKey::Client(ClientConfigKey::Timeout);
        let mut builder = AmazonS3Builder::new().with_config(timeout, TIMEOUT);
        for (name, value) in std::env::vars() {
            let key = name.starts_with("AWS_").then(|| name.to_ascii_lowercase().parse());
            if let Some(Ok(key)) = key {
                builder = builder.with_config(key, value);
            }
        }
        for (name, value) in url.query_pairs() {
            let key = name.parse().map_err(|_| format!("there is no option {name}"))?;
            builder = builder.with_config(key, value);
        }
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
        let built = builder.with_bucket_name(bucket).with_retry(retry).build();
        let store = built.map_err(|e| failed(&e).to_string())?;
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
        let path = Path::parse(format!("{}/{bucket}/{key}", self.below)).map_err(|e| failed(&e))?;
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
    /// `AccessDenied`: it is another account's; `Unavailable`.
    pub fn take(&self, bucket: &str, account: &str) -> Checked<()> {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        if self.owner(bucket)?.is_none() {
            let owner = serde_json::to_vec(&Owner { account: account.into() }).map_err(Fault::internal)?;
            let place = self.place(bucket, OWNER)?;
            let mode = PutOptions::from(PutMode::Create);
            match self.runtime.block_on(self.store.put_opts(&place, owner.into(), mode)) {
                // Another daemon was first: then it says whose it is.
                Ok(_) | Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => {}
                Err(other) => return Err(error(&other, &place).into()),
            }
        }
        self.check(bucket, account)
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
    /// [`ObjectError::Failed`].
    pub fn put(&self, bucket: &str, key: &str, bytes: Vec<u8>) -> Result<()> {
        let place = self.place(bucket, key)?;
        self.sweep(&place);
        let put = self.runtime.block_on(self.store.put(&place, bytes.into()));
        put.map(drop).map_err(|e| error(&e, &place))
    }

    /// Removes an object, if it is there.
    ///
    /// # Errors
    /// [`ObjectError::Failed`].
    pub fn delete(&self, bucket: &str, key: &str) -> Result<()> {
        let place = self.place(bucket, key)?;
        match self.runtime.block_on(self.store.delete(&place)) {
            Err(Error::NotFound { .. }) => Ok(()),
            done => done.map_err(|e| error(&e, &place)),
        }
    }

    /// Begins to read an object. What is read is all of one version of it, or reading fails.
    ///
    /// # Errors
    /// [`ObjectError`].
    pub fn read(&self, bucket: &str, key: &str) -> Result<ObjectReader<'_>> {
        let place = self.place(bucket, key)?;
        let about = self.runtime.block_on(self.store.head(&place)).map_err(|e| error(&e, &place))?;
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
    /// [finished](ObjectWriter::finish). Nobody else writes it meanwhile.
    ///
    /// # Errors
    /// [`ObjectError::Failed`].
    pub fn write<'a>(
        &self,
        bucket: &str,
        key: &str,
        bytes: u64,
        tags: impl Iterator<Item = (&'a String, &'a String)>,
    ) -> Result<ObjectWriter<'_>> {
        let place = self.place(bucket, key)?;
        self.sweep(&place);
        let mut set = TagSet::default();
        tags.for_each(|(key, value)| set.push(key, value));
        let how = PutMultipartOptions { tags: set, ..PutMultipartOptions::default() };
        let upload = self.runtime.block_on(self.store.put_multipart_opts(&place, how));
        let upload = upload.map_err(|e| error(&e, &place))?;
        let part = PART.max((bytes / PARTS).next_multiple_of(1 << 20)) as usize;
        Ok(ObjectWriter {
            objects: self,
            place,
            upload: Some(upload),
            size: part,
            part: Vec::new(),
            sent: false,
        })
    }

    /// Removes what a daemon that was killed left of an object in a directory; what it left in S3 is for a rule there.
    fn sweep(&self, place: &Path) {
        let Some(file) = self.dir.as_ref().map(|dir| dir.join(place.as_ref())) else { return };
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

/// An object that is read from its begin.
pub struct ObjectReader<'a> {
    objects: &'a Objects,
    place: Path,
    /// Its bytes.
    pub size: u64,
    version: Option<String>,
    /// Where the next piece begins.
    at: u64,
    piece: Vec<u8>,
    used: usize,
}

impl ObjectReader<'_> {
    /// Gets the next piece.
    fn fetch(&mut self) -> Result<()> {
        (self.piece, self.used) = (Vec::new(), 0);
        let end = self.size.min(self.at + PIECE);
        if self.at == end {
            return Ok(());
        }
        let how = GetOptions {
            range: Some(GetRange::Bounded(self.at..end)),
            if_match: self.version.clone(),
            ..GetOptions::default()
        };
        let store = &self.objects.store;
        let got =
            self.objects.runtime.block_on(async { store.get_opts(&self.place, how).await?.bytes().await });
        let bytes = got.map_err(|e| error(&e, &self.place))?;
        if bytes.len() as u64 != end - self.at {
            return Err(ObjectError::Failed(format!("{} has become shorter", self.place)));
        }
        (self.piece, self.at) = (bytes.to_vec(), end);
        Ok(())
    }
}

impl Read for ObjectReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.piece.len() {
            self.fetch().map_err(io::Error::other)?;
        }
        let mut rest = self.piece.get(self.used..).unwrap_or_default();
        let count = rest.read(buffer)?;
        self.used += count;
        Ok(count)
    }
}

/// An object that is written; what is not finished is not there.
pub struct ObjectWriter<'a> {
    objects: &'a Objects,
    place: Path,
    upload: Option<Box<dyn MultipartUpload>>,
    size: usize,
    part: Vec<u8>,
    sent: bool,
}

impl ObjectWriter<'_> {
    fn send(&mut self) -> Result<()> {
        let Some(upload) = &mut self.upload else { return Ok(()) };
        let part = PutPayload::from(std::mem::take(&mut self.part));
        let put = self.objects.runtime.block_on(upload.put_part(part));
        self.sent = true;
        put.map_err(|e| error(&e, &self.place))
    }

    /// Has all of it be there.
    ///
    /// # Errors
    /// [`ObjectError::Failed`]; it is as it was before then.
    pub fn finish(mut self) -> Result<()> {
        if !self.part.is_empty() || !self.sent {
            self.send()?;
        }
        let Some(mut upload) = self.upload.take() else { return Ok(()) };
        let done = self.objects.runtime.block_on(upload.complete());
        if done.is_err() {
            self.upload = Some(upload);
        }
        done.map(drop).map_err(|e| error(&e, &self.place))
    }
}

impl Write for ObjectWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let take = bytes.len().min(self.size - self.part.len());
        self.part.extend_from_slice(bytes.get(..take).unwrap_or_default());
        if self.part.len() == self.size {
            self.send().map_err(io::Error::other)?;
        }
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ObjectWriter<'_> {
    fn drop(&mut self) {
        let Some(mut upload) = self.upload.take() else { return };
        if let Err(error) = self.objects.runtime.block_on(upload.abort()) {
            tracing::warn!(object = %self.place, %error, "what was written of it takes room still");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
    }

    #[test]
    fn names_are_s3s_and_lead_nowhere_else() {
        for good in ["abc", "a.b-c", "0123456789", &"a".repeat(63)] {
            check_bucket(good).unwrap();
        }
        for bad in
            ["", "ab", "..", "a..b", "-ab", "ab-", "Abc", "a/b", "a_b", "10.0.0.1", &"a".repeat(64), "a\0b"]
        {
            assert_eq!(check_bucket(bad).unwrap_err().code, "InvalidBucketName", "{bad}");
        }
        for good in ["ami-1.bin", "a/b/c", "it's(1)!", ".a", "a..b"] {
            check_key("Key", good).unwrap();
        }
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            ".",
            ".hutch-owner",
            "a#1",
            "a%2e",
            "ä",
            "a\nb",
            &"a".repeat(201),
        ] {
            assert_eq!(check_key("Key", bad).unwrap_err().code, "InvalidParameterValue", "{bad}");
        }
    }

    #[test]
    fn an_object_is_whole_or_not_there() {
        let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
        let dir = Objects::directory(&room.path().join("objects"), runtime.handle().clone()).unwrap();
        for objects in [dir, Objects::memory(runtime.handle().clone())] {
            // Three parts and pieces.
            let bytes: Vec<u8> = (0..(PART * 2 + 12_345)).map(|n| (n % 251) as u8).collect();
            let mut writer = objects.write("bucket", "a/b", 1, std::iter::empty()).unwrap();
            writer.write_all(&bytes).unwrap();
            assert!(matches!(objects.read("bucket", "a/b"), Err(ObjectError::Missing(_))));
            drop(writer);
            assert!(matches!(objects.read("bucket", "a/b"), Err(ObjectError::Missing(_))));
            let mut writer = objects.write("bucket", "a/b", 1, std::iter::empty()).unwrap();
            writer.write_all(&bytes).unwrap();
            writer.finish().unwrap();
            let mut read = Vec::new();
            objects.read("bucket", "a/b").unwrap().read_to_end(&mut read).unwrap();
            assert!(read == bytes);
            assert!(objects.small("bucket", "a/b", 100).is_err(), "it is larger");
            // One that is written anew meanwhile is not read half and half.
            let mut reader = objects.read("bucket", "a/b").unwrap();
            reader.read_exact(&mut [0; 100]).unwrap();
            objects.put("bucket", "a/b", bytes.iter().rev().copied().collect()).unwrap();
            assert!(reader.read_to_end(&mut read).is_err());
            objects.delete("bucket", "a/b").unwrap();
            objects.delete("bucket", "a/b").unwrap();
        }
    }

    #[test]
    fn a_bucket_is_whose_it_was_first() {
        let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
        let open =
            || Objects::open(&format!("file://{}", room.path().display()), runtime.handle().clone()).unwrap();
        let objects = open();
        assert_eq!(objects.check("bucket", "1").unwrap_err().code, "NoSuchBucket");
        objects.take("bucket", "1").unwrap();
        assert_eq!(objects.take("bucket", "2").unwrap_err().code, "AccessDenied");
        // Another daemon sees it so, too.
        assert_eq!(open().check("bucket", "2").unwrap_err().code, "AccessDenied");
        open().take("bucket", "1").unwrap();
        std::fs::write(room.path().join("bucket/.hutch-owner"), "{}").unwrap();
        assert_eq!(objects.check("bucket", "1").unwrap_err().code, "Unavailable", "it says nothing");
    }

    #[test]
    fn what_was_half_written_goes_with_the_next_one() {
        let (room, runtime) = (tempfile::tempdir().unwrap(), runtime());
        let objects = Objects::directory(room.path(), runtime.handle().clone()).unwrap();
        let mut writer = objects.write("bucket", "a", 1, std::iter::empty()).unwrap();
        writer.write_all(&vec![1; PART as usize]).unwrap();
        // As a kill would.
        std::mem::forget(writer);
        assert_eq!(std::fs::read_dir(room.path().join("bucket")).unwrap().count(), 1);
        objects.write("bucket", "a", 1, std::iter::empty()).unwrap().finish().unwrap();
        let files = std::fs::read_dir(room.path().join("bucket")).unwrap();
        assert_eq!(files.map(|file| file.unwrap().file_name()).collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn what_is_no_store_is_told() {
        let runtime = runtime();
        for bad in ["", "objects", "ftp://a/b", "file://host/dir", "s3://bucket?nonsense=1"] {
            assert!(Objects::open(bad, runtime.handle().clone()).is_err(), "{bad}");
        }
        let s3 = "s3://bucket/some/where?aws_endpoint=http://127.0.0.1:1&aws_allow_http=true&aws_access_key_id=a&aws_secret_access_key=b&aws_region=home-1";
        let s3 = Objects::open(s3, runtime.handle().clone()).unwrap();
        assert_eq!(format!("{s3:?}"), "s3://bucket/some/where");
        assert_eq!(s3.place("images", "a/b").unwrap().as_ref(), "some/where/images/a/b");
    }
}
