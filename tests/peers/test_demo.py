"""The demo at a terminal: what it prints is true, the key that cuts the uplink does, and it ends in time."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import subprocess
import termios
import time
import urllib.request

import pytest

# Far more than anything here takes, for a machine under load.
PATIENCE = 60
# What the demo promises for its end.
DRAIN = 2


class Terminal:
    """A demo on a pseudo terminal, with its keyboard."""

    def __init__(self, *arguments, command=None):
        self.keyboard, theirs = pty.openpty()
        command = command or [os.environ["FIELDGATE"], "demo", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self.seen = ""

    def read(self):
        """Takes in what there is; whether there can be more."""
        if not select.select([self.keyboard], [], [], 0.1)[0]:
            return True
        try:
            self.seen += os.read(self.keyboard, 4096).decode().replace("\r\n", "\n")
            return True
        except OSError:
            return False

    def expect(self, pattern):
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen)):
            assert self.read() and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.seen}"
        return found

    def press(self, keys):
        """Presses keys, and forgets what was on the screen before."""
        self.seen = ""
        os.write(self.keyboard, keys.encode())

    def end(self):
        """Waits for the end; the exit code, and how long it took."""
        began = time.monotonic()
        while self.read():
            assert time.monotonic() - began < PATIENCE, self.seen
        return self.process.wait(PATIENCE), time.monotonic() - began


@pytest.fixture
def terminal():
    demos = []

    def start(*arguments, **options):
        demos.append(Terminal(*arguments, **options))
        return demos[-1]

    yield start
    for demo in demos:
        demo.process.kill()
        demo.process.wait()
        os.close(demo.keyboard)


def output(command, *more):
    """What a printed command line says."""
    done = subprocess.run([*shlex.split(command), *more], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done
    return done.stdout


def test_what_the_demo_says_is_true(terminal):
    began = time.monotonic()
    demo = terminal("--any-ports")
    demo.expect("Fieldgate is running")
    listening = time.monotonic() - began
    web, values, command, cloud, directory = (
        demo.expect(pattern).group(1)
        for pattern in [r"Web UI +(\S+)\n", r"Values +(.+)\n", r"A command +(.+)\n", r"The cloud +(.+)\n", r"Files +(\S+) "]
    )
    demo.expect(r"Press u to cut the uplink")
    demo.expect(r"First value: devices/meter/power = [0-9.]+ W\n")
    first = time.monotonic() - began
    demo.expect(r"First value in the cloud: demo/devices/meter/power = [0-9.]+ W\n")
    print(f"demo: {1000 * listening:.0f} ms to its introduction, {1000 * first:.0f} ms to the first value")

    def api(path):
        with urllib.request.urlopen(f"{web}api/v1/{path}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def upstream():
        return api("upstreams")["upstreams"][0]

    def good_devices():
        latest = [value["latest"] for value in api("values")["values"]]
        return {value["device"] for value in latest if value["quality"] == "good"}

    def waits_until(condition):
        deadline = time.monotonic() + PATIENCE
        while not condition(upstream()):
            assert time.monotonic() < deadline, upstream()
            time.sleep(0.1)

    with urllib.request.urlopen(web, timeout=PATIENCE) as page:
        assert b"<title>" in page.read()
    # Every kind of device it names is there, and well.
    deadline = time.monotonic() + PATIENCE
    devices = {"meter", "rtu-meter", "scale", "climate"}
    while not devices <= good_devices():
        assert time.monotonic() < deadline, api("values")
        time.sleep(0.1)
    assert output(values, "-C", "5", "-W", str(PATIENCE)).count("devices/") == 5
    assert output(cloud, "-C", "5", "-W", str(PATIENCE)).count("demo/") == 5
    port = re.search(r"-p (\d+)", values).group(1)
    with subprocess.Popen(["mosquitto_sub", "-p", port, "-t", "devices/meter/relay/set/result", "-C", "1", "-W", str(PATIENCE)],
                          stdout=subprocess.PIPE, text=True) as result:
        while result.poll() is None:
            output(command)
            time.sleep(0.1)
        assert json.loads(result.stdout.read())["ok"] is True
    assert os.path.exists(f"{directory}/fieldgate.yaml") and os.path.exists(f"{directory}/data/fieldgate.db")

    demo.press("u")
    demo.expect(r"Uplink cut\.")
    waits_until(lambda upstream: upstream["paused"])
    before = upstream()["queue"]["messages"]
    with subprocess.Popen([*shlex.split(cloud), "-R"], stdout=subprocess.PIPE, text=True) as watching:
        for number in range(20):
            output(f"mosquitto_pub -p {port} -q 1 -t devices/demo/number -m {number}")
        waits_until(lambda upstream: upstream["queue"]["messages"] >= before + 20)
        demo.press("u")
        assert int(demo.expect(r"Uplink restored\. (\d+) messages waited").group(1)) >= before + 20
        arrived = []
        while len(arrived) < 20:
            topic, payload = watching.stdout.readline().rstrip("\n").split(" ", 1)
            arrived.extend([int(payload)] if topic == "demo/devices/demo/number" else [])
        watching.kill()
    assert arrived == list(range(20))
    waits_until(lambda upstream: not upstream["paused"] and upstream["queue"]["messages"] == 0)

    demo.press("q")
    code, took = demo.end()
    print(f"demo: end in {1000 * took:.0f} ms")
    assert code == 0 and took < DRAIN, demo.seen
    assert "Stopping." in demo.seen and not os.path.exists(directory), "the temporary directory stays"


def test_a_demo_ends_with_its_terminal(terminal):
    demo = terminal("--any-ports")
    directory = demo.expect(r"Files +(\S+) ").group(1)
    demo.expect("First value: ")
    os.close(demo.keyboard)
    demo.keyboard = os.open(os.devnull, os.O_RDONLY)
    assert demo.process.wait(PATIENCE) == 0
    assert not os.path.exists(directory)


def test_in_the_background_of_a_shell_it_runs_on(terminal):
    shell = terminal(command=["bash", "-c", 'set -m; "$FIELDGATE" demo --any-ports & wait; echo "ended with $?"'])
    directory = shell.expect(r"Files +(\S+) ").group(1)
    shell.expect(r"The button in the web UI cuts and restores the uplink\.")
    shell.expect("First value in the cloud: ")
    os.kill(int(re.search(r"fieldgate-demo-(\d+)-", directory).group(1)), signal.SIGTERM)
    shell.expect("ended with 0")


def test_taken_ports_are_said_and_ctrl_c_ends_it(terminal, tmp_path):
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    mqtt, web = (server.getsockname()[1] for server in taken)
    demo = terminal("--directory", tmp_path / "demo", "--mqtt-port", mqtt, "--web-port", web)
    other_mqtt = demo.expect(rf"Port {mqtt} is taken, so the broker is on (\d+)\.").group(1)
    other_web = demo.expect(rf"Port {web} is taken, so the web UI is on (\d+)\.").group(1)
    demo.expect(rf"Web UI +http://127\.0\.0\.1:{other_web}/")
    demo.expect(rf"mosquitto_sub -p {other_mqtt} ")
    demo.expect("First value: ")
    second = subprocess.run([os.environ["FIELDGATE"], "demo", "--any-ports", "--directory", tmp_path / "demo"],
                            capture_output=True, text=True, timeout=PATIENCE)
    assert second.returncode == 2 and "another demo runs there" in second.stderr, second
    assert os.readlink(tmp_path / "demo" / "scale.tty").startswith("/dev/pts/"), "the second took nothing from the first"
    demo.press("\x03")
    code, took = demo.end()
    assert code == 0 and took < DRAIN, demo.seen
    assert (tmp_path / "demo" / "fieldgate.yaml").exists(), "the directory that was given stays"
