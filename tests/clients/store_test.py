"""boto3: instance stores, as types have them."""

from daemon import Case


class Stores(Case):
    def test_types_tell_their_instance_stores(self):
        told = self.ec2.describe_instance_types(InstanceTypes=["m5d.large", "m5d.4xlarge", "t3.micro"])["InstanceTypes"]
        types = {kind["InstanceType"]: kind for kind in told}
        self.assertEqual({name: kind["InstanceStorageSupported"] for name, kind in types.items()},
                         {"m5d.large": True, "m5d.4xlarge": True, "t3.micro": False})
        self.assertNotIn("InstanceStorageInfo", types["t3.micro"])
        info = types["m5d.4xlarge"]["InstanceStorageInfo"]
        self.assertEqual((info["TotalSizeInGB"], info["Disks"]), (600, [{"SizeInGB": 300, "Count": 2, "Type": "ssd"}]))
        found = lambda name, value: {kind["InstanceType"] for kind in self.ec2.describe_instance_types(
            Filters=[{"Name": name, "Values": [value]}])["InstanceTypes"]}
        self.assertIn("i3.large", found("instance-storage-supported", "true"))
        self.assertEqual(found("instance-storage-info.total-size-in-gb", "75"), {"m5d.large"})
        self.assertEqual(found("instance-storage-info.disk.size-in-gb", "475"), {"i3.large"})

    def test_a_store_is_no_volume(self):
        made = self.ec2.run_instances(ImageId=self.image, MinCount=1, MaxCount=1, InstanceType="m5d.large", BlockDeviceMappings=[
            {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}])
        instance = made["Instances"][0]["InstanceId"]
        self.wait("instance_running", instance)
        self.assertEqual([d["DeviceName"] for d in self.instance(instance)["BlockDeviceMappings"]], ["/dev/xvda"])
        self.fails("InvalidBlockDeviceMapping", self.run_one, BlockDeviceMappings=[{"DeviceName": "/dev/sdb", "VirtualName": "ephemeral99"}])
