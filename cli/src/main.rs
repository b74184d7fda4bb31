//! The program people type: `hutch`.
//!
//! ```text
//!   hutch boot     boot.rs      one machine in the foreground, without any daemon (args.rs: what it may be told)
//!                  source.rs    what it boots, and its disks (disks.rs: layers of files)
//!                  root.rs      --root: an image or a directory under hutch's own init
//!                  metadata.rs  what it is told at 169.254.169.254
//!                  netns.rs     network namespaces
//!                  vmm.rs       the child process hutch-vmm: descriptors in, report out
//!   hutch control  control.rs   power button, status, console of a running machine (attach.rs: a terminal on it)
//!   hutch image    image.rs     templates: build, import, ls, rm, inspect
//!   hutch ssh      ssh.rs       log in, with hutch's own key
//!   hutch run …    cloud/       instances of hutchd, by the same API as everybody's
//!   hutch doctor   doctor.rs    what this host can do, and what to do about what it cannot
//! ```
#![forbid(unsafe_code)]

mod args;
mod attach;
mod boot;
mod cloud;
mod control;
mod disks;
mod doctor;
mod image;
mod metadata;
mod netns;
mod output;
mod root;
mod source;
mod ssh;
mod vmm;

use std::process::ExitCode;

use cloud::instances::{self, Verb};
use cloud::{backup, events, firewall, reach, top, usage, volumes};

use clap::{CommandFactory, Parser, Subcommand};
use nix::errno::Errno;

/// An EC2 for one workstation: real Linux guests, each in its own KVM micro-VM.
#[derive(Parser)]
#[command(name = "hutch", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Launch instances.
    Run(Box<instances::Run>),
    /// List instances.
    Ps(instances::Ps),
    /// Start stopped instances.
    Start(instances::Act),
    /// Stop instances; their volumes are kept.
    Stop(instances::Act),
    /// Reboot instances.
    Reboot(instances::Act),
    /// Terminate instances, with the volumes that go with them.
    Terminate(instances::Act),
    /// Log in to an instance, or to a machine that `hutch boot` runs, or run a command there.
    Ssh(ssh::Args),
    /// Copy files from and to instances.
    Cp(reach::Cp),
    /// Print what an instance wrote to its console.
    Logs(instances::Logs),
    /// Tell of each change of a state as it comes.
    Events(events::Args),
    /// Show what instances use: processor, memory, disks, network.
    Top(top::Args),
    /// Show what room volumes and snapshots take, and what would be free without each.
    Usage(usage::Args),
    /// Copy all that hutchd keeps, while machines run.
    ///
    /// hutchd makes the backup, as the administrator: each guest's volumes as they are at one instant, cloned (where the file
    /// system can) or copied while it goes on. It is whole when it has a manifest.json. Ctrl-C ends only this command.
    Backup(backup::Backup),
    /// Make a state of a backup.
    ///
    /// All files are checked first; then the state is made beside its place and renamed to it. Start hutchd on it when that
    /// is done: instances that ran are stopped, or, with `hutchd --resume`, started.
    Restore(backup::Restore),
    /// Export, import and check volumes.
    #[command(subcommand)]
    Volume(volumes::Command),
    /// Tell what an instance's firewall lets through, and why.
    #[command(subcommand)]
    Fw(firewall::Firewall),
    /// Use an instance's console. On a terminal, Ctrl-] detaches.
    Console(reach::Console),
    /// Tag an instance, or anything else by its id.
    Tag(instances::Tag),
    /// Print what boto3, Terraform and the aws CLI need to know, for a shell.
    Env(reach::Env),
    /// Run the aws CLI with endpoint and key set.
    #[command(disable_help_flag = true)]
    Aws(reach::Aws),
    /// Build, import, list, remove and inspect images; make AMIs of instances.
    Image(image::Args),
    /// Run one machine in the foreground, without hutchd.
    Boot(Box<args::Args>),
    /// Ask a running machine, or tell it something, by its control socket.
    Control(control::Args),
    /// Tell what this host's KVM is worth and what to do.
    Doctor(doctor::Args),
    /// Print a completion script for a shell.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => instances::run(&args),
        Command::Ps(args) => instances::ps(&args),
        Command::Start(args) => instances::act(Verb::Start, &args),
        Command::Stop(args) => instances::act(Verb::Stop, &args),
        Command::Reboot(args) => instances::act(Verb::Reboot, &args),
        Command::Terminate(args) => instances::act(Verb::Terminate, &args),
        Command::Cp(args) => reach::cp(&args),
        Command::Logs(args) => instances::logs(&args),
        Command::Events(args) => events::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Usage(args) => usage::run(&args),
        Command::Volume(command) => volumes::run(&command),
        Command::Backup(args) => backup::backup(&args),
        Command::Restore(args) => backup::restore(&args),
        Command::Fw(command) => firewall::run(&command),
        Command::Console(args) => reach::console(&args),
        Command::Tag(args) => instances::tag(&args),
        Command::Env(args) => reach::env(&args),
        Command::Aws(args) => reach::aws(&args),
        Command::Boot(args) => boot::run(&args),
        Command::Image(args) => image::run(&args),
        Command::Control(args) => control::run(&args),
        Command::Ssh(args) => ssh::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "hutch", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|e| {
        eprintln!(
            "hutch: {e:#}{}",
            if is_out_of_descriptors(&e) { "; raise the limit of open files (ulimit -n)" } else { "" }
        );
        ExitCode::from(boot::MACHINE_ERROR)
    })
}

/// Whether the host or this process has no descriptor left.
fn is_out_of_descriptors(error: &anyhow::Error) -> bool {
    let codes = [Errno::EMFILE, Errno::ENFILE];
    error.chain().any(|cause| {
        let io = cause
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error)
            .map(Errno::from_raw);
        io.or(cause.downcast_ref::<Errno>().copied()).is_some_and(|code| codes.contains(&code))
    })
}
