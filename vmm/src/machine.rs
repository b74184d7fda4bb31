//! The machine, running: from a checked [`Plan`] and open files to a [`Report`].
//!
//! ```text
//!   Machine::run ──► build (VM, memory, kernel, devices, vCPUs) ──► vCPU threads ──► Ending
//!        ▲                                                                             │
//!        └───────────────── reset: the same plan, built anew ◄─────────────────────────┤
//!                                                     anything else: Report ◄──────────┘
//! ```

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::board::{Backends, Board, KvmVm};
use crate::boot;
use crate::bus::{Bus, Shared};
use crate::config::{EXIT_PORT, End, Report};
use crate::console::{self, Console};
use crate::counts::{Counts, Devices};
use crate::devices::{exit, hotplug, power, rtc, serial};
use crate::drives::{Drive, Drives};
use crate::ending::{Ending, Outcome};
use crate::gate::Gate;
use crate::memory;
use crate::plan::{ECAM, PCI_BUSES, Plan, bus_window};
use crate::rate::Limiter;
use crate::vcpu;
use crate::x86_64::{acpi, cpuid, regs, smbios};

/// Three pages below the BIOS that Intel's hardware needs for real mode; no guest sees them.
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;
/// A kernel that panicked may print its stack for this long before the machine ends.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often a guest that has not looked at its slots is told again.
const REMIND: Duration = Duration::from_secs(1);
/// Readers of the console have this long to take its end.
const FAREWELL: Duration = Duration::from_millis(500);

/// The files a machine runs on, opened by whoever had the right to.
pub struct Files {
    /// `/dev/kvm`.
    pub kvm: File,
    /// The kernel.
    pub kernel: File,
    /// The initrd.
    pub initrd: Option<File>,
    /// Where the console's output is appended.
    pub console_log: Option<File>,
    /// Disks and taps, in the order of the plan.
    pub backends: Backends,
}

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// KVM refused.
    #[error("{id}: KVM: {what} failed: {source}; `hutch doctor` tells what this machine's KVM can do")]
    Kvm {
        /// The machine.
        id: String,
        /// What was asked of KVM.
        what: &'static str,
        /// Its answer.
        source: kvm_ioctls::Error,
    },
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    /// The kernel or initrd is wrong.
    #[error("{id}: {source}")]
    Boot {
        /// The machine.
        id: String,
        /// What is wrong.
        source: boot::LoadError,
    },
    /// Something else of the host failed.
    #[error("{id}: {what}: {why}")]
    Host {
        /// The machine.
        id: String,
        /// What was being done.
        what: &'static str,
        /// The cause.
        why: String,
    },
}

/// One machine and all that outlives its reboots.
pub struct Machine {
    plan: Plan,
    kvm: Kvm,
    kernel: File,
    initrd: Option<File>,
    console: Arc<Mutex<Console>>,
    input: Arc<serial::Input>,
    counts: Arc<Counts>,
    reach: Arc<Reach>,
    backends: Backends,
}

/// What acts on the machine from other threads, over all its runs.
struct Reach {
    /// The end of the run that is under way.
    ending: Mutex<Arc<Ending>>,
    killed: AtomicBool,
    button: EventFd,
    gate: Arc<Gate>,
    /// The devices of the run that is under way. Whoever pauses, resumes, starts or ends a run, or changes its disks, holds
    /// this lock.
    board: Mutex<Option<Arc<Board>>>,
    drives: Drives,
}

impl Reach {
    fn ending(&self) -> Arc<Ending> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn board(&self) -> MutexGuard<'_, Option<Arc<Board>>> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Acts on the machine from another thread.
#[derive(Clone)]
pub struct Handle(Arc<Reach>);

impl Handle {
    /// Ends the machine, also a paused one.
    pub fn kill(&self) {
        // Under the lock, so that a machine that is just rebooting hears of it before its next run.
        let ending = self.0.ending.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.killed.store(true, Relaxed);
        ending.set(Outcome::Killed);
    }

    /// Presses the power button: the guest's kernel hears of it and powers off if it wants to.
    pub fn press_power_button(&self) {
        // It fails only when the counter is full, and then the button is pressed already.
        let _ = self.0.button.write(1);
    }

    /// Returns when every vCPU is held and every device stands still between two requests. A machine that is just
    /// rebooting is held before its first instruction. Pausing a paused machine changes nothing.
    pub fn pause(&self) {
        let board = self.0.board();
        // In this order: a vCPU that runs could start a device that was just held.
        self.0.gate.close();
        if let Some(board) = &*board {
            board.pause();
        }
    }

    /// Lets a paused machine go on; a running one is left alone.
    pub fn resume(&self) {
        let board = self.0.board();
        if let Some(board) = &*board {
            board.resume();
        }
        self.0.gate.open();
    }

    /// Adds a disk: the guest that runs is told, the next one finds it.
    ///
    /// # Errors
    /// There is one of this serial, or no free slot; nothing changed.
    pub fn attach(&self, drive: Drive) -> Result<(), String> {
        let board = self.0.board();
        if !self.0.drives.add(drive.clone()) {
            return Err(format!("disk {} is attached already", drive.serial));
        }
        let plugged = board.as_ref().map_or(Ok(()), |board| board.plug(&drive));
        plugged.map_err(|e| {
            // It was never the guest's.
            let _ = self.0.drives.leave(&drive.serial);
            self.0.drives.remove(&drive.serial);
            format!("disk {}: {e}", drive.serial)
        })
    }

    /// Asks the guest to let a disk go, which it does in its own time, or never; with `force` the disk is gone when this
    /// returns. It may be asked again.
    ///
    /// # Errors
    /// There is none of this serial.
    pub fn detach(&self, serial: &str, force: bool) -> Result<(), String> {
        let board = self.0.board();
        let ask = self.0.drives.leave(serial).ok_or_else(|| format!("there is no disk {serial}"))?;
        match &*board {
            Some(board) if force || ask => board.unplug(serial, force),
            Some(_) => {}
            None => self.0.drives.remove(serial),
        }
        Ok(())
    }

    /// Tells the guest what has changed of its devices' configuration, such as the size of a disk.
    pub fn refresh(&self) {
        if let Some(board) = &*self.0.board() {
            board.refresh();
        }
    }

    /// Whether the machine is paused or about to be.
    pub fn is_paused(&self) -> bool {
        self.0.gate.is_closed()
    }
}

impl Machine {
    /// Takes the plan and its files; nothing runs yet.
    pub fn new(plan: Plan, files: Files) -> Result<Machine, MachineError> {
        let config = plan.config();
        let console = Console::new(files.console_log, config.console_log_limit);
        // SAFETY: the descriptor is /dev/kvm's, as `Files::kvm` promises, and ownership passes to Kvm.
        let kvm = unsafe { kvm_ioctls::Kvm::from_raw_fd(files.kvm.into_raw_fd()) };
        if kvm.get_api_version() != 12 {
            return Err(MachineError::Host {
                id: config.id.clone(),
                what: "the kvm descriptor",
                why: "is not that of /dev/kvm (API version 12)".into(),
            });
        }
        let button = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| MachineError::Host {
            id: config.id.clone(),
            what: "eventfd",
            why: e.to_string(),
        })?;
        Ok(Machine {
            reach: Arc::new(Reach {
                ending: Mutex::default(),
                killed: AtomicBool::new(false),
                button,
                gate: Arc::default(),
                board: Mutex::default(),
                drives: files.backends.drives.clone(),
            }),
            kvm,
            kernel: files.kernel,
            initrd: files.initrd,
            console: Arc::new(Mutex::new(console)),
            input: Arc::default(),
            counts: Arc::default(),
            backends: files.backends,
            plan,
        })
    }

    /// The console, for readers.
    pub fn console(&self) -> Arc<Mutex<Console>> {
        self.console.clone()
    }

    /// What people type into the guest's console, over all reboots.
    pub fn input(&self) -> Arc<serial::Input> {
        self.input.clone()
    }

    /// The counters, for readers.
    pub fn counts(&self) -> Arc<Counts> {
        self.counts.clone()
    }

    /// The devices' counters, for readers.
    pub fn devices(&self) -> Devices {
        let nets = self.plan.config().nets.iter().zip(&self.backends.taps);
        Devices {
            drives: self.backends.drives.clone(),
            nets: nets.map(|(net, backend)| (net.mac.clone(), backend.counts.clone())).collect(),
        }
    }

    /// What all of its disks may do together.
    pub fn disks_limit(&self) -> Arc<Limiter> {
        self.backends.disks_limit.clone()
    }

    /// What its interfaces may do, by their MACs, in the order of the plan.
    pub fn net_limits(&self) -> Vec<(String, [Arc<Limiter>; 2])> {
        let macs = self.plan.config().nets.iter().map(|net| net.mac.clone());
        macs.zip(self.backends.taps.iter().map(|backend| backend.limits.clone())).collect()
    }

    /// Runs the machine until it ends, reboots included. `handle` receives the way to end it from outside.
    pub fn run(&mut self, started: impl FnOnce(Handle)) -> Report {
        started(Handle(self.reach.clone()));
        let end = loop {
            let ending = self.reach.ending();
            match self.run_once(&ending) {
                Err(e) => break End::Error { message: e.to_string() },
                Ok(Outcome::Reset) => {
                    if let Some(message) = self.panic() {
                        break End::Panic { message };
                    }
                    if self.plan.config().no_reboot {
                        break End::Reboot;
                    }
                    let mut ending = self.reach.ending.lock().unwrap_or_else(PoisonError::into_inner);
                    if self.reach.killed.load(Relaxed) {
                        break End::Killed;
                    }
                    *ending = Arc::default();
                    self.counts.reboots.fetch_add(1, Relaxed);
                }
                Ok(Outcome::PowerOff) => break End::PowerOff,
                Ok(Outcome::Command(code)) => break End::Command { code },
                Ok(Outcome::Killed) => break End::Killed,
                Ok(Outcome::Error(message)) => break End::Error { message },
                Ok(Outcome::Panic) => break End::Panic { message: self.panic().unwrap_or_default() },
                Ok(Outcome::TripleFault) => {
                    break self.panic().map_or(End::TripleFault, |message| End::Panic { message });
                }
            }
        };
        console::finish(&self.console, FAREWELL);
        let total = self.console.lock().unwrap_or_else(PoisonError::into_inner).total();
        Report { end, counters: self.counts.counters(total) }
    }

    fn panic(&self) -> Option<String> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).panic().map(str::to_owned)
    }

    fn error(&self, what: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError + use<> {
        let id = self.plan.config().id.clone();
        move |source| MachineError::Kvm { id: id.clone(), what, source }
    }

    fn host<E: std::fmt::Display>(&self, what: &'static str) -> impl FnOnce(E) -> MachineError + use<E> {
        let id = self.plan.config().id.clone();
        move |e| MachineError::Host { id, what, why: e.to_string() }
    }

    /// Builds the machine from its plan and runs it until it ends or resets.
    fn run_once(&mut self, ending: &Arc<Ending>) -> Result<Outcome, MachineError> {
        let memory = Arc::new(memory::allocate(&self.plan)?);
        let id = || self.plan.config().id.clone();
        let loaded = boot::load(&self.plan, &memory, &mut self.kernel, self.initrd.as_mut())
            .map_err(|source| MachineError::Boot { id: id(), source })?;
        regs::write_tables(&memory, loaded.protocol).map_err(self.host("page tables"))?;
        memory
            .write_slice(&power::RESET_CODE, GuestAddress(power::RESET_ENTRY))
            .map_err(self.host("reset entry"))?;
        smbios::write(&memory, &self.plan.config().id, self.plan.uuid())
            .map_err(self.host("SMBIOS tables"))?;
        let vm = Arc::new(self.create_vm(&memory)?);
        vm.register_irqfd(&self.reach.button, acpi::BUTTON_GSI).map_err(self.error("KVM_IRQFD"))?;
        // Until the guest runs, whoever changes its disks waits: what came in between would be on no board.
        let reach = self.reach.clone();
        let mut current = reach.board();
        let board = Board::new(&self.plan, &self.backends, &memory, Arc::new(KvmVm(vm.clone())));
        let board = Arc::new(board.map_err(self.host("devices"))?);
        let spread = board.buses.spread();
        acpi::write(&self.plan, &memory, spread).map_err(self.host("ACPI tables"))?;
        vm.register_irqfd(board.hotplug.line(), acpi::HOTPLUG_GSI).map_err(self.error("KVM_IRQFD"))?;
        let ports = Arc::new(self.ports(&vm, ending, &board)?);
        let mut mmio = Bus::default();
        let ecam: Shared = Arc::new(Mutex::new(board.buses.ecam()));
        let windows = (0..PCI_BUSES)
            .map(|bus| (bus_window(bus), Arc::new(Mutex::new(board.buses.window(bus))) as Shared));
        for (region, device) in windows.chain([(ECAM, ecam)]) {
            mmio.insert(region.start, region.len, device).map_err(self.host("memory layout"))?;
        }
        let mmio = Arc::new(mmio);

        let cpus = self.plan.config().cpus;
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(self.error("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = Msrs::from_entries(&regs::MSRS).map_err(|e| self.host("MSR list")(format!("{e:?}")))?;
        let mut fds = Vec::new();
        for index in 0..cpus {
            let fd = vm.create_vcpu(u64::from(index)).map_err(self.error("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(&cpuid::for_vcpu(&supported, index, cpus)).map_err(self.error("KVM_SET_CPUID2"))?;
            fd.set_msrs(&msrs).map_err(self.error("KVM_SET_MSRS"))?;
            if index == 0 {
                let sregs = fd.get_sregs().map_err(self.error("KVM_GET_SREGS"))?;
                fd.set_sregs(&regs::sregs(sregs, loaded.protocol)).map_err(self.error("KVM_SET_SREGS"))?;
                fd.set_regs(&regs::regs(&loaded)).map_err(self.error("KVM_SET_REGS"))?;
            }
            fds.push(fd);
        }
        let threads = vcpu::Threads::start(fds, ports, mmio, ending, &self.reach.gate, &self.counts)
            .map_err(self.host("cannot start a vCPU's thread"))?;
        *current = Some(board.clone());
        drop(current);
        let outcome = self.watch(ending, &board.hotplug);
        // In this order: nobody can start a device any more, then none runs, then the memory may go.
        drop(threads);
        let mut current = reach.board();
        board.stop();
        *current = None;
        drop(current);
        drop(vm);
        Ok(outcome)
    }

    /// Waits for the end; a panicked kernel that hangs is ended here, and one that has not looked at its slots is reminded.
    fn watch(&self, ending: &Ending, hotplug: &hotplug::Hotplug) -> Outcome {
        // While the machine is paused, its kernel says nothing.
        let (mut left, mut reminded) = (LAST_WORDS, Instant::now());
        loop {
            let looked = Instant::now();
            if looked.duration_since(reminded) >= REMIND {
                hotplug.remind();
                reminded = looked;
            }
            if let Some(outcome) = ending.wait(Some(looked + Duration::from_millis(100))) {
                return outcome;
            }
            let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
            if console.panic().is_some() {
                if !self.reach.gate.is_closed() {
                    left = left.saturating_sub(looked.elapsed());
                }
                if console.panic_over() || left.is_zero() {
                    ending.set(Outcome::Panic);
                }
            }
        }
    }

    fn create_vm(&self, memory: &GuestMemoryMmap<()>) -> Result<VmFd, MachineError> {
        let vm = self.kvm.create_vm().map_err(self.error("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS).map_err(self.error("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP).map_err(self.error("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.create_irq_chip().map_err(self.error("KVM_CREATE_IRQCHIP"))?;
        for (slot, region) in memory.iter().enumerate() {
            let start = region.start_addr();
            let host = memory.get_host_address(start).map_err(self.host("guest memory"))?;
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: start.raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
                flags: 0,
            };
            // SAFETY: the region stays mapped until the VM is dropped: `run_once` drops the VM before `memory`.
            unsafe { vm.set_user_memory_region(slot) }.map_err(self.error("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(vm)
    }

    fn ports(&self, vm: &VmFd, ending: &Arc<Ending>, board: &Arc<Board>) -> Result<Bus, MachineError> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(self.host("eventfd"))?;
        vm.register_irqfd(&line, serial::IRQ).map_err(self.error("KVM_IRQFD"))?;
        let mut bus = Bus::default();
        let mut put = |start: u64, len: u64, device: Shared| {
            bus.insert(start, len, device).map_err(self.host("port layout"))
        };
        put(serial::PORT, 8, serial::SerialPort::new(self.console.clone(), self.input.clone(), line))?;
        put(rtc::PORT, 2, Arc::new(Mutex::new(rtc::CmosClock::default())))?;
        put(power::PORT, power::LEN, Arc::new(Mutex::new(power::Power(ending.clone()))))?;
        let (hotplug, board) = (board.hotplug.clone(), Arc::downgrade(board));
        let eject = move |slot| board.upgrade().iter().for_each(|board| board.eject(slot));
        put(hotplug::PORT, hotplug::LEN, Arc::new(Mutex::new(hotplug::Ports { hotplug, eject })))?;
        put(power::KEYBOARD_PORT, 1, Arc::new(Mutex::new(power::KeyboardReset(ending.clone()))))?;
        if self.plan.config().exit_port {
            let counts = self.counts.clone();
            let device = exit::ExitPort::new(ending.clone(), move || counts.mark_user_space());
            put(EXIT_PORT.into(), 2, Arc::new(Mutex::new(device)))?;
        }
        Ok(bus)
    }
}
