"""Kernels and RAM disks of one's own: imported by hutch, booted by boto3 and the aws CLI."""

import json
import os
import pathlib
import struct
import subprocess

from daemon import KEY, REGION, SECRET, Case, Daemon

HUTCH = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")


def bzimage(payload, xloadflags=1):
    """The smallest file that keeps the boot protocol: one setup sector, then the payload."""
    image = bytearray(1024)
    image[0x1F1], image[0x211] = 1, 1
    image[0x1FE:0x200], image[0x202:0x206], image[0x206:0x208] = b"\x55\xaa", b"HdrS", struct.pack("<H", 0x20F)
    image[0x214:0x218], image[0x22C:0x230] = struct.pack("<I", 0x100000), struct.pack("<I", 0x7FFFFFFF)
    image[0x236:0x238], image[0x260:0x264] = struct.pack("<H", xloadflags), struct.pack("<I", 4096)
    return bytes(image) + payload


class WithKernels(Daemon):
    """A daemon whose state has a kernel and a RAM disk from the first, and another account's key."""

    def start(self):
        keys = pathlib.Path(self.state.name, "keys.json")
        if not keys.exists():
            keys.write_text(json.dumps([{"id": "AKIDOTHER", "secret": "other", "account": "000000000002"}]))
            self.add("--kernel", "vmlinuz-6.99", bzimage(b"\x90" * 4096))
            self.add("--ramdisk", "initrd.img", b"070701" + bytes(506))
        super().start()

    def hutch(self, *words, code=0):
        done = subprocess.run([HUTCH, "image", "--state", self.state.name, *words], capture_output=True, text=True)
        assert done.returncode == code, done
        return done.stdout + done.stderr

    def add(self, kind, name, content, *more, code=0):
        path = pathlib.Path(self.state.name, name)
        path.write_bytes(content)
        return self.hutch("import", kind, path, *more, code=code)


class Kernels(Case):
    DAEMON = WithKernels

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.other = cls.daemon.client(key="AKIDOTHER", secret="other")

    @classmethod
    def tearDownClass(cls):
        cls.other.close()
        super().tearDownClass()

    def images(self, **more):
        filters = [{"Name": name.replace("_", "-"), "Values": [value]} for name, value in more.items()]
        return self.ec2.describe_images(Filters=filters)["Images"]

    def one(self, name):
        (image,) = self.images(name=name)
        return image["ImageId"]

    def stopped(self, instance):
        self.ec2.stop_instances(InstanceIds=[instance], Force=True)
        self.wait("instance_stopped", instance)

    def test_what_is_imported_is_an_image(self):
        (kernel,), (ramdisk,) = self.images(image_type="kernel", name="vmlinuz-*"), self.images(image_type="ramdisk")
        self.assertRegex(kernel["ImageId"], "^aki-[0-9a-f]{17}$")
        self.assertRegex(ramdisk["ImageId"], "^ari-[0-9a-f]{17}$")
        self.assertEqual((kernel["Name"], ramdisk["Name"]), ("vmlinuz-6.99", "initrd.img"))
        self.assertEqual((kernel["State"], kernel["OwnerId"], kernel["Public"]), ("available", "000000000001", True))
        self.assertEqual((kernel["RootDeviceType"], kernel["BlockDeviceMappings"]), ("instance-store", []))
        listed = self.daemon.hutch("ls")
        for image in (kernel, ramdisk):
            self.assertIn(image["ImageId"], listed)
        self.assertIn("type      kernel", self.daemon.hutch("inspect", "vmlinuz-6.99"))
        record = json.loads(self.daemon.hutch("inspect", "initrd.img", "--output", "json"))
        self.assertEqual((record["image"]["kind"], record["image"]["virtual_size"]), ("ramdisk", 512))
        # Tags and permissions are as of other images.
        aki = kernel["ImageId"]
        self.ec2.create_tags(Resources=[aki], Tags=[{"Key": "tree", "Value": "mainline"}])
        self.assertEqual([i["ImageId"] for i in self.images(**{"tag:tree": "mainline"})], [aki])
        self.assertEqual(self.ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [aki]}])["Tags"][0]["ResourceType"], "image")
        self.fails("AuthFailure", self.other.deregister_image, ImageId=aki)
        self.ec2.modify_image_attribute(ImageId=aki, LaunchPermission={"Remove": [{"Group": "all"}]})
        self.fails("InvalidAMIID.NotFound", self.other.describe_images, ImageIds=[aki])
        self.ec2.modify_image_attribute(ImageId=aki, LaunchPermission={"Add": [{"Group": "all"}]})
        self.other.describe_images(ImageIds=[aki])
        self.fails("InvalidAMIID.Malformed", self.ec2.describe_images, ImageIds=["aki-x"])
        self.fails("InvalidAMIID.Malformed", self.ec2.run_instances, ImageId=aki, MinCount=1, MaxCount=1)

    def test_what_is_no_kernel_is_refused_with_the_reason(self):
        add, before = self.daemon.add, self.daemon.hutch("ls")
        for kind, name, content, words in [
            ("--kernel", "text", b"text" * 999, "is not a kernel: neither a bzImage nor an ELF file"),
            ("--kernel", "old", bzimage(b"\x90" * 4096, xloadflags=0), "no 64-bit entry point"),
            ("--kernel", "arm", bytes(0x38) + b"ARM\x64" + bytes(9000), "a kernel for arm64"),
            ("--kernel", "empty", b"", "it is empty"),
            ("--kernel", "elf", b"\x7fELF" + bytes(9000), "ELF"),
            ("--ramdisk", "disk", b"QFI\xfb" + bytes(508), "it is no initramfs"),
        ]:
            said = add(kind, name, content, code=240)
            self.assertIn(words, said)
            self.assertIn(name, said)
        large = pathlib.Path(self.daemon.state.name, "large")
        with large.open("wb") as file:
            file.truncate((128 << 20) + 1)
        self.assertIn("more than the 134217728 of any kernel", self.daemon.hutch("import", "--kernel", large, code=240))
        taken = add("--kernel", "again", bzimage(b"\x90" * 4096), "--name", "vmlinuz-6.99", code=240)
        self.assertIn("the name 'vmlinuz-6.99' is aki-", taken)
        self.assertEqual(self.daemon.hutch("ls"), before)

    def test_an_instance_boots_what_was_asked_for(self):
        aki, ari = self.one("vmlinuz-6.99"), self.one("initrd.img")
        launch = dict(MinCount=1, MaxCount=1, InstanceType="t3.micro", ImageId=self.image)
        before = len(self.ec2.describe_instances()["Reservations"])
        for code, more in [
            ("InvalidAMIID.NotFound", dict(KernelId="aki-12345678")),
            ("InvalidAMIID.Malformed", dict(KernelId=ari)),
            ("InvalidAMIID.Malformed", dict(RamdiskId=aki)),
            ("InvalidAMIID.NotFound", dict(KernelId=aki, RamdiskId="ari-0123456789abcdef0")),
        ]:
            self.fails(code, self.ec2.run_instances, **launch, **more)
        self.assertEqual(len(self.ec2.describe_instances()["Reservations"]), before)
        one = self.run_one(KernelId=aki, RamdiskId=ari)
        self.wait("instance_running", one)
        told = self.instance(one)
        self.assertEqual((told["KernelId"], told["RamdiskId"]), (aki, ari))
        for name, value in [("kernel-id", aki), ("ramdisk-id", ari)]:
            found = self.ec2.describe_instances(Filters=[{"Name": name, "Values": [value]}])["Reservations"]
            self.assertIn(one, [i["InstanceId"] for r in found for i in r["Instances"]])
        attribute = lambda name: self.ec2.describe_instance_attribute(InstanceId=one, Attribute=name)
        self.assertEqual((attribute("kernel")["KernelId"], attribute("ramdisk")["RamdiskId"]), ({"Value": aki}, {"Value": ari}))

        # It changes while it is stopped.
        modify = self.ec2.modify_instance_attribute
        self.fails("IncorrectInstanceState", modify, InstanceId=one, Kernel={"Value": aki})
        self.fails("IncorrectInstanceState", self.ec2.reset_instance_attribute, InstanceId=one, Attribute="kernel")
        self.stopped(one)
        self.ec2.reset_instance_attribute(InstanceId=one, Attribute="kernel")
        self.ec2.reset_instance_attribute(InstanceId=one, Attribute="ramdisk")
        self.assertNotIn("KernelId", self.instance(one))
        self.assertNotIn("KernelId", attribute("kernel"))
        self.fails("InvalidAMIID.NotFound", modify, InstanceId=one, Kernel={"Value": "aki-12345678"})
        modify(InstanceId=one, Kernel={"Value": aki})
        modify(InstanceId=one, Attribute="ramdisk", Value=ari)
        self.fails("InvalidParameterValue", self.ec2.reset_instance_attribute, InstanceId=one, Attribute="userData")

        # An image of it keeps them; they can be registered and copied, too.
        image = self.ec2.create_image(InstanceId=one, Name="own kernel")["ImageId"]
        self.ec2.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        (found,) = self.images(kernel_id=aki, ramdisk_id=ari, name="own kernel")
        self.assertEqual((found["ImageId"], found["KernelId"], found["RamdiskId"]), (image, aki, ari))
        of_image = lambda name: self.ec2.describe_image_attribute(ImageId=image, Attribute=name)
        self.assertEqual((of_image("kernel")["KernelId"], of_image("ramdisk")["RamdiskId"]), ({"Value": aki}, {"Value": ari}))
        mapping = [{"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": found["BlockDeviceMappings"][0]["Ebs"]["SnapshotId"]}}]
        register = dict(RootDeviceName="/dev/xvda", BlockDeviceMappings=mapping)
        self.fails("InvalidAMIID.NotFound", self.ec2.register_image, Name="bad", KernelId="aki-12345678", **register)
        registered = self.ec2.register_image(Name="registered", KernelId=aki, **register)["ImageId"]
        copied = self.ec2.copy_image(Name="copied", SourceRegion=REGION, SourceImageId=image)["ImageId"]
        told = {i["ImageId"]: (i.get("KernelId"), i.get("RamdiskId")) for i in self.images(kernel_id=aki)}
        self.assertEqual(told, {image: (aki, ari), registered: (aki, None), copied: (aki, ari)})
        made = self.ec2.run_instances(**dict(launch, ImageId=image))["Instances"][0]
        self.assertEqual((made["KernelId"], made["RamdiskId"]), (aki, ari))

        # Launch templates spell it otherwise.
        data = dict(ImageId=self.image, InstanceType="t3.micro", KernelId=aki, RamDiskId=ari)
        self.ec2.create_launch_template(LaunchTemplateName="kernel", LaunchTemplateData=data)
        versions = self.ec2.describe_launch_template_versions(Versions=["$Latest"], Filters=[{"Name": "kernel-id", "Values": [aki]}, {"Name": "ram-disk-id", "Values": [ari]}])
        self.assertEqual(versions["LaunchTemplateVersions"][0]["LaunchTemplateData"]["RamDiskId"], ari)
        of_template = self.ec2.run_instances(MinCount=1, MaxCount=1, LaunchTemplate={"LaunchTemplateName": "kernel"})["Instances"][0]
        self.assertEqual((of_template["KernelId"], of_template["RamdiskId"]), (aki, ari))
        data = self.ec2.get_launch_template_data(InstanceId=of_template["InstanceId"])["LaunchTemplateData"]
        self.assertEqual((data["KernelId"], data["RamDiskId"]), (aki, ari))
        self.ec2.terminate_instances(InstanceIds=[one, made["InstanceId"], of_template["InstanceId"]])

    def test_it_goes_and_who_boots_it_goes_on(self):
        self.daemon.add("--kernel", "bzImage", bzimage(b"going"))
        self.eventually(lambda: self.images(name="bzImage"))
        aki = self.one("bzImage")
        one, never = self.run_one(KernelId=aki), self.run_one()
        for instance in (one, never):
            self.wait("instance_running", instance)
            self.stopped(instance)
        self.ec2.modify_instance_attribute(InstanceId=never, Kernel={"Value": aki})
        self.ec2.deregister_image(ImageId=aki)
        self.fails("InvalidAMIID.NotFound", self.ec2.run_instances, ImageId=self.image, MinCount=1, MaxCount=1, KernelId=aki)
        self.daemon.kill()
        self.daemon.start()
        here = type(self)
        for client in (here.ec2, here.other):
            client.close()
        here.ec2, here.other = self.daemon.client(), self.daemon.client(key="AKIDOTHER", secret="other")
        self.assertEqual(self.images(name="bzImage"), [], "it stays deregistered")
        self.daemon.hutch("rm", "bzImage")
        self.ec2.start_instances(InstanceIds=[one])
        self.wait("instance_running", one)
        self.ec2.start_instances(InstanceIds=[never])
        self.eventually(lambda: self.instance(never)["State"]["Name"] == "stopped" and "StateReason" in self.instance(never))
        why = self.instance(never)["StateReason"]["Message"]
        self.assertIn(f"kernel {aki}", why)
        self.assertIn("hutch image import --kernel", why)
        self.ec2.terminate_instances(InstanceIds=[one, never])

    def test_hutch_and_the_aws_cli(self):
        aki, ari = self.one("vmlinuz-6.99"), self.one("initrd.img")
        keys = dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION=REGION)
        environment = dict(os.environ, HUTCH_ENDPOINT=self.daemon.url, HUTCH_STATE=self.daemon.state.name, **keys)

        def say(*command):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done)
            return json.loads(done.stdout or "null")

        (one,) = say(HUTCH, "run", "debian-12", "--kernel", "vmlinuz-6.99", "--ramdisk", ari, "-o", "json")
        self.assertEqual((self.instance(one["id"])["KernelId"], self.instance(one["id"])["RamdiskId"]), (aki, ari))
        for aws in ("aws", "/usr/bin/aws"):
            ec2 = (aws, "--endpoint-url", self.daemon.url, "--output", "json", "ec2")
            made = say(*ec2, "run-instances", "--image-id", self.image, "--kernel", aki, "--ramdisk", ari)["Instances"][0]
            self.assertEqual((made["KernelId"], made["RamdiskId"]), (aki, ari))
            listed = say(*ec2, "describe-images", "--owners", "self", "--filters", "Name=image-type,Values=kernel,ramdisk")
            self.assertLessEqual({aki, ari}, {image["ImageId"] for image in listed["Images"]})
            self.ec2.terminate_instances(InstanceIds=[made["InstanceId"]])
        self.ec2.terminate_instances(InstanceIds=[one["id"]])
