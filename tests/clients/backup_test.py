"""hutch backup and restore: of a hutchd on the simulated host that is busy, and of one that is killed meanwhile."""

import json
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import threading

import botocore.exceptions

from daemon import KEY, SECRET, Case, Daemon

HUTCH = pathlib.Path(os.environ["HUTCHD"]).with_name("hutch")


def hutch(daemon, *words, code=0, key=KEY, secret=SECRET, wait=True):
    environment = dict(os.environ, HUTCH_ENDPOINT=daemon.url, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
    for name in ["AWS_DEFAULT_REGION", "HUTCH_STATE"]:
        environment.pop(name, None)
    done = subprocess.Popen([HUTCH, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if not wait:
        return done
    out, err = done.communicate(timeout=120)
    assert done.returncode == code, out + err
    return out if code == 0 else err


class Restored(Daemon):
    """A hutchd on a state that is there already."""

    def __init__(self, state, *options):
        self.state = state
        self.options = ["--zones", "ab", "--rate", "0", *options]
        self.start()


class Place:
    """A directory that a Daemon takes for its state, and leaves."""

    def __init__(self, path):
        self.name = str(path)

    def cleanup(self):
        pass


def told(ec2):
    """All that a client sees, but for what passes by itself."""
    instances = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    return {
        "instances": {i["InstanceId"]: (i["State"]["Name"], i["ImageId"], i["PrivateIpAddress"], [b["Ebs"]["VolumeId"] for b in i["BlockDeviceMappings"]], i.get("Tags"))
                      for i in instances if i["State"]["Name"] != "terminated"},
        "volumes": {v["VolumeId"]: (v["Size"], v["State"]) for v in ec2.describe_volumes()["Volumes"]},
        "snapshots": {s["SnapshotId"]: (s["VolumeId"], s["State"]) for s in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]},
        "images": {i["ImageId"]: (i["Name"], i["State"]) for i in ec2.describe_images(Owners=["self"])["Images"]},
        "groups": {g["GroupId"]: g["GroupName"] for g in ec2.describe_security_groups()["SecurityGroups"]},
        "keys": {k["KeyName"]: k["KeyFingerprint"] for k in ec2.describe_key_pairs()["KeyPairs"]},
    }


class Backup(Case):
    OPTIONS = ("--rate", "0", "--delay", "5")

    def setUp(self):
        self.home = tempfile.TemporaryDirectory()
        self.addCleanup(self.home.cleanup)
        self.dir = pathlib.Path(self.home.name)

    def restored(self, backup, *options):
        state = self.dir / "state"
        made = json.loads(hutch(self.daemon, "restore", backup, "--state", state, "-o", "json"))
        self.assertEqual(made["path"], str(state))
        daemon = Restored(Place(state), *options)
        self.addCleanup(daemon.stop)
        ec2 = daemon.client()
        self.addCleanup(ec2.close)
        return daemon, ec2

    def test_all_is_there_again(self):
        pathlib.Path(self.daemon.state.name, "limits.toml").write_text("groups-per-interface = 7")
        self.ec2.create_key_pair(KeyName="kept")
        self.ec2.create_security_group(GroupName="kept", Description="of the backup")
        tags = [{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "kept"}]}]
        running, stopped = self.run_one(TagSpecifications=tags), self.run_one()
        for instance in [running, stopped]:
            self.wait("instance_running", instance)
        self.ec2.stop_instances(InstanceIds=[stopped])
        self.wait("instance_stopped", stopped)
        volume = self.ec2.create_volume(AvailabilityZone="home-1a", Size=3)["VolumeId"]
        self.ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.05})
        snapshot = self.ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
        self.ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 0.05})
        image = self.ec2.create_image(InstanceId=stopped, Name="kept")["ImageId"]
        self.ec2.get_waiter("image_available").wait(ImageIds=[image], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})
        busy = {"pending", "stopping", "shutting-down"}
        # Those of the other tests, too.
        self.eventually(lambda: not busy & {i[0] for i in told(self.ec2)["instances"].values()})
        before = told(self.ec2)

        backup = self.dir / "backup"
        made = json.loads(hutch(self.daemon, "backup", backup, "-o", "json"))
        self.assertEqual((made["path"], made["instances"], made["volumes"]), (str(backup), len(before["instances"]), len(before["volumes"])))
        self.assertEqual(told(self.ec2), before, "a backup changes nothing")
        self.assertIn("is whole", hutch(self.daemon, "restore", backup, "--check"))
        self.assertIn("is not empty", hutch(self.daemon, "backup", backup, code=240))
        inside = pathlib.Path(self.daemon.state.name, "own")
        self.assertIn("lies in the state", hutch(self.daemon, "backup", inside, code=240))
        self.assertIn("is not empty", hutch(self.daemon, "restore", backup, "--state", self.daemon.state.name, code=240))

        _, again = self.restored(backup)
        self.eventually(lambda: {i[0] for i in told(again)["instances"].values()} == {"stopped"})
        before["instances"] = {id: ("stopped", *i[1:]) for id, i in before["instances"].items()}
        self.assertEqual(told(again), before)
        self.assertEqual((self.dir / "state/limits.toml").read_text(), "groups-per-interface = 7")
        again.start_instances(InstanceIds=[running])
        new = again.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType="t3.micro", KeyName="kept")["Instances"][0]["InstanceId"]
        made = again.create_volume(AvailabilityZone="home-1a", SnapshotId=snapshot)["VolumeId"]
        again.get_waiter("volume_available").wait(VolumeIds=[made], WaiterConfig={"Delay": 0.05})
        self.eventually(lambda: all(told(again)["instances"][id][0] == "running" for id in [running, new]))
        self.assertEqual(self.instance(running)["State"]["Name"], "running", "the first one goes on")

    def test_what_ran_is_started_where_that_is_asked_for(self):
        one = self.run_one()
        self.wait("instance_running", one)
        hutch(self.daemon, "backup", self.dir / "backup")
        _, again = self.restored(self.dir / "backup", "--resume")
        self.eventually(lambda: told(again)["instances"][one][0] == "running")

    def test_a_busy_one_is_whole(self):
        chance, over = random.Random(os.environ.get("HUTCH_SEED", "backup")), threading.Event()
        failed = []

        def work(number):
            ec2, own = self.daemon.client(), []
            try:
                while not over.is_set():
                    match chance.randrange(6):
                        case 0 | 1:
                            own.append(self.run_one())
                        case 2 if own:
                            ec2.terminate_instances(InstanceIds=[own.pop()])
                        case 3:
                            volume = ec2.create_volume(AvailabilityZone="home-1a", Size=1)["VolumeId"]
                            ec2.get_waiter("volume_available").wait(VolumeIds=[volume], WaiterConfig={"Delay": 0.01})
                            ec2.create_snapshot(VolumeId=volume)
                            ec2.delete_volume(VolumeId=volume)
                        case 4 if own:
                            ec2.create_image(InstanceId=own[-1], Name=f"busy-{number}-{chance.random()}")
                        case 5 if own:
                            ec2.stop_instances(InstanceIds=[own[-1]])
            except botocore.exceptions.ClientError as error:
                # What is not in the right state just now is no concern of this test.
                if not error.response["Error"]["Code"].startswith("Incorrect"):
                    failed.append(error)
            finally:
                ec2.close()

        workers = [threading.Thread(target=work, args=[number]) for number in range(4)]
        [worker.start() for worker in workers]
        backups = [self.dir / f"backup-{number}" for number in range(5)]
        for backup in backups:
            hutch(self.daemon, "backup", backup)
        over.set()
        [worker.join() for worker in workers]
        self.assertEqual(failed, [])
        for number, backup in enumerate(backups):
            state = self.dir / f"state-{number}"
            hutch(self.daemon, "restore", backup, "--state", state)
            daemon = Restored(Place(state))
            again = daemon.client()
            busy = {"pending", "stopping", "shutting-down"}
            self.eventually(lambda: not busy & {i[0] for i in told(again)["instances"].values()})
            self.eventually(lambda: all(s[1] == "completed" for s in told(again)["snapshots"].values()))
            self.eventually(lambda: all(i[1] == "available" for i in told(again)["images"].values()))
            now = told(again)
            self.assertNotIn("error", {v[1] for v in now["volumes"].values()})
            stopped = [id for id, i in now["instances"].items() if i[0] == "stopped"]
            if stopped:
                # All its volumes are there: the host looks.
                again.start_instances(InstanceIds=stopped)
                self.eventually(lambda: all(told(again)["instances"][id][0] == "running" for id in stopped))
            again.close()
            self.assertEqual(daemon.stop(), 0)


class CutOff(Case):
    """Backups that take a while, since a file of the state is large."""

    def setUp(self):
        self.home = tempfile.TemporaryDirectory()
        self.addCleanup(self.home.cleanup)
        with open(pathlib.Path(self.daemon.state.name, "large.json"), "wb") as file:
            file.truncate(20 << 30)

    def begin(self, name):
        backup = pathlib.Path(self.home.name, name)
        client = hutch(self.daemon, "backup", backup, wait=False)
        self.eventually(lambda: (backup / "state/home-1/store.db").exists())
        return backup, client

    def test_one_that_was_killed_is_none(self):
        backup, client = self.begin("killed")
        self.assertIn("is under way", hutch(self.daemon, "backup", f"{backup}-2", code=240))
        self.assertIsNone(client.poll(), "it is not done yet")
        self.daemon.kill()
        out, err = client.communicate(timeout=120)
        self.assertEqual(client.returncode, 240, out + err)
        self.daemon.start()
        self.assertTrue((backup / "state").exists())
        state = pathlib.Path(self.home.name, "state")
        self.assertIn("was cut off", hutch(self.daemon, "restore", backup, "--state", state, code=240))
        self.assertFalse(state.exists())
        self.assertIn("is not empty", hutch(self.daemon, "backup", backup, code=240))
        self.ec2.close()
        type(self).ec2 = self.daemon.client()

    def test_one_is_ended_with_its_daemon(self):
        backup, client = self.begin("stopped")
        self.daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(self.daemon.process.wait(timeout=60), 0)
        client.communicate(timeout=120)
        self.assertFalse(backup.exists(), "what is none takes no room")
        self.daemon.process.stdout.close()
        self.daemon.log.close()
        self.daemon.start()
        self.ec2.close()
        type(self).ec2 = self.daemon.client()


class Others(Case):
    OPTIONS = ("--rate", "0")

    def test_only_the_administrator_makes_one(self):
        keys = pathlib.Path(self.daemon.state.name, "keys.json")
        self.daemon.kill()
        keys.write_text(json.dumps([{"id": "AKIDOTHER", "secret": "other", "account": "000000000002"}]))
        self.daemon.start()
        said = hutch(self.daemon, "backup", "/nonexistent/backup", code=240, key="AKIDOTHER", secret="other")
        self.assertIn("UnauthorizedOperation", said)
        self.assertIn("no backup was made: cannot make /proc/nothing", hutch(self.daemon, "backup", "/proc/nothing", code=240))
        self.ec2.close()
        type(self).ec2 = self.daemon.client()

    def test_top_shows_states_where_nobody_counts(self):
        one = self.run_one()
        self.wait("instance_running", one)
        rows = json.loads(hutch(self.daemon, "top", "-o", "json"))
        row = next(row for row in rows if row["id"] == one)
        self.assertEqual((row["state"], row["cpu"], row["memory"], row["net_sent"]), ("running", None, None, None))
        self.assertIn("CPU %", hutch(self.daemon, "top", "--once"))
        self.assertEqual(hutch(self.daemon, "top", "--query", f"[?id=='{one}'].state", "-o", "text"), "running\n")
        self.assertIn("0.1 to 3600", hutch(self.daemon, "top", "--interval", "0", code=2))
