//! The nouns and verbs of EC2, and what is true of them.
//!
//! ```text
//!   region   the verbs: checked whole, written as what is to be; the reconciler brings the host to it
//!     ├─ model      the records          ├─ fault, id    EC2's errors and ids
//!     ├─ store      where they are: ordered keys under transactions
//!     ├─ host       what runs the machines: a trait, simulated or local
//!     ├─ keyring    what wraps the keys of encrypted volumes
//!     ├─ metadata   what an instance is told        types    what a name such as t3.micro stands for
//!     ├─ addresses  which public addresses there are    speed    how fast volumes and instances are
//!     ├─ export     a snapshot as a file; whether it is whole
//!     ├─ objects    where stored images are: buckets, in a directory or in S3     archive    disks in one stream     bundle    one disk in parts
//!     └─ backup     all of it, copied while it is used, and a state made of that
//! ```
#![forbid(unsafe_code)]

pub mod addresses;
pub mod archive;
pub mod backup;
pub mod bundle;
pub mod export;
pub mod fault;
pub mod host;
pub mod id;
pub mod keyring;
pub mod limits;
pub mod metadata;
pub mod model;
pub mod objects;
pub mod region;
pub mod speed;
pub mod store;
pub mod types;
