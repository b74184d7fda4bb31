//! First light: Debian's stock kernel in our own machine.

use hutch_tests::{ENOUGH, SOON, boot_micro, host, hutch, hutch_path, micro, root, text};

#[test]
fn a_stock_kernel_boots_and_its_commands_exit_code_comes_back() {
    let out = boot_micro(&[
        "--report",
        "--",
        "/bin/sh",
        "-c",
        "uname -a; cat /sys/class/dmi/id/sys_vendor; exit 42",
    ]);
    let text = text(&out);
    assert_eq!(out.status.code(), Some(42), "{text}");
    assert!(text.contains("Linux") && text.contains("cloud-amd64") && text.contains("Amazon EC2"), "{text}");
    assert!(
        text.contains("exits_to_user_space\":") && !text.contains("exits_to_user_space\":null"),
        "{text}"
    );
}

#[test]
fn two_vcpus_are_two() {
    let out = boot_micro(&["--cpus", "2", "--", "/bin/sh", "-c", "test $(nproc) = 2"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out));
}

#[test]
fn a_kernel_that_panics_is_told_from_one_that_hangs() {
    // No init: the kernel finds no root and panics.
    let out = boot_micro(&["--quiet", "--append", "rdinit=/nothing"]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(241), "{said}");
    assert!(said.contains("Kernel panic - not syncing"), "{said}");
    let kernel = micro().join("vmlinuz");
    let initrd = micro().join("initrd");
    let paths = [kernel.to_str().unwrap(), initrd.to_str().unwrap()];
    let command = ["boot", "--quiet", "--timeout", "20", "--kernel", paths[0], "--initrd", paths[1]];
    let out = hutch(&[&command[..], &["--", "/bin/sleep", "1000"]].concat());
    assert_eq!(out.status.code(), Some(243), "{}", text(&out));
}

#[test]
fn bad_input_is_refused_with_its_own_words() {
    let kernel = micro().join("vmlinuz");
    let kernel = kernel.to_str().unwrap();
    for (args, words) in [
        (&["--kernel", "/nonexistent"][..], "cannot open the kernel /nonexistent"),
        (&["--kernel", "/etc/passwd"], "the kernel file is not a kernel"),
        (&["--kernel", kernel, "--initrd", kernel, "--memory", "16"], "give the machine more memory"),
        (&["--kernel", kernel, "--cpus", "33"], "1 to 32"),
        (&["--kernel", kernel, "--memory", "1"], "16 to 1048576 MiB"),
    ] {
        let out = hutch(&[&["boot", "--timeout", ENOUGH], args].concat());
        let said = text(&out);
        assert_eq!(out.status.code(), Some(240), "{args:?}: {said}");
        assert!(said.contains(words), "{args:?}: {said}");
    }
}

#[test]
fn a_command_runs_in_a_directory_and_writes_nothing_there() {
    let dir = root().join("target/stories/tree");
    std::fs::create_dir_all(dir.join("bin")).expect("target is writable");
    std::fs::copy("/bin/busybox", dir.join("bin/sh")).expect("busybox is installed");
    std::fs::write(dir.join("greeting"), "from the host\n").expect("target is writable");
    let script = "read line </greeting; echo \"$line\"; echo changed >/greeting; read line </greeting; echo \"$line\"; exit 9";
    let dir_arg = dir.to_string_lossy();
    let out = boot_micro(&["--root", &dir_arg, "--", "/bin/sh", "-c", script]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(9), "{said}");
    assert!(said.contains("from the host") && said.contains("changed"), "{said}");
    assert_eq!(std::fs::read_to_string(dir.join("greeting")).expect("it is there"), "from the host\n");
    let out = hutch(&["boot", "--root", &dir_arg, "--", "/bin/sh"]);
    assert!(out.status.code() == Some(240) && text(&out).contains("name a --kernel"), "{}", text(&out));
}

#[test]
fn what_is_typed_reaches_the_command() {
    let script = format!(
        r#"D=$(mktemp -d); trap 'rm -rf $D' EXIT; mkfifo $D/keys; exec 3<>$D/keys
        {0} boot --timeout {ENOUGH} --control $D/c --kernel {1}/vmlinuz --initrd {1}/initrd --console -- /bin/sh <$D/keys >$D/shown 2>&1 &
        vm=$!
        {SOON}; soon grep -q '# ' $D/shown; echo 'echo "$((6 * 7)) on $(tty)"' >&3; soon grep -q '42 on' $D/shown
        (echo 'echo "attached $((7 * 8))"; exit 5'; while kill -0 $vm; do sleep 0.5; done) | timeout 300 {0} control $D/c console --attach >$D/seen
        wait $vm; echo "ended: $?"; cat $D/shown; echo "attached saw: $(grep '^attached' $D/seen)"; ls -A ${{TMPDIR:-/tmp}} | grep hutch-i-"#,
        hutch_path(),
        micro().display()
    );
    let said = text(&host("bash", &["-c", &script]));
    for words in ["42 on /dev/ttyS0", "attached saw: attached 56", "ended: 5"] {
        assert!(said.contains(words), "{words} is missing: {said}");
    }
    assert!(!said.contains("hutch-i-"), "its socket is left: {said}");
}
