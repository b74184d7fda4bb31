"""The commands people type, against hutchd on the simulated host."""

import json
import os
import pathlib
import subprocess
import tempfile

from daemon import KEY, SECRET, Case

HUTCH = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")


class People(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = tempfile.TemporaryDirectory()

    @classmethod
    def tearDownClass(cls):
        cls.home.cleanup()
        super().tearDownClass()

    def hutch(self, *words, code=0, **more):
        environment = dict(os.environ, HUTCH_ENDPOINT=self.daemon.url, AWS_ACCESS_KEY_ID=KEY,
                           AWS_SECRET_ACCESS_KEY=SECRET, XDG_DATA_HOME=self.home.name)
        environment.pop("AWS_DEFAULT_REGION", None)
        environment.update(more)
        done = subprocess.run([HUTCH, *words], capture_output=True, text=True, env=environment, timeout=120)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout if code == 0 else done.stderr

    def listed(self, *words):
        return json.loads(self.hutch("ps", "-o", "json", *words))

    def test_an_instance_by_its_name(self):
        made = json.loads(self.hutch("run", "debian-12", "--name", "web", "--volume", "3", "-o", "json"))
        self.assertEqual([(i["name"], i["state"], i["type"]) for i in made], [("web", "running", "t3.micro")])
        one = made[0]["id"]
        instance = self.instance(one)
        self.assertEqual(instance["KeyName"], "hutch")
        self.assertEqual([d["DeviceName"] for d in instance["BlockDeviceMappings"]], ["/dev/xvda", "/dev/sdf"])
        self.assertIn("web", self.hutch("ps"))
        self.assertEqual(self.hutch("ps", "--query", "[?name=='web'].[id, state]", "-o", "text"), f"{one}\trunning\n")
        self.assertIn("- id: ", self.hutch("ps", "-o", "yaml"))
        self.assertIn("login:", self.hutch("logs", "web"))
        self.hutch("tag", "web", "Name=shop", "stage=test")
        self.assertIn("there is no instance web; `hutch ps -a`", self.hutch("stop", "web", code=240))
        self.hutch("stop", "shop")
        self.assertIn("is stopped; start it", self.hutch("ssh", "shop", code=240))
        self.hutch("start", "shop")
        self.hutch("reboot", one)
        self.hutch("tag", "shop", "stage-")
        self.assertEqual({t["Key"] for t in self.instance(one)["Tags"]}, {"Name"})

        # Of two with one name none is meant.
        two = json.loads(self.hutch("run", "debian-12", "--name", "shop", "--no-wait", "-o", "json"))[0]["id"]
        self.assertIn(two, self.hutch("terminate", "shop", code=240))
        self.assertEqual(len(self.listed()), 2)
        self.hutch("terminate", one, two)
        self.assertEqual(self.listed(), [])
        self.assertEqual({i["state"] for i in self.listed("-a")}, {"terminated"})

    def test_an_ami_of_an_instance(self):
        one = json.loads(self.hutch("run", "debian-12", "--name", "golden", "-o", "json"))[0]["id"]
        image = self.hutch("image", "create", "golden", "--name", "mine", "--no-reboot").strip()
        self.assertEqual(self.ec2.describe_images(ImageIds=[image])["Images"][0]["State"], "available")
        self.hutch("run", "mine", "--name", "copy")
        copy = self.hutch("image", "copy", "mine", "--name", "theirs").strip()
        self.hutch("image", "deregister", "mine")
        self.assertEqual(self.ec2.describe_images(ImageIds=[copy])["Images"][0]["State"], "available")
        self.hutch("image", "deregister", "theirs")
        self.assertIn("there is no AMI mine", self.hutch("run", "mine", code=240))
        self.hutch("terminate", one, "copy")

    def test_changes_are_told_as_they_come(self):
        one = json.loads(self.hutch("run", "debian-12", "--name", "told", "-o", "json"))[0]["id"]
        environment = dict(os.environ, HUTCH_ENDPOINT=self.daemon.url, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET)
        command = [HUTCH, "events", "--json", "--timeout", "60"]
        watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.assertIn("watched", watch.stderr.readline())
        self.hutch("stop", "told")
        said = []
        # Others may come and go at the same time.
        while not said or said[-1]["id"] != one or said[-1]["to"] != "stopped":
            said.append(json.loads(watch.stdout.readline()))
        own = [event for event in said if event["id"] == one]
        self.assertEqual((own[0]["from"], own[0]["name"]), ("running", "told"))
        self.assertIn("User initiated", own[-1]["reason"])
        watch.kill()
        watch.communicate()
        self.hutch("terminate", "told")

    def test_what_is_open_is_told_in_words(self):
        ec2 = self.daemon.client()
        bastion = ec2.create_security_group(GroupName="bastion", Description="ways in")["GroupId"]
        inner = ec2.create_security_group(GroupName="inner", Description="nobody else")["GroupId"]
        rule = ec2.authorize_security_group_ingress(GroupId=inner, IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22,
             "UserIdGroupPairs": [{"GroupId": bastion, "Description": "by hop"}]}])["SecurityGroupRules"][0]
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["debian-12"]}])["Images"][0]["ImageId"]
        one = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, SecurityGroupIds=[inner])["Instances"][0]
        ec2.get_waiter("instance_running").wait(InstanceIds=[one["InstanceId"]], WaiterConfig={"Delay": 0.05})
        said = self.hutch("fw", "show", one["InstanceId"])
        self.assertIn(f"TCP port 22 from members of bastion ({bastion}): rule {rule['SecurityGroupRuleId']} "
                      f"\"by hop\" of inner ({inner})", said)
        self.assertIn("everything to everyone (0.0.0.0/0)", said)
        self.assertIn("How many packets were dropped is not known", said, "nothing runs here")
        shown = json.loads(self.hutch("fw", "show", one["InstanceId"], "-o", "json"))
        self.assertEqual([(o["way"], o["what"]) for o in shown["open"]], [("in", "TCP port 22"), ("out", "everything")])
        self.assertEqual((shown["ip"], shown["dropped"]), (one["PrivateIpAddress"], None))
        self.hutch("terminate", one["InstanceId"])

    def test_other_programs_are_told_where_it_is(self):
        said = self.hutch("env")
        self.assertIn(f"export AWS_ENDPOINT_URL='{self.daemon.url}'", said)
        self.assertIn(f"export AWS_SECRET_ACCESS_KEY='{SECRET}'", said)
        answer = json.loads(self.hutch("aws", "ec2", "describe-regions", "--output", "json"))
        self.assertEqual([r["RegionName"] for r in answer["Regions"]], ["home-1"])

    def test_what_is_wrong_is_said(self):
        self.assertIn("SignatureDoesNotMatch", self.hutch("ps", code=240, AWS_SECRET_ACCESS_KEY="other"))
        self.assertIn("hutchd does not answer at http://127.0.0.1:9", self.hutch("ps", code=240, HUTCH_ENDPOINT="http://127.0.0.1:9"))
        nobody = {"AWS_ACCESS_KEY_ID": "", "HUTCH_STATE": self.home.name}
        self.assertIn("no access key: set AWS_ACCESS_KEY_ID", self.hutch("ps", code=240, **nobody))
        self.assertIn("--query", self.hutch("ps", "--query", "[?", code=240))
        self.assertIn("InvalidParameterValue", self.hutch("run", "debian-12", "--type", "t3.none", code=240))
