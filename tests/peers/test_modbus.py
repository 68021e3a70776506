"""The gateway as a Modbus client of pymodbus, over TCP and on a serial line, with mbpoll as a second client."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 20
PEER = Path(__file__).with_name("pymodbus_peer.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Plant:
    """A device, a gateway that polls it, and the processes between them."""

    def __init__(self, directory, kind):
        self.directory, self.kind = directory, kind
        self.mqtt, self.web, self.modbus = free_port(), free_port(), free_port()
        self.log = (directory / "log").open("ab")
        self.socat = self.device = None
        if kind == "tcp":
            link = f"tcp: 127.0.0.1:{self.modbus}"
        else:
            far, near = directory / "far", directory / "near"
            self.socat = self.run("socat", f"pty,raw,echo=0,link={far}", f"pty,raw,echo=0,link={near}")
            self.wait_for(lambda: far.exists() and near.exists(), "the ptys")
            link = f"serial: {{ path: {near}, baud_rate: 9600 }}"
        self.start_device()
        config = directory / "fieldgate.yaml"
        config.write_text(f"""
gateway: {{ name: test }}
store: {{ directory: data }}
web: {{ address: "127.0.0.1:{self.web}" }}
listeners: [ {{ name: plain, address: "127.0.0.1:{self.mqtt}" }} ]
modbus:
  - name: bus
    {link}
    timeout: 500ms
    devices:
      - name: py
        unit_id: 1
        poll_interval: 100ms
        points:
          - {{ name: float, address: 40001, type: f32, access: read_write }}
          - {{ name: signed, holding_register: 2, type: i16, access: read_write }}
          - {{ name: swapped, holding_register: 10, type: u32, word_order: little, access: read_write }}
          - {{ name: absent, holding_register: 300 }}
          - {{ name: relay, coil: 3, access: read_write }}
""")
        self.gateway = self.run(os.environ["FIELDGATE"], "run", "--config", str(config))

    def run(self, *command):
        return subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def start_device(self):
        where = self.modbus if self.kind == "tcp" else self.directory / "far"
        self.device = self.run(sys.executable, str(PEER), self.kind, str(where))

    def wait_for(self, condition, what):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n" + (self.directory / "log").read_text()[-4000:]
            time.sleep(0.05)

    def newest(self, topic):
        command = ["mosquitto_sub", "-p", str(self.mqtt), "-t", f"devices/py/{topic}", "-C", "1", "-W", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else {}

    def expect(self, topic, **wanted):
        self.wait_for(lambda: wanted.items() <= self.newest(topic).items(), f"{topic}: {wanted}")

    def command(self, point, payload):
        """Sends a command as an MQTT 5.0 request and returns its answer."""
        command = ["mosquitto_rr", "-p", str(self.mqtt), "-t", f"devices/py/{point}/set", "-e", "answer", "-m", payload]
        done = subprocess.run([*command, "-W", str(PATIENCE)], capture_output=True, text=True)
        return json.loads(done.stdout)

    def stop(self):
        self.gateway.terminate()
        code = self.gateway.wait(PATIENCE)
        for process in filter(None, [self.device, self.socat]):
            process.kill()
            process.wait()
        assert code == 0, (self.directory / "log").read_text()


@pytest.fixture(params=["tcp", "rtu"])
def plant(tmp_path, request):
    plant = Plant(tmp_path, request.param)
    yield plant
    plant.stop()


def test_values_are_read_and_written(plant):
    plant.expect("float", value=21.25, quality="good")
    plant.expect("signed", value=-1)
    plant.expect("swapped", value=0x01020304)
    plant.expect("relay", value=False)
    plant.expect("absent", value=None, quality="bad")
    plant.expect("state", state="degraded")
    assert plant.command("float", "3.5") == {"ok": True, "value": 3.5}
    assert plant.command("signed", "-7") == {"ok": True, "value": -7}
    assert plant.command("swapped", '{"value": 99999}') == {"ok": True, "value": 99999}
    assert plant.command("relay", "ON") == {"ok": True, "value": True}
    assert plant.command("signed", "40000")["ok"] is False
    plant.expect("float", value=3.5)
    plant.expect("signed", value=-7)
    plant.expect("swapped", value=99999)
    plant.expect("relay", value=True)


def test_a_device_that_is_switched_off_is_down_until_it_is_back(plant):
    plant.expect("float", value=21.25, quality="good")
    plant.device.kill()
    plant.device.wait()
    plant.expect("state", state="down")
    plant.expect("float", value=21.25, quality="stale")
    plant.start_device()
    plant.expect("float", value=21.25, quality="good")
    plant.expect("state", state="degraded")


@pytest.mark.parametrize("plant", ["tcp"], indirect=True)
def test_another_client_of_the_device_is_seen(plant):
    plant.expect("signed", value=-1)
    # mbpoll counts from 1 unless told otherwise.
    write = ["mbpoll", "-1", "-0", "-a", "1", "-t", "4", "-r", "2", "-p", str(plant.modbus), "127.0.0.1", "1234"]
    subprocess.run(write, check=True, capture_output=True)
    plant.expect("signed", value=1234)
