//! This machine as a host.
//!
//! ```text
//!   volumes   what machines write to and what is kept of it: qcow2 on templates and snapshots, each with our record
//! ```

mod volumes;

pub use volumes::{Files, Volumes};
