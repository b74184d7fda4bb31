//! The images that `images/build-debian` makes, from qcow2 to kernel. `HUTCH_AMI=FILE.qcow2` names one; without it
//! there is nothing to look at.

use std::fs::File;
use std::process::Command;

use hutch_blockdev::{Format as DiskFormat, open_layers};
use hutch_imagestore::boot;
use hutch_imagestore::import::{Limits, Request, import};
use hutch_imagestore::store::{Architecture, Format, Store};

#[test]
#[ignore = "needs HUTCH_AMI, an image by images/build-debian"]
fn a_debian_ami_is_imported_and_its_kernel_found() {
    let ami = std::env::var("HUTCH_AMI").expect("HUTCH_AMI=FILE.qcow2, as images/build-debian prints it");
    let room = tempfile::tempdir().unwrap();
    let store = Store::open(room.path()).unwrap();
    let request = Request {
        name: "debian".to_owned(),
        format: Some(Format::Qcow2),
        architecture: Architecture::X86_64,
        limits: Limits::default(),
    };
    let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
    let source = File::open(&ami).unwrap();
    let image = import(&store, &source, &request, worker, &mut |_, _| {}).unwrap();

    // Straight from the qcow2, and from the template: the same.
    let of_source = open_layers(vec![(source, DiskFormat::Qcow2)], true).unwrap();
    let of_template = open_layers(vec![(File::open(image.disk()).unwrap(), DiskFormat::Raw)], true).unwrap();
    let files = boot::read(&of_template).unwrap();
    assert!(boot::read(&of_source).unwrap() == files);
    assert!(files.entry.kernel.starts_with("/boot/vmlinuz-"), "{}", files.entry.kernel);
    assert!(files.entry.cmdline.starts_with("root=UUID="), "{}", files.entry.cmdline);
    assert!(files.entry.cmdline.contains("console=ttyS0"), "{}", files.entry.cmdline);
    assert_eq!(&files.kernel[0x202..0x206], b"HdrS", "a bzImage");
    assert!(files.initrd.len() > 1 << 20);

    // Until they are closed they are locked, as blockdev locks what it reads.
    drop((of_source, of_template));
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-q", "-f", "qcow2", "-F", "raw", &ami]).arg(image.disk());
    assert!(compare.status().unwrap().success());
}
