//! What cannot be started is refused: with its own words, and nothing is left of the try.

use hutch_tests::{host, hutch_path, micro, root, text};

/// What goes wrong, how it comes about (shell; `$D` is a directory of its own, `$HUTCH` and `$KERNEL` are set), and the
/// words by which a person knows it.
const CASES: &[(&str, &str, &str)] = &[
    ("an image that is not there", "$HUTCH boot $D/none.qcow2", "cannot open the disk"),
    ("a name that nothing has", "HUTCH_STATE=$D $HUTCH boot nothing", "there is no image nothing"),
    ("a directory as an image", "$HUTCH boot $D/", "is no image file and no block device"),
    ("a pipe as an image", "mkfifo $D/p; $HUTCH boot $D/p", "is no image file and no block device"),
    ("an empty qcow2 file", ": >$D/a.qcow2; $HUTCH boot $D/a.qcow2", "is not a qcow2"),
    ("a header that is cut off", "image; truncate -s 60 $D/a.qcow2; $HUTCH boot $D/a.qcow2", "cut off"),
    ("tables that are cut off", "image; truncate -s 131072 $D/a.qcow2; $HUTCH boot $D/a.qcow2", "cut off"),
    (
        "a backing file's name",
        "echo secret >$D/below; qemu-img create -q -f qcow2 -b $D/below -F raw $D/a.qcow2 1M; $HUTCH boot $D/a.qcow2",
        "names a backing file",
    ),
    (
        "2^63 bytes",
        "image; poke 24 '\\x80\\0\\0\\0\\0\\0\\0\\0'; $HUTCH boot $D/a.qcow2",
        "9223372036854775808",
    ),
    (
        "an L1 table out of range",
        "image; poke 40 '\\0\\0\\x40\\0\\0\\0\\0\\0'; $HUTCH boot $D/a.qcow2",
        "L1 table",
    ),
    (
        "an unknown incompatible bit",
        "image; poke 72 '\\x80'; $HUTCH boot $D/a.qcow2",
        "features that are not known",
    ),
    ("no boot loader", "truncate -s 1M $D/a.raw; $HUTCH boot $D/a.raw", "no boot configuration"),
    ("a kernel that is none", "$HUTCH boot --kernel /etc/passwd", "the kernel file is not a kernel"),
    ("a kernel that is a pipe", "mkfifo $D/p; $HUTCH boot --kernel $D/p", "no regular file"),
    (
        "an initrd larger than memory",
        "truncate -s 64M $D/i; $HUTCH boot --kernel $KERNEL --initrd $D/i --memory 48",
        "give the machine more memory",
    ),
    (
        "an unknown type",
        "$HUTCH boot --kernel $KERNEL --type t3.huge",
        "there is no instance type \"t3.huge\"",
    ),
    (
        "user data of 17 KiB",
        "truncate -s 17K $D/u; $HUTCH boot --kernel $KERNEL --user-data $D/u",
        "EC2's limit",
    ),
    ("a key that is none", "image; $HUTCH boot $D/a.qcow2 --key /etc/passwd", "holds no public key"),
    ("a directory without a kernel", "$HUTCH boot --root $D -- /bin/true", "name a --kernel"),
    (
        "no /dev/kvm",
        "mkdir $D/dev; cp -a /dev/null /dev/zero /dev/urandom $D/dev; mount --bind $D/dev /dev; $HUTCH boot --kernel $KERNEL; umount /dev",
        "cannot open /dev/kvm",
    ),
    (
        "no permission",
        "chmod 755 $D; setpriv --reuid 65534 --regid 65534 --clear-groups $HUTCH boot --kernel $KERNEL",
        "Permission denied",
    ),
    (
        "a tap that another program has",
        "ip tuntap add huac1f0ffe mode tap; $HUTCH boot --kernel $KERNEL --net tap; ip link del huac1f0ffe; $HUTCH doctor --repair",
        "the tap huac1f0ffe is in use",
    ),
    (
        "a port that another program has",
        "busybox nc -l -p 16925 & sleep 0.5; $HUTCH boot --kernel $KERNEL --net tap; kill $!",
        "cannot listen on port 16925",
    ),
    ("out of descriptors", "(ulimit -n 6; $HUTCH boot --kernel $KERNEL)", "raise the limit of open files"),
];

#[test]
fn what_cannot_be_started_is_refused_and_leaves_nothing() {
    let mut script = format!(
        r#"set -u; ip link set lo up; mount -t tmpfs run /run; HUTCH={}; KERNEL={}
        image() {{ qemu-img create -q -f qcow2 $D/a.qcow2 1G; qemu-io -f qcow2 -c 'write 0 1M' $D/a.qcow2 >/dev/null; }}
        poke() {{ printf "$2" | dd of=$D/a.qcow2 bs=1 seek=$1 conv=notrunc status=none; }}
        left() {{ echo "left: $(nft list ruleset | wc -l) $(ls /sys/class/net | grep -c hu) $(pgrep -c hutch-vmm) $(ls -A $TMPDIR | wc -l)"; }}
        export XDG_DATA_HOME=/run/data TMPDIR=/run/tmp; mkdir $TMPDIR
        "#,
        hutch_path(),
        micro().join("vmlinuz").display()
    );
    for (index, (_, how, _)) in CASES.iter().enumerate() {
        script += &format!("D=/run/case{index}; mkdir $D; echo '=== {index}'; {{ {how}; }} 2>&1; left\n");
    }
    let dir = root().join("target/stories");
    std::fs::create_dir_all(&dir).expect("target is writable");
    let path = dir.join("refusals.sh");
    std::fs::write(&path, script).expect("target is writable");
    let said = text(&host("unshare", &["-nmp", "--fork", "--mount-proc", "bash", &path.to_string_lossy()]));
    let answers: Vec<&str> = said.split("=== ").skip(1).collect();
    assert_eq!(answers.len(), CASES.len(), "{said}");
    let wrong = CASES.iter().zip(answers).filter(|((_, _, words), answer)| {
        !answer.contains(words)
            || !(answer.contains("hutch: ") || answer.contains("hutch-vmm: "))
            || !answer.contains("left: 0 0 0 0")
    });
    let wrong: Vec<_> =
        wrong.map(|((what, _, words), answer)| format!("{what}: not \"{words}\", but {answer}")).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
