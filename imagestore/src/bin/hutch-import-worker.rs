//! The process that reads an image while it is imported; started by `hutch_imagestore::import` alone.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1) {
        Some(task) => hutch_imagestore::import::worker(&task),
        None => {
            eprintln!("hutch-import-worker: is started by an import, never by hand");
            ExitCode::FAILURE
        }
    }
}
