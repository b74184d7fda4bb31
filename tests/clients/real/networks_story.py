"""Who reaches whom, in real guests."""


import botocore.exceptions

from cloud import ENOUGH, host, OTHER, REGION, say, Story


class Networks(Story):
    def test_regions_and_networks_of_ones_own_are_apart(self):
        here, there = self.ec2, self.cloud.client(OTHER)
        self.addCleanup(there.close)
        web = [{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]
        groups = {}

        def image(ec2):
            return ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def group(ec2, vpc):
            if vpc in groups:
                return groups[vpc]
            made = groups[vpc] = ec2.create_security_group(GroupName="apart", Description="port 80", VpcId=vpc)["GroupId"]
            ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=web)
            return made

        def run(ec2, vpc, **more):
            interface = {"DeviceIndex": 0, "Groups": [group(ec2, vpc)], **more}
            made = ec2.run_instances(ImageId=image(ec2), MinCount=1, MaxCount=1, InstanceType="t3.nano", NetworkInterfaces=[interface],
                                     MetadataOptions={"InstanceMetadataTags": "enabled"})["Instances"][0]
            return made["InstanceId"], made["PrivateIpAddress"]

        def state(ec2, instance):
            return ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]["State"]["Name"]

        default = lambda ec2: ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
        # A network of one's own, without a way to the world, whose other instance is in the same.
        vpc = here.create_vpc(CidrBlock="10.77.0.0/16")["Vpc"]["VpcId"]
        subnet = here.create_subnet(VpcId=vpc, CidrBlock="10.77.3.0/24")["Subnet"]["SubnetId"]
        first, friend = (here, *run(here, default(here))), (here, *run(here, default(here)))
        second, own = (there, *run(there, default(there))), (here, *run(here, vpc, SubnetId=subnet, PrivateIpAddress="10.77.3.9"))
        everyone = (first, friend, second, own)
        self.assertEqual(own[2], "10.77.3.9")
        self.assertEqual(len({ip for _, _, ip in everyone}), 4)

        def console(ec2, instance):
            return ec2.get_console_output(InstanceId=instance, Latest=True).get("Output", "")

        for ec2, instance, ip in everyone:
            self.eventually(lambda: f"I am {instance} at {ip}" in console(ec2, instance), f"{instance} runs")
            self.eventually(lambda: f"hello from {instance}" in self.web(ip), f"the host reaches {instance} at {ip}")
            say(f"{instance} at {ip}")

        # The groups of all let everybody in; only who is in the same network comes so far.
        for ec2, instance, _ in everyone:
            ec2.create_tags(Resources=[instance], Tags=[{"Key": "reach", "Value": " ".join(ip for _, _, ip in everyone)}])
        self.eventually(lambda: f"hello from {friend[1]}" in console(*first[:2]), "the first reaches its friend")
        for ec2, instance, _ in everyone:
            for _, other, theirs in everyone:
                if other == instance or {other, instance} == {first[1], friend[1]}:
                    continue
                self.eventually(lambda: console(ec2, instance).count(f"{theirs} says:") >= 2, f"{instance} has tried {theirs}")
                self.assertNotIn(f"hello from {other}", console(ec2, instance))
        say("only friends reach each other")

        # An image is copied from one region to the other, and launched there.
        made = here.create_image(InstanceId=first[1], Name="far", NoReboot=True)["ImageId"]
        here.get_waiter("image_available").wait(ImageIds=[made], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        copy = there.copy_image(SourceRegion=REGION, SourceImageId=made, Name="far")["ImageId"]
        there.get_waiter("image_available").wait(ImageIds=[copy], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        here.terminate_instances(InstanceIds=[first[1], friend[1], own[1]])
        third = there.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        self.eventually(lambda: "boots: 2 disks: 1 READY" in console(there, third), "the copy boots")
        say("an image of the one region runs in the other")
        there.terminate_instances(InstanceIds=[second[1], third])
        for ec2, instance in ((here, first[1]), (here, friend[1]), (here, own[1]), (there, second[1]), (there, third)):
            self.eventually(lambda: state(ec2, instance) == "terminated", f"{instance} terminated")
        for ec2, id in ((here, made), (there, copy)):
            disks = ec2.describe_images(ImageIds=[id])["Images"][0]["BlockDeviceMappings"]
            ec2.deregister_image(ImageId=id)
            for disk in disks:
                ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        left = lambda: host("bash", "-c", f"cd {self.cloud.state}; ls {REGION}/host/layers {OTHER}/host/layers").split()
        self.eventually(lambda: left() == [f"{REGION}/host/layers:", f"{OTHER}/host/layers:"], "all of it is given back")

    def test_a_network_of_ones_own_changes_under_its_guests(self):
        here, there = self.ec2, self.cloud.client(OTHER)
        self.addCleanup(there.close)

        def run(ec2, subnet, **more):
            image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
            cards = [{"DeviceIndex": n, "SubnetId": subnet, **more} for n in range(2)]
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", NetworkInterfaces=cards)
            return made["Instances"][0]

        vpc = here.create_vpc(CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
        subnet = here.create_subnet(VpcId=vpc, CidrBlock="10.20.1.0/24")["Subnet"]["SubnetId"]
        group = here.create_security_group(GroupName="own-web", Description="port 80", VpcId=vpc)["GroupId"]
        here.authorize_security_group_ingress(GroupId=group, IpProtocol="tcp", FromPort=80, ToPort=80, CidrIp="0.0.0.0/0")
        made = run(here, subnet, Groups=[group])
        one, ip = made["InstanceId"], made["PrivateIpAddress"]
        self.becomes(one, "running")
        self.prints(one, f"I am {one} at {ip}")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "the host reaches it")

        # Its routes are its subnet's, and change while it runs.
        second = self.instance(one)["NetworkInterfaces"][1]["PrivateIpAddress"]
        taps = ["hu" + "".join(f"{int(byte):02x}" for byte in at.split(".")) for at in (ip, second)]
        routes = lambda: host("/usr/sbin/nft", "list", "set", "inet", "hutch", "routes")
        out = lambda: all(f'"{tap}" . 0.0.0.0/0' in routes() for tap in taps)
        self.assertNotIn("0.0.0.0/0", routes())
        igw = here.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        here.attach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
        table = here.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"][0]["RouteTableId"]
        here.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=igw)
        self.eventually(out, "both interfaces have a way out")
        # One more address, which is its own from then on.
        card = self.instance(one)["NetworkInterfaces"][0]["NetworkInterfaceId"]
        here.assign_private_ip_addresses(NetworkInterfaceId=card, PrivateIpAddresses=["10.20.1.77"])
        self.eventually(lambda: f"10.20.1.77 dev {taps[0]}" in host("ip", "route"), "it is routed")
        # Whose addresses are in use here cannot run beside it, and changes nothing.
        clash = there.create_vpc(CidrBlock="10.20.0.0/20")["Vpc"]["VpcId"]
        within = there.create_subnet(VpcId=clash, CidrBlock="10.20.1.0/24")["Subnet"]["SubnetId"]
        with self.assertRaises(botocore.exceptions.ClientError) as refused:
            run(there, within)
        self.assertEqual(refused.exception.response["Error"]["Code"], "Unsupported")
        self.assertIn(vpc, str(refused.exception))
        self.assertEqual(there.describe_network_interfaces()["NetworkInterfaces"], [])

        # The daemon is killed, and all of it is as it was.
        machines = self.cloud.machines()
        self.cloud.end("KILL")
        self.cloud.start()
        self.assertEqual(self.cloud.machines(), machines)
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "the host reaches it as before")
        self.assertTrue(out())
        here.unassign_private_ip_addresses(NetworkInterfaceId=card, PrivateIpAddresses=["10.20.1.77"])
        self.eventually(lambda: "10.20.1.77" not in host("ip", "route"), "it is routed no more")
        here.delete_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
        self.eventually(lambda: "0.0.0.0/0" not in routes(), "there is no way out")
        here.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(host("bash", "-c", "nft list tables | grep hutch; ls /sys/class/net | grep ^hu", check=False), "")
