//! The entropy device (virtio 1.2, 5.4): fills the guest's buffers from the host's getrandom.

use std::io;

use super::chain::{self, ChainError};
use super::pci::{EVENT_IDX, INDIRECT_DESC};
use super::worker::{Control, Wake, Worker, bell};
use super::{ActiveQueue, Memory, Notify, Start, VirtioDevice};

/// The most bytes given to one request; a short answer is allowed (5.4.6).
const MOST: usize = 64 << 10;

/// The device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        INDIRECT_DESC | EVENT_IDX
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![64]
    }
    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn start(&mut self, start: Start) -> io::Result<()> {
        let Start { memory, mut queues, notify, .. } = start;
        if let Some(queue) = queues.pop() {
            let serve = move |control: &Control| serve(queue, &memory, &*notify, control);
            self.worker = Some(Worker::spawn("rng".into(), serve)?);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
    }
    fn pause(&mut self) {
        self.worker.iter().for_each(Worker::pause);
    }
    fn resume(&mut self) {
        self.worker.iter().for_each(Worker::resume);
    }
}

fn serve(mut active: ActiveQueue, memory: &Memory, notify: &dyn Notify, control: &Control) {
    while let Wake::Ready(_) = control.wait(&[bell(&active.kick)], None) {
        let _ = active.kick.read();
        let answered = super::drain(&mut active, memory, notify, super::LONG, |_, chain| {
            let (_, mut buffers) = chain::split(memory, chain)?;
            let wanted = buffers.len().min(MOST);
            let mut bytes = vec![0; wanted];
            fill(&mut bytes);
            let to = buffers.take(wanted).ok_or(ChainError::Short)?;
            Ok(Some(to.write(&bytes) as u32))
        });
        if let Err(e) = answered {
            return notify.needs_reset(&e.to_string());
        }
    }
}

fn fill(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a slice that is borrowed for the call.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        let Ok(got) = usize::try_from(got) else { continue };
        bytes = bytes.split_at_mut(got).1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;

    #[test]
    fn a_guest_gets_bytes_that_differ() {
        let mut driver = Driver::new(1);
        let mut rng = Rng::default();
        driver.start(&mut rng);
        let a = driver.request(0, &[], 64).unwrap();
        let b = driver.request(0, &[], 64).unwrap();
        assert_eq!((a.len, b.len), (64, 64));
        assert_ne!(a.bytes, b.bytes);
        assert_eq!(driver.request(0, &[], MOST + 512).unwrap().len, MOST as u32);
        rng.stop();
        assert!(driver.broken().is_empty());
    }

    #[test]
    fn a_buffer_outside_memory_asks_for_a_reset() {
        let mut driver = Driver::new(1);
        let mut rng = Rng::default();
        driver.start(&mut rng);
        driver.offer_outside(0);
        driver.wait_broken();
        rng.stop();
    }
}
