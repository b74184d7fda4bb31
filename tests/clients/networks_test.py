"""boto3: networks of one's own, from CreateVpc to DeleteVpc, with the errors that clients branch on."""

from daemon import Case


class Networks(Case):
    def ids(self, call, things, name, **filters):
        asked = [{"Name": key.replace("_", "-"), "Values": [value]} for key, value in filters.items()]
        return [thing[name] for thing in call(Filters=asked)[things]]

    def test_a_network_with_all_that_belongs_to_it(self):
        ec2 = self.ec2
        tags = [{"ResourceType": "vpc", "Tags": [{"Key": "Name", "Value": "own"}]}]
        made = ec2.create_vpc(CidrBlock="10.1.2.3/16", TagSpecifications=tags)["Vpc"]
        vpc = made["VpcId"]
        self.assertEqual((made["CidrBlock"], made["IsDefault"], made["Tags"]), ("10.1.0.0/16", False, tags[0]["Tags"]))
        told = ec2.describe_vpcs(Filters=[{"Name": "cidr", "Values": ["10.1.*"]}, {"Name": "is-default", "Values": ["false"]}])
        self.assertEqual([v["VpcId"] for v in told["Vpcs"]], [vpc])
        for name, value in [("enableDnsSupport", True), ("enableDnsHostnames", False)]:
            told = ec2.describe_vpc_attribute(VpcId=vpc, Attribute=name)
            self.assertEqual(told[name[0].upper() + name[1:]]["Value"], value)
        ec2.modify_vpc_attribute(VpcId=vpc, EnableDnsHostnames={"Value": True})
        told = ec2.describe_vpc_attribute(VpcId=vpc, Attribute="enableDnsHostnames")
        self.assertTrue(told["EnableDnsHostnames"]["Value"])
        group = self.ids(ec2.describe_security_groups, "SecurityGroups", "GroupId", vpc_id=vpc, group_name="default")
        acl = self.ids(ec2.describe_network_acls, "NetworkAcls", "NetworkAclId", vpc_id=vpc, default="true")
        main = self.ids(ec2.describe_route_tables, "RouteTables", "RouteTableId", vpc_id=vpc, **{"association.main": "true"})
        self.assertEqual([len(found) for found in (group, acl, main)], [1, 1, 1])

        a = ec2.create_subnet(VpcId=vpc, CidrBlock="10.1.0.0/24", AvailabilityZone="home-1b")["Subnet"]
        self.assertEqual((a["AvailabilityZone"], a["AvailableIpAddressCount"], a["MapPublicIpOnLaunch"]), ("home-1b", 251, False))
        b = ec2.create_subnet(VpcId=vpc, CidrBlock="10.1.1.0/28", AvailabilityZoneId="home-1-az1")["Subnet"]
        self.assertEqual(b["AvailabilityZone"], "home-1a")
        ec2.modify_subnet_attribute(SubnetId=a["SubnetId"], MapPublicIpOnLaunch={"Value": True})
        public = self.ids(ec2.describe_subnets, "Subnets", "SubnetId", vpc_id=vpc, map_public_ip_on_launch="true")
        self.assertEqual(public, [a["SubnetId"]])

        igw = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        other = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        everywhere = dict(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
        self.fails("InvalidParameterValue", ec2.create_route, **everywhere, GatewayId=igw)
        ec2.attach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
        self.assertEqual(ec2.create_route(**everywhere, GatewayId=igw)["Return"], True)
        association = ec2.associate_route_table(RouteTableId=table, SubnetId=a["SubnetId"])["AssociationId"]
        # Whoever has no table of its own has the main one, which may be another.
        mine = [x["RouteTableAssociationId"] for x in
                ec2.describe_route_tables(RouteTableIds=main)["RouteTables"][0]["Associations"] if x["Main"]]
        new = ec2.replace_route_table_association(AssociationId=mine[0], RouteTableId=table)["NewAssociationId"]
        self.assertEqual(self.ids(ec2.describe_route_tables, "RouteTables", "RouteTableId", **{"association.main": "true"},
                                  vpc_id=vpc), [table])
        ec2.delete_route_table(RouteTableId=main[0])

        instance = self.run_one(SubnetId=b["SubnetId"])
        self.wait("instance_running", instance)
        self.assertTrue(self.instance(instance)["PrivateIpAddress"].startswith("10.1.1."))
        eni = ec2.create_network_interface(SubnetId=a["SubnetId"], Description="spare", PrivateIpAddress="10.1.0.77")["NetworkInterface"]
        eni, status = eni["NetworkInterfaceId"], eni["Status"]
        self.assertEqual((status, self.ids(ec2.describe_network_interfaces, "NetworkInterfaces", "NetworkInterfaceId",
                                           status="available")), ("available", [eni]))
        ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, Description={"Value": "changed"})
        told = ec2.describe_network_interface_attribute(NetworkInterfaceId=eni, Attribute="description")
        self.assertEqual(told["Description"]["Value"], "changed")
        first = self.instance(instance)["NetworkInterfaces"][0]

        none = "0123456789abcdef0"
        for code, call, more in [
            ("InvalidVpc.Range", ec2.create_vpc, dict(CidrBlock="10.0.0.0/8")),
            ("InvalidVpc.Range", ec2.create_vpc, dict(CidrBlock="10.0.0.0/29")),
            ("InvalidParameterValue", ec2.create_vpc, dict(CidrBlock="10.0.0.0")),
            ("UnsupportedOperation", ec2.create_vpc, dict(CidrBlock="10.0.0.0/16", AmazonProvidedIpv6CidrBlock=True)),
            ("UnsupportedTenancy", ec2.create_vpc, dict(CidrBlock="10.0.0.0/16", InstanceTenancy="dedicated")),
            ("InvalidVpcID.NotFound", ec2.delete_vpc, dict(VpcId=f"vpc-{none}")),
            ("InvalidVpcID.Malformed", ec2.delete_vpc, dict(VpcId="vpc")),
            ("DependencyViolation", ec2.delete_vpc, dict(VpcId=vpc)),
            ("InvalidParameterCombination", ec2.modify_vpc_attribute, dict(VpcId=vpc)),
            ("InvalidSubnet.Conflict", ec2.create_subnet, dict(VpcId=vpc, CidrBlock="10.1.0.128/25")),
            ("InvalidSubnet.Range", ec2.create_subnet, dict(VpcId=vpc, CidrBlock="10.2.0.0/24")),
            ("InvalidSubnet.Range", ec2.create_subnet, dict(VpcId=vpc, CidrBlock="10.1.9.0/29")),
            ("InvalidParameterValue", ec2.create_subnet, dict(VpcId=vpc, CidrBlock="10.1.9.0/24", AvailabilityZone="home-1z")),
            ("InvalidVpcID.NotFound", ec2.create_subnet, dict(VpcId=f"vpc-{none}", CidrBlock="10.1.9.0/24")),
            ("DependencyViolation", ec2.delete_subnet, dict(SubnetId=a["SubnetId"])),
            ("InvalidSubnetID.NotFound", ec2.delete_subnet, dict(SubnetId=f"subnet-{none}")),
            ("DependencyViolation", ec2.delete_internet_gateway, dict(InternetGatewayId=igw)),
            ("InvalidInternetGatewayID.NotFound", ec2.delete_internet_gateway, dict(InternetGatewayId=f"igw-{none}")),
            ("Resource.AlreadyAssociated", ec2.attach_internet_gateway, dict(InternetGatewayId=igw, VpcId=vpc)),
            ("InvalidParameterValue", ec2.attach_internet_gateway, dict(InternetGatewayId=other, VpcId=vpc)),
            ("Gateway.NotAttached", ec2.detach_internet_gateway, dict(InternetGatewayId=other, VpcId=vpc)),
            ("DependencyViolation", ec2.delete_route_table, dict(RouteTableId=table)),
            ("InvalidRouteTableID.NotFound", ec2.delete_route_table, dict(RouteTableId=main[0])),
            ("Resource.AlreadyAssociated", ec2.associate_route_table, dict(RouteTableId=table, SubnetId=a["SubnetId"])),
            ("InvalidAssociationID.NotFound", ec2.disassociate_route_table, dict(AssociationId=f"rtbassoc-{none}")),
            ("InvalidParameterValue", ec2.disassociate_route_table, dict(AssociationId=new)),
            ("RouteAlreadyExists", ec2.create_route, dict(everywhere, NetworkInterfaceId=eni)),
            ("InvalidGatewayID.NotFound", ec2.create_route, dict(everywhere, GatewayId=f"igw-{none}")),
            ("InvalidParameterValue", ec2.create_route, dict(everywhere, GatewayId=igw, DestinationCidrBlock="10.1.0.0/16")),
            ("MissingParameter", ec2.create_route, everywhere),
            ("UnsupportedOperation", ec2.create_route, dict(everywhere, NatGatewayId=f"nat-{none}")),
            ("InvalidParameterValue", ec2.replace_route, dict(everywhere, GatewayId=igw, DestinationCidrBlock="10.9.0.0/16")),
            ("InvalidRoute.NotFound", ec2.delete_route, dict(everywhere, DestinationCidrBlock="10.9.0.0/16")),
            ("InvalidParameterValue", ec2.delete_route, dict(everywhere, DestinationCidrBlock="10.1.0.0/16")),
            ("InvalidIPAddress.InUse", ec2.create_network_interface, dict(SubnetId=a["SubnetId"], PrivateIpAddress="10.1.0.77")),
            ("InvalidParameterValue", ec2.create_network_interface, dict(SubnetId=a["SubnetId"], PrivateIpAddress="10.1.1.7")),
            ("InvalidParameterValue", ec2.delete_network_interface, dict(NetworkInterfaceId=first["NetworkInterfaceId"])),
            ("OperationNotPermitted", ec2.detach_network_interface, dict(AttachmentId=first["Attachment"]["AttachmentId"])),
            ("InvalidAttachmentID.NotFound", ec2.detach_network_interface, dict(AttachmentId=f"eni-attach-{none}")),
            ("InvalidNetworkInterface.InUse", ec2.attach_network_interface,
             dict(NetworkInterfaceId=first["NetworkInterfaceId"], InstanceId=instance, DeviceIndex=1)),
            ("UnsupportedOperation", ec2.attach_network_interface,
             dict(NetworkInterfaceId=eni, InstanceId=instance, DeviceIndex=1)),
            ("InvalidNetworkInterface.InUse", ec2.run_instances,
             dict(ImageId=self.image, MinCount=1, MaxCount=1,
                  NetworkInterfaces=[{"DeviceIndex": 0, "NetworkInterfaceId": first["NetworkInterfaceId"]}])),
        ]:
            with self.subTest(code=code, call=call.__name__):
                self.fails(code, call, **more)

        # Stopped, it may have another; of the same zone.
        ec2.stop_instances(InstanceIds=[instance])
        self.wait("instance_stopped", instance)
        wrong = dict(InstanceId=instance, DeviceIndex=1)
        self.fails("InvalidParameterCombination", ec2.attach_network_interface, NetworkInterfaceId=eni, **wrong)
        near = ec2.create_network_interface(SubnetId=b["SubnetId"])["NetworkInterface"]["NetworkInterfaceId"]
        attachment = ec2.attach_network_interface(NetworkInterfaceId=near, **wrong)["AttachmentId"]
        told = ec2.describe_network_interfaces(NetworkInterfaceIds=[near])["NetworkInterfaces"][0]
        self.assertEqual((told["Status"], told["Attachment"]["DeviceIndex"], told["Attachment"]["DeleteOnTermination"]),
                         ("in-use", 1, False))
        ec2.detach_network_interface(AttachmentId=attachment)
        # A route to an interface of no instance, or to a gateway of no network, leads nowhere.
        ec2.replace_route(**everywhere, NetworkInterfaceId=near)
        ec2.create_route(RouteTableId=table, DestinationCidrBlock="192.168.1.1/16", GatewayId=igw)
        ec2.detach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
        routes = ec2.describe_route_tables(RouteTableIds=[table])["RouteTables"][0]["Routes"]
        self.assertEqual([(r["DestinationCidrBlock"], r["State"]) for r in routes],
                         [("10.1.0.0/16", "active"), ("0.0.0.0/0", "blackhole"), ("192.168.0.0/16", "blackhole")])

        ec2.terminate_instances(InstanceIds=[instance])
        self.wait("instance_terminated", instance)
        ec2.disassociate_route_table(AssociationId=association)
        for call, name, ids in [(ec2.delete_network_interface, "NetworkInterfaceId", [eni, near]),
                                (ec2.delete_subnet, "SubnetId", [a["SubnetId"], b["SubnetId"]]),
                                (ec2.delete_internet_gateway, "InternetGatewayId", [igw, other]),
                                (ec2.delete_vpc, "VpcId", [vpc])]:
            for one in ids:
                call(**{name: one})
        self.assertEqual(self.ids(ec2.describe_security_groups, "SecurityGroups", "GroupId", vpc_id=vpc), [])
        self.assertEqual(self.ids(ec2.describe_route_tables, "RouteTables", "RouteTableId", vpc_id=vpc), [])

    def test_the_default_network_may_go_and_come_again(self):
        ec2 = self.ec2
        self.fails("DefaultVpcAlreadyExists", ec2.create_default_vpc)
        self.fails("DefaultSubnetAlreadyExistsInAvailabilityZone", ec2.create_default_subnet, AvailabilityZone="home-1a")
        default = dict(is_default="true")
        vpc = self.ids(ec2.describe_vpcs, "Vpcs", "VpcId", **default)[0]
        subnets = self.ids(ec2.describe_subnets, "Subnets", "SubnetId", vpc_id=vpc)
        ec2.delete_subnet(SubnetId=subnets[0])
        zone = ({"home-1a", "home-1b"} - {s["AvailabilityZone"] for s in ec2.describe_subnets()["Subnets"]}).pop()
        self.fails("MissingInput", ec2.run_instances, ImageId=self.image, MinCount=1, MaxCount=1, Placement={"AvailabilityZone": zone})
        again = ec2.create_default_subnet(AvailabilityZone=zone)["Subnet"]
        self.assertEqual((again["DefaultForAz"], again["VpcId"], again["CidrBlock"][-3:]), (True, vpc, "/20"))
        for subnet in self.ids(ec2.describe_subnets, "Subnets", "SubnetId", vpc_id=vpc):
            ec2.delete_subnet(SubnetId=subnet)
        igw = self.ids(ec2.describe_internet_gateways, "InternetGateways", "InternetGatewayId", **{"attachment.vpc-id": vpc})[0]
        self.fails("DependencyViolation", ec2.delete_vpc, VpcId=vpc)
        ec2.detach_internet_gateway(InternetGatewayId=igw, VpcId=vpc)
        ec2.delete_internet_gateway(InternetGatewayId=igw)
        ec2.delete_vpc(VpcId=vpc)
        self.assertEqual(self.ids(ec2.describe_vpcs, "Vpcs", "VpcId", **default), [])
        run = dict(ImageId=self.image, MinCount=1, MaxCount=1)
        self.fails("VPCIdNotSpecified", ec2.run_instances, **run)
        self.fails("VPCIdNotSpecified", ec2.create_security_group, GroupName="lost", Description="no network")
        self.fails("DefaultVpcDoesNotExist", ec2.create_default_subnet, AvailabilityZone="home-1a")
        new = ec2.create_default_vpc()["Vpc"]
        self.assertTrue(new["IsDefault"])
        self.assertEqual(len(self.ids(ec2.describe_subnets, "Subnets", "SubnetId", vpc_id=new["VpcId"], default_for_az="true")), 2)
        instance = ec2.run_instances(**run)["Instances"][0]["InstanceId"]
        self.wait("instance_running", instance)
        ec2.terminate_instances(InstanceIds=[instance])

    def test_interfaces_and_addresses_beside_the_first(self):
        ec2 = self.ec2
        vpc = ec2.create_vpc(CidrBlock="10.5.0.0/16")["Vpc"]["VpcId"]
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.5.1.0/24")["Subnet"]["SubnetId"]
        cards = [
            {"DeviceIndex": 0, "SubnetId": subnet, "PrivateIpAddresses": [
                {"Primary": False, "PrivateIpAddress": "10.5.1.21"}, {"Primary": True, "PrivateIpAddress": "10.5.1.20"}]},
            {"DeviceIndex": 1, "SubnetId": subnet, "SecondaryPrivateIpAddressCount": 2, "Description": "second",
             "DeleteOnTermination": True},
        ]
        instance = self.run_one(NetworkInterfaces=cards)
        self.wait("instance_running", instance)
        first, second = sorted(self.instance(instance)["NetworkInterfaces"], key=lambda e: e["Attachment"]["DeviceIndex"])
        ips = lambda e: [(ip["PrivateIpAddress"], ip["Primary"]) for ip in e["PrivateIpAddresses"]]
        self.assertEqual(ips(first), [("10.5.1.20", True), ("10.5.1.21", False)])
        self.assertEqual((len(ips(second)), second["Description"], second["Attachment"]["DeviceIndex"]), (3, "second", 1))
        self.assertEqual(self.instance(instance)["PrivateIpAddress"], "10.5.1.20")

        a, b = first["NetworkInterfaceId"], second["NetworkInterfaceId"]
        told = ec2.assign_private_ip_addresses(NetworkInterfaceId=a, PrivateIpAddresses=["10.5.1.30"])
        self.assertEqual((told["NetworkInterfaceId"], told["AssignedPrivateIpAddresses"]),
                         (a, [{"PrivateIpAddress": "10.5.1.30"}]))
        told = ec2.assign_private_ip_addresses(NetworkInterfaceId=a, SecondaryPrivateIpAddressCount=2)
        self.assertEqual(len(told["AssignedPrivateIpAddresses"]), 2)
        found = ec2.describe_network_interfaces(Filters=[{"Name": "addresses.private-ip-address", "Values": ["10.5.1.30"]}])
        self.assertEqual([e["NetworkInterfaceId"] for e in found["NetworkInterfaces"]], [a])
        both = dict(PrivateIpAddresses=["10.5.1.30"], SecondaryPrivateIpAddressCount=1)
        for code, call, more in [
            ("InvalidParameterValue", ec2.assign_private_ip_addresses, dict(PrivateIpAddresses=["10.5.1.30"])),
            ("InvalidParameterValue", ec2.assign_private_ip_addresses, dict(PrivateIpAddresses=["10.5.2.30"])),
            ("InvalidParameterValue", ec2.assign_private_ip_addresses, dict(PrivateIpAddresses=["ten"])),
            ("InvalidParameterCombination", ec2.assign_private_ip_addresses, both),
            ("MissingParameter", ec2.assign_private_ip_addresses, {}),
            ("InvalidParameterValue", ec2.assign_private_ip_addresses, dict(SecondaryPrivateIpAddressCount=0)),
            ("PrivateIpAddressLimitExceeded", ec2.assign_private_ip_addresses, dict(SecondaryPrivateIpAddressCount=30)),
            ("UnsupportedOperation", ec2.assign_private_ip_addresses, dict(Ipv4PrefixCount=1)),
            ("InvalidParameterValue", ec2.unassign_private_ip_addresses, dict(PrivateIpAddresses=["10.5.1.30"])),
            ("MissingParameter", ec2.unassign_private_ip_addresses, {}),
        ]:
            self.fails(code, call, NetworkInterfaceId=b, **more)
        ec2.assign_private_ip_addresses(NetworkInterfaceId=b, PrivateIpAddresses=["10.5.1.30"], AllowReassignment=True)
        self.fails("InvalidParameterValue", ec2.unassign_private_ip_addresses, NetworkInterfaceId=a, PrivateIpAddresses=["10.5.1.30"])
        ec2.unassign_private_ip_addresses(NetworkInterfaceId=b, PrivateIpAddresses=["10.5.1.30"])

        spare = dict(SubnetId=subnet, PrivateIpAddress="10.5.1.40", PrivateIpAddresses=[{"PrivateIpAddress": "10.5.1.41"}])
        made = ec2.create_network_interface(**spare)["NetworkInterface"]
        self.assertEqual(ips(made), [("10.5.1.40", True), ("10.5.1.41", False)])
        ip = ec2.allocate_address()["AllocationId"]
        self.fails("UnsupportedOperation", ec2.associate_address, AllocationId=ip, NetworkInterfaceId=a, PrivateIpAddress="10.5.1.21")
        self.fails("InvalidParameterCombination", self.run_one, NetworkInterfaces=[cards[0], dict(cards[1], DeviceIndex=0)])
        with_public = dict(cards[1], AssociatePublicIpAddress=True)
        self.fails("InvalidParameterCombination", self.run_one, NetworkInterfaces=[cards[0], with_public])
        ec2.release_address(AllocationId=ip)
        ec2.terminate_instances(InstanceIds=[instance])
        self.wait("instance_terminated", instance)
        ec2.delete_network_interface(NetworkInterfaceId=made["NetworkInterfaceId"])
        ec2.delete_subnet(SubnetId=subnet)
        ec2.delete_vpc(VpcId=vpc)
