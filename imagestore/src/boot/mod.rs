//! What a guest wants to boot: the boot loader's configuration on its disk, read as the loader would read it.
//!
//! The formats here take text and give a [`BootEntry`]; only [`disk`] opens files, on the guest's disk. The kernel that a guest installs
//! is thereby the one that boots next, though no boot loader ever runs in the machine.

pub mod bls;
pub mod console;
pub mod disk;
pub mod extlinux;
mod fat;
mod foreign;
pub mod grub;
mod root;
mod script;

pub use console::with_serial_console;
pub use disk::{BootFiles, ReadError, entry, read};
pub use foreign::cmdline as foreign_cmdline;
pub use root::root;

/// The largest configuration file that is read, in bytes. grub-mkconfig writes about 10 KiB with three kernels.
pub const MAX_CONFIG: usize = 1 << 20;

/// One way to boot: what the boot loader would have loaded. Paths are absolute in their file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootEntry {
    /// The title in the loader's menu.
    pub title: String,
    /// The UUID of the file system that holds kernel and initrds, where the configuration names one; else they
    /// are on the file system that holds the configuration.
    pub fs_uuid: Option<String>,
    /// The kernel's path.
    pub kernel: String,
    /// The initrds' paths, to be loaded one after the other.
    pub initrds: Vec<String>,
    /// The kernel's command line, without the `BOOT_IMAGE=` that GRUB would put first.
    pub cmdline: String,
}

/// Why no [`BootEntry`] could be read from a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The text is larger than [`MAX_CONFIG`].
    #[error("the boot configuration has {size} bytes, more than the {MAX_CONFIG} that are read")]
    TooLarge {
        /// Its size in bytes.
        size: usize,
    },
    /// The text breaks the grammar of its format.
    #[error("boot configuration, line {line}: {what}")]
    Syntax {
        /// The line, from 1.
        line: usize,
        /// What was found or missing there.
        what: &'static str,
    },
    /// The script ran for too long or built too much text: a loop, or an attack.
    #[error("the boot configuration does more work than a boot configuration needs; does it loop?")]
    Exhausted,
    /// There is no entry to choose from.
    #[error(
        "the boot configuration has no entry; run the guest's update-grub or grub2-mkconfig, or name a kernel"
    )]
    NoEntry,
    /// The chosen entry loads no Linux kernel (a chain loader, firmware setup, …).
    #[error(
        "the default boot entry \"{title}\" loads no Linux kernel; choose another default or name a kernel"
    )]
    NotLinux {
        /// The entry's title.
        title: String,
    },
}

/// Refuses a text that is larger than any real configuration.
fn check_size(text: &str) -> Result<(), BootError> {
    if text.len() > MAX_CONFIG { Err(BootError::TooLarge { size: text.len() }) } else { Ok(()) }
}
