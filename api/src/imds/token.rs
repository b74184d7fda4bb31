//! Session tokens of version 2: signed, not remembered, so that no number of them costs memory.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

/// What signs the tokens of a service: 64 bytes, HMAC-SHA-256's block.
#[derive(Clone)]
pub struct Secret([u8; 64]);

/// When the token ends (seconds since 1970, big-endian), then its signature.
const EXPIRES: usize = 8;

impl From<[u8; 64]> for Secret {
    /// A secret that is kept by somebody.
    fn from(bytes: [u8; 64]) -> Secret {
        Secret(bytes)
    }
}

impl Secret {
    /// A secret of its own, which dies with the process.
    pub fn random() -> Secret {
        let mut bytes = [0; 64];
        for part in bytes.chunks_mut(16) {
            part.copy_from_slice(uuid::Uuid::new_v4().as_bytes());
        }
        Secret(bytes)
    }

    /// A token of `instance` that is good for `ttl` seconds from `now`.
    pub(super) fn issue(&self, instance: &str, ttl: u32, now: u64) -> String {
        let expires = now.saturating_add(ttl.into()).to_be_bytes();
        let mut token = expires.to_vec();
        token.extend(self.signed(instance, &expires).finalize().into_bytes());
        URL_SAFE_NO_PAD.encode(token)
    }

    /// The seconds that a token is still good for; `None` if it is another's, over, or not ours.
    pub(super) fn verify(&self, instance: &str, token: &[u8], now: u64) -> Option<u64> {
        let token = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (expires, signature) = token.split_first_chunk::<EXPIRES>()?;
        // Takes the same time however much of it is right.
        self.signed(instance, expires).verify_slice(signature).ok()?;
        u64::from_be_bytes(*expires).checked_sub(now).filter(|left| *left > 0)
    }

    fn signed(&self, instance: &str, expires: &[u8; EXPIRES]) -> Hmac<Sha256> {
        // A whole block: the key is taken as it is.
        let mut mac = Hmac::<Sha256>::new((&self.0).into());
        mac.update(expires);
        mac.update(instance.as_bytes());
        mac
    }
}
