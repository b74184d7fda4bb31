//! From a kernel file to a guest that is ready to run its first instruction.

mod bzimage;
pub use bzimage::{LoadError, Loaded, load};
