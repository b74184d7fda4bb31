//! How one run of the machine ends: the first to say so wins, everyone else hears of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why the vCPUs stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// ACPI S5.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's command ended.
    Command(u8),
    /// The guest's kernel said its last word.
    Panic,
    /// A vCPU shut down.
    TripleFault,
    /// Somebody outside asked for it.
    Killed,
    /// KVM or a thread failed.
    Error(String),
}

/// Set once per run, awaited by the thread that owns the machine.
#[derive(Default)]
pub struct Ending {
    outcome: Mutex<Option<Outcome>>,
    changed: Condvar,
    over: AtomicBool,
}

impl Ending {
    /// Ends the run, unless it has ended already.
    pub fn set(&self, outcome: Outcome) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert(outcome);
        self.over.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether the run has ended; cheap enough to ask at every exit.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// How it ended, if it did.
    pub fn get(&self) -> Option<Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the run ends, at most until `deadline`.
    pub fn wait(&self, deadline: Option<Instant>) -> Option<Outcome> {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*slot {
                return Some(outcome.clone());
            }
            let left = match deadline {
                Some(d) => d.saturating_duration_since(Instant::now()),
                None => Duration::from_secs(3600),
            };
            if left.is_zero() {
                return None;
            }
            slot = self.changed.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
