//! The 16550A at COM1, around vm-superio's.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Registers;
use crate::console::Console;

/// COM1's first port; it has eight.
pub const PORT: u64 = 0x3f8;
/// COM1's interrupt line.
pub const IRQ: u32 = 4;

/// Raises the interrupt line by KVM's irqfd.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Hands the guest's bytes to the shared console.
pub struct Sink(Arc<Mutex<Console>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port.
pub struct SerialPort(Serial<Line, NoEvents, Sink>);

impl SerialPort {
    /// A port that writes to `console` and raises `line`.
    pub fn new(console: Arc<Mutex<Console>>, line: EventFd) -> SerialPort {
        SerialPort(Serial::new(Line(line), Sink(console)))
    }
}

impl Registers for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            // It fails only when the interrupt's eventfd is full, and then an interrupt is pending already.
            let _ = self.0.write(offset, *value);
        }
    }
}
