//! A guest's network: a lease, the gateway, ssh in from the host and nothing else; afterwards nothing is left.

use hutch_tests::{ENOUGH, SOON, host, hutch_path, micro, root, text};

/// Runs a script in a network namespace of its own where guests can run. `$HUTCH`, `$BOOT` (with the micro image) are set.
fn in_namespace(script: &str) -> (Option<i32>, String) {
    let (kernel, initrd) = (micro().join("vmlinuz"), micro().join("initrd"));
    let hutch = hutch_path();
    let boot = format!(
        "{hutch} boot --timeout {ENOUGH} --kernel {} --initrd {}",
        kernel.display(),
        initrd.display()
    );
    let script = format!(
        "set -u; HUTCH={hutch}; BOOT='{boot}'; D=$(mktemp -d); trap 'rm -rf $D' EXIT; mount -t tmpfs run /run\n\
         ip link set lo up; {SOON}\n{script}"
    );
    let dir = root().join("target/stories");
    std::fs::create_dir_all(&dir).expect("target is writable");
    let path = dir.join(format!("{:?}.sh", std::thread::current().id()).replace(['(', ')'], ""));
    std::fs::write(&path, script).expect("target is writable");
    let out = host("unshare", &["-nm", "bash", &path.to_string_lossy()]);
    (out.status.code(), text(&out))
}

/// What the guest does first: take the lease it is offered.
const LEASE: &str = r##"ip link set eth0 up; printf "#!/bin/sh\n[ \$1 = bound ] && ip addr add \$ip/20 dev eth0 && ip route add default via \$router && echo BOUND \$ip \$router \$mtu \$hostname" >/tmp/s; chmod +x /tmp/s; udhcpc -i eth0 -nq -t 99 -s /tmp/s"##;

#[test]
fn a_guest_has_a_lease_a_gateway_and_an_open_port_22() {
    let (code, said) = in_namespace(&format!(
        r#"
        $BOOT --net tap -- /bin/sh -c '{LEASE}; ping -c1 -W99 172.31.0.1 >/dev/null && echo GATEWAY; ping -c1 -W2 172.31.0.99 >/dev/null || echo ALONE; (echo open | nc -l -p 80 &); for i in $(seq 400); do ip -6 addr show dev eth0 | grep fd68 | grep -qv tentative && break; sleep 0.3; done; ping -6 -c1 -W99 fd68:7574:6368::1 >/dev/null && echo GATEWAY6; echo READY; echo hello | nc -l -p 22; echo six | nc -l -p 22' >$D/guest 2>&1 &
        soon grep -q READY $D/guest
        timeout 99 bash -c 'exec 3<>/dev/tcp/172.31.15.254/22; cat <&3'
        timeout 99 bash -c 'exec 3<>/dev/tcp/fd68:7574:6368:0:68:acff:fe1f:ffe/22; cat <&3'
        timeout 3 bash -c 'exec 3<>/dev/tcp/172.31.15.254/80' && echo LEAK
        wait; cat $D/guest
        echo "left: $(nft list ruleset | wc -l) $(ls /sys/class/net | grep -c hu)"
        "#
    ));
    assert_eq!(code, Some(0), "{said}");
    for word in [
        "BOUND 172.31.15.254 172.31.0.1 1500 ip-172-31-15-254",
        "GATEWAY",
        "GATEWAY6",
        "ALONE",
        "hello",
        "six",
        "left: 0 0",
    ] {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
    assert!(!said.contains("LEAK"), "port 80 must be closed: {said}");
}

#[test]
fn what_a_killed_machine_left_is_taken_out() {
    let (code, said) = in_namespace(
        r#"
        $BOOT --net tap -- /bin/sleep 1000 >$D/guest 2>&1 &
        soon grep -q "user space" $D/guest
        echo "up: $(nft list table inet hutch | grep -c huac1f0ffe)"
        kill -9 $!
        soon test ! -e /sys/class/net/huac1f0ffe
        echo "killed: $(nft list table inet hutch | grep -c huac1f0ffe)"
        $HUTCH doctor --repair
        echo "left: $(nft list ruleset | wc -l) $(find /run/hutch -name '*.json' | wc -l)"
        "#,
    );
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("up: 0") && !said.contains("killed: 0"), "{said}");
    assert!(said.contains("left: 0 0"), "{said}");
}

#[test]
fn a_network_may_be_in_a_namespace_of_its_own() {
    let (code, said) = in_namespace(
        r#"
        mkdir /run/netns
        $BOOT --net tap --netns story -- /bin/sleep 1000 >$D/guest 2>&1 &
        soon grep -q "user space" $D/guest
        echo "inside: $(ip netns exec story ip -o link | grep -c huac1f0ffe) outside: $(ip -o link | grep -c hu)"
        kill $!; wait $!; echo "ended: $? left: $(ls /run/netns | wc -l)"
        "#,
    );
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("inside: 1 outside: 0") && said.contains("ended: 244 left: 0"), "{said}");
}

#[test]
fn a_guest_asks_169_254_169_254_who_it_is() {
    let (code, said) = in_namespace(&format!(
        r##"
        cat >$D/data <<'END'
        M=169.254.169.254; L=latest/meta-data
        ask() {{ wget -qO- http://$M/$1; echo " <$1>"; }}
        echo "queues: $(ls /sys/class/net/eth0/queues | tr '\n' ' ')"
        ask $L/instance-id; ask $L/instance-type; ask $L/local-ipv4; ask $L/hostname; ask $L/nothing
        put() {{ printf "PUT /latest/api/token HTTP/1.1\r\nHost: m\r\nX-aws-ec2-metadata-token-ttl-seconds: $1\r\nConnection: close\r\n\r\n" | nc $M 80; }}
        TOKEN=$(put 60 | tail -n1); echo "refused: $(put 0 | head -n1)"
        wget -qO- --header "X-aws-ec2-metadata-token: $TOKEN" http://$M/$L/mac; echo " <with a token>"
        wget -qO- --header "X-aws-ec2-metadata-token: x$TOKEN" http://$M/$L/mac && echo FORGED
        for at in 172.31.0.1:16925 172.31.0.1:80 $M:16925 $M:22; do timeout 2 wget -qO- http://$at/ >/dev/null 2>&1 && echo "LEAK $at"; done
END
        $BOOT --net tap --type t3.nano --user-data $D/data -- /bin/sh -c '{LEASE}; wget -qO /tmp/data http://169.254.169.254/latest/user-data; . /tmp/data' 2>&1
        echo "left: $(nft list ruleset | wc -l)"
        "##
    ));
    assert_eq!(code, Some(0), "{said}");
    for word in [
        "i-",
        "queues: rx-0 rx-1 tx-0 tx-1",
        "t3.nano <latest/meta-data/instance-type>",
        "172.31.15.254 <latest/meta-data/local-ipv4>",
        "ip-172-31-15-254.home-1.internal <",
        "refused: HTTP/1.1 400 Bad Request",
        "02:68:ac:1f:0f:fe <with a token>",
        "left: 0",
    ] {
        assert!(said.contains(word), "{word} is missing: {said}");
    }
    assert!(!said.contains("LEAK") && !said.contains("FORGED"), "{said}");
}
