//! A target for libFuzzer.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| hutch_fuzz::wire(bytes));
