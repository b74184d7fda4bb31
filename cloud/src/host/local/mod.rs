//! This machine as a host.
//!
//! ```text
//!   volumes   what machines write to and what is kept of it: qcow2 on templates and snapshots, each with our record
//!   process   a machine's process: recorded, found again by the next daemon, watched, ended
//! ```

mod process;
mod volumes;

pub use process::{Identity, Process};
pub use volumes::{Files, Volumes};
