"""Debian 12 as Debian makes it, its cloud-init unmodified, behind hutchd: it takes EC2 by itself. Some twenty minutes in the
lab; `tests/clients/run debian` runs it, by `make stories-full`."""

import json
import os
import subprocess
import time
import unittest

import cloud
from cloud import KEY, LAB, REGION, ROOT, SECRET, host, say

# Whole distributions take minutes to boot where the processor is emulated.
HOUR = 3600
USER_DATA = """#!/bin/sh
echo "by user data on $(hostname)" >/root/said
"""


@unittest.skipUnless(LAB or os.geteuid() == 0, "taps and the firewall need root")
class Debian(unittest.TestCase):
    def setUp(self):
        os.environ["LAB_TIMEOUT"] = str(HOUR)
        self.cloud = cloud.Cloud()
        self.addCleanup(self.cloud.log.close)
        image = subprocess.run([ROOT / "images/build-debian", "debian-12"], stdout=subprocess.PIPE, text=True, check=True)
        hutch = self.cloud.programs / "hutch"
        host(hutch, "image", "--state", self.cloud.state, "import", image.stdout.strip(), "--name", "debian-12",
             "--format", "qcow2", timeout=HOUR)
        self.cloud.start()
        port = 8773 if LAB else cloud.PORT
        self.command = ["env", f"HUTCH_ENDPOINT=http://127.0.0.1:{port}", f"AWS_ACCESS_KEY_ID={KEY}",
                        f"AWS_SECRET_ACCESS_KEY={SECRET}", f"AWS_REGION={REGION}",
                        f"XDG_DATA_HOME={self.cloud.state}/person", hutch]

    def tearDown(self):
        self.cloud.end("TERM")
        for pid in self.cloud.machines():
            host("kill", "-9", pid, check=False)
        host("rm", "-rf", self.cloud.state)

    def hutch(self, *arguments):
        return host(*self.command, *arguments, timeout=HOUR)

    def guest(self, command, check=True):
        return host(*self.command, "ssh", "deb", "--wait", "1500", "--", command, check=check, timeout=HOUR)

    def test_it_takes_ec2_by_itself(self):
        host("sh", "-c", f"mkdir -p {self.cloud.state}/person && cat >{self.cloud.state}/person/data <<'X'\n{USER_DATA}X")
        self.hutch("run", "debian-12", "--name", "deb", "--type", "t3.small", "--user-data",
                   f"{self.cloud.state}/person/data", "--volume", "1")
        one = json.loads(self.hutch("ps", "-o", "json"))[0]
        say(f"{one['id']} runs")
        said = self.guest("cloud-init status --wait --long; sudo cloud-init query cloud_id; echo; sudo cat /root/said; hostname; "
                          "sudo cloud-init query ds.meta_data.instance_id; echo; sudo passwd -S debian; ls /dev/disk/by-id")
        say(said)
        for word in ["DataSourceEc2Local", "status: done", one["id"], "debian L ", "virtio-vol"]:
            self.assertIn(word, said)
        name = "ip-" + one["ip"].replace(".", "-")
        self.assertIn(f"by user data on {name}", said)
        self.assertIn("\naws\n", said)
        before = self.guest("cat /proc/sys/kernel/random/boot_id")
        self.hutch("reboot", "deb")
        time.sleep(10)
        until = time.monotonic() + HOUR
        # The connection may break off as the guest goes down.
        while (after := self.guest("cat /proc/sys/kernel/random/boot_id", check=False)) in (before, ""):
            self.assertLess(time.monotonic(), until, "it does not reboot")
            time.sleep(10)
        say(f"rebooted: {before.strip()} was before {after.strip()}")
        self.hutch("stop", "deb")
        self.assertEqual(json.loads(self.hutch("ps", "-a", "-o", "json"))[0]["state"], "stopped")
        self.hutch("terminate", "deb")
        self.assertEqual(host("ls", f"{self.cloud.state}/{REGION}/host/volumes"), "")


if __name__ == "__main__":
    unittest.main()
