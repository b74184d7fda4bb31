//! `hutch ssh`, and the key it logs in with.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::mkdtemp;

use crate::cloud::client::Connection;
use crate::cloud::reach;

/// Arguments of `hutch ssh`.
#[derive(clap::Args)]
pub struct Args {
    /// An instance, by id or name; or an address, as `hutch boot` prints it.
    #[arg(value_name = "INSTANCE|ADDRESS")]
    to: String,
    /// The user.
    #[arg(long, short = 'l', default_value = "debian")]
    user: String,
    /// A private key instead of hutch's own.
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Wait so many seconds until the machine takes the login.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    #[command(flatten)]
    at: Connection,
    /// A command to run there; without one, a login.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Becomes ssh; where it is to wait, as soon as a login is taken.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let identity = args.identity.clone().map_or_else(own_key, Ok)?;
    let until = Instant::now() + Duration::from_secs(args.wait);
    let address = reach::address(&args.at, &args.to)?;
    let to = format!("{}@{address}", args.user);
    // It is written by ssh itself as soon as it is logged in, so that no second login has to find that out.
    // In a directory that only we can write: a name that others can guess might be theirs, or lead elsewhere.
    let room = mkdtemp(&std::env::temp_dir().join("hutch-ssh-XXXXXX"))
        .context("cannot make a temporary directory")?;
    let held = Room(room.clone());
    let mark = room.join("logged-in");
    while Instant::now() < until {
        // What is refused now may be taken later: cloud-init brings the key when sshd is there already.
        if listens(address) {
            let mut ssh = ssh(&identity, "QUIET");
            let touch = format!("LocalCommand=: >'{}'", mark.display());
            ssh.args(["-o", "PermitLocalCommand=yes", "-o", &touch]).arg(&to).args(&args.command);
            let status = ssh.status().context(NO_SSH)?;
            if fs::remove_file(&mark).is_ok() {
                return Ok(ExitCode::from(
                    status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(u8::MAX),
                ));
            }
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    if args.wait > 0 && !listens(address) {
        bail!("{address} took no connection within {} s; look at its console", args.wait);
    }
    // Nothing is dropped once this process is another.
    drop(held);
    Err(ssh(&identity, "ERROR").arg(&to).args(&args.command).exec()).context(NO_SSH)
}

/// A directory that goes with what is in it.
struct Room(PathBuf);

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const NO_SSH: &str = "cannot run ssh; install the package openssh-client";

/// ssh with what it needs to know of the machine, without where and the command.
fn ssh(identity: &Path, log_level: &str) -> Command {
    let mut ssh = Command::new("ssh");
    options(&mut ssh, identity, log_level);
    ssh
}

/// Likewise, for other programs with the same options.
pub fn options(ssh: &mut Command, identity: &Path, log_level: &str) {
    // A machine is new at every boot, and nobody can stand between it and this host.
    let options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"];
    ssh.args(options.iter().flat_map(|option| ["-o", option]));
    ssh.arg("-o").arg(format!("LogLevel={log_level}")).arg("-i").arg(identity);
}

/// Whether port 22 answers.
fn listens(address: Ipv4Addr) -> bool {
    TcpStream::connect_timeout(&SocketAddr::from((address, 22)), Duration::from_secs(2)).is_ok()
}

/// hutch's own key, made at its first use.
pub fn own_key() -> anyhow::Result<PathBuf> {
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
