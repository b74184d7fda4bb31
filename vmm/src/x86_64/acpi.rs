//! ACPI tables of a hardware-reduced machine (ACPI 6.5, chapter 5): RSDP → XSDT → FADT (→ DSDT), MADT, MCFG.
//!
//! The DSDT names what a stock kernel cannot find by itself: COM1, the first PCI root with its windows and its slots
//! ([`slots`](super::slots), and an SSDT for the others), a power button, the generic event device that carries their
//! interrupts, and `\_S5`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, MethodCall, Name, Notify,
    Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::slots;
use crate::devices::{power, serial};
use crate::plan::{BUS_ECAM, ECAM, Plan};

/// Where the RSDP lies: the first address a kernel without UEFI looks at (ACPI 6.5, 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// Tables end below SMBIOS.
const END: u64 = 0xf_0000;
/// The interrupt lines of the generic event device: the power button, and slots that were filled or are to be emptied.
pub const BUTTON_GSI: u32 = 5;
/// See [`BUTTON_GSI`].
pub const HOTPLUG_GSI: u32 = 6;
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const OEM: [u8; 6] = *b"HUTCH ";
const OEM_TABLE: [u8; 8] = *b"HUTCHEC2";
/// FADT, IA-PC boot architecture flags (table 5.11): no VGA; MSI is supported (bit 3 clear), CMOS RTC may be probed; no 8042 (bit 1 clear).
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// Writes all tables into `memory`; `spread`: there are devices on other PCI buses than the first already.
pub fn write(plan: &Plan, memory: &GuestMemoryMmap<()>, spread: bool) -> Result<(), GuestMemoryError> {
    let mut next = RSDP + 64;
    let mut put = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next;
        next = (next + bytes.len() as u64).next_multiple_of(16);
        if next > END {
            // 32 vCPUs and all buses need some 15 KiB of 64; a longer table is a mistake of ours, shown as an address nobody has.
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(next)));
        }
        memory.write_slice(&bytes, GuestAddress(at)).map(|()| at)
    };
    let mut extra = Sdt::new(*b"SSDT", 36, 2, OEM, OEM_TABLE, 1);
    extra.append_slice(&slots::other_buses());
    let ssdt = put(&extra)?;
    let dsdt = put(&dsdt(&slots::Later { address: ssdt, len: extra.len(), loaded: spread }))?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(plan.config().cpus))?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, 1);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    let mcfg = put(&mcfg)?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    for table in [fadt, madt, mcfg].into_iter().chain(spread.then_some(ssdt)) {
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

fn dsdt(later: &slots::Later) -> impl Aml {
    let mut body = Vec::new();
    let edge = |gsi| Interrupt::new(true, true, false, false, gsi);

    let serial_port = IO::new(serial::PORT as u16, serial::PORT as u16, 1, 8);
    let serial_line = edge(serial::IRQ);
    let serial_crs = ResourceTemplate::new(vec![&serial_port, &serial_line]);
    let serial_hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let serial_uid = Name::new("_UID".into(), &ZERO);
    let serial_crs = Name::new("_CRS".into(), &serial_crs);
    let com1 = Device::new("COM1".into(), vec![&serial_hid, &serial_uid, &serial_crs]);

    // Linux trusts MCFG and _CBA only where ECAM is also reserved by a motherboard resource (PCI Firmware 3.3, 4.1.2).
    let ecam = Memory32Fixed::new(true, ECAM.start as u32, BUS_ECAM as u32);
    let others = Memory32Fixed::new(true, (ECAM.start + BUS_ECAM) as u32, (ECAM.len - BUS_ECAM) as u32);
    let board_crs = ResourceTemplate::new(vec![&ecam, &others]);
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
    let look = MethodCall::new(slots::TELL.into(), vec![]);
    let (on_button, on_slots) = (If::new(&is_button, vec![&pressed]), If::new(&is_slots, vec![&look]));
    let event_evt = Method::new("_EVT".into(), 1, true, vec![&on_button, &on_slots]);
    let event = Device::new("GED_".into(), vec![&event_hid, &event_uid, &event_crs, &event_evt]);

    let pci = slots::first_bus(later);
    Scope::new("\\_SB_".into(), vec![&com1, &pci, &board, &button, &event]).to_aml_bytes(&mut body);
    let s5 = Package::new(vec![&power::S5]);
    Name::new("\\_S5_".into(), &s5).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    table.append_slice(&body);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn tables(cpus: u32, spread: bool) -> Vec<u8> {
        let config = serde_json::json!({
            "id": "i-1", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef", "cpus": cpus, "memory_mib": 16, "kvm": 0,
            "boot": { "kernel": 0, "cmdline": "" },
        });
        let plan = Plan::new(serde_json::from_value(config).unwrap()).unwrap();
        let memory = allocate(&plan).unwrap();
        write(&plan, &memory, spread).unwrap();
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
        let memory = tables(32, false);
        let rsdp = &memory[RSDP as usize..][..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64_at(rsdp, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 3 * 8));
        let [fadt, madt, mcfg] = [36, 44, 52].map(|at| table(&memory, u64_at(xsdt, at)));
        assert_eq!((&fadt[..4], &madt[..4], &mcfg[..4]), (&b"FACP"[..], &b"APIC"[..], &b"MCFG"[..]));
        assert_eq!(&table(&memory, u64_at(fadt, 140))[..4], b"DSDT");
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
        assert_eq!(u64_at(mcfg, 44), ECAM.start);
        assert_eq!(
            (mcfg[54], mcfg[55]),
            (0, 0),
            "one bus: each more is looked through, with an exit a device number"
        );
    }

    /// The DSDT, and the table of the other buses.
    fn definitions(memory: &[u8], spread: bool) -> [&[u8]; 2] {
        let xsdt = table(memory, u64_at(&memory[RSDP as usize..], 24));
        let dsdt = table(memory, u64_at(table(memory, u64_at(xsdt, 36)), 140));
        // It is the first of all tables.
        let ssdt = table(memory, RSDP + 64);
        let listed = xsdt[36..].chunks(8).any(|at| u64_at(at, 0) == RSDP + 64);
        assert_eq!((&ssdt[..4], listed), (&b"SSDT"[..], spread));
        [dsdt, ssdt]
    }

    #[test]
    fn the_other_buses_are_in_a_table_that_the_first_ones_event_loads() {
        for spread in [false, true] {
            let memory = tables(2, spread);
            let [dsdt, ssdt] = definitions(&memory, spread);
            let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
            let [a, b, c, d] = ((RSDP + 64) as u32).to_le_bytes();
            let [e, f] = (ssdt.len() as u16).to_le_bytes();
            assert!(has(&[b'P', b'C', b'X', b'T', 0, 0x0c, a, b, c, d, 0x0b, e, f]), "the region it lies in");
            assert!(has(&[b'P', b'C', b'X', b'L', u8::from(spread)]), "loaded: {spread}");
        }
    }

    /// The tables as Intel's own compiler reads them, where it is installed.
    #[test]
    fn acpica_disassembles_the_tables() {
        let memory = tables(2, false);
        let dir = tempfile::tempdir().unwrap();
        for (name, table) in ["dsdt.aml", "ssdt.aml"].into_iter().zip(definitions(&memory, false)) {
            std::fs::write(dir.path().join(name), table).unwrap();
        }
        let first: &[&str] = &[
            "Device (COM1)",
            "Device (PCI0)",
            "Notify (\\_SB.PWRB, 0x80)",
            "Name (\\_S5,",
            "\\_SB.PCEV ()",
            "Device (S1F)",
            "Name (_ADR, 0x001F0000)",
            "B0EJ = 0x80000000",
            "Local1 = PCID",
            "Notify (S1F, 0x03)",
            "\\_SB.PCI0.PCNT ()",
            "Load (PCXT, Local1)",
            "\\_SB.PCNX (Local0)",
        ];
        let others: &[&str] = &[
            "Device (PCI4)",
            "Name (_BBN, 0x04)",
            "Name (_CBA, 0xE8000000)",
            "0xCC000000,         // Range Minimum",
            "0xCFFFFFFF,         // Range Maximum",
            "OperationRegion (PCST, SystemIO, 0x0640, 0x0C)",
            "Name (_SUN, 0x9F)",
            "0x001FFFFF",
            "\\_SB.PCI4.PCNT ()",
        ];
        for (name, other, words) in [("dsdt", "ssdt", first), ("ssdt", "dsdt", others)] {
            let (name, other) = (format!("{name}.aml"), format!("{other}.aml"));
            let arguments = ["-e", &other, "-d", &name];
            let out =
                match std::process::Command::new("iasl").args(arguments).current_dir(dir.path()).output() {
                    Err(e) => return eprintln!("SKIPPED: iasl: {e}"),
                    Ok(out) => out,
                };
            let text =
                std::fs::read_to_string(dir.path().join(name).with_extension("dsl")).unwrap_or_default();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            for word in words {
                assert!(text.contains(word), "{word} is missing in {text}");
            }
        }
    }
}
