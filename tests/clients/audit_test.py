"""Every operation that real clients call is served, or in the short list of what is to come."""

import botocore.exceptions

from daemon import Case

MUST = """
RunInstances DescribeInstances StartInstances StopInstances RebootInstances TerminateInstances ModifyInstanceAttribute
DescribeInstanceAttribute
DescribeImages CreateImage RegisterImage DeregisterImage CopyImage DescribeImageAttribute ModifyImageAttribute ResetImageAttribute
CreateVolume DeleteVolume DescribeVolumes AttachVolume DetachVolume ModifyVolume DescribeVolumesModifications
CreateSnapshot CreateSnapshots DeleteSnapshot DescribeSnapshots CopySnapshot DescribeSnapshotAttribute ModifySnapshotAttribute
ResetSnapshotAttribute
CreateSecurityGroup DeleteSecurityGroup DescribeSecurityGroups AuthorizeSecurityGroupIngress AuthorizeSecurityGroupEgress
RevokeSecurityGroupIngress RevokeSecurityGroupEgress DescribeSecurityGroupRules ModifySecurityGroupRules
UpdateSecurityGroupRuleDescriptionsIngress UpdateSecurityGroupRuleDescriptionsEgress
CreateKeyPair ImportKeyPair DescribeKeyPairs DeleteKeyPair
AllocateAddress ReleaseAddress DescribeAddresses AssociateAddress DisassociateAddress
CreateTags DeleteTags DescribeTags
DescribeRegions DescribeAvailabilityZones
DescribeInstanceTypes DescribeInstanceTypeOfferings
RequestSpotInstances DescribeSpotInstanceRequests CancelSpotInstanceRequests DescribeSpotPriceHistory
DescribeReservedInstancesOfferings PurchaseReservedInstancesOffering DescribeReservedInstances
""".split()
SEEN = """
DescribeInstanceStatus DescribeAccountAttributes DescribeVpcs DescribeVpcAttribute DescribeSubnets DescribeNetworkInterfaces
DescribeAddressesAttribute DescribeInstanceCreditSpecifications DescribeIamInstanceProfileAssociations DescribeVolumeStatus
DescribeVolumeAttribute DescribeRouteTables DescribeInternetGateways DescribeNetworkAcls DescribeDhcpOptions
""".split()
CONSOLE = """
GetConsoleOutput GetConsoleScreenshot GetPasswordData GetInstanceUefiData ModifyInstanceMetadataOptions
GetInstanceMetadataDefaults ModifyInstanceMetadataDefaults MonitorInstances UnmonitorInstances
""".split()
TEMPLATES = """
CreateLaunchTemplate CreateLaunchTemplateVersion DeleteLaunchTemplate DeleteLaunchTemplateVersions DescribeLaunchTemplates
DescribeLaunchTemplateVersions ModifyLaunchTemplate GetLaunchTemplateData
""".split()
IMAGES = """
EnableImageDeprecation DisableImageDeprecation EnableImage DisableImage EnableImageBlockPublicAccess
DisableImageBlockPublicAccess GetImageBlockPublicAccessState ListImagesInRecycleBin GetEbsEncryptionByDefault
""".split()
IMPORTS = "ImportImage DescribeImportImageTasks ImportSnapshot DescribeImportSnapshotTasks CancelImportTask".split()
BUCKETS = "CreateStoreImageTask DescribeStoreImageTasks CreateRestoreImageTask BundleInstance DescribeBundleTasks CancelBundleTask".split()
NETWORKS = """
CreateVpc DeleteVpc CreateSubnet DeleteSubnet CreateNetworkInterface DeleteNetworkInterface AttachNetworkInterface
DetachNetworkInterface AssignPrivateIpAddresses UnassignPrivateIpAddresses
""".split()
LISTS = {"networks": (NETWORKS, 10), "must": (MUST, 65), "seen in traces": (SEEN, 15), "console": (CONSOLE, 9), "launch templates": (TEMPLATES, 8), "images": (IMAGES, 9), "imports": (IMPORTS, 5), "buckets": (BUCKETS, 6)}

# What hutch does not have yet. Whoever builds one takes it off this list: the test says so.
TO_COME = {
    "RequestSpotInstances", "CancelSpotInstanceRequests",
    "PurchaseReservedInstancesOffering",
}

# What is asked with: ids that nothing has, so that nothing is changed and the error says who answered.
HEX = "0123456789abcdef0"
VALUES = {
    "CidrBlock": "10.0.0.0/30", "SubnetId": f"subnet-{HEX}", "NetworkInterfaceId": f"eni-{HEX}", "AttachmentId": f"eni-attach-{HEX}",
    "DeviceIndex": 1,
    "InstanceId": f"i-{HEX}", "ImageId": f"ami-{HEX}", "VolumeId": f"vol-{HEX}", "SnapshotId": f"snap-{HEX}", "GroupId": f"sg-{HEX}",
    "VpcId": f"vpc-{HEX}", "InstanceIds": [f"i-{HEX}"], "Resources": [f"i-{HEX}"], "SpotInstanceRequestIds": [f"sir-{HEX}"],
    "MinCount": 1, "MaxCount": 1, "InstanceCount": 1, "Attribute": None, "Name": "audit", "Device": "/dev/sdf",
    "SourceImageId": f"ami-{HEX}", "SourceSnapshotId": f"snap-{HEX}", "SourceRegion": "home-1", "KeyName": "audit",
    "PublicKeyMaterial": b"none", "Description": "audit", "GroupName": "audit", "AvailabilityZone": "home-1z", "Tags": [{"Key": "a", "Value": "b"}],
    "SecurityGroupRules": [{"SecurityGroupRuleId": f"sgr-{HEX}", "SecurityGroupRule": {"IpProtocol": "-1", "CidrIpv4": "10.0.0.0/8"}}], "ReservedInstancesOfferingId": "4b2293b4-1111-2222-3333-444444444444",
    "InstanceSpecification": {"InstanceId": f"i-{HEX}"}, "LaunchTemplateName": "audit", "LaunchTemplateData": {"InstanceType": "t3.none"},
    "Bucket": "audit", "ObjectKey": "none", "BundleId": f"bun-{HEX}", "Storage": {"S3": {"Bucket": "audit", "Prefix": "audit"}},
    "Versions": ["1"], "DeprecateAt": "2001-01-01T00:00:00Z", "ImageBlockPublicAccessState": "block-new-sharing",
}
ATTRIBUTES = {"DescribeVpcAttribute": "enableDnsSupport", "DescribeVolumeAttribute": "autoEnableIO", "DescribeInstanceAttribute": "userData",
              "DescribeImageAttribute": "description", "ResetImageAttribute": "launchPermission"}
# What has to be said beside what the model requires.
MORE = {
    "CreateSubnet": {"CidrBlock": "10.0.0.0/30"},
    "AssignPrivateIpAddresses": {"SecondaryPrivateIpAddressCount": 1},
    "UnassignPrivateIpAddresses": {"PrivateIpAddresses": ["10.0.0.9"]}, "CreateVpc": {"CidrBlock": "10.0.0.0/30"},
    "ImportSnapshot": {"DiskContainer": {"Url": "file:///none"}}, "ImportImage": {"DiskContainers": [{"SnapshotId": f"snap-{HEX}"}]},
    "CancelImportTask": {"ImportTaskId": f"import-snap-{HEX}"},
    "RunInstances": {"ImageId": f"ami-{HEX}"}, "CreateVolume": {"Size": 1}, "DetachVolume": {"InstanceId": f"i-{HEX}"},
    "DeleteSecurityGroup": {"GroupId": f"sg-{HEX}"}, "RegisterImage": {"RootDeviceName": "/dev/xvda"},
    "AuthorizeSecurityGroupIngress": {"GroupId": f"sg-{HEX}", "CidrIp": "10.0.0.0/8", "IpProtocol": "tcp", "FromPort": 1, "ToPort": 1},
    "AuthorizeSecurityGroupEgress": {"IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]},
    "RevokeSecurityGroupIngress": {"GroupId": f"sg-{HEX}", "CidrIp": "10.0.0.0/8", "IpProtocol": "tcp", "FromPort": 1, "ToPort": 1},
    "RevokeSecurityGroupEgress": {"IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]},
    "UpdateSecurityGroupRuleDescriptionsIngress": {"GroupId": f"sg-{HEX}", "IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]},
    "UpdateSecurityGroupRuleDescriptionsEgress": {"GroupId": f"sg-{HEX}", "IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}]},
    "DeleteLaunchTemplate": {"LaunchTemplateName": "none"}, "CreateLaunchTemplateVersion": {"LaunchTemplateName": "none"},
    "DeleteLaunchTemplateVersions": {"LaunchTemplateName": "none"}, "ModifyLaunchTemplate": {"LaunchTemplateName": "none", "DefaultVersion": "1"},
    "DescribeLaunchTemplateVersions": {"LaunchTemplateName": "none"}, "DeleteKeyPair": {"KeyName": "none"},
    "ModifyInstanceAttribute": {"EbsOptimized": {"Value": True}}, "ModifyImageAttribute": {"Description": {"Value": "a"}},
    "ModifySnapshotAttribute": {"Attribute": "createVolumePermission", "OperationType": "add", "GroupNames": ["all"]},
    "ReleaseAddress": {"AllocationId": f"eipalloc-{HEX}"}, "AssociateAddress": {"AllocationId": f"eipalloc-{HEX}", "InstanceId": f"i-{HEX}"},
    "DisassociateAddress": {"AssociationId": f"eipassoc-{HEX}"}, "ModifyVolume": {"Size": 2},
    "RequestSpotInstances": {"LaunchSpecification": {"ImageId": f"ami-{HEX}"}},
}
# Those that need nothing that is there, and do what they are asked.
DO = {"CreateKeyPair", "CreateSecurityGroup", "CreateLaunchTemplate", "EnableImageBlockPublicAccess", "DisableImageBlockPublicAccess",
      "DeleteKeyPair", "ModifyInstanceMetadataDefaults", "AllocateAddress"}


class Audit(Case):
    def ask(self, name):
        """The error's code, or None."""
        model = self.ec2.meta.service_model.operation_model(name)
        words = {member: VALUES[member] for member in model.input_shape.required_members} if model.input_shape else {}
        if "Attribute" in words:
            words["Attribute"] = ATTRIBUTES.get(name, "createVolumePermission")
        words |= MORE.get(name, {})
        try:
            answer = self.ec2._make_api_call(name, words)
        except botocore.exceptions.ClientError as error:
            return error.response["Error"]["Code"]
        self.assertEqual(answer["ResponseMetadata"]["HTTPStatusCode"], 200)
        return None

    def test_what_clients_call_is_served(self):
        self.addCleanup(self.ec2.disable_image_block_public_access)
        missing, odd = {}, {}
        for title, (names, count) in LISTS.items():
            self.assertEqual(len(set(names)), count, title)
            for name in names:
                code = self.ask(name)
                if code in ("InvalidAction", "UnsupportedOperation"):
                    missing[name] = code
                # What is asked for nothing that is there either tells that, or has nothing to refuse.
                elif code in ("InternalError", "UnknownParameter", "MissingParameter"):
                    odd[name] = code
                elif code is None and not name.startswith(("Describe", "Get", "List")) and name not in DO:
                    odd[name] = "it did what cannot be"
        print(f"\nto come: {', '.join(sorted(missing)) or 'nothing'}")
        self.assertEqual(set(missing) - TO_COME, set(), "not served")
        self.assertEqual(TO_COME - set(missing), set(), "served: take it off the list TO_COME")
        self.assertEqual(odd, {})
