use std::io::{Read, Write};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::Driver;

// TUNSETIFF is declared with an int, and takes an ifreq.
nix::ioctl_write_ptr_bad!(
    tun_set_iff,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// A tap in a network namespace that only this thread is in, and a raw socket at its other end.
fn tap() -> Option<(File, File)> {
    taps(1).map(|(mut taps, wire)| (taps.remove(0), wire))
}

/// A tap of so many queues, likewise.
fn taps(count: usize) -> Option<(Vec<File>, File)> {
    let skip = |what: &str, e: &dyn std::fmt::Display| {
        eprintln!("SKIPPED: {what}: {e}");
    };
    if let Err(e) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        skip("a network namespace", &e);
        return None;
    }
    // Else the kernel's own solicitations come between the frames of the tests. Where there is no IPv6, there are none.
    let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    // SAFETY: all zeros is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..3].copy_from_slice(&[b't' as _, b'0' as _, 0]);
    let many = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many) as i16;
    let mut taps = Vec::new();
    for _ in 0..count {
        let tap = match File::options().read(true).write(true).open("/dev/net/tun") {
            Ok(tap) => tap,
            Err(e) => {
                skip("/dev/net/tun", &e);
                return None;
            }
        };
        // SAFETY: the request is a valid ifreq.
        unsafe { tun_set_iff(tap.as_raw_fd(), &request) }.unwrap();
        taps.push(tap);
    }
    let raw = libc::ETH_P_ALL.to_be() >> 16;
    // SAFETY: plain socket calls on values of ours.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, raw);
        assert!(socket >= 0, "{}", io::Error::last_os_error());
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_NOARP) as i16;
        assert_eq!(libc::ioctl(socket, libc::SIOCSIFFLAGS as _, &request), 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = raw as u16;
        address.sll_ifindex = libc::if_nametoindex(c"t0".as_ptr()) as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        assert_eq!(libc::bind(socket, (&raw const address).cast(), len), 0);
        use std::os::fd::FromRawFd;
        Some((taps, File::from_raw_fd(socket)))
    }
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn frame(payload: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &MAC, &[0x88, 0xb5]].concat();
    frame.extend((0..payload).map(|i| i as u8));
    frame
}

#[test]
fn frames_pass_both_ways_whole() {
    let Some((tap, mut wire)) = tap() else { return };
    let mut net = Net::new(MAC, 1500, vec![tap], Arc::default(), Default::default()).unwrap();
    let mut driver = Driver::new(2);
    // Small frames only: one buffer of 2 KiB is enough room.
    let features = net.features() & !(F_GUEST_TSO4 | F_GUEST_TSO6);
    driver.start_with(&mut net, features);

    let sent = frame(900);
    driver.request(1, &[&[0; HEADER][..], &sent].concat(), 0).unwrap();
    let mut seen = vec![0; 4096];
    loop {
        let len = wire.read(&mut seen).unwrap();
        if seen[12..14] == [0x88, 0xb5] {
            assert_eq!(seen[..len], sent);
            break;
        }
    }

    let received = frame(1200);
    let at = driver.offer_writable(0, 2048);
    wire.write_all(&received).unwrap();
    let len = driver.wait_used(0).unwrap() as usize;
    let mut bytes = vec![0; len];
    driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    assert_eq!(bytes[HEADER..], received);
    assert_eq!(bytes[NUM_BUFFERS..HEADER], [1, 0]);
    assert_eq!(net.counts.frames[1].load(Relaxed), 1);
    net.stop();
    assert!(driver.broken().is_empty());
}

#[test]
fn a_frame_fills_several_buffers_and_says_how_many() {
    let Some((tap, mut wire)) = tap() else { return };
    let mut net = Net::new(MAC, 1500, vec![tap], Arc::default(), Default::default()).unwrap();
    let mut driver = Driver::new(2);
    let features = net.features() & !(F_GUEST_TSO4 | F_GUEST_TSO6);
    driver.start_with(&mut net, features);
    // The same 600 bytes three times over: each overwrites the last, only the lengths matter here.
    let at = driver.offer_writable(0, 600);
    driver.offer_writable(0, 600);
    driver.offer_writable(0, 600);
    wire.write_all(&frame(1000)).unwrap();
    let lens = [driver.wait_used(0).unwrap(), driver.wait_used(0).unwrap()];
    assert_eq!(lens, [600, 1014 + 12 - 600]);
    let mut count = [0; 2];
    driver.memory.read_slice(&mut count, GuestAddress(at + NUM_BUFFERS as u64)).unwrap();
    assert_eq!(count, [2, 0]);
    net.stop();
}

#[test]
fn frames_cut_short_ask_for_a_reset() {
    let Some((tap, _wire)) = tap() else { return };
    let mut net = Net::new(MAC, 1500, vec![tap], Arc::default(), Default::default()).unwrap();
    let mut driver = Driver::new(2);
    driver.start(&mut net);
    assert!(driver.request(1, &[0; HEADER - 1], 0).is_none());
    driver.wait_broken();
    net.stop();
}

#[test]
fn the_configuration_has_address_link_and_mtu() {
    let Some((tap, _wire)) = tap() else { return };
    let net = Net::new(MAC, 9001, vec![tap], Arc::default(), Default::default()).unwrap();
    let mut config = [0xff; 16];
    net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x29, 0x23, 0, 0, 0, 0]);
    assert_eq!(net.features() & F_MQ, 0);
}

/// A UDP datagram of 20 bytes between ports that make a flow of their own.
fn flow(port: u16) -> Vec<u8> {
    let mut frame =
        [&MAC[..], &[2, 0, 0, 0, 0, 9], &[8, 0, 0x45, 0, 0, 48, 0, 0, 0, 0, 64, 17, 0, 0]].concat();
    frame.extend([10, 0, 0, 9, 10, 0, 0, 1]);
    frame.extend(port.to_be_bytes());
    frame.extend([0, 53, 0, 28, 0, 0]);
    frame.extend([0; 20]);
    frame
}

#[test]
fn flows_go_to_the_pairs_that_the_driver_uses() {
    let Some((taps, mut wire)) = taps(2) else { return };
    let mut net = Net::new(MAC, 1500, taps, Arc::default(), Default::default()).unwrap();
    let mut driver = Driver::new(5);
    let features = net.features() & !(F_GUEST_TSO4 | F_GUEST_TSO6);
    assert_eq!(features & (F_MQ | F_CTRL_VQ), F_MQ | F_CTRL_VQ);
    driver.start_with(&mut net, features);
    let offer = |driver: &mut Driver| {
        for queue in [0, 2] {
            (0..24).for_each(|_| assert!(driver.offer_writable(queue, 2048) > 0));
        }
    };
    offer(&mut driver);
    // The second is not used yet: all flows come to the first.
    (0..16).for_each(|n| wire.write_all(&flow(1000 + n)).unwrap());
    (0..16).for_each(|_| assert!(driver.wait_used(0).is_some()));
    let set = |driver: &mut Driver, pairs: u8| {
        driver.request(4, &[CTRL_MQ, CTRL_MQ_PAIRS_SET, pairs, 0], 1).map(|answer| answer.bytes)
    };
    assert_eq!(set(&mut driver, 3).unwrap(), [CTRL_ERR]);
    assert_eq!(set(&mut driver, 0).unwrap(), [CTRL_ERR]);
    assert_eq!(set(&mut driver, 2).unwrap(), [CTRL_OK]);
    (0..16).for_each(|n| wire.write_all(&flow(2000 + n)).unwrap());
    // Which one a flow takes is the kernel's choice; that all of sixteen choose one is not.
    driver.wait_used(2).unwrap();
    driver.wait_used(0).unwrap();
    assert_eq!(set(&mut driver, 1).unwrap(), [CTRL_OK]);
    net.stop();
    assert!(driver.broken().is_empty());
    // A driver that starts anew begins with one again.
    let mut driver = Driver::new(5);
    driver.start_with(&mut net, features);
    offer(&mut driver);
    (0..16).for_each(|n| wire.write_all(&flow(3000 + n)).unwrap());
    (0..16).for_each(|_| assert!(driver.wait_used(0).is_some()));
    net.stop();
}

#[test]
fn a_slow_interface_takes_its_time_each_way_and_stops_at_once() {
    use crate::config::{Flow, Rate};
    use std::time::Duration;
    let Some((tap, mut wire)) = tap() else { return };
    let rate = Rate { ops: vec![Flow { per_second: 50, burst: 1 }], bytes: vec![] };
    let limits = [(); 2].map(|()| Arc::new(Limiter::new(&rate, Instant::now())));
    let mut net = Net::new(MAC, 1500, vec![tap], Arc::default(), limits.clone()).unwrap();
    let mut driver = Driver::new(2);
    let features = net.features() & !(F_GUEST_TSO4 | F_GUEST_TSO6);
    driver.start_with(&mut net, features);
    let began = Instant::now();
    let sent = [&[0; HEADER][..], &frame(100)].concat();
    for _ in 0..6 {
        driver.request(1, &sent, 0).unwrap();
    }
    assert!(began.elapsed() >= Duration::from_millis(80), "{:?}", began.elapsed());
    assert_eq!((net.counts.frames[1].load(Relaxed), net.counts.dropped.load(Relaxed)), (6, 0));

    let began = Instant::now();
    for _ in 0..6 {
        driver.offer_writable(0, 2048);
        wire.write_all(&frame(100)).unwrap();
        driver.wait_used(0).unwrap();
    }
    assert!(began.elapsed() >= Duration::from_millis(80), "{:?}", began.elapsed());

    // Years of debt hold neither a pause nor the end.
    limits.iter().for_each(|limit| limit.charge(1 << 40, 0));
    driver.offer_writable(0, 2048);
    wire.write_all(&frame(100)).unwrap();
    driver.offer_again(1, 1);
    net.pause();
    net.resume();
    net.stop();
    assert!(driver.broken().is_empty());
}
