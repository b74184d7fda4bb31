//! What this host can do.

use std::process::ExitCode;

use clap::ValueEnum;
use hutch_vmm::probe::probe;

/// Arguments of `hutch doctor`. The exit status is 0 where stock kernels run, 1 where they do not.
#[derive(clap::Args)]
pub struct Args {
    /// How to print.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Take out what machines left in the network that were killed without a word.
    #[arg(long)]
    repair: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// Probes and prints.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if args.repair {
        let count = hutch_netfw::repair(&hutch_netfw::guest::records_dir()?)?;
        println!("network: took out what {count} machines had left");
        return Ok(ExitCode::SUCCESS);
    }
    let found = probe();
    match args.output {
        Output::Text => println!("kvm: {}", found.advice()),
        Output::Json => {
            println!(
                "{}",
                serde_json::json!({ "kvm": { "usable": found.usable(), "advice": found.advice() } })
            );
        }
    }
    Ok(if found.usable() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
