//! Counts that vCPU threads keep without locks.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::config::Counters;

/// Why KVM returned to us.
#[derive(Debug, Clone, Copy)]
pub enum Exit {
    /// A port was read or written.
    Pio,
    /// A memory-mapped register was read or written.
    Mmio,
    /// A vCPU halted (only without the in-kernel irqchip).
    Hlt,
    /// A signal interrupted the guest.
    Intr,
    /// Anything else.
    Other,
}

const NAMES: [&str; 5] = ["pio", "mmio", "hlt", "intr", "other"];

/// The counters of one machine, over all its reboots.
pub struct Counts {
    started: Instant,
    exits: [AtomicU64; 5],
    /// Reboots so far.
    pub reboots: AtomicU64,
    user_space: Mutex<Option<(u64, u64, u64)>>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts {
            started: Instant::now(),
            exits: Default::default(),
            reboots: AtomicU64::new(0),
            user_space: Mutex::new(None),
        }
    }
}

impl Counts {
    /// Counts one exit.
    pub fn exit(&self, exit: Exit) {
        self.exits[exit as usize].fetch_add(1, Relaxed);
    }

    /// Remembers when user space was first reached.
    pub fn mark_user_space(&self) {
        let exits = self.exits.iter().map(|n| n.load(Relaxed)).sum();
        let cpu = getrusage(UsageWho::RUSAGE_SELF)
            .map_or(0, |u| u.user_time().num_microseconds() + u.system_time().num_microseconds());
        let wall = self.started.elapsed().as_micros() as u64;
        let mut slot = self.user_space.lock().unwrap_or_else(PoisonError::into_inner);
        slot.get_or_insert((exits, cpu as u64, wall));
    }

    /// What the report says.
    pub fn counters(&self, console_bytes: u64) -> Counters {
        let exits: BTreeMap<_, _> =
            NAMES.iter().zip(&self.exits).map(|(name, n)| (name.to_string(), n.load(Relaxed))).collect();
        let mark = *self.user_space.lock().unwrap_or_else(PoisonError::into_inner);
        Counters {
            exits,
            exits_to_user_space: mark.map(|m| m.0),
            cpu_us_to_user_space: mark.map(|m| m.1),
            wall_us_to_user_space: mark.map(|m| m.2),
            reboots: self.reboots.load(Relaxed),
            console_bytes,
        }
    }
}
