"""The bridge against ejabberd, a broker in Erlang that speaks MQTT 5.0 and all of its QoS: one more reading of both versions."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from test_upstream import PATIENCE, Gateway, free_port, running, until, watching

LIBRARIES = next(Path("/usr/lib").glob("*/ejabberd-*")).parent
PROGRAM = next(LIBRARIES.glob("ejabberd-*/ebin"))


class Ejabberd:
    """One node without a name, so that it needs no name server; who gives a user of its domain may come in."""

    def __init__(self, directory):
        self.port = free_port()
        self.log = directory / "out"
        config = directory / "ejabberd.yml"
        config.write_text(f"""
hosts: [ localhost ]
auth_method: anonymous
anonymous_protocol: login_anon
allow_multiple_connections: true
listen: [ {{ port: {self.port}, ip: "127.0.0.1", module: mod_mqtt }} ]
modules: {{ mod_mqtt: {{ max_queue: 100000, session_expiry: 10 min }} }}
""")
        environment = os.environ | {
            "HOME": str(directory),
            "ERL_LIBS": str(LIBRARIES),
            "EJABBERD_CONFIG_PATH": str(config),
            "EJABBERD_LOG_PATH": str(directory / "log"),
            "SPOOL_DIR": str(directory / "spool"),
        }
        command = ["erl", "-noinput", "-pa", PROGRAM, "-mnesia", "dir", f'"{directory}/spool"', "-s", "ejabberd"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        until(self.log.read_text, lambda: "Start accepting TCP connections" in self.log.read_text())

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(PATIENCE)

    def client(self, program, version, *arguments):
        return [program, "-V", version, "-p", str(self.port), "-u", "watcher@localhost", "-P", "any", *arguments]


@pytest.fixture(scope="module")
def ejabberd(tmp_path_factory):
    ejabberd = Ejabberd(tmp_path_factory.mktemp("ejabberd"))
    yield ejabberd
    ejabberd.stop()


@pytest.mark.parametrize(("version", "provenance"), [("5", "user_properties"), ("3.1.1", "json")])
def test_each_message_arrives_once_and_in_order_although_the_gateway_is_killed(ejabberd, tmp_path, version, provenance):
    upstream = f"""
url: mqtt://localhost:{ejabberd.port}
version: "{version}"
username: plant@localhost
password: any
state_topic: "{{gateway}}/state"
out: [ {{ filter: "devices/#", qos: 2, remote_prefix: "{{gateway}}/", provenance: {provenance} }} ]
in: [ {{ filter: "devices/+/+/set", qos: 2, remote_prefix: "{{gateway}}/" }} ]
"""
    spoken = version.replace(".", "")
    numbers = [str(number) for number in range(400)]
    recorder = ejabberd.client("mosquitto_sub", spoken, "-q", "2", "-t", "plant-7/devices/+/v", "-F", "%j")
    with watching(recorder) as record, running(Gateway(tmp_path / "gateway", upstream)) as gateway:
        gateway.says("upstream connected")
        for start in range(0, 400, 100):
            gateway.publish("devices/m/v", numbers[start : start + 100], 2)
            gateway.kill()
            gateway.start()
        until(lambda: str(len(record)), lambda: len(record) >= len(numbers))
        payloads = [json.loads(line)["payload"] for line in record]
        if provenance == "json":
            payloads = [str(json.loads(payload)["value"]) for payload in payloads]
        assert payloads == numbers
        prove = [os.environ["FIELDGATE"], "prove"]
        proof = subprocess.run(prove, input="\n".join(record), capture_output=True, text=True, timeout=PATIENCE)
        assert (proof.returncode, "complete: 400 messages, 0 missing" in proof.stdout) == (0, True), proof.stdout
        device = ["mosquitto_sub", "-p", str(gateway.port), "-t", "devices/+/+/set", "-C", "1", "-W", str(PATIENCE)]
        command = ejabberd.client("mosquitto_pub", spoken, "-t", "plant-7/devices/m/v/set", "-m", "on", "-q", "2")
        with watching(device) as commands:
            def commanded():
                subprocess.run(command, check=True, timeout=PATIENCE)
                return commands
            until(gateway.log.read_text, commanded)
        assert commands == ["on"]
