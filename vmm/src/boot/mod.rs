//! From a kernel file to a guest that is ready to run its first instruction. The file's own bytes say what it is.
//!
//! ```text
//!   "HdrS" ──► bzimage.rs  64-bit Linux boot protocol, zero page      both: initrd high, command line, memory map
//!   ELF ─────► pvh.rs      32-bit PVH entry, hvm_start_info
//! ```

mod bzimage;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use crate::plan::{ECAM, Plan, Region};

/// Where the command line lies.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The extended BIOS data area begins here; ACPI tables and SMBIOS live from here to 1 MiB.
const LOW_RESERVED: u64 = 0x9_fc00;
/// Below it lies what we hand over; kernels go above.
const ONE_MIB: u64 = 0x10_0000;
/// Kinds of memory, the same in e820 (ACPI 6.5, table 15.4) and in PVH's map.
const RAM: u32 = 1;
const RESERVED: u32 = 2;
/// The memory in which a kernel is tried, in MiB: pages that are not written to are not there.
const SCRATCH_MIB: u64 = 2048;

/// How vCPU 0 enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Long mode, RSI at the zero page (boot.rst, 64-bit boot protocol).
    Linux64,
    /// Protected mode without paging, EBX at hvm_start_info (Xen, docs/misc/pvh.pandoc).
    Pvh,
}

/// Where the guest begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// The first instruction of vCPU 0.
    pub entry: GuestAddress,
    /// How it is entered.
    pub protocol: Protocol,
    /// What it is handed: the zero page or hvm_start_info.
    pub info: GuestAddress,
    /// Where the initrd was put, if there is one.
    pub initrd: Option<Region>,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is no kernel that boots here; the text says what it is.
    #[error(
        "the kernel file {0}; give the vmlinuz of a distribution's x86_64 kernel package, or a vmlinux with PVH"
    )]
    NotAKernel(String),
    /// The kernel has no 64-bit entry.
    #[error("the kernel has no 64-bit entry point (xloadflags); only x86_64 kernels from 3.8 on boot")]
    No64Bit,
    /// The kernel or initrd does not fit.
    #[error(
        "{what} of {bytes} bytes does not fit into {ram} bytes of guest memory; give the machine more memory"
    )]
    TooLarge {
        /// Kernel or initrd.
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// RAM below 4 GiB.
        ram: u64,
    },
    /// A file could not be read, or guest memory not written.
    #[error("cannot load the {what}: {why}")]
    Io {
        /// Kernel, initrd, command line or zero page.
        what: &'static str,
        /// The cause.
        why: String,
    },
}

/// Puts `kernel`, `initrd` and the plan's command line into `memory`, which must be all zeros.
///
/// # Errors
/// A file that is no kernel for this machine, does not fit into its memory, or cannot be read.
pub fn load<K, I>(
    plan: &Plan,
    memory: &GuestMemoryMmap<()>,
    kernel: &mut K,
    initrd: Option<&mut I>,
) -> Result<Loaded, LoadError>
where
    K: Read + Seek + ReadVolatile,
    I: Read + Seek + ReadVolatile,
{
    let mut head = Vec::new();
    kernel.rewind().map_err(io("kernel"))?;
    kernel.by_ref().take(0x400).read_to_end(&mut head).map_err(io("kernel"))?;
    if head.starts_with(b"\x7fELF") {
        pvh::load(plan, memory, kernel, initrd)
    } else if has(&head, 0x202, b"HdrS") {
        bzimage::load(plan, memory, kernel, initrd)
    } else {
        Err(LoadError::NotAKernel(what_it_is(&head).into()))
    }
}

/// Whether a file is a kernel that [`load`] takes, tried in memory that no guest has.
///
/// # Errors
/// Why it is none.
pub fn check(kernel: &File) -> Result<(), LoadError> {
    let config = serde_json::json!({
        "id": "i-0123456789abcdef0", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef",
        "cpus": 1, "memory_mib": SCRATCH_MIB, "kvm": 0, "boot": { "kernel": 0, "cmdline": "" },
    });
    let config = serde_json::from_value(config).map_err(io("kernel"))?;
    let plan = Plan::new(config).map_err(io("kernel"))?;
    let memory = crate::memory::allocate(&plan).map_err(io("kernel"))?;
    let mut kernel = kernel.try_clone().map_err(io("kernel"))?;
    load(&plan, &memory, &mut kernel, None::<&mut File>).map(drop)
}

fn has(head: &[u8], at: usize, magic: &[u8]) -> bool {
    head.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// Names a file that is no kernel for this machine by its first bytes.
fn what_it_is(head: &[u8]) -> &'static str {
    let known: [(usize, &[u8], &str); 9] = [
        (0x38, b"ARM\x64", "is a kernel for arm64"),
        (0x38, b"RSC\x05", "is a kernel for RISC-V"),
        (0, b"MZ", "is an EFI program and no Linux kernel for x86"),
        (0, b"\x1f\x8b", "is compressed by gzip (kernels of other architectures are): unpack it first"),
        (0, b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it first"),
        (0, b"\xfd7zXZ\0", "is compressed by xz: unpack it first"),
        (0, b"QFI\xfb", "is a qcow2 disk image"),
        (0, b"07070", "is an initrd (cpio)"),
        (0x1fe, b"\x55\xaa", "is a disk image or a boot sector"),
    ];
    match known.into_iter().find(|(at, magic, _)| has(head, *at, magic)) {
        Some((_, _, what)) => what,
        None if head.is_empty() => "is empty",
        None => "is not a kernel: neither a bzImage nor an ELF file",
    }
}

fn io<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> LoadError {
    move |e| LoadError::Io { what, why: e.to_string() }
}

/// Puts the initrd on pages of its own, as high below `top` as it fits above `kernel_end`.
fn place_initrd<I: Read + Seek + ReadVolatile>(
    memory: &GuestMemoryMmap<()>,
    initrd: Option<&mut I>,
    kernel_end: u64,
    top: u64,
) -> Result<Option<Region>, LoadError> {
    let Some(file) = initrd else { return Ok(None) };
    let len = file.seek(SeekFrom::End(0)).map_err(io("initrd"))?;
    file.rewind().map_err(io("initrd"))?;
    let start = top.checked_sub(len).map(|s| s & !0xfff).filter(|&s| s >= kernel_end);
    let start = start.ok_or(LoadError::TooLarge { what: "an initrd", bytes: len, ram: top })?;
    memory.read_exact_volatile_from(GuestAddress(start), file, len as usize).map_err(io("initrd"))?;
    Ok(Some(Region { start, len }))
}

fn write_cmdline(plan: &Plan, memory: &GuestMemoryMmap<()>) -> Result<(), LoadError> {
    let mut cmdline = plan.config().boot.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory.write_slice(&cmdline, CMDLINE).map_err(io("command line"))
}

/// The memory map the guest is told (ACPI 6.5, 15): RAM without the BIOS area, and ECAM reserved, or Linux does not use it.
fn memory_map(plan: &Plan) -> Vec<(Region, u32)> {
    let entry = |start: u64, end: u64, kind| (Region { start, len: end - start }, kind);
    let mut map = vec![
        entry(0, LOW_RESERVED, RAM),
        entry(LOW_RESERVED, ONE_MIB, RESERVED),
        entry(ECAM.start, ECAM.end(), RESERVED),
    ];
    map.extend(plan.ram().iter().map(|r| entry(r.start.max(ONE_MIB), r.end(), RAM)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootConfig, MachineConfig};
    use crate::memory::allocate;
    use std::io::Write;

    fn plan(memory_mib: u64) -> Plan {
        let config = serde_json::json!({
            "id": "i-0123456789abcdef0", "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef",
            "cpus": 1, "memory_mib": memory_mib, "kvm": 4,
            "boot": BootConfig { kernel: 3, initrd: None, cmdline: "console=ttyS0 quiet".into() },
        });
        Plan::new(serde_json::from_value::<MachineConfig>(config).unwrap()).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let fd = nix::sys::memfd::memfd_create(c"test", nix::sys::memfd::MFdFlags::empty()).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file
    }

    /// Loads, and returns 4 KiB of what the kernel is handed.
    pub fn try_load(mib: u64, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(Loaded, Vec<u8>), LoadError> {
        let plan = plan(mib);
        let memory = allocate(&plan).unwrap();
        let loaded = load(&plan, &memory, &mut file(kernel), initrd.map(file).as_mut())?;
        let mut page = vec![0; 4096];
        memory.read_slice(&mut page, loaded.info).unwrap();
        Ok((loaded, page))
    }

    #[test]
    fn a_file_is_a_kernel_where_it_can_be_loaded() {
        let good = bzimage::tests::bzimage(0x20f, 1, 0x1000, &[0x90; 4096]);
        check(&file(&good)).unwrap();
        assert!(matches!(check(&file(&good[..1000])), Err(LoadError::NotAKernel(_))));
        assert!(matches!(check(&file(&[0x41; 8192])), Err(LoadError::NotAKernel(_))));
        let old = bzimage::tests::bzimage(0x20f, 0, 0x1000, &[0x90; 4096]);
        assert!(matches!(check(&file(&old)), Err(LoadError::No64Bit)));
    }

    #[test]
    fn what_is_no_kernel_is_named() {
        let at = |offset: usize, magic: &[u8]| [vec![0; offset], magic.to_vec(), vec![0; 600]].concat();
        for (bytes, name) in [
            (vec![], "is empty"),
            (vec![0x41; 8192], "is not a kernel"),
            (at(0, b"MZ"), "EFI program"),
            (at(0, b"\x1f\x8b\x08"), "gzip"),
            (at(0x38, b"ARM\x64"), "arm64"),
            (at(0, b"QFI\xfb"), "qcow2"),
            (at(0x1fe, b"\x55\xaa"), "disk image"),
        ] {
            let refused = try_load(64, &bytes, None).unwrap_err();
            assert!(matches!(&refused, LoadError::NotAKernel(what) if what.contains(name)), "{refused}");
        }
    }
}
