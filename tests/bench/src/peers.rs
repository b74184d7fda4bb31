//! Other VMMs that take part in the boot bench, by programs that are named from outside.

use std::path::PathBuf;
use std::str::FromStr;

/// `NAME=PROGRAM`: called with `--kernel FILE --initrd FILE --append TEXT --cpus N --memory MIB`, it runs a guest with the
/// serial console on its standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What the table calls it.
    pub name: String,
    /// The program.
    pub program: PathBuf,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Peer, String> {
        match text.split_once('=') {
            Some((name, program)) if !name.is_empty() && !program.is_empty() => {
                Ok(Peer { name: name.into(), program: program.into() })
            }
            _ => Err(format!("{text:?} is not NAME=PROGRAM")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_a_name_and_a_program() {
        let peer: Peer = "fc=/opt/a=b".parse().unwrap();
        assert_eq!((peer.name.as_str(), peer.program.as_os_str().to_str()), ("fc", Some("/opt/a=b")));
        for bad in ["", "fc", "fc=", "=x"] {
            assert!(bad.parse::<Peer>().is_err(), "{bad}");
        }
    }
}
