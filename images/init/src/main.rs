//! PID 1 of hutch's own initrd.
fn main() {}
