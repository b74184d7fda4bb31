//! What `hutch image import` refuses: in words of its own, with the file's name, in time, and nothing is left; and what
//! `hutch boot` does without descriptors.

use std::fs;
use std::path::Path;
use std::process::Command;

/// What goes wrong, how it comes about (shell, in a directory of its own), and the words by which a person knows it.
/// `image` makes `a.qcow2`, `poke AT BYTES` changes its header, `import FILE` runs the program.
const CASES: &[(&str, &str, &str)] = &[
    ("no such file", "import none.qcow2", "check its name"),
    ("a pipe", "mkfifo pipe; import pipe", "neither a file nor a block device; save it to a file"),
    ("a terminal's kind of device", "import /dev/zero", "neither a file nor a block device"),
    ("a directory", "mkdir directory; import directory", "is a directory; name the image file in it"),
    ("an empty file", ": >a.raw; import a.raw", "it is empty"),
    (
        "half a sector",
        "head -c 1000 /dev/zero >a.raw; import a.raw",
        "1000 bytes, which is no multiple of 512",
    ),
    (
        "a compressed file that holds no disk",
        "echo | gzip >a.raw; import a.raw",
        "holds 1 bytes, which is no multiple of 512",
    ),
    (
        "a compressed file that is damaged",
        "head -c 1M /dev/zero | gzip | head -c 500 >a.gz; import a.gz",
        "cannot be unpacked; it is damaged, or was cut off",
    ),
    ("an OVA", "echo >a; tar -cf a.ova a; import a.ova", "a tar archive, as an OVA is; unpack it"),
    ("version 9", "image; poke 7 '\\x09'; import a.qcow2", "qcow2 version 9"),
    ("an L1 table off its cluster", "image; poke 47 '\\x01'; import a.qcow2", "where none can be"),
    ("a header that is cut off", "image; truncate -s 60 a.qcow2; import a.qcow2", "ends within its header"),
    (
        "data that is cut off",
        "image; truncate -s 1M a.qcow2; import a.qcow2",
        "past the end of the file; the image was cut off",
    ),
    (
        "a backing file",
        "echo secret >below; qemu-img create -q -f qcow2 -b below -F raw a.qcow2 1M; import a.qcow2",
        "names a backing file; flatten it first",
    ),
    (
        "an external data file",
        "qemu-img create -q -f qcow2 -o data_file=data a.qcow2 1M; import a.qcow2",
        "keeps its data in another file; convert it first",
    ),
    ("an unknown feature", "image; poke 72 '\\x80'; import a.qcow2", "features that are not known"),
    ("marked dirty", "image; poke 79 '\\x01'; import a.qcow2", "(dirty); repair it first"),
    ("marked corrupt", "image; poke 79 '\\x02'; import a.qcow2", "marked corrupt; repair it first"),
    (
        "2^63 bytes",
        "image; poke 24 '\\x80\\0\\0\\0\\0\\0\\0\\0'; import a.qcow2",
        "claims 9223372036854775808 bytes",
    ),
    (
        "an L1 table past the end",
        "image; poke 40 '\\0\\0\\x40\\0\\0\\0\\0\\0'; import a.qcow2",
        "L1 table reaches past the end",
    ),
    (
        "an L1 table of 2^31 entries",
        "image; poke 36 '\\x7f\\xff\\xff\\xff'; import a.qcow2",
        "L1 table of 2147483647 entries",
    ),
    (
        "a refcount table past the end",
        "image; poke 48 '\\0\\0\\x40\\0\\0\\0\\0\\0'; import a.qcow2",
        "refcount table reaches past the end",
    ),
    (
        "a refcount table of 2^24 clusters",
        "image; poke 56 '\\0\\xff\\xff\\xff'; import a.qcow2",
        "refcount table is larger",
    ),
];

const SCRIPT: &str = r#"
    set -u
    image() {
        head -c 3M /dev/urandom >source; truncate -s 40M source
        qemu-img convert -f raw -O qcow2 source a.qcow2
    }
    poke() { printf "$2" | dd of=a.qcow2 bs=1 seek="$1" conv=notrunc status=none; }
    import() { timeout -k 1 60 "$HUTCH" image --state "${STATE:-state}" import "$1" --name image; echo "status $?"; }
"#;

/// What `how` says, on both streams.
fn say(room: &Path, how: &str) -> String {
    let hutch = Path::new(env!("CARGO_BIN_EXE_hutch"));
    assert!(
        hutch.with_file_name("hutch-import-worker").exists(),
        "run `cargo build -p hutch-imagestore` first, or test the whole workspace"
    );
    let script = format!("{SCRIPT}\n{{ {how}\n}} 2>&1");
    let out =
        Command::new("bash").args(["-c", &script]).current_dir(room).env("HUTCH", hutch).output().unwrap();
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn left(state: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(state.join("images")) else { return Vec::new() };
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// What is wrong with the answer, if anything.
fn fault(what: &str, file: &str, words: &str, said: &str) -> Option<String> {
    let good = said.contains(&format!("hutch: cannot import {file}: "))
        && said.contains(words)
        && said.contains("status 240");
    (!good).then(|| format!("{what}: not \"{words}\", but {said}"))
}

#[test]
fn bad_images_are_refused_each_with_its_own_words() {
    let mut faults = Vec::new();
    for (what, how, words) in CASES {
        let room = tempfile::tempdir().unwrap();
        let said = say(room.path(), how);
        let file = how.rsplit(' ').next().unwrap();
        faults.extend(fault(what, file, words, &said));
        let left = left(&room.path().join("state"));
        if left.iter().any(|name| name != ".lock") {
            faults.push(format!("{what}: left {left:?}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// At each number of descriptors that is not enough, from the first with which the program starts.
#[test]
fn an_import_without_descriptors_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    say(room.path(), "image");
    let mut refused = 0;
    for limit in 4..64 {
        // What a try leaves, the next one would clean away.
        let state = room.path().join(format!("state{limit}"));
        fs::create_dir_all(state.join("images")).unwrap();
        let said = say(room.path(), &format!("STATE={}; ulimit -n {limit}; import a.qcow2", state.display()));
        let left: Vec<String> = left(&state).into_iter().filter(|name| name != ".lock").collect();
        if said.contains("status 0") {
            assert!(refused >= 3, "{limit} were enough");
            assert!(matches!(left.as_slice(), [name] if name.starts_with("ami-")), "{left:?}");
            return;
        }
        if said.contains("hutch: ") {
            refused += 1;
            assert!(said.contains("raise the limit of open files"), "{limit}: {said}");
            assert!(!said.contains("run as root"), "{limit}: {said}");
        }
        assert!(left.is_empty(), "{limit}: left {left:?}; {said}");
    }
    panic!("no number of descriptors was enough");
}

#[test]
fn what_is_not_there_makes_no_store() {
    let room = tempfile::tempdir().unwrap();
    assert!(say(room.path(), "import none.raw").contains("status 240"));
    assert!(!room.path().join("state").exists());
}

/// `/dev/kvm` is opened before the image, so only where it opens.
#[test]
fn a_boot_without_descriptors_names_the_limit_and_leaves_nothing() {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped: cannot open /dev/kvm: {error}");
        return;
    }
    let room = tempfile::tempdir().unwrap();
    fs::create_dir(room.path().join("tmp")).unwrap();
    say(room.path(), "image");
    let mut refused = 0;
    for limit in 4..64 {
        let boot = "TMPDIR=$PWD/tmp timeout 60 \"$HUTCH\" boot --net none ./a.qcow2";
        let said = say(room.path(), &format!("ulimit -n {limit}; {boot}"));
        assert_eq!(fs::read_dir(room.path().join("tmp")).unwrap().count(), 0, "{limit}: {said}");
        if said.contains("no boot configuration") {
            assert!(refused >= 3, "{limit} were enough");
            return;
        }
        if said.contains("hutch: ") {
            refused += 1;
            assert!(said.contains("raise the limit of open files"), "{limit}: {said}");
        }
    }
    panic!("no number of descriptors was enough");
}

/// By bytes, and by files: for the disk, and for its record when the disk is there. Mounts, so only as root.
#[test]
fn a_full_store_is_named_and_left_empty() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: mounting a small file system needs root");
        return;
    }
    for size in ["size=2M", "size=8M,nr_inodes=4", "size=8M,nr_inodes=5"] {
        let room = tempfile::tempdir().unwrap();
        let mount = "unshare -m bash -c 'mkdir small; mount -t tmpfs -o $SIZE small small; \"$HUTCH\" image --state small \
            import a.qcow2 --name image; echo status $?; echo left: $(ls -A small/images)'";
        let said = say(room.path(), &format!("image; export SIZE={size}; {mount}"));
        assert_eq!(fault(size, "a.qcow2", "no room for it in small/images; make room there", &said), None);
        assert!(said.contains("left: .lock\n"), "{size}: {said}");
    }
}
