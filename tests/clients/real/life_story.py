"""What instances go through, in real guests."""

import json
import os
import random
import subprocess
import time

import botocore.exceptions

from cloud import ENOUGH, host, REGION, say, Story


class Life(Story):
    def test_an_instance_lives_through_all_its_states(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        cloud.aws("create-key-pair", "--key-name", "me")
        group = cloud.aws("create-security-group", "--group-name", "web", "--description", "port 80")["GroupId"]
        web = ["--group-id", group, "--protocol", "tcp", "--port", "80", "--cidr", "0.0.0.0/0"]
        cloud.aws("authorize-security-group-ingress", *web)
        made = cloud.aws("run-instances", "--image-id", image, "--instance-type", "t3.nano", "--key-name", "me",
                         "--security-group-ids", group, "--user-data", "what it is told", "--block-device-mappings",
                         '[{"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "DeleteOnTermination": true}}]')
        one = made["Instances"][0]["InstanceId"]
        ip = made["Instances"][0]["PrivateIpAddress"]
        self.becomes(one, "running")
        self.prints(one, f"I am {one} at {ip}")
        self.prints(one, "told: what it is told key: ssh-")
        self.prints(one, "boots: 1 disks: 2 READY")

        # The firewall is what the security group says, also after it changed.
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "port 80 is open")
        cloud.aws("revoke-security-group-ingress", *web)
        self.eventually(lambda: not self.web(ip), "port 80 is closed")
        say("port 80 is open, and closed")
        # By the members of a group, too: the host is none.
        own = ["--group-id", group, "--ip-permissions", f'[{{"IpProtocol": "tcp", "FromPort": 80, "ToPort": 80, '
               f'"UserIdGroupPairs": [{{"GroupId": "{group}"}}]}}]']
        cloud.aws("authorize-security-group-ingress", *own)
        self.eventually(lambda: f"{group}-4" in host("/usr/sbin/nft", "list", "table", "inet", "hutch"), "members are a set")
        self.assertFalse(self.web(ip), "the host is no member")
        cloud.aws("revoke-security-group-ingress", *own)

        # A volume comes while it runs: the guest finds it by itself, by its id, and writes to it.
        data = cloud.aws("create-volume", "--availability-zone",
                         self.instance(one)["Placement"]["AvailabilityZone"], "--size", "2")["VolumeId"]
        state = lambda: ec2.describe_volumes(VolumeIds=[data])["Volumes"][0]
        self.eventually(lambda: state()["State"] == "available", "the volume is made")
        told = cloud.aws("attach-volume", "--volume-id", data, "--instance-id", one, "--device", "/dev/sdg")
        self.assertEqual(told["State"], "attaching")
        self.eventually(lambda: state()["Attachments"][0]["State"] == "attached", "the volume is attached")
        disk = f"{data.replace('-', '')}={2 << 21}"
        self.prints(one, disk)

        # Killed, the daemon leaves its guests alone, and finds them again.
        before = self.cloud.machines()
        cloud.end("KILL")
        self.assertEqual(self.cloud.machines(), before)
        cloud.start()
        self.assertEqual(self.instance(one)["State"]["Name"], "running")
        cloud.aws("authorize-security-group-ingress", *web)
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "it is served as before")
        self.assertEqual(self.cloud.machines(), before)
        say("hutchd was killed, the guest runs on and is told its metadata")

        # An elastic address leads to the same port, as the group says; and to none when it is disassociated.
        address = cloud.aws("allocate-address")
        public, allocation = address["PublicIp"], address["AllocationId"]
        associated = cloud.aws("associate-address", "--allocation-id", allocation, "--instance-id", one)["AssociationId"]
        self.eventually(lambda: f"hello from {one}" in self.web(public), "its public address leads to it")
        cloud.aws("revoke-security-group-ingress", *web)
        # One that leads nowhere goes by the host's default route, where something else may answer.
        nowhere = lambda: f"hello from {one}" not in self.web(public)
        self.eventually(nowhere, "port 80 is closed there, too")
        cloud.aws("authorize-security-group-ingress", *web)
        cloud.end("KILL")
        cloud.start()
        self.eventually(lambda: f"hello from {one}" in self.web(public), "as before the daemon was killed")
        cloud.aws("disassociate-address", "--association-id", associated)
        self.eventually(nowhere, "its public address leads nowhere")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "its private address leads to it as ever")
        cloud.aws("associate-address", "--allocation-id", allocation, "--instance-id", one)
        say(f"{public} led to the guest, and led nowhere")

        # A reboot boots what is on the disk now; it stays running.
        cloud.aws("reboot-instances", "--instance-ids", one)
        self.prints(one, "BUTTON")
        self.prints(one, "boots: 2 disks: 3 READY")
        self.assertEqual(self.instance(one)["State"]["Name"], "running")
        self.eventually(lambda: f"hello from {one}" in self.web(ip), "it is served after the reboot")

        # And the volume goes, when the guest has let it go.
        self.prints(one, disk)
        self.eventually(lambda: disk in self.console(one).rpartition("volumes:")[2], "the guest has it")
        told = cloud.aws("detach-volume", "--volume-id", data)
        self.assertEqual(told["State"], "detaching")
        self.eventually(lambda: state()["State"] == "available", "the volume is detached")
        self.eventually(lambda: disk not in self.console(one).rpartition("volumes:")[2], "the guest has it no more")
        ec2.delete_volume(VolumeId=data)
        say("a volume was attached to a guest that runs, and detached")

        # Stopped and started: another run, the same disks.
        cloud.aws("stop-instances", "--instance-ids", one)
        self.becomes(one, "stopped")
        self.assertEqual(self.cloud.machines(), [])
        cloud.aws("start-instances", "--instance-ids", one)
        self.becomes(one, "running")
        self.prints(one, "boots: 3 disks: 2 READY")
        self.eventually(lambda: f"hello from {one}" in self.web(public), "the elastic address stays with it")

        # An AMI of it, copied, launched beside it when the first is gone: its root is a copy.
        made = cloud.aws("create-image", "--instance-id", one, "--name", "made", "--no-reboot")["ImageId"]
        available = ec2.get_waiter("image_available")
        available.wait(ImageIds=[made], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        disks = ec2.describe_images(ImageIds=[made])["Images"][0]["BlockDeviceMappings"]
        copy = ec2.copy_image(SourceRegion=REGION, SourceImageId=made, Name="copy")["ImageId"]
        available.wait(ImageIds=[copy], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        ec2.deregister_image(ImageId=made)
        for disk in disks:
            ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        two = ec2.run_instances(ImageId=copy, MinCount=1, MaxCount=1, InstanceType="t3.nano", SecurityGroupIds=[group])
        two = two["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "boots: 4 disks: 2 READY")

        # A machine that dies is noticed; its instance says why.
        self.assertEqual(len(self.cloud.machines()), 2)
        host("kill", "-9", *self.cloud.machines())
        for instance in (one, two):
            self.becomes(instance, "stopped")
            self.assertIn("killed", self.instance(instance)["StateReason"]["Message"])
        self.assertEqual(host("bash", "-c", "ls /sys/class/net | grep ^hu", check=False), "")

        # Terminated, nothing is left but what was made by name.
        cloud.aws("terminate-instances", "--instance-ids", one, two)
        for instance in (one, two):
            self.becomes(instance, "terminated")
        kept = [v for v in ec2.describe_volumes()["Volumes"] if v["State"] != "deleting"]
        self.assertEqual([v["Size"] for v in kept], [], "the mapping's volumes go with the instance")
        self.assertEqual(host("bash", "-c", "nft list tables | grep hutch; ip route | grep -w " + public, check=False), "")
        cloud.aws("release-address", "--allocation-id", allocation)
        disks = ec2.describe_images(ImageIds=[copy])["Images"][0]["BlockDeviceMappings"]
        ec2.deregister_image(ImageId=copy)
        for disk in disks:
            ec2.delete_snapshot(SnapshotId=disk["Ebs"]["SnapshotId"])
        left = lambda: host("bash", "-c", f"cd {cloud.state}/{REGION}/host; ls layers machines snapshots volumes").split()
        self.eventually(lambda: left() == ["layers:", "machines:", "snapshots:", "volumes:"], "all of it is given back")
        say("nothing is left")

    def test_killed_at_any_moment_the_daemon_carries_on(self):
        ec2, cloud = self.ec2, self.cloud
        seed = int(os.environ.get("HUTCH_SEED", random.randrange(1 << 32)))
        say(f"HUTCH_SEED={seed}")
        chance = random.Random(seed)
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run():
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")
            return made["Instances"][0]["InstanceId"]

        witness = run()
        self.becomes(witness, "running")
        self.prints(witness, "boots: 1")
        unharmed = self.cloud.machines()
        mine = []
        for _ in range(10):
            act = chance.choice(["run", "stop", "start", "terminate"])
            try:
                if act == "run" and len(mine) < 3 or not mine:
                    mine.append(run())
                elif act == "terminate":
                    ec2.terminate_instances(InstanceIds=[mine.pop(chance.randrange(len(mine)))])
                elif act == "start":
                    ec2.start_instances(InstanceIds=[chance.choice(mine)])
                else:
                    ec2.stop_instances(InstanceIds=[chance.choice(mine)])
            except botocore.exceptions.ClientError as error:
                self.assertEqual(error.response["Error"]["Code"], "IncorrectInstanceState")
            time.sleep(chance.random() * 2)
            cloud.end("KILL")
            cloud.start()
        settled = {"running", "stopped", "terminated"}
        states = lambda: {i["InstanceId"]: i["State"]["Name"] for r in ec2.describe_instances()["Reservations"]
                          for i in r["Instances"]}
        self.eventually(lambda: set(states().values()) <= settled, "all is settled")
        running = sorted(id for id, state in states().items() if state == "running")
        say(f"10 kills: {len(running)} of {len(states())} run")
        machines = self.cloud.machines()
        self.assertEqual(len(machines), len(running), "each runs once")
        self.assertEqual([pid for pid in unharmed if pid not in machines], [], "no guest died")
        self.assertEqual(self.console(witness).count("boots: "), 1)
        for instance in running:
            self.prints(instance, "READY")
        known = sorted(volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"])
        files = host("bash", "-c", f"cd {cloud.state}/{REGION}/host/volumes; ls *.json").split()
        self.assertEqual(sorted(file.removesuffix(".json") for file in files), known, "no volume was lost or forgotten")
        alive = [id for id, state in states().items() if state != "terminated"]
        ec2.terminate_instances(InstanceIds=alive)
        for instance in alive:
            self.becomes(instance, "terminated")
        self.assertEqual(self.cloud.machines(), [])

    def test_the_host_does_what_every_host_has_to(self):
        programs = self.cloud.programs
        host("env", f"HUTCH_STATE={self.cloud.state}", f"HUTCH_VMM={programs / 'hutch-vmm'}",
             f"HUTCH_IMPORTER={programs / 'hutch-import-worker'}", "unshare", "-n", "sh", "-c",
             f"export HUTCH_MICRO={self.work}; ip link set lo up; exec {os.environ['HUTCH_HOST_SUITE']} --ignored the_local_host", timeout=2 * ENOUGH)
        say("the suite of all hosts")

    def test_an_instance_boots_a_kernel_and_a_ramdisk_of_ones_own(self):
        ec2, cloud = self.ec2, self.cloud
        cloud.hutch_image("import", "--kernel", self.work / "vmlinuz", "--name", "own-kernel")
        cloud.hutch_image("import", "--ramdisk", self.work / "own-initrd", "--name", "own-ramdisk")
        named = lambda name: [i["ImageId"] for i in ec2.describe_images(Filters=[{"Name": "name", "Values": [name]}])["Images"]]
        (aki,) = self.eventually(lambda: named("own-kernel"), "the kernel is an image")
        (ari,) = self.eventually(lambda: named("own-ramdisk"), "the RAM disk is an image")
        (image,) = named("bare")
        run = lambda **more: ec2.run_instances(
            ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", **more)["Instances"][0]["InstanceId"]
        one = run(KernelId=aki, RamdiskId=ari)
        self.becomes(one, "running")
        self.prints(one, f"own RAM disk: {aki} {ari}")
        self.prints(one, "boots: 1 disks: 1 READY")
        # Its disk is checked and written to a file while it runs: what it wrote is there.
        root = self.instance(one)["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]
        say(self.hutch("volume", "check", root))
        self.hutch("volume", "export", root, f"{cloud.state}/exported.raw")
        copy = self.work / "exported.raw"
        host("sh", "-c", f"cd {cloud.state} && sha256sum -c exported.raw.sha256 && cp --sparse=always exported.raw {copy} && rm exported.raw*")
        # As after a loss of power: the journal is replayed first.
        self.assertIn(subprocess.run(["e2fsck", "-fy", copy], stdout=subprocess.DEVNULL).returncode, (0, 1))
        boots = subprocess.run(["debugfs", "-R", "cat boots", copy], check=True, capture_output=True, text=True).stdout
        self.assertEqual(boots, "boot\n")
        say("what it wrote is in a file")
        # The images go; who was started with them starts again, also after a reboot.
        ec2.deregister_image(ImageId=aki)
        for name in ("own-kernel", "own-ramdisk"):
            cloud.hutch_image("rm", name)
        ec2.reboot_instances(InstanceIds=[one])
        self.prints(one, "boots: 2 disks: 1 READY")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        # By itself the image has nothing to boot, and a kernel alone is told where its root is, and has no RAM disk.
        ec2.reset_instance_attribute(InstanceId=one, Attribute="ramdisk")
        ec2.start_instances(InstanceIds=[one])
        self.prints(one, "Kernel command line: root=/dev/vda hutch.cmd=")
        self.prints(one, "Unable to mount root fs")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        ec2.reset_instance_attribute(InstanceId=one, Attribute="kernel")
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertIn("/boot/vmlinuz", self.instance(one)["StateReason"]["Message"])
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

    def test_a_backup_is_made_while_guests_run(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[
            {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 1, "DeleteOnTermination": True}}])
        one = made["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        self.prints(one, "boots: 1 disks: 2 READY")
        figures = json.loads(self.hutch("top", "--once", "-o", "json"))
        row = next(row for row in figures if row["id"] == one)
        say(f"top: {row}")
        self.assertGreater(row["memory"], 10 << 20)
        self.assertTrue(all(row[name] is not None for name in ["cpu", "disk_read", "disk_written", "net_received", "net_sent"]))
        machines = cloud.machines()
        # What it says of its progress comes before.
        told = self.hutch("backup", f"{cloud.state}.backup", "-o", "json")
        told = json.loads(told[told.index("{"):])
        say(f"backup: {told}")
        self.assertEqual((told["instances"], told["volumes"]), (1, 2))
        self.assertEqual(cloud.machines(), machines, "it runs on")
        self.assertEqual(host("ls", f"{cloud.state}/{REGION}/host").split(), ["keys", "layers", "machines", "snapshots", "volumes"])
        ec2.reboot_instances(InstanceIds=[one])
        self.prints(one, "boots: 2 disks: 2 READY")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

        # The state of the backup, in the place of the one that goes: the guest's disks are as they were then.
        first = cloud.state
        cloud.end("TERM")
        cloud.state = f"{first}.again"
        say(self.hutch("restore", f"{first}.backup", "--state", cloud.state))
        cloud.start()
        self.becomes(one, "stopped")
        self.assertIn("the host went down", self.instance(one)["StateReason"]["Message"])
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: self.console(one).count("boots: 2 disks: 2 READY") == 1, "its disks are those of the backup")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        cloud.end("TERM")
        host("rm", "-rf", cloud.state, f"{first}.backup")
        cloud.state = first
        cloud.start()
