//! What the kernel's command line asks of init: pure text, no system calls.

/// What to do, read off `/proc/cmdline`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The block device to mount as root, such as `/dev/vda`; none: stay on the initrd.
    pub root: Option<String>,
    /// The sector of `root` at which the root's partition begins; 0: it has the whole device.
    pub start: u64,
    /// The command to run, its arguments apart; empty: a halt at once with code 0.
    pub command: Vec<String>,
    /// The terminal that the command is to read and to be controlled by, such as `ttyS0`; none: it reads nothing.
    pub console: Option<String>,
    /// The machine has none of hutch's ports, or they cannot be reached: no exit code, no mark.
    pub no_ports: bool,
}

/// Why the command line cannot be followed.
#[derive(Debug, PartialEq, Eq)]
pub enum PlanError {
    /// `hutch.cmd` is not hexadecimal text.
    NotHex,
    /// `hutch.cmd` is not UTF-8.
    NotUtf8,
    /// `hutch.start` is no number.
    NotANumber,
}

impl Plan {
    /// Reads `hutch.root=DEVICE`, `hutch.start=SECTOR`, `hutch.cmd=HEX`, where HEX encodes the arguments with a NUL after each,
    /// `hutch.console=TTY` and `hutch.ports=none`.
    pub fn parse(cmdline: &str) -> Result<Plan, PlanError> {
        let mut plan = Plan::default();
        for word in cmdline.split_ascii_whitespace() {
            if let Some(root) = word.strip_prefix("hutch.root=") {
                plan.root = (root != "none").then(|| root.to_owned());
            } else if let Some(hex) = word.strip_prefix("hutch.cmd=") {
                let bytes = unhex(hex).ok_or(PlanError::NotHex)?;
                let text = String::from_utf8(bytes).map_err(|_| PlanError::NotUtf8)?;
                plan.command = text.split_terminator('\0').map(str::to_owned).collect();
            } else if let Some(start) = word.strip_prefix("hutch.start=") {
                plan.start = start.parse().map_err(|_| PlanError::NotANumber)?;
            } else if let Some(console) = word.strip_prefix("hutch.console=") {
                plan.console = Some(console.to_owned());
            } else if word == "hutch.ports=none" {
                plan.no_ports = true;
            }
        }
        Ok(plan)
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_and_a_root_are_found_among_other_words() {
        let line =
            "console=ttyS0 hutch.root=/dev/vda hutch.start=2048 hutch.cmd=6c73002d6c2062c3a900 quiet\n";
        let plan = Plan::parse(line).unwrap();
        assert_eq!(plan.start, 2048);
        assert_eq!(plan.root.as_deref(), Some("/dev/vda"));
        assert_eq!(plan.command, ["ls", "-l bé"]);
        assert!(!plan.no_ports);
        assert!(Plan::parse("quiet hutch.ports=none").is_ok_and(|plan| plan.no_ports));
        assert!(
            Plan::parse("hutch.console=ttyS0").is_ok_and(|plan| plan.console.as_deref() == Some("ttyS0"))
        );
    }

    #[test]
    fn nothing_asked_is_nothing_done() {
        assert_eq!(Plan::parse("quiet hutch.root=none"), Ok(Plan::default()));
    }

    #[test]
    fn what_is_not_hex_or_text_is_refused() {
        for bad in ["hutch.cmd=6", "hutch.cmd=zz", "hutch.cmd=é1"] {
            assert_eq!(Plan::parse(bad), Err(PlanError::NotHex), "{bad}");
        }
        assert_eq!(Plan::parse("hutch.cmd=ff"), Err(PlanError::NotUtf8));
        assert_eq!(Plan::parse("hutch.start=-1"), Err(PlanError::NotANumber));
    }
}
