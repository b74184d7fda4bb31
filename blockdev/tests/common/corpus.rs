//! Images of `qemu-img`, one with each option that it has, and what is to become of them.

use std::path::{Path, PathBuf};
use std::process::Command;

/// How an image is made: commands of `qemu-img` (or `qemu-io`), in a directory with `raw`; they make `image`.
pub struct Kind {
    pub commands: Vec<String>,
    /// A part of the reason why it is refused; empty where it is taken.
    pub refused: &'static str,
}

impl Kind {
    /// Makes it in `dir`. `None` where this QEMU cannot at present: it has to measure the processor for some keys, and a busy
    /// one it cannot.
    pub fn make(&self, dir: &Path) -> Option<PathBuf> {
        for command in &self.commands {
            let mut words = command.split(' ');
            let program = words.next().expect("a program");
            // What holds a command of qemu-io is one word.
            let words = words.map(|word| word.replace('~', " "));
            let out = Command::new(program).args(words).current_dir(dir).output();
            let out = out.unwrap_or_else(|e| panic!("{program} (package qemu-utils): {e}"));
            let said = String::from_utf8_lossy(&out.stderr);
            if said.contains("accurate CPU usage") {
                eprintln!("SKIPPED: {command}: {said}");
                return None;
            }
            assert!(out.status.success(), "{command}: {said}");
        }
        Some(dir.join("image"))
    }

    /// What QEMU reads from it.
    pub fn content(&self, dir: &Path) -> Vec<u8> {
        // Not all can be told by how they begin.
        let words = self.commands.iter().flat_map(|command| command.split(' '));
        let format = words.skip_while(|word| *word != "-O").nth(1).unwrap_or("qcow2").to_owned();
        let words = ["convert", "-f", &format, "-O", "raw", "image", "content"];
        let done = Command::new("qemu-img").args(words).current_dir(dir).status();
        assert!(done.expect("qemu-img (package qemu-utils)").success(), "{:?}", self.commands);
        std::fs::read(dir.join("content")).expect("the content")
    }
}

fn convert(format: &str, words: &str) -> String {
    format!("qemu-img convert -f raw -O {format} {words} raw image").replace("  ", " ")
}

fn words(commands: &[&str]) -> Vec<String> {
    commands.iter().map(|command| (*command).to_owned()).collect()
}

/// Every option that qcow2 has.
pub fn qcow2() -> Vec<Kind> {
    let mut options: Vec<String> = Vec::new();
    for bits in 9..=21 {
        let cluster = format!("cluster_size={}", 1_u32 << bits);
        options.push(format!("-o {cluster}"));
        options.push(format!("-c -o {cluster}"));
        options.push(format!("-c -o {cluster},compression_type=zstd"));
    }
    options.extend((0..=6).map(|order| format!("-o refcount_bits={}", 1 << order)));
    options.extend(["off", "metadata", "falloc", "full"].map(|how| format!("-o preallocation={how}")));
    for more in [
        "",
        "-o compat=0.10",
        "-o compat=1.1",
        "-c -o compat=0.10",
        "-c -o compat=0.10,cluster_size=512",
        "-o compat=0.10,preallocation=metadata",
        "-o lazy_refcounts=on",
        "-c -o refcount_bits=1,lazy_refcounts=on",
        "-o preallocation=metadata,cluster_size=512",
        "-S 0",
        "-S 64k -W",
    ] {
        options.push(more.to_owned());
    }
    let plain = convert("qcow2", "");
    let then = |more: &[&str]| [std::slice::from_ref(&plain), &*words(more)].concat();
    let mut kinds: Vec<(Vec<String>, &str)> =
        options.iter().map(|words| (vec![convert("qcow2", words)], "")).collect();
    let mut add = |commands: Vec<String>, refused| kinds.push((commands, refused));
    add(then(&["qemu-img resize -f qcow2 image 5M"]), "");
    add(then(&["qemu-img resize -f qcow2 image 70M"]), "");
    add(then(&["qemu-img resize --shrink -f qcow2 image 1049088"]), "");
    add(then(&["qemu-img bitmap --add image one", "qemu-img bitmap --add -g 512 image two"]), "");
    add(then(&["qemu-img amend -o compat=0.10 image"]), "");
    add(then(&["qemu-img amend -o lazy_refcounts=on,refcount_bits=32 image"]), "");
    add(then(&["qemu-img snapshot -c one image", "qemu-img snapshot -d one image"]), "");
    add(
        then(&[
            "qemu-io -f qcow2 -c discard~0~256k -c write~-z~-u~1M~192k -c write~-z~2M~65k -c write~-P~7~300k~3k image",
        ]),
        "",
    );
    // Sizes that are no whole number of clusters, or of sectors.
    for size in ["512", "1000", "70000", "2097664"] {
        let (cut, options) =
            (format!("qemu-img resize -q --shrink -f raw raw {size}"), ["", "-c", "-o cluster_size=512"]);
        for words in options {
            add(vec![cut.clone(), convert("qcow2", words)], "");
        }
    }
    add(vec![convert("qcow2", "-o extended_l2=on,cluster_size=64k")], "extended L2");
    add(vec![convert("qcow2", "-o data_file=data")], "another file");
    add(vec![convert("qcow2", "-o data_file=data,data_file_raw=on")], "another file");
    add(words(&["qemu-img create -f qcow2 -b raw -F raw image"]), "backing file");
    add(words(&["qemu-img create -f qcow2 -b raw -F raw -o compat=0.10 image"]), "backing file");
    let secret = "--object secret,id=s,data=abc";
    add(vec![convert("qcow2", &format!("{secret} -o encrypt.format=aes,encrypt.key-secret=s"))], "encrypted");
    add(
        vec![convert(
            "qcow2",
            &format!("{secret} -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        )],
        "encrypted",
    );
    add(then(&["qemu-img snapshot -c one image"]), "internal snapshots");
    kinds.into_iter().map(|(commands, refused)| Kind { commands, refused }).collect()
}

/// The formats of others, with every option that they have.
pub fn others() -> Vec<Kind> {
    let mut kinds: Vec<(String, &str)> = Vec::new();
    for words in [
        "",
        "-o subformat=monolithicSparse,compat6=on",
        "-o subformat=monolithicSparse,zeroed_grain=on",
        "-o subformat=monolithicSparse,adapter_type=lsilogic,hwversion=10",
        "-o subformat=streamOptimized",
        "-o subformat=streamOptimized,adapter_type=buslogic",
    ] {
        kinds.push((convert("vmdk", words), ""));
    }
    for kind in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        kinds.push((convert("vmdk", &format!("-o subformat={kind}")), "in several files"));
    }
    for kind in ["dynamic", "fixed"] {
        for size in ["on", "off"] {
            kinds.push((convert("vpc", &format!("-o subformat={kind},force_size={size}")), ""));
        }
        for more in ["block_size=1M", "block_size=16M,log_size=2M", "block_size=64M", "block_state_zero=off"]
        {
            kinds.push((convert("vhdx", &format!("-o subformat={kind},{more}")), ""));
        }
    }
    kinds.push((convert("raw", ""), ""));
    kinds.push((convert("raw", "-o preallocation=full"), ""));
    for (words, why) in [
        ("vdi", "VDI"),
        ("vdi -o static=on", "VDI"),
        ("qed", "QED"),
        ("parallels", "Parallels"),
        ("qcow", "version 1"),
    ] {
        kinds.push((convert(words, ""), why));
    }
    kinds.into_iter().map(|(command, refused)| Kind { commands: vec![command], refused }).collect()
}

/// Half noise, half pattern, with holes of all sizes: something of each kind of cluster.
pub fn content() -> Vec<u8> {
    let mut rng = super::rng::Rng(42);
    let mut bytes = vec![0; 3 << 20];
    for _ in 0..60 {
        let start = rng.below(bytes.len() as u64 - (64 << 10)) as usize / 512 * 512;
        let len = (rng.below(128) as usize + 1) * 512;
        match rng.below(3) {
            0 => bytes[start..start + len].copy_from_slice(&rng.bytes(len)),
            1 => bytes[start..start + len].fill(rng.any() as u8),
            _ => bytes[start..start + len].fill(0),
        }
    }
    bytes
}
