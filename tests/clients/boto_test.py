"""boto3: a life with EC2."""

import base64
import concurrent.futures
import datetime
import json
import pathlib
import random
import time
import unittest

import botocore.exceptions

from daemon import Case, Daemon


class Instances(Case):
    def test_an_instances_life(self):
        token = "once"
        first = self.run_one(ClientToken=token, UserData="#!/bin/sh\necho hello\n")
        self.assertEqual(first, self.run_one(ClientToken=token, UserData="#!/bin/sh\necho hello\n"))
        self.fails("IdempotentParameterMismatch", self.run_one, ClientToken=token)
        self.wait("instance_running", first)
        told = self.instance(first)
        self.assertEqual(told["State"], {"Code": 16, "Name": "running"})
        self.assertIsInstance(told["LaunchTime"], datetime.datetime)
        self.assertEqual(told["PrivateDnsName"], f"ip-{told['PrivateIpAddress'].replace('.', '-')}.home-1.internal")
        self.assertEqual(told["SecurityGroups"][0]["GroupName"], "default")
        self.assertTrue(told["BlockDeviceMappings"][0]["Ebs"]["DeleteOnTermination"])
        data = self.ec2.describe_instance_attribute(InstanceId=first, Attribute="userData")
        self.assertEqual(base64.b64decode(data["UserData"]["Value"]), b"#!/bin/sh\necho hello\n")
        self.wait("instance_status_ok", first)
        self.assertIn("login", self.ec2.get_console_output(InstanceId=first)["Output"])
        self.ec2.reboot_instances(InstanceIds=[first])

        change = self.ec2.stop_instances(InstanceIds=[first])["StoppingInstances"][0]
        self.assertEqual(change["PreviousState"]["Name"], "running")
        self.wait("instance_stopped", first)
        self.ec2.modify_instance_attribute(InstanceId=first, InstanceType={"Value": "t3.large"})
        self.assertEqual(self.instance(first)["InstanceType"], "t3.large")
        self.ec2.start_instances(InstanceIds=[first])
        self.wait("instance_running", first)
        self.fails("IncorrectInstanceState", self.ec2.modify_instance_attribute, InstanceId=first,
                   InstanceType={"Value": "t3.micro"})

        self.ec2.modify_instance_attribute(InstanceId=first, DisableApiTermination={"Value": True})
        self.fails("OperationNotPermitted", self.ec2.terminate_instances, InstanceIds=[first])
        self.ec2.modify_instance_attribute(InstanceId=first, DisableApiTermination={"Value": False})
        volume = told["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        self.ec2.terminate_instances(InstanceIds=[first])
        self.wait("instance_terminated", first)
        waiter = self.ec2.get_waiter("volume_deleted")
        waiter.wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})

    def test_pages_and_filters(self):
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "page", "Value": "yes"}]}]
        made = self.ec2.run_instances(ImageId=self.image, MinCount=17, MaxCount=17, InstanceType="t3.nano",
                                      TagSpecifications=tags)
        ids = {i["InstanceId"] for i in made["Instances"]}
        pages = self.ec2.get_paginator("describe_instances").paginate(
            Filters=[{"Name": "tag:page", "Values": ["y*"]}], PaginationConfig={"PageSize": 5})
        found, count = set(), 0
        for page in pages:
            count += 1
            found |= {i["InstanceId"] for r in page["Reservations"] for i in r["Instances"]}
        self.assertEqual((found, count), (ids, 4))
        some = ids.pop()
        ip = self.instance(some)["PrivateIpAddress"]
        for name, value in [("network-interface.addresses.private-ip-address", ip), ("private-ip-address", ip),
                            ("instance-id", some)]:
            got = self.ec2.describe_instances(Filters=[{"Name": name, "Values": [value]}])["Reservations"]
            self.assertEqual([i["InstanceId"] for r in got for i in r["Instances"]], [some], name)
        self.fails("InvalidParameterValue", self.ec2.describe_instances, Filters=[{"Name": "x", "Values": ["y"]}])
        self.fails("InvalidParameterCombination", self.ec2.describe_instances, InstanceIds=[some], MaxResults=5)
        self.ec2.terminate_instances(InstanceIds=[some, *ids])

    def test_bad_requests_have_ec2s_codes_and_change_nothing(self):
        launch = dict(MinCount=1, MaxCount=1, InstanceType="t3.micro")
        for code, call, more in [
            ("InvalidAMIID.Malformed", self.ec2.run_instances, dict(launch, ImageId="x")),
            ("InvalidAMIID.NotFound", self.ec2.run_instances, dict(launch, ImageId="ami-12345678")),
            ("InvalidKeyPair.NotFound", self.ec2.run_instances, dict(launch, ImageId=self.image, KeyName="none")),
            ("InvalidParameterValue", self.ec2.run_instances, dict(launch, ImageId=self.image, InstanceType="x9.huge")),
            ("InvalidGroup.NotFound", self.ec2.run_instances, dict(launch, ImageId=self.image, SecurityGroups=["no"])),
            ("InvalidAMIID.NotFound", self.ec2.run_instances, dict(launch, ImageId=self.image, KernelId="aki-12345678")),
            ("DryRunOperation", self.ec2.run_instances, dict(launch, ImageId=self.image, DryRun=True)),
            ("InvalidInstanceID.NotFound", self.ec2.describe_instances, dict(InstanceIds=["i-12345678"])),
            ("InvalidInstanceID.Malformed", self.ec2.stop_instances, dict(InstanceIds=["i-x"])),
            ("InvalidVolume.NotFound", self.ec2.delete_volume, dict(VolumeId="vol-12345678")),
            ("InvalidSnapshot.NotFound", self.ec2.delete_snapshot, dict(SnapshotId="snap-12345678")),
            ("InvalidGroup.NotFound", self.ec2.delete_security_group, dict(GroupId="sg-12345678")),
            ("InvalidZone.NotFound", self.ec2.create_volume, dict(AvailabilityZone="mars-1a", Size=1)),
            ("UnsupportedOperation", self.ec2.request_spot_instances, dict(InstanceCount=1)),
        ]:
            before = len(self.ec2.describe_instances()["Reservations"])
            answer = self.fails(code, call, **more)
            self.assertEqual(answer["ResponseMetadata"]["HTTPStatusCode"], 412 if code == "DryRunOperation" else 400)
            self.assertEqual(len(self.ec2.describe_instances()["Reservations"]), before)


class Things(Case):
    def test_keys(self):
        made = self.ec2.create_key_pair(KeyName="a key", KeyType="ed25519")
        self.assertIn("OPENSSH PRIVATE KEY", made["KeyMaterial"])
        self.fails("InvalidKeyPair.Duplicate", self.ec2.create_key_pair, KeyName="a key")
        told = self.ec2.describe_key_pairs(KeyNames=["a key"], IncludePublicKey=True)["KeyPairs"][0]
        self.assertEqual(told["KeyFingerprint"], made["KeyFingerprint"])
        again = self.ec2.import_key_pair(KeyName="again", PublicKeyMaterial=told["PublicKey"].encode())
        self.assertEqual(again["KeyFingerprint"], made["KeyFingerprint"])
        self.fails("InvalidKey.Format", self.ec2.import_key_pair, KeyName="bad", PublicKeyMaterial=b"nothing")
        instance = self.run_one(KeyName="a key")
        self.assertEqual(self.instance(instance)["KeyName"], "a key")
        self.ec2.delete_key_pair(KeyName="a key")
        self.ec2.delete_key_pair(KeyName="a key")
        self.fails("InvalidKeyPair.NotFound", self.ec2.describe_key_pairs, KeyNames=["a key"])

    def test_volumes_snapshots_and_images(self):
        volume = self.ec2.create_volume(AvailabilityZone="home-1a", Size=3, VolumeType="gp3")["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        instance = self.run_one()
        self.wait("instance_running", instance)
        self.ec2.stop_instances(InstanceIds=[instance], Force=True)
        self.wait("instance_stopped", instance)
        self.ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device="/dev/sdf")
        self.fails("VolumeInUse", self.ec2.delete_volume, VolumeId=volume)
        told = self.ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [instance]}])["Volumes"]
        self.assertEqual(len(told), 2)
        image = self.ec2.create_image(InstanceId=instance, Name="with data")["ImageId"]
        self.ec2.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05})
        devices = self.ec2.describe_images(ImageIds=[image])["Images"][0]["BlockDeviceMappings"]
        self.assertEqual([d["DeviceName"] for d in devices], ["/dev/xvda", "/dev/sdf"])
        self.ec2.modify_image_attribute(ImageId=image, LaunchPermission={"Add": [{"UserId": "123456789012"}]})
        shared = self.ec2.describe_image_attribute(ImageId=image, Attribute="launchPermission")
        self.assertEqual(shared["LaunchPermissions"], [{"UserId": "123456789012"}])
        self.ec2.detach_volume(VolumeId=volume)
        self.fails("IncorrectState", self.ec2.detach_volume, VolumeId=volume)
        snapshot = self.ec2.create_snapshot(VolumeId=volume, Description="kept")["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        self.fails("InvalidSnapshot.InUse", self.ec2.delete_snapshot, SnapshotId=devices[0]["Ebs"]["SnapshotId"])
        self.ec2.deregister_image(ImageId=image)
        self.ec2.delete_snapshot(SnapshotId=snapshot)
        self.ec2.delete_volume(VolumeId=volume)
        self.ec2.get_waiter("volume_deleted").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})

    def test_an_instance_has_as_many_volumes_as_the_largest_of_ec2(self):
        disk = lambda n: {"DeviceName": f"/dev/xvd{chr(98 + n // 26)}{chr(97 + n % 26)}", "Ebs": {"VolumeSize": 1, "DeleteOnTermination": True}}
        before = len(self.ec2.describe_volumes()["Volumes"])
        self.fails("AttachmentLimitExceeded", self.run_one, BlockDeviceMappings=[disk(n) for n in range(127)])
        self.assertEqual(len(self.ec2.describe_volumes()["Volumes"]), before)
        instance = self.run_one(BlockDeviceMappings=[disk(n) for n in range(125)])
        self.wait("instance_running", instance)
        for name, fails in [("/dev/sdz", False), ("/dev/sdy", True)]:
            volume = self.ec2.create_volume(AvailabilityZone="home-1a", Size=1)["VolumeId"]
            self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
            attach = {"VolumeId": volume, "InstanceId": instance, "Device": name}
            if fails:
                self.fails("AttachmentLimitExceeded", self.ec2.attach_volume, **attach)
                self.assertEqual(self.ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["State"], "available")
            else:
                self.ec2.attach_volume(**attach)
        self.assertEqual(len(self.instance(instance)["BlockDeviceMappings"]), 127)

    def test_security_groups(self):
        group = self.ec2.create_security_group(GroupName="web", Description="for the web")["GroupId"]
        self.fails("InvalidGroup.Duplicate", self.ec2.create_security_group, GroupName="web", Description="again")
        http = [{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80,
                 "IpRanges": [{"CidrIp": "0.0.0.0/0", "Description": "all"}],
                 "UserIdGroupPairs": [{"GroupId": group}]}]
        rules = self.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=http)["SecurityGroupRules"]
        self.assertEqual(len(rules), 2)
        self.fails("InvalidPermission.Duplicate", self.ec2.authorize_security_group_ingress, GroupId=group,
                   IpPermissions=http)
        told = self.ec2.describe_security_groups(Filters=[{"Name": "ip-permission.cidr", "Values": ["0.0.0.0/0"]}])
        self.assertEqual([g["GroupId"] for g in told["SecurityGroups"]], [group])
        self.assertEqual(told["SecurityGroups"][0]["IpPermissions"][0]["FromPort"], 80)
        self.ec2.modify_security_group_rules(GroupId=group, SecurityGroupRules=[{
            "SecurityGroupRuleId": rules[0]["SecurityGroupRuleId"],
            "SecurityGroupRule": {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "CidrIpv4": "10.0.0.0/8"}}])
        self.ec2.revoke_security_group_ingress(GroupId=group, SecurityGroupRuleIds=[rules[1]["SecurityGroupRuleId"]])
        self.fails("InvalidPermission.NotFound", self.ec2.revoke_security_group_ingress, GroupId=group,
                   IpPermissions=http)
        instance = self.run_one(SecurityGroupIds=[group])
        self.fails("DependencyViolation", self.ec2.delete_security_group, GroupId=group)
        self.ec2.terminate_instances(InstanceIds=[instance])
        self.wait("instance_terminated", instance)
        self.ec2.delete_security_group(GroupId=group)
        self.fails("InvalidGroup.NotFound", self.ec2.describe_security_groups, GroupIds=[group])

    def test_rules_that_no_packet_could_match_are_refused_and_change_nothing(self):
        group = self.ec2.create_security_group(GroupName="strict", Description="to the letter")["GroupId"]
        good = {"IpProtocol": "udp", "FromPort": 53, "ToPort": 53, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}
        everyone, bad = {"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, "InvalidParameterValue"
        own = self.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[
            {"IpProtocol": "icmp", "FromPort": 8, "ToPort": 0, **everyone}])["SecurityGroupRules"][0]
        ask = lambda: self.ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
        before = ask()
        ports = lambda protocol, first, last: {"IpProtocol": protocol, "FromPort": first, "ToPort": last, **everyone}
        wrong = [(bad, ports(*of)) for of in [
            ("tcp", 23, 22), ("tcp", 0, 65536), ("udp", -2, 5), ("icmp", -1, 0), ("icmp", 256, 0), ("icmp", 0, 65535),
            ("icmpv6", 300, -1), ("256", -1, -1), ("sctp", 1, 2)]]
        wrong += [(code, {"IpProtocol": "tcp", "FromPort": 1, "ToPort": 2, **peer}) for code, peer in [
            (bad, {"IpRanges": [{"CidrIp": "10.0.0.0"}]}), (bad, {"IpRanges": [{"CidrIp": "10.0.0.0/33"}]}),
            (bad, {"Ipv6Ranges": [{"CidrIpv6": "::/129"}]}), (bad, {"Ipv6Ranges": [{"CidrIpv6": "10.0.0.0/8"}]}),
            ("InvalidGroup.NotFound", {"UserIdGroupPairs": [{"GroupId": "sg-12345678"}]}),
            ("InvalidPrefixListID.NotFound", {"PrefixListIds": [{"PrefixListId": "pl-12345678"}]})]]
        calls = [self.ec2.authorize_security_group_ingress, self.ec2.authorize_security_group_egress]
        for code, permission in wrong:
            for call in calls:
                # What is right beside it is not taken either.
                self.fails(code, call, GroupId=group, IpPermissions=[good, permission])
        for code, change in [(bad, {"IpProtocol": "icmp", "FromPort": -1, "ToPort": 3, "CidrIpv4": "0.0.0.0/0"}),
                             (bad, {"IpProtocol": "tcp", "FromPort": 9, "ToPort": 3, "CidrIpv4": "0.0.0.0/0"}),
                             ("InvalidGroup.NotFound", {"IpProtocol": "-1", "ReferencedGroupId": "sg-12345678"})]:
            self.fails(code, self.ec2.modify_security_group_rules, GroupId=group, SecurityGroupRules=[
                {"SecurityGroupRuleId": own["SecurityGroupRuleId"], "SecurityGroupRule": change}])
        self.assertEqual(ask(), before)
        self.ec2.delete_security_group(GroupId=group)

    def test_tags(self):
        instance = self.run_one()
        self.ec2.create_tags(Resources=[instance], Tags=[{"Key": "Name", "Value": "web <&> 1"}])
        told = self.ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [instance]}])["Tags"]
        self.assertEqual([(t["Key"], t["Value"]) for t in told], [("Name", "web <&> 1")])
        self.fails("InvalidParameterValue", self.ec2.create_tags, Resources=[instance],
                   Tags=[{"Key": "aws:x", "Value": ""}])
        many = [{"Key": str(n), "Value": ""} for n in range(50)]
        self.fails("TagLimitExceeded", self.ec2.create_tags, Resources=[instance], Tags=many)
        self.ec2.delete_tags(Resources=[instance], Tags=[{"Key": "Name"}])
        self.assertNotIn("Tags", self.instance(instance))

    def test_places(self):
        self.assertEqual([r["RegionName"] for r in self.ec2.describe_regions()["Regions"]], ["home-1"])
        zones = self.ec2.describe_availability_zones()["AvailabilityZones"]
        self.assertEqual([z["ZoneName"] for z in zones], ["home-1a", "home-1b"])
        kinds = self.ec2.describe_instance_types(InstanceTypes=["t3.micro"])["InstanceTypes"][0]
        self.assertEqual((kinds["VCpuInfo"]["DefaultVCpus"], kinds["MemoryInfo"]["SizeInMiB"]), (2, 1024))
        vpc = self.ec2.describe_vpcs()["Vpcs"][0]
        self.assertEqual((vpc["CidrBlock"], vpc["IsDefault"]), ("172.31.0.0/16", True))
        subnets = self.ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc["VpcId"]]}])["Subnets"]
        self.assertEqual([s["CidrBlock"] for s in sorted(subnets, key=lambda s: s["CidrBlock"])],
                         ["172.31.0.0/20", "172.31.16.0/20"])
        account = self.daemon.client("sts").get_caller_identity()["Account"]
        self.assertEqual(account, "000000000001")

    def test_every_describe_parses(self):
        """With what is there, each answer has the types that the model says."""
        self.wait("instance_running", self.run_one())
        for name in ["instances", "instance_status", "images", "volumes", "volume_status", "snapshots", "security_groups",
                     "security_group_rules", "key_pairs", "addresses", "addresses_attribute", "tags", "regions",
                     "availability_zones", "instance_types", "instance_type_offerings", "spot_instance_requests",
                     "reserved_instances", "reserved_instances_offerings", "account_attributes", "vpcs", "subnets",
                     "network_interfaces", "route_tables", "internet_gateways", "network_acls", "dhcp_options",
                     "launch_templates", "instance_credit_specifications", "volumes_modifications",
                     "iam_instance_profile_associations"]:
            answer = getattr(self.ec2, f"describe_{name}")()
            self.assertEqual(answer["ResponseMetadata"]["HTTPStatusCode"], 200, name)
            things = [value for key, value in answer.items() if isinstance(value, list)]
            self.assertEqual(len(things), 1, f"{name}: {answer}")


class Access(Case):
    OPTIONS = ()

    def test_strangers(self):
        self.fails("AuthFailure", self.daemon.client(key="AKIDNOBODY").describe_regions)
        self.fails("SignatureDoesNotMatch", self.daemon.client(secret="wrong").describe_regions)
        self.fails("AuthFailure", self.daemon.client(region="mars-1").describe_regions)

    def test_too_many_calls(self):
        codes = set()
        for _ in range(200):
            try:
                self.ec2.describe_regions()
            except botocore.exceptions.ClientError as e:
                codes.add((e.response["Error"]["Code"], e.response["ResponseMetadata"]["HTTPStatusCode"]))
        self.assertEqual(codes, {("RequestLimitExceeded", 503)})
        self.ec2.describe_vpcs()


class Killed(unittest.TestCase):
    """kill -9 at any moment: what was answered is kept, and nothing is done twice."""

    def test_a_random_day(self):
        seed = random.randrange(1 << 32)
        print(f"seed {seed}")
        dice = random.Random(seed)
        daemon = Daemon("--rate", "0", "--delay", "3")
        ec2 = daemon.client()
        image = ec2.describe_images()["Images"][0]["ImageId"]
        wanted = {}
        for _ in range(200):
            ec2, pause = daemon.client(read_timeout=20), dice.random() / 5
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                kill = pool.submit(lambda: (time.sleep(pause), daemon.kill()))
                while not kill.done():
                    alive = [i for i, state in wanted.items() if state != "terminated"]
                    try:
                        match dice.choice(["run", "stop", "start", "terminate"]):
                            case "run":
                                n = dice.randint(1, 3)
                                made = ec2.run_instances(ImageId=image, MinCount=n, MaxCount=n, InstanceType="t3.nano")
                                wanted.update({i["InstanceId"]: "running" for i in made["Instances"]})
                            case "stop" if alive:
                                one = dice.choice(alive)
                                ec2.stop_instances(InstanceIds=[one])
                                wanted[one] = "stopped"
                            case "start" if alive:
                                one = dice.choice(alive)
                                ec2.start_instances(InstanceIds=[one])
                                wanted[one] = "running"
                            case "terminate" if len(alive) > 5:
                                one = dice.choice(alive)
                                wanted[one] = "terminated?"
                                ec2.terminate_instances(InstanceIds=[one])
                                wanted[one] = "terminated"
                    except botocore.exceptions.ClientError as e:
                        self.assertIn(e.response["Error"]["Code"], ["IncorrectInstanceState"])
                    except (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError):
                        pass
            daemon.start()
        ec2 = daemon.client()
        until = time.monotonic() + 120
        while True:
            told = {i["InstanceId"]: i["State"]["Name"] for r in ec2.describe_instances()["Reservations"]
                    for i in r["Instances"]}
            if not set(told.values()) & {"pending", "stopping", "shutting-down"}:
                break
            self.assertLess(time.monotonic(), until, told)
            time.sleep(0.1)
        for instance in wanted:
            self.assertIn(instance, told, "what was answered is kept")
            if wanted[instance] == "terminated":
                self.assertEqual(told[instance], "terminated", instance)
        volumes = ec2.describe_volumes()["Volumes"]
        held = [a["InstanceId"] for v in volumes for a in v["Attachments"]]
        alive = sorted(i for i, state in told.items() if state != "terminated")
        self.assertEqual(sorted(held), alive, "each that is alive has its one volume, and nobody else has any")
        addresses = [i["PrivateIpAddress"] for i in ec2.describe_network_interfaces()["NetworkInterfaces"]]
        self.assertEqual(len(set(addresses)), len(alive), "an address each")
        # The host agrees: what runs there is what is said to run, each started once a run.
        machines = pathlib.Path(daemon.state.name, "home-1/host/machines")
        for path in machines.iterdir():
            kept = json.loads(path.read_text())
            self.assertEqual(kept["end"] is None, told[path.name] == "running", path.name)
            self.assertEqual(kept["starts"], kept["machine"]["run"], "a run is started once")
        running = [i for i, state in told.items() if state == "running"]
        self.assertTrue(all((machines / i).exists() for i in running))
        ec2.close()
        self.assertEqual(daemon.stop(), 0)


if __name__ == "__main__":
    unittest.main()
