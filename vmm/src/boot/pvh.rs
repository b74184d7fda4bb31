//! Kernels as ELF files with a PVH entry (System V ABI, ELF-64; Xen's docs/misc/pvh.pandoc and
//! include/public/arch-x86/hvm/start_info.h): segments go to their physical addresses, and a note names the entry.
//!
//! The file is not trusted: a segment lies between 1 MiB and the end of low RAM, so it touches nothing that we hand over.

use std::io::{Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, ReadVolatile};

use super::{CMDLINE, LoadError, Loaded, ONE_MIB, Protocol, io};
use crate::plan::{Plan, Region};
use crate::x86_64::acpi;

/// Where hvm_start_info lies; its list of modules and the memory map follow within the page.
const START_INFO: u64 = 0x7000;
const MODULES: u64 = START_INFO + 0x40;
const MEMORY_MAP: u64 = START_INFO + 0x80;
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// ELF-64's file header and an entry of its program header table, in bytes.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Kernels have some five.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// Notes of a kernel are some hundreds of bytes.
const NOTES_MAX: u64 = 64 << 10;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY of the owner "Xen".
const PHYS32_ENTRY: u32 = 18;
const OWNER: &[u8] = b"Xen\0";

fn wrong(what: impl Into<String>) -> LoadError {
    LoadError::NotAKernel(format!("is an ELF file {}", what.into()))
}

/// Little-endian numbers at an offset; `None` past the end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..)?.first_chunk().copied()
    }
    fn u16(&self, at: usize) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }
    fn u32(&self, at: usize) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }
    fn u64(&self, at: usize) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}

/// An entry of the program header table.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    in_file: u64,
    in_memory: u64,
    align: u64,
}

impl Segment {
    fn parse(entry: &[u8]) -> Option<Segment> {
        let f = Fields(entry);
        Some(Segment {
            kind: f.u32(0)?,
            offset: f.u64(8)?,
            address: f.u64(24)?,
            in_file: f.u64(32)?,
            in_memory: f.u64(40)?,
            align: f.u64(48)?,
        })
    }

    fn region(&self) -> Region {
        Region { start: self.address, len: self.in_memory }
    }
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
    let segments = segments(kernel, size)?;
    let mut entry = None;
    for notes in segments.iter().filter(|s| s.kind == PT_NOTE) {
        if notes.in_file > NOTES_MAX {
            return Err(wrong(format!("with {} bytes of notes", notes.in_file)));
        }
        let bytes = read(kernel, notes.offset, notes.in_file as usize)?;
        entry = entry.or(find_entry(&bytes, notes.align));
    }
    let entry = entry.ok_or_else(|| wrong("without a PVH entry (a kernel needs CONFIG_PVH)"))?;

    let mut kernel_end = 0;
    let mut entered = false;
    for segment in segments.iter().filter(|s| s.kind == PT_LOAD && s.in_memory > 0) {
        let Region { start, len } = segment.region();
        let end = start.checked_add(len).filter(|_| start >= ONE_MIB);
        let end = end
            .ok_or_else(|| wrong(format!("with a segment at {start:#x}, outside of memory from 1 MiB on")))?;
        if end > low.end() {
            return Err(LoadError::TooLarge { what: "a kernel", bytes: end, ram: low.len });
        }
        kernel.seek(SeekFrom::Start(segment.offset)).map_err(io("kernel"))?;
        // What is in memory but not in the file stays as it is in fresh memory: zero.
        memory
            .read_exact_volatile_from(GuestAddress(start), kernel, segment.in_file as usize)
            .map_err(io("kernel"))?;
        kernel_end = kernel_end.max(end);
        entered |= (start..end).contains(&entry);
    }
    if !entered {
        return Err(wrong(format!("whose PVH entry {entry:#x} is in none of its segments")));
    }

    let initrd = super::place_initrd(memory, initrd, kernel_end, low.end())?;
    super::write_cmdline(plan, memory)?;
    for (address, bytes) in start_info(plan, initrd) {
        memory.write_slice(&bytes, GuestAddress(address)).map_err(io("hvm_start_info"))?;
    }
    let (entry, info) = (GuestAddress(entry), GuestAddress(START_INFO));
    Ok(Loaded { entry, protocol: Protocol::Pvh, info, initrd })
}

fn read<K: Read + Seek>(kernel: &mut K, offset: u64, len: usize) -> Result<Vec<u8>, LoadError> {
    let mut bytes = vec![0; len];
    kernel.seek(SeekFrom::Start(offset)).map_err(io("kernel"))?;
    kernel.read_exact(&mut bytes).map_err(io("kernel"))?;
    Ok(bytes)
}

/// The program header table; all of its entries lie within the `size` bytes of the file.
fn segments<K: Read + Seek>(kernel: &mut K, size: u64) -> Result<Vec<Segment>, LoadError> {
    if size < HEADER as u64 {
        return Err(wrong("that is cut short"));
    }
    let header = read(kernel, 0, HEADER)?;
    let f = Fields(&header);
    // EI_CLASS 2 is 64-bit, EI_DATA 1 is little-endian.
    if f.bytes(4) != Some([2, 1]) || f.u16(18) != Some(EM_X86_64) {
        return Err(wrong("for another architecture than x86_64"));
    }
    if !matches!(f.u16(16), Some(ET_EXEC | ET_DYN)) {
        return Err(wrong("that is no executable (a module or object file?)"));
    }
    let (table, entry, count) =
        (f.u64(32).unwrap_or_default(), f.u16(54).unwrap_or_default(), f.u16(56).unwrap_or_default());
    if usize::from(entry) != PROGRAM_HEADER || !(1..=PROGRAM_HEADERS_MAX).contains(&count) {
        return Err(wrong(format!("with {count} program headers of {entry} bytes")));
    }
    let inside = |offset: u64, len: u64| offset.checked_add(len).is_some_and(|end| end <= size);
    let len = usize::from(count) * PROGRAM_HEADER;
    if !inside(table, len as u64) {
        return Err(wrong("whose program headers are past its end"));
    }
    let table = read(kernel, table, len)?;
    let segments: Vec<_> = table.chunks_exact(PROGRAM_HEADER).filter_map(Segment::parse).collect();
    for s in segments.iter().filter(|s| matches!(s.kind, PT_LOAD | PT_NOTE)) {
        if !inside(s.offset, s.in_file) {
            return Err(wrong("that is cut short: a segment is past its end"));
        }
        if s.kind == PT_LOAD && s.in_file > s.in_memory {
            return Err(wrong("with a segment that is larger in the file than in memory"));
        }
    }
    Ok(segments)
}

/// The physical address of the 32-bit entry, if one of the notes names it.
fn find_entry(notes: &[u8], align: u64) -> Option<u64> {
    let align = if align == 8 { 8 } else { 4 };
    let mut rest = notes;
    loop {
        let f = Fields(rest);
        let (name, value, kind) = (f.u32(0)? as usize, f.u32(4)? as usize, f.u32(8)?);
        let value_at = 12usize.checked_add(name)?.checked_next_multiple_of(align)?;
        if kind == PHYS32_ENTRY && rest.get(12..)?.starts_with(OWNER) && name == OWNER.len() {
            return match value {
                4 => f.u32(value_at).map(u64::from),
                // EIP has 32 bits.
                8 => f.u64(value_at).filter(|&entry| entry <= u32::MAX.into()),
                _ => None,
            };
        }
        let next = value_at.checked_add(value)?.checked_next_multiple_of(align)?;
        rest = rest.get(next..)?;
    }
}

/// hvm_start_info, its modules and its memory map, each with its address.
fn start_info(plan: &Plan, initrd: Option<Region>) -> [(u64, Vec<u8>); 3] {
    let map = super::memory_map(plan);
    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, u32::from(initrd.is_some())] {
        info.extend(word.to_le_bytes());
    }
    let modules_at = if initrd.is_some() { MODULES } else { 0 };
    for address in [modules_at, CMDLINE.0, acpi::RSDP, MEMORY_MAP, map.len() as u64] {
        info.extend(address.to_le_bytes());
    }
    let modules = initrd.map(|Region { start, len }| [start, len, 0, 0]).unwrap_or_default();
    let entry = |(region, kind): &(Region, u32)| [region.start, region.len, u64::from(*kind)];
    let bytes = |words: &mut dyn Iterator<Item = u64>| words.flat_map(u64::to_le_bytes).collect();
    [
        (START_INFO, info),
        (MODULES, bytes(&mut modules.into_iter())),
        (MEMORY_MAP, bytes(&mut map.iter().flat_map(entry))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::tests::try_load;

    const AT: u64 = 0x10_0000;

    fn note(owner: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [owner.len() as u32, value.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [owner, value] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    /// One segment of 16 bytes (32 in memory) at 1 MiB, and two notes of which the second names the entry.
    fn elf() -> Vec<u8> {
        let notes =
            [note(b"GNU\0", 3, &[9; 5]), note(OWNER, PHYS32_ENTRY, &(AT as u32).to_le_bytes())].concat();
        let mut file = vec![0; HEADER];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        file[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        file[54..58].copy_from_slice(&[56, 0, 2, 0]);
        let code = (HEADER + 2 * PROGRAM_HEADER) as u64;
        for (kind, offset, in_file, in_memory) in
            [(PT_LOAD, code, 16, 32), (PT_NOTE, code + 16, notes.len() as u64, notes.len() as u64)]
        {
            for word in [u64::from(kind), offset, 0, AT, in_file, in_memory, 4] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend([0x90; 16]);
        file.extend(notes);
        file
    }

    fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut file = elf();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    }

    #[test]
    fn a_kernel_is_placed_and_told_of_its_machine() {
        let (loaded, page) = try_load(64, &elf(), Some(&[7; 5000])).unwrap();
        assert_eq!((loaded.entry.0, loaded.protocol), (AT, Protocol::Pvh));
        let f = Fields(&page);
        assert_eq!((f.u32(0), f.u32(4), f.u32(12)), (Some(MAGIC), Some(1), Some(1)));
        assert_eq!((f.u64(16), f.u64(24), f.u64(32)), (Some(MODULES), Some(CMDLINE.0), Some(acpi::RSDP)));
        assert_eq!((f.u64(40), f.u32(48)), (Some(MEMORY_MAP), Some(4)));
        let initrd = loaded.initrd.unwrap();
        assert_eq!((f.u64(0x40), f.u64(0x48)), (Some(initrd.start), Some(5000)));
        let last = 0x80 + 3 * 24;
        assert_eq!((f.u64(last), f.u64(last + 8), f.u32(last + 16)), (Some(AT), Some(63 << 20), Some(1)));
        let (loaded, page) = try_load(64, &elf(), None).unwrap();
        assert_eq!((loaded.initrd, Fields(&page).u32(12), Fields(&page).u64(16)), (None, Some(0), Some(0)));
    }

    #[test]
    fn a_hostile_file_is_refused() {
        let (load, note) = (HEADER, HEADER + PROGRAM_HEADER);
        let most = u64::MAX.to_le_bytes();
        let entry = elf().len() - 4;
        for (bytes, why) in [
            (elf()[..HEADER - 1].to_vec(), "cut short"),
            (elf()[..note].to_vec(), "past its end"),
            (elf()[..entry].to_vec(), "cut short"),
            (changed(4, &[1]), "another architecture"),
            (changed(18, &[183]), "another architecture"),
            (changed(16, &[1]), "no executable"),
            (changed(32, &most), "past its end"),
            (changed(54, &[55]), "55 bytes"),
            (changed(56, &[0, 0]), "0 program headers"),
            (changed(56, &[0xff, 0xff]), "65535 program headers"),
            (changed(load + 8, &most), "cut short"),
            (changed(load + 24, &most), "outside of memory"),
            (changed(load + 24, &0xf_0000u64.to_le_bytes()), "outside of memory"),
            (changed(load + 40, &8u64.to_le_bytes()), "larger in the file"),
            (changed(load + 24, &0x20_0000u64.to_le_bytes()), "none of its segments"),
            (changed(note + 32, &most), "cut short"),
            (changed(note, &[0]), "without a PVH entry"),
            (changed(entry - 4, b"Xxn\0"), "without a PVH entry"),
            (changed(entry - 16, &most), "without a PVH entry"),
        ] {
            let refused = try_load(64, &bytes, None).unwrap_err();
            assert!(
                matches!(&refused, LoadError::NotAKernel(what) if what.contains(why)),
                "{why}: {refused}"
            );
        }
        for (at, value) in [(load + 40, 64u64 << 20), (load + 24, 64 << 20)] {
            let refused = try_load(64, &changed(at, &value.to_le_bytes()), None).unwrap_err();
            assert!(matches!(refused, LoadError::TooLarge { what: "a kernel", .. }), "{refused}");
        }
    }
}
