//! The machine's PCI board: every device in its slot, behind the transport. Disks come and go while it runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::hotplug::Hotplug;
use crate::drives::{Drive, Drives};
use crate::pci::intx::{Lines, Pin};
use crate::pci::{PciBuses, Vm};
use crate::plan::{MAX_DEVICES, PCI_BUSES, PCI_SLOTS, Plan, bus_window, parse_mac};
use crate::rate::Limiter;
use crate::virtio::blk::Blk;
use crate::virtio::net::{Net, NetCounts};
use crate::virtio::pci::{BAR_SIZE, VirtioPci};
use crate::virtio::rng::Rng;
use crate::virtio::{Memory, VirtioDevice};

/// What the devices run on, over all reboots of the machine.
#[derive(Default)]
pub struct Backends {
    /// Disks, in the order of the plan.
    pub drives: Drives,
    /// What all disks may do together.
    pub disks_limit: Arc<Limiter>,
    /// Taps, in the order of the plan.
    pub taps: Vec<TapBackend>,
}

/// What an interface runs on.
pub struct TapBackend {
    /// The queues of its tap.
    pub queues: Vec<File>,
    /// Where it counts.
    pub counts: Arc<NetCounts>,
    /// What the guest may receive, and what it may send.
    pub limits: [Arc<Limiter>; 2],
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

    fn set_line(&self, gsi: u32, high: bool) {
        // It fails only for an input that the I/O APIC has not.
        let _ = self.0.set_irq_line(gsi, high);
    }
}

/// A device in its slot.
struct Placed {
    device: Arc<Mutex<VirtioPci>>,
    /// A disk's serial.
    serial: Option<String>,
}

/// What is in the slots.
#[derive(Default)]
struct Slots {
    placed: BTreeMap<usize, Placed>,
    /// The slot of each bus that was filled last, and the one that was emptied last. Slots are filled in turn: what a guest
    /// still says of one that was just emptied does not meet the next device.
    filled: [Option<usize>; PCI_BUSES],
    emptied: Option<usize>,
}

/// The board of one run.
pub struct Board {
    /// Its buses.
    pub buses: PciBuses,
    /// What its guest is told of slots.
    pub hotplug: Arc<Hotplug>,
    placed: Mutex<Slots>,
    drives: Drives,
    disks_limit: Arc<Limiter>,
    lines: Arc<Lines>,
    id: String,
    cpus: u32,
    memory: Arc<Memory>,
    vm: Arc<dyn Vm>,
}

impl Board {
    /// Builds every device there is: entropy, then disks, then interfaces, each in the next slot. Disks that were leaving
    /// are gone: their guest is.
    ///
    /// # Errors
    /// A tap that is none, no free slot, no more descriptors.
    pub fn new(plan: &Plan, backends: &Backends, memory: &Arc<Memory>, vm: Arc<dyn Vm>) -> io::Result<Board> {
        let config = plan.config();
        let board = Board {
            buses: PciBuses::new(),
            hotplug: Arc::new(Hotplug::new()?),
            placed: Mutex::default(),
            drives: backends.drives.clone(),
            disks_limit: backends.disks_limit.clone(),
            lines: Arc::new(Lines::new(vm.clone())),
            id: config.id.clone(),
            cpus: config.cpus,
            memory: memory.clone(),
            vm,
        };
        board.add("entropy".into(), None, |_| Box::<Rng>::default())?;
        backends.drives.remove_leaving();
        for drive in backends.drives.all() {
            board.add_drive(&drive)?;
        }
        for (backend, asked) in backends.taps.iter().zip(&config.nets) {
            let taps = backend.queues.iter().map(File::try_clone).collect::<io::Result<Vec<_>>>()?;
            let mac = parse_mac(&asked.mac).unwrap_or_default();
            let net = Net::new(mac, asked.mtu, taps, backend.counts.clone(), backend.limits.clone())?;
            board.add(format!("interface {}", asked.mac), None, |_| Box::new(net))?;
        }
        Ok(board)
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The queues of a disk on a bus. One that comes after many others has one: its threads and a guest's vectors are few.
    fn queues(&self, bus: usize) -> u16 {
        if bus == 0 { self.cpus.min(4) as u16 } else { 1 }
    }

    /// Whether devices on a bus interrupt by lines. Each of a vCPU's some 200 vectors serves one queue, or one device's
    /// configuration, and a disk's queue takes one of every vCPU that it may interrupt: of one vCPU, 62 devices take 124, of
    /// two, 94 take 282 of 400, and of four all are enough.
    fn by_lines(&self, bus: usize) -> bool {
        bus > self.cpus as usize
    }

    /// Makes a device for a bus, puts it into a free slot there and returns that.
    fn add(
        &self,
        name: String,
        serial: Option<String>,
        device: impl FnOnce(usize) -> Box<dyn VirtioDevice>,
    ) -> io::Result<usize> {
        let mut slots = self.lock();
        let full = || {
            io::Error::other(format!(
                "no PCI slot is free for {name}; a machine has {MAX_DEVICES} for disks and interfaces"
            ))
        };
        let filled = |bus: usize| slots.filled.get(bus).copied().flatten();
        let slot = self.buses.free(filled, |slot| slots.emptied == Some(slot)).ok_or_else(full)?;
        let bus = slot / PCI_SLOTS;
        let bar = bus_window(bus).start as u32 + (slot % PCI_SLOTS) as u32 * BAR_SIZE;
        let pin = self.by_lines(bus).then(|| Pin::new(self.lines.clone(), slot));
        let id = format!("{}: {name}", self.id);
        let device = VirtioPci::new(id, device(bus), bar, pin, self.memory.clone(), self.vm.clone())?;
        let device = Arc::new(Mutex::new(device));
        self.buses.put(slot, device.clone()).map_err(|_| full())?;
        slots.placed.insert(slot, Placed { device, serial });
        if let Some(last) = slots.filled.get_mut(bus) {
            *last = Some(slot);
        }
        Ok(slot)
    }

    fn add_drive(&self, drive: &Drive) -> io::Result<usize> {
        let limits = [drive.limit.clone(), self.disks_limit.clone()];
        self.add(drive.serial.clone(), Some(drive.serial.clone()), |bus| {
            let (disk, counts) = (drive.disk.clone(), drive.counts.clone());
            Box::new(Blk::new(disk, &drive.serial, self.queues(bus), counts, limits))
        })
    }

    /// Adds a disk while the guest runs, and tells it.
    ///
    /// # Errors
    /// No free slot, no more descriptors.
    pub fn plug(&self, drive: &Drive) -> io::Result<()> {
        self.hotplug.fill(self.add_drive(drive)?);
        Ok(())
    }

    /// Asks the guest to let a disk go; with `force`, takes it away. Its drive has been marked as leaving.
    pub fn unplug(&self, serial: &str, force: bool) {
        let slot = {
            let slots = self.lock();
            let found = slots.placed.iter().find(|(_, placed)| placed.serial.as_deref() == Some(serial));
            let slot = found.map(|(slot, _)| *slot);
            if let Some(slot) = slot.filter(|_| !force) {
                // While nobody can empty it: the next disk there is not asked for this one.
                self.hotplug.ask(slot);
            }
            slot
        };
        match slot {
            Some(slot) if force => self.eject(slot),
            Some(_) => {}
            // The guest has let it go before it was asked.
            None => self.drives.remove(serial),
        }
    }

    /// Empties a slot: the guest let it go, whether or not it was asked to.
    pub fn eject(&self, slot: usize) {
        let serial = {
            // Held until it stands still: nobody takes it for gone before.
            let mut slots = self.lock();
            let Some(placed) = slots.placed.remove(&slot) else { return };
            // No access reaches it any more, then its threads end, then its disk may go.
            drop(self.buses.take(slot));
            self.hotplug.forget(slot);
            slots.emptied = Some(slot);
            placed.device.lock().unwrap_or_else(PoisonError::into_inner).stop();
            placed.serial
        };
        if let Some(serial) = serial {
            self.drives.remove(&serial);
        }
    }

    fn each(&self, act: impl Fn(&mut VirtioPci)) {
        for placed in self.lock().placed.values() {
            act(&mut placed.device.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Stops every device; no thread touches guest memory afterwards. vCPUs must have been stopped before.
    pub fn stop(&self) {
        self.each(VirtioPci::stop);
    }

    /// Tells the guest what has changed of its devices' configuration, such as the size of a disk.
    pub fn refresh(&self) {
        self.each(VirtioPci::refresh);
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

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;
    use crate::bus::Registers;
    use crate::pci::msix::tests::FakeVm;
    use hutch_blockdev::Format;

    fn drive(serial: &str) -> Drive {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        Drive::open("i-1", serial, vec![(file, Format::Raw).into()], false).unwrap()
    }

    fn board(drives: &Drives) -> Board {
        board_of(1, drives)
    }

    fn board_of(cpus: u32, drives: &Drives) -> Board {
        let config = serde_json::json!({
            "id": "i-1", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef", "cpus": cpus, "memory_mib": 16, "kvm": 0,
            "boot": { "kernel": 0, "cmdline": "" },
        });
        let plan = Plan::new(serde_json::from_value(config).unwrap()).unwrap();
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let backends = Backends { drives: drives.clone(), ..Backends::default() };
        Board::new(&plan, &backends, &memory, Arc::new(FakeVm::default())).unwrap()
    }

    /// The device id in a slot; 0xffff where there is nothing.
    fn found(board: &Board, slot: u64) -> u16 {
        let mut id = [0; 2];
        board.buses.ecam().read((slot << 15) + 2, &mut id);
        u16::from_le_bytes(id)
    }

    const DISK: u16 = 0x1042;

    #[test]
    fn a_disk_is_there_once_plugged_and_gone_once_let_go() {
        let drives = Drives::default();
        assert!(drives.add(drive("vol1")));
        let board = board(&drives);
        assert_eq!((found(&board, 2), found(&board, 3)), (DISK, 0xffff));
        let second = drive("vol2");
        let file = Arc::downgrade(&second.disk);
        assert!(drives.add(second.clone()));
        board.plug(&second).unwrap();
        drop(second);
        assert_eq!(found(&board, 3), DISK);
        assert!(board.hotplug.line().read().is_ok(), "the guest is told");

        assert!(drives.leave("vol2").is_some());
        board.unplug("vol2", false);
        assert_eq!(found(&board, 3), DISK, "the guest has to let it go");
        assert!(board.hotplug.line().read().is_ok());
        board.eject(3);
        assert_eq!((found(&board, 3), drives.all().len()), (0xffff, 1));
        assert!(file.upgrade().is_none(), "its files are closed");

        // What a guest ejects unasked is gone for this run and still attached.
        board.eject(2);
        board.eject(2);
        board.eject(31);
        assert_eq!((found(&board, 2), drives.all().len()), (0xffff, 1));
        assert!(drives.leave("vol1").is_some());
        board.unplug("vol1", false);
        assert!(drives.all().is_empty(), "it had let it go before");
    }

    #[test]
    fn force_takes_a_disk_away_and_the_next_run_is_without_those_that_were_leaving() {
        let drives = Drives::default();
        assert!(drives.add(drive("vol1")) && drives.add(drive("vol2")));
        let first = board(&drives);
        assert!(drives.leave("vol1").is_some());
        first.unplug("vol1", true);
        assert_eq!((found(&first, 2), found(&first, 3)), (0xffff, DISK));
        assert!(drives.leave("vol2").is_some());
        first.unplug("vol2", false);
        drop(first);
        let second = board(&drives);
        assert_eq!((found(&second, 2), drives.all().len()), (0xffff, 0));
    }

    #[test]
    fn a_slot_that_was_just_emptied_is_filled_last() {
        let board = board(&Drives::default());
        let plug = |n: usize| board.plug(&drive(&format!("vol{n}"))).unwrap();
        (2..PCI_SLOTS).for_each(plug);
        assert!(!board.buses.spread());
        board.eject(7);
        plug(100);
        assert_eq!((found(&board, 7), found(&board, 32)), (0xffff, DISK));
        plug(101);
        assert_eq!((found(&board, 7), found(&board, 33)), (0xffff, DISK));
        board.eject(9);
        plug(102);
        assert_eq!((found(&board, 7), found(&board, 9)), (DISK, 0xffff), "another was emptied since");
    }

    /// Of the some 200 vectors that each vCPU has, more disks than an instance may have leave a few.
    #[test]
    fn a_guest_has_vectors_for_all_its_disks() {
        for cpus in [1, 2, 3, 4, 8, 32] {
            let board = board_of(cpus, &Drives::default());
            (0..140).for_each(|n| board.plug(&drive(&format!("vol{n}"))).unwrap());
            let mut vectors = 0;
            for slot in 2..142 {
                let mut header = [0; 256];
                board.buses.ecam().read(slot << 15, &mut header);
                let capability = usize::from(header[0x34]);
                assert_eq!(header[0x3d] == 1, slot / 32 > u64::from(cpus), "slot {slot} of {cpus} vCPUs");
                match (header[0x3d], header[capability]) {
                    // A queue's vector is taken of every vCPU, or is one of several that share them out.
                    (0, 0x11) => {
                        let queues = u32::from(header[capability + 2]);
                        assert_eq!(queues, if slot < 32 { cpus.min(4) } else { 1 });
                        vectors += cpus + 1;
                    }
                    (1, 0x09) => {}
                    other => panic!("slot {slot}: {other:?}"),
                }
            }
            assert!(vectors <= cpus * 200 - 40, "{vectors} vectors of {cpus} vCPUs");
        }
    }

    #[test]
    fn when_all_slots_are_taken_another_disk_is_refused() {
        let drives = Drives::default();
        let board = board(&drives);
        let fill = (0..).find(|i| board.plug(&drive(&format!("vol{i}"))).is_err());
        assert_eq!(fill, Some(MAX_DEVICES));
        let said = board.plug(&drive("volx")).unwrap_err().to_string();
        assert!(said.contains("volx") && said.contains("158"), "{said}");
    }
}
