//! Checked names: what gets into a ruleset as text has passed through here, so nothing can be injected into it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Every tap of ours begins with this, and the firewall drops by this prefix whatever it does not know.
pub const TAP_PREFIX: &str = "hu";

/// The longest link name: the kernel's `IFNAMSIZ` without the final zero byte.
pub const MAX_LINK_NAME: usize = 15;

/// A name or address that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a tap of ours.
    #[error("tap name {0:?} is not \"hu\" and 1 to 13 lower-case hexadecimal digits")]
    Tap(String),
    /// Not usable as the link to the outside.
    #[error(
        "uplink {0:?} is not a link name (1 to 15 of letters, digits, '.', '_', '-'; not one of our taps)"
    )]
    Uplink(String),
    /// Not the id of a security group.
    #[error("{0:?} is not a security group's id: 1 to 32 lower-case letters, digits and '-', a letter first")]
    Group(String),
    /// Not a unicast hardware address.
    #[error("{0:?} is not a unicast MAC address such as 02:00:5e:10:00:01")]
    Mac(String),
}

/// The name of a guest's tap: `hu` and 1 to 13 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TapName(String);

impl FromStr for TapName {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let digits = s.strip_prefix(TAP_PREFIX).unwrap_or_default();
        let hex = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if digits.is_empty() || !hex || s.len() > MAX_LINK_NAME {
            return Err(NameError::Tap(s.into()));
        }
        Ok(Self(s.into()))
    }
}

impl fmt::Display for TapName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of a security group: 1 to 32 lower-case letters, digits and dashes, a letter first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GroupId(String);

impl GroupId {
    /// The id of the group of guests without a daemon.
    pub fn alone() -> GroupId {
        GroupId("alone".into())
    }
}

impl FromStr for GroupId {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let plain = s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        match plain && s.starts_with(|c: char| c.is_ascii_lowercase()) && s.len() <= 32 {
            true => Ok(Self(s.into())),
            false => Err(NameError::Group(s.into())),
        }
    }
}

impl TryFrom<String> for GroupId {
    type Error = NameError;
    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<GroupId> for String {
    fn from(id: GroupId) -> String {
        id.0
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The host's link to the outside, which guests may be routed and translated to.
///
/// Names that begin as our taps do are refused: the firewall knows guests by that prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink(String);

impl FromStr for Uplink {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let plain = s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        let reserved = matches!(s, "." | "..") || s.starts_with(TAP_PREFIX);
        if s.is_empty() || s.len() > MAX_LINK_NAME || !plain || reserved {
            return Err(NameError::Uplink(s.into()));
        }
        Ok(Self(s.into()))
    }
}

impl fmt::Display for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A unicast, non-zero hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address with these bytes; `None` for group addresses (bit 0 of the first byte) and for all zeroes.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        (bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// The six bytes as they stand in a frame.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddr {
    type Err = NameError;
    fn from_str(s: &str) -> Result<Self, NameError> {
        let bad = || NameError::Mac(s.into());
        let mut bytes = [0; 6];
        let mut parts = s.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(bad)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() {
            return Err(bad());
        }
        Self::new(bytes).ok_or_else(bad)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_the_text_are_refused() {
        for bad in ["", "hu", "eth0", "hu*", "huXY", "hu0\" drop", "hu00112233445566"] {
            assert!(bad.parse::<TapName>().is_err(), "{bad:?}");
        }
        for bad in ["", "..", "hu12", "a\"b", "a*", "a b", "a;b", "sixteen-letters-"] {
            assert!(bad.parse::<Uplink>().is_err(), "{bad:?}");
        }
        for bad in ["", "sg 1", "sg-1;", "sg-1\" drop", "SG-1", "1sg", "-sg", "sg_1", &"a".repeat(33)] {
            assert!(bad.parse::<GroupId>().is_err(), "{bad:?}");
        }
        for bad in [
            "",
            "02:00",
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:+1",
        ] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_come_back_as_written() {
        for tap in ["hu0", "hu0123abcd", "hu0123456789abc"] {
            assert_eq!(tap.parse::<TapName>().unwrap().to_string(), tap);
        }
        assert_eq!("sg-0123456789abcdef0".parse::<GroupId>().unwrap().to_string(), "sg-0123456789abcdef0");
        assert_eq!("enp0s3.7".parse::<Uplink>().unwrap().to_string(), "enp0s3.7");
        assert_eq!("02:0A:00:00:00:01".parse::<MacAddr>().unwrap().to_string(), "02:0a:00:00:00:01");
    }
}
