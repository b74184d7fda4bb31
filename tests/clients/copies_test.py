"""boto3: images registered, copied and shared, within a region and across."""

from daemon import Case


class Copies(Case):
    OPTIONS = ("--rate", "0", "--regions", "home-1,home-2")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.there = cls.daemon.client(region="home-2")

    @classmethod
    def tearDownClass(cls):
        cls.there.close()
        super().tearDownClass()

    def available(self, client, image):
        client.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        return client.describe_images(ImageIds=[image])["Images"][0]

    def test_an_image_of_snapshots_goes_to_another_region(self):
        volume = self.ec2.create_volume(AvailabilityZone="home-1a", Size=3)["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        snapshot = self.ec2.create_snapshot(VolumeId=volume, Description="root")["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        root = {"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": snapshot, "VolumeType": "gp3"}}
        ask = dict(Name="registered", RootDeviceName="/dev/xvda", Architecture="x86_64", VirtualizationType="hvm")
        image = self.ec2.register_image(**ask, BlockDeviceMappings=[
            root, {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 2}}, {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}],
            TagSpecifications=[{"ResourceType": "image", "Tags": [{"Key": "of", "Value": "snapshots"}]}])["ImageId"]
        told = self.available(self.ec2, image)
        devices = {d["DeviceName"]: d["Ebs"] for d in told["BlockDeviceMappings"] if "Ebs" in d}
        stores = [d for d in told["BlockDeviceMappings"] if "Ebs" not in d]
        self.assertEqual(stores, [{"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}])
        self.assertEqual({name: (ebs["VolumeSize"], ebs["DeleteOnTermination"]) for name, ebs in devices.items()},
                         {"/dev/xvda": (3, True), "/dev/sdf": (2, False)})
        for code, more in [
            ("InvalidAMIName.Duplicate", dict(BlockDeviceMappings=[root])),
            ("InvalidAMIName.Duplicate", dict(Name="debian-12", BlockDeviceMappings=[root])),
            ("InvalidBlockDeviceMapping", dict(Name="no root", BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1}}])),
            ("InvalidSnapshot.NotFound", dict(Name="no snapshot", BlockDeviceMappings=[dict(root, Ebs={"SnapshotId": "snap-12345678"})])),
            ("InvalidBlockDeviceMapping", dict(Name="too small", BlockDeviceMappings=[dict(root, Ebs={"SnapshotId": snapshot, "VolumeSize": 1})])),
            ("InvalidParameterValue", dict(Name="arm", Architecture="arm64", BlockDeviceMappings=[root])),
        ]:
            self.fails(code, self.ec2.register_image, **dict(ask, **more))

        copy = self.there.copy_image(SourceRegion="home-1", SourceImageId=image, Name="copied", CopyImageTags=True,
                                     ClientToken="once")["ImageId"]
        self.assertNotEqual(copy, image)
        there = self.available(self.there, copy)
        self.assertEqual(there["Tags"], [{"Key": "of", "Value": "snapshots"}])
        self.assertFalse(there["Public"])
        disk = there["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]
        self.assertNotEqual(disk, snapshot)
        self.assertIn(image, self.there.describe_snapshots(SnapshotIds=[disk])["Snapshots"][0]["Description"])
        self.fails("InvalidAMIID.NotFound", self.there.copy_image, SourceRegion="home-2", SourceImageId=image, Name="nothing")
        self.fails("InvalidParameterValue", self.there.copy_image, SourceRegion="mars-1", SourceImageId=image, Name="nothing")
        # The copy launches when the original is gone, and so are its disks as they say.
        self.ec2.deregister_image(ImageId=image)
        self.ec2.delete_snapshot(SnapshotId=snapshot)
        made = self.there.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.micro")["Instances"][0]
        waiter = dict(InstanceIds=[made["InstanceId"]], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        self.there.get_waiter("instance_running").wait(**waiter)
        self.there.terminate_instances(InstanceIds=[made["InstanceId"]])
        self.there.get_waiter("instance_terminated").wait(**waiter)
        self.eventually(lambda: [v["State"] for v in self.there.describe_volumes()["Volumes"]] == ["available"])

    def test_an_image_leaves_out_and_adds_disks(self):
        instance = self.run_one(BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 2}}])
        self.wait("instance_running", instance)
        self.assertEqual([d["Ebs"]["DeleteOnTermination"] for d in self.instance(instance)["BlockDeviceMappings"]], [True, False])
        image = self.ec2.create_image(InstanceId=instance, Name="mapped", NoReboot=True, BlockDeviceMappings=[
            {"DeviceName": "/dev/sdf", "NoDevice": ""}, {"DeviceName": "/dev/sdg", "Ebs": {"VolumeSize": 4}},
            {"DeviceName": "/dev/xvda", "Ebs": {"VolumeSize": 9, "DeleteOnTermination": False}}])["ImageId"]
        devices = {d["DeviceName"]: d["Ebs"] for d in self.available(self.ec2, image)["BlockDeviceMappings"]}
        self.assertEqual({name: (ebs["VolumeSize"], ebs["DeleteOnTermination"]) for name, ebs in devices.items()},
                         {"/dev/xvda": (9, False), "/dev/sdg": (4, False)})
        # A type that has to be told its speed keeps it.
        fast = self.run_one(BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 4, "VolumeType": "io1", "Iops": 150}}])
        self.wait("instance_running", fast)
        image = self.available(self.ec2, self.ec2.create_image(InstanceId=fast, Name="fast")["ImageId"])
        self.assertEqual(image["BlockDeviceMappings"][1]["Ebs"]["Iops"], 150)
        made = self.ec2.run_instances(ImageId=image["ImageId"], MinCount=1, MaxCount=1)["Instances"][0]
        told = self.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [made["InstanceId"]]}])["Volumes"]
        self.assertEqual({v["VolumeType"]: v["Iops"] for v in told}, {"gp3": 3000, "io1": 150})
        self.fails("InvalidBlockDeviceMapping", self.ec2.create_image, InstanceId=instance, Name="no root",
                   BlockDeviceMappings=[{"DeviceName": "/dev/xvda", "NoDevice": ""}])

    def test_snapshots_are_copied_and_shared(self):
        volume = self.ec2.create_volume(AvailabilityZone="home-1a", Size=1)["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        first = self.ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[first], WaiterConfig={"Delay": 0.05})
        tags = [{"ResourceType": "snapshot", "Tags": [{"Key": "a", "Value": "b"}]}]
        copy = self.there.copy_snapshot(SourceRegion="home-1", SourceSnapshotId=first, TagSpecifications=tags)
        self.assertEqual(copy["Tags"], tags[0]["Tags"])
        self.there.get_waiter("snapshot_completed").wait(SnapshotIds=[copy["SnapshotId"]], WaiterConfig={"Delay": 0.05})
        self.fails("InvalidSnapshot.NotFound", self.there.copy_snapshot, SourceRegion="home-2", SourceSnapshotId=first)
        ask = dict(SnapshotId=first, Attribute="createVolumePermission")
        self.ec2.modify_snapshot_attribute(**ask, OperationType="add", UserIds=["123456789012"])
        told = self.ec2.describe_snapshot_attribute(**ask)["CreateVolumePermissions"]
        self.assertEqual(told, [{"UserId": "123456789012"}])
        self.ec2.modify_snapshot_attribute(SnapshotId=first, CreateVolumePermission={"Add": [{"Group": "all"}]})
        everyone = self.ec2.describe_snapshots(RestorableByUserIds=["all"])["Snapshots"]
        self.assertIn(first, [s["SnapshotId"] for s in everyone])
        self.ec2.reset_snapshot_attribute(**ask)
        self.assertEqual(self.ec2.describe_snapshot_attribute(**ask)["CreateVolumePermissions"], [])
