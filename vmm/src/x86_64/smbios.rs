//! SMBIOS 3.0 as EC2's Nitro machines show it (DSP0134): cloud-init and others know EC2 by the vendor and by a
//! UUID that begins with `ec2`.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The entry point; kernels without UEFI look at 16-byte steps from here (DSP0134, 5.2.2).
pub const ENTRY: u64 = 0xf_0000;
const TABLES: u64 = ENTRY + 32;
const VENDOR: &str = "Amazon EC2";

/// Writes the entry point and the structures of machine `id` with `uuid`.
pub fn write(memory: &GuestMemoryMmap<()>, id: &str, uuid: [u8; 16]) -> Result<(), GuestMemoryError> {
    let tables = structures(id, uuid);
    memory.write_slice(&tables, GuestAddress(TABLES))?;
    let mut entry = vec![];
    entry.extend_from_slice(b"_SM3_");
    entry.extend_from_slice(&[0, 24, 3, 0, 0, 1, 0]); // checksum, length, 3.0.0, revision, reserved
    entry.extend_from_slice(&(tables.len() as u32).to_le_bytes());
    entry.extend_from_slice(&TABLES.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg();
    memory.write_slice(&entry, GuestAddress(ENTRY))
}

fn structures(id: &str, uuid: [u8; 16]) -> Vec<u8> {
    let mut out = vec![];
    let mut put = |kind: u8, handle: u16, body: &[u8], strings: &[&str]| {
        out.extend_from_slice(&[kind, 4 + body.len() as u8]);
        out.extend_from_slice(&handle.to_le_bytes());
        out.extend_from_slice(body);
        for s in strings {
            out.extend(s.bytes().filter(|b| *b != 0));
            out.push(0);
        }
        out.push(0);
        if strings.is_empty() {
            out.push(0);
        }
    };
    // Type 0: vendor, version, segment, date, ROM size, characteristics (bit 3: not supported), extension bytes (virtual machine), releases.
    let mut bios = vec![1, 2, 0, 0xe8, 3, 0];
    bios.extend_from_slice(&(1u64 << 3).to_le_bytes());
    bios.extend_from_slice(&[0, 1 << 4, 1, 0, 0xff, 0xff]);
    put(0, 0, &bios, &[VENDOR, "1.0", "10/16/2017"]);
    // Type 1: manufacturer, product, version, serial, UUID (first three fields little-endian), wake-up: power switch, SKU, family.
    let mut system = vec![1, 2, 0, 3];
    system.extend([3, 2, 1, 0, 5, 4, 7, 6].map(|i: usize| uuid[i]));
    system.extend_from_slice(&uuid[8..]);
    system.extend_from_slice(&[6, 0, 0]);
    // The serial is the UUID again: cloud-init believes in EC2 only then (DataSourceEc2.identify_aws).
    put(1, 1, &system, &[VENDOR, "hutch", &uuid::Uuid::from_bytes(uuid).to_string()]);
    // Type 2: manufacturer, product, version, serial, asset tag (EC2 puts the instance's id there), features, location, chassis, type.
    put(2, 2, &[1, 0, 0, 0, 2, 1, 0, 3, 0, 0x0a, 0], &[VENDOR, id]);
    // Type 3: manufacturer, type (other), version, serial, asset tag, four states, OEM, height, cords, elements.
    put(3, 3, &[1, 1, 0, 0, 2, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[VENDOR, VENDOR]);
    put(127, 127, &[], &[]);
    out
}

/// Reads `ec2e1916-9099-7caf-fd21-012345abcdef`, and no other way of writing it.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let uuid = uuid::Uuid::try_parse(text).ok()?;
    (uuid.to_string() == text).then(|| uuid.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_strictly() {
        let uuid = parse_uuid("ec2e1916-9099-7caf-fd21-012345abcdef").unwrap();
        assert_eq!((uuid[0], uuid[15]), (0xec, 0xef));
        for bad in
            ["", "ec2e1916", "ec2e19169099-7caf-fd21-0123-45abcdef", "zc2e1916-9099-7caf-fd21-012345abcdef"]
        {
            assert_eq!(parse_uuid(bad), None, "{bad}");
        }
    }

    #[test]
    fn structures_end_as_the_standard_says() {
        let uuid = parse_uuid("ec2e1916-9099-7caf-fd21-012345abcdef").unwrap();
        let bytes = structures("i-0123456789abcdef0", uuid);
        assert!(bytes.ends_with(&[127, 4, 127, 0, 0, 0]));
        assert!(
            bytes.windows(4).any(|w| w == [0x16, 0x19, 0x2e, 0xec]),
            "the UUID's first field is little-endian"
        );
        let has = |text: &[u8]| bytes.windows(text.len()).any(|w| w == text);
        assert!(has(b"\0ec2e1916-9099-7caf-fd21-012345abcdef\0"), "the serial is the UUID");
        assert!(has(b"\0i-0123456789abcdef0\0"), "the board's asset tag is the instance");
    }
}
