//! Stories, end to end, and the lab they run in.
//!
//! ```text
//!   make stories ── lab/enter ── sets HUTCH_MICRO, and HUTCH_LAB where this machine's KVM is of no use
//!        └── tests/*.rs ── hutch(…) ──┬── directly
//!                                     └── lab/run: the same command inside L1
//! ```
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().expect("the checkout is there")
}

/// The directory of the `micro` image: `vmlinuz` and `initrd`.
pub fn micro() -> PathBuf {
    let dir =
        std::env::var_os("HUTCH_MICRO").expect("stories are run by `make stories`, which sets HUTCH_MICRO");
    dir.into()
}

/// For scripts: `soon COMMAND…` tries until it succeeds, for five minutes at most. A story never fails because its host
/// is slow; only what never comes waits that long.
pub const SOON: &str = r#"soon() { for _ in $(seq 600); do "$@" >/dev/null 2>&1 && return; sleep 0.5; done; echo "never: $*"; return 1; }"#;

/// Seconds after which a guest is ended that should have ended by itself (a string, as `--timeout` takes it).
pub const ENOUGH: &str = "400";

/// Runs a command where guests can run: here, or in the lab. At most ten minutes.
pub fn host(program: &str, args: &[&str]) -> Output {
    host_within(600, program, args)
}

/// Likewise, for at most so many seconds.
pub fn host_within(seconds: u32, program: &str, args: &[&str]) -> Output {
    let seconds = seconds.to_string();
    let mut command = if std::env::var_os("HUTCH_LAB").is_some() {
        let mut run = Command::new(root().join("tests/lab/run"));
        run.arg(program);
        run
    } else {
        let mut run = Command::new("timeout");
        run.args([&seconds, program]);
        run
    };
    command.args(args).current_dir(root()).env("LAB_TIMEOUT", &seconds).output().expect("the command starts")
}

/// The `hutch` that was built beside these tests.
pub fn hutch_path() -> String {
    let profile = std::env::current_exe().expect("a test program has a path");
    let target = profile.ancestors().nth(2).expect("target/<profile>/deps/<test>");
    target.join("hutch").to_string_lossy().into_owned()
}

/// Runs `hutch`.
pub fn hutch(args: &[&str]) -> Output {
    host(&hutch_path(), args)
}

/// Boots `micro` with more options, and a command after `--`.
pub fn boot_micro(args: &[&str]) -> Output {
    let (kernel, initrd) = (micro().join("vmlinuz"), micro().join("initrd"));
    let mut all = vec!["boot", "--timeout", ENOUGH, "--kernel", kernel.to_str().expect("UTF-8")];
    all.extend(["--initrd", initrd.to_str().expect("UTF-8")]);
    all.extend(args);
    hutch(&all)
}

/// What a command printed, on both streams, for messages and searches.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}
