"""Serial devices on socat's ptys, codecs on topics and the example adapter program, in the real gateway, by MQTT."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, what):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


class Cable:
    """A pair of ptys: one end for the gateway, the other is the device's."""

    def __init__(self, directory):
        self.port, self.device = directory / "port", directory / "device"

    def plug(self):
        ends = [f"PTY,link={end},raw,echo=0" for end in (self.port, self.device)]
        self.socat = subprocess.Popen(["socat", *ends])
        wait_until(lambda: self.port.exists() and self.device.exists(), "socat makes ptys")
        self.end = os.open(self.device, os.O_RDWR | os.O_NOCTTY)

    def unplug(self):
        os.close(self.end)
        self.socat.terminate()
        self.socat.wait(PATIENCE)

    def send(self, text):
        os.write(self.end, text.encode())

    def read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self.end, 1)
        return line


class Gateway:
    def __init__(self, directory):
        self.mqtt = free_port()
        self.log = directory / "log"
        self.cable = Cable(directory)
        config = directory / "fieldgate.yaml"
        config.write_text(f"""
store: {{ directory: {directory}/data }}
listeners:
  - {{ name: local, address: "127.0.0.1:{self.mqtt}" }}
web: {{ address: "127.0.0.1:{free_port()}" }}
serial:
  - name: scale
    path: {self.cable.port}
    baud_rate: 9600
    codec: {ROOT}/plugins/codecs/demo-scale.js
translators:
  - name: climate
    filter: sensors/+/raw
    codec: {ROOT}/plugins/codecs/demo-sensor.js
    device: sensor-{{1}}
plugins:
  - name: sysinfo
    command: [{ROOT}/plugins/adapters/sysinfo.py]
    devices: [gateway]
    settings: {{ interval: 3600 }}
""")
        with self.log.open("wb") as log:
            command = [os.environ["FIELDGATE"], "run", "--config", str(config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self.is_listening, "the gateway listens")

    def is_listening(self):
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.mqtt)) == 0

    def publish(self, topic, payload):
        command = ["mosquitto_pub", "-p", str(self.mqtt), "-q", "1", "-t", topic, "-s"]
        subprocess.run(command, input=payload, check=True, timeout=PATIENCE)

    def expect(self, topic, wanted):
        """Waits until what is published or retained on `topic` satisfies `wanted`."""
        command = ["mosquitto_sub", "-p", str(self.mqtt), "-t", topic, "-q", "1", "-W", str(PATIENCE)]
        seen = []
        with subprocess.Popen(["stdbuf", "-oL", *command], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                seen.append(line)
                message = json.loads(line)
                if wanted(message):
                    process.terminate()
                    return message
        raise AssertionError(f"nothing wanted on {topic}: {seen}\n{self.log.read_text()}")

    def stop(self):
        self.process.terminate()
        assert self.process.wait(10) == 0, self.log.read_text()


@pytest.fixture
def gateway(tmp_path):
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.stop()


def state(name):
    return lambda message: message["state"] == name


def test_a_serial_device_is_read_commanded_unplugged_and_read_again(gateway):
    assert "plugged in" in gateway.expect("devices/scale/state", state("down"))["reason"]
    for weight in ["12.34", "3.50"]:
        gateway.cable.plug()
        gateway.expect("devices/scale/state", state("starting"))
        gateway.cable.send(f"ST,GS,+000{weight}kg\r\n")
        reading = gateway.expect("devices/scale/weight", lambda reading: reading["value"] == float(weight))
        assert (reading["unit"], reading["quality"]) == ("kg", "good")
        gateway.publish("devices/scale/tare/set", b"1")
        assert gateway.cable.read_line() == b"T\r\n"
        gateway.cable.unplug()
        gateway.expect("devices/scale/state", state("down"))
        gateway.expect("devices/scale/weight", lambda reading: reading["quality"] == "stale")


def test_packed_bytes_on_a_topic_become_readings(gateway):
    gateway.publish("sensors/s7/raw", bytes([0x08, 0x34, 111, 150, 1]))
    reading = gateway.expect("devices/sensor-s7/temperature", lambda reading: True)
    assert (reading["value"], reading["unit"]) == (21, "°C")
    assert gateway.expect("devices/sensor-s7/door_open", lambda reading: True)["value"] is True


def test_the_example_program_tells_the_gateways_own_state_and_takes_a_command(gateway):
    gateway.expect("devices/gateway/state", state("good"))
    assert gateway.expect("devices/gateway/disk_free", lambda reading: True)["unit"] == "B"
    gateway.publish("devices/gateway/interval/set", b"2")
    assert gateway.expect("devices/gateway/interval", lambda reading: True)["value"] == 2
