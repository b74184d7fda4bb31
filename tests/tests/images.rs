//! An image boots what its own boot loader would: now, and after the guest changed that.

use std::process::Command;

use hutch_tests::{ENOUGH, SOON, host, hutch, hutch_path, micro, root, text};

/// A disk without a table: ext4 with extlinux.conf, kernel and initrd.
fn image(name: &str) -> String {
    let dir = root().join("target/stories");
    let (tree, path) = (dir.join(format!("{name}.tree")), dir.join(format!("{name}.raw")));
    let boot = tree.join("boot/extlinux");
    std::fs::create_dir_all(&boot).expect("target is writable");
    for file in ["vmlinuz", "initrd"] {
        std::fs::copy(micro().join(file), tree.join("boot").join(file)).expect("the micro image is there");
    }
    let config = |word: &str| {
        format!(
            "DEFAULT a\nLABEL a\n LINUX /boot/vmlinuz\n INITRD /boot/initrd\n APPEND console=ttyS0 {word}\n"
        )
    };
    std::fs::write(boot.join("extlinux.conf"), config("kernel=old")).expect("target is writable");
    std::fs::write(boot.join("next"), config("kernel=new")).expect("target is writable");
    let _ = std::fs::remove_file(&path);
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([&tree, &path]).arg("64M").status();
    assert!(made.expect("mke2fs (package e2fsprogs)").success());
    path.to_string_lossy().into_owned()
}

#[test]
fn what_the_guest_installs_is_what_boots_next() {
    let image = image("upgrade");
    let before = std::fs::read(&image).expect("the image is there");
    let script = "mount -t ext4 /dev/vda /root || exit 3; echo $(cat /proc/cmdline); \
        if grep -q kernel=new /proc/cmdline; then exit 7; fi; \
        cat /root/boot/extlinux/next > /root/boot/extlinux/extlinux.conf; umount /root; sync; reboot -f; sleep 100";
    let out = hutch(&["boot", &image, "--net", "none", "--timeout", ENOUGH, "--", "/bin/sh", "-c", script]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(7), "{said}");
    assert!(said.contains("kernel=old"), "{said}");
    assert!(std::fs::read(&image).expect("the image is there") == before, "an image is never written");
}

#[test]
fn a_volume_keeps_what_was_flushed_when_its_machine_is_killed() {
    let image = image("killed");
    let volume = root().join("target/stories/killed.qcow2");
    let _ = std::fs::remove_file(&volume);
    let path = volume.to_string_lossy().into_owned();
    let script = "mount -t ext4 /dev/vda /root; echo flushed > /root/note; sync; echo MARK; while true; do dd if=/dev/zero of=/root/load bs=64k count=300 conv=fsync 2>/dev/null; done";
    let log = root().join("target/stories/killed.log");
    let killing = format!(
        "{SOON}\n{hutch} boot {image} --root-volume {path} --net none --timeout {ENOUGH} -- /bin/sh -c '{script}' >{log} 2>&1 &
        soon grep -q MARK {log}; sleep 3
        kill -9 $(pgrep -P $! hutch-vmm); wait $!; echo \"ended: $?\"; cat {log}",
        hutch = hutch_path(),
        log = log.display()
    );
    let said = text(&host("bash", &["-c", &killing]));
    assert!(said.contains("MARK") && said.contains("ended: 240"), "{said}");
    let check = Command::new("qemu-img").args(["check", "-f", "qcow2", &path]).output().expect("qemu-img");
    assert!(check.status.success(), "{}", text(&check));
    let script = "mount -t ext4 /dev/vda /root && grep -q flushed /root/note && exit 7";
    let args = ["boot", &image, "--root-volume", &path, "--net", "none", "--timeout", ENOUGH];
    let out = hutch(&[&args[..], &["--", "/bin/sh", "-c", script]].concat());
    assert_eq!(out.status.code(), Some(7), "{}", text(&out));
}

#[test]
fn a_guest_on_a_full_host_waits_and_goes_on_when_there_is_room() {
    let image = image("full");
    let hutch = hutch_path();
    let script = format!(
        r#"
        set -u; {SOON}; D=$(mktemp -d); mount -t tmpfs -o size=12m small $D
        {hutch} boot {image} --root-volume $D/root.qcow2 --net none --timeout {ENOUGH} -- /bin/sh -c 'dd if=/dev/urandom of=/tmp/x bs=1M count=24 2>/dev/null; echo WRITING; dd if=/tmp/x of=/dev/vda bs=1M seek=30 conv=fsync && cmp -n 25165824 /tmp/x /dev/vda 0 31457280; echo "same: $?"; exit 7' >$TMPDIR/full.log 2>&1 &
        soon grep -q "guest's write waits" $TMPDIR/full.log
        sleep 2; df $D | tail -n 1; kill -0 $! && echo "still running"
        mount -o remount,size=200m $D
        wait $!; echo "ended: $?"; cat $TMPDIR/full.log
        qemu-img check -f qcow2 $D/root.qcow2; echo "check: $?"
        "#
    );
    let dir = root().join("target/stories");
    std::fs::write(dir.join("full.sh"), format!("export TMPDIR={}\n{script}", dir.display()))
        .expect("target is writable");
    let out = host("unshare", &["-m", "bash", &dir.join("full.sh").to_string_lossy()]);
    let said = text(&out);
    for word in ["100%", "guest's write waits", "still running", "same: 0", "ended: 7", "check: 0"] {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
}
