"""Real guests behind the real protocol: hutchd --host local, the aws CLI and boto3. In the lab where HUTCH_LAB says so.

`tests/clients/run real` runs it, by `make stories`. The guest is the micro image; what it does is in STORY below.
"""

import concurrent.futures
import http.client
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import unittest
import urllib.request

import boto3
import botocore.config
import botocore.exceptions

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAB = [str(ROOT / "tests/lab/run")] if "HUTCH_LAB" in os.environ else []
PORT = int(os.environ.get("LAB_PORT", "17777")) + 1 if LAB else 18773
KEY, SECRET, REGION, OTHER = "AKIDTEST", "secret-of-a-test", "home-1", "home-2"
# Nothing here is a matter of speed: a wait that is over says that what it waits for never comes.
ENOUGH = 300

STORY = r"""
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
(head -c 1 /dev/input/event0 >/dev/null; echo BUTTON; umount /root; poweroff -f) &
echo boot >>/root/boots; sync
(while sleep 1; do
  now=; for d in /sys/block/vd?; do read s <$d/serial; read n <$d/size; now="$now $s=$n"; done
  [ "$now" = "$was" ] || echo "volumes:$now;"; was=$now
done 2>/dev/null) &
(while sleep 1; do
  for d in /sys/block/vd?; do
    # The disk of 4 GiB.
    read n <$d/size; [ "$n" = 8388608 ] || continue
    read a x </proc/uptime; dd if=/dev/${d##*/} of=/dev/null bs=4096 count=500 iflag=direct; read b x </proc/uptime
    echo "500 reads from $a to $b;"; exit
  done
done 2>/dev/null) &
(for d in /sys/block/vd?; do
  # The disk of 3 GiB: a number that is written again and again, each time for good before it is told.
  read n <$d/size; [ "$n" = 6291456 ] || continue
  d=/dev/${d##*/}; n=$(dd if=$d bs=512 count=1 | tr -d '\0'); echo "kept: ${n:-none};"
  while n=$((n + 1)); do
    # Elsewhere each time, so that the host has to find room.
    dd if=/dev/zero of=$d bs=64k count=1 seek=$((n % 40000 + 1)) oflag=direct conv=notrunc
    (echo $n; cat /dev/zero) | dd of=$d bs=4096 count=1 iflag=fullblock oflag=direct conv=notrunc,fsync && echo "acked: $n;"
  done
done 2>/dev/null) &
(for d in /sys/block/vd?; do
  # The disk of 2 GiB, or of 1 GB: what is on it, and then something that no file of the host may hold.
  read n <$d/size; [ "$n" = 4194304 ] || [ "$n" = 1953125 ] || continue
  d=/dev/${d##*/}; echo "found: $(dd if=$d bs=512 count=1 skip=5000 | tr -d '\0');"
  (echo "plain-$((41 + 1))-for-all-to-see"; cat /dev/zero) | dd of=$d bs=512 count=1 seek=5000 iflag=fullblock conv=notrunc,fsync && echo "marked;"
done 2>/dev/null) &
(for d in /sys/block/vd?; do
  # The disk of 7 GiB: a file system with a database that tells what it has committed, and with the programs for both.
  read n <$d/size; [ "$n" = 14680064 ] || continue
  d=/dev/${d##*/}; boot=$(wc -l </root/boots); mkdir /data
  mount -t ext4 $d /data; [ -e /tmp/lib ] || cp -r /data/lib /tmp; umount /data
  use() { program=$1; shift; /tmp/lib/ld.so --library-path /tmp/lib /tmp/lib/$program "$@"; }
  use e2fsck -fn $d >/tmp/fsck; echo "fsck $boot: $?;"
  mount -t ext4 $d /data; mode=wal; [ $((boot % 2)) = 0 ] || mode=delete
  (echo "PRAGMA journal_mode = $mode; PRAGMA synchronous = EXTRA; CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, d BLOB, h BLOB);
    SELECT 'database $boot: '||group_concat(integrity_check)||', '||(SELECT count(*) FROM t WHERE h IS NOT sha3(d))||' spoilt, '
      ||'has '||(SELECT coalesce(max(n), 0) FROM t)||';' FROM pragma_integrity_check;"
  while :; do
    echo "BEGIN; INSERT INTO t VALUES ((SELECT coalesce(max(n), 0) + 1 FROM t), randomblob(abs(random()) % 60000), NULL);
      UPDATE t SET h = sha3(d) WHERE h IS NULL; DELETE FROM t WHERE n < (SELECT max(n) FROM t) - abs(random()) % 200; COMMIT;
      SELECT 'committed $boot: '||max(n)||';' FROM t;"
  done) | use sqlite3 -batch /data/db
done 2>/tmp/problems; cat /tmp/problems) &
(while sleep 1; do
  # More disks than one bus has slots, once they stay so many: their serials; and what is on those of 6 GiB, each time.
  set -- /sys/block/vd*
  if [ $# -gt 32 ] && [ $# = "$seen" ] && [ $# != "$told" ]; then
    told=$#; all=; for d; do read s <$d/serial; all="$all $s"; done; echo "many: $#:$all;"
    for d; do
      read n <$d/size; [ "$n" = 12582912 ] || continue
      read s <$d/serial; d=/dev/${d##*/}; echo "$s has: $(dd if=$d bs=512 count=1 skip=5000 | tr -d '\0');"
      (echo "what is of $s"; cat /dev/zero) | dd of=$d bs=512 count=1 seek=5000 iflag=fullblock conv=notrunc,fsync && echo "$s is written;"
    done
  fi
  seen=$#
done 2>/dev/null) &
(while sleep 2; do
  # Whoever this one is to reach, if it can.
  for to in $(wget -qO- http://169.254.169.254/latest/meta-data/tags/instance/reach); do
    echo "$to says: $(nc -w 2 $to 80 </dev/null);"
  done
done 2>/dev/null) &
printf '#!/bin/sh\n[ $1 = bound ] && ip addr add $ip/20 dev eth0 && ip route add default via $router\n' >/tmp/s
chmod +x /tmp/s; ip link set eth0 up; udhcpc -i eth0 -nq -t 99 -s /tmp/s >/dev/null
M=http://169.254.169.254/latest
echo "I am $(wget -qO- $M/meta-data/instance-id) at $(wget -qO- $M/meta-data/local-ipv4)"
echo "told: $(wget -qO- $M/user-data) key: $(wget -qO- $M/meta-data/public-keys/0/openssh-key)"
# On its root, what it tells nobody.
echo "mark-$(wget -qO- $M/meta-data/instance-id | tr 0-9 g-p)" >/root/mark; sync
[ -e /own ] && echo "own RAM disk: $(wget -qO- $M/meta-data/kernel-id) $(wget -qO- $M/meta-data/ramdisk-id)"
echo "boots: $(wc -l </root/boots) disks: $(ls /dev/vd? | wc -l) READY"
while :; do
  (echo "hello from $(wget -qO- $M/meta-data/instance-id)") | nc -l -p 80 >/dev/null
done
"""


def host(*command, check=True, timeout=ENOUGH):
    """Runs a command where the guests are."""
    done = subprocess.run([*LAB, *command], capture_output=True, text=True, timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def say(text):
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Cloud:
    """hutchd where guests can run."""

    def __init__(self):
        self.state = host("mktemp", "-d", "/var/tmp/hutchd.XXXXXX").strip()
        self.programs = pathlib.Path(os.environ["HUTCHD"]).parent
        self.log = tempfile.TemporaryFile("w+")
        self.url = f"http://127.0.0.1:{PORT}"
        self.process = None
        types = "[own]\nstored = { vcpus = 1, memory = 512, instance-store = [1] }\n"
        host("bash", "-c", f"printf %s {shlex.quote(types)} > {self.state}/instance-types.toml")

    def image(self):
        """An image of ext4 with a boot loader's configuration, as the template `micro`; and `bare`, whose kernel is gone."""
        micro, work = pathlib.Path(os.environ["HUTCH_MICRO"]), ROOT / "target/stories/cloud"
        shutil.rmtree(work, ignore_errors=True)
        boot = work / "tree/boot/extlinux"
        boot.mkdir(parents=True)
        for file in ("vmlinuz", "initrd"):
            shutil.copy(micro / file, work / "tree/boot")
        (work / "tree/story").write_text(STORY)
        command = ["/bin/sh", "-c", "mount -t ext4 /dev/vda /root && exec sh /root/story"]
        words = "".join(f"{byte:02x}" for word in command for byte in [*word.encode(), 0])
        for name, say in [("micro", "quiet"), ("bare", "")]:
            (boot / "extlinux.conf").write_text(
                "DEFAULT a\nLABEL a\n LINUX /boot/vmlinuz\n INITRD /boot/initrd\n"
                f" APPEND console=ttyS0 {say} hutch.cmd={words}\n"
            )
            subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", work / "tree", work / f"{name}.raw", "64M"], check=True)
            self.hutch_image("import", work / f"{name}.raw", "--name", name, "--format", "raw")
            for file in ("vmlinuz", "initrd"):
                if name == "micro":
                    (boot.parent / file).rename(work / file)
        # One that is not the image's: it has a file more. Archives begin at multiples of 4.
        (work / "own").write_text("own")
        added = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], input=b"own\n", cwd=work, check=True, capture_output=True)
        initrd = (work / "initrd").read_bytes()
        (work / "own-initrd").write_bytes(initrd + bytes(-len(initrd) % 4) + added.stdout)
        return work

    def hutch_image(self, *words):
        return host(self.programs / "hutch", "image", "--state", self.state, *words)

    def start(self):
        listen = "0.0.0.0:8773" if LAB else f"127.0.0.1:{PORT}"
        command = [*LAB, self.programs / "hutchd", "--state", self.state, "--listen", listen]
        command += ["--root-key", f"{KEY}:{SECRET}", "--rate", "0", "--regions", f"{REGION},{OTHER}"]
        environment = dict(os.environ, LAB_TIMEOUT="3000", HUTCH_LOG="info")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)
        until = time.monotonic() + ENOUGH
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError(f"hutchd does not come up: {self.said()}")
            time.sleep(0.2)

    def healthy(self):
        try:
            return urllib.request.urlopen(f"{self.url}/healthz", timeout=10).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def end(self, name):
        # In the lab our process is the one that waits for it there.
        if LAB:
            host("pkill", f"-{name}", "-x", "hutchd")
        else:
            os.kill(self.process.pid, getattr(signal, f"SIG{name}"))
        self.process.wait(timeout=ENOUGH)

    def machines(self):
        """The processes of its machines; in the lab, any there are."""
        if LAB:
            return sorted(host("pgrep", "-x", "hutch-vmm", check=False).split())
        own = []
        for record in pathlib.Path(self.state).glob("*/host/machines/*/machine.json"):
            pid = json.loads(record.read_text())["process"]["pid"]
            try:
                name = pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            own += [str(pid)] if name == "hutch-vmm" else []
        return sorted(own)

    def client(self, region=REGION):
        config = botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=ENOUGH)
        return boto3.client("ec2", endpoint_url=self.url, region_name=region, aws_access_key_id=KEY,
                            aws_secret_access_key=SECRET, config=config)

    def aws(self, *arguments):
        environment = dict(os.environ, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION=REGION)
        done = subprocess.run(["aws", "--endpoint-url", self.url, "--output", "json", "ec2", *arguments],
                              env=environment, capture_output=True, text=True, timeout=ENOUGH)
        if done.returncode:
            raise AssertionError(f"aws {arguments}: {done.stderr}")
        return json.loads(done.stdout or "null")


@unittest.skipUnless(LAB or os.geteuid() == 0, "taps and the firewall need root")
class Story(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.cloud = Cloud()
        cls.work = cls.cloud.image()
        cls.cloud.start()
        cls.ec2 = cls.cloud.client()

    @classmethod
    def tearDownClass(cls):
        cls.ec2.close()
        cls.cloud.end("TERM")
        for pid in cls.cloud.machines():
            host("kill", "-9", pid, check=False)
        host("rm", "-rf", cls.cloud.state)

    def setUp(self):
        self.addCleanup(self.tell)

    def tell(self):
        outcome = self._outcome.result
        if outcome.failures or outcome.errors:
            print("hutchd said:", self.cloud.said()[-8000:])

    def eventually(self, check, what):
        until = time.monotonic() + ENOUGH
        while not (got := check()):
            if time.monotonic() > until:
                self.fail(f"it does not come to pass: {what}")
            time.sleep(0.3)
        return got

    def instance(self, instance):
        return self.ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]

    def becomes(self, instance, state):
        self.eventually(lambda: self.instance(instance)["State"]["Name"] == state, f"{instance} {state}")
        say(f"{instance} {state}")

    def console(self, instance):
        return self.ec2.get_console_output(InstanceId=instance, Latest=True).get("Output", "")

    def prints(self, instance, text):
        try:
            self.eventually(lambda: text in self.console(instance), text)
        except AssertionError as error:
            raise AssertionError(f"{error}; its console: {self.console(instance)[-3000:]}") from None
        say(f"{instance} printed {text!r}")

    def web(self, ip, seconds=3):
        done = subprocess.run([*LAB, "timeout", str(seconds), "bash", "-c", f"exec 3<>/dev/tcp/{ip}/80; cat <&3"],
                              capture_output=True, text=True, timeout=ENOUGH)
        return done.stdout

    def hutch(self, *words):
        """hutch itself, beside its daemon."""
        port = 8773 if LAB else PORT
        command = ["env", f"HUTCH_ENDPOINT=http://127.0.0.1:{port}", f"AWS_ACCESS_KEY_ID={KEY}", f"AWS_SECRET_ACCESS_KEY={SECRET}"]
        return host(*command, self.cloud.programs / "hutch", *words)

    def test_a_backup_is_made_while_guests_run(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[
            {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "DeleteOnTermination": True}}])
        one = made["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        self.prints(one, "boots: 1 disks: 2 READY")
        figures = json.loads(self.hutch("top", "--once", "-o", "json"))
        row = next(row for row in figures if row["id"] == one)
        say(f"top: {row}")
        self.assertGreater(row["memory"], 10 << 20)
        self.assertTrue(all(row[name] is not None for name in ["cpu", "disk_read", "disk_written", "net_received", "net_sent"]))
        machines = cloud.machines()
        # What it says of its progress comes before.
        told = self.hutch("backup", f"{cloud.state}.backup", "-o", "json")
        told = json.loads(told[told.index("{"):])
        say(f"backup: {told}")
        self.assertEqual((told["instances"], told["volumes"]), (1, 2))
        self.assertEqual(cloud.machines(), machines, "it runs on")
        self.assertEqual(host("ls", f"{cloud.state}/{REGION}/host").split(), ["keys", "layers", "machines", "snapshots", "volumes"])
        ec2.reboot_instances(InstanceIds=[one])
        self.prints(one, "boots: 2 disks: 2 READY")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

        # The state of the backup, in the place of the one that goes: the guest's disks are as they were then.
        first = cloud.state
        cloud.end("TERM")
        cloud.state = f"{first}.again"
        say(self.hutch("restore", f"{first}.backup", "--state", cloud.state))
        cloud.start()
        self.becomes(one, "stopped")
        self.assertIn("the host went down", self.instance(one)["StateReason"]["Message"])
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: self.console(one).count("boots: 2 disks: 2 READY") == 1, "its disks are those of the backup")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        cloud.end("TERM")
        host("rm", "-rf", cloud.state, f"{first}.backup")
        cloud.state = first
        cloud.start()

    def test_what_a_guest_writes_to_an_encrypted_volume_is_in_no_file(self):
        ec2, cloud, marker = self.ec2, self.cloud, "plain-42-for-all-to-see"
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run(**disk):
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[
                {"DeviceName": "/dev/xvda", "Ebs": {"Encrypted": True}},
                {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 2, "DeleteOnTermination": True, **disk}}])
            self.becomes(made["Instances"][0]["InstanceId"], "running")
            return made["Instances"][0]["InstanceId"]

        def files_with(text):
            return host("bash", "-c", f"grep -l -a -r {text} {cloud.state}/{REGION}/host/layers | wc -l").strip()

        one = run(Encrypted=True)
        self.prints(one, "found: ;")
        self.prints(one, "marked;")
        volume = next(d["Ebs"]["VolumeId"] for d in self.instance(one)["BlockDeviceMappings"] if d["DeviceName"] == "/dev/sdf")
        # While it runs.
        snapshot = ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
        taken = lambda: ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]
        self.eventually(lambda: taken()["State"] == "completed", snapshot)
        self.assertTrue(taken()["Encrypted"])
        two = run(SnapshotId=snapshot)
        self.prints(two, f"found: {marker};")
        ec2.terminate_instances(InstanceIds=[two])
        ec2.stop_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertEqual(files_with(marker), "0")
        # What wraps its key is gone: it does not start, and says why.
        keys = f"{cloud.state}/keys"
        host("mv", keys, f"{keys}.apart")
        cloud.end("TERM")
        cloud.start()
        ec2.start_instances(InstanceIds=[one])
        self.eventually(lambda: self.instance(one).get("StateReason", {}).get("Code", "").startswith("Client.InvalidKMSKey"), "why not")
        self.becomes(one, "stopped")
        say(self.instance(one)["StateReason"]["Message"])
        cloud.end("TERM")
        host("bash", "-c", f"rm -r {keys} && mv {keys}.apart {keys}")
        cloud.start()
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.prints(one, f"found: {marker};")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        # The search would have found it.
        three = run()
        self.prints(three, "marked;")
        ec2.terminate_instances(InstanceIds=[three])
        self.assertNotEqual(files_with(marker), "0")
        self.becomes(three, "terminated")
        ec2.delete_snapshot(SnapshotId=snapshot)

    def test_an_instance_store_is_a_runs_own(self):
        ec2, cloud, marker = self.ec2, self.cloud, "plain-42-for-all-to-see"
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="own.stored")
        one = made["Instances"][0]["InstanceId"]
        machine = f"{cloud.state}/{REGION}/host/machines/{one}"
        files_with = lambda: host("bash", "-c", f"grep -l -a -r {marker} {machine} --include=*.store | wc -l").strip()
        times = lambda text: self.console(one).count(text)
        self.becomes(one, "running")
        self.prints(one, "found: ;")
        self.prints(one, "marked;")
        # A reboot, of which another daemon sees the end.
        ec2.reboot_instances(InstanceIds=[one])
        cloud.end("KILL")
        cloud.start()
        self.prints(one, f"found: {marker};")
        self.eventually(lambda: times("marked;") == 2, "it is marked again")
        self.assertEqual(files_with(), "1")
        ec2.stop_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertEqual(files_with(), "0")
        self.assertEqual(host("bash", "-c", f"ls {machine}/*.store 2>/dev/null | wc -l").strip(), "0")
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: times("found: ;") == 2, "zeros in the next run")
        self.eventually(lambda: times("marked;") == 3, "it is marked once more")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(host("bash", "-c", f"ls -d {machine} 2>/dev/null | wc -l").strip(), "0")

    def test_a_root_on_instance_store_is_a_runs_own(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        run = lambda image: ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        marker = lambda id: "mark-" + id.translate(str.maketrans("0123456789", "ghijklmnop"))
        files_with = lambda id: len(host("bash", "-c", f"grep -r -l -a {marker(id)} {cloud.state} || true").split())
        first = run(image)
        self.prints(first, "boots: 1")
        self.assertEqual(files_with(first), 1)
        # Its root as it is while it runs: it has booted once.
        task = ec2.bundle_instance(InstanceId=first, Storage={"S3": {"Bucket": "stories", "Prefix": "micro/1"}})["BundleTask"]["BundleId"]
        told = lambda: ec2.describe_bundle_tasks(BundleIds=[task])["BundleTasks"][0]
        self.eventually(lambda: told()["State"] in ("complete", "failed"), "the bundle is written")
        self.assertEqual(told()["State"], "complete", told())
        ec2.terminate_instances(InstanceIds=[first])
        own = ec2.register_image(Name="micro on instance store", ImageLocation="stories/micro/1.manifest.xml")["ImageId"]
        one = run(own)
        self.prints(one, "boots: 2")
        self.assertEqual((self.instance(one)["RootDeviceType"], self.instance(one)["BlockDeviceMappings"]), ("instance-store", []))
        self.assertEqual(files_with(one), 1)
        # A reboot, of which another daemon sees the end.
        ec2.reboot_instances(InstanceIds=[one])
        cloud.end("KILL")
        cloud.start()
        self.prints(one, "boots: 3")
        with self.assertRaises(botocore.exceptions.ClientError) as refused:
            ec2.stop_instances(InstanceIds=[one])
        self.assertEqual(refused.exception.response["Error"]["Code"], "UnsupportedOperation")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(files_with(one), 0, "what it wrote is in no file")
        # The next one begins as the bundle does, from what the host kept of it.
        two = run(own)
        self.prints(two, "boots: 2")
        ec2.terminate_instances(InstanceIds=[two])
        self.becomes(two, "terminated")
        ec2.deregister_image(ImageId=own)

    def test_killed_at_any_moment_the_daemon_carries_on(self):
        ec2, cloud = self.ec2, self.cloud
        seed = int(os.environ.get("HUTCH_SEED", random.randrange(1 << 32)))
        say(f"HUTCH_SEED={seed}")
        chance = random.Random(seed)
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run():
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")
            return made["Instances"][0]["InstanceId"]

        witness = run()
        self.becomes(witness, "running")
        self.prints(witness, "boots: 1")
        unharmed = self.cloud.machines()
        mine = []
        for _ in range(10):
            act = chance.choice(["run", "stop", "start", "terminate"])
            try:
                if act == "run" and len(mine) < 3 or not mine:
                    mine.append(run())
                elif act == "terminate":
                    ec2.terminate_instances(InstanceIds=[mine.pop(chance.randrange(len(mine)))])
                elif act == "start":
                    ec2.start_instances(InstanceIds=[chance.choice(mine)])
                else:
                    ec2.stop_instances(InstanceIds=[chance.choice(mine)])
            except botocore.exceptions.ClientError as error:
                self.assertEqual(error.response["Error"]["Code"], "IncorrectInstanceState")
            time.sleep(chance.random() * 2)
            cloud.end("KILL")
            cloud.start()
        settled = {"running", "stopped", "terminated"}
        states = lambda: {i["InstanceId"]: i["State"]["Name"] for r in ec2.describe_instances()["Reservations"]
                          for i in r["Instances"]}
        self.eventually(lambda: set(states().values()) <= settled, "all is settled")
        running = sorted(id for id, state in states().items() if state == "running")
        say(f"10 kills: {len(running)} of {len(states())} run")
        machines = self.cloud.machines()
        self.assertEqual(len(machines), len(running), "each runs once")
        self.assertEqual([pid for pid in unharmed if pid not in machines], [], "no guest died")
        self.assertEqual(self.console(witness).count("boots: "), 1)
        for instance in running:
            self.prints(instance, "READY")
        known = sorted(volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"])
        files = host("bash", "-c", f"cd {cloud.state}/{REGION}/host/volumes; ls *.json").split()
        self.assertEqual(sorted(file.removesuffix(".json") for file in files), known, "no volume was lost or forgotten")
        alive = [id for id, state in states().items() if state != "terminated"]
        ec2.terminate_instances(InstanceIds=alive)
        for instance in alive:
            self.becomes(instance, "terminated")
        self.assertEqual(self.cloud.machines(), [])

    def test_the_host_does_what_every_host_has_to(self):
        programs = self.cloud.programs
        host("env", f"HUTCH_STATE={self.cloud.state}", f"HUTCH_VMM={programs / 'hutch-vmm'}",
             f"HUTCH_IMPORTER={programs / 'hutch-import-worker'}", "unshare", "-n", "sh", "-c",
             f"export HUTCH_MICRO={self.work}; ip link set lo up; exec {os.environ['HUTCH_HOST_SUITE']} --ignored the_local_host", timeout=2 * ENOUGH)
        say("the suite of all hosts")

    def test_an_instance_boots_a_kernel_and_a_ramdisk_of_ones_own(self):
        ec2, cloud = self.ec2, self.cloud
        cloud.hutch_image("import", "--kernel", self.work / "vmlinuz", "--name", "own-kernel")
        cloud.hutch_image("import", "--ramdisk", self.work / "own-initrd", "--name", "own-ramdisk")
        named = lambda name: [i["ImageId"] for i in ec2.describe_images(Filters=[{"Name": "name", "Values": [name]}])["Images"]]
        (aki,) = self.eventually(lambda: named("own-kernel"), "the kernel is an image")
        (ari,) = self.eventually(lambda: named("own-ramdisk"), "the RAM disk is an image")
        (image,) = named("bare")
        run = lambda **more: ec2.run_instances(
            ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", **more)["Instances"][0]["InstanceId"]
        one = run(KernelId=aki, RamdiskId=ari)
        self.becomes(one, "running")
        self.prints(one, f"own RAM disk: {aki} {ari}")
        self.prints(one, "boots: 1 disks: 1 READY")
        # Its disk is checked and written to a file while it runs: what it wrote is there.
        root = self.instance(one)["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        say(self.hutch("volume", "check", root))
        self.hutch("volume", "export", root, f"{cloud.state}/exported.raw")
        copy = self.work / "exported.raw"
        host("sh", "-c", f"cd {cloud.state} && sha256sum -c exported.raw.sha256 && cp --sparse=always exported.raw {copy} && rm exported.raw*")
        # As after a loss of power: the journal is replayed first.
        self.assertIn(subprocess.run(["e2fsck", "-fy", copy], stdout=subprocess.DEVNULL).returncode, (0, 1))
        boots = subprocess.run(["debugfs", "-R", "cat boots", copy], check=True, capture_output=True, text=True).stdout
        self.assertEqual(boots, "boot\n")
        say("what it wrote is in a file")
        # The images go; who was started with them starts again, also after a reboot.
        ec2.deregister_image(ImageId=aki)
        for name in ("own-kernel", "own-ramdisk"):
            cloud.hutch_image("rm", name)
        ec2.reboot_instances(InstanceIds=[one])
        self.prints(one, "boots: 2 disks: 1 READY")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        # By itself the image has nothing to boot, and a kernel alone is told where its root is, and has no RAM disk.
        ec2.reset_instance_attribute(InstanceId=one, Attribute="ramdisk")
        ec2.start_instances(InstanceIds=[one])
        self.prints(one, "Kernel command line: root=/dev/vda hutch.cmd=")
        self.prints(one, "Unable to mount root fs")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        ec2.reset_instance_attribute(InstanceId=one, Attribute="kernel")
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertIn("/boot/vmlinuz", self.instance(one)["StateReason"]["Message"])
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

    def test_a_volume_is_as_slow_as_it_says_and_grows_under_its_guest(self):
        ec2 = self.ec2
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        disk = {"VolumeSize": 4, "VolumeType": "io1", "Iops": 100, "DeleteOnTermination": True}
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano",
                                 BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": disk}])
        one = made["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        # The bucket holds a tenth of a second's; the rest comes a hundred a second.
        self.prints(one, "500 reads from")
        began, ended = re.search(r"500 reads from ([0-9.]+) to ([0-9.]+);", self.console(one)).groups()
        took = float(ended) - float(began)
        say(f"500 reads of 100 a second took {took:.2f} s")
        self.assertGreaterEqual(took, 4.8)
        data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
        serial = data.replace("-", "")
        self.prints(one, f"{serial}={4 << 21}")
        ec2.modify_volume(VolumeId=data, Size=5, Iops=250)
        self.prints(one, f"{serial}={5 << 21}")
        state = lambda: ec2.describe_volumes_modifications(VolumeIds=[data])["VolumesModifications"][0]["ModificationState"]
        self.eventually(lambda: state() == "completed", "the change is completed")
        self.assertEqual(self.console(one).count("boots: "), 1)
        snapshots = ec2.create_snapshots(InstanceSpecification={"InstanceId": one})["Snapshots"]
        ids = [snapshot["SnapshotId"] for snapshot in snapshots]
        ec2.get_waiter("snapshot_completed").wait(SnapshotIds=ids, WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        self.assertEqual(sorted(snapshot["VolumeSize"] for snapshot in snapshots)[-1], 5)
        for snapshot in ids:
            ec2.delete_snapshot(SnapshotId=snapshot)
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

    def test_a_hundred_volumes_come_to_a_guest_and_go(self):
        ec2 = self.ec2
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        names = [f"/dev/sd{a}" for a in "bcdefghijklmnopqrstuvwxyz"] + [f"/dev/xvd{a}{b}" for a in "bcd" for b in "abcdefghijklmnopqrstuvwxyz"]
        # With one vCPU: it has not vectors enough for all of them.
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t2.micro")
        one = made["Instances"][0]["InstanceId"]
        zone = made["Instances"][0]["Placement"]["AvailabilityZone"]
        self.becomes(one, "running")
        self.prints(one, "boots: 1 disks: 1 READY")
        (process,) = self.cloud.machines()

        def process_has(when):
            told = host("bash", "-c", f"cd /proc/{process}; grep -E 'VmRSS|RssAnon|Threads' status; echo files $(ls fd | wc -l); "
                        "a=$(cut -d' ' -f14,15 stat); sleep 10; echo CPU ticks in 10 s: $a to $(cut -d' ' -f14,15 stat)")
            say(f"its process {when}: {' '.join(told.split())}")

        process_has("with one volume")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            create = lambda n: ec2.create_volume(AvailabilityZone=zone, Size=6 if n % 40 == 19 else 1)["VolumeId"]
            volumes = list(pool.map(create, range(100)))
            written = [volumes[n].replace("-", "") for n in range(100) if n % 40 == 19]
            states = lambda: [v["State"] for v in ec2.describe_volumes(VolumeIds=volumes)["Volumes"]]
            self.eventually(lambda: set(states()) == {"available"}, "they are made")
            began = time.monotonic()
            list(pool.map(lambda n: ec2.attach_volume(VolumeId=volumes[n], InstanceId=one, Device=names[n]), range(100)))
            attached = lambda: [v["Attachments"][0]["State"] for v in ec2.describe_volumes(VolumeIds=volumes)["Volumes"]]
            self.eventually(lambda: attached() == ["attached"] * 100, "all are attached")
            say(f"a hundred volumes are attached after {time.monotonic() - began:.0f} s")
            self.prints(one, "many: 101:")
            say(f"its kernel had them after {time.monotonic() - began:.0f} s")
            serials = sorted(volume.replace("-", "") for volume in volumes)
            found = lambda: [sorted(all.split()) for all in re.findall(r"many: 101:(.*);", self.console(one))]
            self.eventually(found, "the serials")
            self.assertEqual(len(found()[0]), 101)
            self.assertLessEqual(set(serials), set(found()[0]))
            for serial in written:
                self.prints(one, f"{serial} has: ;")
                self.prints(one, f"{serial} is written;")
            process_has("with a hundred and one")
            ec2.reboot_instances(InstanceIds=[one])
            self.eventually(lambda: len(found()) == 2, "they are there again")
            self.assertEqual(self.console(one).count("boots: 2 "), 1)
            self.assertLessEqual(set(serials), set(found()[1]))
            for serial in written:
                self.prints(one, f"{serial} has: what is of {serial};")
            began = time.monotonic()
            list(pool.map(lambda volume: ec2.detach_volume(VolumeId=volume), volumes))
            self.eventually(lambda: states() == ["available"] * 100, "the guest lets them all go")
            say(f"its kernel has let a hundred go after {time.monotonic() - began:.0f} s")
            self.assertEqual(len(self.instance(one)["BlockDeviceMappings"]), 1)
            list(pool.map(lambda volume: ec2.delete_volume(VolumeId=volume), volumes))
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

        # So many from the start.
        devices = [{"DeviceName": name, "Ebs": {"VolumeSize": 1, "DeleteOnTermination": True}} for name in names[:40]]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=devices)
        two = made["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "many: 41:")
        ec2.terminate_instances(InstanceIds=[two])
        self.becomes(two, "terminated")

    def test_snapshots_of_a_guest_that_writes_lose_nothing_it_was_told_is_kept(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run(**disk):
            mapping = {"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True, **disk}}
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])
            return made["Instances"][0]["InstanceId"]

        def told(instance, what):
            return [int(n) for n in re.findall(what + r": (\d+);", self.console(instance))]

        one = run(VolumeSize=3)
        self.becomes(one, "running")
        self.prints(one, "kept: none;")
        data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
        layers = lambda: host("bash", "-c", f"cd {cloud.state}/{REGION}/host/layers; ls -s").split("\n")
        taken = []
        for turn in range(4):
            more = len(told(one, "acked")) + 5
            self.eventually(lambda: len(told(one, "acked")) > more, "it writes")
            acked = told(one, "acked")[-1]
            began = time.monotonic()
            snapshot = ec2.create_snapshot(VolumeId=data)["SnapshotId"]
            if turn == 2:
                cloud.end("KILL")
                cloud.start()
            done = lambda: ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]["State"]
            self.eventually(lambda: done() != "pending", "the snapshot is made")
            self.assertEqual(done(), "completed")
            say(f"snapshot {turn} after {acked}, in {time.monotonic() - began:.2f} s")
            taken.append((snapshot, acked))
        usage = {row["id"]: row for row in json.loads(self.hutch("usage", "-o", "json"))}
        say(f"usage: {usage}")
        self.assertGreater(usage[data]["alone"], 0)
        self.assertEqual([usage[snapshot]["alone"] for snapshot, _ in taken], [0] * 4, "the volume has all they have")
        # The first two go while the guest writes; what the others need of them stays.
        for snapshot, _ in taken[:2]:
            ec2.delete_snapshot(SnapshotId=snapshot)
        self.assertEqual(len(self.cloud.machines()), 1)

        # Killed, it finds all that it was told is kept.
        host("kill", "-9", *self.cloud.machines())
        self.becomes(one, "stopped")
        acked = told(one, "acked")[-1]
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: told(one, "kept"), "it tells what it kept")
        kept = told(one, "kept")[-1]
        say(f"killed after {acked} it kept {kept}")
        self.assertGreaterEqual(kept, acked)

        # A volume of each snapshot begins with what was kept then.
        for snapshot, acked in taken[2:]:
            two = run(SnapshotId=snapshot)
            self.becomes(two, "running")
            self.eventually(lambda: told(two, "kept"), "it tells what it kept")
            kept = told(two, "kept")[0]
            say(f"a snapshot taken after {acked} has {kept}")
            self.assertGreaterEqual(kept, acked)
            self.assertLessEqual(kept, told(one, "kept")[-1])
            ec2.terminate_instances(InstanceIds=[two])
            self.becomes(two, "terminated")
        say(layers())
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        for snapshot, _ in taken[2:]:
            ec2.delete_snapshot(SnapshotId=snapshot)
        self.eventually(lambda: layers() == ["total 0", ""], "all of it is given back")

    def test_a_database_has_all_it_committed_however_often_its_machine_is_killed(self):
        ec2, cloud = self.ec2, self.cloud
        kills, dice = int(os.environ.get("HUTCH_KILLS", "6")), random.Random()
        seed = os.environ.get("HUTCH_SEED") or dice.randrange(1 << 32)
        dice.seed(int(seed))
        say(f"{kills} kills, HUTCH_SEED={seed}")
        # A file system with the programs, which the guest does not have.
        tree = self.work / "data"
        (tree / "lib").mkdir(parents=True)
        for program in ("sqlite3", "e2fsck"):
            path = shutil.which(program)
            shutil.copy(path, tree / "lib")
            for library in re.findall(r"(/\S+) \(", subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout):
                shutil.copy(library, tree / "lib" / ("ld.so" if "/ld-" in library else pathlib.Path(library).name))
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, self.work / "data.raw", "7G"], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", self.work / "data.raw", self.work / "data.qcow2"], check=True)
        self.hutch("volume", "import", "--name", "database", self.work / "data.qcow2")
        (volume,) = ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["database"]}])["Volumes"]
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        one = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        ec2.attach_volume(InstanceId=one, VolumeId=volume["VolumeId"], Device="/dev/sdf")
        layers = f"{cloud.state}/{REGION}/host/layers"
        committed, snapshots, boot = 0, [], 0
        said = lambda what: re.findall(what, self.console(one))
        for kill in range(kills):
            ec2.start_instances(InstanceIds=[one])
            self.becomes(one, "running")
            boot = self.eventually(lambda: max([int(n) for n in said(r"committed (\d+): ") if int(n) > boot], default=0), "it commits")
            self.assertEqual(said(rf"fsck {boot}: (.*);"), ["0"], self.console(one))
            ((sound, has),) = said(rf"database {boot}: (.*), has (\d+);")
            self.assertEqual(sound, "ok, 0 spoilt")
            self.assertGreaterEqual(int(has), committed)
            if dice.random() < 0.6:
                time.sleep(dice.uniform(0, 2))
                made = ec2.create_snapshot(VolumeId=volume["VolumeId"])["SnapshotId"]
                snapshots.append(made)
            if len(snapshots) > 1 and dice.random() < 0.5:
                ec2.delete_snapshot(SnapshotId=snapshots.pop(dice.randrange(len(snapshots))))
            time.sleep(dice.uniform(0, 5))
            host("kill", "-9", *cloud.machines())
            self.becomes(one, "stopped")
            committed = int(said(rf"committed {boot}: (\d+);")[-1])
            say(f"kill {kill}: it had {has}, and committed {committed}")
            # 3: clusters that nothing names, which the next opening frees.
            check = f"for f in {layers}/*.qcow2; do qemu-img check -q -f qcow2 $f >&2; s=$?; [ $s = 0 ] || [ $s = 3 ] || exit $s; done"
            host("bash", "-c", check)
        # What it had at the end it has on a volume of a snapshot, and gives all of it back.
        last = ec2.create_snapshot(VolumeId=volume["VolumeId"])["SnapshotId"]
        ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[last], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        for snapshot in snapshots:
            ec2.delete_snapshot(SnapshotId=snapshot)
        mapping = {"DeviceName": "/dev/sdf", "Ebs": {"SnapshotId": last, "DeleteOnTermination": True}}
        two = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "fsck 1: 0;")
        self.prints(two, "database 1: ok, 0 spoilt, has")
        has = int(re.search(r"spoilt, has (\d+);", self.console(two)).group(1))
        self.assertGreaterEqual(has, committed)
        ec2.terminate_instances(InstanceIds=[one, two])
        for instance in (one, two):
            self.becomes(instance, "terminated")
        host("bash", "-c", f"for f in {layers}/*.qcow2; do qemu-img check -q -f qcow2 $f || exit; done")
        ec2.delete_snapshot(SnapshotId=last)
        ec2.delete_volume(VolumeId=volume["VolumeId"])
        self.eventually(lambda: host("ls", layers) == "", "all of it is given back")

    def test_a_guest_waits_while_the_host_is_full(self):
        # hutchd on a file system of its own, which is small.
        first, cloud = self.cloud.state, self.cloud
        cloud.end("TERM")
        cloud.state = f"{first}.small"
        host("mkdir", cloud.state)
        host("mount", "-t", "tmpfs", "-o", "size=200m", "none", cloud.state)
        try:
            cloud.image()
            cloud.start()
            image = self.ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
            mapping = {"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True, "VolumeSize": 3}}
            made = self.ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])
            one = made["Instances"][0]["InstanceId"]
            self.becomes(one, "running")
            self.prints(one, "acked: 3;")
            data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
            status = lambda: self.ec2.describe_volume_status(VolumeIds=[data])["VolumeStatuses"][0]
            self.assertEqual((status()["VolumeStatus"]["Status"], status()["Events"]), ("ok", []))
            host("sh", "-c", f"cat /dev/zero >{cloud.state}/full", check=False)
            self.eventually(lambda: status()["VolumeStatus"]["Status"] == "impaired", "the volume waits")
            self.assertEqual(status()["Events"][0]["EventType"], "io-performance:stalled")
            self.assertEqual(self.instance(one)["State"]["Name"], "running")
            acked = lambda: int(re.findall(r"acked: (\d+);", self.console(one))[-1])
            stood = acked()
            say(f"the host is full, and the guest waits after {stood}")
            time.sleep(3)
            self.assertEqual(acked(), stood)
            host("rm", f"{cloud.state}/full")
            self.eventually(lambda: acked() > stood + 3, "it goes on")
            self.eventually(lambda: status()["VolumeStatus"]["Status"] == "ok", "the volume waits no more")
            self.ec2.terminate_instances(InstanceIds=[one])
            self.becomes(one, "terminated")
        finally:
            cloud.end("TERM")
            host("umount", cloud.state, check=False)
            host("rmdir", cloud.state, check=False)
            cloud.state = first
            cloud.start()

    def test_regions_and_networks_of_ones_own_are_apart(self):
        here, there = self.ec2, self.cloud.client(OTHER)
        self.addCleanup(there.close)
        web = [{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
        groups = {}

        def image(ec2):
            return ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def group(ec2, vpc):
            if vpc in groups:
                return groups[vpc]
            made = groups[vpc] = ec2.create_security_group(GroupName="apart", Description="port 80", VpcId=vpc)["GroupId"]
            ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=web)
            return made

        def run(ec2, vpc, **more):
            interface = {"DeviceIndex": 0, "Groups": [group(ec2, vpc)], **more}
            made = ec2.run_instances(ImageId=image(ec2), MinCount=1, MaxCount=1, InstanceType="t3.nano", NetworkInterfaces=[interface],
                                     MetadataOptions={"InstanceMetadataTags": "enabled"})["Instances"][0]
            return made["InstanceId"], made["PrivateIpAddress"]

        def state(ec2, instance):
            return ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]["State"]["Name"]

        default = lambda ec2: ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
        # A network of one's own, without a way to the world, whose other instance is in the same.
        vpc = here.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
        subnet = here.create_subnet(VpcId=vpc, CidrBlock="10.77.3.0/24")["Subnet"]["SubnetId"]
        first, friend = (here, *run(here, default(here))), (here, *run(here, default(here)))
        second, own = (there, *run(there, default(there))), (here, *run(here, vpc, SubnetId=subnet, PrivateIpAddress="10.77.3.9"))
        everyone = (first, friend, second, own)
        self.assertEqual(own[2], "10.77.3.9")
        self.assertEqual(len({ip for _, _, ip in everyone}), 4)

        def console(ec2, instance):
            return ec2.get_console_output(InstanceId=instance, Latest=True).get("Output", "")

        for ec2, instance, ip in everyone:
            self.eventually(lambda: f"I am {instance} at {ip}" in console(ec2, instance), f"{instance} runs")
            self.eventually(lambda: f"hello from {instance}" in self.web(ip), f"the host reaches {instance} at {ip}")
            say(f"{instance} at {ip}")

        # The groups of all let everybody in; only who is in the same network comes so far.
        for ec2, instance, _ in everyone:
            ec2.create_tags(Resources=[instance], Tags=[{"Key": "reach", "Value": " ".join(ip for _, _, ip in everyone)}])
        self.eventually(lambda: f"hello from {friend[1]}" in console(*first[:2]), "the first reaches its friend")
        for ec2, instance, _ in everyone:
            for _, other, theirs in everyone:
                if other == instance or {other, instance} == {first[1], friend[1]}:
                    continue
                self.eventually(lambda: console(ec2, instance).count(f"{theirs} says:") >= 2, f"{instance} has tried {theirs}")
                self.assertNotIn(f"hello from {other}", console(ec2, instance))
        say("only friends reach each other")

        # An image is copied from one region to the other, and launched there.
        made = here.create_image(InstanceId=first[1], Name="far", NoReboot=True)["ImageId"]
        here.get_waiter("image_available").wait(ImageIds=[made], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        copy = there.copy_image(SourceRegion=REGION, SourceImageId=made, Name="far")["ImageId"]
        there.get_waiter("image_available").wait(ImageIds=[copy], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        here.terminate_instances(InstanceIds=[first[1], friend[1], own[1]])
        third = there.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        self.eventually(lambda: "boots: 2 disks: 1 READY" in console(there, third), "the copy boots")
        say("an image of the one region runs in the other")
        there.terminate_instances(InstanceIds=[second[1], third])
        for ec2, instance in ((here, first[1]), (here, friend[1]), (here, own[1]), (there, second[1]), (there, third)):
            self.eventually(lambda: state(ec2, instance) == "terminated", f"{instance} terminated")
        for ec2, id in ((here, made), (there, copy)):
            disks = ec2.describe_images(ImageIds=[id])["Images"][0]["BlockDeviceMappings"]
            ec2.deregister_image(ImageId=id)
            for disk in disks:
                ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        left = lambda: host("bash", "-c", f"cd {self.cloud.state}; ls {REGION}/host/layers {OTHER}/host/layers").split()
        self.eventually(lambda: left() == [f"{REGION}/host/layers:", f"{OTHER}/host/layers:"], "all of it is given back")

    def test_a_network_of_ones_own_changes_under_its_guests(self):
        here, there = self.ec2, self.cloud.client(OTHER)
        self.addCleanup(there.close)

        def run(ec2, subnet, **more):
            image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
            cards = [{"DeviceIndex": n, "SubnetId": subnet, **more} for n in range(2)]
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", NetworkInterfaces=cards)
            return made["Instances"][0]

        vpc = here.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
        subnet = here.create_subnet(VpcId=vpc, CidrBlock="10.20.1.0/24")["Subnet"]["SubnetId"]
        group = here.create_security_group(GroupName="own-web", Description="port 80", VpcId=vpc)["GroupId"]
        here.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=80, ToPort=80, CidrIp="0.0.0.0/0")
        made = run(here, subnet, Groups=[group])
        one, ip = made["InstanceId"], made["PrivateIpAddress"]
        self.becomes(one, "running")
        self.prints(one, f"I am {one} at {ip}")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "the host reaches it")

        # Its routes are its subnet's, and change while it runs.
        second = self.instance(one)["NetworkInterfaces"][1]["PrivateIpAddress"]
        taps = ["hu" + "".join(f"{int(byte):02x}" for byte in at.split(".")) for at in (ip, second)]
        routes = lambda: host("/usr/sbin/nft", "list", "set", "inet", "hutch", "routes")
        out = lambda: all(f'"{tap}" . 0.0.0.0/0' in routes() for tap in taps)
        self.assertNotIn("0.0.0.0/0", routes())
        igw = here.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        here.attach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
        table = here.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"][0]["RouteTableId"]
        here.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=igw)
        self.eventually(out, "both interfaces have a way out")
        # One more address, which is its own from then on.
        card = self.instance(one)["NetworkInterfaces"][0]["NetworkInterfaceId"]
        here.assign_private_ip_addresses(NetworkInterfaceId=card, PrivateIpAddresses=["10.20.1.77"])
        self.eventually(lambda: f"10.20.1.77 dev {taps[0]}" in host("ip", "route"), "it is routed")
        # Whose addresses are in use here cannot run beside it, and changes nothing.
        clash = there.create_vpc(CidrBlock="10.20.0.0/20")["Vpc"]["VpcId"]
        within = there.create_subnet(VpcId=clash, CidrBlock="10.20.1.0/24")["Subnet"]["SubnetId"]
        with self.assertRaises(botocore.exceptions.ClientError) as refused:
            run(there, within)
        self.assertEqual(refused.exception.response["Error"]["Code"], "Unsupported")
        self.assertIn(vpc, str(refused.exception))
        self.assertEqual(there.describe_network_interfaces()["NetworkInterfaces"], [])

        # The daemon is killed, and all of it is as it was.
        machines = self.cloud.machines()
        self.cloud.end("KILL")
        self.cloud.start()
        self.assertEqual(self.cloud.machines(), machines)
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "the host reaches it as before")
        self.assertTrue(out())
        here.unassign_private_ip_addresses(NetworkInterfaceId=card, PrivateIpAddresses=["10.20.1.77"])
        self.eventually(lambda: "10.20.1.77" not in host("ip", "route"), "it is routed no more")
        here.delete_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
        self.eventually(lambda: "0.0.0.0/0" not in routes(), "there is no way out")
        here.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(host("bash", "-c", "nft list tables | grep hutch; ls /sys/class/net | grep ^hu", check=False), "")

    def test_an_instance_lives_through_all_its_states(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        cloud.aws("create-key-pair", "--key-name", "me")
        group = cloud.aws("create-security-group", "--group-name", "web", "--description", "port 80")["GroupId"]
        web = ["--group-id", group, "--protocol", "tcp", "--port", "80", "--cidr", "0.0.0.0/0"]
        cloud.aws("authorize-security-group-ingress", *web)
        made = cloud.aws("run-instances", "--image-id", image, "--instance-type", "t3.nano", "--key-name", "me",
                         "--security-group-ids", group, "--user-data", "what it is told", "--block-device-mappings",
                         '[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "DeleteOnTermination": true}}]')
        one = made["Instances"][0]["InstanceId"]
        ip = made["Instances"][0]["PrivateIpAddress"]
        self.becomes(one, "running")
        self.prints(one, f"I am {one} at {ip}")
        self.prints(one, "told: what it is told key: ssh-")
        self.prints(one, "boots: 1 disks: 2 READY")

        # The firewall is what the security group says, also after it changed.
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "port 80 is open")
        cloud.aws("revoke-security-group-ingress", *web)
        self.eventually(lambda: not self.web(ip), "port 80 is closed")
        say("port 80 is open, and closed")
        # By the members of a group, too: the host is none.
        own = ["--group-id", group, "--ip-permissions", f'[{{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, '
               f'"UserIdGroupPairs": [{{"GroupId": "{group}"}}]}}]']
        cloud.aws("authorize-security-group-ingress", *own)
        self.eventually(lambda: f"{group}-4" in host("/usr/sbin/nft", "list", "table", "inet", "hutch"), "members are a set")
        self.assertFalse(self.web(ip), "the host is no member")
        cloud.aws("revoke-security-group-ingress", *own)

        # A volume comes while it runs: the guest finds it by itself, by its id, and writes to it.
        data = cloud.aws("create-volume", "--availability-zone",
                         self.instance(one)["Placement"]["AvailabilityZone"], "--size", "2")["VolumeId"]
        state = lambda: ec2.describe_volumes(VolumeIds=[data])["Volumes"][0]
        self.eventually(lambda: state()["State"] == "available", "the volume is made")
        told = cloud.aws("attach-volume", "--volume-id", data, "--instance-id", one, "--device", "/dev/sdg")
        self.assertEqual(told["State"], "attaching")
        self.eventually(lambda: state()["Attachments"][0]["State"] == "attached", "the volume is attached")
        disk = f"{data.replace('-', '')}={2 << 21}"
        self.prints(one, disk)

        # Killed, the daemon leaves its guests alone, and finds them again.
        before = self.cloud.machines()
        cloud.end("KILL")
        self.assertEqual(self.cloud.machines(), before)
        cloud.start()
        self.assertEqual(self.instance(one)["State"]["Name"], "running")
        cloud.aws("authorize-security-group-ingress", *web)
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "it is served as before")
        self.assertEqual(self.cloud.machines(), before)
        say("hutchd was killed, the guest runs on and is told its metadata")

        # An elastic address leads to the same port, as the group says; and to none when it is disassociated.
        address = cloud.aws("allocate-address")
        public, allocation = address["PublicIp"], address["AllocationId"]
        associated = cloud.aws("associate-address", "--allocation-id", allocation, "--instance-id", one)["AssociationId"]
        self.eventually(lambda: f"hello from {one}" in self.web(public), "its public address leads to it")
        cloud.aws("revoke-security-group-ingress", *web)
        # One that leads nowhere goes by the host's default route, where something else may answer.
        nowhere = lambda: f"hello from {one}" not in self.web(public)
        self.eventually(nowhere, "port 80 is closed there, too")
        cloud.aws("authorize-security-group-ingress", *web)
        cloud.end("KILL")
        cloud.start()
        self.eventually(lambda: f"hello from {one}" in self.web(public), "as before the daemon was killed")
        cloud.aws("disassociate-address", "--association-id", associated)
        self.eventually(nowhere, "its public address leads nowhere")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "its private address leads to it as ever")
        cloud.aws("associate-address", "--allocation-id", allocation, "--instance-id", one)
        say(f"{public} led to the guest, and led nowhere")

        # A reboot boots what is on the disk now; it stays running.
        cloud.aws("reboot-instances", "--instance-ids", one)
        self.prints(one, "BUTTON")
        self.prints(one, "boots: 2 disks: 3 READY")
        self.assertEqual(self.instance(one)["State"]["Name"], "running")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "it is served after the reboot")

        # And the volume goes, when the guest has let it go.
        self.prints(one, disk)
        self.eventually(lambda: disk in self.console(one).rpartition("volumes:")[2], "the guest has it")
        told = cloud.aws("detach-volume", "--volume-id", data)
        self.assertEqual(told["State"], "detaching")
        self.eventually(lambda: state()["State"] == "available", "the volume is detached")
        self.eventually(lambda: disk not in self.console(one).rpartition("volumes:")[2], "the guest has it no more")
        ec2.delete_volume(VolumeId=data)
        say("a volume was attached to a guest that runs, and detached")

        # Stopped and started: another run, the same disks.
        cloud.aws("stop-instances", "--instance-ids", one)
        self.becomes(one, "stopped")
        self.assertEqual(self.cloud.machines(), [])
        cloud.aws("start-instances", "--instance-ids", one)
        self.becomes(one, "running")
        self.prints(one, "boots: 3 disks: 2 READY")
        self.eventually(lambda: f"hello from {one}" in self.web(public), "the elastic address stays with it")

        # An AMI of it, copied, launched beside it when the first is gone: its root is a copy.
        made = cloud.aws("create-image", "--instance-id", one, "--name", "made", "--no-reboot")["ImageId"]
        available = ec2.get_waiter("image_available")
        available.wait(ImageIds=[made], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        disks = ec2.describe_images(ImageIds=[made])["Images"][0]["BlockDeviceMappings"]
        copy = ec2.copy_image(SourceRegion=REGION, SourceImageId=made, Name="copy")["ImageId"]
        available.wait(ImageIds=[copy], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        ec2.deregister_image(ImageId=made)
        for disk in disks:
            ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        two = ec2.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.nano", SecurityGroupIds=[group])
        two = two["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "boots: 4 disks: 2 READY")

        # A machine that dies is noticed; its instance says why.
        self.assertEqual(len(self.cloud.machines()), 2)
        host("kill", "-9", *self.cloud.machines())
        for instance in (one, two):
            self.becomes(instance, "stopped")
            self.assertIn("killed", self.instance(instance)["StateReason"]["Message"])
        self.assertEqual(host("bash", "-c", "ls /sys/class/net | grep ^hu", check=False), "")

        # Terminated, nothing is left but what was made by name.
        cloud.aws("terminate-instances", "--instance-ids", one, two)
        for instance in (one, two):
            self.becomes(instance, "terminated")
        kept = [v for v in ec2.describe_volumes()["Volumes"] if v["State"] != "deleting"]
        self.assertEqual([v["Size"] for v in kept], [], "the mapping's volumes go with the instance")
        self.assertEqual(host("bash", "-c", "nft list tables | grep hutch; ip route | grep -w " + public, check=False), "")
        cloud.aws("release-address", "--allocation-id", allocation)
        disks = ec2.describe_images(ImageIds=[copy])["Images"][0]["BlockDeviceMappings"]
        ec2.deregister_image(ImageId=copy)
        for disk in disks:
            ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        left = lambda: host("bash", "-c", f"cd {cloud.state}/{REGION}/host; ls layers machines snapshots volumes").split()
        self.eventually(lambda: left() == ["layers:", "machines:", "snapshots:", "volumes:"], "all of it is given back")
        say("nothing is left")


if __name__ == "__main__":
    unittest.main()
