//! What an account has set for itself in a region.

use serde::{Deserialize, Serialize};

use crate::fault::Result;
use crate::model::{MetadataOptions, Record};

use super::Region;

/// The settings of an account.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountSettings {
    /// The account.
    pub id: String,
    /// Its images cannot be made public.
    #[serde(default)]
    pub block_public_images: bool,
    /// What its instances' metadata service does where a launch does not say.
    #[serde(default)]
    pub metadata: MetadataDefaults,
    /// Its new volumes and copies of snapshots are encrypted, whatever is asked for.
    #[serde(default)]
    pub encrypt: bool,
    /// The key that is used where none is named; `None`: the host's default.
    #[serde(default)]
    pub default_key: Option<String>,
}

/// Metadata options that an account prefers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataDefaults {
    /// Only version 2.
    pub tokens_required: Option<bool>,
    /// Hops of an answer with a token, 1 to 64.
    pub hop_limit: Option<u8>,
    /// It answers.
    pub enabled: Option<bool>,
    /// It tells the instance's tags.
    pub tags: Option<bool>,
}

impl MetadataDefaults {
    /// The options of a launch that says nothing of them.
    pub fn options(&self) -> MetadataOptions {
        let own = MetadataOptions::default();
        MetadataOptions {
            enabled: self.enabled.unwrap_or(own.enabled),
            tokens_required: self.tokens_required.unwrap_or(own.tokens_required),
            hop_limit: self.hop_limit.unwrap_or(own.hop_limit),
            tags: self.tags.unwrap_or(own.tags),
            ipv6: own.ipv6,
        }
    }
}

impl Record for AccountSettings {
    const KIND: &'static str = "account-settings";

    fn id(&self) -> &str {
        &self.id
    }
}

impl Region {
    /// What an account has set.
    ///
    /// # Errors
    /// The store's.
    pub fn account_settings(&self, account: &str) -> Result<AccountSettings> {
        let none = || AccountSettings { id: account.into(), ..AccountSettings::default() };
        Ok(self.get(account)?.unwrap_or_else(none))
    }

    /// Changes what an account has set.
    ///
    /// # Errors
    /// The store's.
    pub fn modify_account_settings(
        &self,
        account: &str,
        set: impl Fn(&mut AccountSettings),
    ) -> Result<AccountSettings> {
        self.transact(|work| {
            let none = || AccountSettings { id: account.into(), ..AccountSettings::default() };
            let mut settings = work.get(account)?.unwrap_or_else(none);
            set(&mut settings);
            work.put(&settings)?;
            Ok(settings)
        })
    }
}
