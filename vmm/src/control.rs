//! The control socket: one JSON object a line in, one a line out.
//!
//! ```text
//! {"command":"status"}        → {"ok":true,"id":"i-…","state":"running"|"paused","counters":{…},
//!                                "disks":[{"serial":"vol…","no_space":false,…}],"nets":[{"mac":"…",…}]}
//! {"command":"power-button"}  → {"ok":true}       the guest decides what it does
//! {"command":"pause"}         → {"ok":true}       every vCPU and device is held when the answer comes, and all that
//!                                                 the guest wrote is in the disks' files
//! {"command":"resume"}        → {"ok":true}
//! {"command":"attach-disk","serial":"vol…","formats":["qcow2","raw"],"read_only":false,"rate":{…}} with a descriptor for each format, the
//!     top one first          → {"ok":true}       the guest is told of the new disk, over PCI; where layers are encrypted,
//!                                                 `"keys":["BASE64",null]` has what with, one for each
//! {"command":"detach-disk","serial":"vol…","force":false}
//!                             → {"ok":true}       the guest is asked to let it go; once it has, `status` does not name the
//!                                                 disk any more; with `force`, it is gone at once
//! {"command":"cut-disks","disks":[{"serial":"vol…","top":"NAME"},…]} with a descriptor of a new, empty layer for each
//!                             → {"ok":true}       what was written until then is beneath these, all at one instant; a disk
//!                                                 whose `top` (see `status`) has that name is left as it is
//! {"command":"seal-disk","serial":"vol…"}     → {"ok":true}       what is beneath the top layer is durable, and others may read it
//! {"command":"rebase-disk","serial":"vol…","formats":[…]} with a descriptor for each, and `keys` likewise
//!                             → {"ok":true}       the top layer lies on these files, which hold the same bytes
//! {"command":"kill"}          → {"ok":true}       the machine ends now, its report says `killed`
//! {"command":"disk","serial":"vol…","size":BYTES,"rate":{…}}  → {"ok":true}   the disk is at least so large and has this
//!                                                 rate from now on (`config::Rate`); either may be left out
//! {"command":"disks","rate":{…}}             → {"ok":true}   what all disks may do together
//! {"command":"net","mac":"…","rate":{…}}     → {"ok":true}   what the interface may send, and receive
//! {"command":"console"}       → {"ok":true,"text":"…"}   what is in the console's ring
//! {"command":"console","follow":true} → {"ok":true}, and from then on the connection is the console: the guest's bytes
//!                                out, from the oldest in the ring on, and what is typed in, until one side hangs up
//! ```
//! A follower that is too slow for the ring finds `[hutch: N bytes of the console were lost here]` in its stream.
//! Anything else is answered with `{"ok":false,"error":"…"}` and changes nothing.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hutch_blockdev::Layer;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Deserialize;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use crate::config::{DiskFormat, Rate};
use crate::console::{self, Console, Reader};
use crate::counts::{Counts, Devices};
use crate::devices::serial::Input;
use crate::drives::{Drive, told};
use crate::machine::Handle;
use crate::passing::Receiver;
use crate::rate::Limiter;
use crate::secret::DiskKey;

/// A request is at most so many bytes.
const LINE_MAX: u64 = 64 << 10;
/// Connections served at once, followers of the console included; one more is refused.
const CONNECTIONS_MAX: usize = 16;
/// How long a follower rests between two pieces of output, so that a guest that writes byte by byte costs little.
const GATHER: Duration = Duration::from_millis(5);
/// How often the guest is asked again whether it has room for what was typed, in milliseconds.
const RETRY_MS: u16 = 20;

#[derive(Debug, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
enum Request {
    Status,
    PowerButton,
    Pause,
    Resume,
    Kill,
    AttachDisk {
        serial: String,
        #[serde(default)]
        top: String,
        formats: Vec<DiskFormat>,
        #[serde(default)]
        keys: Vec<Option<DiskKey>>,
        #[serde(default)]
        read_only: bool,
        #[serde(default)]
        rate: Rate,
    },
    DetachDisk {
        serial: String,
        #[serde(default)]
        force: bool,
    },
    CutDisks {
        disks: Vec<Cut>,
    },
    SealDisk {
        serial: String,
    },
    RebaseDisk {
        serial: String,
        formats: Vec<DiskFormat>,
        #[serde(default)]
        keys: Vec<Option<DiskKey>>,
    },
    Disk {
        serial: String,
        size: Option<u64>,
        rate: Option<Rate>,
    },
    Disks {
        rate: Rate,
    },
    Net {
        mac: String,
        rate: Rate,
    },
    Console {
        #[serde(default)]
        follow: bool,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cut {
    serial: String,
    top: String,
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
    /// What its console's followers type.
    pub input: Arc<Input>,
    /// Its counters.
    pub counts: Arc<Counts>,
    /// Its devices' counters.
    pub devices: Devices,
    /// What its disks may do together.
    pub disks_limit: Arc<Limiter>,
    /// What its interfaces may receive and send, by their MACs.
    pub nets: Vec<(String, [Arc<Limiter>; 2])>,
}

impl Control {
    /// Serves `listener` until the process ends, on threads of its own.
    pub fn serve(self, listener: UnixListener) -> io::Result<()> {
        let busy = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                if busy.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                    busy.fetch_sub(1, Ordering::Relaxed);
                    let why = format!("{}: {CONNECTIONS_MAX} clients are connected; end one", self.id);
                    // A new socket's buffer takes it whole, so this does not wait.
                    let _ = writeln!(stream, "{}", json!({ "ok": false, "busy": true, "error": why }));
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
        let mut reader = BufReader::new(Receiver::new(stream.try_clone()?));
        loop {
            // It may hold keys.
            let mut line = Zeroizing::new(String::with_capacity(LINE_MAX as usize));
            let n = reader.by_ref().take(LINE_MAX).read_line(&mut line)?;
            if n == 0 || !line.ends_with('\n') {
                return Ok(());
            }
            // They come with the first byte of their request; what no request is for is closed.
            let fds = reader.get_mut().descriptors();
            let request = serde_json::from_str(&line);
            let follow = matches!(request, Ok(Request::Console { follow: true }));
            let answer = match request {
                Ok(request) => self.answer(request, fds),
                Err(e) => json!({ "ok": false, "error": format!("{}: no such request: {e}", self.id) }),
            };
            stream.write_all(format!("{answer}\n").as_bytes())?;
            if follow {
                return self.attach(reader, &stream);
            }
        }
    }

    /// Makes the connection the console, until the client hangs up or the machine ends.
    fn attach(&self, mut typed: BufReader<Receiver>, stream: &UnixStream) -> io::Result<()> {
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let show = || {
                // Why it ended is no concern of the machine's; the other direction is to end, too.
                let _ = self.show(stream, &gone);
                let _ = stream.shutdown(Shutdown::Both);
            };
            std::thread::Builder::new().name("console".into()).spawn_scoped(scope, show)?;
            let heard = self.hear(&mut typed, stream);
            gone.store(true, Ordering::Release);
            // The other thread waits for the client or for the guest.
            let _ = stream.shutdown(Shutdown::Both);
            console::wake(&self.console);
            heard
        })
    }

    fn show(&self, mut stream: &UnixStream, gone: &AtomicBool) -> io::Result<()> {
        let mut reader = Reader::new(self.console.clone());
        while let Some(chunk) = reader.next(|| gone.load(Ordering::Acquire)) {
            if chunk.lost > 0 {
                let lost = format!("\r\n[hutch: {} bytes of the console were lost here]\r\n", chunk.lost);
                stream.write_all(lost.as_bytes())?;
            }
            stream.write_all(&chunk.bytes)?;
            std::thread::sleep(GATHER);
        }
        Ok(())
    }

    /// Hands on what is typed. While the guest reads none of it the client is held back, not the guest.
    fn hear(&self, typed: &mut BufReader<Receiver>, stream: &UnixStream) -> io::Result<()> {
        loop {
            let bytes = typed.fill_buf()?;
            if bytes.is_empty() {
                return Ok(());
            }
            let taken = self.input.offer(bytes);
            typed.consume(taken);
            if taken == 0 {
                // Nothing is asked for: a hang-up is told always.
                let mut hangup = [PollFd::new(stream.as_fd(), PollFlags::empty())];
                if poll(&mut hangup, PollTimeout::from(RETRY_MS))? > 0 {
                    return Ok(());
                }
            }
        }
    }

    fn answer(&self, request: Request, fds: Vec<OwnedFd>) -> Value {
        let console = || self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let done = |result: Result<(), String>| match result {
            Ok(()) => json!({ "ok": true }),
            Err(why) => json!({ "ok": false, "error": format!("{}: {why}", self.id) }),
        };
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
                let was_paused = self.handle.is_paused();
                self.handle.pause();
                match self.devices.drives.all().iter().try_for_each(|drive| drive.disk.flush()) {
                    Ok(()) => json!({ "ok": true }),
                    Err(e) => {
                        if !was_paused {
                            self.handle.resume();
                        }
                        json!({ "ok": false, "error": format!("{}: not paused: {e}", self.id) })
                    }
                }
            }
            Request::AttachDisk { serial, top, formats, keys, read_only, rate } => {
                let layers = match layers(fds, formats, keys) {
                    Ok(layers) => layers,
                    Err(why) => return done(Err(format!("disk {serial}: {why}"))),
                };
                match Drive::open(&self.id, &serial, layers, read_only) {
                    Ok(mut drive) => {
                        drive.top = top;
                        done(hold(&rate, [&drive.limit]).and_then(|()| self.handle.attach(drive)))
                    }
                    Err(why) => json!({ "ok": false, "error": why }),
                }
            }
            Request::CutDisks { disks } => done(each_one(fds, disks).and_then(|cuts| {
                let cuts = cuts.into_iter().map(|(file, cut)| (cut.serial, cut.top, file));
                self.devices.drives.cut(cuts.collect())
            })),
            Request::SealDisk { serial } => done(self.drive(&serial).and_then(|drive| drive.seal())),
            Request::RebaseDisk { serial, formats, keys } => {
                done(self.drive(&serial).and_then(|drive| drive.rebase(layers(fds, formats, keys)?)))
            }
            Request::DetachDisk { serial, force } => done(self.handle.detach(&serial, force)),
            Request::Resume => {
                self.handle.resume();
                json!({ "ok": true })
            }
            Request::Kill => {
                self.handle.kill();
                json!({ "ok": true })
            }
            Request::Disk { serial, size, rate } => done(self.change_disk(&serial, size, rate.as_ref())),
            Request::Disks { rate } => done(hold(&rate, [&self.disks_limit])),
            Request::Net { mac, rate } => {
                let limits = self.nets.iter().find(|(have, _)| *have == mac);
                let limits = limits.ok_or_else(|| format!("it has no interface {mac}"));
                done(limits.and_then(|(_, limits)| hold(&rate, limits)))
            }
            Request::Console { follow: true } => json!({ "ok": true }),
            Request::Console { follow: false } => json!({ "ok": true, "text": console().tail(usize::MAX) }),
        }
    }

    fn drive(&self, serial: &str) -> Result<Drive, String> {
        let found = self.devices.drives.all().into_iter().find(|drive| drive.serial == serial);
        found.ok_or_else(|| format!("it has no disk {serial}"))
    }

    fn change_disk(&self, serial: &str, size: Option<u64>, rate: Option<&Rate>) -> Result<(), String> {
        let drive = self.drive(serial)?;
        // Checked before anything is done.
        if let Some(why) = rate.and_then(Rate::wrong) {
            return Err(why.into());
        }
        if let Some(size) = size.filter(|size| *size > drive.disk.size()) {
            let grown = drive.disk.grow(size);
            grown.map_err(|e| format!("the disk {serial} does not grow: {}", told(&e)))?;
            self.handle.refresh();
        }
        rate.map_or(Ok(()), |rate| hold(rate, [&drive.limit]))
    }
}

/// The layers of a disk; those without a key are plain.
fn layers(
    fds: Vec<OwnedFd>,
    formats: Vec<DiskFormat>,
    keys: Vec<Option<DiskKey>>,
) -> Result<Vec<Layer>, String> {
    if !keys.is_empty() && keys.len() != formats.len() {
        return Err(format!("{} keys came for {} files", keys.len(), formats.len()));
    }
    let keys = keys.into_iter().chain(std::iter::repeat(None));
    let layer = |((file, format), key): ((File, DiskFormat), Option<DiskKey>)| {
        let key = key.map(|key| key.0);
        Layer { file, format: format.into(), key }
    };
    Ok(each_one(fds, formats)?.into_iter().zip(keys).map(layer).collect())
}

/// A descriptor for each of these.
fn each_one<T>(fds: Vec<OwnedFd>, of: Vec<T>) -> Result<Vec<(File, T)>, String> {
    if fds.len() != of.len() {
        return Err(format!("{} descriptors came for {} files", fds.len(), of.len()));
    }
    Ok(fds.into_iter().map(File::from).zip(of).collect())
}

/// Has these hold to `rate` from now on.
fn hold<'a>(rate: &Rate, limits: impl IntoIterator<Item = &'a Arc<Limiter>>) -> Result<(), String> {
    if let Some(why) = rate.wrong() {
        return Err(why.into());
    }
    limits.into_iter().for_each(|limit| limit.set(rate, Instant::now()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use hutch_blockdev::Key;

    use super::*;

    #[test]
    fn each_layer_has_its_key_or_none() {
        let fds = |count| (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect::<Vec<OwnedFd>>();
        let key = || Some(DiskKey(Key::new(&std::array::from_fn::<u8, 64, _>(|i| i as u8)).unwrap()));
        let formats = || vec![DiskFormat::Qcow2, DiskFormat::Raw];
        let of = |keys| layers(fds(2), formats(), keys).unwrap();
        assert!(of(vec![]).iter().all(|layer| layer.key.is_none()));
        let keys = of(vec![key(), None]).into_iter().map(|layer| layer.key.is_some()).collect::<Vec<_>>();
        assert_eq!(keys, [true, false]);
        assert!(layers(fds(2), formats(), vec![key()]).is_err_and(|why| why.contains("1 keys")));
        assert!(layers(fds(1), formats(), vec![key(), None]).is_err());
    }
}
