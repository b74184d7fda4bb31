"""Ansible's amazon.aws collection, unmodified: a playbook run twice changes nothing the second time; another takes all away."""

import os
import pathlib
import re
import subprocess
import tempfile

from daemon import Case

PLAYBOOKS = pathlib.Path(__file__).with_name("ansible")


class Ansible(Case):
    def play(self, name):
        with tempfile.TemporaryDirectory() as home:
            environment = dict(os.environ, HUTCH_ENDPOINT=self.daemon.url, ANSIBLE_HOME=home, ANSIBLE_NOCOLOR="1", LC_ALL="C.UTF-8",
                               ANSIBLE_LOCALHOST_WARNING="False", ANSIBLE_INVENTORY_UNPARSED_WARNING="False")
            done = subprocess.run(["ansible-playbook", PLAYBOOKS / name], env=environment, capture_output=True, text=True,
                                  timeout=300)
        recap = re.search(r"ok=(\d+)\s+changed=(\d+).*failed=(\d+)", done.stdout)
        self.assertTrue(recap and recap.group(3) == "0", done.stdout + done.stderr)
        return int(recap.group(2))

    def alive(self):
        filters = [{"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]}]
        return [i for r in self.ec2.describe_instances(Filters=filters)["Reservations"] for i in r["Instances"]]

    def test_a_playbook_twice_and_then_away(self):
        self.assertEqual(self.play("present.yml"), 5, "key pair, group, instance, volume, AMI")
        instance = self.alive()[0]
        self.assertEqual(instance["State"]["Name"], "running")
        self.assertEqual(instance["KeyName"], "playbook")
        self.assertEqual({t["Key"]: t["Value"] for t in instance["Tags"]}, {"Name": "playbook", "stage": "test"})
        self.assertEqual(self.play("present.yml"), 0, "all is as it is to be")
        self.assertEqual(len(self.alive()), 1)
        self.assertEqual(self.play("absent.yml"), 5)
        self.assertEqual(self.alive(), [])
        self.assertEqual(self.ec2.describe_volumes()["Volumes"], [])
        self.assertEqual(self.ec2.describe_key_pairs()["KeyPairs"], [])
        self.assertEqual([g["GroupName"] for g in self.ec2.describe_security_groups()["SecurityGroups"]], ["default"])
        self.assertEqual(self.ec2.describe_images(Filters=[{"Name": "name", "Values": ["playbook"]}])["Images"], [])
