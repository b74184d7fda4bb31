//! A driver that keeps no rules: rings, descriptors and requests of a disk, as it likes them. Its queue is served or given up;
//! the disk stays one, and serves the next driver.

use std::sync::Arc;

use hutch_blockdev::RawDisk;
use hutch_vmm::virtio::blk::Blk;
use hutch_vmm::virtio::{ActiveQueue, Memory, Notify};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::store::Memory as File;

const DISK: usize = 256 << 10;
/// Guest memory: two regions side by side, then nothing.
const REGION: usize = 128 << 10;
/// Where the rings are, and a place for tables and requests.
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const PLACES: [u64; 8] = [0x4000, 0x5000, 0x8000, 0x1_fe00, TABLE, USED, AVAIL, 2 * REGION as u64 - 0x200];
const LENGTHS: [u32; 12] = [0, 1, 15, 16, 48, 512, 513, 1024, 4096, 65536, 1 << 20, u32::MAX];
const KINDS: [u32; 8] = [0, 1, 4, 8, 11, 13, 2, u32::MAX];

struct Nobody;

impl Notify for Nobody {
    fn used(&self, _: u16) {}
    fn config_changed(&self) {}
    fn needs_reset(&self, _: &str) {}
}

fn queue(size: u16, event_idx: bool) -> ActiveQueue {
    let mut queue = Queue::new(512).expect("a queue");
    queue.set_size(size);
    queue.try_set_desc_table_address(GuestAddress(TABLE)).expect("aligned");
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).expect("aligned");
    queue.try_set_used_ring_address(GuestAddress(USED)).expect("aligned");
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd");
    ActiveQueue { index: 0, queue, kick }
}

/// What the bytes say, written to guest memory.
fn fill(memory: &Memory, bytes: &[u8], size: u16) {
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    let (mut rest, mut avail) = (bytes, 0_u16);
    while let Some((&[what, a, b, c, d, e], more)) = rest.split_first_chunk() {
        rest = more;
        // A descriptor, in the queue's table or in one that a descriptor may name.
        let entry = u64::from(a) % 32 * 16;
        match what % 8 {
            0..=3 => {
                let place = PLACES[usize::from(b) % PLACES.len()] + u64::from(b / 8) * 16;
                let place = if c & 0x80 != 0 { u64::from(c) << (d % 57) } else { place };
                let len = LENGTHS[usize::from(d) % LENGTHS.len()];
                let at = if what % 8 == 3 { 0x4000 } else { TABLE } + entry;
                put(at, &place.to_le_bytes());
                put(at + 8, &len.to_le_bytes());
                put(at + 12, &u16::from(c & 7).to_le_bytes());
                put(at + 14, &u16::from(e % 40).to_le_bytes());
            }
            // A request's header.
            4 | 5 => {
                let at = PLACES[usize::from(b) % 4] + u64::from(b / 8) * 16;
                let sector = if e & 0x80 != 0 { u64::MAX >> (e % 64) } else { u64::from(e) * 4 };
                put(at, &KINDS[usize::from(c) % KINDS.len()].to_le_bytes());
                put(at + 8, &sector.to_le_bytes());
            }
            // A range to discard, or the event index.
            6 => put(0x8000 + entry, &[d, 0, 0, 0, 0, 0, 0, 0, e, 0, 0, 0, c & 3, 0, 0, 0]),
            _ => {
                put(AVAIL + 4 + u64::from(avail % size) * 2, &u16::from(a % 40).to_le_bytes());
                avail = avail.wrapping_add(1);
                put(AVAIL + 2, &avail.to_le_bytes());
                if b == 0xff {
                    put(AVAIL + 2, &[c, d]);
                }
            }
        }
    }
}

/// Whether a driver that keeps to the rules gets what it wrote.
fn works(blk: &Blk) {
    let memory = Memory::from_ranges(&[(GuestAddress(0), 2 * REGION)]).expect("memory");
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    put(0x4000, &1_u32.to_le_bytes());
    put(0x4008, &9_u64.to_le_bytes());
    put(0x4010, &0_u32.to_le_bytes());
    put(0x4018, &9_u64.to_le_bytes());
    put(0x5000, &[0x5a; 512]);
    let descriptor = |i: u64, (at, len, flags, next): (u64, u32, u16, u16)| {
        put(TABLE + i * 16, &at.to_le_bytes());
        put(TABLE + i * 16 + 8, &len.to_le_bytes());
        put(TABLE + i * 16 + 12, &flags.to_le_bytes());
        put(TABLE + i * 16 + 14, &next.to_le_bytes());
    };
    let parts = [(0x4000, 16, 1, 1), (0x5000, 512, 1, 2), (0x7000, 1, 2, 0)];
    let back = [(0x4010, 16, 1, 4), (0x6000, 512, 3, 5), (0x7001, 1, 2, 0)];
    parts.iter().chain(&back).enumerate().for_each(|(i, part)| descriptor(i as u64, *part));
    put(0x7000, &[7, 7]);
    put(AVAIL + 4, &[0, 0, 3, 0]);
    put(AVAIL + 2, &[2, 0]);
    let answers = blk.visit(&mut queue(8, false), &memory, &Nobody);
    assert_eq!(answers.expect("nothing is wrong"), 2);
    let mut found = [0; 512];
    memory.read_slice(&mut found, GuestAddress(0x6000)).expect("in memory");
    let mut status = [0; 2];
    memory.read_slice(&mut status, GuestAddress(0x7000)).expect("in memory");
    assert!(status == [0, 0] && found == [0x5a; 512], "the disk does not serve any more: {status:?}");
}

pub fn run(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let file = File::of(&[3; DISK]);
    let disk = Arc::new(RawDisk::on(file, first & 1 != 0).expect("a disk"));
    let read_only = first & 1 != 0;
    let blk = Blk::new(disk, "vol", 1, Arc::default(), Default::default());
    let size = 1 << (first / 2 % 6);
    let memory = [(GuestAddress(0), REGION), (GuestAddress(REGION as u64), REGION)];
    let memory = Memory::from_ranges(&memory).expect("memory");
    fill(&memory, rest, size);
    let mut active = queue(size, first & 0x80 != 0);
    // Rung twice: what is left of the first visit may be wrong for the second.
    for _ in 0..2 {
        if blk.visit(&mut active, &memory, &Nobody).is_err() {
            break;
        }
    }
    if !read_only {
        works(&blk);
    }
}
