"""Volumes that change, snapshots of one instant, and how fast instance types are, with boto3."""

import pathlib
import unittest

import daemon

# A type beside the built-in ones, as an owner writes it.
TYPES = "[own]\nslow = { vcpus = 1, memory = 512, network-mbit = 100, volume-mbit = [8, 80], volume-iops = 50 }\n"


class Modify(daemon.Case):
    class DAEMON(daemon.Daemon):
        def start(self):
            pathlib.Path(self.state.name, "instance-types.toml").write_text(TYPES)
            super().start()

    def volume(self, **more):
        made = self.ec2.create_volume(AvailabilityZone="home-1a", **more)["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[made], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        return made

    def told(self, volume):
        return self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]

    def change(self, volume):
        return self.ec2.describe_volumes_modifications(VolumeIds=[volume])["VolumesModifications"][0]

    def over(self, volume):
        self.eventually(lambda: self.change(volume)["ModificationState"] == "completed")

    def test_a_volume_grows_and_gets_another_type(self):
        volume = self.volume(Size=10, VolumeType="gp2")
        asked = self.ec2.modify_volume(VolumeId=volume, Size=20, VolumeType="gp3", Iops=5000, Throughput=500)
        asked = asked["VolumeModification"]
        self.assertEqual(asked["ModificationState"], "modifying")
        self.assertEqual((asked["OriginalSize"], asked["OriginalVolumeType"], asked["OriginalIops"]), (10, "gp2", 100))
        self.assertNotIn("OriginalThroughput", asked)
        self.assertEqual((asked["TargetSize"], asked["TargetVolumeType"], asked["TargetIops"]), (20, "gp3", 5000))
        self.assertEqual((asked["TargetThroughput"], asked["Progress"]), (500, 0))
        self.assertNotIn("EndTime", asked)
        self.eventually(lambda: self.change(volume)["ModificationState"] != "modifying")
        told = self.told(volume)
        self.assertEqual((told["Size"], told["VolumeType"], told["Iops"], told["Throughput"]), (20, "gp3", 5000, 500))
        self.over(volume)
        done = self.change(volume)
        self.assertEqual(done["Progress"], 100)
        self.assertGreaterEqual(done["EndTime"], done["StartTime"])

    def test_what_cannot_be_is_refused_with_ec2s_codes(self):
        volume = self.volume(Size=10, VolumeType="gp3")
        modify = self.ec2.modify_volume
        self.fails("InvalidParameterValue", modify, VolumeId=volume, Size=9)
        self.fails("InvalidParameterValue", modify, VolumeId=volume, Size=70000)
        self.fails("InvalidParameterValue", modify, VolumeId=volume, Iops=5001)
        self.fails("InvalidParameterValue", modify, VolumeId=volume, Throughput=751)
        self.fails("InvalidParameterValue", modify, VolumeId=volume, VolumeType="sc1")
        self.fails("InvalidParameterValue", modify, VolumeId=volume, VolumeType="gp9")
        self.fails("InvalidParameterCombination", modify, VolumeId=volume, VolumeType="gp2", Iops=500)
        self.fails("InvalidParameterCombination", modify, VolumeId=volume)
        self.fails("InvalidParameterValue", modify, VolumeId=volume, VolumeType="io1", Iops=501)
        self.fails("UnsupportedOperation", modify, VolumeId=volume, Size=11, MultiAttachEnabled=True)
        self.fails("InvalidVolume.NotFound", modify, VolumeId="vol-0123456789abcdef0", Size=11)
        self.fails("InvalidVolume.Malformed", modify, VolumeId="i-0123456789abcdef0", Size=11)
        self.fails("DryRunOperation", modify, VolumeId=volume, Size=11, DryRun=True)
        missing = {"VolumeIds": [volume]}
        self.fails("InvalidVolumeModification.NotFound", self.ec2.describe_volumes_modifications, **missing)
        self.assertEqual(self.told(volume)["Size"], 10)

    def test_one_at_a_time_and_four_a_day(self):
        volume = self.volume(Size=1, VolumeType="gp2")
        for size in (2, 3, 4, 5):
            self.ec2.modify_volume(VolumeId=volume, Size=size)
            self.fails("IncorrectModificationState", self.ec2.modify_volume, VolumeId=volume, Size=9)
            self.over(volume)
        self.fails("VolumeModificationRateExceeded", self.ec2.modify_volume, VolumeId=volume, Size=9)
        self.assertEqual(self.told(volume)["Size"], 5)

    def test_modifications_are_found_by_every_filter(self):
        one, two = self.volume(Size=3, VolumeType="gp2"), self.volume(Size=4, VolumeType="io1", Iops=200)
        self.ec2.modify_volume(VolumeId=one, Size=33)
        self.ec2.modify_volume(VolumeId=two, Size=44, Iops=300, VolumeType="io2")
        for volume in (one, two):
            self.over(volume)
        start = self.change(one)["StartTime"].strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        for name, value, which in [
            ("volume-id", one, one), ("original-size", "3", one), ("target-size", "33", one), ("start-time", start, one),
            ("original-volume-type", "io1", two), ("target-volume-type", "io2", two), ("original-iops", "200", two),
            ("target-iops", "300", two),
        ]:
            found = self.ec2.describe_volumes_modifications(Filters=[{"Name": name, "Values": [value]}])
            self.assertEqual([change["VolumeId"] for change in found["VolumesModifications"]], [which], name)
        for name, value in [("modification-state", "completed"), ("originalMultiAttachEnabled", "false"),
                            ("targetMultiAttachEnabled", "false")]:
            found = self.ec2.describe_volumes_modifications(Filters=[{"Name": name, "Values": [value]}])
            self.assertLessEqual({one, two}, {change["VolumeId"] for change in found["VolumesModifications"]}, name)
        pages = self.ec2.get_paginator("describe_volumes_modifications").paginate(PaginationConfig={"PageSize": 5})
        self.assertIn(two, [change["VolumeId"] for page in pages for change in page["VolumesModifications"]])

    def test_snapshots_of_an_instance_leave_out_what_is_said(self):
        disks = [{"DeviceName": name, "Ebs": {"VolumeSize": 1}} for name in ("/dev/sdf", "/dev/sdg")]
        tags = [{"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": "of the volume"}]}]
        instance = self.run_one(BlockDeviceMappings=disks, TagSpecifications=tags)
        self.wait("instance_running", instance)
        volumes = [disk["Ebs"]["VolumeId"] for disk in self.instance(instance)["BlockDeviceMappings"]]
        own = [{"ResourceType": "snapshot", "Tags": [{"Key": "by", "Value": "night"}]}]
        made = self.ec2.create_snapshots(InstanceSpecification={"InstanceId": instance}, Description="all",
                                         CopyTagsFromSource="volume", TagSpecifications=own)["Snapshots"]
        self.assertEqual(sorted(snapshot["VolumeId"] for snapshot in made), sorted(volumes))
        for snapshot in made:
            self.assertEqual((snapshot["State"], snapshot["Description"]), ("pending", "all"))
            self.assertEqual({tag["Key"] for tag in snapshot["Tags"]}, {"Name", "by"})
        ids = [snapshot["SnapshotId"] for snapshot in made]
        waiter = self.ec2.get_waiter("snapshot_completed")
        waiter.wait(SnapshotIds=ids, WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        part = {"InstanceId": instance, "ExcludeBootVolume": True, "ExcludeDataVolumeIds": [volumes[2]]}
        made = self.ec2.create_snapshots(InstanceSpecification=part)["Snapshots"]
        self.assertEqual([(snapshot["VolumeId"], snapshot.get("Tags", [])) for snapshot in made], [(volumes[1], [])])
        create = self.ec2.create_snapshots
        part["ExcludeDataVolumeIds"] = volumes[1:]
        self.fails("InvalidParameterValue", create, InstanceSpecification=part)
        self.fails("InvalidParameterValue", create,
                   InstanceSpecification={"InstanceId": instance, "ExcludeDataVolumeIds": [volumes[0]]})
        self.fails("InvalidInstanceID.NotFound", create, InstanceSpecification={"InstanceId": "i-0123456789abcdef0"})
        self.fails("InvalidParameterValue", create, InstanceSpecification={"InstanceId": instance},
                   CopyTagsFromSource="instance")
        self.fails("MissingParameter", create, InstanceSpecification={"InstanceId": ""})

    def test_instance_types_tell_how_fast_they_are(self):
        types = self.ec2.describe_instance_types(InstanceTypes=["t3.micro", "own.slow", "t2.micro"])["InstanceTypes"]
        types = {kind["InstanceType"]: kind for kind in types}
        micro = types["t3.micro"]
        self.assertEqual(micro["EbsInfo"]["EbsOptimizedInfo"], {
            "BaselineBandwidthInMbps": 87, "BaselineThroughputInMBps": 10.875, "BaselineIops": 500,
            "MaximumBandwidthInMbps": 2085, "MaximumThroughputInMBps": 260.625, "MaximumIops": 11800})
        self.assertEqual(micro["NetworkInfo"]["NetworkPerformance"], "Up to 5 Gigabit")
        card = micro["NetworkInfo"]["NetworkCards"][0]
        self.assertEqual((card["BaselineBandwidthInGbps"], card["PeakBandwidthInGbps"]), (0.064, 5.0))
        slow = types["own.slow"]
        self.assertEqual(slow["NetworkInfo"]["NetworkPerformance"], "0.1 Gigabit")
        self.assertEqual(slow["EbsInfo"]["EbsOptimizedInfo"]["MaximumBandwidthInMbps"], 80)
        self.assertNotIn("EbsOptimizedInfo", types["t2.micro"]["EbsInfo"])
        name = "ebs-info.ebs-optimized-info.baseline-throughput-in-mbps"
        found = self.ec2.describe_instance_types(Filters=[{"Name": name, "Values": ["10.875"]}])["InstanceTypes"]
        self.assertEqual([kind["InstanceType"] for kind in found], ["t3.micro"])


if __name__ == "__main__":
    unittest.main()
