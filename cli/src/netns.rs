//! Network namespaces: where a machine's network is.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

/// A namespace that this process entered; if it made it, it is deleted at the end.
pub struct Namespace {
    made: Option<String>,
}

/// Enters the namespace `name`, made when it is not there. Call it before there are threads.
///
/// # Errors
/// A name that is none, no right to enter, no `ip`.
pub fn enter(name: &str) -> anyhow::Result<Namespace> {
    let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if name.is_empty() || !plain || name.starts_with('.') {
        bail!("{name:?} is no name for a network namespace; use letters, digits, -, _ and .");
    }
    let path = Path::new("/run/netns").join(name);
    let mut namespace = Namespace { made: None };
    if !path.exists() {
        let made = Command::new("ip").args(["netns", "add", name]).status();
        if !made.context("cannot run ip; install the package iproute2")?.success() {
            bail!("cannot make the network namespace {name}; run as root");
        }
        namespace.made = Some(name.to_owned());
    }
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(&file, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter the network namespace {name}; run as root"))?;
    // It fails only where it is up already.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    Ok(namespace)
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Some(name) = &self.made {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}
