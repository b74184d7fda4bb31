//! The 16550A at COM1, around vm-superio's: what the guest writes goes to the console, what people type waits in an
//! [`Input`] until the guest reads it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::Registers;
use crate::console::Console;

/// COM1's first port; it has eight.
pub const PORT: u64 = 0x3f8;
/// COM1's interrupt line.
pub const IRQ: u32 = 4;
/// So many bytes may wait for the guest to read them.
pub const INPUT: usize = 4 << 10;
/// The receiver's FIFO in vm-superio, in bytes.
const FIFO: usize = 64;

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

/// What waits to be read by the guest. It outlives the port, which every reboot of the guest builds anew.
#[derive(Default)]
pub struct Input {
    waiting: Mutex<VecDeque<u8>>,
    port: Mutex<Weak<Mutex<SerialPort>>>,
}

impl Input {
    /// Takes from the front of `bytes` what there is room for, and returns how many that were.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut waiting = self.waiting();
            let taken = bytes.len().min(INPUT - waiting.len());
            waiting.extend(bytes.iter().take(taken));
            taken
        };
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(port) = port {
            port.lock().unwrap_or_else(PoisonError::into_inner).receive();
        }
        taken
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The port.
pub struct SerialPort {
    uart: Serial<Line, NoEvents, Sink>,
    input: Arc<Input>,
}

impl SerialPort {
    /// A port that writes to `console`, raises `line`, and is the one that `input` goes to from now on.
    pub fn new(console: Arc<Mutex<Console>>, input: Arc<Input>, line: EventFd) -> Arc<Mutex<SerialPort>> {
        let uart = Serial::new(Line(line), Sink(console));
        let port = Arc::new(Mutex::new(SerialPort { uart, input: input.clone() }));
        *input.port.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&port);
        port.lock().unwrap_or_else(PoisonError::into_inner).receive();
        port
    }

    /// Moves what waits into the FIFO, as far as it has room. In loopback the receiver hears only its own transmitter.
    fn receive(&mut self) {
        let mut waiting = self.input.waiting();
        let room = self.uart.fifo_capacity().min(waiting.len());
        let bytes: Vec<u8> = waiting.iter().take(room).copied().collect();
        if bytes.is_empty() {
            return;
        }
        // It fails when the interrupt's eventfd is full, and then an interrupt is pending already; the bytes are taken.
        let taken = self.uart.enqueue_raw_bytes(&bytes).unwrap_or(bytes.len());
        waiting.drain(..taken);
    }
}

impl Registers for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.uart.read(offset);
            // Only once it is empty: one interrupt for 64 bytes, not for each.
            if self.uart.fifo_capacity() == FIFO {
                self.receive();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            // It fails only when the interrupt's eventfd is full, and then an interrupt is pending already.
            let _ = self.uart.write(offset, *value);
            // The guest may just have left loopback.
            self.receive();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const MODEM_CONTROL: u64 = 4;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;
    const LOOP: u8 = 1 << 4;

    fn port(input: &Arc<Input>) -> (Arc<Mutex<SerialPort>>, EventFd) {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (SerialPort::new(Arc::default(), input.clone(), line.try_clone().unwrap()), line)
    }

    fn read(port: &Mutex<SerialPort>, offset: u64) -> u8 {
        let mut byte = [0];
        port.lock().unwrap().read(offset, &mut byte);
        byte[0]
    }

    fn write(port: &Mutex<SerialPort>, offset: u64, value: u8) {
        port.lock().unwrap().write(offset, &[value]);
    }

    /// Reads until there is nothing, as a driver does.
    fn drain(port: &Mutex<SerialPort>) -> Vec<u8> {
        let mut got = Vec::new();
        while read(port, LINE_STATUS) & DATA_READY != 0 {
            got.push(read(port, DATA));
        }
        got
    }

    #[test]
    fn a_byte_typed_interrupts_and_is_read() {
        let input = Arc::<Input>::default();
        let (port, line) = port(&input);
        assert_eq!(input.offer(b"a"), 1);
        assert!(line.read().is_err(), "no interrupt before the driver wants one");
        assert_eq!(drain(&port), b"a");
        write(&port, INTERRUPT_ENABLE, 1);
        assert!(line.read().is_err());
        assert_eq!(input.offer(b"b"), 1);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!(drain(&port), b"b");
    }

    #[test]
    fn what_overruns_the_queue_is_left_to_the_sender() {
        let input = Arc::<Input>::default();
        let (port, line) = port(&input);
        write(&port, INTERRUPT_ENABLE, 1);
        let bytes: Vec<u8> = (0..=255).cycle().take(INPUT * 2).collect();
        let mut sent = 0;
        while let n @ 1.. = input.offer(&bytes[sent..]) {
            sent += n;
        }
        assert_eq!(sent, INPUT + FIFO, "the queue and the FIFO are bounded");
        assert!(line.read().is_ok());
        assert_eq!(drain(&port), bytes[..sent], "in order, none lost");
        assert!(line.read().is_ok(), "each refill interrupts");
        assert_eq!(input.offer(&bytes[sent..]), INPUT * 2 - sent);
        assert_eq!(drain(&port), bytes[sent..]);
    }

    #[test]
    fn input_waits_for_the_next_port_and_for_the_end_of_loopback() {
        let input = Arc::<Input>::default();
        assert_eq!(input.offer(b"early"), 5);
        let (first, _line) = port(&input);
        assert_eq!(drain(&first), b"early");
        drop(first);
        assert_eq!(input.offer(b"between"), 7);
        let (second, _line) = port(&input);
        assert_eq!(drain(&second), b"between");
        write(&second, MODEM_CONTROL, LOOP);
        assert_eq!(input.offer(b"later"), 5);
        assert_eq!(drain(&second), b"", "loopback hears only itself");
        write(&second, DATA, b'!');
        assert_eq!(drain(&second), b"!");
        write(&second, MODEM_CONTROL, 0);
        assert_eq!(drain(&second), b"later");
    }
}
