//! Which volumes and snapshots are encrypted, and by which key. Keys are the host's; here they are ids.

use crate::fault::{Fault, Result};
use crate::model::Snapshot;

use super::{AccountSettings, Region, Work};

/// The name that EC2 gives the key that is used by default.
const ALIAS: &str = "alias/aws/ebs";

/// What a request says of encryption.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encryption {
    /// Encrypted, or not.
    pub encrypted: Option<bool>,
    /// The key: its id, its ARN, or an alias.
    pub key: Option<String>,
}

/// Why something that is encrypted cannot be had: EC2's code.
pub(super) const NO_KEY: &str = "Client.InvalidKMSKey.InvalidState";

impl Region {
    /// A key as EC2 tells it.
    pub fn key_arn(&self, account: &str, key: &str) -> String {
        format!("arn:aws:kms:{}:{account}:key/{key}", self.settings.name)
    }

    /// The id of a key that a request names.
    ///
    /// # Errors
    /// `InvalidKmsKey.NotFound`.
    pub fn key(&self, named: &str) -> Result<String> {
        let keys = self.host.keys();
        let id = named.rsplit_once(":key/").map_or(named, |(_, id)| id);
        if named == ALIAS || named.ends_with(&format!(":{ALIAS}")) {
            return keys.into_iter().next().ok_or_else(|| missing(named));
        }
        keys.into_iter().find(|key| key == id).ok_or_else(|| missing(named))
    }

    /// The key that an account's volumes are encrypted with where nothing else is said.
    ///
    /// # Errors
    /// `InvalidKmsKey.NotFound`: the host has none, or not any more.
    pub fn default_key(&self, settings: &AccountSettings) -> Result<String> {
        self.key(settings.default_key.as_deref().unwrap_or(ALIAS))
    }

    /// The key that what is being made is encrypted with. What comes of something encrypted is encrypted, whatever is said.
    pub(super) fn key_for(
        &self,
        work: &mut Work<'_>,
        account: &str,
        asked: &Encryption,
        of: Option<&Snapshot>,
    ) -> Result<Option<String>> {
        let inherited = of.and_then(|snapshot| snapshot.key.as_ref());
        if let (Some(of), Some(false)) = (of.filter(|_| inherited.is_some()), asked.encrypted) {
            let why = format!("The snapshot {} is encrypted, and so is all that is made of it.", of.id);
            return Err(Fault::value("encrypted", "false", &why));
        }
        if asked.key.is_some() && inherited.is_none() && asked.encrypted != Some(true) {
            let why = "The parameter KmsKeyId requires the parameter Encrypted to be set.";
            return Err(Fault::new("InvalidParameterDependency", why));
        }
        if let Some(named) = &asked.key {
            return self.key(named).map(Some);
        }
        if let Some(inherited) = inherited
            && let Ok(key) = self.key(inherited)
        {
            return Ok(Some(key));
        }
        let settings = work.get::<AccountSettings>(account)?.unwrap_or_default();
        match inherited.is_some() || asked.encrypted == Some(true) || settings.encrypt {
            true => self.default_key(&settings).map(Some),
            false => Ok(None),
        }
    }
}

fn missing(named: &str) -> Fault {
    let why = format!("The key '{named}' does not exist; GetEbsDefaultKmsKeyId tells one that does");
    Fault::new("InvalidKmsKey.NotFound", why)
}
