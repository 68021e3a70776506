"""A disk that fills up under the gateway: a real file system, mounted for the test (as root, or with sudo)."""

import os
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

# Far more than anything here takes, for a machine under load.
PATIENCE = 30
PAYLOAD = "x" * 50_000


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_root(*command):
    prefix = [] if os.geteuid() == 0 else ["sudo", "--non-interactive"]
    subprocess.run([*prefix, *map(str, command)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of 2 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    as_root("mount", "-t", "tmpfs", "-o", f"size=2m,uid={os.geteuid()},mode=700", "tmpfs", path)
    yield path
    as_root("umount", path)


class Gateway:
    def __init__(self, directory, disk, port, process):
        self.directory, self.disk, self.port, self.process = directory, disk, port, process
        self.published = 0

    def log(self):
        return (self.directory / "log").read_text()

    def publish(self, topic, payload, qos=1):
        """Whether the message was acknowledged with success; only 5.0 is told why not."""
        command = ["mosquitto_pub", "-p", str(self.port), "-V", "5", "-q", str(qos), "-t", topic, "-s"]
        done = subprocess.run(command, input=payload, text=True, capture_output=True, timeout=PATIENCE)
        return done.returncode == 0 and "failed" not in done.stderr

    def subscribe(self, *arguments):
        command = ["mosquitto_sub", "-p", str(self.port), "-V", "5", "-q", "1", *arguments]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE)

    def serves(self):
        """QoS 0 needs no disk."""
        watcher = self.subscribe("-t", "live/#", "-C", "1", "-i", "watcher")
        deadline = time.monotonic() + PATIENCE
        while watcher.poll() is None:
            assert time.monotonic() < deadline, self.log()
            assert self.publish("live/now", "still here", qos=0)
            time.sleep(0.05)
        return watcher.stdout.read() == "still here\n"


@contextmanager
def running(fieldgate, directory, disk):
    port = free_port()
    config = directory / "fieldgate.yaml"
    config.write_text(f"store: {{ directory: {disk} }}\nweb: {{ enabled: false }}\nlimits: {{ when_full: reject }}\n"
                      f"listeners: [ {{ name: local, address: 127.0.0.1:{port} }} ]\n")
    with open(directory / "log", "w") as log:
        process = subprocess.Popen([fieldgate, "run", "--config", config], stderr=log, stdout=log)
    gateway = Gateway(directory, disk, port, process)
    try:
        until(gateway, lambda: " listening " in gateway.log())
        yield gateway
    finally:
        if process.poll() is None:
            process.terminate()
            assert process.wait(PATIENCE) == 0, gateway.log()


def until(gateway, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline and gateway.process.poll() is None, gateway.log()
        time.sleep(0.05)


@pytest.fixture
def fieldgate():
    return os.environ["FIELDGATE"]


def test_a_full_disk_stops_nothing_that_needs_none_and_loses_nothing(fieldgate, tmp_path, disk):
    with running(fieldgate, tmp_path, disk) as gateway:
        keeper = ["-t", "keep/#", "-i", "keeper", "-c", "-x", "4294967295"]
        assert gateway.subscribe(*keeper, "-E").wait(PATIENCE) == 0
        kept = []
        for number in range(100):
            if not gateway.publish("keep/it", f"{number} {PAYLOAD}"):
                break
            kept.append(number)
        assert 5 < len(kept) < 60, "2 MiB hold some of them"
        until(gateway, lambda: " ERROR " in gateway.log())
        assert "full" in gateway.log()
        assert gateway.serves()

        # Somebody makes room.
        as_root("mount", "-o", "remount,size=8m", disk)
        until(gateway, lambda: gateway.publish("keep/it", "there is room again"))
        received, _ = gateway.subscribe(*keeper, "-W", "2").communicate(timeout=PATIENCE)
        *numbers, last = [line.split(" ", 1) for line in received.splitlines()]
        # What was refused may have come all the same, but nothing that was acknowledged may be missing or out of place.
        assert [int(number) for number, _ in numbers if int(number) in kept] == kept
        assert last == ["there", "is room again"]


def test_a_store_that_alone_has_filled_its_disk_drains_and_takes_in_again(fieldgate, tmp_path, disk):
    with running(fieldgate, tmp_path, disk) as gateway:
        keeper = ["-t", "keep/#", "-i", "keeper", "-c", "-x", "4294967295"]
        assert gateway.subscribe(*keeper, "-E").wait(PATIENCE) == 0
        kept = fill(gateway)
        until(gateway, lambda: " ERROR " in gateway.log())

        # Nobody makes room: what is delivered does.
        received, _ = gateway.subscribe(*keeper, "-C", str(len(kept)), "-W", str(PATIENCE)).communicate()
        numbers = [int(line.split(" ", 1)[0]) for line in received.splitlines()]
        assert [number for number in numbers if number in kept] == kept
        until(gateway, lambda: "the store can write again" in gateway.log())
        again = []
        until(gateway, lambda: len(again) > len(kept) // 2 or again.extend(fill(gateway)))

        # What was delivered was removed from the disk too.
        gateway.process.kill()
        gateway.process.wait()
    with running(fieldgate, tmp_path, disk) as gateway:
        received, _ = gateway.subscribe(*keeper, "-C", str(len(again)), "-W", str(PATIENCE)).communicate()
        numbers = [int(line.split(" ", 1)[0]) for line in received.splitlines()]
        assert [number for number in numbers if number in again] == again
        assert not set(numbers) & set(kept)


def fill(gateway):
    """Publishes until it is refused; returns the numbers that were acknowledged, which are new each time."""
    kept = []
    for _ in range(100):
        gateway.published += 1
        if not gateway.publish("keep/it", f"{gateway.published} {PAYLOAD}"):
            return kept
        kept.append(gateway.published)
    raise AssertionError("2 MiB hold more than that")
