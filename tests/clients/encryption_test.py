"""boto3: volumes and snapshots that are encrypted, by request, by default, and by what they are made of."""

from daemon import Case


class Encryption(Case):
    OPTIONS = ("--rate", "0", "--regions", "home-1,home-2")

    def volume(self, **more):
        volume = self.ec2.create_volume(AvailabilityZone="home-1a", **{"Size": 1, **more})["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        return self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]

    def complete(self, snapshot, client=None):
        client = client or self.ec2
        client.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        return client.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]

    def copy(self, snapshot, **more):
        made = self.ec2.copy_snapshot(SourceRegion="home-1", SourceSnapshotId=snapshot, **more)
        return self.complete(made["SnapshotId"])

    def tearDown(self):
        self.ec2.disable_ebs_encryption_by_default()
        self.ec2.reset_ebs_default_kms_key_id()

    def test_encrypt_volumes_snapshots_and_copies(self):
        key = self.ec2.get_ebs_default_kms_key_id()["KmsKeyId"]
        self.assertRegex(key, r"^arn:aws:kms:home-1:\d{12}:key/[0-9a-f-]{36}$")
        plain, secret = self.volume(), self.volume(Encrypted=True)
        self.assertEqual((plain["Encrypted"], plain.get("KmsKeyId")), (False, None))
        self.assertEqual((secret["Encrypted"], secret["KmsKeyId"]), (True, key))
        found = self.ec2.describe_volumes(Filters=[{"Name": "encrypted", "Values": ["true"]}])["Volumes"]
        found = {v["VolumeId"] for v in found}
        self.assertTrue(secret["VolumeId"] in found and plain["VolumeId"] not in found)
        snapshots = [self.complete(self.ec2.create_snapshot(VolumeId=v["VolumeId"])["SnapshotId"]) for v in (plain, secret)]
        self.assertEqual([(s["Encrypted"], s.get("KmsKeyId")) for s in snapshots], [(False, None), (True, key)])
        ids = [s["SnapshotId"] for s in snapshots]
        # Volumes of them.
        self.assertEqual([self.volume(SnapshotId=id)["Encrypted"] for id in ids], [False, True])
        self.assertEqual(self.volume(SnapshotId=ids[0], Encrypted=True, KmsKeyId="alias/aws/ebs")["KmsKeyId"], key)
        self.fails("InvalidParameterValue", self.ec2.create_volume, AvailabilityZone="home-1a", SnapshotId=ids[1], Encrypted=False)
        # Copies of them.
        self.assertEqual([self.copy(id)["Encrypted"] for id in ids], [False, True])
        self.assertEqual(self.copy(ids[0], Encrypted=True, KmsKeyId=key)["KmsKeyId"], key)
        there = self.daemon.client(region="home-2")
        self.addCleanup(there.close)
        made = there.copy_snapshot(SourceRegion="home-1", SourceSnapshotId=ids[1])["SnapshotId"]
        self.assertIn(":home-2:", self.complete(made, there)["KmsKeyId"])
        # Keys that are none, and permissions.
        wrong = dict(AvailabilityZone="home-1a", Size=1)
        self.fails("InvalidKmsKey.NotFound", self.ec2.create_volume, Encrypted=True, KmsKeyId="alias/mine", **wrong)
        self.fails("InvalidParameterDependency", self.ec2.create_volume, KmsKeyId=key, **wrong)
        self.fails("InvalidKmsKey.NotFound", self.ec2.modify_ebs_default_kms_key_id, KmsKeyId="alias/mine")
        everyone = dict(Attribute="createVolumePermission", OperationType="add", GroupNames=["all"])
        self.fails("OperationNotPermitted", self.ec2.modify_snapshot_attribute, SnapshotId=ids[1], **everyone)

    def test_encrypt_by_default(self):
        self.assertEqual(self.ec2.get_ebs_encryption_by_default()["EbsEncryptionByDefault"], False)
        self.assertEqual(self.ec2.enable_ebs_encryption_by_default()["EbsEncryptionByDefault"], True)
        self.assertEqual(self.ec2.get_ebs_encryption_by_default()["EbsEncryptionByDefault"], True)
        self.assertTrue(self.volume(Encrypted=False)["Encrypted"])
        key = self.ec2.modify_ebs_default_kms_key_id(KmsKeyId="alias/aws/ebs")["KmsKeyId"]
        self.assertEqual(self.ec2.reset_ebs_default_kms_key_id()["KmsKeyId"], key)
        instance = self.run_one()
        self.wait("instance_running", instance)
        ids = [d["Ebs"]["VolumeId"] for d in self.instance(instance)["BlockDeviceMappings"]]
        self.assertTrue(all(v["Encrypted"] for v in self.ec2.describe_volumes(VolumeIds=ids)["Volumes"]))
        self.ec2.disable_ebs_encryption_by_default()
        self.assertFalse(self.volume()["Encrypted"])

    def test_encrypt_disks_of_instances_and_images(self):
        instance = self.run_one(BlockDeviceMappings=[
            {"DeviceName": "/dev/xvda", "Ebs": {"Encrypted": True}}, {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1}}])
        self.wait("instance_running", instance)
        volumes = {v["Attachments"][0]["Device"]: v for v in self.ec2.describe_volumes(
            Filters=[{"Name": "attachment.instance-id", "Values": [instance]}])["Volumes"]}
        self.assertEqual({name: v["Encrypted"] for name, v in volumes.items()}, {"/dev/xvda": True, "/dev/sdf": False})
        image = self.ec2.create_image(InstanceId=instance, Name="of secrets")["ImageId"]
        self.ec2.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05})
        copy = self.ec2.copy_image(SourceRegion="home-1", SourceImageId=image, Name="all secret", Encrypted=True)["ImageId"]
        for id, want in [(image, {"/dev/xvda": True, "/dev/sdf": False}), (copy, {"/dev/xvda": True, "/dev/sdf": True})]:
            self.ec2.get_waiter("image_available").wait(ImageIds=[id], WaiterConfig={"Delay": 0.05})
            told = self.ec2.describe_images(ImageIds=[id])["Images"][0]["BlockDeviceMappings"]
            self.assertEqual({d["DeviceName"]: d["Ebs"]["Encrypted"] for d in told}, want)
            snapshots = self.ec2.describe_snapshots(SnapshotIds=[d["Ebs"]["SnapshotId"] for d in told])["Snapshots"]
            self.assertEqual(sorted(s["Encrypted"] for s in snapshots), sorted(want.values()))
            keys = {s["SnapshotId"]: s.get("KmsKeyId") for s in snapshots}
            self.assertEqual({d["Ebs"]["SnapshotId"]: d["Ebs"].get("KmsKeyId") for d in told}, keys)
            # What is encrypted is not for everyone; an account may be named.
            self.fails("UnsupportedOperation", self.ec2.modify_image_attribute, ImageId=id, LaunchPermission={"Add": [{"Group": "all"}]})
            self.ec2.modify_image_attribute(ImageId=id, LaunchPermission={"Add": [{"UserId": "210987654321"}]})
            self.assertFalse(self.ec2.describe_images(ImageIds=[id])["Images"][0]["Public"])
        made = self.ec2.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.micro")
        launched = made["Instances"][0]["InstanceId"]
        self.wait("instance_running", launched)
        found = self.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [launched]}])["Volumes"]
        self.assertEqual([v["Encrypted"] for v in found], [True, True])
        refused = {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "Encrypted": True, "KmsKeyId": "alias/mine"}}
        self.fails("InvalidKmsKey.NotFound", self.run_one, BlockDeviceMappings=[refused])
