"""boto3: images in buckets, of a directory and of an S3 server, and whose the buckets are."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from daemon import KEY, SECRET, Case, Daemon

S3 = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch-s3")


class Shared(Daemon):
    """A daemon with another account's key, from its first start."""

    def start(self):
        keys = pathlib.Path(self.state.name, "keys.json")
        keys.write_text(json.dumps([{"id": "AKIDOTHER", "secret": "other", "account": "000000000002"}]))
        super().start()


class Server:
    """An S3 server, whose writers wait while `hold` is there."""

    def __init__(self):
        self.room = tempfile.TemporaryDirectory()
        self.dir, self.hold = pathlib.Path(self.room.name, "data"), pathlib.Path(self.room.name, "hold")
        command = [S3, self.dir, "hutch", "AKS3", "s3-secret", self.hold]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self.url

    def environment(self):
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "AKS3", "AWS_SECRET_ACCESS_KEY": "s3-secret", "AWS_REGION": "us-east-1"}

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.room.cleanup()


class Objects:
    """What holds of any object store; `files` is where it keeps buckets."""

    DAEMON = Shared

    def another(self):
        """A client of another account."""
        return self.daemon.client(key="AKIDOTHER", secret="other")

    def restart(self):
        self.daemon.kill()
        self.daemon.start()
        here = type(self)
        here.ec2.close()
        here.ec2 = self.daemon.client()

    def task(self, image, bucket, ec2=None):
        tasks = (ec2 or self.ec2).describe_store_image_tasks(ImageIds=[image])["StoreImageTaskResults"]
        return next(task for task in tasks if task["Bucket"] == bucket)

    def store(self, image, bucket, **more):
        key = self.ec2.create_store_image_task(ImageId=image, Bucket=bucket, **more)["ObjectKey"]
        self.assertEqual(key, f"{image}.bin")
        self.eventually(lambda: self.task(image, bucket)["StoreTaskState"] != "InProgress")
        told = self.task(image, bucket)
        self.assertEqual((told["StoreTaskState"], told["S3objectKey"], told["AmiId"]), ("Completed", key, image), told)
        self.assertEqual(told["ProgressPercentage"], 100)
        return key

    def described(self, image):
        return self.ec2.describe_images(ImageIds=[image])["Images"][0]

    def restored(self, bucket, key, **more):
        image = self.ec2.create_restore_image_task(Bucket=bucket, ObjectKey=key, **more)["ImageId"]
        self.eventually(lambda: self.described(image)["State"] != "pending")
        return self.described(image)

    def made(self, name):
        """An image of an instance with two volumes, with tags."""
        instance = self.run_one(BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 4, "VolumeType": "io2", "Iops": 200}}])
        self.wait("instance_running", instance)
        image = self.ec2.create_image(InstanceId=instance, Name=name, Description="with data", TagSpecifications=[
            {"ResourceType": kind, "Tags": [{"Key": "of", "Value": kind}]} for kind in ("image", "snapshot")])["ImageId"]
        self.eventually(lambda: self.described(image)["State"] == "available")
        self.ec2.terminate_instances(InstanceIds=[instance])
        return image

    def test_an_image_goes_to_a_bucket_and_comes_back(self):
        image = self.made("round trip")
        key = self.store(image, "images-1", S3ObjectTags=[{"Key": "team", "Value": "a b"}])
        self.assertGreater((self.files / "images-1" / key).stat().st_size, 100)
        self.fails("InvalidAMIName.Duplicate", self.ec2.create_restore_image_task, Bucket="images-1", ObjectKey=key)
        before = self.described(image)
        self.ec2.deregister_image(ImageId=image)
        for device in before["BlockDeviceMappings"]:
            self.ec2.delete_snapshot(SnapshotId=device["Ebs"]["SnapshotId"])
        after = self.restored("images-1", key)
        self.assertEqual(after["State"], "available", after)
        for name in ("Name", "Description", "RootDeviceName", "Architecture", "EnaSupport", "Tags"):
            self.assertEqual(before[name], after[name])
        shape = lambda image: [(d["DeviceName"], d["Ebs"]["VolumeSize"], d["Ebs"]["VolumeType"], d["Ebs"].get("Iops"), d["Ebs"]["DeleteOnTermination"])
                               for d in image["BlockDeviceMappings"]]
        self.assertEqual(shape(before), shape(after))
        ids = [d["Ebs"]["SnapshotId"] for d in after["BlockDeviceMappings"]]
        for snapshot in self.ec2.describe_snapshots(SnapshotIds=ids)["Snapshots"]:
            self.assertEqual((snapshot["State"], snapshot["Tags"]), ("completed", [{"Key": "of", "Value": "snapshot"}]))
        run = self.ec2.run_instances(ImageId=after["ImageId"], MinCount=1, MaxCount=1, InstanceType="t3.micro")["Instances"][0]
        self.wait("instance_running", run["InstanceId"])
        self.ec2.terminate_instances(InstanceIds=[run["InstanceId"]])
        again = self.restored("images-1", key, Name="another", TagSpecifications=[
            {"ResourceType": "image", "Tags": [{"Key": "more", "Value": "1"}]}])
        self.assertEqual((again["Name"], {t["Key"]: t["Value"] for t in again["Tags"]}), ("another", {"of": "image", "more": "1"}))
        # The object's image is told by the id it had; filters are those of EC2.
        told = self.ec2.describe_store_image_tasks(Filters=[{"Name": "bucket", "Values": ["images-1"]}, {"Name": "task-state", "Values": ["Completed"]}])
        self.assertIn(image, [task["AmiId"] for task in told["StoreImageTaskResults"]])

    def test_a_template_is_stored_too(self):
        key = self.store(self.image, "templates")
        self.assertEqual(self.restored("templates", key, Name="debian again")["State"], "available")

    def test_a_bucket_is_its_first_users(self):
        other = self.another()
        key = self.store(self.image, "mine-alone")
        self.fails("AccessDenied", other.create_restore_image_task, Bucket="mine-alone", ObjectKey=key, Name="stolen")
        self.fails("AccessDenied", other.create_store_image_task, ImageId=self.image, Bucket="mine-alone")
        self.assertEqual(other.describe_store_image_tasks()["StoreImageTaskResults"], [])
        other.create_store_image_task(ImageId=self.image, Bucket="others")
        self.eventually(lambda: self.task(self.image, "others", other)["StoreTaskState"] == "Completed")
        self.fails("AccessDenied", self.ec2.create_restore_image_task, Bucket="others", ObjectKey=key, Name="stolen")
        self.assertNotIn("others", [task["Bucket"] for task in self.ec2.describe_store_image_tasks()["StoreImageTaskResults"]])
        other.close()

    def test_what_cannot_be_is_refused(self):
        self.store(self.image, "refusals")
        for code, ask in [
            ("InvalidBucketName", dict(Bucket="..")), ("InvalidBucketName", dict(Bucket="a/../../etc")), ("InvalidBucketName", dict(Bucket="Upper")),
            ("InvalidAMIID.NotFound", dict(ImageId="ami-12345678")), ("InvalidAMIID.Malformed", dict(ImageId="aki-12345678")),
            ("InvalidParameterValue", dict(S3ObjectTags=[{"Key": "aws:x", "Value": "1"}])),
            ("TagLimitExceeded", dict(S3ObjectTags=[{"Key": f"k{n}", "Value": ""} for n in range(11)])),
        ]:
            self.fails(code, self.ec2.create_store_image_task, **dict(dict(ImageId=self.image, Bucket="refusals"), **ask))
        key = f"{self.image}.bin"
        for code, ask in [
            ("NoSuchBucket", dict(Bucket="none-such")), ("NoSuchKey", dict(ObjectKey="none.bin")),
            ("InvalidParameterValue", dict(ObjectKey="../refusals/x")), ("InvalidParameterValue", dict(ObjectKey=".hutch-owner")),
            ("InvalidAMIName.Malformed", dict(Name="!")),
        ]:
            self.fails(code, self.ec2.create_restore_image_task, **dict(dict(Bucket="refusals", ObjectKey=key, Name="refused"), **ask))
        self.fails("InvalidAMIID.NotFound", self.ec2.describe_store_image_tasks, ImageIds=["ami-12345678"])
        encrypted = self.run_one(BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "Encrypted": True}}])
        self.wait("instance_running", encrypted)
        image = self.ec2.create_image(InstanceId=encrypted, Name=f"encrypted {self.id()[-9:]}")["ImageId"]
        self.eventually(lambda: self.described(image)["State"] == "available")
        self.fails("UnsupportedOperation", self.ec2.create_store_image_task, ImageId=image, Bucket="never-made")
        self.fails("NoSuchBucket", self.ec2.create_restore_image_task, Bucket="never-made", ObjectKey="x", Name="refused")
        # What others wrote: no image, one that is cut off, one that was changed.
        place = self.files / "refusals"
        whole = (place / key).read_bytes()
        for name, text in [("text.bin", b"hello"), ("head.bin", whole[:200]), ("said.bin", whole.replace(b"debian", b"dabien", 1))]:
            (place / name).write_bytes(text)
            answer = self.fails("InvalidParameterValue", self.ec2.create_restore_image_task, Bucket="refusals", ObjectKey=name, Name="bad")
            self.assertIn("The object is no image: it is refused", answer["Error"]["Message"])
        for name, text in [("cut.bin", whole[:-10]), ("last.bin", whole[:-1] + bytes([whole[-1] ^ 1])), ("more.bin", whole + b"x")]:
            (place / name).write_bytes(text)
            snapshots = len(self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"])
            image = self.restored("refusals", name, Name=f"bad {name}")
            self.assertEqual(image["State"], "failed", name)
            self.assertIn(f"refusals/{name}: it is refused", image["StateReason"]["Message"])
            self.assertEqual(len(self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]), snapshots)
            self.ec2.deregister_image(ImageId=image["ImageId"])


    def bundled(self, instance, bucket, prefix):
        """A bundle of an instance's root; where its manifest is."""
        task = self.ec2.bundle_instance(InstanceId=instance, Storage={"S3": {"Bucket": bucket, "Prefix": prefix}})["BundleTask"]
        self.assertRegex(task["BundleId"], "^bun-[0-9a-f]{17}$")
        self.assertEqual((task["InstanceId"], task["State"], task["Storage"]["S3"]), (instance, "pending", {"Bucket": bucket, "Prefix": prefix}))
        told = lambda: self.ec2.describe_bundle_tasks(BundleIds=[task["BundleId"]])["BundleTasks"][0]
        self.eventually(lambda: told()["State"] in ("complete", "failed"))
        self.assertEqual(told()["State"], "complete", told())
        return f"{bucket}/{prefix}.manifest.xml"

    def launch(self, image, **more):
        made = self.ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro", **more)
        return made["Instances"][0]["InstanceId"]

    def volumes(self):
        """What the host keeps of roots on instance store."""
        return [name for name in os.listdir(pathlib.Path(self.daemon.state.name, "home-1", "host", "volumes")) if name.startswith("eph-")]

    def test_a_root_on_instance_store_is_an_instances_own(self):
        first = self.run_one()
        self.wait("instance_running", first)
        location = self.bundled(first, "bundles", "web/1")
        self.ec2.terminate_instances(InstanceIds=[first])
        image = self.ec2.register_image(Name="web on instance store", ImageLocation=location, RootDeviceName="/dev/sda1",
                                        BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1}}])["ImageId"]
        told = self.described(image)
        self.assertEqual((told["RootDeviceType"], told["ImageLocation"], told["State"], told["RootDeviceName"]), ("instance-store", location, "available", "/dev/sda1"))
        self.assertEqual([d["DeviceName"] for d in told["BlockDeviceMappings"]], ["/dev/sdf"])
        instance = self.launch(image)
        self.wait("instance_running", instance)
        told = self.instance(instance)
        self.assertEqual((told["RootDeviceType"], told["RootDeviceName"]), ("instance-store", "/dev/sda1"))
        self.assertEqual([d["DeviceName"] for d in told["BlockDeviceMappings"]], ["/dev/sdf"])
        self.assertEqual(self.volumes(), [f"eph-{instance[2:]}"])
        for code, call, ask in [
            ("UnsupportedOperation", self.ec2.stop_instances, dict(InstanceIds=[instance])),
            ("UnsupportedOperation", self.ec2.start_instances, dict(InstanceIds=[instance])),
            ("UnsupportedOperation", self.ec2.modify_instance_attribute, dict(InstanceId=instance, InstanceType={"Value": "t3.small"})),
            ("UnsupportedOperation", self.ec2.modify_instance_attribute, dict(InstanceId=instance, InstanceInitiatedShutdownBehavior={"Value": "stop"})),
            ("InvalidParameterValue", self.ec2.create_image, dict(InstanceId=instance, Name="not of that")),
            ("UnsupportedOperation", self.ec2.create_store_image_task, dict(ImageId=image, Bucket="bundles")),
            ("InvalidBlockDeviceMapping", self.ec2.run_instances, dict(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro",
                                                                       BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 9}}])),
        ]:
            answer = self.fails(code, call, **ask)
        answer = self.fails("UnsupportedOperation", self.ec2.stop_instances, InstanceIds=[instance])
        self.assertEqual(answer["Error"]["Message"], f"The instance '{instance}' does not have an 'ebs' root device type and cannot be stopped")
        behaviour = self.ec2.describe_instance_attribute(InstanceId=instance, Attribute="instanceInitiatedShutdownBehavior")
        self.assertEqual(behaviour["InstanceInitiatedShutdownBehavior"]["Value"], "terminate")
        self.ec2.reboot_instances(InstanceIds=[instance])
        # A bundle of one that has its root on instance store, too; and of one kill in the middle nothing comes.
        again = self.bundled(instance, "bundles", "web/2")
        second = self.ec2.register_image(Name="web again", ImageLocation=again)["ImageId"]
        copy = self.ec2.copy_image(SourceImageId=second, SourceRegion="home-1", Name="web copied")["ImageId"]
        self.eventually(lambda: self.described(copy)["State"] == "available")
        self.assertEqual((self.described(copy)["ImageLocation"], self.described(copy)["RootDeviceType"]), (again, "instance-store"))
        self.restart()
        self.assertEqual(self.instance(instance)["State"]["Name"], "running")
        # What the host keeps of a bundle goes with its last image; the bundle stays, and so do instances.
        snapshots = pathlib.Path(self.daemon.state.name, "home-1", "host", "snapshots")
        before = len(os.listdir(snapshots))
        (self.files / "bundles" / "web" / "1.part.0").write_bytes(b"changed")
        other = self.launch(image)
        self.wait("instance_running", other)
        self.ec2.deregister_image(ImageId=image)
        self.eventually(lambda: len(os.listdir(snapshots)) == before - 1)
        self.assertTrue((self.files / "bundles" / "web" / "1.manifest.xml").exists())
        self.assertEqual(self.instance(other)["State"]["Name"], "running")
        self.ec2.terminate_instances(InstanceIds=[instance, other])
        self.wait("instance_terminated", instance)
        self.wait("instance_terminated", other)
        self.assertEqual(self.volumes(), [])
        # Registered and fetched anew it is not what its manifest says.
        image = self.ec2.register_image(Name="web on instance store", ImageLocation=location)["ImageId"]
        broken = self.launch(image)
        self.eventually(lambda: self.instance(broken)["State"]["Name"] == "terminated")
        told = self.instance(broken)
        self.assertEqual(told["StateReason"]["Code"], "Client.InvalidManifest")
        self.assertIn("web/1.part.0 is not the part that its manifest names", told["StateReason"]["Message"])
        # A manifest that is another one now is not launched either, until it is registered anew.
        manifest = self.files / "bundles" / "web" / "2.manifest.xml"
        manifest.write_bytes(manifest.read_bytes() + b"\n")
        broken = self.launch(second)
        self.eventually(lambda: self.instance(broken)["State"]["Name"] == "terminated")
        self.assertIn("register it anew", self.instance(broken)["StateReason"]["Message"])
        for id in (image, second, copy):
            self.ec2.deregister_image(ImageId=id)

    def test_bundles_are_their_accounts_and_are_checked(self):
        instance = self.run_one()
        self.wait("instance_running", instance)
        location = self.bundled(instance, "bundles-own", "web")
        other = self.another()
        ask = lambda **more: dict(dict(InstanceId=instance, Storage={"S3": {"Bucket": "bundles-own", "Prefix": "refused"}}), **more)
        where = lambda bucket, prefix: {"S3": {"Bucket": bucket, "Prefix": prefix}}
        for code, asked in [
            ("InvalidInstanceID.NotFound", ask(InstanceId="i-12345678")), ("InvalidBucketName", ask(Storage=where("..", "a"))),
            ("InvalidParameterValue", ask(Storage=where("bundles-own", "../a"))), ("MissingParameter", ask(Storage={"S3": {"Bucket": "bundles-own"}})),
        ]:
            self.fails(code, self.ec2.bundle_instance, **asked)
        self.fails("InvalidBundleID.NotFound", self.ec2.cancel_bundle_task, BundleId="bun-12345678")
        done = self.ec2.describe_bundle_tasks(Filters=[{"Name": "s3-bucket", "Values": ["bundles-own"]}])["BundleTasks"]
        self.assertEqual([task["State"] for task in done], ["complete"])
        self.fails("IncorrectState", self.ec2.cancel_bundle_task, BundleId=done[0]["BundleId"])
        self.assertEqual(other.describe_bundle_tasks()["BundleTasks"], [])
        self.fails("AccessDenied", other.register_image, Name="stolen", ImageLocation=location)
        for code, place in [("InvalidManifest", "bundles-own"), ("InvalidManifest", "bundles-own/none.manifest.xml"), ("InvalidManifest", "bundles-own/web.part.0"),
                            ("InvalidParameterValue", "bundles-own/../x"), ("NoSuchBucket", "none-such/web.manifest.xml")]:
            self.fails(code, self.ec2.register_image, Name="refused", ImageLocation=place)
        image = self.ec2.register_image(Name=f"own {self.id()[-20:]}", ImageLocation=location)["ImageId"]
        # Who may launch it need not have the bucket; whoever copies it does.
        self.ec2.modify_image_attribute(ImageId=image, LaunchPermission={"Add": [{"UserId": "000000000002"}]})
        made = other.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro")["Instances"][0]["InstanceId"]
        state = lambda: other.describe_instances(InstanceIds=[made])["Reservations"][0]["Instances"][0]["State"]["Name"]
        self.eventually(lambda: state() == "running")
        self.fails("AccessDenied", other.copy_image, SourceImageId=image, SourceRegion="home-1", Name="stolen")
        other.terminate_instances(InstanceIds=[made])
        self.ec2.deregister_image(ImageId=image)
        other.close()


class Directory(Objects, Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.files = pathlib.Path(cls.daemon.state.name, "objects")

    def hutch(self, *words, check=True):
        environment = {**os.environ, "HUTCH_ENDPOINT": self.daemon.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        hutch = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")
        return subprocess.run([hutch, "image", *words], env=environment, check=check, capture_output=True, text=True)

    def test_hutch_makes_the_first_one_of_an_image(self):
        image = self.hutch("bundle", "debian-12", "people/web", "--name", "debian on instance store").stdout.strip()
        told = self.described(image)
        self.assertEqual((told["RootDeviceType"], told["ImageLocation"]), ("instance-store", "people/web.manifest.xml"))
        instance = self.launch(image)
        self.wait("instance_running", instance)
        self.ec2.terminate_instances(InstanceIds=[instance])
        self.assertEqual(self.hutch("bundle", "debian-12", "people/more").stdout.strip(), "people/more.manifest.xml")
        refused = self.hutch("bundle", "debian-12", "people/web", check=False)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn("There is a bundle of this name in 'people'; choose another.", refused.stderr)


class Bucket(Objects, Case):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.addClassCleanup(cls.server.end)
        cls.DAEMON = type("Fed", (Shared,), {"ENVIRONMENT": cls.server.environment()})
        cls.files = cls.server.dir / "hutch" / "some" / "where"
        cls.OPTIONS = ("--rate", "0", "--object-store", "s3://hutch/some/where")
        super().setUpClass()

    def test_killed_in_the_middle_it_is_stored_all_the_same(self):
        # Whose the bucket is, is written before.
        self.store(self.image, "killed")
        image = self.made("killed")
        self.server.hold.touch()
        self.ec2.create_store_image_task(ImageId=image, Bucket="killed")
        self.fails("IncorrectState", self.ec2.create_store_image_task, ImageId=image, Bucket="killed")
        self.assertEqual(self.task(image, "killed")["StoreTaskState"], "InProgress")
        self.restart()
        self.assertEqual(self.task(image, "killed")["StoreTaskState"], "InProgress")
        self.assertFalse((self.files / "killed" / f"{image}.bin").exists())
        self.server.hold.unlink()
        self.eventually(lambda: self.task(image, "killed")["StoreTaskState"] == "Completed")
        self.assertEqual(self.restored("killed", f"{image}.bin", Name="after a kill")["State"], "available")

    def test_a_bundle_is_cancelled_or_goes_on_after_a_kill(self):
        self.store(self.image, "held")
        instance = self.run_one()
        self.wait("instance_running", instance)
        self.server.hold.touch()
        self.addCleanup(self.server.hold.unlink, missing_ok=True)
        storage = lambda prefix: {"S3": {"Bucket": "held", "Prefix": prefix}}
        task = self.ec2.bundle_instance(InstanceId=instance, Storage=storage("one"))["BundleTask"]["BundleId"]
        told = lambda: self.ec2.describe_bundle_tasks(BundleIds=[task])["BundleTasks"][0]
        self.eventually(lambda: told()["State"] == "storing")
        self.fails("BundlingInProgress", self.ec2.bundle_instance, InstanceId=instance, Storage=storage("two"))
        self.restart()
        self.assertIn(told()["State"], ("bundling", "storing"))
        self.server.hold.unlink()
        self.eventually(lambda: told()["State"] == "complete")
        self.assertTrue((self.files / "held" / "one.manifest.xml").exists())
        self.server.hold.touch()
        task = self.ec2.bundle_instance(InstanceId=instance, Storage=storage("three"))["BundleTask"]["BundleId"]
        self.eventually(lambda: told()["State"] == "storing")
        self.assertEqual(self.ec2.cancel_bundle_task(BundleId=task)["BundleTask"]["State"], "cancelling")
        self.server.hold.unlink()
        self.eventually(lambda: told()["State"] == "failed")
        self.assertEqual(told()["BundleTaskError"]["Code"], "Client.Cancelled")
        self.assertEqual([name for name in os.listdir(self.files / "held") if name.startswith("three")], [])

    def test_a_store_that_is_away_is_told(self):
        away = "aws_endpoint=http://127.0.0.1:9&aws_allow_http=true&aws_access_key_id=a&aws_secret_access_key=b&aws_region=us-east-1&aws_timeout=1s"
        daemon = Daemon("--rate", "0", "--object-store", f"s3://hutch?{away}")
        self.addCleanup(daemon.stop)
        with contextlib.closing(daemon.client(read_timeout=300)) as ec2:
            answer = self.fails("Unavailable", ec2.create_store_image_task, ImageId=self.image, Bucket="away")
            self.assertEqual(answer["ResponseMetadata"]["HTTPStatusCode"], 503)
            self.assertNotIn("secret", answer["Error"]["Message"])
            self.assertEqual(ec2.describe_store_image_tasks()["StoreImageTaskResults"], [])


if __name__ == "__main__":
    unittest.main()
