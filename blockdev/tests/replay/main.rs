//! Random sequences of operations on a volume and its layers, with a loss of power at each operation, against a model.
//!
//! `cargo test --release -p hutch-blockdev --test replay -- --ignored --nocapture` does a hundred thousand. REPLAY_SEED=N does
//! one of them again; REPLAY_FROM, REPLAY_COUNT and REPLAY_THREADS say which, and how many at once.

mod engine;
mod faults;
mod flips;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engine::{Run, Seen};
use world::{Content, Random};

/// The most operations of a sequence.
const STEPS: u64 = 40;
/// One file in so many is shown to `qemu-img check`, too.
const SAMPLE: u64 = 20_000;

/// `qemu-img check` of a file: whole, or with leaks where there may be some.
fn qemu_check(content: &Content, leaks: bool) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), content.to_vec()).expect("the file");
    match Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(file.path()).output() {
        Ok(out) => {
            let (code, said) = (out.status.code(), String::from_utf8_lossy(&out.stdout));
            assert!(code == Some(0) || leaks && code == Some(3), "qemu-img check: {code:?} {said}");
        }
        Err(e) => eprintln!("SKIPPED: qemu-img: {e}"),
    }
}

/// The sequence of this seed.
fn replay(seed: u64, sample: u64) -> Seen {
    let mut random = Random::new(seed);
    let steps = 1 + random.below(STEPS) as usize;
    let bytes: Vec<u8> = (0..STEPS * 6).map(|_| random.next() as u8).collect();
    let mut looked = random.below(sample);
    let mut judge = |content: &Content, leaks| {
        if looked == 0 {
            qemu_check(content, leaks);
        }
        looked = looked.checked_sub(1).unwrap_or(sample);
    };
    engine::run(&bytes, Run { steps, crash_always: true, judge: &mut judge })
}

/// The sequences of these seeds, by so many threads; which failed is told, and how to do it again.
fn replay_all(seeds: std::ops::Range<u64>, threads: u64, sample: u64) -> Seen {
    let (next, started) = (AtomicU64::new(seeds.start), Instant::now());
    let (all, told, failed) =
        (Mutex::new(Seen::default()), Mutex::new(Instant::now()), Mutex::new(Vec::new()));
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= seeds.end {
            break;
        }
        let Ok(seen) = catch_unwind(AssertUnwindSafe(|| replay(seed, sample))) else {
            eprintln!("FAILED: seed {seed}; REPLAY_SEED={seed} does it again");
            failed.lock().unwrap().push(seed);
            continue;
        };
        let mut all = all.lock().unwrap();
        (all.steps, all.crashes, all.leaks) =
            (all.steps + seen.steps, all.crashes + seen.crashes, all.leaks + seen.leaks);
        let mut told = told.lock().unwrap();
        if told.elapsed() > Duration::from_secs(20) {
            *told = Instant::now();
            println!("{:?}: up to seed {seed} of {seeds:?}, {all:?}", started.elapsed());
        }
    };
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| drop(scope.spawn(work)));
    });
    let (all, failed) = (all.into_inner().unwrap(), failed.into_inner().unwrap());
    println!("{:?}: seeds {seeds:?}, {all:?}", started.elapsed());
    assert!(failed.is_empty(), "the seeds {failed:?} failed");
    all
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().expect("a number"))
}

#[test]
fn whatever_is_done_a_loss_of_power_loses_nothing_that_was_flushed() {
    let seen = replay_all(0..200, 2, 500);
    // It was no empty work.
    assert!(seen.steps > 3000 && seen.crashes >= seen.steps && seen.leaks > seen.crashes / 50, "{seen:?}");
}

#[test]
#[ignore = "a hundred thousand sequences"]
fn a_hundred_thousand_sequences() {
    if let Ok(seed) = std::env::var("REPLAY_SEED") {
        println!("{:?}", replay(seed.parse().expect("a number"), 50));
        return;
    }
    let from = number("REPLAY_FROM", 0);
    replay_all(from..from + number("REPLAY_COUNT", 100_000), number("REPLAY_THREADS", 2), SAMPLE);
}
