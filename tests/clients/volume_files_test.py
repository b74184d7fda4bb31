"""hutch volume: export, import and check, by hutchd on the simulated host, whose disks are empty."""

import json
import os
import pathlib
import subprocess
import tempfile

from daemon import KEY, REGION, SECRET, Case
from image_life_test import TwoAccounts

HUTCH = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")


class Files(Case):
    DAEMON = TwoAccounts

    def setUp(self):
        room = tempfile.TemporaryDirectory()
        self.addCleanup(room.cleanup)
        self.room = pathlib.Path(room.name)

    def hutch(self, *words, key=KEY, secret=SECRET, fails=False):
        environment = dict(os.environ, HUTCH_ENDPOINT=self.daemon.url, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret, AWS_DEFAULT_REGION=REGION)
        done = subprocess.run([HUTCH, "volume", *words], env=environment, capture_output=True, text=True, cwd=self.room)
        self.assertEqual(done.returncode != 0, fails, done)
        return done.stderr if fails else done.stdout

    def snapshots(self):
        return self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]

    def volume(self, name):
        made = self.ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=2, TagSpecifications=[
            {"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": name}]}])["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[made], WaiterConfig={"Delay": 0.05})
        return made

    def test_export(self):
        made, before = self.volume("data"), self.snapshots()
        self.hutch("export", made, "a.raw")
        told = json.loads(self.hutch("export", "data", "a.qcow2", "-o", "json"))
        self.assertEqual((told["size"], told["format"], told["path"]), (2 << 30, "qcow2", str(self.room / "a.qcow2")))
        self.assertEqual(self.snapshots(), before, "what was taken is gone")
        subprocess.run("sha256sum --quiet -c a.raw.sha256 a.qcow2.sha256 && qemu-img check -q a.qcow2 && qemu-img compare -q -f raw -F qcow2 a.raw a.qcow2",
                       shell=True, check=True, cwd=self.room)
        self.assertLess((self.room / "a.raw").stat().st_blocks, 100, "it is a hole")
        self.assertIn("a.raw is there already", self.hutch("export", "data", "a.raw", fails=True))
        self.assertIn("InvalidVolume.NotFound", self.hutch("export", "vol-12345678", "b.raw", fails=True))
        self.assertIn("there is no volume none", self.hutch("export", "none", "b.raw", fails=True))
        self.assertIn("cannot make", self.hutch("export", "data", "no/b.raw", fails=True))
        self.assertEqual(self.snapshots(), before)
        # A snapshot is left where it is; files are the administrator's.
        snapshot = self.ec2.create_snapshot(VolumeId=made)["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        self.hutch("export", snapshot, "c", "--format", "qcow2")
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", "c"], check=True, cwd=self.room)
        self.assertIn(snapshot, [s["SnapshotId"] for s in self.snapshots()])
        self.ec2.modify_snapshot_attribute(SnapshotId=snapshot, Attribute="createVolumePermission", OperationType="add", GroupNames=["all"])
        self.assertIn("UnauthorizedOperation", self.hutch("export", snapshot, "d", key="AKIDOTHER", secret="other", fails=True))
        self.assertEqual(sorted(path.name for path in self.room.iterdir()), ["a.qcow2", "a.qcow2.sha256", "a.raw", "a.raw.sha256", "c", "c.sha256"])

    def test_import(self):
        subprocess.run("truncate -s 5M a.raw && qemu-img convert -f raw -O vmdk a.raw a.vmdk && qemu-img convert -f raw -O qcow2 a.raw a.qcow2 && xz -k a.raw",
                       shell=True, check=True, cwd=self.room)
        before = self.snapshots()
        for name, more in [("a.vmdk", []), ("a.raw.xz", ["--format", "raw.xz"]), ("a.qcow2", ["--size", "3", "--type", "gp2", "--zone", f"{REGION}b"])]:
            made = self.hutch("import", name, "--name", name, *more).strip()
            volume = self.ec2.describe_volumes(VolumeIds=[made])["Volumes"][0]
            self.assertEqual(volume["Tags"], [{"Key": "Name", "Value": name}])
            expected = (3, "gp2", f"{REGION}b") if more[:1] == ["--size"] else (1, "gp3", f"{REGION}a")
            self.assertEqual((volume["Size"], volume["VolumeType"], volume["AvailabilityZone"]), expected)
        self.eventually(lambda: self.snapshots() == before)
        (self.room / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(600))
        self.assertIn("nothing is imported: the image is refused", self.hutch("import", "bad.qcow2", fails=True))
        self.assertIn("cannot be read", self.hutch("import", "none.raw", fails=True))
        self.assertIn("neither a file", self.hutch("import", "/dev/zero", fails=True))
        self.assertIn("UnauthorizedOperation", self.hutch("import", "a.vmdk", key="AKIDOTHER", secret="other", fails=True))

    def test_check(self):
        made, before = self.volume("checked"), self.snapshots()
        self.assertEqual(self.hutch("check", made).strip(), f"{made} is whole: 0 B of data were read")
        self.assertEqual(json.loads(self.hutch("check", "checked", "-o", "json")), {"whole": True, "bytes": 0, "layers": []})
        self.eventually(lambda: self.snapshots() == before)
        self.assertIn("InvalidVolume.NotFound", self.hutch("check", made, key="AKIDOTHER", secret="other", fails=True))

    def test_repair(self):
        made = self.volume("broken")
        self.assertEqual(self.hutch("repair", "broken").strip(), "broken is whole")
        self.assertEqual(json.loads(self.hutch("repair", made, "--discard-broken", "-o", "json")), {"whole": True, "layers": []})
        self.assertIn("InvalidVolume.NotFound", self.hutch("repair", made, key="AKIDOTHER", secret="other", fails=True))
        self.assertIn("InvalidVolume.NotFound", self.hutch("repair", "vol-12345678", fails=True))
        image = self.ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        instance = self.ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, Placement={"AvailabilityZone": f"{REGION}a"})["Instances"][0]["InstanceId"]
        self.ec2.get_waiter("instance_running").wait(InstanceIds=[instance], WaiterConfig={"Delay": 0.05})
        self.ec2.attach_volume(VolumeId=made, InstanceId=instance, Device="/dev/sdf")
        said = self.hutch("repair", made, fails=True)
        self.assertIn("IncorrectState", said)
        self.assertIn(instance, said)
        self.ec2.stop_instances(InstanceIds=[instance])
        self.ec2.get_waiter("instance_stopped").wait(InstanceIds=[instance], WaiterConfig={"Delay": 0.05})
        self.hutch("repair", made)

    def test_the_state_is_where_the_environment_says(self):
        words = [os.environ["HUTCHD"], "--host", "simulated", "--listen", "127.0.0.1:0"]
        environment = dict(os.environ, HUTCH_STATE=self.daemon.state.name)
        second = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        self.assertNotEqual(second.returncode, 0)
        self.assertIn(f"another hutchd has {self.daemon.state.name}", second.stderr)
