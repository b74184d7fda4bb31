//! What a machine of `hutch boot` boots, and its disks.

use std::sync::Arc;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use hutch_blockdev::{Disk, Layer};
use hutch_imagestore::boot::BootFiles;
use hutch_vmm::config::{BootConfig, DiskConfig};
use hutch_vmm::launch::{self, Inherit};

use crate::args::Args;
use crate::disks;
use crate::{image, root, ssh};

/// The machine's disks, open from the first start to the last: the image's first, then the others as they were named.
pub struct Disks(Vec<(Vec<Layer>, bool)>);

impl Disks {
    /// Opens what `args` name.
    pub fn open(args: &Args) -> anyhow::Result<Disks> {
        let mut disks = Vec::new();
        if let Some(root) = &args.root {
            disks.push((root::layers(root)?, true));
        }
        if let Some(image) = &args.image {
            disks.push((disks::root_layers(&image::disk(image)?, args.root_volume.as_deref())?, false));
        }
        for arg in &args.disks {
            disks.push((disks::layers(arg)?, arg.read_only()));
        }
        Ok(Disks(disks))
    }

    /// Whether the kernel is read off the first disk.
    pub fn has_own_kernel(&self, args: &Args) -> bool {
        args.kernel.is_none()
    }

    /// What the machine boots: what was named, else what the image's boot loader would load now.
    pub fn boot(&self, args: &Args, inherit: &mut Inherit) -> anyhow::Result<BootConfig> {
        let (kernel, mut initrd, own) = match &args.kernel {
            Some(kernel) => {
                let initrd = args.initrd.as_deref().map(|path| launch::open(path, "initrd")).transpose()?;
                (inherit.open(kernel, "kernel")?, initrd, String::new())
            }
            None => {
                let files = self.own_boot_files(args)?;
                let initrd = (!files.initrd.is_empty()).then(|| launch::in_memory(&mut &files.initrd[..]));
                (inherit.bytes(&files.kernel)?, initrd.transpose()?, files.entry.cmdline)
            }
        };
        let line = if args.root.is_some() {
            initrd = Some(root::initrd(initrd)?);
            let start =
                hutch_imagestore::boot::root(&self.first()?, &own)?.context("the root is an empty disk")?;
            format!(
                "console=ttyS0 panic=1 rdinit={} hutch.root=/dev/vda hutch.start={}",
                root::INIT,
                start / hutch_blockdev::disk::SECTOR
            )
        } else if args.kernel.is_some() {
            "console=ttyS0 panic=1".into()
        } else {
            let own = hutch_imagestore::boot::with_serial_console(&own);
            format!("{own} hutch.key={}", BASE64.encode(ssh::public_key(args.key.as_deref())?))
        };
        Ok(BootConfig {
            kernel,
            initrd: initrd.map(|file| inherit.give(file.into())),
            cmdline: cmdline(args, &line)?,
        })
    }

    /// What the boot loader of the first disk would load now.
    fn own_boot_files(&self, args: &Args) -> anyhow::Result<BootFiles> {
        let image = args.image.as_ref().or(args.root.as_ref());
        let image = image.context("nothing to boot: name an IMAGE or a --kernel")?;
        if image.is_dir() {
            bail!("the directory {} has no boot loader: name a --kernel, and its --initrd", image.display());
        }
        let what = || format!("cannot boot the image {}", image.display());
        hutch_imagestore::boot::read(&self.first().with_context(what)?).with_context(what)
    }

    /// The first disk, to be read here and now.
    fn first(&self) -> anyhow::Result<Arc<dyn Disk>> {
        let (layers, _) = self.0.first().context("the machine has no disk")?;
        disks::open(layers)
    }

    /// Lends the disks to the machine.
    pub fn give(&self, inherit: &mut Inherit) -> anyhow::Result<Vec<DiskConfig>> {
        let give = |(index, (layers, read_only)): (usize, &(Vec<Layer>, bool))| {
            Ok(inherit.disk(layers, format!("vol{index:017x}"), *read_only)?)
        };
        self.0.iter().enumerate().map(give).collect()
    }
}

fn cmdline(args: &Args, first: &str) -> anyhow::Result<String> {
    let mut words = vec![first.trim().to_owned(), args.append.trim().to_owned()];
    if !args.command.is_empty() {
        words.push("quiet".into());
        if args.console {
            words.push("hutch.console=ttyS0".into());
        }
        words.push(format!("hutch.cmd={}", hex(&args.command)));
    }
    words.retain(|w| !w.is_empty());
    let line = words.join(" ");
    if line.len() > hutch_vmm::plan::CMDLINE_MAX {
        bail!(
            "the kernel's command line is {} bytes long, {} at most; shorten --append or the command",
            line.len(),
            hutch_vmm::plan::CMDLINE_MAX
        );
    }
    Ok(line)
}

/// The arguments as hutch's init reads them: hexadecimal, a NUL after each.
fn hex(command: &[String]) -> String {
    command.iter().flat_map(|word| word.bytes().chain([0])).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_encoded_as_init_reads_them() {
        assert_eq!(hex(&["ls".into(), "-l bé".into()]), "6c73002d6c2062c3a900");
    }
}
