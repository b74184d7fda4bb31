"""What systemd is told and hands over, without systemd: its protocols are an environment and a datagram socket."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import tempfile
import unittest
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Systemd(unittest.TestCase):
    def test_it_says_that_it_is_ready_lives_and_ends_and_takes_sockets(self):
        with tempfile.TemporaryDirectory() as work:
            ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            ear.bind(f"{work}/notify")
            ear.settimeout(60)
            door = socket.create_server(("127.0.0.1", 0))
            port = door.getsockname()[1]
            # The process that reads LISTEN_PID has to be the one that is named there.
            script = 'exec 3<&$DOOR; export LISTEN_PID=$$ LISTEN_FDS=1 WATCHDOG_PID=$$; exec "$@"'
            command = ["bash", "-c", script, "sh", os.environ["HUTCHD"], "--host", "simulated", "--state", "memory",
                       "--root-key", "AKID:secret"]
            environment = dict(os.environ, NOTIFY_SOCKET=f"{work}/notify", WATCHDOG_USEC="400000", DOOR=str(door.fileno()))
            daemon = subprocess.Popen(command, env=environment, pass_fds=[door.fileno()], stdout=subprocess.DEVNULL)
            door.close()
            self.addCleanup(daemon.wait)
            self.addCleanup(daemon.kill)
            self.assertEqual(ear.recv(4096).strip(), b"READY=1")
            self.assertEqual(urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60).read().strip(), b"ok")
            for _ in range(3):
                self.assertEqual(ear.recv(4096).strip(), b"WATCHDOG=1")
            daemon.send_signal(signal.SIGTERM)
            while (said := ear.recv(4096).strip()) == b"WATCHDOG=1":
                pass
            self.assertEqual(said, b"STOPPING=1")
            self.assertEqual(daemon.wait(timeout=60), 0)
            ear.close()

    def test_the_unit_files_name_options_that_are_there(self):
        text = (ROOT / "dist/hutchd.service").read_text()
        options = re.search(r"ExecStart=\S+ (.*)", text).group(1).split()
        known = subprocess.run([os.environ["HUTCHD"], "--help"], capture_output=True, text=True, check=True).stdout
        for option in options:
            self.assertIn(option, known)
        self.assertIn("KillMode=process", text)
        self.assertIn("Type=notify", text)
