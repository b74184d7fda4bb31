//! Interrupt lines (PCI 3.0, 2.2.6), for devices that offer no MSI-X: several share one, which is high while any of them
//! asserts it. A processor of a guest has some 200 vectors; a line takes one, however many devices there are on it.

use std::sync::{Arc, Mutex, PoisonError};

use super::Vm;

/// The first line's number among the I/O APIC's inputs; those before are ISA's and the generic event device's.
pub const FIRST_GSI: u32 = 16;
/// How many lines there are.
pub const LINES: usize = 8;

/// The line that a slot's pin is wired to.
pub const fn line_of(slot: usize) -> usize {
    slot % LINES
}

/// All lines.
pub struct Lines {
    /// How many assert each.
    held: Mutex<[u32; LINES]>,
    vm: Arc<dyn Vm>,
}

impl Lines {
    /// All low.
    pub fn new(vm: Arc<dyn Vm>) -> Lines {
        Lines { held: Mutex::new([0; LINES]), vm }
    }

    fn change(&self, line: usize, assert: bool) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(held) = held.get_mut(line) else { return };
        let before = *held;
        *held = if assert { before.saturating_add(1) } else { before.saturating_sub(1) };
        // Under the lock: the last word is that of whoever changed it last.
        if (before == 0) != (*held == 0) {
            self.vm.set_line(FIRST_GSI + line as u32, assert);
        }
    }
}

/// What a pin has to say.
#[derive(Default, Clone, Copy)]
struct State {
    pending: bool,
    /// The guest wants none of it (bit 10 of the command register).
    off: bool,
    asserts: bool,
}

/// A device's pin, wired to a line. Dropped, it asserts nothing.
pub struct Pin {
    lines: Arc<Lines>,
    line: usize,
    state: Mutex<State>,
}

impl Pin {
    /// The pin of a slot's device.
    pub fn new(lines: Arc<Lines>, slot: usize) -> Pin {
        Pin { lines, line: line_of(slot), state: Mutex::default() }
    }

    fn change(&self, act: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut state);
        let asserts = state.pending && !state.off;
        if std::mem::replace(&mut state.asserts, asserts) != asserts {
            self.lines.change(self.line, asserts);
        }
    }

    /// Has an interrupt pend or not, as `tell` says; nobody else changes the pin meanwhile.
    pub fn pend(&self, tell: impl FnOnce() -> bool) {
        self.change(|state| state.pending = tell());
    }

    /// Lets it assert, or not.
    pub fn switch(&self, off: bool) {
        self.change(|state| state.off = off);
    }

    /// Whether an interrupt pends (bit 3 of the status register).
    pub fn pending(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).pending
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.pend(|| false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::msix::tests::FakeVm;

    #[test]
    fn a_line_is_high_while_any_pin_on_it_is() {
        let vm = Arc::new(FakeVm::default());
        let lines = Arc::new(Lines::new(vm.clone()));
        let [one, two, other] = [64, 64 + LINES, 65].map(|slot| Pin::new(lines.clone(), slot));
        let told = || std::mem::take(&mut *vm.lines.lock().unwrap());
        one.pend(|| true);
        one.pend(|| true);
        two.pend(|| true);
        assert_eq!(told(), [(16, true)]);
        one.pend(|| false);
        assert!(told().is_empty() && !one.pending() && two.pending());
        two.switch(true);
        assert_eq!(told(), [(16, false)]);
        other.pend(|| true);
        two.switch(false);
        assert_eq!(told(), [(17, true), (16, true)]);
        drop((two, other));
        assert_eq!(told(), [(16, false), (17, false)]);
    }
}
