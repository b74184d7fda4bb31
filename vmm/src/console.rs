//! What the guest says on its serial port: a bounded ring for readers, a file for later, and the one line that matters
//! when a kernel dies.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;

/// The ring keeps this many bytes: some 800 lines of a kernel's log.
pub const RING: usize = 64 << 10;
/// Longer lines are looked at in pieces of this many bytes.
const LINE: usize = 1024;
const PANIC: &str = "Kernel panic - not syncing";
const PANIC_END: &str = "end Kernel panic";

/// The console's output so far.
#[derive(Default)]
pub struct Console {
    ring: VecDeque<u8>,
    log: Option<File>,
    log_left: Option<u64>,
    total: u64,
    line: Vec<u8>,
    panic: Option<String>,
    panic_over: bool,
}

impl Console {
    /// A console that also appends to `log`, at most `limit` bytes (0: no bound).
    pub fn new(log: Option<File>, limit: u64) -> Console {
        Console { log, log_left: (limit > 0).then_some(limit), ..Console::default() }
    }

    /// Takes what the guest wrote. A log that cannot be written is given up, the ring goes on.
    pub fn push(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        for &b in bytes {
            if self.ring.len() == RING {
                self.ring.pop_front();
            }
            self.ring.push_back(b);
            if b == b'\n' || self.line.len() == LINE {
                self.end_of_line();
            }
            if b != b'\n' && b != b'\r' {
                self.line.push(b);
            }
        }
        let n = self.log_left.map_or(bytes.len(), |left| bytes.len().min(left as usize));
        if let Some(left) = &mut self.log_left {
            *left -= n as u64;
        }
        let failed = self.log.as_mut().is_some_and(|f| f.write_all(&bytes[..n]).is_err());
        if failed {
            self.log = None;
        }
    }

    fn end_of_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        if self.panic.is_none() && line.contains(PANIC) {
            self.panic = Some(line.trim().to_owned());
        }
        self.panic_over |= self.panic.is_some() && line.contains(PANIC_END);
        self.line.clear();
    }

    /// The line in which the kernel said that it panicked, if it did.
    pub fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// Whether the kernel has said all it will say about its panic.
    pub fn panic_over(&self) -> bool {
        self.panic_over
    }

    /// Bytes written by the guest so far.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The last `n` lines that are still in the ring.
    pub fn tail(&self, n: usize) -> String {
        let bytes: Vec<u8> = self.ring.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(n)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_is_bounded_and_keeps_the_end() {
        let mut c = Console::default();
        for i in 0..20_000 {
            c.push(format!("line {i}\n").as_bytes());
        }
        assert_eq!(c.ring.len(), RING);
        assert_eq!(c.tail(2), "line 19998\nline 19999");
    }

    #[test]
    fn a_panic_is_noticed_across_writes_and_only_then() {
        let mut c = Console::default();
        c.push(b"all is well, no Kernel pan");
        c.push(b"ic\n[    1.0] Kernel panic - not sync");
        assert_eq!(c.panic(), None);
        c.push(b"ing: VFS: Unable to mount root fs\r\n stack\n");
        assert_eq!(c.panic(), Some("[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs"));
        assert!(!c.panic_over());
        c.push(b"---[ end Kernel panic - not syncing ]---\n");
        assert!(c.panic_over());
    }

    #[test]
    fn the_log_stops_at_its_limit() {
        let mut file = tempfile::tempfile().unwrap();
        let mut c = Console::new(Some(file.try_clone().unwrap()), 5);
        c.push(b"abc");
        c.push(b"defgh");
        let mut text = String::new();
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::Read::read_to_string(&mut file, &mut text).unwrap();
        assert_eq!((text.as_str(), c.total()), ("abcde", 8));
    }
}
