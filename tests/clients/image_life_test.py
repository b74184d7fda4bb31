"""boto3: images that are deprecated, disabled, kept from being public; what an account sets for itself."""

import datetime
import json
import pathlib

from daemon import REGION, Case, Daemon


class TwoAccounts(Daemon):
    """A daemon with another account's key, from its first start."""

    def start(self):
        keys = pathlib.Path(self.state.name, "keys.json")
        keys.write_text(json.dumps([{"id": "AKIDOTHER", "secret": "other", "account": "000000000002"}]))
        super().start()


def ahead(**time):
    return datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(**time)


class Life(Case):
    DAEMON = TwoAccounts

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.other = cls.daemon.client(key="AKIDOTHER", secret="other")

    @classmethod
    def tearDownClass(cls):
        cls.other.close()
        super().tearDownClass()

    def make(self, name, **more):
        volume = self.ec2.create_volume(AvailabilityZone=f"{REGION}a", Size=1)["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        snapshot = self.ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        image = self.ec2.register_image(Name=name, RootDeviceName="/dev/xvda", BlockDeviceMappings=[
            {"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": snapshot}}])["ImageId"]
        return image

    def share(self, image, **who):
        self.ec2.modify_image_attribute(ImageId=image, LaunchPermission={"Add": [who or {"UserId": "000000000002"}]})

    def ids(self, client, **more):
        return {image["ImageId"] for image in client.describe_images(**more)["Images"]}

    def test_deprecation(self):
        image = self.make("deprecated")
        self.share(image)
        at = ahead(days=20).replace(second=40, microsecond=0)
        self.ec2.enable_image_deprecation(ImageId=image, DeprecateAt=at)
        told = self.ec2.describe_images(ImageIds=[image])["Images"][0]["DeprecationTime"]
        rounded = at.replace(second=0) + datetime.timedelta(minutes=1)
        self.assertEqual(told, rounded.strftime("%Y-%m-%dT%H:%M:%S.000Z"))
        self.assertIn(image, self.ids(self.other), "its time has not come")
        self.ec2.disable_image_deprecation(ImageId=image)
        self.assertNotIn("DeprecationTime", self.ec2.describe_images(ImageIds=[image])["Images"][0])
        for bad in [ahead(days=-1), ahead(days=3700)]:
            self.fails("InvalidParameterValue", self.ec2.enable_image_deprecation, ImageId=image, DeprecateAt=bad)
        self.fails("AuthFailure", self.other.enable_image_deprecation, ImageId=image, DeprecateAt=at)
        self.fails("InvalidAMIID.NotFound", self.ec2.disable_image_deprecation, ImageId="ami-0123456789abcdef0")
        # Rounded to the minute that has begun, it is deprecated now; one that rounds up comes within half a minute.
        soon = ahead(seconds=1)
        self.ec2.enable_image_deprecation(ImageId=image, DeprecateAt=soon)
        self.eventually(lambda: image not in self.ids(self.other))
        self.assertIn(image, self.ids(self.ec2), "its owner sees it always")
        self.assertIn(image, self.ids(self.other, IncludeDeprecated=True))
        self.assertIn(image, self.ids(self.other, ImageIds=[image]), "whoever knows its id")
        made = self.other.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro")
        self.other.terminate_instances(InstanceIds=[made["Instances"][0]["InstanceId"]])

    def test_a_public_image_is_deprecated_within_two_years(self):
        image = self.make("public")
        self.ec2.enable_image_deprecation(ImageId=image, DeprecateAt=ahead(days=1000))
        self.share(image, Group="all")
        self.fails("InvalidParameterValue", self.ec2.enable_image_deprecation, ImageId=image, DeprecateAt=ahead(days=1000))

    def test_a_disabled_image_is_nobodys(self):
        image = self.make("disabled")
        self.share(image)
        self.fails("AuthFailure", self.other.disable_image, ImageId=image)
        self.ec2.disable_image(ImageId=image)
        self.assertNotIn(image, self.ids(self.ec2))
        told = self.ec2.describe_images(ImageIds=[image], IncludeDisabled=True)["Images"][0]
        self.assertEqual((told["State"], told["Public"]), ("disabled", False))
        self.assertIn(image, self.ids(self.ec2, IncludeDisabled=True, Filters=[{"Name": "state", "Values": ["disabled"]}]))
        self.assertNotIn(image, self.ids(self.other, IncludeDisabled=True))
        launch = dict(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro")
        self.fails("InvalidAMIID.Unavailable", self.ec2.run_instances, **launch)
        self.fails("InvalidAMIID.NotFound", self.other.run_instances, **launch)
        self.fails("InvalidAMIID.Unavailable", self.share, image)
        self.ec2.enable_image(ImageId=image)
        self.assertEqual(self.ec2.describe_images(ImageIds=[image])["Images"][0]["State"], "available")
        self.assertNotIn(image, self.ids(self.other), "who lost it does not get it back")
        self.share(image)
        made = self.other.run_instances(**launch)
        self.other.terminate_instances(InstanceIds=[made["Instances"][0]["InstanceId"]])
        self.ec2.disable_image(ImageId=image)
        self.ec2.deregister_image(ImageId=image)
        self.assertEqual(self.ec2.list_images_in_recycle_bin()["Images"], [])

    def test_images_are_kept_from_being_public(self):
        state = lambda: self.ec2.get_image_block_public_access_state()["ImageBlockPublicAccessState"]
        self.assertEqual(state(), "unblocked")
        before, image = self.make("public before"), self.make("never public")
        self.share(before, Group="all")
        made = self.ec2.enable_image_block_public_access(ImageBlockPublicAccessState="block-new-sharing")
        self.assertEqual(made["ImageBlockPublicAccessState"], state())
        self.fails("OperationNotPermitted", self.share, image, Group="all")
        self.assertFalse(self.ec2.describe_images(ImageIds=[image])["Images"][0]["Public"])
        self.share(image)
        self.ec2.modify_image_attribute(ImageId=before, Description={"Value": "still public"})
        self.assertEqual(self.other.get_image_block_public_access_state()["ImageBlockPublicAccessState"], "unblocked")
        self.ec2.disable_image_block_public_access()
        self.share(image, Group="all")

    def test_metadata_as_the_account_prefers(self):
        defaults = lambda: self.ec2.get_instance_metadata_defaults()["AccountLevel"]
        self.assertEqual(defaults(), {})
        self.ec2.modify_instance_metadata_defaults(HttpTokens="required", HttpPutResponseHopLimit=3)
        self.addCleanup(self.ec2.modify_instance_metadata_defaults, HttpTokens="no-preference", HttpPutResponseHopLimit=-1)
        self.assertEqual(defaults(), {"HttpTokens": "required", "HttpPutResponseHopLimit": 3, "ManagedBy": "account"})
        self.fails("InvalidParameterValue", self.ec2.modify_instance_metadata_defaults, HttpPutResponseHopLimit=65, HttpEndpoint="disabled")
        plain, own = self.run_one(), self.run_one(MetadataOptions={"HttpTokens": "optional"})
        told = [self.instance(one)["MetadataOptions"] for one in [plain, own]]
        self.assertEqual([(t["HttpTokens"], t["HttpPutResponseHopLimit"], t["HttpEndpoint"]) for t in told],
                         [("required", 3, "enabled"), ("optional", 3, "enabled")])
        self.ec2.modify_instance_metadata_defaults(HttpTokens="no-preference", HttpPutResponseHopLimit=-1)
        self.assertEqual(defaults(), {})
        self.ec2.terminate_instances(InstanceIds=[plain, own])

    def test_what_there_is_none_of_is_said(self):
        one = self.run_one()
        for call in [self.ec2.get_console_screenshot, self.ec2.get_instance_uefi_data]:
            self.fails("UnsupportedOperation", call, InstanceId=one)
            self.fails("InvalidInstanceID.NotFound", call, InstanceId="i-0123456789abcdef0")
        self.assertFalse(self.ec2.get_ebs_encryption_by_default()["EbsEncryptionByDefault"])
        self.ec2.terminate_instances(InstanceIds=[one])
