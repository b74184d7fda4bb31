//! The daemon: `hutchd`, a region or several on this machine, behind EC2's own protocol.
//!
//! ```text
//!   main.rs      what it may be told; start and end        keys.rs    access keys
//!   service.rs   calls: who may how often, what is counted          guests.rs  what guests are told of themselves
//!   jobs.rs      snapshots written to files, and checked
//!   owner.rs     backups and figures: what is asked of the daemon beside EC2
//! ```
#![forbid(unsafe_code)]

mod guests;
mod jobs;
mod keys;
mod owner;
mod service;

use std::fs::{self, DirBuilder, File};
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Parser;
use hutch_api::ec2::Regions;
use hutch_api::query::server::{Listener, serve};
use hutch_cloud::addresses::Pool;
use hutch_cloud::host::local::{Local, Means, Together};
use hutch_cloud::host::{Host, Simulated};
use hutch_cloud::keyring::Keyring;
use hutch_cloud::limits::Limits;
use hutch_cloud::objects::Objects;
use hutch_cloud::region::{Reconciler, Region, Settings, lifecycle};
use hutch_cloud::store::{Sqlite, Store};
use hutch_cloud::types::Table;
use listenfd::ListenFd;
use sd_notify::NotifyState;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use guests::Guests;
use keys::{Key, Keys};
use owner::Owner;
use service::{Rate, Service};

/// How often templates that were imported meanwhile are looked for.
const LOOK: Duration = Duration::from_secs(10);

/// EC2 on this machine: serves the EC2 Query API to the aws CLI, boto3, Terraform and Ansible.
#[derive(Parser)]
#[command(name = "hutchd", version)]
struct Args {
    /// Where clients come: ADDRESS:PORT, or unix:PATH; may be given more than once. Port 0 takes a free one. Sockets that
    /// systemd hands over are used instead.
    #[arg(long, default_values = ["127.0.0.1:8773"])]
    listen: Vec<Place>,
    /// The directory of all that is kept, or `memory`: nothing is.
    #[arg(long, env = "HUTCH_STATE", default_value = "/var/lib/hutch")]
    state: PathBuf,
    /// The regions, each with a store of its own below the state.
    #[arg(long, value_delimiter = ',', default_value = "home-1")]
    regions: Vec<RegionName>,
    /// The letters of each region's zones: `a`, or `abc`.
    #[arg(long, default_value = "a")]
    zones: String,
    /// What runs the instances.
    #[arg(long, default_value = "local")]
    host: HostKind,
    /// A program that wraps and unwraps the keys of encrypted volumes (`PROGRAM id`, `PROGRAM wrap|unwrap ID VOLUME`, base64 in and
    /// out); else the key in STATE/keys does, which is made at the first start and is in no backup.
    #[arg(long, value_name = "PROGRAM")]
    key_command: Option<PathBuf>,
    /// Start instances again that ran when the host went down; else they are stopped then.
    #[arg(long)]
    resume: bool,
    /// The directory below which disks may be imported by file:// URLs (ImportImage, ImportSnapshot), by every account.
    #[arg(long, value_name = "DIR")]
    import_dir: Option<PathBuf>,
    /// Where stored images are, for all regions: file:///DIR, or s3://BUCKET/PREFIX with AWS_* of the environment (key, endpoint,
    /// AWS_ALLOW_HTTP) or options behind a `?`. [default: STATE/objects]
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    /// How long starting and stopping takes on the simulated host, in milliseconds.
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// An access key beside those that are kept.
    #[arg(long, value_name = "ID:SECRET[:ACCOUNT]")]
    root_key: Option<Key>,
    /// How many calls of one kind an account may make at once, and a second after that; 0 is any number.
    #[arg(long, value_name = "BURST:PER-SECOND", default_value = "100:20")]
    rate: Rate,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum HostKind {
    /// This machine: KVM, taps and nftables, as root. It has the images of `hutch image`; regions share its memory and its
    /// addresses.
    Local,
    /// Keeps what would run, and starts nothing: neither KVM nor root. Of the images of `hutch image` it takes kernels and RAM disks.
    Simulated,
}

/// Where clients come.
#[derive(Debug, Clone)]
enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        match text.strip_prefix("unix:") {
            Some(path) => Ok(Place::Unix(path.into())),
            None => text.parse().map(Place::Tcp).map_err(|_| "it is ADDRESS:PORT or unix:PATH".into()),
        }
    }
}

/// A region's name: it is a directory's, too.
#[derive(Debug, Clone)]
struct RegionName(String);

impl FromStr for RegionName {
    type Err = String;

    fn from_str(text: &str) -> Result<RegionName, String> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let fits = (1..=32).contains(&text.len()) && text.bytes().all(plain);
        match fits && text.starts_with(|c: char| c.is_ascii_lowercase()) && !text.ends_with('-') {
            true => Ok(RegionName(text.into())),
            false => Err("a region's name is like home-1: letters, digits and dashes".into()),
        }
    }
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HUTCH_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // It says so where nothing can be written either, and would end the thread.
        .log_internal_errors(false)
        .init();
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hutchd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    // Before there are threads: it reads the environment.
    let handed = ListenFd::from_env();
    let state = (args.state.as_os_str() != "memory").then_some(args.state.as_path());
    let letters: Vec<char> = args.zones.chars().collect();
    if letters.is_empty() || letters.iter().any(|letter| !letter.is_ascii_lowercase()) {
        bail!("--zones {}: zones are letters, such as abc", args.zones);
    }
    // Held until the end: two daemons on one state would undo each other's work.
    let _lock = state.map(lock).transpose()?;
    let keys = Keys::open(state, args.root_key.clone())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let types = own(state, "instance-types.toml", |text| Table::read(text).map_err(anyhow::Error::msg))?;
    let limits = own(state, "limits.toml", |text| Ok(Limits::read(text)?))?;
    let addresses = own(state, "addresses.toml", |text| Ok(Pool::read(text)?))?;
    let policies = own(state, "lifecycle.toml", |text| lifecycle::read(text).map_err(anyhow::Error::msg))?;
    let import_dir = args.import_dir.as_deref().map(|dir| {
        let whole = dir.canonicalize().ok().filter(|dir| dir.is_dir());
        whole.with_context(|| format!("--import-dir {}: there is no such directory", dir.display()))
    });
    let import_dir = import_dir.transpose()?;
    let objects = Arc::new(objects(args.object_store.as_deref(), state, runtime.handle())?);
    let mut regions = Regions::new();
    let mut reconcilers = Vec::new();
    let together = Arc::new(Together::default());
    for RegionName(name) in &args.regions {
        let dir = state.map(|state| state.join(name));
        let settings = Settings {
            name: name.clone(),
            zones: letters.clone(),
            types: types.clone(),
            limits: limits.clone(),
            addresses: addresses.clone(),
            owner: keys.owner().into(),
            resume: args.resume,
            import_dir: import_dir.clone(),
        };
        let region = open(settings, dir.as_deref(), args, &together, runtime.handle(), &objects)
            .with_context(|| format!("the region {name}"))?;
        regions.insert(name.clone(), region);
    }
    Region::meet(&regions)?;
    for region in regions.values() {
        reconcilers.push(Reconciler::start(region.clone())?);
    }
    let owner = Owner::new(state, keys.owner());
    let service = Arc::new(Service::new(regions, keys, owner, policies, args.rate));
    let attended = runtime.block_on(attend(args, handed, service.clone()));
    service.end();
    attended?;
    // Calls are over; each reconciler ends its step. Machines run on.
    drop(reconcilers);
    Ok(())
}

/// What a file of the state says, which its owner may write; without one, what an empty file would say.
fn own<T>(state: Option<&Path>, name: &str, read: impl Fn(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let path = state.map(|state| state.join(name));
    let text = match path.as_deref().map(std::fs::read_to_string) {
        Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        Some(Ok(text)) => Ok(text),
        _ => Ok(String::new()),
    };
    let told = || path.unwrap_or_default().display().to_string();
    text.map_err(Into::into).and_then(|text| read(&text)).with_context(told)
}

/// A region on its store and its host.
fn open(
    settings: Settings,
    dir: Option<&Path>,
    args: &Args,
    together: &Arc<Together>,
    runtime: &Handle,
    objects: &Arc<Objects>,
) -> anyhow::Result<Arc<Region>> {
    let delay = Duration::from_millis(args.delay);
    if let Some(dir) = dir {
        own_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let store: Arc<dyn Store> = match dir {
        Some(dir) => Arc::new(Sqlite::open(&dir.join("store.db"))?),
        None => Arc::new(Sqlite::memory()?),
    };
    let host: Arc<dyn Host> = match (args.host, dir) {
        (HostKind::Local, Some(dir)) => {
            Arc::new(local(args, &dir.join("host"), &settings.name, together, runtime)?)
        }
        (HostKind::Local, None) => bail!("real machines need a --state directory; or take --host simulated"),
        (HostKind::Simulated, Some(dir)) => {
            let images = hutch_imagestore::store::Store::open(&args.state)?;
            let host = Simulated::open(dir.join("host"), delay)?;
            Arc::new(host.with_images(images).with_importer(importer()?))
        }
        (HostKind::Simulated, None) => Arc::new(Simulated::memory(delay)),
    };
    let region = Arc::new(Region::new(settings, store, host).with_objects(objects.clone()));
    region.adopt_templates()?;
    Ok(region)
}

/// Where stored images are.
fn objects(url: Option<&str>, state: Option<&Path>, runtime: &Handle) -> anyhow::Result<Objects> {
    let runtime = runtime.clone();
    match (url, state) {
        (Some(url), _) => Objects::open(url, runtime),
        (None, Some(state)) => Objects::directory(&state.join("objects"), runtime),
        (None, None) => Ok(Objects::memory(runtime)),
    }
    .map_err(|why| anyhow::anyhow!("--object-store: {why}"))
}

/// The program that reads disks to be imported: beside this one.
fn importer() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("hutch-import-worker"))
}

/// This machine as a host.
fn local(
    args: &Args,
    dir: &Path,
    region: &str,
    together: &Arc<Together>,
    runtime: &Handle,
) -> anyhow::Result<Local> {
    let state = &args.state;
    if !nix::unistd::geteuid().is_root() {
        bail!("taps and the firewall need root: run hutchd as root, or take --host simulated");
    }
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("cannot open /dev/kvm; `hutch doctor` tells what to do")?;
    own_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let means = Means {
        vmm: hutch_vmm::launch::program()?,
        importer: importer()?,
        networks: hutch_netfw::guest::records_dir()?,
        region: region.into(),
        together: together.clone(),
        metadata: Box::new(Guests::open(state, runtime.clone())?),
    };
    let images = hutch_imagestore::store::Store::open(state)?;
    Ok(Local::open(dir, images, keyring(state, args)?, means)?)
}

/// What wraps the keys of volumes that are encrypted.
fn keyring(state: &Path, args: &Args) -> anyhow::Result<Keyring> {
    Ok(match &args.key_command {
        Some(program) => Keyring::command(program)?,
        None => Keyring::open(&state.join("keys"))?,
    })
}

/// Makes a directory that only we look into: user data may hold secrets.
fn own_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn lock(state: &Path) -> anyhow::Result<File> {
    own_dir(state)
        .with_context(|| format!("cannot make {}; name another directory with --state", state.display()))?;
    let path = state.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => bail!(
            "another hutchd has {}; stop it first, or name another directory with --state",
            state.display()
        ),
    }
}

/// The sockets that systemd opened for us, if it did.
fn taken(mut handed: ListenFd) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for index in 0..handed.len() {
        let listener = match handed.take_tcp_listener(index) {
            Ok(Some(listener)) => {
                println!("hutchd: listening on http://{}", listener.local_addr()?);
                listener.set_nonblocking(true)?;
                Listener::Tcp(tokio::net::TcpListener::from_std(listener)?)
            }
            _ => {
                let listener = handed.take_unix_listener(index)?.context("a socket was handed over twice")?;
                listener.set_nonblocking(true)?;
                Listener::Unix(tokio::net::UnixListener::from_std(listener)?)
            }
        };
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Tells systemd, where it wants to know.
fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd does not hear us");
    }
}

/// Serves until a signal comes.
async fn attend(args: &Args, handed: ListenFd, service: Arc<Service>) -> anyhow::Result<()> {
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    let mut sockets = Vec::new();
    let mut listeners = taken(handed)?;
    for place in args.listen.iter().filter(|_| listeners.is_empty()).collect::<Vec<_>>() {
        listeners.push(match place {
            Place::Tcp(address) => {
                let listener = tokio::net::TcpListener::bind(address).await;
                let listener = listener.with_context(|| format!("cannot listen on {address}"))?;
                println!("hutchd: listening on http://{}", listener.local_addr()?);
                Listener::Tcp(listener)
            }
            Place::Unix(path) => {
                // Nobody else has the state's lock: a socket that is there is left over.
                let _ = fs::remove_file(path);
                let listener = tokio::net::UnixListener::bind(path);
                let listener =
                    listener.with_context(|| format!("cannot make the socket {}", path.display()))?;
                println!("hutchd: listening on unix:{}", path.display());
                sockets.push(path.clone());
                Listener::Unix(listener)
            }
        });
    }
    for listener in listeners {
        let mut stopped = stopped.clone();
        let service = service.clone();
        servers.spawn(serve(listener, service, async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        }));
    }
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut look = tokio::time::interval(LOOK);
    let watched = sd_notify::watchdog_enabled();
    let mut alive = tokio::time::interval(watched.map_or(LOOK, |limit| limit / 2));
    tell(&[NotifyState::Ready]);
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = alive.tick(), if watched.is_some() => tell(&[NotifyState::Watchdog]),
            _ = look.tick() => {
                let service = service.clone();
                tokio::task::spawn_blocking(move || service.look_after());
            }
            ended = servers.join_next() => {
                ended.context("there is nowhere to listen")???;
                bail!("a listener ended by itself");
            }
        }
    }
    tell(&[NotifyState::Stopping]);
    tracing::info!("ending: calls that run are finished");
    let _ = stop.send(true);
    while servers.join_next().await.is_some() {}
    for socket in sockets {
        let _ = fs::remove_file(socket);
    }
    Ok(())
}
