//! ACPI tables of a hardware-reduced machine (ACPI 6.5, chapter 5): RSDP → XSDT → FADT (→ DSDT), MADT, MCFG.
//!
//! The DSDT names what a stock kernel cannot find by itself: COM1, the PCI root with its windows and its slots, a power
//! button, the generic event device that carries their interrupts, and `\_S5`.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall,
    Name, Notify, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::devices::{hotplug, power, serial};
use crate::plan::{ECAM, PCI_SLOTS, PCI_WINDOW, Plan};

/// Where the RSDP lies: the first address a kernel without UEFI looks at (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// Tables end below SMBIOS.
const END: u64 = 0xf_0000;
/// The interrupt lines of the generic event device: the power button, and slots that were filled or are to be emptied.
pub const BUTTON_GSI: u32 = 5;
/// See [`BUTTON_GSI`].
pub const HOTPLUG_GSI: u32 = 6;
/// What a slot's device is told (ACPI 6.5, 5.6.6): look at it, and let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const OEM: [u8; 6] = *b"HUTCH ";
const OEM_TABLE: [u8; 8] = *b"HUTCHEC2";
/// FADT, IA-PC boot architecture flags (table 5.11): no VGA; MSI is supported (bit 3 clear), CMOS RTC may be probed; no 8042 (bit 1 clear).
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// Writes all tables into `memory`.
pub fn write(plan: &Plan, memory: &GuestMemoryMmap<()>) -> Result<(), GuestMemoryError> {
    let mut next = RSDP + 64;
    let mut put = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        next = (next + bytes.len() as u64).next_multiple_of(16);
        if next > END {
            // 32 vCPUs need some 3 KiB of 64; a longer table is a mistake of ours, shown as an address nobody has.
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(next)));
        }
        memory.write_slice(&bytes, GuestAddress(at)).map(|()| at)
    };
    let dsdt = put(&dsdt())?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(plan.config().cpus))?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, 1);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    let mcfg = put(&mcfg)?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = put(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, GuestAddress(RSDP))
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, power::PORT + offset);
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(cpus: u32) -> impl Aml {
    let mut madt = MADT::new(OEM, OEM_TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt() -> impl Aml {
    let mut body = Vec::new();
    let edge = |gsi| Interrupt::new(true, true, false, false, gsi);

    let serial_port = IO::new(serial::PORT as u16, serial::PORT as u16, 1, 8);
    let serial_line = edge(serial::IRQ);
    let serial_crs = ResourceTemplate::new(vec![&serial_port, &serial_line]);
    let serial_hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let serial_uid = Name::new("_UID".into(), &ZERO);
    let serial_crs = Name::new("_CRS".into(), &serial_crs);
    let com1 = Device::new("COM1".into(), vec![&serial_hid, &serial_uid, &serial_crs]);

    let bus: AddressSpace<u16> = AddressSpace::new_bus_number(0, 0);
    let window_end = (PCI_WINDOW.end() - 1) as u32;
    let window: AddressSpace<u32> = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW.start as u32,
        window_end,
        None,
    );
    let pci_crs = ResourceTemplate::new(vec![&bus, &window]);
    let pci_hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let pci_cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let pci_uid = Name::new("_UID".into(), &ZERO);
    let pci_seg = Name::new("_SEG".into(), &ZERO);
    let pci_bbn = Name::new("_BBN".into(), &ZERO);
    let pci_crs = Name::new("_CRS".into(), &pci_crs);
    let slots = slots();
    let pci =
        Device::new("PCI0".into(), vec![&pci_hid, &pci_cid, &pci_uid, &pci_seg, &pci_bbn, &pci_crs, &slots]);

    // Linux trusts MCFG only where the window is also reserved by a motherboard resource (PCI Firmware 3.3, 4.1.2).
    let ecam = Memory32Fixed::new(true, ECAM.start as u32, ECAM.len as u32);
    let board_crs = ResourceTemplate::new(vec![&ecam]);
    let board_hid = Name::new("_HID".into(), &EISAName::new("PNP0C02"));
    let board_uid = Name::new("_UID".into(), &ZERO);
    let board_crs = Name::new("_CRS".into(), &board_crs);
    let board = Device::new("MBRD".into(), vec![&board_hid, &board_uid, &board_crs]);

    let button_hid = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
    let button_uid = Name::new("_UID".into(), &ZERO);
    let button = Device::new("PWRB".into(), vec![&button_hid, &button_uid]);

    // The generic event device (ACPI 6.5, 5.6.9): an edge interrupt for each of what it tells.
    let (button_line, slots_line) = (edge(BUTTON_GSI), edge(HOTPLUG_GSI));
    let event_crs = ResourceTemplate::new(vec![&button_line, &slots_line]);
    let event_hid = Name::new("_HID".into(), &"ACPI0013");
    let event_uid = Name::new("_UID".into(), &ZERO);
    let event_crs = Name::new("_CRS".into(), &event_crs);
    let button_path = Path::new("\\_SB_.PWRB");
    let pressed = Notify::new(&button_path, &0x80u8);
    let (button_gsi, slots_gsi) = (BUTTON_GSI as u8, HOTPLUG_GSI as u8);
    let (is_button, is_slots) = (Equal::new(&Arg(0), &button_gsi), Equal::new(&Arg(0), &slots_gsi));
    let look = MethodCall::new("\\_SB_.PCI0.PCNT".into(), vec![]);
    let (on_button, on_slots) = (If::new(&is_button, vec![&pressed]), If::new(&is_slots, vec![&look]));
    let event_evt = Method::new("_EVT".into(), 1, true, vec![&on_button, &on_slots]);
    let event = Device::new("GED_".into(), vec![&event_hid, &event_uid, &event_crs, &event_evt]);

    Scope::new("\\_SB_".into(), vec![&com1, &pci, &board, &button, &event]).to_aml_bytes(&mut body);
    let s5 = Package::new(vec![&power::S5]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    table.append_slice(&body);
    table
}

/// AML that was rendered before.
struct Rendered(Vec<u8>);

impl Aml for Rendered {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// What stands in the PCI root for slots whose devices come and go: the registers of [`hotplug`], a device with `_EJ0` for
/// each slot, and the method that hands the registers' bits on to them.
fn slots() -> Rendered {
    let mut body = Vec::new();
    let (port, len) = (hotplug::PORT as u16, hotplug::LEN as u8);
    OpRegion::new("PCST".into(), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(&mut body);
    let register = |name: &[u8; 4]| FieldEntry::Named(*name, 32);
    let registers = vec![register(b"PCIU"), register(b"PCID"), register(b"B0EJ")];
    let (access, rule) = (FieldAccessType::DWord, FieldUpdateRule::WriteAsZeroes);
    Field::new("PCST".into(), access, FieldLockRule::NoLock, rule, registers).to_aml_bytes(&mut body);

    let [filled, leaving, eject] = ["PCIU", "PCID", "B0EJ"].map(Path::new);
    let mut tell = Vec::new();
    Store::new(&Local(0), &filled).to_aml_bytes(&mut tell);
    Store::new(&Local(1), &leaving).to_aml_bytes(&mut tell);
    // Slot 0 is the bridge's.
    for slot in 1..PCI_SLOTS {
        let (name, number, bit) = (format!("S{slot:02X}_"), slot as u8, 1u32 << slot);
        let adr = Name::new("_ADR".into(), &((slot as u32) << 16));
        let sun = Name::new("_SUN".into(), &number);
        let gone = Store::new(&eject, &bit);
        let ej0 = Method::new("_EJ0".into(), 1, true, vec![&gone]);
        Device::new(name.as_str().into(), vec![&adr, &sun, &ej0]).to_aml_bytes(&mut body);
        let path = Path::new(&name);
        for (bits, what) in [(Local(0), DEVICE_CHECK), (Local(1), EJECT_REQUEST)] {
            let notify = Notify::new(&path, &what);
            If::new(&And::new(&ZERO, &bits, &bit), vec![&notify]).to_aml_bytes(&mut tell);
        }
    }
    let tell = Rendered(tell);
    Method::new("PCNT".into(), 0, true, vec![&tell]).to_aml_bytes(&mut body);
    Rendered(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn tables(cpus: u32) -> Vec<u8> {
        let config = serde_json::json!({
            "id": "i-1", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef", "cpus": cpus, "memory_mib": 16, "kvm": 0,
            "boot": { "kernel": 0, "cmdline": "" },
        });
        let plan = Plan::new(serde_json::from_value(config).unwrap()).unwrap();
        let memory = allocate(&plan).unwrap();
        write(&plan, &memory).unwrap();
        let mut low = vec![0; 1 << 20];
        memory.read_slice(&mut low, GuestAddress(0)).unwrap();
        low
    }

    fn table(memory: &[u8], at: u64) -> &[u8] {
        let at = at as usize;
        let len = u32::from_le_bytes(memory[at + 4..at + 8].try_into().unwrap()) as usize;
        let table = &memory[at..at + len];
        assert_eq!(table.iter().fold(0u8, |a, b| a.wrapping_add(*b)), 0, "checksum");
        table
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn a_kernel_finds_its_way_from_the_rsdp() {
        let memory = tables(32);
        let rsdp = &memory[RSDP as usize..][..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(rsdp, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 3 * 8));
        let [fadt, madt, mcfg] = [36, 44, 52].map(|at| table(&memory, u64_at(xsdt, at)));
        assert_eq!((&fadt[..4], &madt[..4], &mcfg[..4]), (&b"FACP"[..], &b"APIC"[..], &b"MCFG"[..]));
        assert_eq!(&table(&memory, u64_at(fadt, 140))[..4], b"DSDT");
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        assert_eq!(u64_at(mcfg, 44), ECAM.start);
        assert_eq!((mcfg[54], mcfg[55]), (0, 0), "one bus");
    }

    /// The tables as Intel's own compiler reads them, where it is installed.
    #[test]
    fn acpica_disassembles_the_dsdt() {
        let memory = tables(2);
        let xsdt = table(&memory, u64_at(&memory[RSDP as usize..], 24));
        let dsdt = table(&memory, u64_at(table(&memory, u64_at(xsdt, 36)), 140));
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("dsdt.aml"), dsdt).unwrap();
        match std::process::Command::new("iasl").args(["-d", "dsdt.aml"]).current_dir(dir.path()).output() {
            Err(e) => eprintln!("SKIPPED: iasl: {e}"),
            Ok(out) => {
                let text = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap_or_default();
                assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
                for word in [
                    "Device (COM1)",
                    "Device (PCI0)",
                    "Notify (\\_SB.PWRB, 0x80)",
                    "Name (\\_S5,",
                    "\\_SB.PCI0.PCNT ()",
                    "Device (S1F)",
                    "Name (_ADR, 0x001F0000)",
                    "B0EJ = 0x80000000",
                    "Local1 = PCID",
                    "Notify (S1F, 0x03)",
                ] {
                    assert!(text.contains(word), "{word} is missing in {text}");
                }
            }
        }
    }
}
