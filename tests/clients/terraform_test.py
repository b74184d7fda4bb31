"""Terraform and its AWS provider, unmodified: a module applied, planned again (no changes), changed, and destroyed.

Neither can be had from a package registry of this project, so where one is missing the test says so and is skipped: `terraform`
is looked for on PATH, the provider in the directory that HUTCH_TERRAFORM_PLUGINS names (a filesystem mirror) or in the usual
places."""

import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from daemon import Case, KEY, REGION, SECRET

MODULES = pathlib.Path(__file__).with_name("terraform")
PLACES = ["/usr/share/terraform/plugins", "/usr/local/share/terraform/plugins", "~/.terraform.d/plugins",
          "~/.local/share/terraform/plugins", "/opt/*plugins*"]
PROVIDER = "registry.terraform.io/hashicorp/aws"


def mirror():
    """The filesystem mirror that has the provider."""
    named = os.environ.get("HUTCH_TERRAFORM_PLUGINS")
    places = [named] if named else [found for place in PLACES for found in glob.glob(os.path.expanduser(place))]
    return next((place for place in places if os.path.isdir(os.path.join(place, PROVIDER))), None)


class Terraform(Case):
    MODULE = None
    PLACE = REGION

    @classmethod
    def setUpClass(cls):
        if not shutil.which("terraform"):
            raise unittest.SkipTest("Terraform is not installed: no `terraform` on PATH")
        plugins = mirror()
        if not plugins:
            looked = os.environ.get("HUTCH_TERRAFORM_PLUGINS") or ", ".join(PLACES)
            raise unittest.SkipTest(f"no mirror with the provider {PROVIDER} (HUTCH_TERRAFORM_PLUGINS): looked in {looked}")
        super().setUpClass()
        cls.addClassCleanup(super().tearDownClass)
        home = tempfile.TemporaryDirectory()
        cls.addClassCleanup(home.cleanup)
        cls.home = pathlib.Path(home.name)
        config = f'disable_checkpoint = true\nprovider_installation {{\n  filesystem_mirror {{ path = "{plugins}" }}\n}}\n'
        (cls.home / "terraformrc").write_text(config)
        cls.directory = cls.home / "module"
        shutil.copytree(MODULES / cls.MODULE, cls.directory)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "user", "-f", cls.home / "key"], check=True)
        public = " ".join((cls.home / "key.pub").read_text().split())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TF_"))}
        cls.environment = dict(
            kept, HOME=home.name, TF_CLI_CONFIG_FILE=str(cls.home / "terraformrc"), TF_IN_AUTOMATION="1", CHECKPOINT_DISABLE="1",
            AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_EC2_METADATA_DISABLED="true",
            TF_VAR_endpoint=cls.daemon.url, TF_VAR_region=cls.PLACE, TF_VAR_public_key=public)
        cls.terraform("init", "-input=false")

    @classmethod
    def tearDownClass(cls):
        """The daemon is stopped by the cleanups."""

    @classmethod
    def terraform(cls, *command, code=0):
        done = subprocess.run(["terraform", *command, "-no-color"], cwd=cls.directory, env=cls.environment, capture_output=True,
                              text=True, timeout=600)
        if done.returncode != code:
            raise AssertionError(f"terraform {' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout

    def apply(self, **variables):
        """What was added, changed and destroyed; after it, nothing is left to do."""
        chosen = [f"-var={name}={value}" for name, value in variables.items()]
        told = self.terraform("apply", "-input=false", "-auto-approve", "-parallelism=20", *chosen)
        # With -detailed-exitcode, 0 means that there is nothing to change.
        self.terraform("plan", "-input=false", "-detailed-exitcode", *chosen)
        return [int(n) for n in re.search(r"(\d+) added, (\d+) changed, (\d+) destroyed", told).groups()]

    def outputs(self):
        return {name: output["value"] for name, output in json.loads(self.terraform("output", "-json")).items()}

    def managed(self):
        return [line for line in self.terraform("state", "list").split() if not line.startswith("data.")]


class Instances(Terraform):
    """Keys, firewall, instances, disks, images."""

    MODULE = "instances"

    def test_a_module_from_apply_to_destroy(self):
        added, changed, destroyed = self.apply()
        self.assertEqual((added, changed, destroyed), (len(self.managed()), 0, 0))
        outputs = self.outputs()
        self.assertEqual(outputs["zones"], ["home-1a", "home-1b"])
        self.assertEqual(len(outputs["subnets"]), 2)
        web, worker = self.instance(outputs["web"]), self.instance(outputs["worker"])
        self.assertEqual((web["State"]["Name"], worker["State"]["Name"]), ("running", "stopped"))
        self.assertEqual(web["PrivateIpAddress"], outputs["web_ip"])
        self.assertEqual(web["MetadataOptions"]["HttpTokens"], "required")
        disks = self.ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["web disk"]}])["Volumes"]
        self.assertEqual(sorted(disk["Size"] for disk in disks), [4, 8])
        self.assertEqual(self.instance(outputs["worker"])["BlockDeviceMappings"][1]["Ebs"]["VolumeId"], outputs["data"])

        # Tags of everything, a rule, the type of an instance (which Terraform stops for that): all in place.
        variables = dict(stage="live", open_port=8443, type="t3.small")
        added, changed, destroyed = self.apply(**variables)
        self.assertEqual((added, destroyed), (0, 0))
        self.assertEqual(changed, 6, "group, rule, instance, volume, snapshot, the tag of an interface")
        web = self.instance(outputs["web"])
        self.assertEqual((web["InstanceType"], web["State"]["Name"]), ("t3.small", "running"))
        rules = self.ec2.describe_security_group_rules(Filters=[{"Name": "tag:stage", "Values": ["live"]}])["SecurityGroupRules"]
        self.assertEqual([(rule["FromPort"], rule["GroupId"]) for rule in rules], [(8443, outputs["group"])])
        tags = self.ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [rules[0]["SecurityGroupRuleId"]]}])["Tags"]
        self.assertEqual({tag["ResourceType"] for tag in tags}, {"security-group-rule"})
        self.assertEqual({tag["Key"]: tag["Value"] for tag in tags}, {"Name": "https", "stage": "live", "project": "hutch"})

        # What Terraform has forgotten it takes back as it is.
        chosen = [f"-var={name}={value}" for name, value in variables.items()]
        for address, name in [("aws_instance.worker", outputs["worker"]), ("aws_ebs_volume.data", outputs["data"]),
                              ("aws_security_group.separate", outputs["group"]), ("aws_key_pair.user", "user")]:
            self.terraform("state", "rm", address)
            self.terraform("import", "-input=false", *chosen, address, name)
        self.apply(**variables)

        self.terraform("destroy", "-auto-approve", "-parallelism=20", *chosen)
        self.assertEqual(self.managed(), [])
        states = {i["State"]["Name"] for r in self.ec2.describe_instances()["Reservations"] for i in r["Instances"]}
        self.assertEqual(states, {"terminated"})
        mine = dict(OwnerIds=["self"])
        self.assertEqual(self.ec2.describe_volumes()["Volumes"], [])
        # The host's templates are this account's, too.
        left = self.ec2.describe_snapshots(**mine)["Snapshots"]
        self.assertEqual([s["Description"] for s in left if not s["Description"].startswith("The template")], [])
        left = self.ec2.describe_images(Owners=["self"])["Images"]
        self.assertEqual([i["Name"] for i in left if not i["Description"].startswith("Imported as")], [])
        self.assertEqual(self.ec2.describe_network_interfaces()["NetworkInterfaces"], [])
        self.assertEqual(self.ec2.describe_key_pairs()["KeyPairs"], [])
        self.assertEqual([g["GroupName"] for g in self.ec2.describe_security_groups()["SecurityGroups"]], ["default"])
        self.assertEqual(self.ec2.describe_launch_templates()["LaunchTemplates"], [])
        # Terminated instances are remembered with their tags.
        self.assertEqual({tag["ResourceType"] for tag in self.ec2.describe_tags()["Tags"]}, {"instance"})


class Networks(Terraform):
    """A network of one's own, in a region that the provider knows."""

    MODULE, PLACE = "networks", "eu-central-1"
    OPTIONS = ("--rate", "0", "--regions", "home-1,eu-central-1")

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.ec2.close()
        cls.ec2 = cls.daemon.client(region=cls.PLACE)
        cls.addClassCleanup(cls.ec2.close)

    def test_a_network_from_apply_to_destroy(self):
        before = self.all_of_networks()
        added, changed, destroyed = self.apply()
        self.assertEqual((added, changed, destroyed), (len(self.managed()), 0, 0))
        outputs = self.outputs()
        vpc = outputs["vpc"]
        self.assertEqual(outputs["region"], self.PLACE)
        router, inside = self.instance(outputs["router"]), self.instance(outputs["inside"])
        self.assertEqual((router["PrivateIpAddress"], router["SourceDestCheck"]), ("10.20.0.10", False))
        self.assertEqual(inside["VpcId"], vpc)

        def table(subnet):
            filters = [{"Name": "association.subnet-id", "Values": [subnet]}]
            return self.ec2.describe_route_tables(Filters=filters)["RouteTables"][0]["Routes"]

        routes = table(outputs["private"][0])
        self.assertEqual([(r["DestinationCidrBlock"], r.get("InstanceId"), r["State"]) for r in routes],
                         [("10.20.0.0/16", None, "active"), ("192.168.0.0/16", outputs["router"], "active")])

        variables = dict(stage="live", private="false", description="second")
        added, changed, destroyed = self.apply(**variables)
        self.assertEqual((added, changed, destroyed), (0, 6, 0), "VPC, two subnets, two associations, an interface")
        self.assertTrue(table(outputs["private"][0])[1]["GatewayId"].startswith("igw-"))

        chosen = [f"-var={name}={value}" for name, value in variables.items()]
        self.terraform("state", "rm", "aws_vpc.main")
        self.terraform("import", "-input=false", *chosen, "aws_vpc.main", vpc)
        self.apply(**variables)
        self.terraform("destroy", "-auto-approve", "-parallelism=20", *chosen)
        self.assertEqual(self.managed(), [])
        self.fails("InvalidVpcID.NotFound", self.ec2.describe_vpcs, VpcIds=[vpc])
        self.assertEqual(self.all_of_networks(), before)

    def all_of_networks(self):
        """The ids of all that networks are made of."""
        told = [self.ec2.describe_vpcs()["Vpcs"], self.ec2.describe_subnets()["Subnets"],
                self.ec2.describe_internet_gateways()["InternetGateways"], self.ec2.describe_route_tables()["RouteTables"],
                self.ec2.describe_network_interfaces()["NetworkInterfaces"],
                self.ec2.describe_network_acls()["NetworkAcls"], self.ec2.describe_security_groups()["SecurityGroups"]]
        ids = ["VpcId", "SubnetId", "InternetGatewayId", "RouteTableId", "NetworkInterfaceId", "NetworkAclId", "GroupId"]
        return [sorted(thing[name] for thing in things) for name, things in zip(ids, told)]
