//! The gate before KVM_RUN: while it is closed every vCPU is held between two entries into the guest.
//!
//! It outlives the runs of a machine: vCPUs of a machine that reboots while the gate is closed are held before their
//! first instruction.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// How long a kick may take to be heard before it is given again.
const KICK: Duration = Duration::from_millis(1);

#[derive(Default)]
struct State {
    /// The threads between [`Gate::enter`] and the drop of their [`Pass`].
    live: Vec<libc::pthread_t>,
    /// How many of them are held.
    held: usize,
}

/// The gate of one machine.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    closed: AtomicBool,
}

/// A vCPU thread's place at the gate.
pub struct Pass<'a>(&'a Gate);

/// Only there to interrupt KVM_RUN.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the calling thread one that is kicked and waited for.
    pub fn enter(&self) -> Pass<'_> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // It fails only for a signal number out of range.
            let _ = register_signal_handler(SIGRTMIN(), on_kick);
        });
        // SAFETY: pthread_self has no preconditions.
        self.lock().live.push(unsafe { libc::pthread_self() });
        Pass(self)
    }

    /// Whether vCPUs are, or are about to be, held; cheap enough to ask before every entry.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Returns when every vCPU is held or has left.
    pub fn close(&self) {
        let mut state = self.lock();
        self.closed.store(true, Ordering::Release);
        // A signal that arrives just before KVM_RUN is lost, so it is sent until all have heard.
        while state.held < state.live.len() {
            kick(&state);
            state = self.changed.wait_timeout(state, KICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets held vCPUs go on.
    pub fn open(&self) {
        let _state = self.lock();
        self.closed.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Interrupts every vCPU and makes the held ones ask again whether their run is over. Returns when all have left,
    /// so whatever `over` of [`Pass::hold`] asks must have come true.
    pub fn drain(&self) {
        let mut state = self.lock();
        while !state.live.is_empty() {
            kick(&state);
            self.changed.notify_all();
            state = self.changed.wait_timeout(state, KICK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn kick(state: &State) {
    for thread in &state.live {
        // SAFETY: a thread takes itself off the list, under the lock that is held here, before it ends.
        unsafe { libc::pthread_kill(*thread, SIGRTMIN()) };
    }
}

impl Pass<'_> {
    /// Waits while the gate is closed and `over` is false.
    pub fn hold(&self, over: impl Fn() -> bool) {
        let gate = self.0;
        let mut state = gate.lock();
        state.held += 1;
        gate.changed.notify_all();
        while gate.is_closed() && !over() {
            state = gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.held -= 1;
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        // SAFETY: pthread_self has no preconditions.
        let own = unsafe { libc::pthread_self() };
        if let Some(at) = state.live.iter().position(|thread| *thread == own) {
            state.live.swap_remove(at);
        }
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn a_closed_gate_holds_all_and_lets_them_leave() {
        let gate = Arc::new(Gate::default());
        let (turns, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let (gate, turns, over) = (gate.clone(), turns.clone(), over.clone());
                std::thread::spawn(move || {
                    let pass = gate.enter();
                    while !over.load(Ordering::SeqCst) {
                        if gate.is_closed() {
                            pass.hold(|| over.load(Ordering::SeqCst));
                        }
                        turns.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                    }
                })
            })
            .collect();
        while gate.lock().live.len() < 3 || turns.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        for _ in 0..50 {
            gate.close();
            let before = turns.load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(turns.load(Ordering::SeqCst), before, "somebody went on");
            gate.open();
        }
        gate.close();
        over.store(true, Ordering::SeqCst);
        gate.drain();
        assert!(gate.is_closed(), "leaving does not open it");
        threads.into_iter().for_each(|t| t.join().unwrap());
        gate.close();
        assert_eq!(gate.lock().held, 0);
    }
}
