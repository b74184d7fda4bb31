//! What the guest says on its serial port: a bounded ring for readers, a file for later, and the one line that matters
//! when a kernel dies.
//!
//! Any number of [`Reader`]s follow the ring, each at its own position. The guest waits for none of them: one that is too
//! slow loses the oldest bytes and learns how many.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// When the log has so many bytes it begins anew (0: never).
    log_limit: u64,
    total: u64,
    line: Vec<u8>,
    panic: Option<String>,
    panic_over: bool,
    /// No more will come.
    ended: bool,
    readers: usize,
    changed: Arc<Condvar>,
}

impl Console {
    /// A console that also appends to `log`, a file or a pipe. A file that would grow beyond `limit` bytes (0: no bound)
    /// begins anew with what is in the ring.
    pub fn new(log: Option<File>, limit: u64) -> Console {
        Console { log, log_limit: limit, ..Console::default() }
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
        if self.log.as_ref().is_some_and(|log| self.log_bytes(log, bytes).is_err()) {
            self.log = None;
        }
        self.changed.notify_all();
    }

    fn log_bytes(&self, mut log: &File, bytes: &[u8]) -> io::Result<()> {
        // An earlier run of the same instance may have filled it, so it is asked, not counted.
        if self.log_limit > 0 && log.metadata()?.len().saturating_add(bytes.len() as u64) > self.log_limit {
            log.set_len(0)?;
            let (first, second) = self.ring.as_slices();
            log.write_all(first)?;
            return log.write_all(second);
        }
        log.write_all(bytes)
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

    /// The bytes from `offset` on (counted from the first that the guest wrote), and how many of them are lost: they left
    /// the ring before.
    pub fn read_from(&self, offset: u64) -> Chunk {
        let oldest = self.total - self.ring.len() as u64;
        let skip = offset.saturating_sub(oldest).min(self.ring.len() as u64);
        Chunk {
            lost: oldest.saturating_sub(offset),
            bytes: self.ring.iter().skip(skip as usize).copied().collect(),
        }
    }

    /// The last `n` lines that are still in the ring.
    pub fn tail(&self, n: usize) -> String {
        let bytes: Vec<u8> = self.ring.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(n)..].join("\n")
    }
}

/// A piece of the console's output.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// Bytes that came before `bytes` and are lost.
    pub lost: u64,
    /// What the guest wrote.
    pub bytes: Vec<u8>,
}

fn lock(console: &Mutex<Console>) -> MutexGuard<'_, Console> {
    console.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that no more will come, and gives readers at most `limit` to take what is left.
pub fn finish(console: &Mutex<Console>, limit: Duration) {
    let deadline = Instant::now() + limit;
    let mut console = lock(console);
    console.ended = true;
    let changed = console.changed.clone();
    changed.notify_all();
    while console.readers > 0 {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        console = changed.wait_timeout(console, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Makes every reader that waits ask again whether it is to stop.
pub fn wake(console: &Mutex<Console>) {
    lock(console).changed.notify_all();
}

/// A place in the console's output, to begin with at the oldest byte still there.
pub struct Reader {
    console: Arc<Mutex<Console>>,
    at: u64,
}

impl Reader {
    /// A reader of `console`.
    pub fn new(console: Arc<Mutex<Console>>) -> Reader {
        let at = {
            let mut console = lock(&console);
            console.readers += 1;
            console.total - console.ring.len() as u64
        };
        Reader { console, at }
    }

    /// Waits for output; `None` once the console has ended and all was read, or when `stop` is true (see [`wake`]).
    pub fn next(&mut self, stop: impl Fn() -> bool) -> Option<Chunk> {
        let mut console = lock(&self.console);
        let changed = console.changed.clone();
        while !stop() {
            if console.total > self.at {
                let chunk = console.read_from(self.at);
                self.at = console.total;
                return Some(chunk);
            }
            if console.ended {
                return None;
            }
            console = changed.wait(console).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut console = lock(&self.console);
        console.readers -= 1;
        console.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(chunk: Option<Chunk>) -> (u64, String) {
        let chunk = chunk.unwrap();
        (chunk.lost, String::from_utf8(chunk.bytes).unwrap())
    }

    #[test]
    fn readers_have_places_of_their_own() {
        let console = Arc::new(Mutex::new(Console::default()));
        lock(&console).push(b"one ");
        let mut early = Reader::new(console.clone());
        assert_eq!(text(early.next(|| false)), (0, "one ".into()));
        lock(&console).push(b"two");
        let mut late = Reader::new(console.clone());
        assert_eq!(text(early.next(|| false)), (0, "two".into()));
        assert_eq!(text(late.next(|| false)), (0, "one two".into()));
        assert_eq!(late.next(|| true), None);
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_is_told() {
        let console = Arc::new(Mutex::new(Console::default()));
        let mut slow = Reader::new(console.clone());
        lock(&console).push(b"lost!");
        lock(&console).push(&vec![b'x'; RING - 1]);
        lock(&console).push(b"y");
        let chunk = slow.next(|| false).unwrap();
        assert_eq!((chunk.lost, chunk.bytes.len()), (5, RING));
        assert_eq!(chunk.bytes.last(), Some(&b'y'));
        lock(&console).push(b"z");
        assert_eq!(text(slow.next(|| false)), (0, "z".into()));
        assert_eq!(lock(&console).read_from(u64::MAX), Chunk::default(), "a place that was never reached");
    }

    #[test]
    fn a_waiting_reader_hears_of_bytes_and_of_the_end() {
        let console = Arc::new(Mutex::new(Console::default()));
        let mut reader = Reader::new(console.clone());
        let all = std::thread::spawn(move || {
            let mut all = Vec::new();
            while let Some(chunk) = reader.next(|| false) {
                all.extend(chunk.bytes);
            }
            all
        });
        lock(&console).push(b"a");
        lock(&console).push(b"b");
        finish(&console, Duration::from_secs(20));
        assert_eq!(lock(&console).readers, 0, "the end waits for its readers");
        assert_eq!(all.join().unwrap(), b"ab");
    }

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
    fn a_full_log_begins_anew_with_what_the_ring_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text = || std::fs::read_to_string(&path).unwrap();
        let open = || Some(File::options().create(true).append(true).open(&path).unwrap());
        Console::new(open(), 10).push(b"early");
        let mut c = Console::new(open(), 10);
        c.push(b"abc");
        assert_eq!(text(), "earlyabc", "an earlier run's stays while there is room");
        c.push(b"defgh");
        assert_eq!((text().as_str(), c.total()), ("abcdefgh", 8));
        c.push(b"ij");
        assert_eq!(text(), "abcdefghij");
        let mut c = Console::new(open(), 0);
        c.push(b"k");
        assert_eq!(text(), "abcdefghijk", "without a bound");
    }
}
