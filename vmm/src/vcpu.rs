//! vCPU threads: run the guest, hand its exits to the buses, stop when the machine ends.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::counts::{Counts, Exit};
use crate::ending::{Ending, Outcome};
use crate::gate::Gate;

/// The threads of one run; dropping them ends the run and waits until no vCPU runs any more.
pub struct Threads {
    ending: Arc<Ending>,
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts one thread a vCPU; while `gate` is closed they are held.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        ports: Arc<Bus>,
        mmio: Arc<Bus>,
        ending: &Arc<Ending>,
        gate: &Arc<Gate>,
        counts: &Arc<Counts>,
    ) -> io::Result<Threads> {
        let mut all = Threads { ending: ending.clone(), gate: gate.clone(), threads: Vec::new() };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let (ports, mmio) = (ports.clone(), mmio.clone());
            let (ending, gate, counts) = (ending.clone(), gate.clone(), counts.clone());
            let run = move || run(vcpu, &ports, &mmio, &ending, &gate, &counts);
            all.threads.push(std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run)?);
        }
        Ok(all)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.ending.set(Outcome::Killed);
        self.gate.drain();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn run(mut vcpu: VcpuFd, ports: &Bus, mmio: &Bus, ending: &Ending, gate: &Gate, counts: &Counts) {
    let pass = gate.enter();
    while !ending.is_over() {
        if gate.is_closed() {
            // Tells the guest's watchdogs that it was stopped; refused where the guest has no kvmclock.
            let _ = vcpu.kvmclock_ctrl();
            pass.hold(|| ending.is_over());
            continue;
        }
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
