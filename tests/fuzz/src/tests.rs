use super::*;

/// xorshift64: the same inputs everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let len = self.next() % most + 1;
        (0..len).map(|_| self.next() as u8).collect()
    }

    /// Some bytes of `of` become others.
    fn damage(&mut self, of: &[u8], within: u64) -> Vec<u8> {
        let mut bytes = of.to_vec();
        for _ in 0..self.next() % 8 + 1 {
            let at = self.next() % within.min(bytes.len() as u64);
            let byte = [0, 1, 0x80, 0xff, self.next() as u8][self.next() as usize % 5];
            bytes[at as usize] = byte;
        }
        bytes
    }
}

#[test]
fn volumes_hold_what_was_written() {
    let mut random = Random(0x9e37_79b9);
    (0..20).for_each(|_| volume(&random.bytes(700)));
}

#[test]
fn damaged_images_are_read_or_refused() {
    let store = Memory::default();
    hutch_blockdev::qcow2::create(&store, 1 << 20).unwrap();
    let disk = Qcow2Disk::on(Arc::new(store.clone()), None, false).unwrap();
    disk.write_at(70 << 10, &[3; 4096]).unwrap();
    disk.write_zeroes(512 << 10, 128 << 10, true).unwrap();
    drop(disk);
    let whole = store.to_vec();
    image(&whole);
    let mut random = Random(0x51ed_2701);
    for round in 0..600 {
        // Where tables are, mostly.
        image(&random.damage(&whole, [112, 65_536 * 6][round % 2]));
        image(&random.bytes(300));
    }
}

#[test]
fn damaged_disks_are_booted_from_or_refused() {
    let mut random = Random(0x2545_f491);
    let mut disk = vec![0; 128 << 10];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
    for _ in 0..2000 {
        boot(&random.damage(&disk, 4096));
    }
}

#[test]
fn disks_of_others_are_read_or_refused() {
    let mut random = Random(0x6a09_e667);
    (0..4).for_each(|format| foreign(&[format]));
    (0..3000).for_each(|_| foreign(&random.bytes(40)));
}

#[test]
fn a_driver_without_rules_breaks_nothing_but_its_queue() {
    let mut random = Random(0xbb67_ae85);
    (0..3000).for_each(|_| queue(&random.bytes(200)));
}

#[test]
fn what_is_sent_is_read_or_refused() {
    let mut random = Random(0x3c6e_f372);
    let texts: [&[u8]; 3] = [
        b"\0Action=RunInstances&ImageId=ami-1&Filter.1.Name=a%20b&Filter.1.Value.1=x+y&TagSpecification.1.Tag.1.Key=k",
        b"\x01X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA/20260101/r/ec2/aws4_request&X-Amz-SignedHeaders=host&\
          X-Amz-Signature=00&X-Amz-Date=20260101T000000Z&X-Amz-Expires=60\nhost:x",
        b"\x03\x35\x01\x03\x32\x04\xac\x1f\0\x05\xff",
    ];
    for text in texts {
        wire(text);
        (0..1000).for_each(|_| wire(&random.damage(text, 400)));
    }
    (0..1000).for_each(|_| wire(&random.bytes(300)));
}
