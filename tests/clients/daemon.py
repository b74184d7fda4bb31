"""A hutchd of the test's own, on a free port, and clients of it."""

import os
import subprocess
import tempfile
import time
import unittest

import boto3
import botocore.config

KEY, SECRET, REGION = "AKIDTEST", "secret-of-a-test", "home-1"


class Daemon:
    ENVIRONMENT = {}

    def __init__(self, *options, zones="ab"):
        self.state = tempfile.TemporaryDirectory()
        self.options = ["--zones", zones, *options]
        self.start()

    def start(self):
        command = [os.environ["HUTCHD"], "--host", "simulated", "--listen", "127.0.0.1:0"]
        command += ["--state", self.state.name, "--root-key", f"{KEY}:{SECRET}", *self.options]
        self.log, self.command = tempfile.TemporaryFile(), command
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env={**os.environ, **self.ENVIRONMENT})
        line = self.process.stdout.readline()
        if "http://" not in line:
            self.log.seek(0)
            raise RuntimeError(self.log.read().decode())
        self.url = line.split()[-1]

    def client(self, service="ec2", key=KEY, secret=SECRET, region=REGION, **more):
        config = botocore.config.Config(retries={"total_max_attempts": 1}, **more)
        return boto3.client(service, endpoint_url=self.url, region_name=region, aws_access_key_id=key,
                            aws_secret_access_key=secret, config=config)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def stop(self):
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self.process.stdout.close()
        self.log.close()
        self.state.cleanup()
        return code


class Case(unittest.TestCase):
    OPTIONS = ("--rate", "0")
    DAEMON = Daemon

    @classmethod
    def setUpClass(cls):
        cls.daemon = cls.DAEMON(*cls.OPTIONS)
        cls.ec2 = cls.daemon.client()
        images = cls.ec2.describe_images(Filters=[{"Name": "name", "Values": ["debian-12"]}])["Images"]
        cls.image = images[0]["ImageId"]

    @classmethod
    def tearDownClass(cls):
        cls.ec2.close()
        assert cls.daemon.stop() == 0

    def fails(self, code, call, *args, **kwargs):
        with self.assertRaises(botocore.exceptions.ClientError) as caught:
            call(*args, **kwargs)
        self.assertEqual(caught.exception.response["Error"]["Code"], code, caught.exception)
        return caught.exception.response

    def run_one(self, **more):
        made = self.ec2.run_instances(ImageId=self.image, MinCount=1, MaxCount=1, InstanceType="t3.micro", **more)
        return made["Instances"][0]["InstanceId"]

    def wait(self, name, instance):
        waiter = self.ec2.get_waiter(name)
        waiter.wait(InstanceIds=[instance], WaiterConfig={"Delay": 0.05, "MaxAttempts": 600})

    def instance(self, instance):
        return self.ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]

    def eventually(self, check):
        until = time.monotonic() + 60
        while not check():
            self.assertLess(time.monotonic(), until, "it does not come to pass")
            time.sleep(0.05)
