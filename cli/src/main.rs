//! The program `hutch`.
fn main() {}
