//! The guest's network: TCP both ways and request-response between the host and a guest on a tap, under each VMM, in a
//! network namespace of the bench's own. QEMU's tap is without vhost, as hutch's is; the host's own figure is its loopback.
//! Bytes count when the other side has read them.
//!
//! The host calls the guest at port 22, which is what hutch's firewall lets through.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, unshare};

use crate::All;
use crate::machine::{Guest, Machine, Vmm};
use crate::table::{Better, Table};

/// The first address that hutch gives, and the host's.
/// What `hutch boot` gives the first machine: the last address of its subnet but one.
const GUEST: Ipv4Addr = Ipv4Addr::new(172, 31, 15, 254);
const HOST: &str = "172.31.0.1/32";
const PORT: u16 = 22;
/// QEMU's tap.
pub const TAP: &str = "qemu0";
const READY: &str = "bench: serving";
/// How long each load lasts.
const TIME: Duration = Duration::from_secs(2);
const BLOCK: usize = 256 << 10;

/// A load: the byte that asks the guest for its part in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    ToHost = b's' as isize,
    ToGuest = b'r' as isize,
    Echo = b'e' as isize,
}

const LOADS: [(Load, &str); 3] = [
    (Load::ToHost, "TCP, guest to host"),
    (Load::ToGuest, "TCP, host to guest"),
    (Load::Echo, "TCP, request and response of one byte"),
];

/// Measures hutch and QEMU's machines in turn.
///
/// # Errors
/// A guest did not come up, or a connection failed.
pub fn measure(all: &All, table: &mut Table) -> anyhow::Result<()> {
    let initrd = all.probe_initrd.as_deref().context("the net part needs --probe-initrd")?;
    // Nothing of this is to be seen outside. It is the last part: what starts from here is inside.
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace; run the bench as root")?;
    run("ip", &["link", "set", "lo", "up"])?;
    run("ip", &["tuntap", "add", TAP, "mode", "tap", "vnet_hdr"])?;
    let script =
        format!("ip link set eth0 up; ip addr add {GUEST}/20 dev eth0; exec /bin/hutch-bench serve {PORT}");
    let guest = Guest { initrd, command: &["sh", "-c", &script], disk: None, huge: true, tap: true };
    let mut everyone = [Vmm::Hutch, Vmm::Q35, Vmm::Microvm];
    for round in 0..all.rounds {
        let own = TcpListener::bind("127.0.0.1:0")?;
        let address = own.local_addr()?;
        std::thread::spawn(move || serve_on(&own));
        for (load, title) in LOADS {
            rate(title, "host's loopback", load, call(address, load)?, table);
        }
        stop(address)?;
        everyone.rotate_left(usize::from(round > 0));
        for who in everyone {
            if who != Vmm::Hutch {
                // The same way as hutch's taps have it.
                run("ip", &["addr", "replace", HOST, "dev", TAP])?;
                run("ip", &["link", "set", TAP, "up"])?;
                run("ip", &["route", "replace", &GUEST.to_string(), "dev", TAP])?;
            }
            let name = who.name();
            let result = loads(who, name, &guest, all, table);
            run("ip", &["link", "set", TAP, "down"])?;
            result.with_context(|| name.to_owned())?;
            eprintln!("net, round {round}: {name}");
        }
    }
    Ok(())
}

/// The loads on one guest, with the CPU of the process that runs it.
fn loads(who: Vmm, name: &str, guest: &Guest, all: &All, table: &mut Table) -> anyhow::Result<()> {
    let mut machine = Machine::start(who, guest, all)?;
    machine.wait_line(READY)?;
    let address = SocketAddr::from((GUEST, PORT));
    for (load, title) in LOADS {
        let before = machine.cpu()?;
        let done = call(address, load)?;
        let cpu = machine.cpu()? - before;
        rate(title, name, load, done, table);
        let (unit, amount) = match load {
            Load::Echo => ("s/100,000", done.0 as f64 / 1e5),
            _ => ("s/GiB", done.0 as f64 / f64::from(1 << 30)),
        };
        table.add(&format!("{title}: CPU"), unit, Better::Lower, name, cpu / amount.max(1e-9));
    }
    stop(address)?;
    machine.end()
}

fn rate(title: &str, who: &str, load: Load, (amount, seconds): (u64, f64), table: &mut Table) {
    let (unit, scale) = if load == Load::Echo { ("/s", 1.0) } else { ("MiB/s", f64::from(1 << 20)) };
    table.add(title, unit, Better::Higher, who, amount as f64 / seconds / scale);
}

/// One load over one connection: the bytes (or the round trips), and the seconds they took.
fn call(address: SocketAddr, load: Load) -> anyhow::Result<(u64, f64)> {
    let mut stream = connect(address)?;
    stream.write_all(&[load as u8])?;
    let mut block = vec![0x5a; BLOCK];
    let (started, mut amount) = (Instant::now(), 0);
    while started.elapsed() < TIME {
        match load {
            Load::ToHost => match stream.read(&mut block)? {
                0 => bail!("the guest hung up"),
                n => amount += n as u64,
            },
            Load::ToGuest => stream.write_all(&block)?,
            Load::Echo => {
                stream.write_all(&[1])?;
                stream.read_exact(block.get_mut(..1).unwrap_or_default())?;
                amount += 1;
            }
        }
    }
    if load == Load::ToGuest {
        stream.shutdown(Shutdown::Write)?;
        let mut count = [0; 8];
        stream.read_exact(&mut count)?;
        amount = u64::from_le_bytes(count);
    }
    Ok((amount, started.elapsed().as_secs_f64()))
}

/// Ends the program on the other side.
fn stop(address: SocketAddr) -> anyhow::Result<()> {
    Ok(connect(address)?.write_all(b"q")?)
}

fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(20));
    let stream = stream.with_context(|| format!("cannot reach {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_write_timeout(Some(Duration::from_secs(20)))?;
    Ok(stream)
}

/// The guest's side: serves on every address until it is told to stop.
///
/// # Errors
/// The port is taken.
pub fn serve(port: u16) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    println!("{READY}");
    serve_on(&listener);
    Ok(())
}

fn serve_on(listener: &TcpListener) {
    let block = vec![0xa5; BLOCK];
    while let Ok((mut stream, _)) = listener.accept() {
        let mut load = [0];
        if stream.set_nodelay(true).and_then(|()| stream.read_exact(&mut load)).is_err() {
            continue;
        }
        // Each ends when the other side hangs up.
        let _ = match load[0] {
            b'q' => return,
            b's' => loop {
                if let Err(e) = stream.write_all(&block) {
                    break Err(e);
                }
            },
            // What came is told at the end: the caller knows only what it handed to its own kernel.
            b'r' => std::io::copy(&mut stream, &mut std::io::sink())
                .and_then(|count| stream.write_all(&count.to_le_bytes())),
            b'e' => loop {
                if let Err(e) = stream.read_exact(&mut load).and_then(|()| stream.write_all(&load)) {
                    break Err(e);
                }
            },
            _ => Err(ErrorKind::InvalidInput.into()),
        };
    }
}

fn run(program: &str, args: &[&str]) -> anyhow::Result<()> {
    let status =
        Command::new(program).args(args).status().with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} {} failed ({status})", args.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_loads_do_something_over_the_loopback() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || serve_on(&listener));
        for (load, title) in LOADS {
            assert!(call(address, load).unwrap().0 > 10, "{title}");
        }
        stop(address).unwrap();
        server.join().unwrap();
    }
}
