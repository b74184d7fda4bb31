//! PCI roots as ACPI has them: their windows, their lines, and slots whose devices come and go ([`hotplug`]).
//!
//! A guest has one bus, and no work with others, until that is full. They are described in a table of their own, which
//! lies in memory, in no list of tables: the first event that is about one of them loads it (ACPI 6.5, 19.6.77), and the
//! kernel finds the buses and all that is on them. A machine that begins with devices there has it in the list.
//!
//! ```text
//!   interrupt ─► \_SB.PCEV ─┬─► \_SB.PCI0.PCNT ── Notify (slot, …)
//!                           └─► of other buses: Load, once ─► \_SB.PCNX ─► \_SB.PCIn.PCNT ── Notify (slot, …)
//! ```
//! The others are in no MCFG: Linux looks at each device number of each bus that MCFG has and ACPI has not, which is an
//! exit each. They have `_CBA` instead (PCI Firmware 3.3, 4.1.3).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Equal, Field, FieldAccessType,
    FieldEntry, FieldLockRule, FieldUpdateRule, If, Local, Method, MethodCall, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use crate::devices::hotplug;
use crate::pci::intx;
use crate::plan::{ECAM, PCI_BUSES, PCI_SLOTS, bus_window};

/// The method that hands on what there is to tell of slots.
pub const TELL: &str = r"\_SB_.PCEV";
/// The one of the other buses, which takes a bit for each bus.
const TELL_OTHERS: &str = r"\_SB_.PCNX";
/// What a slot's device is told (ACPI 6.5, 5.6.6): look at it, and let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// AML that was rendered before.
pub struct Rendered(Vec<u8>);

impl Aml for Rendered {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// The table of the other buses.
pub struct Later {
    /// Where it lies.
    pub address: u64,
    /// How long it is.
    pub len: usize,
    /// It is in the list of tables.
    pub loaded: bool,
}

/// `Load (region, Local1)` (ACPI 6.5, 20.2.5.3).
struct Load(Path);

impl Aml for Load {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&[0x5b, 0x20]);
        self.0.to_aml_bytes(sink);
        Local(1).to_aml_bytes(sink);
    }
}

/// What stands in `\_SB` for the first bus, and for what comes when it is full.
pub fn first_bus(later: &Later) -> Rendered {
    let mut body = root(0).0;
    registers(&mut body, "PCMO", hotplug::BUSES, &[b"PCMB"]);
    let (address, len) = (later.address as u32, later.len as u32);
    OpRegion::new("PCXT".into(), OpRegionSpace::SystemMemory, &address, &len).to_aml_bytes(&mut body);
    Name::new("PCXL".into(), &u8::from(later.loaded)).to_aml_bytes(&mut body);

    let [told, loaded] = ["PCMB", "PCXL"].map(Path::new);
    let first = MethodCall::new(r"\_SB_.PCI0.PCNT".into(), vec![]);
    let others = (1u32 << PCI_BUSES) - 2;
    let of_others = And::new(&Local(0), &told, &others);
    let (not_yet, done, load) = (Equal::new(&loaded, &ZERO), Store::new(&loaded, &1u8), Load("PCXT".into()));
    let once = If::new(&not_yet, vec![&done, &load]);
    let hand_on = MethodCall::new(TELL_OTHERS.into(), vec![&Local(0)]);
    let if_others = If::new(&of_others, vec![&once, &hand_on]);
    Method::new("PCEV".into(), 0, true, vec![&first, &if_others]).to_aml_bytes(&mut body);
    Rendered(body)
}

/// The table of the other buses, without its header.
pub fn other_buses() -> Vec<u8> {
    let mut body = Vec::new();
    let mut tell = Vec::new();
    for bus in 1..PCI_BUSES {
        root(bus).to_aml_bytes(&mut body);
        let name = format!(r"\_SB_.PCI{bus}.PCNT");
        let (bit, call) = (1u8 << bus, MethodCall::new(name.as_str().into(), vec![]));
        If::new(&And::new(&ZERO, &Arg(0), &bit), vec![&call]).to_aml_bytes(&mut tell);
    }
    let (roots, tell) = (Rendered(body), Rendered(tell));
    let hand_on = Method::new("PCNX".into(), 1, true, vec![&tell]);
    let mut table = Vec::new();
    Scope::new(r"\_SB_".into(), vec![&roots, &hand_on]).to_aml_bytes(&mut table);
    table
}

/// A root.
fn root(bus: usize) -> Rendered {
    let number = bus as u8;
    let numbers: AddressSpace<u16> = AddressSpace::new_bus_number(number.into(), number.into());
    let window = bus_window(bus);
    let (start, end) = (window.start as u32, (window.end() - 1) as u32);
    let window: AddressSpace<u32> =
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, end, None);
    let crs = ResourceTemplate::new(vec![&numbers, &window]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0A08"));
    let cid = Name::new("_CID".into(), &EISAName::new("PNP0A03"));
    let uid = Name::new("_UID".into(), &number);
    let seg = Name::new("_SEG".into(), &ZERO);
    let bbn = Name::new("_BBN".into(), &number);
    let crs = Name::new("_CRS".into(), &crs);
    // What makes of the first bus one of many: MCFG has it, and its devices have no lines.
    let others = if bus == 0 { Rendered(Vec::new()) } else { of_others() };
    let slots = slots(bus);
    let name = format!("PCI{bus}");
    let children: Vec<&dyn Aml> = vec![&hid, &cid, &uid, &seg, &bbn, &crs, &others, &slots];
    let mut body = Vec::new();
    Device::new(name.as_str().into(), children).to_aml_bytes(&mut body);
    Rendered(body)
}

/// What the roots of other buses have and the first one has not: where ECAM is, and to which lines pins lead.
fn of_others() -> Rendered {
    let mut body = Vec::new();
    // As in MCFG, the address is that of bus 0.
    Name::new("_CBA".into(), &(ECAM.start as u32)).to_aml_bytes(&mut body);
    let routes: Vec<_> = (0..PCI_SLOTS)
        .map(|slot| {
            // Any function of it, pin A, no link device (ACPI 6.5, 6.2.13).
            let (address, line) = ((slot as u32) << 16 | 0xffff, intx::line_of(slot) as u8);
            let (pin, gsi) = (0u8, intx::FIRST_GSI as u8 + line);
            let mut route = Vec::new();
            Package::new(vec![&address, &pin, &ZERO, &gsi]).to_aml_bytes(&mut route);
            Rendered(route)
        })
        .collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    Name::new("_PRT".into(), &routes).to_aml_bytes(&mut body);
    Rendered(body)
}

/// Registers of [`hotplug`], from an offset on, with their names.
fn registers(body: &mut Vec<u8>, region: &str, offset: u64, names: &[&[u8; 4]]) {
    let (port, len) = ((hotplug::PORT + offset) as u16, names.len() as u8 * 4);
    OpRegion::new(region.into(), OpRegionSpace::SystemIO, &port, &len).to_aml_bytes(body);
    let fields = names.iter().map(|name| FieldEntry::Named(**name, 32)).collect();
    let (access, rule) = (FieldAccessType::DWord, FieldUpdateRule::WriteAsZeroes);
    Field::new(region.into(), access, FieldLockRule::NoLock, rule, fields).to_aml_bytes(body);
}

/// What stands in a root for slots whose devices come and go: the bus's block of registers, a device with `_EJ0` for each
/// slot, and the method that hands the registers' bits on to them.
fn slots(bus: usize) -> Rendered {
    let mut body = Vec::new();
    registers(&mut body, "PCST", bus as u64 * hotplug::BLOCK, &[b"PCIU", b"PCID", b"B0EJ"]);
    let [filled, leaving, eject] = ["PCIU", "PCID", "B0EJ"].map(Path::new);
    let mut tell = Vec::new();
    Store::new(&Local(0), &filled).to_aml_bytes(&mut tell);
    Store::new(&Local(1), &leaving).to_aml_bytes(&mut tell);
    // Slot 0 of the first bus is the bridge's.
    for slot in usize::from(bus == 0)..PCI_SLOTS {
        let (name, number, bit) = (format!("S{slot:02X}_"), (bus * PCI_SLOTS + slot) as u8, 1u32 << slot);
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
