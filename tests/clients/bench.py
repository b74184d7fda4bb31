"""hutchd with 10,000 simulated instances, and 64 clients at once: `make bench-cloud` (a release build)."""

import concurrent.futures
import http.client
import statistics
import time

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from daemon import Daemon, KEY, REGION, SECRET

CREDENTIALS = botocore.credentials.Credentials(KEY, SECRET)
DESCRIBE = "Action=DescribeInstances&Version=2016-11-15&MaxResults=1000"
SECONDS = 30


class Raw:
    """One connection, without a client's own work on what is answered."""

    def __init__(self, daemon):
        self.host = daemon.url.removeprefix("http://")
        self.connection = http.client.HTTPConnection(self.host, timeout=120)

    def call(self, body):
        headers = {"content-type": "application/x-www-form-urlencoded", "Host": self.host}
        request = botocore.awsrequest.AWSRequest("POST", f"http://{self.host}/", headers=headers, data=body)
        botocore.auth.SigV4Auth(CREDENTIALS, "ec2", REGION).add_auth(request)
        self.connection.request("POST", "/", body, dict(request.headers))
        answer = self.connection.getresponse()
        return answer.status, answer.read()


def median(job, count):
    took = []
    for _ in range(count):
        started = time.monotonic()
        job()
        took.append(time.monotonic() - started)
    return statistics.median(took) * 1000


def crowd(daemon):
    """64 clients for half a minute: what they were answered."""
    until, statuses = time.monotonic() + SECONDS, {}

    def client(number):
        raw, told = Raw(daemon), {}
        while time.monotonic() < until:
            body = "Action=DescribeRegions&Version=2016-11-15"
            if number % 4 == 0:
                count = sum(told.values())
                body = f"Action=CreateSecurityGroup&Version=2016-11-15&GroupName={number}-{count}&GroupDescription=x"
            status, answer = raw.call(body)
            told[status] = told.get(status, 0) + 1
            assert status in (200, 503), answer
        return told

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        for told in pool.map(client, range(64)):
            for status, count in told.items():
                statuses[status] = statuses.get(status, 0) + count
    return statuses


daemon = Daemon("--rate", "0", zones="abc")
ec2 = daemon.client(read_timeout=300)
image = ec2.describe_images()["Images"][0]["ImageId"]
started = time.monotonic()
for n in range(10):
    ec2.run_instances(ImageId=image, MinCount=1000, MaxCount=1000, InstanceType="t3.nano",
                      Placement={"AvailabilityZone": REGION + "abc"[n % 3]})
raw = Raw(daemon)


def metrics():
    raw.connection.request("GET", "/metrics")
    return raw.connection.getresponse().read().decode()


while 'state="running"} 10000' not in metrics():
    assert time.monotonic() < started + 600, metrics()
    time.sleep(1)
resident = [line for line in open(f"/proc/{daemon.process.pid}/status") if line.startswith("VmRSS")][0].split()[1]
RUN = f"Action=RunInstances&Version=2016-11-15&ImageId={image}&MinCount=1&MaxCount=1&InstanceType=t3.nano"
print("| 10,000 simulated instances | |\n|---|---:|")
print(f"| until all of them run | {time.monotonic() - started:.1f} s |")
print(f"| DescribeInstances, a page of 1,000 | {median(lambda: raw.call(DESCRIBE), 9):.0f} ms |")
print(f"| RunInstances of one, accepted | {median(lambda: raw.call(RUN), 9):.1f} ms |")
print(f"| resident memory of hutchd | {int(resident) / 1024:.0f} MiB |")
print(f"| 64 clients for {SECONDS} s: answers by status | {crowd(daemon)} |")
ec2.close()
daemon.stop()
throttled = Daemon(zones="abc")
print(f"| the same with throttling | {crowd(throttled)} |")
throttled.stop()
