//! A terminal on a machine's console: `hutch control SOCKET console --attach`, and `hutch boot --console`.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::control;

/// Ctrl-], as telnet has it.
const DETACH: u8 = 0x1d;

/// The terminal in raw mode; as it was before at the end.
struct Raw(Termios);

impl Raw {
    /// `None` where standard input is no terminal.
    fn enter() -> nix::Result<Option<Raw>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&stdin, SetArg::TCSANOW, &raw)?;
        Ok(Some(Raw(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nobody to tell when the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

/// Copies the console that `from` and `to` are to standard output, and standard input to it, until the machine ends or,
/// on a terminal, Ctrl-] is typed. The end of standard input alone ends nothing.
pub fn run(mut from: impl Read, to: UnixStream) -> anyhow::Result<()> {
    let on_terminal = io::stdin().is_terminal();
    if on_terminal {
        eprintln!("hutch: attached to the console; Ctrl-] detaches");
    }
    let raw = Raw::enter()?;
    let detached = Arc::new(AtomicBool::new(false));
    let by_key = detached.clone();
    // It may wait for standard input for good, so nobody waits for it.
    std::thread::Builder::new().name("typed".into()).spawn(move || {
        if let Ok(true) = send(&mut io::stdin().lock(), &to, on_terminal) {
            by_key.store(true, Ordering::Release);
            // It fails only when the machine has just ended.
            let _ = to.shutdown(Shutdown::Both);
        }
    })?;
    let copied = copy(&mut from, &mut io::stdout().lock());
    drop(raw);
    let detached = detached.load(Ordering::Acquire);
    if on_terminal {
        eprintln!("\nhutch: {}", if detached { "detached" } else { "the machine's console ended" });
    }
    if detached { Ok(()) } else { Ok(copied?) }
}

/// What is typed here, for a machine that this process runs and may start more than once.
pub struct Keyboard {
    to: Arc<Mutex<Option<UnixStream>>>,
    _raw: Option<Raw>,
}

impl Keyboard {
    /// Reads standard input from now on. On a terminal, Ctrl-] calls `end`.
    pub fn open(end: impl FnOnce() + Send + 'static) -> anyhow::Result<Keyboard> {
        let on_terminal = io::stdin().is_terminal();
        if on_terminal {
            eprintln!("hutch: this terminal is the machine's console; Ctrl-] ends the machine");
        }
        let to = Arc::<Mutex<Option<UnixStream>>>::default();
        let typed = Typed(to.clone());
        std::thread::Builder::new().name("typed".into()).spawn(move || {
            if let Ok(true) = send(&mut io::stdin().lock(), typed, on_terminal) {
                end();
            }
        })?;
        Ok(Keyboard { to, _raw: Raw::enter()? })
    }

    /// Leads what is typed to the machine behind `socket`, as soon as it answers.
    pub fn attach(&self, socket: &Path) -> io::Result<()> {
        let (to, socket) = (self.to.clone(), socket.to_owned());
        *locked(&to) = None;
        std::thread::Builder::new().name("console".into()).spawn(move || {
            // It fails where the machine does not come up, which is told elsewhere.
            if let Ok((mut from, stream)) = control::console(&socket) {
                *locked(&to) = Some(stream);
                // It is shown already, by the machine's own log.
                let _ = io::copy(&mut from, &mut io::sink());
            }
        })?;
        Ok(())
    }
}

/// Where typed bytes go: while no machine answers, they wait.
struct Typed(Arc<Mutex<Option<UnixStream>>>);

impl Write for Typed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match locked(&self.0).as_mut().map(|stream| stream.write(bytes)) {
                Some(Ok(n)) if n > 0 => return Ok(n),
                // The machine has just ended; another may come.
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn locked(to: &Mutex<Option<UnixStream>>) -> MutexGuard<'_, Option<UnixStream>> {
    to.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends what is typed; true once Ctrl-] was, where `keys` are heeded.
fn send(from: &mut impl Read, mut to: impl Write, keys: bool) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    loop {
        let n = from.read(&mut buffer)?;
        let typed = buffer.get(..n).unwrap_or_default();
        if typed.is_empty() {
            return Ok(false);
        }
        let end = typed.iter().position(|&b| keys && b == DETACH);
        to.write_all(typed.get(..end.unwrap_or(n)).unwrap_or_default())?;
        if end.is_some() {
            return Ok(true);
        }
    }
}

/// Each piece as soon as it comes: [`io::copy`] into standard output would wait for the end of a line.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(buffer.get(..n).unwrap_or_default()).and_then(|()| to.flush())?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_detaches_on_a_terminal_only() {
        let mut sent = Vec::new();
        assert!(send(&mut &b"ls\x1dlost"[..], &mut sent, true).unwrap());
        assert_eq!(sent, b"ls");
        sent.clear();
        assert!(!send(&mut &b"a\x1db"[..], &mut sent, false).unwrap());
        assert_eq!(sent, b"a\x1db");
    }
}
