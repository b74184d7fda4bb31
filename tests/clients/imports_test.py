"""boto3: disks of other machines are imported from files below --import-dir, as snapshots and as images."""

import os
import pathlib
import random
import subprocess
import tempfile

from daemon import REGION, Case


class Imports(Case):
    @classmethod
    def setUpClass(cls):
        cls.room = tempfile.TemporaryDirectory()
        cls.dir = pathlib.Path(cls.room.name, "import").resolve()
        (cls.dir / "sub").mkdir(parents=True)
        cls.OPTIONS = ("--rate", "0", "--import-dir", str(cls.dir))
        raw = cls.dir / "disk.raw"
        with raw.open("wb") as file:
            file.write(random.Random(1).randbytes(100_000))
            file.truncate(3 << 30)
        for name, words in [("sub/disk.vmdk", ["-O", "vmdk", "-o", "subformat=streamOptimized"]), ("disk.vhd", ["-O", "vpc", "-o", "force_size=on"]),
                            ("disk.vhdx", ["-O", "vhdx"]), ("disk.qcow2", ["-O", "qcow2"])]:
            subprocess.run(["qemu-img", "convert", "-f", "raw", *words, raw, cls.dir / name], check=True)
        subprocess.run("head -c 2M disk.raw | xz -0 >small.raw.xz", shell=True, check=True, cwd=cls.dir)
        (cls.dir / "bad.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
        (cls.dir / "secret").symlink_to("/etc/passwd")
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        cls.room.cleanup()

    def url(self, name):
        return f"file://{self.dir / name}"

    def snapshot_task(self, id):
        return self.ec2.describe_import_snapshot_tasks(ImportTaskIds=[id])["ImportSnapshotTasks"][0]["SnapshotTaskDetail"]

    def image_task(self, id):
        return self.ec2.describe_import_image_tasks(ImportTaskIds=[id])["ImportImageTasks"][0]

    def over(self, look, *id):
        self.eventually(lambda: look(*id)["Status"] in ("completed", "deleted"))
        return look(*id)

    def test_each_format_becomes_a_snapshot(self):
        for name, more, gib in [("disk.raw", {"Format": "RAW"}, 3), ("sub/disk.vmdk", {"Format": "vmdk"}, 3), ("disk.vhd", {}, 3),
                                ("disk.vhdx", {"Format": "VHDX"}, 3), ("disk.qcow2", {}, 3), ("small.raw.xz", {}, 1)]:
            made = self.ec2.import_snapshot(Description=name, DiskContainer=dict(Url=self.url(name), **more), TagSpecifications=[
                {"ResourceType": "import-snapshot-task", "Tags": [{"Key": "of", "Value": name}]}])
            self.assertRegex(made["ImportTaskId"], "^import-snap-[0-9a-f]{17}$")
            self.assertEqual((made["SnapshotTaskDetail"]["Status"], made["Description"]), ("active", name))
            self.assertEqual(made["Tags"], [{"Key": "of", "Value": name}])
            self.assertNotIn("SnapshotId", made["SnapshotTaskDetail"])
            told = self.over(self.snapshot_task, made["ImportTaskId"])
            self.assertEqual(told["Status"], "completed", told)
            self.assertEqual((told["Url"], told["DiskImageSize"]), (self.url(name), (self.dir / name).stat().st_size))
            snapshot = self.ec2.describe_snapshots(SnapshotIds=[told["SnapshotId"]])["Snapshots"][0]
            self.assertEqual((snapshot["VolumeSize"], snapshot["State"], snapshot["Description"]), (gib, "completed", name))
            volume = self.ec2.create_volume(SnapshotId=told["SnapshotId"], AvailabilityZone=f"{REGION}a")["VolumeId"]
            self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
            self.ec2.delete_volume(VolumeId=volume)
            self.ec2.delete_snapshot(SnapshotId=told["SnapshotId"])
        done = self.ec2.describe_import_snapshot_tasks(Filters=[{"Name": "task-state", "Values": ["completed"]}])["ImportSnapshotTasks"]
        self.assertGreaterEqual(len(done), 6)

    def test_disks_become_an_image(self):
        ask = dict(Description="two disks", ClientToken="once", DiskContainers=[
            {"Url": self.url("sub/disk.vmdk"), "Format": "VMDK", "Description": "root"}, {"Url": self.url("small.raw.xz"), "DeviceName": "/dev/sdf"}])
        made = self.ec2.import_image(**ask)
        id = made["ImportTaskId"]
        self.assertRegex(id, "^import-ami-[0-9a-f]{17}$")
        self.assertEqual(self.ec2.import_image(**ask)["ImportTaskId"], id, "the same token")
        told = self.over(self.image_task, id)
        self.assertEqual(told["Status"], "completed", told)
        self.assertEqual([d["DeviceName"] for d in told["SnapshotDetails"]], ["/dev/xvda", "/dev/sdf"])
        image = self.ec2.describe_images(ImageIds=[told["ImageId"]])["Images"][0]
        self.assertEqual((image["Name"], image["Description"], image["State"]), (id, "two disks", "available"))
        self.assertEqual([d["Ebs"]["VolumeSize"] for d in image["BlockDeviceMappings"]], [3, 1])
        run = self.ec2.run_instances(ImageId=told["ImageId"], MinCount=1, MaxCount=1, InstanceType="t3.micro")["Instances"][0]
        self.wait("instance_running", run["InstanceId"])
        self.ec2.terminate_instances(InstanceIds=[run["InstanceId"]])
        # Of a snapshot that is there, too.
        root = told["SnapshotDetails"][0]["SnapshotId"]
        again = self.over(self.image_task, self.ec2.import_image(DiskContainers=[{"SnapshotId": root}])["ImportTaskId"])
        self.assertEqual(again["SnapshotDetails"][0]["SnapshotId"], root)

    def test_what_cannot_be_is_refused_or_ends_with_the_reason(self):
        before = self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]
        for code, container in [
            ("InvalidParameterValue", {"Url": "s3://bucket/disk.vmdk"}),
            ("InvalidParameterValue", {"Url": "file:///etc/passwd"}),
            ("InvalidParameterValue", {"Url": self.url("../import/disk.raw")}),
            ("InvalidParameterValue", {"Url": self.url("secret")}),
            ("InvalidParameterValue", {"Url": self.url("sub")}),
            ("InvalidParameterValue", {"Url": self.url("none")}),
            ("InvalidParameterValue", {"Url": self.url("disk.raw"), "Format": "OVA"}),
            ("UnsupportedOperation", {"UserBucket": {"S3Bucket": "a", "S3Key": "b"}}),
            ("MissingParameter", {"Format": "RAW"}),
        ]:
            self.fails(code, self.ec2.import_snapshot, DiskContainer=container)
        self.fails("MissingParameter", self.ec2.import_image)
        self.fails("InvalidSnapshot.NotFound", self.ec2.import_image, DiskContainers=[{"SnapshotId": "snap-12345678"}])
        self.fails("InvalidConversionTaskId", self.ec2.describe_import_snapshot_tasks, ImportTaskIds=["import-snap-0123456789abcdef0"])
        self.fails("InvalidConversionTaskId.Malformed", self.ec2.cancel_import_task, ImportTaskId="import-x")
        task = self.ec2.import_snapshot(DiskContainer={"Url": self.url("bad.qcow2")})["ImportTaskId"]
        told = self.over(self.snapshot_task, task)
        self.assertEqual(told["Status"], "deleted")
        self.assertIn("ClientError: the image is refused: ", told["StatusMessage"])
        self.fails("IncorrectState", self.ec2.cancel_import_task, ImportTaskId=task)
        # An image is made of all its disks, or none is left.
        task = self.ec2.import_image(DiskContainers=[{"Url": self.url("small.raw.xz")}, {"Url": self.url("bad.qcow2")}])["ImportTaskId"]
        self.assertEqual(self.over(self.image_task, task)["Status"], "deleted")
        self.assertEqual(self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"], before)

    def test_killed_in_the_middle_an_import_is_done_and_a_cancelled_one_is_not(self):
        # Enough to be at for a while: zeros are quick.
        large = self.dir / "large.raw"
        with large.open("wb") as file:
            file.truncate(200 << 30)
        task = self.ec2.import_snapshot(DiskContainer={"Url": self.url("large.raw"), "Format": "RAW"})["ImportTaskId"]
        self.eventually(lambda: int(self.snapshot_task(task).get("Progress", "0")) > 0)
        worker = [pid for pid in os.listdir("/proc") if pid.isdigit() and self.child(pid)]
        self.daemon.kill()
        large.write_bytes(bytes(2 << 20))
        self.daemon.start()
        here = type(self)
        here.ec2.close()
        here.ec2 = self.daemon.client()
        told = self.over(self.snapshot_task, task)
        self.assertEqual(told["Status"], "completed", told)
        self.assertEqual(len(worker), 1)
        self.eventually(lambda: not os.path.exists(f"/proc/{worker[0]}") or not self.child(worker[0]))
        with large.open("wb") as file:
            file.truncate(200 << 30)
        task = self.ec2.import_snapshot(DiskContainer={"Url": self.url("large.raw"), "Format": "RAW"})["ImportTaskId"]
        self.eventually(lambda: int(self.snapshot_task(task).get("Progress", "0")) > 0)
        answer = self.ec2.cancel_import_task(ImportTaskId=task, CancelReason="not that one")
        self.assertEqual((answer["PreviousState"], answer["State"]), ("active", "deleting"))
        told = self.over(self.snapshot_task, task)
        self.assertEqual((told["Status"], told["StatusMessage"]), ("deleted", "not that one"))
        self.assertNotIn("SnapshotId", told)

    def child(self, pid):
        """Whether it is a worker of this test's daemon, or was."""
        try:
            command = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False
        return b"hutch-import-worker" in command and f"PPid:\t{self.daemon.process.pid}\n" in status

    def test_what_is_imported_is_encrypted_where_that_is_said(self):
        key = self.ec2.get_ebs_default_kms_key_id()["KmsKeyId"]
        disk = {"Url": self.url("small.raw.xz")}
        for more in ({"Encrypted": True}, {"Encrypted": True, "KmsKeyId": key}, {}):
            if not more:
                self.ec2.enable_ebs_encryption_by_default()
                self.addCleanup(self.ec2.disable_ebs_encryption_by_default)
            made = self.ec2.import_snapshot(DiskContainer=disk, **more)
            self.assertEqual((made["SnapshotTaskDetail"]["Encrypted"], made["SnapshotTaskDetail"]["KmsKeyId"]), (True, key))
            told = self.over(self.snapshot_task, made["ImportTaskId"])
            self.assertEqual(told["Status"], "completed", told)
            snapshot = self.ec2.describe_snapshots(SnapshotIds=[told["SnapshotId"]])["Snapshots"][0]
            self.assertEqual((snapshot["Encrypted"], snapshot["KmsKeyId"]), (True, key))
        self.ec2.disable_ebs_encryption_by_default()
        plain = self.over(self.snapshot_task, self.ec2.import_snapshot(DiskContainer=disk)["ImportTaskId"])
        self.assertFalse(plain["Encrypted"])
        # A snapshot that is there is copied for it, if it is plain.
        disks = [disk, {"SnapshotId": plain["SnapshotId"], "DeviceName": "/dev/sdf"}, {"SnapshotId": told["SnapshotId"], "DeviceName": "/dev/sdg"}]
        made = self.ec2.import_image(Encrypted=True, DiskContainers=disks)
        self.assertEqual((made["Encrypted"], made["KmsKeyId"]), (True, key))
        done = self.over(self.image_task, made["ImportTaskId"])
        self.assertEqual(done["Status"], "completed", done)
        image = self.ec2.describe_images(ImageIds=[done["ImageId"]])["Images"][0]
        devices = {d["DeviceName"]: d["Ebs"] for d in image["BlockDeviceMappings"]}
        self.assertEqual([d["Encrypted"] for d in devices.values()], [True] * 3)
        self.assertNotEqual(devices["/dev/sdf"]["SnapshotId"], plain["SnapshotId"])
        self.assertEqual(devices["/dev/sdg"]["SnapshotId"], told["SnapshotId"])
        mixed = self.over(self.image_task, self.ec2.import_image(DiskContainers=disks[1:])["ImportTaskId"])
        image = self.ec2.describe_images(ImageIds=[mixed["ImageId"]])["Images"][0]
        self.assertEqual([d["Ebs"]["Encrypted"] for d in image["BlockDeviceMappings"]], [False, True])
        self.fails("InvalidKmsKey.NotFound", self.ec2.import_snapshot, DiskContainer=disk, Encrypted=True, KmsKeyId="alias/none")
        self.fails("InvalidParameterDependency", self.ec2.import_snapshot, DiskContainer=disk, KmsKeyId=key)
