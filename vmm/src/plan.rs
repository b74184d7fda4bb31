//! A [`MachineConfig`] checked whole and laid out: nothing after this step may fail for a reason that was visible before it.

use crate::config::MachineConfig;
use crate::drives;
use crate::x86_64::smbios::parse_uuid;

/// Where RAM below 4 GiB ends at the latest; above it lie the PCI window, ECAM, the I/O APIC and the local APICs.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM above the hole begins.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
/// Root buses that a machine may have. The first is always there, the others once it is full (see `x86_64::slots`).
pub const PCI_BUSES: usize = 5;
/// Slots of a bus.
pub const PCI_SLOTS: usize = 32;
/// Slots of all buses: that of number `n` is slot `n % PCI_SLOTS` of bus `n / PCI_SLOTS`.
pub const ALL_SLOTS: usize = PCI_BUSES * PCI_SLOTS;
/// The 32-bit windows that PCI BARs are given from, of all buses.
pub const PCI_WINDOW: Region = Region { start: 0xc000_0000, len: PCI_BUSES as u64 * BUS_WINDOW };
/// A bus's part of [`PCI_WINDOW`].
const BUS_WINDOW: u64 = 0x400_0000;
/// ECAM of a bus: 32 devices × 8 functions × 4 KiB (PCIe 5.0, 7.2.2).
pub const BUS_ECAM: u64 = 0x10_0000;
/// ECAM of all buses.
pub const ECAM: Region = Region { start: 0xe800_0000, len: PCI_BUSES as u64 * BUS_ECAM };
/// Disks and network interfaces of a machine: the host bridge and the entropy device take two slots.
pub const MAX_DEVICES: usize = ALL_SLOTS - 2;
/// The longest kernel command line, without its NUL (COMMAND_LINE_SIZE of x86 Linux is 2048).
pub const CMDLINE_MAX: usize = 2047;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// The window that the BARs of a bus are given from.
pub const fn bus_window(bus: usize) -> Region {
    Region { start: PCI_WINDOW.start + bus as u64 * BUS_WINDOW, len: BUS_WINDOW }
}

impl Region {
    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }
}

/// Why a configuration cannot become a machine. Nothing was opened or started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The vCPU count is outside 1 to 32.
    #[error("{id}: {cpus} vCPUs asked for; a machine has 1 to 32")]
    Cpus {
        /// The machine.
        id: String,
        /// What was asked.
        cpus: u32,
    },
    /// The memory size is outside 16 MiB to 1 TiB.
    #[error("{id}: {mib} MiB of memory asked for; a machine has 16 to 1048576 MiB")]
    Memory {
        /// The machine.
        id: String,
        /// What was asked, in MiB.
        mib: u64,
    },
    /// The command line is too long or not printable ASCII.
    #[error("{id}: the kernel command line {why}; shorten or correct it")]
    Cmdline {
        /// The machine.
        id: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A disk is described wrongly.
    #[error("{id}: disk {index} {why}")]
    Disk {
        /// The machine.
        id: String,
        /// The disk's place in the list.
        index: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A network interface is described wrongly.
    #[error("{id}: network interface {index}: {why}")]
    Net {
        /// The machine.
        id: String,
        /// The interface's place in the list.
        index: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More disks and interfaces than slots.
    #[error("{id}: {count} disks and network interfaces asked for; a machine has slots for {MAX_DEVICES}")]
    Slots {
        /// The machine.
        id: String,
        /// What was asked.
        count: usize,
    },
    /// The UUID is not one.
    #[error("{id}: '{uuid}' is not a UUID such as ec2e1916-9099-7caf-fd21-012345abcdef")]
    Uuid {
        /// The machine.
        id: String,
        /// What was asked.
        uuid: String,
    },
    /// The machine was to run as root.
    #[error("{id}: run_as names uid or gid 0; name an unprivileged user")]
    Root {
        /// The machine.
        id: String,
    },
}

/// A checked machine.
#[derive(Debug, Clone)]
pub struct Plan {
    config: MachineConfig,
    ram: Vec<Region>,
    uuid: [u8; 16],
}

impl Plan {
    /// Checks `config` whole and lays out its memory.
    pub fn new(config: MachineConfig) -> Result<Plan, PlanError> {
        let id = config.id.clone();
        if !(1..=32).contains(&config.cpus) {
            return Err(PlanError::Cpus { id, cpus: config.cpus });
        }
        if !(16..=1 << 20).contains(&config.memory_mib) {
            return Err(PlanError::Memory { id, mib: config.memory_mib });
        }
        let cmdline = &config.boot.cmdline;
        if cmdline.len() > CMDLINE_MAX {
            return Err(PlanError::Cmdline { id, why: "is longer than 2047 bytes" });
        }
        if !cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err(PlanError::Cmdline { id, why: "holds bytes that are not printable ASCII" });
        }
        let count = config.disks.len() + config.nets.len();
        if count > MAX_DEVICES {
            return Err(PlanError::Slots { id, count });
        }
        if let Some(why) = config.disks_rate.wrong() {
            return Err(PlanError::Disk { id, index: 0, why });
        }
        for (index, disk) in config.disks.iter().enumerate() {
            let twice = config.disks.iter().take(index).any(|other| other.serial == disk.serial);
            let wrong = drives::wrong(&disk.serial, disk.layers.len());
            if let Some(why) =
                wrong.or(twice.then_some("has the serial of another disk")).or(disk.rate.wrong())
            {
                return Err(PlanError::Disk { id, index, why });
            }
        }
        for (index, net) in config.nets.iter().enumerate() {
            let why = match parse_mac(&net.mac) {
                None => "its MAC is not six hexadecimal bytes with colons",
                Some(mac) if mac[0] & 1 == 1 || mac == [0; 6] => "its MAC is no unicast address",
                Some(_) if net.taps.is_empty() || net.taps.len() > 8 => "it has not 1 to 8 tap queues",
                Some(_) if !(576..=9001).contains(&net.mtu) => "its MTU is outside 576 to 9001",
                Some(_) => match net.rate.wrong() {
                    Some(why) => why,
                    None => continue,
                },
            };
            return Err(PlanError::Net { id, index, why });
        }
        if config.run_as.is_some_and(|r| r.uid == 0 || r.gid == 0) {
            return Err(PlanError::Root { id });
        }
        let Some(uuid) = parse_uuid(&config.uuid) else {
            return Err(PlanError::Uuid { id, uuid: config.uuid });
        };
        let bytes = config.memory_mib << 20;
        let mut ram = vec![Region { start: 0, len: bytes.min(LOW_RAM_END) }];
        if bytes > LOW_RAM_END {
            ram.push(Region { start: HIGH_RAM_START, len: bytes - LOW_RAM_END });
        }
        Ok(Plan { config, ram, uuid })
    }

    /// What was asked.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The machine's UUID, in the order it is written.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// RAM, in order of address: one region, or two around the hole below 4 GiB.
    pub fn ram(&self) -> &[Region] {
        &self.ram
    }
}

/// Reads `02:00:00:00:00:01`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next()?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootConfig, DiskConfig, DiskFormat, Flow, LayerConfig, NetConfig, Rate, RunAs};

    fn config() -> MachineConfig {
        MachineConfig {
            id: "i-0123456789abcdef0".into(),
            uuid: "ec2e1916-9099-7caf-fd21-012345abcdef".into(),
            cpus: 1,
            memory_mib: 128,
            hugepages: false,
            boot: BootConfig { kernel: 3, initrd: None, cmdline: "console=ttyS0".into() },
            disks: vec![],
            disks_rate: Rate::default(),
            nets: vec![],
            kvm: 4,
            control: None,
            console_log: None,
            console_log_limit: 0,
            report: None,
            run_as: None,
            exit_port: false,
            no_reboot: false,
            tethered: false,
        }
    }

    fn refused(change: impl FnOnce(&mut MachineConfig)) -> PlanError {
        let mut c = config();
        change(&mut c);
        Plan::new(c).expect_err("must be refused")
    }

    #[test]
    fn ram_is_split_around_the_hole() {
        assert_eq!(Plan::new(config()).unwrap().ram(), [Region { start: 0, len: 128 << 20 }]);
        let mut c = config();
        c.memory_mib = 4096;
        let plan = Plan::new(c).unwrap();
        assert_eq!(plan.ram()[0].end(), LOW_RAM_END);
        assert_eq!(plan.ram()[1], Region { start: HIGH_RAM_START, len: 1 << 30 });
        assert!(plan.ram()[0].end() <= PCI_WINDOW.start && PCI_WINDOW.end() <= ECAM.start);
    }

    #[test]
    fn bad_sizes_and_texts_are_refused() {
        assert!(matches!(refused(|c| c.cpus = 0), PlanError::Cpus { cpus: 0, .. }));
        assert!(matches!(refused(|c| c.cpus = 33), PlanError::Cpus { .. }));
        assert!(matches!(refused(|c| c.memory_mib = 15), PlanError::Memory { .. }));
        assert!(matches!(refused(|c| c.memory_mib = u64::MAX), PlanError::Memory { .. }));
        assert!(matches!(refused(|c| c.boot.cmdline = "a".repeat(2048)), PlanError::Cmdline { .. }));
        assert!(matches!(refused(|c| c.boot.cmdline = "a\nb".into()), PlanError::Cmdline { .. }));
        assert!(matches!(refused(|c| c.run_as = Some(RunAs { uid: 0, gid: 1 })), PlanError::Root { .. }));
    }

    #[test]
    fn bad_devices_are_refused_with_their_place() {
        let layer = LayerConfig { fd: 5, format: DiskFormat::Raw, key: None };
        let none = Rate::default();
        let disk = |serial: &str, n| DiskConfig {
            serial: serial.into(),
            layers: vec![layer.clone(); n],
            top: String::new(),
            read_only: false,
            rate: none.clone(),
        };
        let idle = |per_second, burst| Rate { ops: vec![], bytes: vec![Flow { per_second, burst }] };
        let many = Rate { ops: vec![Flow { per_second: 1, burst: 1 }; 5], bytes: vec![] };
        let slow = [idle(0, 1), idle(1, 0), many].map(|rate| DiskConfig { rate, ..disk("vol1", 1) });
        let good = disk("vol0123456789abcdef0", 1);
        let long = disk(&"v".repeat(21), 1);
        let bad = [disk("vol1", 0), disk("vol1", 65), disk("vol-1", 1), disk("", 1), long, good.clone()];
        for bad in bad.into_iter().chain(slow) {
            let good = good.clone();
            assert!(matches!(refused(|c| c.disks = vec![good, bad]), PlanError::Disk { index: 1, .. }));
        }
        let all = vec![disk("v", 1); MAX_DEVICES + 1];
        assert!(matches!(refused(|c| c.disks = all), PlanError::Slots { count: 159, .. }));
        let net = |mac: &str, taps: usize, mtu| NetConfig {
            mac: mac.into(),
            taps: vec![6; taps],
            mtu,
            rate: none.clone(),
        };
        for bad in [
            NetConfig { rate: idle(0, 1), ..net("02:00:00:00:00:01", 1, 1500) },
            net("02:00:00:00:00", 1, 1500),
            net("03:00:00:00:00:01", 1, 1500),
            net("02:00:00:00:00:01", 0, 1500),
            net("02:00:00:00:00:01", 1, 100),
        ] {
            assert!(matches!(refused(|c| c.nets = vec![bad]), PlanError::Net { index: 0, .. }));
        }
    }

    #[test]
    fn a_config_with_an_unknown_field_is_refused() {
        let mut json = serde_json::to_value(config()).unwrap();
        assert!(serde_json::from_value::<MachineConfig>(json.clone()).is_ok());
        json["path"] = "/etc/shadow".into();
        assert!(serde_json::from_value::<MachineConfig>(json).is_err());
    }
}
