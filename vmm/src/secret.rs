//! Keys of disks on their way to the machine: in its configuration, or in a request at its control socket. Both come by
//! a pipe or a socket of our own, so that no key is in a file, an argument or the environment.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hutch_blockdev::Key;
use hutch_blockdev::crypt::KEY_LEN;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

/// Room for a configuration or a request, so that a buffer that grows leaves no part of it behind.
const ROOM: usize = 1 << 20;

/// The key of a layer, as base64.
#[derive(Debug, Clone)]
pub struct DiskKey(pub Key);

impl Serialize for DiskKey {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&Zeroizing::new(BASE64_STANDARD.encode(self.0.bytes())))
    }
}

impl<'de> Deserialize<'de> for DiskKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<DiskKey, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = DiskKey;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a key: {KEY_LEN} bytes as base64, with halves that differ")
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<DiskKey, E> {
                // One more than a key has: the decoder wants room for what the last letters could be.
                let mut bytes = Zeroizing::new([0; KEY_LEN + 2]);
                let count = BASE64_STANDARD.decode_slice(text, &mut *bytes).ok();
                let key = count.and_then(|count| Key::new(bytes.get(..count)?));
                // What it was is not to be told.
                key.map(DiskKey).ok_or_else(|| E::custom("a disk's key is none"))
            }
        }
        from.deserialize_str(Text)
    }
}

/// What may hold keys, as JSON that is gone when it is dropped.
///
/// # Errors
/// It is nothing that JSON has.
pub fn json(of: &impl Serialize) -> serde_json::Result<Zeroizing<Vec<u8>>> {
    let mut text = Zeroizing::new(Vec::with_capacity(ROOM));
    serde_json::to_writer(&mut *text, of)?;
    Ok(text)
}

/// Reads a text that may hold keys, up to `limit` bytes, into one that is gone when it is dropped.
///
/// # Errors
/// Those of `from`.
pub fn read(from: impl std::io::Read, limit: usize) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(limit + 1));
    std::io::Read::read_to_string(&mut from.take(limit as u64), &mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_arrives_and_is_not_shown() {
        let bytes: [u8; KEY_LEN] = std::array::from_fn(|i| i as u8);
        let key = DiskKey(Key::new(&bytes).unwrap());
        let text = json(&key).unwrap();
        let read: DiskKey = serde_json::from_slice(&text).unwrap();
        assert_eq!(read.0.bytes(), bytes);
        assert_eq!(format!("{read:?}"), "DiskKey(Key(…))");
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_told() {
        let secret = BASE64_STANDARD.encode([7; KEY_LEN]);
        for text in
            ["", "AAAA", "no base64!", &secret, &BASE64_STANDARD.encode([1; 65]), &"A".repeat(1 << 10)]
        {
            let refused = serde_json::from_value::<DiskKey>(text.into()).unwrap_err().to_string();
            assert!(text.is_empty() || !refused.contains(text), "{refused}");
        }
    }
}
