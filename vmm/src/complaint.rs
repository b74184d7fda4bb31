//! What a person is told on standard error. That may be a file on a disk that is full, or a pipe that nobody reads: then
//! nobody is told, and the machine goes on.

use std::fmt::Arguments;
use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines that are written in so long a time: a guest that provokes more of them must not fill the host's disk.
const MOST: u32 = 50;
const WHILE: Duration = Duration::from_secs(60);

static TOLD: Mutex<Option<(Instant, u32)>> = Mutex::new(None);

/// Writes a line, if it can be written, and if there were not too many just now.
pub fn complain(text: Arguments<'_>) {
    let more = match count(&mut TOLD.lock().unwrap_or_else(PoisonError::into_inner), Instant::now()) {
        0..MOST => "",
        MOST => " (what else there is in this minute is not told)",
        _ => return,
    };
    let mut line = format!("hutch-vmm: {text}{more}");
    line.push('\n');
    // In one piece; where it fails there is nobody to tell.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// How many lines there were before this one since the while began that it is part of.
fn count(told: &mut Option<(Instant, u32)>, now: Instant) -> u32 {
    let fresh = || (now, 0);
    let (began, lines) = told.filter(|(began, _)| now.duration_since(*began) < WHILE).unwrap_or_else(fresh);
    *told = Some((began, lines.saturating_add(1)));
    lines
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::*;

    #[test]
    fn who_complains_all_the_time_is_heard_a_part_of_it() {
        let (start, mut told) = (Instant::now(), None);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(
            (0..100).map(|_| count(&mut told, at(0))).collect::<Vec<_>>(),
            (0..100).collect::<Vec<_>>()
        );
        assert_eq!(count(&mut told, at(59)), 100);
        assert_eq!((count(&mut told, at(60)), count(&mut told, at(61))), (0, 1));
    }

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
