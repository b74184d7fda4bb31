//! The control socket: one JSON object a line in, one a line out.
//!
//! ```text
//! {"command":"status"}        → {"ok":true,"id":"i-…","state":"running"|"paused","counters":{…},
//!                                "disks":[{"serial":"vol…","no_space":false,…}],"nets":[{"mac":"…",…}]}
//! {"command":"power-button"}  → {"ok":true}       the guest decides what it does
//! {"command":"pause"}         → {"ok":true}       every vCPU and device is held when the answer comes
//! {"command":"resume"}        → {"ok":true}
//! {"command":"kill"}          → {"ok":true}       the machine ends now, its report says `killed`
//! {"command":"console"}       → {"ok":true,"text":"…"}   what is in the console's ring
//! ```
//! Anything else is answered with `{"ok":false,"error":"…"}` and changes nothing.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::console::Console;
use crate::counts::{Counts, Devices};
use crate::machine::Handle;

/// A request is at most so many bytes.
const LINE_MAX: u64 = 64 << 10;
/// Connections served at once; one more is closed at once.
const CONNECTIONS_MAX: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Status,
    PowerButton,
    Pause,
    Resume,
    Kill,
    Console,
}

/// What the socket's clients may see and do.
#[derive(Clone)]
pub struct Control {
    /// The machine's id.
    pub id: String,
    /// The way to act on it.
    pub handle: Handle,
    /// Its console.
    pub console: Arc<Mutex<Console>>,
    /// Its counters.
    pub counts: Arc<Counts>,
    /// Its devices' counters.
    pub devices: Devices,
}

impl Control {
    /// Serves `listener` until the process ends, on threads of its own.
    pub fn serve(self, listener: UnixListener) -> io::Result<()> {
        let busy = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if busy.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                    busy.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let (control, done) = (self.clone(), busy.clone());
                let serve = move || {
                    // A client that went away is no concern of the machine's.
                    let _ = control.connection(stream);
                    done.fetch_sub(1, Ordering::Relaxed);
                };
                if std::thread::Builder::new().name("control".into()).spawn(serve).is_err() {
                    busy.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::Builder::new().name("control".into()).spawn(accept).map(drop)
    }

    fn connection(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut line = String::new();
            let n = reader.by_ref().take(LINE_MAX).read_line(&mut line)?;
            if n == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            let mut answer = self.answer(&line).to_string();
            answer.push('\n');
            stream.write_all(answer.as_bytes())?;
        }
    }

    fn answer(&self, line: &str) -> Value {
        let request = match serde_json::from_str(line) {
            Ok(request) => request,
            Err(e) => return json!({ "ok": false, "error": format!("{}: no such request: {e}", self.id) }),
        };
        let console = || self.console.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            Request::Status => {
                let counters = self.counts.counters(console().total());
                let state = if self.handle.is_paused() { "paused" } else { "running" };
                json!({
                    "ok": true, "id": self.id, "state": state, "counters": counters,
                    "disks": self.devices.disk_status(), "nets": self.devices.net_status(),
                })
            }
            Request::PowerButton => {
                self.handle.press_power_button();
                json!({ "ok": true })
            }
            Request::Pause => {
                self.handle.pause();
                json!({ "ok": true })
            }
            Request::Resume => {
                self.handle.resume();
                json!({ "ok": true })
            }
            Request::Kill => {
                self.handle.kill();
                json!({ "ok": true })
            }
            Request::Console => json!({ "ok": true, "text": console().tail(usize::MAX) }),
        }
    }
}
