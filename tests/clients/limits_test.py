"""boto3: what the owner of the machine sets: limits and instance types."""

import concurrent.futures
import pathlib
import subprocess

import botocore.exceptions

from daemon import Case, Daemon

LIMITS = """
vcpus = 5
instances = 4
volumes = 6
security-groups = 2
rules-per-group = 2
groups-per-interface = 1
"""
TYPES = """
[own]
one = { vcpus = 1, memory = 256 }
"""


class Owned(Daemon):
    def start(self):
        state = pathlib.Path(self.state.name)
        (state / "limits.toml").write_text(LIMITS)
        (state / "instance-types.toml").write_text(TYPES)
        super().start()


class Limits(Case):
    DAEMON = Owned

    def test_an_account_has_no_more_than_its_limits(self):
        run = dict(ImageId=self.image, MinCount=1, MaxCount=1)
        kinds = self.ec2.describe_instance_types(InstanceTypes=["own.one", "t3.micro"])["InstanceTypes"]
        self.assertEqual(sorted(kind["VCpuInfo"]["DefaultVCpus"] for kind in kinds), [1, 2])
        self.fails("VcpuLimitExceeded", self.ec2.run_instances, **dict(run, InstanceType="t3.micro", MinCount=3, MaxCount=3))
        # As many as there is room for, where that is enough; at the same time as others.
        made, refused = [], []

        def launch():
            try:
                got = self.ec2.run_instances(**dict(run, InstanceType="t3.micro", MaxCount=3))["Instances"]
                made.extend(i["InstanceId"] for i in got)
            except botocore.exceptions.ClientError as e:
                refused.append(e.response["Error"]["Code"])

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(launch)
        self.assertEqual((len(made), set(refused)), (2, {"VcpuLimitExceeded"}))
        self.fails("VcpuLimitExceeded", self.ec2.run_instances, **dict(run, InstanceType="t3.micro"))
        made += [self.ec2.run_instances(**dict(run, InstanceType="own.one"))["Instances"][0]["InstanceId"]]
        self.fails("VcpuLimitExceeded", self.ec2.run_instances, **dict(run, InstanceType="own.one"))
        for instance in made:
            self.wait("instance_running", instance)
        # Stopped ones take no CPU, and get none while others have it.
        self.ec2.stop_instances(InstanceIds=made[:1])
        self.wait("instance_stopped", made[0])
        made += [self.ec2.run_instances(**dict(run, InstanceType="own.one"))["Instances"][0]["InstanceId"]]
        self.fails("VcpuLimitExceeded", self.ec2.start_instances, InstanceIds=made[:1])
        self.fails("InstanceLimitExceeded", self.ec2.run_instances, **dict(run, InstanceType="own.one"))
        values = self.ec2.describe_account_attributes(AttributeNames=["max-instances"])["AccountAttributes"][0]
        self.assertEqual(values["AttributeValues"], [{"AttributeValue": "4"}])
        self.ec2.terminate_instances(InstanceIds=made[1:2])
        self.wait("instance_terminated", made[1])
        self.ec2.start_instances(InstanceIds=made[:1])

        self.eventually(lambda: len(self.ec2.describe_volumes()["Volumes"]) == 3)
        for _ in range(3):
            self.ec2.create_volume(AvailabilityZone="home-1a", Size=1)
        self.fails("VolumeLimitExceeded", self.ec2.create_volume, AvailabilityZone="home-1a", Size=1)

        group = self.ec2.create_security_group(GroupName="one", Description="one")["GroupId"]
        self.fails("SecurityGroupLimitExceeded", self.ec2.create_security_group, GroupName="two", Description="two")
        rules = [dict(IpProtocol="tcp", FromPort=port, ToPort=port, IpRanges=[{"CidrIp": "0.0.0.0/0"}]) for port in (1, 2, 3)]
        self.fails("RulesPerSecurityGroupLimitExceeded", self.ec2.authorize_security_group_ingress, GroupId=group,
                   IpPermissions=rules)
        self.ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules[:2])
        default = self.ec2.describe_security_groups(GroupNames=["default"])["SecurityGroups"][0]["GroupId"]
        self.fails("SecurityGroupsPerInterfaceLimitExceeded", self.ec2.modify_instance_attribute, InstanceId=made[0],
                   Groups=[group, default])

    def test_a_file_that_says_nothing_known_is_refused_at_the_start(self):
        daemon = Daemon()
        daemon.kill()
        for name, text, why in [("limits.toml", "vcpu = 1", "unknown field `vcpu`"),
                                ("instance-types.toml", "[a]\nb = { vcpus = 99, memory = 1 }", "a.b has 1 to 32 vcpus")]:
            path = pathlib.Path(daemon.state.name, name)
            path.write_text(text)
            ran = subprocess.run(daemon.command, capture_output=True, text=True, timeout=60)
            self.assertNotEqual(ran.returncode, 0)
            self.assertIn(f"{path}", ran.stderr)
            self.assertIn(why, ran.stderr)
            path.unlink()
        daemon.state.cleanup()
