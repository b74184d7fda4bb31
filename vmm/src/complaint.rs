//! What a person is told on standard error. That may be a file on a disk that is full, or a pipe that nobody reads: then
//! nobody is told, and the machine goes on.

use std::fmt::Arguments;
use std::io::Write;

/// Writes a line, if it can be written.
pub fn complain(text: Arguments<'_>) {
    let mut line = format!("hutch-vmm: {text}");
    line.push('\n');
    // In one piece; where it fails there is nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::*;

    #[test]
    fn where_nothing_can_be_written_nothing_ends() {
        if std::env::var_os("HUTCH_COMPLAIN").is_some() {
            complain(format_args!("nobody reads this"));
            return;
        }
        let name = "complaint::tests::where_nothing_can_be_written_nothing_ends";
        let full = File::options().write(true).open("/dev/full").unwrap();
        // Not captured, so that it is the process' own standard error.
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", name, "--nocapture"]).env("HUTCH_COMPLAIN", "1").stderr(full);
        assert!(child.output().unwrap().status.success());
    }
}
