//! Key pairs: the private half is shown once and never kept.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rsa::pkcs1::EncodeRsaPrivateKey;
use rsa::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use sha2::Digest;
use ssh_key::{PrivateKey, PublicKey};

use crate::fault::{Fault, Result};
use crate::id;
use crate::model::{KeyPair, Tags};

use super::{Region, now, tags};

/// The bits of an RSA key that is made here, as EC2 makes them.
const RSA_BITS: usize = 2048;

/// The algorithm of a key pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// RSA, 2048 bits.
    Rsa,
    /// Ed25519.
    Ed25519,
}

/// A key pair that was made, with the private half.
pub struct NewKey {
    /// What is kept.
    pub pair: KeyPair,
    /// The private key, in PEM.
    pub material: String,
}

impl Region {
    /// Makes a key pair.
    ///
    /// # Errors
    /// `InvalidKeyPair.Duplicate`, `InvalidParameterValue`.
    pub fn create_key(&self, account: &str, name: &str, algorithm: Algorithm, tags: &Tags) -> Result<NewKey> {
        self.free_name(account, name)?;
        let made = match algorithm {
            Algorithm::Rsa => make_rsa(),
            Algorithm::Ed25519 => make_ed25519(),
        };
        let (kind, public, fingerprint, material) = made.map_err(Fault::internal)?;
        let pair = self.keep(account, name, kind, fingerprint, public, tags)?;
        Ok(NewKey { pair, material })
    }

    /// Keeps a public key: a line of OpenSSH's.
    ///
    /// # Errors
    /// `InvalidKeyPair.Duplicate`, `InvalidKey.Format`, `InvalidParameterValue`.
    pub fn import_key(&self, account: &str, name: &str, material: &[u8], tags: &Tags) -> Result<KeyPair> {
        self.free_name(account, name)?;
        let format = || Fault::new("InvalidKey.Format", "Key is not in valid OpenSSH public key format");
        let text = std::str::from_utf8(material).map_err(|_| format())?.trim();
        let key = PublicKey::from_openssh(text).map_err(|_| format())?;
        let (kind, fingerprint) = match key.key_data() {
            ssh_key::public::KeyData::Ed25519(_) => ("ed25519", sha256(&key).map_err(|_| format())?),
            ssh_key::public::KeyData::Rsa(rsa) => {
                let rsa = rsa::RsaPublicKey::try_from(rsa).map_err(|_| format())?;
                let der = rsa.to_public_key_der().map_err(|_| format())?;
                ("rsa", colons(&md5::Md5::digest(der.as_bytes())))
            }
            _ => return Err(format()),
        };
        // One line, as it goes into the guest's authorized_keys; the comment is the name.
        let public = PublicKey::new(key.key_data().clone(), name).to_openssh().map_err(|_| format())?;
        self.keep(account, name, kind, fingerprint, public, tags)
    }

    /// Forgets a key pair; it is no error when there is none.
    ///
    /// # Errors
    /// The store's.
    pub fn delete_key(&self, account: &str, name: &str) -> Result<Option<KeyPair>> {
        self.transact(|work| {
            let id = format!("{account}/{name}");
            let key = work.get::<KeyPair>(&id)?;
            if key.is_some() {
                work.delete::<KeyPair>(&id);
            }
            Ok(key)
        })
    }

    fn free_name(&self, account: &str, name: &str) -> Result<()> {
        let plain = |c: char| c.is_ascii() && !c.is_ascii_control() && c != '/';
        if name.is_empty() || name.len() > 255 || !name.chars().all(plain) || name.trim() != name {
            let why =
                "A key pair's name has 1 to 255 ASCII characters, without a slash and blanks at its ends.";
            return Err(Fault::value("KeyName", name, why));
        }
        match self.get::<KeyPair>(&format!("{account}/{name}"))? {
            Some(_) => Err(duplicate(name)),
            None => Ok(()),
        }
    }

    fn keep(
        &self,
        account: &str,
        name: &str,
        kind: &str,
        fingerprint: String,
        public: String,
        tags: &Tags,
    ) -> Result<KeyPair> {
        tags::check(tags)?;
        let pair = KeyPair {
            id: format!("{account}/{name}"),
            key_id: id::new("key"),
            name: name.into(),
            kind: kind.into(),
            fingerprint,
            public,
            created: now(),
            tags: tags.clone(),
        };
        self.transact(|work| match work.get::<KeyPair>(&pair.id)? {
            Some(_) => Err(duplicate(name)),
            None => work.put(&pair),
        })?;
        Ok(pair)
    }
}

fn duplicate(name: &str) -> Fault {
    Fault::new("InvalidKeyPair.Duplicate", format!("The keypair '{name}' already exists."))
}

type Made = (&'static str, String, String, String);

/// RSA: the fingerprint is the SHA-1 of the private key in PKCS#8's DER, as EC2 has it of keys it made.
fn make_rsa() -> std::result::Result<Made, Box<dyn std::error::Error>> {
    let key = rsa::RsaPrivateKey::new(&mut rand_core::OsRng, RSA_BITS)?;
    let fingerprint = colons(&sha1::Sha1::digest(key.to_pkcs8_der()?.as_bytes()));
    let public = ssh_key::public::RsaPublicKey::try_from(key.to_public_key())?;
    let public = PublicKey::from(public).to_openssh()?;
    Ok(("rsa", public, fingerprint, key.to_pkcs1_pem(LineEnding::LF)?.to_string()))
}

/// Ed25519: the SHA-256 of the public key, as OpenSSH shows it.
fn make_ed25519() -> std::result::Result<Made, Box<dyn std::error::Error>> {
    let key = PrivateKey::random(&mut rand_core::OsRng, ssh_key::Algorithm::Ed25519)?;
    let fingerprint = sha256(key.public_key())?;
    Ok(("ed25519", key.public_key().to_openssh()?, fingerprint, key.to_openssh(LineEnding::LF)?.to_string()))
}

fn sha256(key: &PublicKey) -> ssh_key::Result<String> {
    Ok(BASE64_STANDARD.encode(sha2::Sha256::digest(key.to_bytes()?)))
}

fn colons(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
}
