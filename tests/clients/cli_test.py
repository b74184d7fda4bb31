"""The aws CLI, as a person types it."""

import json
import os
import subprocess
import tempfile

from daemon import Case, KEY, REGION, SECRET


class First(Case):
    """Version 1, as its registry provides it."""

    AWS, VERSION = "aws", "aws-cli/1."

    def aws(self, *args, code=0):
        environment = dict(os.environ, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION=REGION,
                           AWS_CONFIG_FILE="/dev/null", AWS_PAGER="", AWS_MAX_ATTEMPTS="1")
        command = [self.AWS, "--endpoint-url", self.daemon.url, "--output", "json", *args]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        # Its first version says 255 where the second says 254.
        self.assertIn(ran.returncode, [code, code and 254], ran.stderr)
        if code:
            return ran.stderr
        return json.loads(ran.stdout) if ran.stdout.strip() else None

    def test_a_persons_day(self):
        version = subprocess.run([self.AWS, "--version"], capture_output=True, text=True, check=True).stdout
        self.assertTrue(version.startswith(self.VERSION), version)
        self.assertEqual(self.aws("sts", "get-caller-identity")["Account"], "000000000001")
        key = self.aws("ec2", "create-key-pair", "--key-name", "me", "--key-type", "ed25519")
        self.assertIn("PRIVATE KEY", key["KeyMaterial"])
        group = self.aws("ec2", "create-security-group", "--group-name", "ssh", "--description", "ssh")["GroupId"]
        self.aws("ec2", "authorize-security-group-ingress", "--group-id", group, "--protocol", "tcp", "--port", "22",
                 "--cidr", "0.0.0.0/0")
        with tempfile.NamedTemporaryFile("w") as data:
            data.write("#!/bin/sh\ntrue\n")
            data.flush()
            made = self.aws("ec2", "run-instances", "--image-id", self.image, "--instance-type", "t3.small",
                            "--key-name", "me", "--security-group-ids", group, "--user-data", f"file://{data.name}",
                            "--block-device-mappings", "DeviceName=/dev/sdf,Ebs={VolumeSize=4,VolumeType=gp3}",
                            "--tag-specifications", "ResourceType=instance,Tags=[{Key=Name,Value=web}]")
        instance = made["Instances"][0]["InstanceId"]
        self.wait("instance_running", instance)
        names = self.aws("ec2", "describe-instances", "--filters", "Name=tag:Name,Values=web", "--query",
                         "Reservations[].Instances[].[InstanceId,State.Name,KeyName]")
        self.assertEqual(names, [[instance, "running", "me"]])
        volumes = self.aws("ec2", "describe-volumes", "--filters", f"Name=attachment.instance-id,Values={instance}",
                           "--query", "sort_by(Volumes,&Size)[].[Size,VolumeType,State]")
        self.assertEqual(volumes, [[2, "gp3", "in-use"], [4, "gp3", "in-use"]])
        self.assertIn("DryRunOperation", self.aws("ec2", "stop-instances", "--instance-ids", instance, "--dry-run",
                                                  code=255))
        self.assertIn("InvalidInstanceID.NotFound", self.aws("ec2", "start-instances", "--instance-ids",
                                                             "i-0123456789abcdef0", code=255))
        self.aws("ec2", "terminate-instances", "--instance-ids", instance)
        self.wait("instance_terminated", instance)
        self.aws("ec2", "delete-security-group", "--group-id", group)
        self.aws("ec2", "delete-key-pair", "--key-name", "me")


class Second(First):
    """Version 2, as Debian provides it."""

    AWS, VERSION = "/usr/bin/aws", "aws-cli/2."

    def test_it_waits_and_shows_tables(self):
        made = self.aws("ec2", "run-instances", "--image-id", self.image, "--count", "2")
        ids = [i["InstanceId"] for i in made["Instances"]]
        for instance in ids:
            self.wait("instance_running", instance)
        # It looks every 15 s: what it waits for is there by then.
        self.aws("ec2", "wait", "instance-running", "--instance-ids", *ids)
        image = self.aws("ec2", "create-image", "--instance-id", ids[0], "--name", "second")["ImageId"]
        self.ec2.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05})
        self.aws("ec2", "wait", "image-available", "--image-ids", image)
        # It asks for itself whether there is more.
        found = self.aws("ec2", "describe-instances", "--page-size", "5", "--query", "Reservations[].Instances[].InstanceId")
        self.assertLessEqual(set(ids), set(found))
        template = json.dumps({"ImageId": image, "InstanceType": "t3.nano"})
        self.aws("ec2", "create-launch-template", "--launch-template-name", "cli", "--launch-template-data", template)
        again = self.aws("ec2", "run-instances", "--launch-template", "LaunchTemplateName=cli,Version=$Latest")
        ids += [i["InstanceId"] for i in again["Instances"]]
        self.aws("ec2", "stop-instances", "--instance-ids", ids[0])
        self.wait("instance_stopped", ids[0])
        self.aws("ec2", "wait", "instance-stopped", "--instance-ids", ids[0])
        self.aws("ec2", "terminate-instances", "--instance-ids", *ids)
        for instance in ids:
            self.wait("instance_terminated", instance)
        self.aws("ec2", "wait", "instance-terminated", "--instance-ids", *ids)
