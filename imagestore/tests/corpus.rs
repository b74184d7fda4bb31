//! Images of `qemu-img` with every option that it has, imported by the real worker: what is taken holds what QEMU reads from it.

#[allow(dead_code, reason = "each program uses a part")]
#[path = "../../blockdev/tests/common/corpus.rs"]
mod corpus;
#[allow(dead_code, reason = "each program uses a part")]
#[path = "../../blockdev/tests/common/rng.rs"]
mod rng;

use std::fs::{self, File};
use std::process::Command;

use hutch_imagestore::import::{ImportError, Limits, Request, import};
use hutch_imagestore::store::{Architecture, Store};

#[test]
fn each_holds_what_qemu_reads_from_it_or_is_refused() {
    let content = corpus::content();
    let (mut taken, mut refused) = (0, 0);
    for kind in corpus::others().into_iter().chain(corpus::qcow2()) {
        let room = tempfile::tempdir().unwrap();
        fs::write(room.path().join("raw"), &content).unwrap();
        let Some(source) = kind.make(room.path()) else { continue };
        let store = Store::open(&room.path().join("state")).unwrap();
        let request = Request {
            name: "image".to_owned(),
            format: None,
            architecture: Architecture::X86_64,
            limits: Limits::default(),
        };
        let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
        // It is closed then: who reads a raw disk or a qcow2 locks it.
        let done = import(&store, &File::open(source).unwrap(), &request, worker, &mut |_, _| {});
        match done {
            Err(ImportError::Refused(why)) => {
                assert!(!kind.refused.is_empty() && why.contains(kind.refused), "{:?}: {why}", kind.commands);
                refused += 1;
            }
            Ok(image) => {
                assert!(kind.refused.is_empty(), "{:?} is taken", kind.commands);
                assert!(fs::read(image.disk()).unwrap() == kind.content(room.path()), "{:?}", kind.commands);
                taken += 1;
            }
            Err(other) => panic!("{:?}: {other}", kind.commands),
        }
    }
    assert!(taken > 70 && refused > 10, "{taken} taken, {refused} refused");
}
