//! Imports by the real worker of images that qemu-img makes, and of bad ones.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use hutch_imagestore::import::{ImportError, Limits, Request, Sink, Target, convert, import};
use hutch_imagestore::store::{Architecture, Format, Image, Store};

const MIB: u64 = 1 << 20;

fn request(format: Option<Format>) -> Request {
    Request {
        name: "image".to_owned(),
        format,
        architecture: Architecture::X86_64,
        limits: Limits::default(),
    }
}

fn run(room: &Path, source: &Path, request: &Request) -> Result<Image, ImportError> {
    let store = Store::open(room).unwrap();
    let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
    let mut last = (0, 0);
    let image = import(&store, &File::open(source).unwrap(), request, worker, &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
    })?;
    assert_eq!(last, (image.record.virtual_size, image.record.virtual_size));
    Ok(image)
}

/// Nothing but the store's lock is there.
fn assert_nothing_left(room: &Path) {
    let names: Vec<_> = fs::read_dir(room.join("images")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [".lock"]);
}

/// A sparse raw disk of 40 MiB with data in a few places.
fn raw(room: &Path) -> PathBuf {
    let path = room.join("source");
    let file = File::create(&path).unwrap();
    file.set_len(40 * MIB).unwrap();
    let noise: Vec<u8> = (0..200_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for at in [0, 5 * MIB + 512, 39 * MIB] {
        file.write_all_at(&noise, at).unwrap();
    }
    path
}

fn qemu_img(arguments: &[&str], from: &Path, to: &Path) {
    let status = Command::new("qemu-img").args(arguments).args([from, to]).status();
    assert!(status.expect("qemu-img (package qemu-utils)").success());
}

#[test]
fn each_format_becomes_the_same_sparse_template() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let content = fs::read(&source).unwrap();
    let image = run(&room.path().join("raw"), &source, &request(None)).unwrap();
    assert_eq!(image.record.source_format, Format::Raw);
    assert!(fs::read(image.disk()).unwrap() == content);

    let kinds: [&[&str]; 4] = [
        &["-o", "compat=0.10"],
        &["-o", "compat=1.1"],
        &["-c", "-o", "compression_type=zlib"],
        &["-c", "-o", "compression_type=zstd"],
    ];
    for (index, kind) in kinds.iter().enumerate() {
        let qcow2 = room.path().join(format!("{index}.qcow2"));
        qemu_img(&[&["convert", "-O", "qcow2"], *kind].concat(), &source, &qcow2);
        let image = run(&room.path().join(format!("state{index}")), &qcow2, &request(None)).unwrap();
        assert_eq!(image.record.source_format, Format::Qcow2, "{kind:?}");
        assert!(fs::read(image.disk()).unwrap() == content, "{kind:?}");
        let meta = fs::metadata(image.disk()).unwrap();
        assert!(meta.blocks() * 512 < 2 * MIB, "{kind:?}: zeros are holes");
        let sum = Command::new("sha256sum").arg(&qcow2).output().unwrap().stdout;
        assert!(sum.starts_with(image.record.source_sha256.as_bytes()), "{kind:?}");
    }
}

#[test]
fn disks_of_others_become_the_same_template() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let content = fs::read(&source).unwrap();
    let tool = |words: &[&str]| {
        let out = Command::new(words[0]).args(&words[1..]).arg(&source).output().expect(words[0]);
        assert!(out.status.success());
        out.stdout
    };
    let qemu = |words: &[&str]| {
        let made = room.path().join("made");
        qemu_img(&[&["convert", "-O"], words].concat(), &source, &made);
        fs::read(made).unwrap()
    };
    let halves = content.split_at(content.len() / 2 / 4096 * 4096 + 100);
    let parts = [halves.0, halves.1].map(|half| {
        fs::write(room.path().join("half"), half).unwrap();
        let half = room.path().join("half");
        Command::new("gzip").arg("-c").arg(half).output().unwrap().stdout
    });
    let cases = [
        (Format::RawGz, tool(&["gzip", "-c"])),
        (Format::RawGz, parts.concat()),
        (Format::RawXz, tool(&["xz", "-c"])),
        (Format::RawXz, tool(&["xz", "-c", "--block-size=1MiB", "--check=sha256"])),
        (Format::RawZst, tool(&["zstd", "-qc"])),
        (Format::RawZst, tool(&["zstd", "-qc", "--long=27"])),
        (Format::Vmdk, qemu(&["vmdk"])),
        (Format::Vmdk, qemu(&["vmdk", "-o", "subformat=streamOptimized"])),
        (Format::Vhd, qemu(&["vpc", "-o", "force_size=on"])),
        (Format::Vhd, qemu(&["vpc", "-o", "force_size=on,subformat=fixed"])),
        (Format::Vhdx, qemu(&["vhdx"])),
        (Format::Vhdx, qemu(&["vhdx", "-o", "subformat=fixed,block_size=2M"])),
    ];
    for (index, (format, file)) in cases.into_iter().enumerate() {
        let path = room.path().join("file");
        fs::write(&path, &file).unwrap();
        for said in [None, Some(format)] {
            let state = room.path().join(format!("state{index}{}", said.is_some()));
            let store = Store::open(&state).unwrap();
            let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
            let image =
                import(&store, &File::open(&path).unwrap(), &request(said), worker, &mut |done, total| {
                    assert!(done <= total, "{format:?}: {done} of {total}");
                });
            let image = image.unwrap();
            assert_eq!(image.record.source_format, format);
            assert!(fs::read(image.disk()).unwrap() == content, "{format:?} {index}");
            let meta = fs::metadata(image.disk()).unwrap();
            assert!(meta.blocks() * 512 < 2 * MIB, "{format:?}: zeros are holes");
        }
        // Cut off, a stream is no disk.
        if matches!(format, Format::RawGz | Format::RawXz | Format::RawZst) {
            fs::write(&path, &file[..file.len() - 20]).unwrap();
            let state = room.path().join("cut");
            match run(&state, &path, &request(None)) {
                Err(ImportError::Refused(why)) => {
                    assert!(why.contains("cut off") || why.contains("cut short"), "{why}")
                }
                other => panic!("{format:?} {other:?}"),
            }
            assert_nothing_left(&state);
        }
    }
}

#[test]
fn what_is_packed_has_the_limits_of_what_it_holds() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("bomb");
    let state = room.path().join("state");
    let pack = |tool: &str, size: &str| {
        let made = Command::new("sh")
            .arg("-c")
            .arg(format!("head -c {size} /dev/zero | {tool} >\"$0\""))
            .arg(&path)
            .status();
        assert!(made.unwrap().success());
    };
    for tool in ["gzip -1", "xz -0", "zstd -q"] {
        pack(tool, "40M");
        let small = Limits { virtual_bytes: 8 * MIB, ..Limits::default() };
        let result = run(&state, &path, &Request { limits: small, ..request(None) });
        assert!(matches!(result, Err(ImportError::Limit(_))), "{tool}: {result:?}");
        assert_nothing_left(&state);
        pack(tool, "1000");
        match run(&state, &path, &request(None)) {
            Err(ImportError::Refused(why)) => assert!(why.contains("1000 bytes"), "{why}"),
            other => panic!("{tool}: {other:?}"),
        }
    }
    // A dictionary or window that needs more memory than a worker is given.
    pack("xz --lzma2=dict=1GiB", "1M");
    assert!(run(&state, &path, &request(None)).is_err());
    let qcow2 = room.path().join("a.qcow2");
    qemu_img(&["convert", "-O", "qcow2"], &raw(room.path()), &qcow2);
    assert!(Command::new("gzip").arg(&qcow2).status().unwrap().success());
    match run(&state, &room.path().join("a.qcow2.gz"), &request(None)) {
        Err(ImportError::Refused(why)) => assert!(why.contains("a qcow2 image that was compressed"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_nothing_left(&state);
}

#[test]
fn a_raw_disk_that_looks_like_another_format_is_raw_when_that_is_said() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("source");
    let mut bytes = vec![0; MIB as usize];
    for magic in [b"QFI\xfb".as_slice(), b"KDMV", b"\xfd7zXZ\0"] {
        bytes[..magic.len()].copy_from_slice(magic);
        fs::write(&path, &bytes).unwrap();
        let state = room.path().join("state");
        assert!(matches!(run(&state, &path, &request(None)), Err(ImportError::Refused(_))), "{magic:?}");
        assert_nothing_left(&state);
        let image = run(&state, &path, &request(Some(Format::Raw))).unwrap();
        assert!(fs::read(image.disk()).unwrap() == bytes);
        Store::open(&state).unwrap().remove("image").unwrap();
    }
}

#[test]
fn bad_images_are_refused_with_the_reason_and_nothing_is_left() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let good = room.path().join("good.qcow2");
    qemu_img(&["convert", "-O", "qcow2"], &source, &good);
    let good = fs::read(good).unwrap();
    let patched = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let bad: [(&str, Vec<u8>); 8] = [
        ("empty", Vec::new()),
        ("a header cut short", good[..50].to_vec()),
        ("version 9", patched(4, &9_u32.to_be_bytes())),
        ("a backing file", patched(8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 4])),
        ("2^63 bytes", patched(24, &(1_u64 << 63).to_be_bytes())),
        ("L1 past the end", patched(40, &(1_u64 << 40).to_be_bytes())),
        ("an unknown feature", patched(72, &(1_u64 << 40).to_be_bytes())),
        ("marked corrupt", patched(72, &2_u64.to_be_bytes())),
    ];
    let (path, state) = (room.path().join("bad"), room.path().join("state"));
    for (what, bytes) in bad {
        fs::write(&path, bytes).unwrap();
        match run(&state, &path, &request(None)) {
            Err(ImportError::Refused(why)) => assert!(!why.is_empty(), "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        assert_nothing_left(&state);
    }
}

#[test]
fn limits_end_an_import() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let state = room.path().join("state");
    let small = Limits { virtual_bytes: 8 * MIB, ..Limits::default() };
    let bomb = Limits { data_bytes: 100_000, ..Limits::default() };
    let slow = Limits { wall_seconds: 0, ..Limits::default() };
    for limits in [small, bomb, slow] {
        let request = Request { limits, ..request(None) };
        let result = run(&state, &source, &request);
        assert!(matches!(result, Err(ImportError::Limit(_))), "{limits:?}: {result:?}");
        assert_nothing_left(&state);
    }
}

#[test]
fn a_worker_that_breaks_leaves_nothing() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let store = Store::open(room.path()).unwrap();
    let result =
        import(&store, &File::open(source).unwrap(), &request(None), Command::new("false"), &mut |_, _| {});
    assert!(matches!(result, Err(ImportError::Worker { .. })), "{result:?}");
    assert_nothing_left(room.path());
}

/// Imports `source` by a "worker" that is a shell script: what a hijacked one could do.
fn hijacked(room: &Path, source: &File, script: &str, limits: Limits) -> ImportError {
    let store = Store::open(room).unwrap();
    let mut worker = Command::new("/bin/sh");
    worker.args(["-c", script]);
    let result = import(&store, source, &Request { limits, ..request(None) }, worker, &mut |_, _| {});
    assert_nothing_left(room);
    result.expect_err(script)
}

#[test]
fn a_worker_that_closes_its_report_and_stays_is_ended_in_time() {
    let room = tempfile::tempdir().unwrap();
    let source = File::open(raw(room.path())).unwrap();
    let limits = Limits { wall_seconds: 1, ..Limits::default() };
    for script in ["exec 2>&-; exec sleep 600", "exec sleep 600", "while :; do echo x >&2; done"] {
        let error = hijacked(room.path(), &source, script, limits);
        assert!(matches!(&error, ImportError::Limit(what) if what == "1 seconds"), "{script}: {error}");
    }
}

#[test]
fn a_worker_that_writes_more_than_its_data_is_ended_by_the_caller() {
    let room = tempfile::tempdir().unwrap();
    let source = File::open(raw(room.path())).unwrap();
    let limits = Limits { data_bytes: MIB, ..Limits::default() };
    for script in
        ["head -c 64M /dev/zero; exec sleep 600", "exec 2>&-; head -c 64M /dev/zero; exec sleep 600"]
    {
        let error = hijacked(room.path(), &source, script, limits);
        assert!(matches!(&error, ImportError::Limit(what) if what.ends_with("of data")), "{script}: {error}");
    }
}

#[test]
fn each_way_a_worker_ends_has_its_own_words() {
    let room = tempfile::tempdir().unwrap();
    let source = File::open(raw(room.path())).unwrap();
    let error = |script| hijacked(room.path(), &source, script, Limits::default());
    assert!(matches!(error("kill -s KILL $$"), ImportError::Killed { cpu_seconds: 3600 }));
    assert!(matches!(error("kill -s XCPU $$"), ImportError::Limit(what) if what.contains("processor")));
    assert!(matches!(error("kill -s XFSZ $$"), ImportError::Limit(what) if what.ends_with("of disk")));
    assert!(matches!(error("kill -s SEGV $$"), ImportError::Worker { .. }));
    let unreadable = r#"echo '{"unreadable":"cannot read the disk"}' >&2; exit 1"#;
    assert!(matches!(error(unreadable), ImportError::Unreadable(why) if why == "cannot read the disk"));
}

#[test]
fn what_has_no_end_is_refused_before_it_is_read() {
    let room = tempfile::tempdir().unwrap();
    let fifo = room.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let fifo = File::options().read(true).write(true).open(fifo).unwrap();
    let open = |path| File::open(path).unwrap();
    for (source, words) in
        [(fifo, "neither a file"), (open("/dev/zero"), "neither a file"), (open("/"), "is a directory")]
    {
        let error = hijacked(room.path(), &source, "exit 1", Limits::default());
        assert!(matches!(&error, ImportError::Refused(why) if why.contains(words)), "{error}");
    }
}

#[test]
fn a_raw_source_that_is_no_whole_number_of_sectors_is_refused_with_its_size() {
    let room = tempfile::tempdir().unwrap();
    let path = room.path().join("source");
    fs::write(&path, vec![1; 1000]).unwrap();
    for format in [None, Some(Format::Raw)] {
        match run(room.path(), &path, &request(format)) {
            Err(ImportError::Refused(why)) => assert!(why.contains("1000 bytes"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    let padded = Command::new("truncate").args(["-s", "%512"]).arg(&path).status().unwrap();
    assert!(padded.success());
    assert_eq!(run(room.path(), &path, &request(None)).unwrap().record.virtual_size, 1024);
}

#[test]
fn a_worker_without_memory_says_so() {
    let room = tempfile::tempdir().unwrap();
    let source = raw(room.path());
    let limits = Limits { memory_bytes: MIB, ..Limits::default() };
    let result = run(&room.path().join("state"), &source, &Request { limits, ..request(None) });
    assert!(matches!(&result, Err(ImportError::Limit(what)) if what.ends_with("of memory")), "{result:?}");
}

/// `/proc/PID/status` and `limits` of the worker that has `disk` as its largest file's size.
fn worker_of(disk: u64) -> (String, String) {
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("children"));
    let children: String = tasks.filter_map(|path| fs::read_to_string(path).ok()).collect();
    let mut found = children.split_whitespace().filter_map(|pid| {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        Some((read("status")?, read("limits")?))
    });
    found.find(|(_, limits)| limits.contains(&disk.to_string())).expect("a confined worker")
}

#[test]
fn the_worker_is_confined_and_its_processor_time_ends() {
    let room = tempfile::tempdir().unwrap();
    let source = room.path().join("source");
    let disk = (4 << 40) + 512;
    // Holes only: nothing to write, and far more to read than a second's worth.
    File::create(&source).unwrap().set_len(4 << 40).unwrap();
    let limits = Limits { virtual_bytes: disk, cpu_seconds: 1, ..Limits::default() };
    let store = Store::open(room.path()).unwrap();
    let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
    let mut seen = None;
    let result = import(
        &store,
        &File::open(source).unwrap(),
        &Request { limits, ..request(None) },
        worker,
        &mut |_, _| _ = seen.get_or_insert_with(|| worker_of(disk)),
    );
    assert!(matches!(&result, Err(ImportError::Limit(what)) if what.contains("processor")), "{result:?}");

    let (status, limits) = seen.expect("progress");
    let words = |text: &str, name: &str| -> Vec<String> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(words(&status, "NoNewPrivs:"), ["1"]);
    assert_eq!(words(&limits, "Max open files")[..2], ["0", "0"]);
    assert_eq!(words(&limits, "Max processes")[..2], ["0", "0"]);
    assert_eq!(words(&limits, "Max core file size")[..2], ["0", "0"]);
    assert_eq!(words(&limits, "Max cpu time")[..2], ["1", "2"]);
    assert_eq!(
        words(&limits, "Max address space")[..2],
        [(1_u64 << 30).to_string(), (1_u64 << 30).to_string()]
    );
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        assert_eq!(words(&status, "Uid:"), ["65534"; 4]);
        assert_eq!(words(&status, "Gid:"), ["65534"; 4]);
        assert!(words(&status, "Groups:").is_empty());
        assert_eq!(words(&status, "CapEff:"), ["0000000000000000"]);
    }
}

/// A disk that comes through a pipe, as who encrypts it gets it.
#[derive(Default)]
struct Taken {
    bytes: Vec<u8>,
    sizes: Vec<u64>,
    full: bool,
}

impl Sink for Taken {
    fn size(&mut self, bytes: u64) -> io::Result<()> {
        self.sizes.push(bytes);
        self.bytes.resize(bytes as usize, 0);
        Ok(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        if self.full && at > MIB {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let end = at as usize + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at as usize..end].copy_from_slice(bytes);
        Ok(())
    }
}

#[test]
fn a_disk_goes_through_a_pipe_where_no_plain_byte_of_it_may_lie() {
    let room = tempfile::tempdir().unwrap();
    let (source, file) = (raw(room.path()), File::create(room.path().join("file")).unwrap());
    let packed = room.path().join("packed");
    let gzip = Command::new("gzip").arg("-c").arg(&source).stdout(File::create(&packed).unwrap()).status();
    assert!(gzip.unwrap().success());
    let qcow2 = room.path().join("qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &source, &qcow2);
    let want = fs::read(&source).unwrap();
    let take = |from: &Path, format, limits: &Limits, sink: &mut Taken, go_on: bool| {
        let mut to = Target { disk: &file, directory: room.path(), sink: Some(sink) };
        let worker = Command::new(env!("CARGO_BIN_EXE_hutch-import-worker"));
        convert(&File::open(from).unwrap(), &mut to, format, limits, worker, &mut |_, _| go_on)
    };
    let all = Limits::default();
    for (from, format) in [(&source, Format::Raw), (&packed, Format::RawGz), (&qcow2, Format::Qcow2)] {
        let mut sink = Taken::default();
        assert_eq!(take(from, format, &all, &mut sink, true).unwrap().0, 40 * MIB);
        assert!(sink.bytes == want && sink.sizes == [40 * MIB]);
        assert_eq!(file.metadata().unwrap().len(), 0, "the worker has not got the file");
    }
    let full = take(&source, Format::Raw, &all, &mut Taken { full: true, ..Taken::default() }, true);
    assert!(matches!(full, Err(ImportError::Full(_))), "{full:?}");
    let stopped = take(&source, Format::Raw, &all, &mut Taken::default(), false);
    assert!(matches!(stopped, Err(ImportError::Stopped)), "{stopped:?}");
    let little = Limits { data_bytes: MIB / 2, ..all };
    let much = take(&source, Format::Raw, &little, &mut Taken::default(), true);
    assert!(matches!(much, Err(ImportError::Limit(_))), "{much:?}");
    File::options().write(true).open(&packed).unwrap().set_len(100_000).unwrap();
    let cut = take(&packed, Format::RawGz, &all, &mut Taken::default(), true);
    assert!(matches!(cut, Err(ImportError::Refused(_))), "{cut:?}");
}
