"""The bridge against aedes, a broker in JavaScript: one more reading of MQTT 3.1.1, and connections that are cut.

At QoS 1: of several QoS 2 messages in flight, aedes 1.2.0 loses some and exchanges others, also without us."""

import subprocess
from pathlib import Path

import pytest
from test_upstream import PATIENCE, Gateway, running, until, watching

HERE = Path(__file__).parent
MODULES = HERE.parent.parent / "target" / "peers"


class Aedes:
    def __init__(self):
        command = ["node", HERE / "aedes_peer.mjs", MODULES]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def cut(self):
        self.process.stdin.write("cut\n")
        self.process.stdin.flush()

    def stop(self):
        self.process.stdin.close()
        self.process.wait(PATIENCE)


@pytest.fixture
def aedes():
    aedes = Aedes()
    yield aedes
    aedes.stop()


@pytest.mark.parametrize("version", ["newest", "3.1.1"])
def test_cut_connections_lose_nothing_and_change_no_order(aedes, tmp_path, version):
    upstream = f"""
url: mqtt://localhost:{aedes.port}
version: "{version}"
out: [ {{ filter: "devices/#", qos: 1, remote_prefix: "{{gateway}}/" }} ]
in: [ {{ filter: "devices/+/+/set", qos: 1, remote_prefix: "{{gateway}}/" }} ]
state_topic: "{{gateway}}/state"
"""
    subscriber = ["mosquitto_sub", "-V", "311", "-p", str(aedes.port), "-q", "1"]
    numbers = [str(number) for number in range(400)]
    keep = ["-c", "-i", "keeper", "-t", "plant-7/devices/#"]
    subprocess.run([*subscriber, *keep, "-E"], check=True, timeout=PATIENCE)
    with running(Gateway(tmp_path / "gateway", upstream)) as gateway:
        gateway.says("upstream connected")
        for start in range(0, 400, 100):
            gateway.publish("devices/m/v", numbers[start : start + 100], 1)
            aedes.cut()
        with watching([*subscriber, *keep]) as arrived:
            until(lambda: str(arrived), lambda: numbers[-1] in arrived)
        # What was not acknowledged when the connection was cut comes again.
        assert list(dict.fromkeys(arrived)) == numbers
        device = ["mosquitto_sub", "-p", str(gateway.port), "-t", "devices/+/+/set"]
        command = ["mosquitto_pub", "-V", "311", "-p", str(aedes.port), "-t", "plant-7/devices/m/v/set", "-m", "on", "-q", "1"]
        with watching(device) as commands:
            def commanded():
                subprocess.run(command, check=True, timeout=PATIENCE)
                return commands
            until(gateway.log.read_text, commanded)
        assert set(commands) == {"on"}
