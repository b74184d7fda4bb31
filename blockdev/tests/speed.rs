//! What a volume costs beside a raw disk and QEMU's engine, on one file system, without a guest: ratios, not times.
//!
//! `cargo test --release -p hutch-blockdev --test speed -- --ignored --nocapture`

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::rng::Rng;
use common::{qemu_img, rw};
use hutch_blockdev::{Disk, Format, Qcow2Disk, RawDisk, open_layers, qcow2};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
const ROUNDS: usize = 5;

/// Seconds for `count` requests of `len` bytes.
fn run(disk: &dyn Disk, len: u64, random: bool, write: bool) -> f64 {
    let count = if random { 16_384 } else { SIZE / len };
    let mut rng = Rng(1);
    let mut bytes = vec![0x5a; len as usize];
    let started = Instant::now();
    for i in 0..count {
        let at = if random { rng.below(SIZE / len) } else { i } * len;
        if write { disk.write_at(at, &bytes) } else { disk.read_at(at, &mut bytes) }.expect("in range");
    }
    disk.flush().expect("flush");
    started.elapsed().as_secs_f64()
}

/// The same by `qemu-img bench`, one request at a time, through the page cache as we do.
fn qemu(file: &Path, format: &str, len: u64, write: bool) -> f64 {
    let (count, len) = ((SIZE / len).to_string(), len.to_string());
    let file = file.to_string_lossy();
    let mut args = vec!["bench", "-f", format, "-t", "writeback", "-d", "1", "-c", &count, "-s", &len];
    if write {
        args.extend(["-w", "--pattern", "90", "--flush-interval", &count]);
    }
    args.push(&file);
    let started = Instant::now();
    let (code, said) = qemu_img(&args);
    assert_eq!(code, 0, "{said}");
    started.elapsed().as_secs_f64()
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

#[test]
#[ignore = "a measurement; in release, on a machine that does nothing else"]
fn beside_raw_and_qemu() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let mut results: Vec<(&str, Vec<[f64; 4]>)> = Vec::new();
    for _ in 0..ROUNDS {
        for name in ["raw", "ours", "q.raw", "q"] {
            let _ = std::fs::remove_file(path(name));
        }
        rw(&path("raw")).set_len(SIZE).expect("room");
        rw(&path("q.raw")).set_len(SIZE).expect("room");
        qcow2::create(&rw(&path("ours")), SIZE).expect("create");
        qcow2::create(&rw(&path("q")), SIZE).expect("create");
        let raw = RawDisk::open(rw(&path("raw")), false).expect("open");
        let ours = open_layers(vec![(rw(&path("ours")), Format::Qcow2)], false).expect("open");
        for (i, (name, len, random, write)) in [
            ("1 MiB writes, fresh", MIB, false, true),
            ("1 MiB writes again", MIB, false, true),
            ("1 MiB reads", MIB, false, false),
            ("4 KiB reads in order", 4096, false, false),
            ("4 KiB reads, random", 4096, true, false),
            ("4 KiB writes, random", 4096, true, true),
        ]
        .into_iter()
        .enumerate()
        {
            let of_qemu = |file, format| if random { f64::NAN } else { qemu(file, format, len, write) };
            let row = [
                run(&raw, len, random, write),
                run(&*ours, len, random, write),
                of_qemu(&path("q.raw"), "raw"),
                of_qemu(&path("q"), "qcow2"),
            ];
            if results.len() == i {
                results.push((name, Vec::new()));
            }
            results[i].1.push(row);
        }
    }
    println!(
        "{:24}{:>12}{:>12}{:>12}{:>12}{:>12}",
        "seconds", "raw", "volume", "QEMU raw", "QEMU qcow2", "vol/raw"
    );
    for (name, rows) in results {
        let [raw, ours, q_raw, q] = [0, 1, 2, 3].map(|i| median(rows.iter().map(|row| row[i]).collect()));
        println!("{name:24}{raw:12.3}{ours:12.3}{q_raw:12.3}{q:12.3}{:12.2}", ours / raw);
    }
}

/// What reading costs with many sealed layers beneath, each of which wrote a part of the disk.
#[test]
#[ignore = "a measurement; in release, on a machine that does nothing else"]
fn one_layer_and_fifty() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let layers = |name: &str, count: u64| {
        let path = |i: u64| dir.path().join(format!("{name}{i}"));
        let open = |upto: u64| (0..upto).rev().map(|i| (rw(&path(i)), Format::Qcow2)).collect();
        for i in 0..count {
            qcow2::create(&rw(&path(i)), SIZE).expect("create");
            let disk = open_layers(open(i + 1), false).expect("open");
            // All of it at first, then what is written between two snapshots: somewhere.
            let mut rng = Rng(i);
            for at in (0..if i == 0 { SIZE / MIB } else { 8 }).map(|n| n * MIB) {
                let at = if i == 0 { at } else { rng.below(SIZE / 4096) * 4096 };
                disk.write_at(at, &vec![i as u8 + 1; if i == 0 { 1 << 20 } else { 4096 }]).expect("write");
            }
        }
        open_layers(open(count), false).expect("open")
    };
    let (one, fifty) = (layers("one", 1), layers("fifty", 50));
    println!("{:24}{:>12}{:>12}{:>12}", "seconds", "1 layer", "50 layers", "50/1");
    for (name, len, random) in [("1 MiB reads", MIB, false), ("4 KiB reads, random", 4096, true)] {
        let mut times = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            times[0].push(run(&*one, len, random, false));
            times[1].push(run(&*fifty, len, random, false));
        }
        let [one, fifty] = times.map(median);
        println!("{name:24}{one:12.4}{fifty:12.4}{:12.2}", fifty / one);
    }
}

/// What encryption costs: once with the page cache as the disk, where it is most of the work.
#[test]
#[ignore = "a measurement; in release, on a machine that does nothing else"]
fn encrypted_beside_plain() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let key = common::key(1);
    println!("{:24}{:>12}{:>12}{:>12}", "seconds", "plain", "encrypted", "enc/plain");
    let mut disks: Vec<Qcow2Disk> = Vec::new();
    for (name, key) in [("plain", None), ("encrypted", Some(&key))] {
        let file = Arc::new(rw(&dir.path().join(name)));
        match key {
            Some(key) => qcow2::create_encrypted(&*file, SIZE, key),
            None => qcow2::create(&*file, SIZE),
        }
        .expect("create");
        disks.push(Qcow2Disk::with_key(file, None, key, false).expect("open"));
    }
    for (name, len, random, write) in [
        ("1 MiB writes, fresh", MIB, false, true),
        ("1 MiB writes again", MIB, false, true),
        ("1 MiB reads", MIB, false, false),
        ("4 KiB reads, random", 4096, true, false),
        ("4 KiB writes, random", 4096, true, true),
    ] {
        let rounds = if name.ends_with("fresh") { 1 } else { ROUNDS };
        let time = |disk| median((0..rounds).map(|_| run(disk, len, random, write)).collect());
        let [plain, encrypted] = [0, 1].map(|i| time(&disks[i]));
        println!("{name:24}{plain:12.3}{encrypted:12.3}{:12.2}", encrypted / plain);
    }
}
