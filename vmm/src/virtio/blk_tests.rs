use std::sync::Mutex;

use hutch_blockdev::{IoBuf, IoBufMut};

use super::*;
use crate::config::{Flow, Rate};
use crate::virtio::testing::{Answer, Driver};

/// A disk in memory that counts flushes and can run full.
#[derive(Default)]
struct FakeDisk {
    bytes: Mutex<Vec<u8>>,
    flushes: AtomicU64,
    full: AtomicU64,
    read_only: bool,
}

fn fails(kind: DiskErrorKind) -> DiskError {
    DiskError { kind, context: "fake".into(), source: None }
}

impl Disk for FakeDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn parallelism(&self) -> usize {
        4
    }
    unsafe fn read_vectored(&self, offset: u64, bufs: &[IoBufMut]) -> hutch_blockdev::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            // SAFETY: the caller promises a mapped buffer; it is guest memory, never ours.
            unsafe { bytes[at..at + buf.iov_len].as_ptr().copy_to(buf.iov_base.cast(), buf.iov_len) };
            at += buf.iov_len;
        }
        Ok(())
    }
    unsafe fn write_vectored(&self, offset: u64, bufs: &[IoBuf]) -> hutch_blockdev::Result<()> {
        if self.read_only {
            return Err(fails(DiskErrorKind::ReadOnly));
        }
        if self.full.load(Relaxed) > 0 {
            self.full.fetch_sub(1, Relaxed);
            return Err(fails(DiskErrorKind::NoSpace));
        }
        let mut bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        for buf in bufs {
            // SAFETY: as above.
            unsafe { bytes[at..at + buf.iov_len].as_mut_ptr().copy_from(buf.iov_base.cast(), buf.iov_len) };
            at += buf.iov_len;
        }
        Ok(())
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> hutch_blockdev::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> hutch_blockdev::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn flush(&self) -> hutch_blockdev::Result<()> {
        self.flushes.fetch_add(1, Relaxed);
        Ok(())
    }
    fn grow(&self, size: u64) -> hutch_blockdev::Result<()> {
        self.bytes.lock().unwrap().resize(size as usize, 0);
        Ok(())
    }
}

const SIZE: u64 = 1 << 20;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn device(change: impl FnOnce(&mut FakeDisk)) -> (Driver, Blk, Arc<FakeDisk>) {
    let mut disk = FakeDisk::default();
    *disk.bytes.get_mut().unwrap() = pattern(SIZE as usize);
    change(&mut disk);
    let disk = Arc::new(disk);
    let mut blk = Blk::new(disk.clone(), "vol0123456789abcdef0", 1, Arc::default(), Default::default());
    let mut driver = Driver::new(1);
    driver.start(&mut blk);
    (driver, blk, disk)
}

fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: usize) -> Answer {
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(sector.to_le_bytes());
    request.extend(data);
    driver.request(0, &request, room + 1).expect("an answer")
}

fn status(answer: &Answer) -> u8 {
    *answer.bytes.last().unwrap()
}

#[test]
fn reads_and_writes_go_to_their_sectors() {
    let (mut driver, _blk, disk) = device(|_| ());
    let read = ask(&mut driver, T_IN, 3, &[], 4096);
    assert_eq!((status(&read), read.len), (S_OK, 4097));
    assert_eq!(read.bytes[..4096], pattern(SIZE as usize)[1536..1536 + 4096]);
    let wrote = ask(&mut driver, T_OUT, 8, &[9; 300 * 512], 0);
    assert_eq!((status(&wrote), wrote.len), (S_OK, 1));
    let bytes = disk.bytes.lock().unwrap();
    assert!(bytes[4096..4096 + 300 * 512].iter().all(|b| *b == 9));
    assert_eq!(bytes[4095], pattern(4096)[4095]);
    assert_eq!(disk.flushes.load(Relaxed), 0);
    driver.told.wait(2);
}

#[test]
fn of_many_answers_the_driver_is_told_together() {
    let (mut driver, mut blk, _) = device(|_| ());
    ask(&mut driver, T_IN, 0, &[], 512);
    driver.told.wait(1);
    blk.pause();
    driver.offer_again(0, 64);
    blk.resume();
    (0..64).for_each(|_| assert!(driver.wait_used(0).is_some()));
    driver.told.wait(2);
    let told = driver.told.used.load(Relaxed) - 1;
    assert!(told <= 32, "told {told} times of 64 answers");
}

#[test]
fn the_serial_is_the_volumes_id() {
    let (mut driver, _blk, _) = device(|_| ());
    let id = ask(&mut driver, T_GET_ID, 0, &[], 20);
    assert_eq!((&id.bytes[..20], status(&id)), (&b"vol0123456789abcdef0"[..], S_OK));
}

fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn ranges_are_zeroed_and_all_checked_first() {
    let (mut driver, _blk, disk) = device(|_| ());
    let two = [range(0, 8, FLAG_UNMAP), range(100, 1, 0)].concat();
    assert_eq!(status(&ask(&mut driver, T_WRITE_ZEROES, 0, &two, 0)), S_OK);
    let before = disk.bytes.lock().unwrap().clone();
    assert!(before[..4096].iter().all(|b| *b == 0) && before[51200..51712].iter().all(|b| *b == 0));
    for (kind, ranges, expected) in [
        (T_DISCARD, [range(200, 8, 0), range(2047, 2, 0)].concat(), S_IOERR),
        (T_DISCARD, range(200, 8, FLAG_UNMAP), S_UNSUPP),
        (T_WRITE_ZEROES, range(200, 8, 2), S_UNSUPP),
        (T_WRITE_ZEROES, range(u64::MAX, 1, 0), S_IOERR),
        (T_DISCARD, vec![], S_IOERR),
        (T_DISCARD, vec![0; 15], S_IOERR),
        (T_DISCARD, range(0, 1, 0).repeat(65), S_IOERR),
    ] {
        assert_eq!(status(&ask(&mut driver, kind, 0, &ranges, 0)), expected);
        assert!(*disk.bytes.lock().unwrap() == before, "a refused request changes nothing");
    }
}

#[test]
fn what_is_out_of_range_or_unknown_is_refused() {
    let (mut driver, _blk, _) = device(|_| ());
    for (kind, sector, len, expected) in [
        (T_IN, SIZE / 512, 512, S_IOERR),
        (T_IN, SIZE / 512 - 1, 1024, S_IOERR),
        (T_IN, u64::MAX, 512, S_IOERR),
        (T_IN, u64::MAX / 512, 512, S_IOERR),
        (T_IN, 0, 100, S_IOERR),
        (77, 0, 512, S_UNSUPP),
        (T_IN, 0, 512, S_OK),
    ] {
        assert_eq!(status(&ask(&mut driver, kind, sector, &[], len)), expected, "{kind} {sector} {len}");
    }
    assert!(driver.broken().is_empty());
}

#[test]
fn a_read_only_disk_offers_and_takes_no_writes() {
    let (mut driver, blk, _) = device(|d| d.read_only = true);
    assert_eq!(blk.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    assert_eq!(status(&ask(&mut driver, T_OUT, 0, &[1; 512], 0)), S_IOERR);
}

#[test]
fn a_full_host_makes_the_guest_wait_and_go_on() {
    let (mut driver, blk, disk) = device(|d| d.full = AtomicU64::new(2));
    assert_eq!(status(&ask(&mut driver, T_OUT, 0, &[1; 512], 0)), S_OK);
    assert_eq!(disk.full.load(Relaxed), 0);
    assert!(!blk.core.counts.clone().no_space.load(Relaxed));
}

#[test]
fn a_guest_waiting_for_room_can_be_stopped() {
    let (mut driver, mut blk, _) = device(|d| d.full = AtomicU64::new(u64::MAX));
    let counts = blk.core.counts.clone();
    let stop = std::thread::spawn(move || {
        while !counts.no_space.load(Relaxed) {
            std::thread::yield_now();
        }
        blk.stop();
    });
    assert_eq!(status(&ask(&mut driver, T_OUT, 0, &[1; 512], 0)), S_IOERR);
    stop.join().unwrap();
}

#[test]
fn without_flush_every_write_is_durable() {
    let disk = Arc::new(FakeDisk { bytes: Mutex::new(vec![0; 4096]), ..FakeDisk::default() });
    let mut blk = Blk::new(disk.clone(), "v", 1, Arc::default(), Default::default());
    let mut driver = Driver::new(1);
    let features = blk.features() & !F_FLUSH;
    driver.start_with(&mut blk, features);
    assert_eq!(status(&ask(&mut driver, T_OUT, 0, &[1; 512], 0)), S_OK);
    assert_eq!(disk.flushes.load(Relaxed), 1);
}

#[test]
fn broken_chains_ask_for_a_reset() {
    for break_it in [Driver::offer_outside, Driver::offer_loop] {
        let (mut driver, mut blk, _) = device(|_| ());
        break_it(&mut driver, 0);
        driver.wait_broken();
        blk.stop();
    }
    let (mut driver, _blk, _) = device(|_| ());
    assert!(driver.request(0, &[0; 15], 1).is_none(), "a header cut short");
    let (mut driver, _blk, _) = device(|_| ());
    assert!(driver.request(0, &[0; 16], 0).is_none(), "no room for the status");
}

#[test]
fn queues_and_capacity_are_in_the_configuration() {
    let disk = Arc::new(FakeDisk { bytes: Mutex::new(vec![0; 1 << 20]), ..FakeDisk::default() });
    let blk = Blk::new(disk, "v", 9, Arc::default(), Default::default());
    assert_eq!(blk.queue_sizes().len(), 4, "as many as the disk can use");
    assert_ne!(blk.features() & F_MQ, 0);
    let mut config = [0xff; 80];
    blk.read_config(0, &mut config);
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!((config[34], config[79]), (4, 0));
    blk.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 80]);
}

/// A disk that takes no time.
struct NoDisk;

impl Disk for NoDisk {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn read_only(&self) -> bool {
        false
    }
    unsafe fn read_vectored(&self, _: u64, bufs: &[IoBufMut]) -> hutch_blockdev::Result<()> {
        std::hint::black_box(bufs);
        Ok(())
    }
    unsafe fn write_vectored(&self, _: u64, bufs: &[IoBuf]) -> hutch_blockdev::Result<()> {
        std::hint::black_box(bufs);
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> hutch_blockdev::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> hutch_blockdev::Result<()> {
        Ok(())
    }
    fn flush(&self) -> hutch_blockdev::Result<()> {
        Ok(())
    }
    fn grow(&self, _: u64) -> hutch_blockdev::Result<()> {
        Ok(())
    }
}

/// What a request of 1 MiB in 256 pages costs beside its bytes: run it in a release build under `valgrind
/// --tool=callgrind`, or look at the time it prints.
#[test]
#[ignore = "it measures"]
fn a_request_of_many_pages() {
    const TIMES: u32 = 2000;
    let mut blk = Blk::new(Arc::new(NoDisk), "vol1", 1, Arc::default(), Default::default());
    let mut driver = Driver::new(1);
    driver.start(&mut blk);
    let started = std::time::Instant::now();
    for _ in 0..TIMES {
        driver.offer_pages(0, &[0; 16], 256, true);
        assert_eq!(driver.wait_used(0), Some((1 << 20) + 1));
    }
    blk.stop();
    println!("{:?} a request", started.elapsed() / TIMES);
}

#[test]
fn a_disk_that_grew_shows_it_when_it_is_asked_to_look() {
    let (mut driver, mut blk, disk) = device(|_| ());
    disk.grow(2 * SIZE).unwrap();
    let capacity = |blk: &Blk| {
        let mut bytes = [0; 8];
        blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(&blk), SIZE / 512, "not while the driver may be reading it");
    assert!(blk.refresh() && !blk.refresh());
    assert_eq!(capacity(&blk), 2 * SIZE / 512);
    assert_eq!(status(&ask(&mut driver, T_OUT, SIZE / 512, &[7; 512], 0)), S_OK);
}

fn slow(ops: &[Flow], bytes: &[Flow]) -> [Arc<Limiter>; 2] {
    let rate = Rate { ops: ops.to_vec(), bytes: bytes.to_vec() };
    [Arc::default(), Arc::new(Limiter::new(&rate, Instant::now()))]
}

fn device_held_to(limits: [Arc<Limiter>; 2]) -> (Driver, Blk) {
    let disk = Arc::new(FakeDisk { bytes: Mutex::new(pattern(SIZE as usize)), ..FakeDisk::default() });
    let mut blk = Blk::new(disk, "v", 1, Arc::default(), limits);
    let mut driver = Driver::new(1);
    driver.start(&mut blk);
    (driver, blk)
}

#[test]
fn a_disk_takes_the_time_that_its_rate_says() {
    let began = Instant::now();
    let (mut driver, _blk) = device_held_to(slow(&[Flow { per_second: 100, burst: 1 }], &[]));
    // 300 KiB are two operations; who asks for the serial, or flushes, pays nothing.
    for _ in 0..5 {
        assert_eq!(status(&ask(&mut driver, T_IN, 0, &[], 300 << 10)), S_OK);
        ask(&mut driver, T_GET_ID, 0, &[], 20);
        ask(&mut driver, T_FLUSH, 0, &[], 0);
    }
    assert_eq!(status(&ask(&mut driver, T_DISCARD, 0, &range(0, 8, 0), 0)), S_OK);
    // The last waits for all but one of ten operations to be paid, and for the burst's one not at all.
    assert!(began.elapsed() >= Duration::from_millis(90), "{:?}", began.elapsed());

    let began = Instant::now();
    let (mut driver, _blk) = device_held_to(slow(&[], &[Flow { per_second: 10 << 20, burst: 1 }]));
    for _ in 0..2 {
        assert_eq!(status(&ask(&mut driver, T_OUT, 0, &[1; 512 << 10], 0)), S_OK, "larger than the bucket");
    }
    assert!(began.elapsed() >= Duration::from_millis(49), "{:?}", began.elapsed());
}

#[test]
fn a_throttled_disk_pauses_stops_and_changes_at_once() {
    let hour = [Flow { per_second: 1, burst: 1 }];
    let limits = slow(&hour, &[]);
    let (mut driver, mut blk) = device_held_to(limits.clone());
    // An hour of debt.
    limits[1].charge(3600, 0);
    driver.offer_writable(0, 1);
    let began = Instant::now();
    blk.pause();
    blk.resume();
    blk.stop();
    assert!(began.elapsed() < Duration::from_secs(60));

    let (mut driver, mut blk) = device_held_to(limits.clone());
    blk.pause();
    let later = std::thread::spawn(move || status(&ask(&mut driver, T_IN, 0, &[], 512)));
    limits[1].set(&Rate::default(), Instant::now());
    blk.resume();
    assert_eq!(later.join().unwrap(), S_OK);
}
