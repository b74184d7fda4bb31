//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): kernel, initrd, command line and zero page.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::{KernelLoader, bzimage::BzImage};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::{CMDLINE, LoadError, Loaded, Protocol, io};
use crate::plan::{Plan, Region};

/// Where the zero page lies.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Where the protected-mode kernel goes: its usual preferred address, 16 MiB.
const KERNEL: GuestAddress = GuestAddress(0x100_0000);
/// boot.rst: the 64-bit entry is 0x200 past the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
/// boot_params is plain data of the boot protocol, written to guest memory byte by byte.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ZeroPage(boot_params);
// SAFETY: boot_params is `repr(C, packed)` plain integers without padding; every bit pattern is valid.
unsafe impl ByteValued for ZeroPage {}

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
    let loaded = BzImage::load(memory, Some(KERNEL), kernel, Some(GuestAddress(super::ONE_MIB)))
        .map_err(|e| LoadError::NotAKernel(format!("is a damaged bzImage ({e})")))?;
    let header = loaded
        .setup_header
        .ok_or_else(|| LoadError::NotAKernel("is a bzImage without a setup header".into()))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::No64Bit);
    }
    // The kernel decompresses itself in place: it needs init_size bytes from where it was loaded.
    let init_size = u64::from(header.init_size);
    let kernel_end = loaded.kernel_load.0.saturating_add(init_size).max(loaded.kernel_end);
    if kernel_end > low.end() {
        return Err(LoadError::TooLarge { what: "a kernel", bytes: init_size, ram: low.len });
    }

    let top = low.end().min(u64::from(header.initrd_addr_max).saturating_add(1));
    let initrd = super::place_initrd(memory, initrd, kernel_end, top)?;
    super::write_cmdline(plan, memory)?;

    let mut page = ZeroPage::default();
    page.0.hdr = header;
    page.0.hdr.type_of_loader = 0xff;
    page.0.hdr.cmd_line_ptr = CMDLINE.0 as u32;
    if let Some(Region { start, len }) = initrd {
        page.0.hdr.ramdisk_image = start as u32;
        page.0.hdr.ramdisk_size = len as u32;
    }
    let map = super::memory_map(plan);
    for (slot, (region, kind)) in page.0.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: region.start, size: region.len, r#type: *kind };
    }
    page.0.e820_entries = map.len() as u8;
    memory.write_obj(page, ZERO_PAGE).map_err(io("zero page"))?;
    let entry = GuestAddress(loaded.kernel_load.0 + ENTRY_64);
    Ok(Loaded { entry, protocol: Protocol::Linux64, info: ZERO_PAGE, initrd })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::boot::tests::try_load;

    /// The smallest file that keeps the boot protocol: one setup sector, then `payload`.
    pub fn bzimage(version: u16, xloadflags: u16, init_size: u32, payload: &[u8]) -> Vec<u8> {
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
    fn a_kernel_without_a_64_bit_entry_is_refused() {
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
