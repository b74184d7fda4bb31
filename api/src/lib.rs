//! EC2 on the wire: translation only, no decisions.
//!
//! ```text
//!   imds    the instance metadata service, 169.254.169.254 as a guest sees it
//! ```
#![forbid(unsafe_code)]

pub mod imds;
