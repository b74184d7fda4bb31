//! `hutch ssh`, and the key it logs in with.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

/// Arguments of `hutch ssh`.
#[derive(clap::Args)]
pub struct Args {
    /// The machine's address, as `hutch boot` prints it.
    #[arg(value_name = "ADDRESS")]
    address: Ipv4Addr,
    /// The user.
    #[arg(long, short = 'l', default_value = "debian")]
    user: String,
    /// A private key instead of hutch's own.
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Wait so many seconds until the machine takes connections.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// A command to run there; without one, a login.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Becomes ssh.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let identity = args.identity.clone().map_or_else(own_key, Ok)?;
    wait(args.address, Duration::from_secs(args.wait))?;
    // A machine is new at every boot, and nobody can stand between it and this host.
    let options =
        ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"];
    let mut ssh = Command::new("ssh");
    ssh.args(options.iter().flat_map(|option| ["-o", option])).arg("-i").arg(identity);
    ssh.arg(format!("{}@{}", args.user, args.address)).args(&args.command);
    Err(ssh.exec()).context("cannot run ssh; install the package openssh-client")
}

/// Returns when port 22 answers.
fn wait(address: Ipv4Addr, limit: Duration) -> anyhow::Result<()> {
    let until = Instant::now() + limit;
    let socket = SocketAddr::from((address, 22));
    while Instant::now() < until {
        if TcpStream::connect_timeout(&socket, Duration::from_secs(2)).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    if !limit.is_zero() {
        bail!("{address} took no connection within {} s; look at its console", limit.as_secs());
    }
    Ok(())
}

/// hutch's own key, made at its first use.
fn own_key() -> anyhow::Result<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
    let dir =
        data.or_else(home).context("neither XDG_DATA_HOME nor HOME says where hutch's key is")?.join("hutch");
    let key = dir.join("id_ed25519");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    // Two that start at once make one key.
    let lock = fs::File::options().create(true).append(true).open(dir.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    if !key.exists() {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "hutch", "-f"]).arg(&key);
        let made = keygen.status().context("cannot run ssh-keygen; install the package openssh-client")?;
        if !made.success() {
            bail!("ssh-keygen did not make {}", key.display());
        }
    }
    Ok(key)
}

/// The public key of `file`, or hutch's own: one line, as OpenSSH writes it.
pub fn public_key(file: Option<&Path>) -> anyhow::Result<String> {
    let path = match file {
        Some(path) => path.to_owned(),
        None => own_key()?.with_extension("pub"),
    };
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read the key {}", path.display()))?;
    let line = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
    let line = line.filter(|line| ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| line.starts_with(kind)));
    let line = line.with_context(|| format!("{} holds no public key; name the .pub file", path.display()))?;
    Ok(line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_public_key_is_taken() {
        let dir = std::env::temp_dir().join(format!("hutch-key-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let good = write("a.pub", "# mine\nssh-ed25519 AAAA me\n");
        assert_eq!(public_key(Some(&good)).unwrap(), "ssh-ed25519 AAAA me");
        let private = write("a", "-----BEGIN OPENSSH PRIVATE KEY-----\n");
        assert!(public_key(Some(&private)).unwrap_err().to_string().contains("no public key"));
        assert!(public_key(Some(&dir.join("none"))).is_err());
        fs::remove_dir_all(dir).unwrap();
    }
}
