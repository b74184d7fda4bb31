"""What is on their disks, in real guests."""

import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import time

import botocore.exceptions

from cloud import ENOUGH, host, REGION, say, Story


class Disks(Story):
    def test_what_a_guest_writes_to_an_encrypted_volume_is_in_no_file(self):
        ec2, cloud, marker = self.ec2, self.cloud, "plain-42-for-all-to-see"
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run(**disk):
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[
                {"DeviceName": "/dev/xvda", "Ebs": {"Encrypted": True}},
                {"DeviceName": "/dev/sdf", "Ebs": {"VolumeSize": 2, "DeleteOnTermination": True, **disk}}])
            self.becomes(made["Instances"][0]["InstanceId"], "running")
            return made["Instances"][0]["InstanceId"]

        def files_with(text):
            return host("bash", "-c", f"grep -l -a -r {text} {cloud.state}/{REGION}/host/layers | wc -l").strip()

        one = run(Encrypted=True)
        self.prints(one, "found: ;")
        self.prints(one, "marked;")
        volume = next(d["Ebs"]["VolumeId"] for d in self.instance(one)["BlockDeviceMappings"] if d["DeviceName"] == "/dev/sdf")
        # While it runs.
        snapshot = ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
        taken = lambda: ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]
        self.eventually(lambda: taken()["State"] == "completed", snapshot)
        self.assertTrue(taken()["Encrypted"])
        two = run(SnapshotId=snapshot)
        self.prints(two, f"found: {marker};")
        ec2.terminate_instances(InstanceIds=[two])
        ec2.stop_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertEqual(files_with(marker), "0")
        # What wraps its key is gone: it does not start, and says why.
        keys = f"{cloud.state}/keys"
        host("mv", keys, f"{keys}.apart")
        cloud.end("TERM")
        cloud.start()
        ec2.start_instances(InstanceIds=[one])
        self.eventually(lambda: self.instance(one).get("StateReason", {}).get("Code", "").startswith("Client.InvalidKMSKey"), "why not")
        self.becomes(one, "stopped")
        say(self.instance(one)["StateReason"]["Message"])
        cloud.end("TERM")
        host("bash", "-c", f"rm -r {keys} && mv {keys}.apart {keys}")
        cloud.start()
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.prints(one, f"found: {marker};")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        # The search would have found it.
        three = run()
        self.prints(three, "marked;")
        ec2.terminate_instances(InstanceIds=[three])
        self.assertNotEqual(files_with(marker), "0")
        self.becomes(three, "terminated")
        ec2.delete_snapshot(SnapshotId=snapshot)

    def test_an_instance_store_is_a_runs_own(self):
        ec2, cloud, marker = self.ec2, self.cloud, "plain-42-for-all-to-see"
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="own.stored")
        one = made["Instances"][0]["InstanceId"]
        machine = f"{cloud.state}/{REGION}/host/machines/{one}"
        files_with = lambda: host("bash", "-c", f"grep -l -a -r {marker} {machine} --include=*.store | wc -l").strip()
        times = lambda text: self.console(one).count(text)
        self.becomes(one, "running")
        self.prints(one, "found: ;")
        self.prints(one, "marked;")
        # A reboot, of which another daemon sees the end.
        ec2.reboot_instances(InstanceIds=[one])
        cloud.end("KILL")
        cloud.start()
        self.prints(one, f"found: {marker};")
        self.eventually(lambda: times("marked;") == 2, "it is marked again")
        self.assertEqual(files_with(), "1")
        ec2.stop_instances(InstanceIds=[one])
        self.becomes(one, "stopped")
        self.assertEqual(files_with(), "0")
        self.assertEqual(host("bash", "-c", f"ls {machine}/*.store 2>/dev/null | wc -l").strip(), "0")
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: times("found: ;") == 2, "zeros in the next run")
        self.eventually(lambda: times("marked;") == 3, "it is marked once more")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(host("bash", "-c", f"ls -d {machine} 2>/dev/null | wc -l").strip(), "0")

    def test_a_root_on_instance_store_is_a_runs_own(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        run = lambda image: ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        marker = lambda id: "mark-" + id.translate(str.maketrans("0123456789", "ghijklmnop"))
        files_with = lambda id: len(host("bash", "-c", f"grep -r -l -a {marker(id)} {cloud.state} || true").split())
        first = run(image)
        self.prints(first, "boots: 1")
        self.assertEqual(files_with(first), 1)
        # Its root as it is while it runs: it has booted once.
        task = ec2.bundle_instance(InstanceId=first, Storage={"S3": {"Bucket": "stories", "Prefix": "micro/1"}})["BundleTask"]["BundleId"]
        told = lambda: ec2.describe_bundle_tasks(BundleIds=[task])["BundleTasks"][0]
        self.eventually(lambda: told()["State"] in ("complete", "failed"), "the bundle is written")
        self.assertEqual(told()["State"], "complete", told())
        ec2.terminate_instances(InstanceIds=[first])
        own = ec2.register_image(Name="micro on instance store", ImageLocation="stories/micro/1.manifest.xml")["ImageId"]
        one = run(own)
        self.prints(one, "boots: 2")
        self.assertEqual((self.instance(one)["RootDeviceType"], self.instance(one)["BlockDeviceMappings"]), ("instance-store", []))
        self.assertEqual(files_with(one), 1)
        # A reboot, of which another daemon sees the end.
        ec2.reboot_instances(InstanceIds=[one])
        cloud.end("KILL")
        cloud.start()
        self.prints(one, "boots: 3")
        with self.assertRaises(botocore.exceptions.ClientError) as refused:
            ec2.stop_instances(InstanceIds=[one])
        self.assertEqual(refused.exception.response["Error"]["Code"], "UnsupportedOperation")
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        self.assertEqual(files_with(one), 0, "what it wrote is in no file")
        # The next one begins as the bundle does, from what the host kept of it.
        two = run(own)
        self.prints(two, "boots: 2")
        ec2.terminate_instances(InstanceIds=[two])
        self.becomes(two, "terminated")
        ec2.deregister_image(ImageId=own)

    def test_a_volume_is_as_slow_as_it_says_and_grows_under_its_guest(self):
        ec2 = self.ec2
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        disk = {"VolumeSize": 4, "VolumeType": "io1", "Iops": 100, "DeleteOnTermination": True}
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano",
                                 BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": disk}])
        one = made["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        # The bucket holds a tenth of a second's; the rest comes a hundred a second.
        self.prints(one, "500 reads from")
        began, ended = re.search(r"500 reads from ([0-9.]+) to ([0-9.]+);", self.console(one)).groups()
        took = float(ended) - float(began)
        say(f"500 reads of 100 a second took {took:.2f} s")
        self.assertGreaterEqual(took, 4.8)
        data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
        serial = data.replace("-", "")
        self.prints(one, f"{serial}={4 << 21}")
        ec2.modify_volume(VolumeId=data, Size=5, Iops=250)
        self.prints(one, f"{serial}={5 << 21}")
        state = lambda: ec2.describe_volumes_modifications(VolumeIds=[data])["VolumesModifications"][0]["ModificationState"]
        self.eventually(lambda: state() == "completed", "the change is completed")
        self.assertEqual(self.console(one).count("boots: "), 1)
        snapshots = ec2.create_snapshots(InstanceSpecification={"InstanceId": one})["Snapshots"]
        ids = [snapshot["SnapshotId"] for snapshot in snapshots]
        ec2.get_waiter("snapshot_completed").wait(SnapshotIds=ids, WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        self.assertEqual(sorted(snapshot["VolumeSize"] for snapshot in snapshots)[-1], 5)
        for snapshot in ids:
            ec2.delete_snapshot(SnapshotId=snapshot)
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

    def test_a_hundred_volumes_come_to_a_guest_and_go(self):
        ec2 = self.ec2
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        names = [f"/dev/sd{a}" for a in "bcdefghijklmnopqrstuvwxyz"] + [f"/dev/xvd{a}{b}" for a in "bcd" for b in "abcdefghijklmnopqrstuvwxyz"]
        # With one vCPU: it has not vectors enough for all of them.
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t2.micro")
        one = made["Instances"][0]["InstanceId"]
        zone = made["Instances"][0]["Placement"]["AvailabilityZone"]
        self.becomes(one, "running")
        self.prints(one, "boots: 1 disks: 1 READY")
        (process,) = self.cloud.machines()

        def process_has(when):
            told = host("bash", "-c", f"cd /proc/{process}; grep -E 'VmRSS|RssAnon|Threads' status; echo files $(ls fd | wc -l); "
                        "a=$(cut -d' ' -f14,15 stat); sleep 10; echo CPU ticks in 10 s: $a to $(cut -d' ' -f14,15 stat)")
            say(f"its process {when}: {' '.join(told.split())}")

        process_has("with one volume")
        volumes = self.at_once(lambda ec2, n: ec2.create_volume(AvailabilityZone=zone, Size=6 if n % 40 == 19 else 1)["VolumeId"], range(100))
        written = [volumes[n].replace("-", "") for n in range(100) if n % 40 == 19]
        told = lambda: ec2.describe_volumes(VolumeIds=volumes)["Volumes"]
        available = lambda: {volume["State"] for volume in told()} == {"available"}
        self.eventually(available, "they are made")
        began = time.monotonic()
        self.at_once(lambda ec2, n: ec2.attach_volume(VolumeId=volumes[n], InstanceId=one, Device=names[n]), range(100))
        self.eventually(lambda: {volume["Attachments"][0]["State"] for volume in told()} == {"attached"}, "all are attached")
        say(f"a hundred volumes are attached after {time.monotonic() - began:.0f} s")
        found = lambda: [set(all.split()) for all in re.findall(r"many: 101:(.*);", self.console(one))]
        self.eventually(found, "its kernel finds them")
        say(f"its kernel had them after {time.monotonic() - began:.0f} s")
        serials = {volume.replace("-", "") for volume in volumes}
        self.assertEqual((len(found()[0]), serials - found()[0]), (101, set()))
        for serial in written:
            self.prints(one, f"{serial} has: ;")
            self.prints(one, f"{serial} is written;")
        process_has("with a hundred and one")
        ec2.reboot_instances(InstanceIds=[one])
        self.eventually(lambda: len(found()) == 2, "they are there again")
        self.assertEqual((len(found()[1]), serials - found()[1]), (101, set()))
        for serial in written:
            self.prints(one, f"{serial} has: what is of {serial};")
        began = time.monotonic()
        self.at_once(lambda ec2, volume: ec2.detach_volume(VolumeId=volume), volumes)
        self.eventually(available, "the guest lets them all go")
        say(f"its kernel has let a hundred go after {time.monotonic() - began:.0f} s")
        self.assertEqual(len(self.instance(one)["BlockDeviceMappings"]), 1)
        self.at_once(lambda ec2, volume: ec2.delete_volume(VolumeId=volume), volumes)
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")

        # So many from the start.
        devices = [{"DeviceName": name, "Ebs": {"VolumeSize": 1, "DeleteOnTermination": True}} for name in names[:40]]
        made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=devices)
        two = made["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "many: 41:")
        ec2.terminate_instances(InstanceIds=[two])
        self.becomes(two, "terminated")

    def test_snapshots_of_a_guest_that_writes_lose_nothing_it_was_told_is_kept(self):
        ec2, cloud = self.ec2, self.cloud
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]

        def run(**disk):
            mapping = {"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True, **disk}}
            made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])
            return made["Instances"][0]["InstanceId"]

        def told(instance, what):
            return [int(n) for n in re.findall(what + r": (\d+);", self.console(instance))]

        one = run(VolumeSize=3)
        self.becomes(one, "running")
        self.prints(one, "kept: none;")
        data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
        layers = lambda: host("bash", "-c", f"cd {cloud.state}/{REGION}/host/layers; ls -s").split("\n")
        taken = []
        for turn in range(4):
            more = len(told(one, "acked")) + 5
            self.eventually(lambda: len(told(one, "acked")) > more, "it writes")
            acked = told(one, "acked")[-1]
            began = time.monotonic()
            snapshot = ec2.create_snapshot(VolumeId=data)["SnapshotId"]
            if turn == 2:
                cloud.end("KILL")
                cloud.start()
            done = lambda: ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]["State"]
            self.eventually(lambda: done() != "pending", "the snapshot is made")
            self.assertEqual(done(), "completed")
            say(f"snapshot {turn} after {acked}, in {time.monotonic() - began:.2f} s")
            taken.append((snapshot, acked))
        usage = {row["id"]: row for row in json.loads(self.hutch("usage", "-o", "json"))}
        say(f"usage: {usage}")
        self.assertGreater(usage[data]["alone"], 0)
        self.assertEqual([usage[snapshot]["alone"] for snapshot, _ in taken], [0] * 4, "the volume has all they have")
        # The first two go while the guest writes; what the others need of them stays.
        for snapshot, _ in taken[:2]:
            ec2.delete_snapshot(SnapshotId=snapshot)
        self.assertEqual(len(self.cloud.machines()), 1)

        # Killed, it finds all that it was told is kept.
        host("kill", "-9", *self.cloud.machines())
        self.becomes(one, "stopped")
        acked = told(one, "acked")[-1]
        ec2.start_instances(InstanceIds=[one])
        self.becomes(one, "running")
        self.eventually(lambda: told(one, "kept"), "it tells what it kept")
        kept = told(one, "kept")[-1]
        say(f"killed after {acked} it kept {kept}")
        self.assertGreaterEqual(kept, acked)

        # A volume of each snapshot begins with what was kept then.
        for snapshot, acked in taken[2:]:
            two = run(SnapshotId=snapshot)
            self.becomes(two, "running")
            self.eventually(lambda: told(two, "kept"), "it tells what it kept")
            kept = told(two, "kept")[0]
            say(f"a snapshot taken after {acked} has {kept}")
            self.assertGreaterEqual(kept, acked)
            self.assertLessEqual(kept, told(one, "kept")[-1])
            ec2.terminate_instances(InstanceIds=[two])
            self.becomes(two, "terminated")
        say(layers())
        ec2.terminate_instances(InstanceIds=[one])
        self.becomes(one, "terminated")
        for snapshot, _ in taken[2:]:
            ec2.delete_snapshot(SnapshotId=snapshot)
        self.eventually(lambda: layers() == ["total 0", ""], "all of it is given back")

    def test_a_database_has_all_it_committed_however_often_its_machine_is_killed(self):
        ec2, cloud = self.ec2, self.cloud
        kills, dice = int(os.environ.get("HUTCH_KILLS", "4")), random.Random()
        seed = os.environ.get("HUTCH_SEED") or dice.randrange(1 << 32)
        dice.seed(int(seed))
        say(f"{kills} kills, HUTCH_SEED={seed}")
        # A file system with the programs, which the guest does not have.
        tree = self.work / "data"
        (tree / "lib").mkdir(parents=True)
        for program in ("sqlite3", "e2fsck"):
            path = shutil.which(program)
            shutil.copy(path, tree / "lib")
            for library in re.findall(r"(/\S+) \(", subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout):
                shutil.copy(library, tree / "lib" / ("ld.so" if "/ld-" in library else pathlib.Path(library).name))
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", tree, self.work / "data.raw", "7G"], check=True)
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", self.work / "data.raw", self.work / "data.qcow2"], check=True)
        self.hutch("volume", "import", "--name", "database", self.work / "data.qcow2")
        (volume,) = ec2.describe_volumes(Filters=[{"Name": "tag:Name", "Values": ["database"]}])["Volumes"]
        image = ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
        one = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano")["Instances"][0]["InstanceId"]
        self.becomes(one, "running")
        ec2.stop_instances(InstanceIds=[one], Force=True)
        self.becomes(one, "stopped")
        ec2.attach_volume(InstanceId=one, VolumeId=volume["VolumeId"], Device="/dev/sdf")
        layers = f"{cloud.state}/{REGION}/host/layers"
        committed, snapshots, boot = 0, [], 0
        said = lambda what: re.findall(what, self.console(one))
        for kill in range(kills):
            ec2.start_instances(InstanceIds=[one])
            self.becomes(one, "running")
            boot = self.eventually(lambda: max([int(n) for n in said(r"committed (\d+): ") if int(n) > boot], default=0), "it commits")
            self.assertEqual(said(rf"fsck {boot}: (.*);"), ["0"], self.console(one))
            ((sound, has),) = said(rf"database {boot}: (.*), has (\d+);")
            self.assertEqual(sound, "ok, 0 spoilt")
            self.assertGreaterEqual(int(has), committed)
            if dice.random() < 0.6:
                time.sleep(dice.uniform(0, 2))
                made = ec2.create_snapshot(VolumeId=volume["VolumeId"])["SnapshotId"]
                snapshots.append(made)
            if len(snapshots) > 1 and dice.random() < 0.5:
                ec2.delete_snapshot(SnapshotId=snapshots.pop(dice.randrange(len(snapshots))))
            time.sleep(dice.uniform(0, 5))
            host("kill", "-9", *cloud.machines())
            self.becomes(one, "stopped")
            committed = int(said(rf"committed {boot}: (\d+);")[-1])
            say(f"kill {kill}: it had {has}, and committed {committed}")
            # 3: clusters that nothing names, which the next opening frees.
            check = f"for f in {layers}/*.qcow2; do qemu-img check -q -f qcow2 $f >&2; s=$?; [ $s = 0 ] || [ $s = 3 ] || exit $s; done"
            host("bash", "-c", check)
        # What it had at the end it has on a volume of a snapshot, and gives all of it back.
        last = ec2.create_snapshot(VolumeId=volume["VolumeId"])["SnapshotId"]
        ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[last], WaiterConfig={"Delay": 1, "MaxAttempts": ENOUGH})
        for snapshot in snapshots:
            ec2.delete_snapshot(SnapshotId=snapshot)
        mapping = {"DeviceName": "/dev/sdf", "Ebs": {"SnapshotId": last, "DeleteOnTermination": True}}
        two = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])["Instances"][0]["InstanceId"]
        self.becomes(two, "running")
        self.prints(two, "fsck 1: 0;")
        self.prints(two, "database 1: ok, 0 spoilt, has")
        has = int(re.search(r"spoilt, has (\d+);", self.console(two)).group(1))
        self.assertGreaterEqual(has, committed)
        ec2.terminate_instances(InstanceIds=[one, two])
        for instance in (one, two):
            self.becomes(instance, "terminated")
        host("bash", "-c", f"for f in {layers}/*.qcow2; do qemu-img check -q -f qcow2 $f || exit; done")
        ec2.delete_snapshot(SnapshotId=last)
        ec2.delete_volume(VolumeId=volume["VolumeId"])
        self.eventually(lambda: host("ls", layers) == "", "all of it is given back")

    def test_a_guest_waits_while_the_host_is_full(self):
        # hutchd on a file system of its own, which is small.
        first, cloud = self.cloud.state, self.cloud
        cloud.end("TERM")
        cloud.state = f"{first}.small"
        host("mkdir", cloud.state)
        host("mount", "-t", "tmpfs", "-o", "size=200m", "none", cloud.state)
        try:
            cloud.image()
            cloud.start()
            image = self.ec2.describe_images(Filters=[{"Name": "name", "Values": ["micro"]}])["Images"][0]["ImageId"]
            mapping = {"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True, "VolumeSize": 3}}
            made = self.ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.nano", BlockDeviceMappings=[mapping])
            one = made["Instances"][0]["InstanceId"]
            self.becomes(one, "running")
            self.prints(one, "acked: 3;")
            data = self.instance(one)["BlockDeviceMappings"][1]["Ebs"]["VolumeId"]
            status = lambda: self.ec2.describe_volume_status(VolumeIds=[data])["VolumeStatuses"][0]
            self.assertEqual((status()["VolumeStatus"]["Status"], status()["Events"]), ("ok", []))
            host("sh", "-c", f"cat /dev/zero >{cloud.state}/full", check=False)
            self.eventually(lambda: status()["VolumeStatus"]["Status"] == "impaired", "the volume waits")
            self.assertEqual(status()["Events"][0]["EventType"], "io-performance:stalled")
            self.assertEqual(self.instance(one)["State"]["Name"], "running")
            acked = lambda: int(re.findall(r"acked: (\d+);", self.console(one))[-1])
            stood = acked()
            say(f"the host is full, and the guest waits after {stood}")
            time.sleep(3)
            self.assertEqual(acked(), stood)
            host("rm", f"{cloud.state}/full")
            self.eventually(lambda: acked() > stood + 3, "it goes on")
            self.eventually(lambda: status()["VolumeStatus"]["Status"] == "ok", "the volume waits no more")
            self.ec2.terminate_instances(InstanceIds=[one])
            self.becomes(one, "terminated")
        finally:
            cloud.end("TERM")
            host("umount", cloud.state, check=False)
            host("rmdir", cloud.state, check=False)
            cloud.state = first
            cloud.start()
