"""boto3: launch templates."""

import base64

from daemon import Case

USER_DATA = base64.b64encode(b"#!/bin/sh\necho template\n").decode()


class LaunchTemplates(Case):
    def data(self, **more):
        return dict(
            ImageId=self.image, InstanceType="t3.small", UserData=USER_DATA,
            BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 3, "DeleteOnTermination": True}}],
            MetadataOptions={"HttpTokens": "required", "HttpPutResponseHopLimit": 2},
            Monitoring={"Enabled": True},
            TagSpecifications=[{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "of a template"}]}],
            **more)

    def test_a_template_launches_what_it_says(self):
        self.ec2.create_key_pair(KeyName="template", KeyType="ed25519")
        token = dict(ClientToken="once")
        ask = dict(LaunchTemplateName="web", VersionDescription="first", LaunchTemplateData=self.data(),
                   TagSpecifications=[{"ResourceType": "launch-template", "Tags": [{"Key": "a", "Value": "b"}]}])
        made = self.ec2.create_launch_template(**ask, **token)["LaunchTemplate"]
        again = self.ec2.create_launch_template(**ask, **token)["LaunchTemplate"]
        self.assertEqual(made["LaunchTemplateId"], again["LaunchTemplateId"])
        self.assertEqual((made["DefaultVersionNumber"], made["LatestVersionNumber"]), (1, 1))
        self.assertEqual(made["Tags"], [{"Key": "a", "Value": "b"}])
        self.fails("InvalidLaunchTemplateName.AlreadyExistsException", self.ec2.create_launch_template, **ask)
        # A version's data are told as they were given.
        told = self.ec2.describe_launch_template_versions(LaunchTemplateName="web")["LaunchTemplateVersions"]
        self.assertEqual([v["LaunchTemplateData"] for v in told], [self.data()])
        self.assertTrue(told[0]["DefaultVersion"])
        # The second takes the rest from the first.
        second = self.ec2.create_launch_template_version(
            LaunchTemplateName="web", SourceVersion="$Latest",
            LaunchTemplateData={"InstanceType": "t3.nano", "KeyName": "template"})["LaunchTemplateVersion"]
        self.assertEqual(second["LaunchTemplateData"], dict(self.data(KeyName="template"), InstanceType="t3.nano"))
        self.assertEqual((second["VersionNumber"], second["DefaultVersion"]), (2, False))

        def launch(**template):
            made = self.ec2.run_instances(LaunchTemplate=template, MinCount=1, MaxCount=1)["Instances"][0]
            self.wait("instance_running", made["InstanceId"])
            return self.instance(made["InstanceId"])

        first = launch(LaunchTemplateName="web")
        self.assertEqual((first["InstanceType"], first.get("KeyName")), ("t3.small", None))
        tags = {tag["Key"]: tag["Value"] for tag in first["Tags"]}
        self.assertEqual(tags, {"Name": "of a template", "aws:ec2launchtemplate:version": "1",
                                "aws:ec2launchtemplate:id": made["LaunchTemplateId"]})
        self.assertEqual(first["MetadataOptions"]["HttpTokens"], "required")
        self.assertEqual([d["DeviceName"] for d in first["BlockDeviceMappings"]][1:], ["/dev/sdf"])
        told = self.ec2.describe_instance_attribute(InstanceId=first["InstanceId"], Attribute="userData")
        self.assertEqual(told["UserData"]["Value"], USER_DATA)
        latest = launch(LaunchTemplateId=made["LaunchTemplateId"], Version="$Latest")
        self.assertEqual((latest["InstanceType"], latest["KeyName"]), ("t3.nano", "template"))
        # EC2's own tags stay, and do not hinder others.
        ids = [first["InstanceId"]]
        self.ec2.create_tags(Resources=ids, Tags=[{"Key": "more", "Value": ""}])
        self.ec2.delete_tags(Resources=ids)
        self.assertEqual({tag["Key"] for tag in self.instance(ids[0])["Tags"]},
                         {"aws:ec2launchtemplate:version", "aws:ec2launchtemplate:id"})
        # What the request says wins.
        over = self.ec2.run_instances(LaunchTemplate={"LaunchTemplateName": "web", "Version": "2"},
                                      InstanceType="t3.medium", MinCount=1, MaxCount=1)["Instances"][0]
        self.assertEqual((over["InstanceType"], over["KeyName"]), ("t3.medium", "template"))
        # And of an instance comes a template.
        data = self.ec2.get_launch_template_data(InstanceId=ids[0])["LaunchTemplateData"]
        self.assertEqual((data["InstanceType"], data["UserData"]), ("t3.small", USER_DATA))
        self.ec2.terminate_instances(InstanceIds=[first["InstanceId"], latest["InstanceId"], over["InstanceId"]])

    def test_versions_come_and_go(self):
        name = dict(LaunchTemplateName="many")
        made = self.ec2.create_launch_template(**name, LaunchTemplateData={"InstanceType": "t3.nano"})
        template = made["LaunchTemplate"]["LaunchTemplateId"]
        for kind in ["t3.micro", "t3.small"]:
            self.ec2.create_launch_template_version(**name, LaunchTemplateData={"InstanceType": kind})

        def versions(**more):
            told = self.ec2.describe_launch_template_versions(**more)["LaunchTemplateVersions"]
            return [v["VersionNumber"] for v in told if v["LaunchTemplateId"] == template]

        self.assertEqual(versions(**name), [1, 2, 3])
        self.assertEqual(versions(**name, Versions=["$Latest", "1"]), [1, 3])
        self.assertEqual(versions(**name, MinVersion="2"), [2, 3])
        self.assertEqual(versions(Versions=["$Default"]), [1])
        filters = [{"Name": "instance-type", "Values": ["t3.micro"]}]
        self.assertEqual(versions(**name, Filters=filters), [2])
        changed = self.ec2.modify_launch_template(**name, DefaultVersion="3")["LaunchTemplate"]
        self.assertEqual(changed["DefaultVersionNumber"], 3)
        gone = self.ec2.delete_launch_template_versions(**name, Versions=["1", "3", "9"])
        self.assertEqual([v["VersionNumber"] for v in gone["SuccessfullyDeletedLaunchTemplateVersions"]], [1])
        errors = [v["ResponseError"]["Code"] for v in gone["UnsuccessfullyDeletedLaunchTemplateVersions"]]
        self.assertEqual(errors, ["unexpectedError", "launchTemplateVersionDoesNotExist"])
        self.assertEqual(versions(**name), [2, 3])
        run = dict(MinCount=1, MaxCount=1)
        for code, call, more in [
            ("InvalidLaunchTemplateName.NotFoundException", self.ec2.run_instances,
             dict(run, LaunchTemplate={"LaunchTemplateName": "nobody"})),
            ("InvalidLaunchTemplateId.NotFound", self.ec2.run_instances,
             dict(run, LaunchTemplate={"LaunchTemplateId": "lt-12345678"})),
            ("InvalidLaunchTemplateId.VersionNotFound", self.ec2.run_instances,
             dict(run, LaunchTemplate=dict(name, Version="1"))),
            # It says nothing of an image.
            ("MissingParameter", self.ec2.run_instances, dict(run, LaunchTemplate=name)),
            ("InvalidLaunchTemplateId.VersionNotFound", self.ec2.modify_launch_template, dict(name, DefaultVersion="1")),
            ("InvalidLaunchTemplateName.MalformedException", self.ec2.create_launch_template,
             dict(LaunchTemplateName="no blanks", LaunchTemplateData={"InstanceType": "t3.nano"})),
            ("MissingParameter", self.ec2.describe_launch_template_versions, dict(Versions=["1"])),
            ("InvalidParameterValue", self.ec2.create_launch_template_version,
             dict(name, LaunchTemplateData={"UserData": "x" * 70_000})),
        ]:
            self.fails(code, call, **more)
        self.assertEqual(self.ec2.describe_launch_templates(LaunchTemplateNames=["many"])["LaunchTemplates"][0]
                         ["LaunchTemplateId"], template)
        self.ec2.delete_launch_template(LaunchTemplateId=template)
        self.fails("InvalidLaunchTemplateName.NotFoundException", self.ec2.describe_launch_templates,
                   LaunchTemplateNames=["many"])
        self.ec2.create_launch_template(**name, LaunchTemplateData={"InstanceType": "t3.nano"})
