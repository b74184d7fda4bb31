//! EC2 on the wire: translation only, no decisions.
//!
//! ```text
//!   query   the protocol: signed forms in, XML out        ec2    EC2's operations as verbs of `cloud`
//!   imds    the instance metadata service, 169.254.169.254 as a guest sees it
//! ```
#![forbid(unsafe_code)]

pub mod ec2;
pub mod imds;
pub mod query;
