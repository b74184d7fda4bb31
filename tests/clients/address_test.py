"""boto3 and the aws CLI: elastic addresses, and public ones that come and go with instances."""

import json
import os
import pathlib
import subprocess

from daemon import KEY, REGION, SECRET, Case, Daemon


class Addresses(Case):
    def setUp(self):
        self.addCleanup(self.forget)

    def forget(self):
        ids = [i["InstanceId"] for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]
               if i["State"]["Name"] != "terminated"]
        if ids:
            self.ec2.terminate_instances(InstanceIds=ids)
        for instance in ids:
            self.wait("instance_terminated", instance)
        for address in self.ec2.describe_addresses()["Addresses"]:
            if "AssociationId" in address:
                self.ec2.disassociate_address(AssociationId=address["AssociationId"])
            self.ec2.release_address(AllocationId=address["AllocationId"])

    def running(self, **more):
        instance = self.run_one(**more)
        self.wait("instance_running", instance)
        return instance

    def address(self, allocation):
        return self.ec2.describe_addresses(AllocationIds=[allocation])["Addresses"][0]

    def on_host(self, instance):
        """What the host was told of an instance that runs."""
        path = pathlib.Path(self.daemon.state.name, REGION, "host/machines", instance)
        return json.loads(path.read_text())["machine"]

    def led(self, instance):
        public = self.on_host(instance)["interfaces"][0]["public"]
        return public and public["ip"]

    def test_an_address_is_allocated_associated_and_released(self):
        ec2 = self.ec2
        tags = [{"ResourceType": "elastic-ip", "Tags": [{"Key": "Name", "Value": "web"}]}]
        made = ec2.allocate_address(Domain="vpc", TagSpecifications=tags)
        ip, allocation = made["PublicIp"], made["AllocationId"]
        self.assertTrue(allocation.startswith("eipalloc-") and ip.startswith("198.19."), made)
        self.assertEqual((made["Domain"], made["PublicIpv4Pool"], made["NetworkBorderGroup"]), ("vpc", "amazon", REGION))
        free = self.address(allocation)
        self.assertEqual(free["Tags"], tags[0]["Tags"])
        self.assertNotIn("AssociationId", free)
        self.assertEqual(ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [allocation]}])["Tags"][0]["ResourceType"],
                         "elastic-ip")

        one = self.running()
        self.assertNotIn("PublicIpAddress", self.instance(one))
        association = ec2.associate_address(AllocationId=allocation, InstanceId=one)["AssociationId"]
        told = self.instance(one)
        card = told["NetworkInterfaces"][0]
        name = f"ec2-{ip.replace('.', '-')}.{REGION}.internal"
        self.assertEqual((told["PublicIpAddress"], told["PublicDnsName"]), (ip, name))
        self.assertEqual(card["Association"], {"IpOwnerId": card["OwnerId"], "PublicIp": ip, "PublicDnsName": name})
        self.assertEqual(card["PrivateIpAddresses"][0]["Association"]["PublicIp"], ip)
        address = self.address(allocation)
        self.assertEqual((address["AssociationId"], address["InstanceId"], address["NetworkInterfaceId"],
                          address["PrivateIpAddress"], address["NetworkInterfaceOwnerId"]),
                         (association, one, card["NetworkInterfaceId"], told["PrivateIpAddress"], card["OwnerId"]))
        eni = ec2.describe_network_interfaces(Filters=[{"Name": "association.public-ip", "Values": [ip]}])
        self.assertEqual(eni["NetworkInterfaces"][0]["Association"]["AllocationId"], allocation)
        self.assertEqual(eni["NetworkInterfaces"][0]["Association"]["AssociationId"], association)
        # The host is told, and so is the guest.
        self.eventually(lambda: self.led(one) == ip)
        metadata = self.on_host(one)["metadata"]
        self.assertEqual((metadata["public_ipv4"], metadata["public_hostname"]), (ip, name))

        # Done again, nothing is another.
        again = ec2.associate_address(AllocationId=allocation, InstanceId=one, AllowReassociation=False)
        self.assertEqual(again["AssociationId"], association)
        self.fails("InvalidIPAddress.InUse", ec2.release_address, AllocationId=allocation)
        ec2.disassociate_address(AssociationId=association)
        self.fails("InvalidAssociationID.NotFound", ec2.disassociate_address, AssociationId=association)
        self.assertNotIn("PublicIpAddress", self.instance(one))
        self.eventually(lambda: self.led(one) is None)
        ec2.disassociate_address(PublicIp=ip)
        ec2.release_address(AllocationId=allocation)
        self.fails("InvalidAllocationID.NotFound", ec2.release_address, AllocationId=allocation)

    def test_what_is_wrong_is_said_as_ec2_says_it(self):
        ec2 = self.ec2
        none = "eipalloc-00000000000000000"
        one, two = self.running(), self.running()
        mine = [ec2.allocate_address() for _ in range(5)]
        self.fails("AddressLimitExceeded", ec2.allocate_address)
        ec2.release_address(AllocationId=mine.pop()["AllocationId"])
        first, ip = mine[0]["AllocationId"], mine[0]["PublicIp"]
        cases = [
            ("InvalidIPAddress.InUse", ec2.allocate_address, dict(Address=ip)),
            ("InvalidAddress.NotFound", ec2.allocate_address, dict(Address="8.8.8.8")),
            ("InvalidParameterValue", ec2.allocate_address, dict(Address="8.8.8")),
            ("InvalidParameterValue", ec2.allocate_address, dict(Domain="standard")),
            ("InvalidParameterValue", ec2.allocate_address, dict(NetworkBorderGroup="elsewhere")),
            ("InvalidParameterValue", ec2.allocate_address, dict(PublicIpv4Pool="ipv4pool-ec2-1")),
            ("InvalidAllocationID.NotFound", ec2.describe_addresses, dict(AllocationIds=[first, none])),
            ("InvalidAddress.NotFound", ec2.describe_addresses, dict(PublicIps=["198.19.15.1"])),
            ("InvalidAllocationID.NotFound", ec2.describe_addresses_attribute, dict(AllocationIds=[none])),
            ("InvalidAllocationID.NotFound", ec2.release_address, dict(AllocationId=none)),
            ("AuthFailure", ec2.release_address, dict(PublicIp="198.19.15.1")),
            ("InvalidParameterCombination", ec2.release_address, dict(AllocationId=first, PublicIp=ip)),
            ("MissingParameter", ec2.release_address, {}),
            ("InvalidAllocationID.NotFound", ec2.associate_address, dict(AllocationId=none, InstanceId=one)),
            ("AuthFailure", ec2.associate_address, dict(PublicIp="198.19.15.1", InstanceId=one)),
            ("MissingParameter", ec2.associate_address, dict(InstanceId=one)),
            ("MissingParameter", ec2.associate_address, dict(AllocationId=first)),
            ("InvalidInstanceID.NotFound", ec2.associate_address,
             dict(AllocationId=first, InstanceId="i-00000000000000000")),
            ("InvalidInstanceID.Malformed", ec2.associate_address, dict(AllocationId=first, InstanceId="web")),
            ("InvalidNetworkInterfaceID.NotFound", ec2.associate_address,
             dict(AllocationId=first, NetworkInterfaceId="eni-00000000000000000")),
            ("InvalidParameterCombination", ec2.associate_address,
             dict(AllocationId=first, InstanceId=one, NetworkInterfaceId="eni-00000000000000000")),
            ("InvalidParameterValue", ec2.associate_address,
             dict(AllocationId=first, InstanceId=one, PrivateIpAddress="172.31.9.9")),
            ("InvalidAssociationID.NotFound", ec2.disassociate_address, dict(AssociationId="eipassoc-00000000000000000")),
            ("AuthFailure", ec2.disassociate_address, dict(PublicIp="198.19.15.1")),
            ("MissingParameter", ec2.disassociate_address, {}),
            ("InvalidParameterValue", ec2.describe_addresses, dict(Filters=[{"Name": "no-such", "Values": ["x"]}])),
            ("DryRunOperation", ec2.allocate_address, dict(DryRun=True)),
        ]
        for code, call, arguments in cases:
            with self.subTest(code=code, call=call.__name__, arguments=arguments):
                self.fails(code, call, **arguments)
        # Nothing of that has changed anything.
        self.assertTrue(all("AssociationId" not in a for a in ec2.describe_addresses()["Addresses"]))

        ec2.associate_address(AllocationId=first, InstanceId=one)
        other = dict(AllocationId=first, InstanceId=two, AllowReassociation=False)
        self.assertIn("eipassoc-", self.fails("Resource.AlreadyAssociated", ec2.associate_address, **other)["Error"]["Message"])
        taken = dict(AllocationId=mine[1]["AllocationId"], InstanceId=one, AllowReassociation=False)
        self.fails("Resource.AlreadyAssociated", ec2.associate_address, **taken)
        ec2.terminate_instances(InstanceIds=[two])
        self.fails("InvalidInstanceID", ec2.associate_address, AllocationId=mine[1]["AllocationId"], InstanceId=two)

    def test_an_address_moves(self):
        ec2 = self.ec2
        one, two = self.running(), self.running()
        a, b = (ec2.allocate_address() for _ in range(2))
        first = ec2.associate_address(AllocationId=a["AllocationId"], InstanceId=one)["AssociationId"]
        self.eventually(lambda: self.led(one) == a["PublicIp"])
        # To another instance, by its interface and its private address.
        card = self.instance(two)["NetworkInterfaces"][0]
        moved = ec2.associate_address(PublicIp=a["PublicIp"], NetworkInterfaceId=card["NetworkInterfaceId"],
                                      PrivateIpAddress=card["PrivateIpAddress"])["AssociationId"]
        self.assertNotEqual(first, moved)
        self.assertEqual(self.address(a["AllocationId"])["InstanceId"], two)
        self.assertNotIn("PublicIpAddress", self.instance(one))
        self.eventually(lambda: (self.led(one), self.led(two)) == (None, a["PublicIp"]))
        # Another takes its place.
        ec2.associate_address(AllocationId=b["AllocationId"], InstanceId=two)
        self.assertNotIn("AssociationId", self.address(a["AllocationId"]))
        self.assertEqual(self.instance(two)["PublicIpAddress"], b["PublicIp"])
        # To and fro at once: in the end the host has what was said last.
        for _ in range(10):
            for instance in (one, two):
                ec2.associate_address(AllocationId=a["AllocationId"], InstanceId=instance)
        self.eventually(lambda: (self.led(one), self.led(two)) == (None, a["PublicIp"]))

    def test_it_stays_while_an_instance_is_stopped_and_goes_with_it(self):
        ec2 = self.ec2
        one = self.running()
        made = ec2.allocate_address()
        allocation, ip = made["AllocationId"], made["PublicIp"]
        association = ec2.associate_address(AllocationId=allocation, InstanceId=one)["AssociationId"]
        ec2.stop_instances(InstanceIds=[one])
        self.wait("instance_stopped", one)
        self.assertEqual(self.instance(one)["PublicIpAddress"], ip)
        self.assertEqual(self.address(allocation)["AssociationId"], association)
        # Killed, the daemon remembers.
        self.daemon.kill()
        self.daemon.start()
        type(self).ec2 = self.daemon.client()
        ec2.close()
        ec2 = self.ec2
        ec2.start_instances(InstanceIds=[one])
        self.wait("instance_running", one)
        self.eventually(lambda: self.led(one) == ip)
        ec2.terminate_instances(InstanceIds=[one])
        self.wait("instance_terminated", one)
        self.assertNotIn("AssociationId", self.address(allocation))
        self.assertNotIn("PublicIpAddress", self.instance(one))
        # While it is stopped, another can be given one.
        two = self.running()
        ec2.stop_instances(InstanceIds=[two])
        self.wait("instance_stopped", two)
        ec2.associate_address(AllocationId=allocation, InstanceId=two)
        ec2.start_instances(InstanceIds=[two])
        self.wait("instance_running", two)
        self.assertEqual(self.led(two), ip)

    def test_filters_hold(self):
        ec2 = self.ec2
        one = self.running()
        a, b = (ec2.allocate_address() for _ in range(2))
        ec2.create_tags(Resources=[b["AllocationId"]], Tags=[{"Key": "for", "Value": "mail"}])
        ec2.associate_address(AllocationId=a["AllocationId"], InstanceId=one)
        told = self.address(a["AllocationId"])
        both = {a["PublicIp"], b["PublicIp"]}
        for name, value, found in [
            ("allocation-id", a["AllocationId"], {a["PublicIp"]}),
            ("association-id", told["AssociationId"], {a["PublicIp"]}),
            ("instance-id", one, {a["PublicIp"]}),
            ("network-border-group", REGION, both),
            ("network-interface-id", told["NetworkInterfaceId"], {a["PublicIp"]}),
            ("network-interface-owner-id", told["NetworkInterfaceOwnerId"], {a["PublicIp"]}),
            ("private-ip-address", told["PrivateIpAddress"], {a["PublicIp"]}),
            ("public-ip", b["PublicIp"], {b["PublicIp"]}),
            ("public-ip", "198.19.*", both),
            ("tag:for", "mail", {b["PublicIp"]}),
            ("tag-key", "for", {b["PublicIp"]}),
            ("instance-id", "i-00000000000000000", set()),
        ]:
            with self.subTest(name=name):
                got = ec2.describe_addresses(Filters=[{"Name": name, "Values": [value]}])["Addresses"]
                self.assertEqual({address["PublicIp"] for address in got}, found)
        for name, value in [("ip-address", a["PublicIp"]), ("dns-name", f"ec2-*.{REGION}.internal"),
                            ("network-interface.association.public-ip", a["PublicIp"]),
                            ("network-interface.association.allocation-id", a["AllocationId"]),
                            ("network-interface.public-dns-name", "ec2-*"),
                            ("network-interface.addresses.association.public-ip", a["PublicIp"])]:
            got = ec2.describe_instances(Filters=[{"Name": name, "Values": [value]}])["Reservations"]
            self.assertEqual([i["InstanceId"] for r in got for i in r["Instances"]], [one], name)
        owner = [{"Name": "addresses.association.owner-id", "Values": [told["NetworkInterfaceOwnerId"]]}]
        self.assertEqual(len(ec2.describe_network_interfaces(Filters=owner)["NetworkInterfaces"]), 1)
        self.assertEqual([x["PublicIp"] for x in ec2.describe_addresses(PublicIps=[b["PublicIp"]])["Addresses"]],
                         [b["PublicIp"]])
        attributes = ec2.describe_addresses_attribute(AllocationIds=[b["AllocationId"]], Attribute="domain-name")
        self.assertEqual(attributes["Addresses"], [{"PublicIp": b["PublicIp"], "AllocationId": b["AllocationId"]}])

    def test_an_address_of_its_own_comes_and_goes_with_a_run(self):
        ec2 = self.ec2
        subnet = ec2.describe_subnets()["Subnets"][0]
        self.assertFalse(subnet["MapPublicIpOnLaunch"], "nobody else could use it")
        card = [{"DeviceIndex": 0, "SubnetId": subnet["SubnetId"], "AssociatePublicIpAddress": True}]
        one = self.running(NetworkInterfaces=card)
        ip = self.instance(one)["PublicIpAddress"]
        self.assertEqual(self.led(one), ip)
        self.assertEqual(self.instance(one)["NetworkInterfaces"][0]["Association"]["IpOwnerId"], "amazon")
        self.assertEqual(ec2.describe_addresses()["Addresses"], [], "it is no elastic one")
        self.fails("InvalidIPAddress.InUse", ec2.allocate_address, Address=ip)
        self.fails("AuthFailure", ec2.release_address, PublicIp=ip)
        # An elastic one takes its place; afterwards there is one again.
        made = ec2.allocate_address()
        ec2.associate_address(AllocationId=made["AllocationId"], InstanceId=one)
        self.assertEqual(self.instance(one)["PublicIpAddress"], made["PublicIp"])
        ec2.disassociate_address(PublicIp=made["PublicIp"])
        after = self.instance(one)["PublicIpAddress"]
        self.assertNotEqual(after, made["PublicIp"])
        self.eventually(lambda: self.led(one) == after)
        ec2.stop_instances(InstanceIds=[one])
        self.wait("instance_stopped", one)
        self.assertNotIn("PublicIpAddress", self.instance(one))
        ec2.allocate_address(Address=after)
        ec2.start_instances(InstanceIds=[one])
        self.wait("instance_running", one)
        self.assertNotIn(self.instance(one)["PublicIpAddress"], (after, made["PublicIp"]))
        # The subnet may say so, and the call may say otherwise.
        ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": True})
        self.addCleanup(ec2.modify_subnet_attribute, SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": False})
        self.assertTrue(ec2.describe_subnets(SubnetIds=[subnet["SubnetId"]])["Subnets"][0]["MapPublicIpOnLaunch"])
        two = self.running(SubnetId=subnet["SubnetId"])
        self.assertIn("PublicIpAddress", self.instance(two))
        three = self.running(NetworkInterfaces=[dict(card[0], AssociatePublicIpAddress=False)])
        self.assertNotIn("PublicIpAddress", self.instance(three))
        self.fails("UnsupportedOperation", ec2.modify_subnet_attribute, SubnetId=subnet["SubnetId"], EnableDns64={"Value": True})

    def test_metadata_by_ipv6_is_an_option(self):
        one = self.running(MetadataOptions={"HttpProtocolIpv6": "enabled"})
        self.assertEqual(self.instance(one)["MetadataOptions"]["HttpProtocolIpv6"], "enabled")
        self.assertTrue(self.on_host(one)["metadata"]["options"]["ipv6"])
        set_to = self.ec2.modify_instance_metadata_options(InstanceId=one, HttpProtocolIpv6="disabled")
        self.assertEqual(set_to["InstanceMetadataOptions"]["HttpProtocolIpv6"], "disabled")
        self.eventually(lambda: not self.on_host(one)["metadata"]["options"]["ipv6"])
        self.fails("InvalidParameterValue", self.ec2.modify_instance_metadata_options, InstanceId=one, HttpProtocolIpv6="on")

    def test_the_aws_cli_and_hutch_ps_know_them(self):
        environment = dict(os.environ, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION=REGION)

        def aws(*arguments):
            done = subprocess.run(["aws", "--endpoint-url", self.daemon.url, "--output", "json", "ec2", *arguments],
                                  env=environment, capture_output=True, text=True, timeout=120)
            self.assertEqual(done.returncode, 0, done.stderr)
            return json.loads(done.stdout or "null")

        one = self.running()
        made = aws("allocate-address", "--domain", "vpc")
        aws("associate-address", "--allocation-id", made["AllocationId"], "--instance-id", one)
        told = aws("describe-addresses", "--filters", f"Name=instance-id,Values={one}")["Addresses"][0]
        self.assertEqual(told["PublicIp"], made["PublicIp"])
        hutch = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")
        ps = subprocess.run([hutch, "ps", "--endpoint", self.daemon.url, "--state", self.daemon.state.name],
                            env=dict(os.environ, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET),
                            capture_output=True, text=True, timeout=60)
        self.assertIn(made["PublicIp"], ps.stdout, ps.stderr)
        aws("disassociate-address", "--association-id", told["AssociationId"])
        aws("release-address", "--allocation-id", made["AllocationId"])


class Lan(Daemon):
    def start(self):
        pathlib.Path(self.state.name, "addresses.toml").write_text('lan = ["192.0.2.8-192.0.2.9"]\n')
        super().start()


class Pool(Case):
    DAEMON = Lan

    def test_addresses_of_the_network_are_given_until_there_are_no_more(self):
        self.assertTrue(all(s["MapPublicIpOnLaunch"] for s in self.ec2.describe_subnets()["Subnets"]))
        one = self.run_one()
        self.wait("instance_running", one)
        path = pathlib.Path(self.daemon.state.name, REGION, "host/machines", one)
        public = json.loads(path.read_text())["machine"]["interfaces"][0]["public"]
        self.assertEqual(public, {"ip": self.instance(one)["PublicIpAddress"], "lan": True})
        made = self.ec2.allocate_address()
        self.assertEqual({made["PublicIp"], public["ip"]}, {"192.0.2.8", "192.0.2.9"})
        self.fails("InsufficientAddressCapacity", self.ec2.allocate_address)
        self.fails("InsufficientAddressCapacity", self.run_one)
        # Fewer than the most that were asked for will do.
        self.ec2.release_address(AllocationId=made["AllocationId"])
        got = self.ec2.run_instances(ImageId=self.image, MinCount=1, MaxCount=3, InstanceType="t3.micro")["Instances"]
        self.assertEqual(len(got), 1)
        self.ec2.terminate_instances(InstanceIds=[one])
        self.wait("instance_terminated", one)
        self.assertEqual(self.ec2.allocate_address()["PublicIp"], public["ip"])

    def test_a_pool_that_cannot_be_is_refused_at_the_start(self):
        daemon = Daemon()
        daemon.kill()
        path = pathlib.Path(daemon.state.name, "addresses.toml")
        path.write_text('lan = ["172.31.0.0/24"]')
        ran = subprocess.run(daemon.command, capture_output=True, text=True, timeout=60)
        self.assertNotEqual(ran.returncode, 0)
        self.assertIn(str(path), ran.stderr)
        self.assertIn("172.31.0.0/16", ran.stderr)
        daemon.state.cleanup()
