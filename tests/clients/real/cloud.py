"""Real guests behind the real protocol: hutchd --host local, the aws CLI and boto3. In the lab where HUTCH_LAB says so.

`tests/clients/run real` runs the stories here, by `make stories`, all on one hutchd. The guest is the micro image; what it does is in
STORY below.
"""

import atexit
import concurrent.futures
import http.client
import json
import os
import pathlib
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

ROOT = pathlib.Path(__file__).resolve().parents[3]
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
    cloud = None

    @classmethod
    def setUpClass(cls):
        if Story.cloud is None:
            Story.cloud = Cloud()
            atexit.register(Story.end)
            Story.work = cls.cloud.image()
            cls.cloud.start()
            Story.ec2 = cls.cloud.client()

    @classmethod
    def end(cls):
        if cls.cloud.process is not None:
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

    def at_once(self, act, many):
        """Does something with each of many, eight at a time, by connections of their own."""
        ec2 = self.cloud.client()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda one: act(ec2, one), many))
        ec2.close()
        return done

    def hutch(self, *words):
        """hutch itself, beside its daemon."""
        port = 8773 if LAB else PORT
        command = ["env", f"HUTCH_ENDPOINT=http://127.0.0.1:{port}", f"AWS_ACCESS_KEY_ID={KEY}", f"AWS_SECRET_ACCESS_KEY={SECRET}"]
        return host(*command, self.cloud.programs / "hutch", *words)
