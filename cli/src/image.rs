//! `hutch image`: the templates that machines are made of, and kernels and RAM disks that they can be started with.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use hutch_imagestore::import::{Limits, Request, import, open};
use hutch_imagestore::kernels;
use hutch_imagestore::store::{Architecture, Format, Image, Kind, Store, StoreError};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cloud::images::{self, Ami};
use crate::output::{self, Output};

/// Arguments of `hutch image`.
#[derive(clap::Args)]
pub struct Args {
    /// Where images are kept.
    #[arg(long, value_name = "DIR", env = "HUTCH_STATE", default_value = DEFAULT_STATE, global = true)]
    state: PathBuf,
    #[command(subcommand)]
    command: Image_,
}

/// Where everything of hutch's is kept that outlives a reboot.
const DEFAULT_STATE: &str = "/var/lib/hutch";

#[derive(Subcommand)]
enum Image_ {
    /// Build an image from Debian packages (as root; from a checkout) and import it.
    Build {
        /// Which one.
        recipe: Recipe,
    },
    /// Import a file with a disk (raw, also gzip-, xz- or zstd-compressed; qcow2, VMDK, VHD, VHDX) as a template that nobody can write, or a kernel or a RAM disk to start instances with.
    Import {
        /// The file.
        file: PathBuf,
        /// The image's name. [default: the file's; of a disk, without its extension]
        #[arg(long)]
        name: Option<String>,
        /// It is a kernel: a bzImage (vmlinuz), or a vmlinux with PVH, of 128 MiB at most.
        #[arg(long, conflicts_with_all = ["ramdisk", "format"])]
        kernel: bool,
        /// It is a RAM disk (an initramfs): a cpio archive, compressed or not, of 512 MiB at most.
        #[arg(long, conflicts_with = "format")]
        ramdisk: bool,
        /// The file's format; checked once, now, when it is not said.
        #[arg(long, value_enum)]
        format: Option<FormatArg>,
        /// Do nothing where there is an image of this name.
        #[arg(long)]
        keep: bool,
    },
    /// List the images.
    Ls {
        /// How to print.
        #[arg(long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Remove images. Machines that run on them go on.
    Rm {
        /// Ids or names.
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    #[command(flatten)]
    Ami(Ami),
    /// Show an image, and what it boots.
    Inspect {
        /// Id or name.
        image: String,
        /// How to print.
        #[arg(long, value_enum, default_value_t = Output::Text)]
        output: Output,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Recipe {
    #[value(name = "debian-12-lean")]
    Debian12Lean,
    #[value(name = "debian-12")]
    Debian12,
    #[value(name = "debian-13")]
    Debian13,
}

/// How a file keeps a disk.
#[derive(Clone, Copy, ValueEnum)]
pub enum FormatArg {
    Raw,
    Qcow2,
    #[value(name = "raw.gz")]
    RawGz,
    #[value(name = "raw.xz")]
    RawXz,
    #[value(name = "raw.zst")]
    RawZst,
    Vmdk,
    Vhd,
    Vhdx,
}

/// The image's disk that `name` names: in the store by id or name, else a file.
pub fn disk(name: &Path) -> anyhow::Result<PathBuf> {
    if is_file(name) {
        return Ok(name.to_owned());
    }
    let image = stored(name)?;
    match image.record.kind {
        Kind::Machine => Ok(image.disk()),
        kind => bail!("{} is a {}, not an image with a disk", name.display(), kind.name()),
    }
}

/// The id of the image that `name` names; a file has none.
pub fn id(name: &Path) -> Option<String> {
    if is_file(name) { None } else { stored(name).ok().map(|image| image.record.id) }
}

fn is_file(name: &Path) -> bool {
    name.to_string_lossy().contains('/') || name.exists()
}

fn stored(name: &Path) -> anyhow::Result<Image> {
    let name = name.to_string_lossy();
    let state = std::env::var_os("HUTCH_STATE").map_or_else(|| PathBuf::from(DEFAULT_STATE), PathBuf::from);
    if !state.join("images").is_dir() {
        bail!("there is no image {name}: no file of this name, and no images in {}", state.display());
    }
    Ok(Store::open(&state)?.get(&name)?)
}

/// Carries the command out.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let store = || open_store(&args.state);
    match &args.command {
        Image_::Ami(command) => return images::run(command),
        Image_::Build { recipe } => {
            let name = recipe.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default();
            let file = build(&name)?;
            print_image(&import_file(store, &file, &name, Some(Format::Qcow2), true)?, Output::Text)?;
        }
        Image_::Import { file, name, kernel, ramdisk, keep, .. } if *kernel || *ramdisk => {
            // What is behind a dot is its version.
            let own = file.file_name().map(|s| s.to_string_lossy().into_owned());
            let name = name.clone().or(own).context("name the image (--name)")?;
            let kind = if *kernel { Kind::Kernel } else { Kind::Ramdisk };
            print_image(&import_boot_file(store, file, kind, &name, *keep)?, Output::Text)?;
        }
        Image_::Import { file, name, format, keep, .. } => {
            let name = name.clone().or_else(|| stem(file)).context("name the image (--name)")?;
            let format = format.map(|format| match format {
                FormatArg::Raw => Format::Raw,
                FormatArg::Qcow2 => Format::Qcow2,
                FormatArg::RawGz => Format::RawGz,
                FormatArg::RawXz => Format::RawXz,
                FormatArg::RawZst => Format::RawZst,
                FormatArg::Vmdk => Format::Vmdk,
                FormatArg::Vhd => Format::Vhd,
                FormatArg::Vhdx => Format::Vhdx,
            });
            print_image(&import_file(store, file, &name, format, *keep)?, Output::Text)?;
        }
        Image_::Ls { output } => {
            let images = store()?.list()?;
            let rows = images.iter().map(|image| {
                let r = &image.record;
                let kind = r.kind.name().to_owned();
                [r.id.clone(), r.name.clone(), kind, size(r.virtual_size), output::time(r.created)]
            });
            output::list(
                *output,
                ["ID", "NAME", "TYPE", "SIZE", "CREATED"],
                rows,
                &images.iter().map(|i| &i.record).collect::<Vec<_>>(),
            )?;
        }
        Image_::Rm { images } => {
            let store = store()?;
            // All are there, or none is removed.
            for image in images {
                store.get(image)?;
            }
            for image in images {
                println!("removed {}", store.remove(image)?.id);
            }
        }
        Image_::Inspect { image, output } => print_image(&store()?.get(image)?, *output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A disk file's name without its extension; `disk.raw.gz` and `disk.img.xz` have two.
fn stem(file: &Path) -> Option<String> {
    let stem = Path::new(file.file_stem()?);
    let packed = file.extension().is_some_and(|e| ["gz", "xz", "zst"].iter().any(|own| e == *own));
    let two = packed && stem.extension().is_some_and(|e| ["raw", "img"].iter().any(|own| e == *own));
    let stem = if two { stem.file_stem()? } else { stem.as_os_str() };
    Some(stem.to_string_lossy().into_owned())
}

/// Runs a recipe, which says what it does; it prints the file it made.
fn build(name: &str) -> anyhow::Result<PathBuf> {
    let recipe = Path::new("images/build-debian");
    if !recipe.exists() {
        bail!("images are built from a checkout of hutch: run this there, or import an image file");
    }
    let made = Command::new(recipe).arg(name).stderr(std::process::Stdio::inherit()).output();
    let made = made.context("cannot run images/build-debian")?;
    if !made.status.success() {
        bail!("images/build-debian {name} failed ({}); what it said is above", made.status);
    }
    Ok(String::from_utf8_lossy(&made.stdout).trim().into())
}

/// Opens the store in `state`, or says what to do.
fn open_store(state: &Path) -> anyhow::Result<Store> {
    Store::open(state).map_err(|error| {
        let kind = if let StoreError::Io { source, .. } = &error { Some(source.kind()) } else { None };
        let error = anyhow::Error::from(error);
        match kind {
            Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                error.context("run as root, or choose another directory with --state")
            }
            Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                error.context("make room, or choose another directory with --state")
            }
            _ => error,
        }
    })
}

fn import_file(
    store: impl FnOnce() -> anyhow::Result<Store>,
    path: &Path,
    name: &str,
    format: Option<Format>,
    keep: bool,
) -> anyhow::Result<Image> {
    let what = || format!("cannot import {}", path.display());
    // Before the store, which is made by being opened: for what cannot be imported, none is.
    let source = open(path).with_context(what)?;
    let store = store()?;
    if keep && let Ok(image) = store.get(name) {
        return Ok(image);
    }
    let request = Request {
        name: name.to_owned(),
        format,
        architecture: Architecture::X86_64,
        limits: Limits::default(),
    };
    let worker = Command::new(std::env::current_exe()?.with_file_name("hutch-import-worker"));
    let mut progress = Progress::new(name);
    let image = import(&store, &source, &request, worker, &mut |done, total| progress.show(done, total));
    let image = image.with_context(what)?;
    progress.end();
    Ok(image)
}

fn import_boot_file(
    store: impl FnOnce() -> anyhow::Result<Store>,
    path: &Path,
    kind: Kind,
    name: &str,
    keep: bool,
) -> anyhow::Result<Image> {
    let what = || format!("cannot import {} as a {}", path.display(), kind.name());
    let source = open(path).with_context(what)?;
    let store = store()?;
    if keep && let Ok(image) = store.get(name) {
        return Ok(image);
    }
    let mut progress = Progress::new(name);
    let kernel = |file: &File| hutch_vmm::boot::check(file).map_err(|e| e.to_string());
    let image = kernels::import(&store, &source, kind, name, &kernel, &mut |done, total| {
        progress.show(done, total);
    });
    let image = image.with_context(what)?;
    progress.end();
    Ok(image)
}

/// A bar on a terminal, a line every few seconds elsewhere.
struct Progress {
    bar: Option<ProgressBar>,
    name: String,
    started: Instant,
    said: Instant,
}

impl Progress {
    fn new(name: &str) -> Progress {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0).with_message(format!("importing {name}"));
            style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
        });
        Progress { bar, name: name.to_owned(), started: Instant::now(), said: Instant::now() }
    }

    fn show(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if self.said.elapsed() > Duration::from_secs(5) {
            self.said = Instant::now();
            eprintln!("importing {}: {} of {}", self.name, size(done), size(total));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        eprintln!("imported {} in {:.1} s", self.name, self.started.elapsed().as_secs_f64());
    }
}

/// An image, and what its boot loader's configuration says.
fn print_image(image: &Image, output: Output) -> anyhow::Result<()> {
    let record = &image.record;
    if record.kind != Kind::Machine {
        if matches!(output, Output::Json | Output::Yaml) {
            return output::record(output, &serde_json::json!({ "image": record }));
        }
        print_record(image);
        return Ok(());
    }
    let file = File::open(image.disk()).context("cannot open the image's disk")?;
    let disk = hutch_blockdev::open_layers(vec![(file, hutch_blockdev::Format::Raw)], true)?;
    let boots = hutch_imagestore::boot::read(&disk).map(|files| files.entry);
    if matches!(output, Output::Json | Output::Yaml) {
        let boot =
            boots.ok().map(|entry| serde_json::json!({ "kernel": entry.kernel, "cmdline": entry.cmdline }));
        return output::record(output, &serde_json::json!({ "image": record, "boot": boot }));
    }
    print_record(image);
    match boots {
        Ok(entry) => println!("boots     {} {}", entry.kernel, entry.cmdline),
        Err(e) => println!("boots     not by itself: {e}"),
    }
    Ok(())
}

fn print_record(image: &Image) {
    let record = &image.record;
    println!("id        {}", record.id);
    println!("name      {}", record.name);
    println!("type      {}", record.kind.name());
    println!("size      {}", size(record.virtual_size));
    println!("created   {}", output::time(record.created));
    println!("sha256    {}", record.source_sha256);
}

/// Bytes for people, in powers of 1024.
pub fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => {
            let whole = bytes as f64 / (1_u64 << shift) as f64;
            if whole.fract() < 0.05 { format!("{whole:.0} {unit}") } else { format!("{whole:.1} {unit}") }
        }
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_called_as_its_file_without_what_says_its_format() {
        for (file, name) in [
            ("a/b.qcow2", "b"),
            ("b.raw.gz", "b"),
            ("b.img.xz", "b"),
            ("b.zst", "b"),
            ("debian-12.1.raw", "debian-12.1"),
        ] {
            assert_eq!(stem(Path::new(file)).as_deref(), Some(name));
        }
    }

    #[test]
    fn sizes_are_for_people() {
        assert_eq!(
            [size(0), size(1 << 20), size(3 << 29), size(1023)],
            ["0 B", "1 MiB", "1.5 GiB", "1023 B"]
        );
    }
}
