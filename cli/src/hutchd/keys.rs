//! Access keys: whose they are, and their secrets.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_api::query::Credential;
use serde::{Deserialize, Serialize};

/// The first account.
const ACCOUNT: &str = "000000000001";
/// Where they are kept, below the state.
const FILE: &str = "keys.json";

/// An access key.
#[derive(Clone, Serialize, Deserialize)]
pub struct Key {
    id: String,
    secret: String,
    account: String,
}

/// Its secret is for nobody's eyes.
impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {}", self.id, self.account)
    }
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Key, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (id, secret, account) = match parts.as_slice() {
            [id, secret] => (id, secret, ACCOUNT),
            [id, secret, account] => (id, secret, *account),
            _ => return Err("it is ID:SECRET or ID:SECRET:ACCOUNT".into()),
        };
        if id.is_empty() || secret.is_empty() {
            return Err("the id and the secret are not empty".into());
        }
        if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
            return Err("an account has 12 digits".into());
        }
        Ok(Key { id: (*id).into(), secret: (*secret).into(), account: account.into() })
    }
}

/// All keys, by id.
pub struct Keys(BTreeMap<String, Key>);

impl Keys {
    /// Those that are kept in the state, and `more`. The first start makes one and says where it is.
    pub fn open(state: Option<&Path>, more: Option<Key>) -> anyhow::Result<Keys> {
        let mut keys = match state {
            Some(state) => kept(state, more.is_none())?,
            None => Vec::new(),
        };
        if keys.is_empty() && more.is_none() {
            bail!("with nothing kept there is no access key: name one with --root-key ID:SECRET");
        }
        keys.extend(more);
        Ok(Keys(keys.into_iter().map(|key| (key.id.clone(), key)).collect()))
    }

    /// The account that images belong to.
    pub fn owner(&self) -> &str {
        ACCOUNT
    }

    /// The secret of an access key, and whose it is.
    pub fn credential(&self, id: &str) -> Option<Credential> {
        let key = self.0.get(id)?;
        Some(Credential { secret: key.secret.clone(), account: key.account.clone() })
    }
}

fn kept(state: &Path, make: bool) -> anyhow::Result<Vec<Key>> {
    let path = state.join(FILE);
    match fs::read(&path) {
        Ok(text) => {
            return serde_json::from_slice(&text).with_context(|| format!("cannot read {}", path.display()));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    }
    if !make {
        return Ok(Vec::new());
    }
    let random = || uuid::Uuid::new_v4().into_bytes();
    let id: String = random()
        .iter()
        .map(|byte| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[usize::from(byte % 32)]))
        .collect();
    // 240 random bits in 40 characters, as AWS's secrets have.
    let bytes: Vec<u8> = [random(), random()].concat().into_iter().take(30).collect();
    let key = Key { id: format!("AKIA{id}"), secret: BASE64_STANDARD.encode(bytes), account: ACCOUNT.into() };
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec_pretty(&[&key])?)?;
    file.sync_all()?;
    fs::rename(&new, &path)?;
    println!("hutchd: the administrator's access key is in {}", path.display());
    Ok(vec![key])
}
