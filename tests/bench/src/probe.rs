//! A load on a disk, the same program in the guest and on the host: fixed time, fixed block, so many threads.
//!
//! Before and after each load a line is printed, at which whoever watches from outside reads the VMM's CPU clock.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

/// What the lines begin with.
pub const START: &str = "probe-start";
/// And what those begin with that end a load: `probe-end NAME OPERATIONS BYTES MICROSECONDS CPU-MICROSECONDS`.
pub const END: &str = "probe-end";

/// The part of the disk that is used.
pub const REGION: u64 = 128 << 20;
/// Buffers and offsets of direct I/O.
const ALIGN: usize = 4096;

/// One load.
pub struct Load {
    /// What it is called, without blanks.
    pub name: &'static str,
    /// How the table calls it.
    pub title: &'static str,
    block: usize,
    threads: u64,
    write: bool,
    random: bool,
    /// Over the whole region once, instead of for a time.
    once: bool,
    /// Of what the host does not have in memory.
    pub cold: bool,
}

const SEQUENTIAL: Load = Load {
    name: "",
    title: "",
    block: 1 << 20,
    threads: 1,
    write: false,
    random: false,
    once: false,
    cold: false,
};
const RANDOM: Load = Load { block: 4096, random: true, ..SEQUENTIAL };

/// All loads, in their order. The first fills the region, so that the later ones find every block in its place.
pub const LOADS: [Load; 11] = [
    Load { name: "fill", title: "first write, 1 MiB", write: true, once: true, ..SEQUENTIAL },
    Load { name: "seq-write-1", title: "sequential write, 1 MiB, depth 1", write: true, ..SEQUENTIAL },
    Load {
        name: "seq-write-32",
        title: "sequential write, 1 MiB, depth 32",
        write: true,
        threads: 32,
        ..SEQUENTIAL
    },
    Load { name: "rand-write-1", title: "random write, 4 KiB, depth 1", write: true, ..RANDOM },
    Load {
        name: "rand-write-32",
        title: "random write, 4 KiB, depth 32",
        write: true,
        threads: 32,
        ..RANDOM
    },
    Load { name: "seq-read-1", title: "sequential read, 1 MiB, depth 1", ..SEQUENTIAL },
    Load { name: "seq-read-32", title: "sequential read, 1 MiB, depth 32", threads: 32, ..SEQUENTIAL },
    Load { name: "rand-read-1", title: "random read, 4 KiB, depth 1", ..RANDOM },
    Load { name: "rand-read-32", title: "random read, 4 KiB, depth 32", threads: 32, ..RANDOM },
    Load {
        name: "cold-read-1",
        title: "random read, 4 KiB, depth 1, from the host's disk",
        cold: true,
        ..RANDOM
    },
    Load {
        name: "cold-read-32",
        title: "random read, 4 KiB, depth 32, from the host's disk",
        threads: 32,
        cold: true,
        ..RANDOM
    },
];

/// What a load did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    /// Requests.
    pub operations: u64,
    /// Bytes of them all.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Seconds of CPU that the probe itself took: of the host where it runs there, of the guest's own clock in a guest.
    pub cpu: f64,
}

impl Done {
    /// Reads the line that ended this load.
    pub fn parse(line: &str) -> Option<Done> {
        let mut words =
            line.split_once(END)?.1.split_whitespace().skip(1).map_while(|w| w.parse::<u64>().ok());
        let (operations, bytes, micros, cpu) = (words.next()?, words.next()?, words.next()?, words.next()?);
        Some(Done { operations, bytes, seconds: micros as f64 / 1e6, cpu: cpu as f64 / 1e6 })
    }
}

/// Puts every load on `path`, each for `time`; `direct` goes past the page cache.
///
/// # Errors
/// The disk is too small, or a request failed.
pub fn run(path: &Path, time: Duration, direct: bool) -> anyhow::Result<()> {
    let flags = if direct { OFlag::O_DIRECT } else { OFlag::empty() };
    let deadline = Instant::now() + Duration::from_secs(10);
    while !path.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let file = File::options().read(true).write(true).custom_flags(flags.bits()).open(path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    for load in &LOADS {
        if load.cold {
            // In a guest whoever watches does so.
            forget(&file)?;
        }
        println!("{START} {}", load.name);
        let done = load.run(&file, time).with_context(|| load.name)?;
        let (micros, cpu) = ((done.seconds * 1e6) as u64, (done.cpu * 1e6) as u64);
        println!("{END} {} {} {} {micros} {cpu}", load.name, done.operations, done.bytes);
        // What a load left in memory is not the next one's to write.
        file.sync_all().with_context(|| load.name)?;
    }
    Ok(())
}

/// Lets the host forget what it has in memory of a file, which is on the disk.
///
/// # Errors
/// The file cannot be synced.
pub fn forget(file: &File) -> anyhow::Result<()> {
    file.sync_all()?;
    Ok(posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
}

impl Load {
    fn run(&self, file: &File, time: Duration) -> anyhow::Result<Done> {
        let blocks = REGION / self.block as u64;
        let next = AtomicU64::new(0);
        let operations = AtomicU64::new(0);
        let stop = AtomicBool::new(false);
        let (started, before) = (Instant::now(), cpu()?);
        let worker = |seed: u64| -> std::io::Result<()> {
            let mut memory = vec![0xa5; self.block + ALIGN];
            let skip = memory.as_ptr().align_offset(ALIGN);
            let buffer = &mut memory[skip..skip + self.block];
            let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            while !stop.load(Ordering::Relaxed) {
                let block = if self.random {
                    random = xorshift(random);
                    random
                } else {
                    next.fetch_add(1, Ordering::Relaxed)
                };
                if self.once && block >= blocks || !self.once && started.elapsed() >= time {
                    break;
                }
                let offset = block % blocks * self.block as u64;
                let result = match self.write {
                    true => file.write_all_at(buffer, offset),
                    false => file.read_exact_at(buffer, offset),
                };
                result.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
                operations.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let results = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..=self.threads).map(|seed| scope.spawn(move || worker(seed))).collect();
            threads.into_iter().map(|t| t.join()).collect::<Vec<_>>()
        });
        for result in results {
            match result {
                Ok(result) => result?,
                Err(_) => bail!("a thread of the probe ended badly"),
            }
        }
        let operations = operations.into_inner();
        let seconds = started.elapsed().as_secs_f64();
        Ok(Done { operations, bytes: operations * self.block as u64, seconds, cpu: cpu()? - before })
    }
}

/// Seconds of CPU that this process has had.
fn cpu() -> anyhow::Result<f64> {
    let used = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(used.user_time()) + seconds(used.system_time()))
}

pub(crate) fn xorshift(mut x: u64) -> u64 {
    x ^= x << 13;
    x ^= x >> 7;
    x ^ (x << 17)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_in_a_file_does_what_it_says() {
        let path = std::env::temp_dir().join(format!("hutch-bench-probe-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(REGION).unwrap();
        let fill = LOADS[0].run(&file, Duration::ZERO).unwrap();
        assert_eq!((fill.operations, fill.bytes), (128, REGION));
        let mut last = [0; 16];
        file.read_exact_at(&mut last, REGION - 16).unwrap();
        assert_eq!(last, [0xa5; 16]);
        let random = LOADS[8].run(&file, Duration::from_millis(20)).unwrap();
        assert_eq!(random.bytes, random.operations * 4096);
        file.set_len(1 << 20).unwrap();
        assert!(
            LOADS[8].run(&file, Duration::from_secs(5)).is_err(),
            "past the end there is nothing to read"
        );
    }

    #[test]
    fn what_the_probe_prints_is_read_back() {
        let done = Done::parse("probe-end rand-read-1 500 2048000 2000000 70000\r\n");
        assert_eq!(done, Some(Done { operations: 500, bytes: 2_048_000, seconds: 2.0, cpu: 0.07 }));
        assert_eq!(Done::parse("probe-end rand-read-1 500 x"), None);
    }
}
