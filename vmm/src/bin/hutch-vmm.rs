//! One process, one guest.
fn main() {}
