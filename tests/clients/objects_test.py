"""boto3: images in buckets, of a directory and of an S3 server, and whose the buckets are."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from daemon import Case, Daemon

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


class Directory(Objects, Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.files = pathlib.Path(cls.daemon.state.name, "objects")


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
