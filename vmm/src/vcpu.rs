//! vCPU threads: run the guest, hand its exits to the buses, stop when the machine ends.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::counts::{Counts, Exit};
use crate::ending::{Ending, Outcome};

/// The threads of one run; dropping them ends the run and waits until no vCPU runs any more.
pub struct Threads {
    ending: Arc<Ending>,
    threads: Vec<JoinHandle<()>>,
}

/// Only there to interrupt KVM_RUN.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Threads {
    /// Starts one thread a vCPU.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        ports: Arc<Bus>,
        mmio: Arc<Bus>,
        ending: &Arc<Ending>,
        counts: &Arc<Counts>,
    ) -> io::Result<Threads> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // It fails only for a signal number out of range.
            let _ = register_signal_handler(SIGRTMIN(), on_kick);
        });
        let mut all = Threads { ending: ending.clone(), threads: Vec::new() };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (ports, mmio) = (ports.clone(), mmio.clone());
            let (ending, counts) = (ending.clone(), counts.clone());
            let run = move || run(vcpu, &ports, &mmio, &ending, &counts);
            all.threads.push(std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run)?);
        }
        Ok(all)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ending.set(Outcome::Killed);
        for thread in self.threads.drain(..) {
            // A signal that arrives just before KVM_RUN is lost, so it is sent until the thread has heard.
            while !thread.is_finished() {
                // SAFETY: the thread is not joined yet, so its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = thread.join();
        }
    }
}

fn run(mut vcpu: VcpuFd, ports: &Bus, mmio: &Bus, ending: &Ending, counts: &Counts) {
    while !ending.is_over() {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                counts.exit(Exit::Pio);
                ports.write(port.into(), data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                counts.exit(Exit::Pio);
                ports.read(port.into(), data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counts.exit(Exit::Mmio);
                mmio.write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                counts.exit(Exit::Mmio);
                mmio.read(address, data);
            }
            Ok(VcpuExit::Hlt) => counts.exit(Exit::Hlt),
            Ok(VcpuExit::Intr) => counts.exit(Exit::Intr),
            Ok(VcpuExit::Shutdown) => {
                counts.exit(Exit::Other);
                ending.set(Outcome::TripleFault);
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let what =
                    format!("vCPU {cpu}: the processor refused to enter the guest (reason {reason:#x})");
                ending.set(Outcome::Error(what));
            }
            Ok(other) => {
                let what = format!("KVM stopped a vCPU for a reason hutch does not serve: {other:?}");
                ending.set(Outcome::Error(what));
            }
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => counts.exit(Exit::Intr),
            Err(e) => ending.set(Outcome::Error(format!("KVM_RUN failed: {e}"))),
        }
    }
}
