//! A day of a real Debian: launched from its AMI, reached by ssh, powered off by its button.

use hutch_tests::{ENOUGH, SOON, host, host_within, hutch, hutch_path, root, text};

#[test]
fn debian_is_launched_reached_and_switched_off() {
    let image =
        std::env::var("HUTCH_LEAN").expect("stories are run by `make stories`, which sets HUTCH_LEAN");
    let hutch = hutch_path();
    let script = format!(
        r#"
        set -u; {SOON}; ip link set lo up; mount -t tmpfs run /run
        D=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null; rm -rf $D' EXIT; export XDG_DATA_HOME=$D
        {hutch} boot {image} --memory 768 --root-volume $D/root.qcow2 --control $D/control --timeout 580 >$D/log 2>&1 &
        vm=$!
        soon grep -q 'has address' $D/log; IP=$(sed -n 's/.*has address \([0-9.]*\).*/\1/p' $D/log)
        on() {{ {hutch} ssh $IP "$@"; }}
        on --wait 500 -- 'uname -r; cat /sys/class/dmi/id/sys_vendor; sudo id -un' || {{ tail -n 40 $D/log; exit 3; }}
        {hutch} control $D/control status
        {hutch} control $D/control power-button
        wait $vm; echo "ended: $?"
        qemu-img check -f qcow2 $D/root.qcow2; echo "check: $?"
        "#
    );
    let dir = root().join("target/stories");
    std::fs::create_dir_all(&dir).expect("target is writable");
    std::fs::write(dir.join("debian.sh"), script).expect("target is writable");
    let out = host("unshare", &["-nm", "bash", &dir.join("debian.sh").to_string_lossy()]);
    let said = text(&out);
    for word in ["cloud-amd64", "Amazon EC2", "root", "ended: 0", "check: 0"] {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
}

/// A day of a full Debian, as Debian's own cloud images are: cloud-init finds EC2, its metadata and its user data by
/// itself; what the guest makes its next kernel is what the machine starts after a reboot.
fn a_full_debian(image: &str) {
    let image = std::env::var(image).expect("this story is run by `make stories-full`, which sets it");
    let hutch = hutch_path();
    let script = format!(
        r##"
        set -u; {SOON}; ip link set lo up; mount -t tmpfs run /run
        D=$(mktemp -d); trap 'kill $(jobs -p) 2>/dev/null; rm -rf $D' EXIT; export XDG_DATA_HOME=$D
        printf '#!/bin/sh\necho "by user data on $(hostname)" >/root/effect\n' >$D/data
        {hutch} boot {image} --type t3.micro --user-data $D/data --root-volume $D/root.qcow2 --control $D/control --timeout 2400 >$D/log 2>&1 &
        vm=$!
        soon grep -q 'has address' $D/log; IP=$(sed -n 's/.*has address \([0-9.]*\).*/\1/p' $D/log)
        on() {{ {hutch} ssh $IP "$@"; }}
        on --wait 900 -- 'until [ -e /var/lib/cloud/instance/boot-finished ]; do sleep 2; done
            cloud-init status --long; cloud-id; sudo cat /root/effect; sudo passwd -S debian; systemd-analyze' || {{ tail -n 60 $D/log; exit 3; }}
        on -- 'k=$(uname -r); for f in vmlinuz initrd.img; do sudo cp /boot/$f-$k /boot/$f-99.0-new; done
            sudo sed -i "s/^GRUB_CMDLINE_LINUX=\"/&hutch.upgraded /" /etc/default/grub; sudo update-grub 2>&1 | grep 99.0-new; sudo reboot'
        sleep 20
        on --wait 900 -- 'uptime -p; echo "cmdline: $(cat /proc/cmdline)"; sudo cat /root/effect' || {{ tail -n 60 $D/log; exit 3; }}
        {hutch} control $D/control power-button
        wait $vm; echo "ended: $?"
        qemu-img check -f qcow2 $D/root.qcow2; echo "check: $?"
        "##
    );
    let path = root().join("target/stories").join(format!("{image}.sh"));
    std::fs::create_dir_all(root().join("target/stories")).expect("target is writable");
    std::fs::write(&path, script).expect("target is writable");
    let said = text(&host_within(2700, "unshare", &["-nm", "bash", &path.to_string_lossy()]));
    println!("{said}");
    for words in [
        "status: done",
        "DataSourceEc2",
        "by user data on ip-172-31-15-254",
        "debian L",
        "Found linux image: /boot/vmlinuz-99.0-new",
        "hutch.upgraded",
        "ended: 0",
        "check: 0",
    ] {
        assert!(said.contains(words), "{words} is missing: {said}");
    }
}

#[test]
#[ignore = "some fifteen minutes in the lab: `make stories-full`"]
fn a_full_debian_12_takes_ec2_by_itself() {
    a_full_debian("HUTCH_DEBIAN_12");
}

#[test]
#[ignore = "some fifteen minutes in the lab: `make stories-full`"]
fn a_full_debian_13_takes_ec2_by_itself_and_boots_its_next_kernel() {
    a_full_debian("HUTCH_DEBIAN_13");
}

#[test]
fn a_command_runs_in_debian_by_debians_own_kernel() {
    let image =
        std::env::var("HUTCH_LEAN").expect("stories are run by `make stories`, which sets HUTCH_LEAN");
    let script = ". /etc/os-release; echo $PRETTY_NAME; uname -r; echo x >/etc/new && cat /etc/new; dpkg --version | head -n1; exit 7";
    let out = hutch(&[
        "boot",
        "--root",
        &image,
        "--memory",
        "768",
        "--timeout",
        ENOUGH,
        "--",
        "/bin/bash",
        "-c",
        script,
    ]);
    let said = text(&out);
    assert_eq!(out.status.code(), Some(7), "{said}");
    for word in ["Debian GNU/Linux 12", "cloud-amd64", "package management program"] {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
}
