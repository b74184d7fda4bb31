//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): kernel, initrd, command line and zero page.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use crate::plan::{ECAM, Plan, Region};

/// Where the zero page lies.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Where the command line lies.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Where the protected-mode kernel goes: its usual preferred address, 16 MiB.
const KERNEL: GuestAddress = GuestAddress(0x100_0000);
/// The extended BIOS data area begins here; ACPI tables and SMBIOS live from here to 1 MiB.
const LOW_RESERVED: u64 = 0x9_fc00;
const ONE_MIB: u64 = 0x10_0000;
/// boot.rst: the 64-bit entry is 0x200 past the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// boot_params is plain data of the boot protocol, written to guest memory byte by byte.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);
// SAFETY: boot_params is `repr(C, packed)` plain integers without padding; every bit pattern is valid.
unsafe impl ByteValued for ZeroPage {}

/// Where the guest begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// RIP of vCPU 0, in long mode.
    pub entry: GuestAddress,
    /// RSI of vCPU 0: the zero page.
    pub zero_page: GuestAddress,
    /// Where the initrd was put, if there is one.
    pub initrd: Option<Region>,
}

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file is no x86 bzImage.
    #[error("the kernel is not a bzImage ({0}); give the vmlinuz file of a distribution's kernel package")]
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

fn io<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> LoadError {
    move |e| LoadError::Io { what, why: e.to_string() }
}

/// Puts `kernel`, `initrd` and the plan's command line into `memory`.
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
    let low = plan.ram().first().copied().unwrap_or(Region { start: 0, len: 0 });
    let size = kernel.seek(SeekFrom::End(0)).map_err(io("kernel"))?;
    kernel.rewind().map_err(io("kernel"))?;
    if size.saturating_add(KERNEL.0) > low.end() {
        return Err(LoadError::TooLarge { what: "a kernel", bytes: size, ram: low.len });
    }
    let loaded = BzImage::load(memory, Some(KERNEL), kernel, Some(GuestAddress(ONE_MIB)))
        .map_err(|e| LoadError::NotAKernel(e.to_string()))?;
    let header = loaded.setup_header.ok_or_else(|| LoadError::NotAKernel("no setup header".into()))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::No64Bit);
    }
    // The kernel decompresses itself in place: it needs init_size bytes from where it was loaded.
    let init_size = u64::from(header.init_size);
    let kernel_end = loaded.kernel_load.0.saturating_add(init_size).max(loaded.kernel_end);
    if kernel_end > low.end() {
        return Err(LoadError::TooLarge { what: "a kernel", bytes: init_size, ram: low.len });
    }

    let initrd = match initrd {
        None => None,
        Some(file) => {
            let len = file.seek(SeekFrom::End(0)).map_err(io("initrd"))?;
            file.rewind().map_err(io("initrd"))?;
            // As high as the kernel accepts it, on a page of its own.
            let top = low.end().min(u64::from(header.initrd_addr_max).saturating_add(1));
            let start = top.checked_sub(len).map(|s| s & !0xfff).filter(|&s| s >= kernel_end);
            let start = start.ok_or(LoadError::TooLarge { what: "an initrd", bytes: len, ram: low.len })?;
            memory.read_exact_volatile_from(GuestAddress(start), file, len as usize).map_err(io("initrd"))?;
            Some(Region { start, len })
        }
    };

    let mut cmdline = plan.config().boot.cmdline.clone().into_bytes();
    cmdline.push(0);
    memory.write_slice(&cmdline, CMDLINE).map_err(io("command line"))?;

    let mut page = ZeroPage::default();
    page.0.hdr = header;
    page.0.hdr.type_of_loader = 0xff;
    page.0.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(Region { start, len }) = initrd {
        page.0.hdr.ramdisk_image = start as u32;
        page.0.hdr.ramdisk_size = len as u32;
    }
    let map = e820(plan);
    for (slot, entry) in page.0.e820_table.iter_mut().zip(&map) {
        *slot = *entry;
    }
    page.0.e820_entries = map.len() as u8;
    memory.write_obj(page, ZERO_PAGE).map_err(io("zero page"))?;
    let entry = GuestAddress(loaded.kernel_load.0 + ENTRY_64);
    Ok(Loaded { entry, zero_page: ZERO_PAGE, initrd })
}

/// The memory map the guest is told (ACPI 6.5, 15): RAM without the BIOS area, and ECAM reserved, or Linux does not use it.
fn e820(plan: &Plan) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map = vec![
        entry(0, LOW_RESERVED, E820_RAM),
        entry(LOW_RESERVED, ONE_MIB, E820_RESERVED),
        entry(ECAM.start, ECAM.end(), E820_RESERVED),
    ];
    map.extend(plan.ram().iter().map(|r| entry(r.start.max(ONE_MIB), r.end(), E820_RAM)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootConfig, MachineConfig};
    use crate::memory::allocate;
    use std::fs::File;
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

    /// The smallest file that keeps the boot protocol: one setup sector, then `payload`.
    fn bzimage(version: u16, xloadflags: u16, init_size: u32, payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        image[0x1f1] = 1; // setup_sects
        image[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        image[0x211] = 1; // LOADED_HIGH
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    fn try_load(mib: u64, kernel: &[u8], initrd: Option<&[u8]>) -> Result<(Loaded, Vec<u8>), LoadError> {
        let plan = plan(mib);
        let memory = allocate(&plan).unwrap();
        let loaded = load(&plan, &memory, &mut file(kernel), initrd.map(file).as_mut())?;
        let mut page = vec![0; 4096];
        memory.read_slice(&mut page, ZERO_PAGE).unwrap();
        Ok((loaded, page))
    }

    #[test]
    fn a_kernel_and_its_initrd_are_placed() {
        let kernel = bzimage(0x20f, 1, 0x1000, &[0x90; 4096]);
        let (loaded, page) = try_load(64, &kernel, Some(&[7; 5000])).unwrap();
        assert_eq!(loaded.entry.0, KERNEL.0 + ENTRY_64);
        let initrd = loaded.initrd.unwrap();
        assert_eq!((initrd.len, initrd.start & 0xfff), (5000, 0));
        assert!(initrd.end() <= 64 << 20);
        assert_eq!(page[0x218..0x21c], (initrd.start as u32).to_le_bytes());
        assert_eq!(page[0x1e8], 4, "e820: low RAM, BIOS area, ECAM, RAM");
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(matches!(try_load(64, b"", None), Err(LoadError::NotAKernel(_))));
        assert!(matches!(try_load(64, &[0x41; 8192], None), Err(LoadError::NotAKernel(_))));
        assert!(matches!(try_load(64, &bzimage(0x20f, 0, 0, &[0; 64]), None), Err(LoadError::No64Bit)));
        assert!(matches!(try_load(64, &bzimage(0x20b, 1, 0, &[0; 64]), None), Err(LoadError::No64Bit)));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let kernel = bzimage(0x20f, 1, 0x1000, &[0; 64]);
        let big = vec![0; 48 << 20];
        assert!(matches!(
            try_load(64, &kernel, Some(&big)),
            Err(LoadError::TooLarge { what: "an initrd", .. })
        ));
        let huge = bzimage(0x20f, 1, u32::MAX, &[0; 64]);
        assert!(matches!(try_load(64, &huge, None), Err(LoadError::TooLarge { what: "a kernel", .. })));
    }
}
