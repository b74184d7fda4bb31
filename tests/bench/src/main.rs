//! hutch beside QEMU, in the same run, with the same kernel, initrd and files: what `make bench` runs.
//!
//! ```text
//!   tests/bench/run ── builds ──► hutch-bench all          (on the host, or in the lab)
//!        machine ── starts hutch or QEMU, reads its CPU clock when a line of the console comes
//!        exits ──── counts returns of KVM_RUN by the kernel's own tracepoint
//!        boot, volume, disk, net ── take turns, round by round ──► table ── medians: Markdown, and JSON
//! ```
//!
//! Wall times say little where the host itself is emulated; CPU seconds, exits, memory and bytes hold.
#![forbid(unsafe_code)]

mod boot;
mod disk;
mod exits;
mod machine;
mod net;
mod peers;
mod probe;
mod snapshots;
mod table;
mod volume;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use peers::Peer;
use table::Table;

/// Measures hutch beside QEMU.
#[derive(Parser)]
enum Args {
    /// Measures everything and prints the table.
    All(All),
    /// Makes an empty volume.
    Create {
        /// The file to make.
        path: PathBuf,
        /// Bytes the guest sees.
        size: u64,
    },
    /// Serves the loads of the network, in the guest.
    Serve {
        /// The TCP port.
        port: u16,
    },
    /// Puts loads on a disk: overwrites it.
    Probe {
        /// The disk, or a file.
        path: PathBuf,
        /// Go past the page cache.
        #[arg(long)]
        direct: bool,
        /// How long each load lasts, in milliseconds.
        #[arg(long)]
        time_ms: u64,
    },
}

/// What is measured, and with what.
#[derive(clap::Args)]
struct All {
    /// The `hutch` to measure; `hutch-vmm` lies beside it.
    #[arg(long)]
    hutch: PathBuf,
    /// The directory of the `micro` image: `vmlinuz` and `initrd`.
    #[arg(long)]
    micro: PathBuf,
    /// The initrd of `micro` with this program in it, as /bin/hutch-bench.
    #[arg(long)]
    probe_initrd: Option<PathBuf>,
    /// Where the JSON goes.
    #[arg(long)]
    json: PathBuf,
    /// Where disks are made: 2 GiB on a file system of the host.
    #[arg(long, env = "HUTCH_BENCH_DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// How often everything is measured; medians are shown.
    #[arg(long, env = "HUTCH_BENCH_ROUNDS", default_value_t = 5)]
    rounds: usize,
    /// Measure only these parts.
    #[arg(
        long,
        env = "HUTCH_BENCH_PARTS",
        value_delimiter = ',',
        default_value = "boot,volume,snapshots,disk,net"
    )]
    parts: Vec<Part>,
    /// Other VMMs in the boot part: programs that take --kernel, --initrd, --append, --cpus and --memory.
    #[arg(long, env = "HUTCH_BENCH_PEERS", value_delimiter = ',', value_name = "NAME=PROGRAM")]
    peers: Vec<Peer>,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Part {
    /// To user space: CPU, exits, wall time, memory.
    Boot,
    /// A volume, made.
    Volume,
    /// Snapshots, taken and read through.
    Snapshots,
    /// The guest's disk: requests and CPU.
    Disk,
    /// The guest's network: TCP and CPU. It is the last.
    Net,
}

fn main() -> anyhow::Result<()> {
    match Args::parse() {
        Args::All(all) => measure(&all),
        Args::Create { path, size } => volume::create(&path, size),
        Args::Serve { port } => net::serve(port),
        Args::Probe { path, direct, time_ms } => probe::run(&path, Duration::from_millis(time_ms), direct),
    }
}

/// Measures part by part; what was measured before a part failed is shown all the same.
fn measure(all: &All) -> anyhow::Result<()> {
    let mut table = Table::default();
    let mut parts = all.parts.clone();
    parts.sort();
    let result = parts.iter().try_for_each(|part| match part {
        Part::Boot => boot::measure(all, &mut table),
        Part::Volume => volume::measure(all, &mut table),
        Part::Snapshots => snapshots::measure(all, &mut table),
        Part::Disk => disk::measure(all, &mut table),
        Part::Net => net::measure(all, &mut table),
    });
    parts.dedup();
    let whole = parts.len() == Part::value_variants().len() && result.is_ok();
    // The numbers of a whole run are kept until the next one.
    let json = if whole { all.json.clone() } else { all.json.with_file_name("partial.json") };
    table.save(&json)?;
    eprintln!("the numbers are in {}", json.display());
    println!("{}", table.markdown());
    result
}
