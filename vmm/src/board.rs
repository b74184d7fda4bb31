//! The machine's PCI board: every device of the plan in its slot, behind the transport.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use hutch_blockdev::Disk;
use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::pci::{PciBus, Vm};
use crate::plan::{PCI_WINDOW, Plan, parse_mac};
use crate::virtio::blk::{Blk, DiskCounts};
use crate::virtio::net::{Net, NetCounts};
use crate::virtio::pci::{BAR_SIZE, VirtioPci};
use crate::virtio::rng::Rng;
use crate::virtio::{Memory, VirtioDevice};

/// What the devices run on, over all reboots of the machine.
#[derive(Default)]
pub struct Backends {
    /// Disks, in the order of the plan.
    pub disks: Vec<(Arc<dyn Disk>, Arc<DiskCounts>)>,
    /// The queues of each tap, in the order of the plan.
    pub taps: Vec<(Vec<File>, Arc<NetCounts>)>,
}

/// KVM, as PCI devices need it.
pub struct KvmVm(pub Arc<VmFd>);

impl Vm for KvmVm {
    fn signal_msi(&self, address: u64, data: u32) {
        let message = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        // It fails for a message that reaches no vCPU: the guest programmed it so.
        let _ = self.0.signal_msi(message);
    }

    fn attach_doorbell(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.0.register_ioevent(doorbell, &address, NoDatamatch)?)
    }

    fn detach_doorbell(&self, doorbell: &EventFd, address: u64) {
        // It fails only for one that was not attached.
        let _ = self.0.unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}

/// The board of one run.
pub struct Board {
    /// Its bus.
    pub bus: PciBus,
    devices: Vec<Arc<Mutex<VirtioPci>>>,
}

impl Board {
    /// Builds every device of the plan: entropy, then disks, then interfaces, each in the next slot.
    ///
    /// # Errors
    /// A tap that is none, or no more descriptors.
    pub fn new(plan: &Plan, backends: &Backends, memory: &Arc<Memory>, vm: Arc<dyn Vm>) -> io::Result<Board> {
        let mut board = Board { bus: PciBus::new(), devices: Vec::new() };
        let config = plan.config();
        let mut add = |name: String, device: Box<dyn VirtioDevice>| {
            // The plan has checked that the slots suffice.
            let bar = PCI_WINDOW.start as u32 + board.bus.next() as u32 * BAR_SIZE;
            let id = format!("{}: {name}", config.id);
            let device = Arc::new(Mutex::new(VirtioPci::new(id, device, bar, memory.clone(), vm.clone())?));
            board.devices.push(device.clone());
            board.bus.add(device).map_err(|_| io::Error::other("no free PCI slot"))
        };
        add("entropy".into(), Box::<Rng>::default())?;
        for ((disk, counts), asked) in backends.disks.iter().zip(&config.disks) {
            let queues = config.cpus.min(4) as u16;
            let blk = Blk::new(disk.clone(), &asked.serial, queues, counts.clone());
            add(asked.serial.clone(), Box::new(blk))?;
        }
        for ((taps, counts), asked) in backends.taps.iter().zip(&config.nets) {
            let taps = taps.iter().map(File::try_clone).collect::<io::Result<Vec<_>>>()?;
            let mac = parse_mac(&asked.mac).unwrap_or_default();
            add(
                format!("interface {}", asked.mac),
                Box::new(Net::new(mac, asked.mtu, taps, counts.clone())?),
            )?;
        }
        Ok(board)
    }

    fn each(&self, act: impl Fn(&mut VirtioPci)) {
        for device in &self.devices {
            act(&mut device.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Stops every device; no thread touches guest memory afterwards. vCPUs must have been stopped before.
    pub fn stop(&self) {
        self.each(VirtioPci::stop);
    }

    /// Holds every device between two requests. vCPUs must have been paused before.
    pub fn pause(&self) {
        self.each(|d| d.device().pause());
    }

    /// Undoes [`Board::pause`].
    pub fn resume(&self) {
        self.each(|d| d.device().resume());
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        self.stop();
    }
}
