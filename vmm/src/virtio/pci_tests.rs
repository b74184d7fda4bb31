use super::*;
use crate::pci::msix::tests::FakeVm;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Driver, SIZE, place};
use vm_memory::{Bytes, GuestAddress};

const BAR: u32 = 0xc000_4000;

fn transport(driver: &Driver) -> (VirtioPci, Arc<FakeVm>) {
    let vm = Arc::new(FakeVm::default());
    let device = Box::new(Rng::default());
    let pci = VirtioPci::new("i-1/rng".into(), device, BAR, None, driver.memory.clone(), vm.clone()).unwrap();
    (pci, vm)
}

fn read<const N: usize>(pci: &mut VirtioPci, at: u64) -> [u8; N] {
    let mut data = [0; N];
    pci.bar_read(at, &mut data);
    data
}

fn status(pci: &mut VirtioPci) -> u8 {
    read::<1>(pci, 20)[0]
}

/// What a driver does up to DRIVER_OK (3.1.1); `features` in the place of VERSION_1 alone.
fn negotiate(pci: &mut VirtioPci, features: u64) {
    pci.config_write(4, &6u16.to_le_bytes());
    pci.bar_write(20, &[0]);
    pci.bar_write(20, &[1]);
    pci.bar_write(20, &[3]);
    for half in 0..2u32 {
        pci.bar_write(8, &half.to_le_bytes());
        pci.bar_write(12, &((features >> (32 * half)) as u32).to_le_bytes());
    }
    pci.bar_write(20, &[0xb]);
}

fn enable_queue(pci: &mut VirtioPci) {
    let [descriptors, avail, used, _] = place(0);
    pci.bar_write(22, &0u16.to_le_bytes());
    pci.bar_write(24, &64u16.to_le_bytes());
    pci.bar_write(26, &1u16.to_le_bytes());
    pci.bar_write(32, &(descriptors as u32).to_le_bytes());
    pci.bar_write(36, &0u32.to_le_bytes());
    pci.bar_write(40, &avail.to_le_bytes());
    pci.bar_write(48, &used.to_le_bytes());
    pci.bar_write(28, &1u16.to_le_bytes());
}

#[test]
fn a_driver_negotiates_and_is_answered_by_an_interrupt() {
    let driver = Driver::new(1);
    let (mut pci, vm) = transport(&driver);
    negotiate(&mut pci, VERSION_1 | EVENT_IDX);
    assert_eq!(status(&mut pci), 0xb);
    enable_queue(&mut pci);
    pci.bar_write(TABLE + 16, &0xfee0_0000_u64.to_le_bytes());
    pci.bar_write(TABLE + 24, &0x41_u64.to_le_bytes());
    let control = pci.msix_at.unwrap() + 2;
    pci.config_write(control, &0x8000u16.to_le_bytes());
    pci.bar_write(20, &[0xf]);
    assert_eq!(status(&mut pci), 0xf);
    assert_eq!(*vm.doorbells.lock().unwrap(), [u64::from(BAR) + DOORBELLS]);

    // One writable buffer of 64 bytes, rung by an exit.
    let [descriptors, avail, used, data] = place(0);
    let put = |value: u64, at| driver.memory.write_obj(value, GuestAddress(at)).unwrap();
    put(data, descriptors);
    put(64 | 2 << 32, descriptors + 8);
    put(1 << 16, avail);
    pci.bar_write(DOORBELLS, &[0, 0]);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while vm.messages.lock().unwrap().is_empty() {
        assert!(std::time::Instant::now() < until, "no interrupt");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(*vm.messages.lock().unwrap(), [(0xfee0_0000, 0x41)]);
    assert_eq!(driver.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap(), 1);

    // The guest moves the BAR: the doorbell goes along; a reset takes it away.
    pci.config_write(0x10, &0xc100_0000_u32.to_le_bytes());
    assert_eq!(*vm.doorbells.lock().unwrap(), [0xc100_1000]);
    pci.bar_write(20, &[0]);
    assert!(vm.doorbells.lock().unwrap().is_empty());
    assert_eq!(status(&mut pci), 0);
    assert_eq!(read::<2>(&mut pci, 28), [0, 0], "the queue is off again");
}

#[test]
fn a_device_with_a_pin_asserts_it_until_its_status_is_read() {
    let (driver, vm) = (Driver::new(1), Arc::new(FakeVm::default()));
    let lines = Arc::new(crate::pci::intx::Lines::new(vm.clone()));
    let (device, pin) = (Box::new(Restless), Some(Pin::new(lines, 64 + 3)));
    let mut pci =
        VirtioPci::new("i-1/x".into(), device, BAR, pin, driver.memory.clone(), vm.clone()).unwrap();
    let told = || std::mem::take(&mut *vm.lines.lock().unwrap());
    let config = |pci: &mut VirtioPci, at| {
        let mut byte = [0];
        pci.config_read(at, &mut byte);
        byte[0]
    };
    assert_eq!(config(&mut pci, 0x3d), 1, "pin A");
    let first = usize::from(config(&mut pci, 0x34));
    assert_eq!(config(&mut pci, first), VENDOR_CAPABILITY, "no MSI-X comes before them");
    negotiate(&mut pci, VERSION_1);
    enable_queue(&mut pci);
    assert_eq!(read::<2>(&mut pci, 26), NO_VECTOR.to_le_bytes(), "there are no vectors");
    pci.bar_write(20, &[0xf]);
    pci.refresh();
    pci.interrupts.used(0);
    assert_eq!((told(), config(&mut pci, 6) & 8), (vec![(19, true)], 8));
    assert_eq!((read::<1>(&mut pci, ISR), told()), ([3], vec![(19, false)]));
    assert_eq!((read::<1>(&mut pci, ISR), config(&mut pci, 6) & 8), ([0], 0));

    // The guest wants no lines (bit 10), and then again.
    pci.config_write(4, &(6u16 | 1 << 10).to_le_bytes());
    pci.interrupts.used(0);
    assert!(told().is_empty());
    pci.config_write(4, &6u16.to_le_bytes());
    assert_eq!(told(), [(19, true)]);
    pci.bar_write(20, &[0]);
    assert_eq!(told(), [(19, false)], "a reset");
    pci.interrupts.used(0);
    drop(pci);
    assert_eq!(told(), [(19, true), (19, false)], "who is gone asserts nothing");
    assert!(vm.messages.lock().unwrap().is_empty());
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let driver = Driver::new(1);
    let (mut pci, _) = transport(&driver);
    negotiate(&mut pci, VERSION_1 | 1);
    assert_eq!(status(&mut pci), 3);
    negotiate(&mut pci, EVENT_IDX);
    assert_eq!(status(&mut pci), 3, "a driver older than virtio 1");
    // It goes on regardless: the device does not start.
    pci.bar_write(20, &[7]);
    assert_eq!(status(&mut pci) & NEEDS_RESET, NEEDS_RESET);
    assert!(!pci.running);
    negotiate(&mut pci, VERSION_1);
    assert_eq!(status(&mut pci), 0xb, "a reset heals");
}

#[test]
fn registers_freeze_and_bad_ones_are_refused() {
    let driver = Driver::new(1);
    let (mut pci, _) = transport(&driver);
    negotiate(&mut pci, VERSION_1);
    pci.bar_write(24, &65u16.to_le_bytes());
    pci.bar_write(24, &(SIZE * 2).to_le_bytes());
    assert_eq!(read::<2>(&mut pci, 24), 64u16.to_le_bytes());
    pci.bar_write(26, &9u16.to_le_bytes());
    assert_eq!(read::<2>(&mut pci, 26), NO_VECTOR.to_le_bytes(), "no such vector");
    enable_queue(&mut pci);
    pci.bar_write(32, &0xdead_0000_u32.to_le_bytes());
    assert_eq!(read::<8>(&mut pci, 32), place(0)[0].to_le_bytes());
    pci.bar_write(8, &0u32.to_le_bytes());
    pci.bar_write(12, &1u32.to_le_bytes());
    assert_eq!(read::<4>(&mut pci, 12), [0; 4], "features freeze at FEATURES_OK");
    pci.bar_write(22, &7u16.to_le_bytes());
    assert_eq!(read::<4>(&mut pci, 24), [0; 4], "a queue that is not there");
}

#[test]
fn rings_outside_memory_ask_for_a_reset() {
    let driver = Driver::new(1);
    let (mut pci, vm) = transport(&driver);
    negotiate(&mut pci, VERSION_1);
    pci.bar_write(40, &(1u64 << 40).to_le_bytes());
    pci.bar_write(28, &1u16.to_le_bytes());
    pci.bar_write(20, &[0xf]);
    assert_eq!(status(&mut pci) & NEEDS_RESET, NEEDS_RESET);
    assert!(vm.doorbells.lock().unwrap().is_empty());
}

#[test]
fn the_window_reaches_the_bar() {
    let driver = Driver::new(1);
    let (mut pci, _) = transport(&driver);
    let at = pci.window_at;
    pci.config_write(at + 8, &18u32.to_le_bytes());
    pci.config_write(at + 12, &2u32.to_le_bytes());
    let mut data = [0; 4];
    pci.config_read(at + 16, &mut data);
    assert_eq!(data, [1, 0, 0, 0], "one queue");
    pci.config_write(at + 8, &22u32.to_le_bytes());
    pci.config_write(at + 16, &5u32.to_le_bytes());
    assert_eq!(pci.queue_select, 5);
    pci.config_write(at + 8, &u32::MAX.to_le_bytes());
    pci.config_read(at + 16, &mut data);
}

/// Whatever a guest writes, wherever: no panic, and the next reset heals.
#[test]
fn random_accesses_never_panic() {
    let driver = Driver::new(1);
    let (mut pci, _) = transport(&driver);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let (at, value) = (next(), next().to_le_bytes());
        let len = [1, 2, 4, 8][(next() % 4) as usize];
        let mut data = [0; 8];
        match at % 4 {
            0 => pci.config_write((at >> 8) as usize % 249, &value[..len]),
            1 => pci.config_read((at >> 8) as usize % 249, &mut data[..len]),
            2 => pci.bar_write((at >> 8) % 64, &value[..len]),
            _ => pci.bar_read((at >> 8) % u64::from(BAR_SIZE - 8), &mut data[..len]),
        }
    }
    negotiate(&mut pci, VERSION_1);
    assert_eq!(status(&mut pci), 0xb);
}

/// A device whose configuration changes whenever it is asked to look.
struct Restless;

impl VirtioDevice for Restless {
    fn device_type(&self) -> u32 {
        2
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn refresh(&mut self) -> bool {
        true
    }
    fn start(&mut self, _: Start) -> io::Result<()> {
        Ok(())
    }
    fn stop(&mut self) {}
}

#[test]
fn a_change_of_the_configuration_has_a_new_generation_and_an_interrupt() {
    let driver = Driver::new(1);
    let vm = Arc::new(FakeVm::default());
    let made =
        VirtioPci::new("i-1/x".into(), Box::new(Restless), BAR, None, driver.memory.clone(), vm.clone());
    let mut pci = made.unwrap();
    let generation = |pci: &mut VirtioPci| read::<1>(pci, 21)[0];
    let first = generation(&mut pci);
    pci.refresh();
    assert_ne!(generation(&mut pci), first);
    assert!(vm.messages.lock().unwrap().is_empty(), "no driver is there");
    negotiate(&mut pci, VERSION_1);
    enable_queue(&mut pci);
    pci.bar_write(16, &0u16.to_le_bytes());
    pci.bar_write(TABLE, &0xfee0_0000_u64.to_le_bytes());
    pci.bar_write(TABLE + 8, &0x42_u64.to_le_bytes());
    let control = pci.msix_at.unwrap() + 2;
    pci.config_write(control, &0x8000u16.to_le_bytes());
    pci.bar_write(20, &[0xf]);
    pci.refresh();
    assert_eq!(*vm.messages.lock().unwrap(), [(0xfee0_0000, 0x42)]);
    assert_eq!(read::<1>(&mut pci, ISR), [2]);
    let (mut rng, _) = transport(&driver);
    let before = generation(&mut rng);
    rng.refresh();
    assert_eq!(generation(&mut rng), before, "nothing of it changes");
}
