//! A thread that serves one tap until it is dropped.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// How long a turn may wait for a packet: the time after which a thread looks whether it is to end.
pub(crate) const TICK: Duration = Duration::from_millis(200);

/// A running thread; dropping it ends it.
pub(crate) struct Served {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    /// Takes one turn after the other, each of at most [`TICK`].
    ///
    /// # Errors
    /// There is no thread to be had.
    pub(crate) fn start(name: String, mut turn: impl FnMut() + Send + 'static) -> io::Result<Served> {
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        let serve = move || {
            while !ends.load(Ordering::Relaxed) {
                turn();
            }
        };
        Ok(Served { over, thread: Some(Builder::new().name(name).spawn(serve)?) })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
