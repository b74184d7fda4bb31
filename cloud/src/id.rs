//! EC2's ids: a word for the kind, a dash, 17 hexadecimal digits.

use crate::fault::{Fault, Result};

/// A new id, such as `i-0123456789abcdef0`: 64 random bits behind the leading 0 that EC2's have.
pub fn new(prefix: &str) -> String {
    format!("{prefix}-0{:016x}", uuid::Uuid::new_v4().as_u64_pair().1)
}

/// An id that is the same for the same content.
pub fn of(prefix: &str, content: &str) -> String {
    let digest = <sha2::Sha256 as sha2::Digest>::digest(content.as_bytes());
    let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}-0{hex}")
}

/// What is wrong with an id that is no id at all. It may begin with any of `prefix`, such as `ami|aki`: the first is told.
///
/// # Errors
/// `KIND.Malformed`, where `kind` is such as `InvalidInstanceID`.
pub fn check(id: &str, prefix: &str, kind: &'static str) -> Result<()> {
    let digits = prefix.split('|').find_map(|prefix| id.strip_prefix(prefix)?.strip_prefix('-'));
    let prefix = prefix.split('|').next().unwrap_or_default();
    let well = |digits: &str| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    match digits.is_some_and(well) {
        true => Ok(()),
        false => Err(Fault::new(
            format!("{kind}.Malformed"),
            format!("Invalid id: \"{id}\" (expecting \"{prefix}-...\")"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_well_formed() {
        for id in [new("i"), of("i", "x"), "i-12345678".into()] {
            check(&id, "i", "InvalidInstanceID").unwrap();
            assert!(check(&id, "vol", "InvalidVolume").is_err());
        }
        assert_ne!(new("i"), new("i"));
        assert_eq!(of("ami", "a"), of("ami", "a"));
        check("aki-12345678", "ami|aki", "InvalidAMIID").unwrap();
        let bad = check("ari-12345678", "ami|aki", "InvalidAMIID").unwrap_err();
        assert!(bad.message.contains("(expecting \"ami-...\")"), "{}", bad.message);
        for bad in ["", "i", "i-", "i-1234567", "i-1234567g", "i-0123456789ABCDEF0"] {
            assert_eq!(check(bad, "i", "InvalidInstanceID").unwrap_err().code, "InvalidInstanceID.Malformed");
        }
    }
}
