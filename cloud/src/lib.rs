//! The nouns and verbs of EC2, and what is true of them.
//!
//! ```text
//!   store    where the state is: ordered keys under transactions
//!   types    instance types: what a name such as t3.micro stands for
//! ```
#![forbid(unsafe_code)]

pub mod store;
pub mod types;
