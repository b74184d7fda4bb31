//! The keys that wrap volumes' keys: each volume has a key of its own, which is only ever kept wrapped.
//!
//! ```text
//!   state/keys/NAME.json       a wrapping key: its id, and its bytes; ebs.json is the one that is used by default
//!   host/keys/vol-….json       a volume's key, wrapped (AES-256-GCM, bound to the volume's id), and by which
//! ```
//! Or a command wraps and unwraps, and no wrapping key is here: `COMMAND id` tells the one to be used by default;
//! `COMMAND wrap ID VOLUME` and `COMMAND unwrap ID VOLUME` read base64 on standard input and write it to standard output.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_blockdev::Key;
use hutch_blockdev::crypt::KEY_LEN;
use rand_core::{OsRng, RngCore};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

/// The name of the key that is made at the first start.
const OWN: &str = "ebs";
/// Bytes of a wrapping key, and of what makes each use of it different.
const LEN: usize = 32;
const NONCE: usize = 12;
/// How long the command may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer of the command.
const ANSWER: u64 = 64 << 10;

/// What is wrong with a key, for people.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct KeyError(String);

/// What these functions return.
pub type Result<T> = std::result::Result<T, KeyError>;

fn wrong<T>(why: impl Into<String>) -> Result<T> {
    Err(KeyError(why.into()))
}

/// A volume's key as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wrapped {
    /// The id of the key that wraps it.
    pub by: String,
    /// As base64.
    pub key: String,
}

/// A wrapping key as it is kept.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    id: String,
    key: String,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

struct Wrapping {
    id: String,
    key: Zeroizing<[u8; LEN]>,
}

/// The wrapping keys there are.
pub struct Keyring(Kind);

enum Kind {
    /// The default one first.
    Files(Vec<Wrapping>),
    Command {
        program: PathBuf,
        id: String,
    },
}

impl Keyring {
    /// The keys in `dir`, where one is made if there is none: durable before anything is wrapped with it.
    ///
    /// # Errors
    /// They cannot be read, or are none; others may read them.
    pub fn open(dir: &Path) -> Result<Keyring> {
        let failed = |path: &Path, e: io::Error| KeyError(format!("{}: {e}", path.display()));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|e| failed(dir, e))?;
        let own = dir.join(OWN).with_extension("json");
        if !own.exists() {
            make(dir, &own).map_err(|e| failed(&own, e))?;
        }
        let mut keys = Vec::new();
        for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
            let path = entry.map_err(|e| failed(dir, e))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                keys.push((path != own, read(&path)?));
            }
        }
        keys.sort_by(|(other, key), (more, with)| (other, &key.id).cmp(&(more, &with.id)));
        Ok(Keyring(Kind::Files(keys.into_iter().map(|(_, key)| key).collect())))
    }

    /// A program wraps and unwraps.
    ///
    /// # Errors
    /// It does not tell its key's id.
    pub fn command(program: &Path) -> Result<Keyring> {
        let told = run(program, &["id"], b"")?;
        let id = std::str::from_utf8(&told).unwrap_or_default().trim().to_owned();
        if !is_id(&id) {
            return wrong(format!(
                "{} id: it tells no id, which has letters, digits and -",
                program.display()
            ));
        }
        Ok(Keyring(Kind::Command { program: program.to_owned(), id }))
    }

    /// The ids of the keys that can be used, the default one first.
    pub fn ids(&self) -> Vec<String> {
        match &self.0 {
            Kind::Files(keys) => keys.iter().map(|key| key.id.clone()).collect(),
            Kind::Command { id, .. } => vec![id.clone()],
        }
    }

    /// A new key for `volume`, wrapped by the key `by`.
    ///
    /// # Errors
    /// There is no such key, or it cannot be used.
    pub fn make(&self, by: &str, volume: &str) -> Result<Wrapped> {
        let mut bytes = Zeroizing::new([0; KEY_LEN]);
        OsRng.fill_bytes(&mut *bytes);
        let wrapped = match &self.0 {
            Kind::Files(keys) => {
                let mut nonce = [0; NONCE];
                OsRng.fill_bytes(&mut nonce);
                let sealed = find(keys, by)?.encrypt(&Nonce::from(nonce), bound(volume, &*bytes));
                [&nonce[..], &sealed.map_err(|_| KeyError("a key cannot be wrapped".into()))?].concat()
            }
            Kind::Command { program, .. } => ask(program, "wrap", by, volume, &*bytes)?.to_vec(),
        };
        Ok(Wrapped { by: by.into(), key: BASE64_STANDARD.encode(wrapped) })
    }

    /// The key of `volume`.
    ///
    /// # Errors
    /// What wraps it is not here, or it was not wrapped by that for this volume.
    pub fn unwrap(&self, wrapped: &Wrapped, volume: &str) -> Result<Key> {
        let spoiled =
            || KeyError(format!("the key of {volume} is not one that {} wrapped for it", wrapped.by));
        let bytes = BASE64_STANDARD.decode(&wrapped.key).map_err(|_| spoiled())?;
        let key = match &self.0 {
            Kind::Files(keys) => {
                let (nonce, sealed) = bytes.split_first_chunk::<NONCE>().ok_or_else(spoiled)?;
                let opened = find(keys, &wrapped.by)?.decrypt(&Nonce::from(*nonce), bound(volume, sealed));
                Zeroizing::new(opened.map_err(|_| spoiled())?)
            }
            Kind::Command { program, .. } => ask(program, "unwrap", &wrapped.by, volume, &bytes)?,
        };
        Key::new(&key).ok_or_else(spoiled)
    }
}

fn find(keys: &[Wrapping], id: &str) -> Result<Aes256Gcm> {
    let found = keys.iter().find(|key| key.id == id);
    let missing = || {
        KeyError(format!(
            "the key {id} is not in the directory of keys; put its file back, as it was kept apart"
        ))
    };
    Ok(Aes256Gcm::new((&*found.ok_or_else(missing)?.key).into()))
}

/// What is bound to a volume cannot be given to another.
fn bound<'a>(volume: &'a str, msg: &'a [u8]) -> Payload<'a, 'a> {
    Payload { msg, aad: volume.as_bytes() }
}

fn is_id(id: &str) -> bool {
    !id.is_empty() && id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Makes a wrapping key: whole and durable, or none.
fn make(dir: &Path, path: &Path) -> io::Result<()> {
    let mut key = Zeroizing::new([0; LEN]);
    OsRng.fill_bytes(&mut *key);
    let kept = Kept { id: uuid::Uuid::new_v4().to_string(), key: BASE64_STANDARD.encode(key.as_slice()) };
    let text = Zeroizing::new(serde_json::to_vec(&kept)?);
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&text)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()?;
    dir.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

fn read(path: &Path) -> Result<Wrapping> {
    use std::os::unix::fs::MetadataExt;
    let no = |why: &str| KeyError(format!("the key {}: {why}", path.display()));
    let mut file = File::open(path).map_err(|e| no(&e.to_string()))?;
    let mode = file.metadata().map_err(|e| no(&e.to_string()))?.mode();
    if mode & 0o077 != 0 {
        return Err(no("others may read it; chmod 600 it, and think about who has"));
    }
    let mut text = Zeroizing::new(Vec::with_capacity(4096));
    (&mut file).take(4096).read_to_end(&mut text).map_err(|e| no(&e.to_string()))?;
    let kept: Kept = serde_json::from_slice(&text).map_err(|_| no("it is none"))?;
    let mut key = Zeroizing::new([0; LEN + 2]);
    let count = BASE64_STANDARD.decode_slice(&kept.key, &mut *key).map_err(|_| no("it is none"))?;
    let (Some(bytes), LEN, true) = (key.first_chunk(), count, is_id(&kept.id)) else {
        return Err(no("it is none"));
    };
    Ok(Wrapping { id: kept.id.clone(), key: Zeroizing::new(*bytes) })
}

fn ask(program: &Path, verb: &str, id: &str, volume: &str, bytes: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let text = Zeroizing::new(BASE64_STANDARD.encode(bytes));
    let told = run(program, &[verb, id, volume], text.as_bytes())?;
    let told: Zeroizing<String> =
        Zeroizing::new(std::str::from_utf8(&told).unwrap_or_default().split_whitespace().collect());
    let no = |_| KeyError(format!("{} {verb} {id}: its answer is no base64", program.display()));
    Ok(Zeroizing::new(BASE64_STANDARD.decode(&*told).map_err(no)?))
}

/// What a program says; its complaints are told, and what it was given is not.
fn run(program: &Path, args: &[&str], input: &[u8]) -> Result<Zeroizing<Vec<u8>>> {
    let name = || format!("the key command {} {}", program.display(), args.join(" "));
    let no = |e: io::Error| KeyError(format!("{}: {e}", name()));
    let piped = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = piped.map_err(no)?;
    let given = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input));
    let (tell, told) = channel();
    for (is_error, from) in [
        (false, child.stdout.take().map(|out| Box::new(out) as Box<dyn Read + Send>)),
        (true, child.stderr.take().map(|out| Box::new(out) as Box<dyn Read + Send>)),
    ] {
        let tell = tell.clone();
        std::thread::spawn(move || {
            let mut text = Zeroizing::new(Vec::with_capacity(ANSWER as usize));
            let read = from.map_or(Ok(0), |from| from.take(ANSWER).read_to_end(&mut text));
            // Nobody listens when it took too long.
            let _ = tell.send((is_error, read.map(|_| text)));
        });
    }
    let (mut answer, mut complaint) = (Zeroizing::default(), Zeroizing::default());
    for _ in 0..2 {
        match told.recv_timeout(PATIENCE) {
            Ok((true, text)) => complaint = text.map_err(no)?,
            Ok((false, text)) => answer = text.map_err(no)?,
            Err(_) => {
                // It may have ended meanwhile.
                let _ = child.kill();
                let _ = child.wait();
                return wrong(format!("{}: it takes longer than {} s", name(), PATIENCE.as_secs()));
            }
        }
    }
    let status = child.wait().map_err(no)?;
    if !status.success() {
        let complaint: String = String::from_utf8_lossy(&complaint).trim().chars().take(300).collect();
        return wrong(format!("{}: {status}: {complaint}", name()));
    }
    given.map_err(no)?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_and_unwrapped_for_their_volume_only() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("keys");
        let ring = Keyring::open(&dir).unwrap();
        let [own] = ring.ids().try_into().unwrap();
        let wrapped = ring.make(&own, "vol-1").unwrap();
        let again = Keyring::open(&dir).unwrap();
        assert!(again.ids().iter().eq([&own]));
        let key = again.unwrap(&wrapped, "vol-1").unwrap();
        assert_ne!(again.unwrap(&ring.make(&own, "vol-1").unwrap(), "vol-1").unwrap().bytes(), key.bytes());
        assert!(again.unwrap(&wrapped, "vol-2").is_err(), "bound to its volume");
        assert!(ring.make("another", "vol-1").is_err());
        let text = serde_json::to_string(&wrapped).unwrap();
        assert!(!text.contains(&BASE64_STANDARD.encode(key.bytes())));
        // A new one by default; the old one stays for what it wrapped.
        fs::rename(dir.join("ebs.json"), dir.join("old.json")).unwrap();
        let both = Keyring::open(&dir).unwrap();
        let [new, old] = both.ids().try_into().unwrap();
        assert!(old == own && new != own);
        assert_eq!(both.unwrap(&wrapped, "vol-1").unwrap().bytes(), key.bytes());
        fs::remove_file(dir.join("old.json")).unwrap();
        let why = Keyring::open(&dir).unwrap().unwrap(&wrapped, "vol-1").err().unwrap().to_string();
        assert!(why.contains(&own) && why.contains("put its file back"), "{why}");
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("keys");
        Keyring::open(&dir).unwrap();
        let own = dir.join("ebs.json");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&own)), (0o700, 0o600));
        fs::set_permissions(&own, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Keyring::open(&dir).err().unwrap().to_string().contains("chmod 600"));
        fs::set_permissions(&own, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&own, r#"{"id":"x","key":"AAAA"}"#).unwrap();
        let why = Keyring::open(&dir).err().unwrap().to_string();
        assert!(why.contains("it is none") && !why.contains("AAAA"), "{why}");
    }

    #[test]
    fn a_command_wraps_and_unwraps() {
        let home = tempfile::tempdir().unwrap();
        let program = home.path().join("kms");
        // "Wraps" by turning the upper bit of each byte.
        let script = r#"#!/bin/sh
turn() { base64 -d | tr '\000-\177\200-\377' '\200-\377\000-\177' | base64; }
case $1 in
id) echo kek-7 ;;
wrap) echo "$3" > "$0.for"; turn ;;
unwrap) [ "$(cat "$0.for")" = "$3" ] || { echo not yours >&2; exit 3; }; turn ;;
esac
"#;
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let ring = Keyring::command(&program).unwrap();
        assert_eq!(ring.ids(), ["kek-7"]);
        let wrapped = ring.make("kek-7", "vol-1").unwrap();
        let key = ring.unwrap(&wrapped, "vol-1").unwrap();
        assert_ne!(BASE64_STANDARD.encode(key.bytes()), wrapped.key);
        let why = ring.unwrap(&wrapped, "vol-2").err().unwrap().to_string();
        assert!(why.contains("not yours") && why.contains("exit status: 3"), "{why}");
        assert!(Keyring::command(Path::new("/nonexistent/kms")).is_err());
        assert!(Keyring::command(Path::new("/bin/true")).is_err());
    }
}
