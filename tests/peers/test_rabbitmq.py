"""The bridge against RabbitMQ with its MQTT plugin, which knows neither QoS 2 nor bridges."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_upstream import PATIENCE, Gateway, free_port, running, until

# The program itself: what is on the path changes the user and leaves the environment behind.
SERVER = next(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"), None)


class RabbitMQ:
    def __init__(self, directory):
        self.port, self.epmd = free_port(), free_port()
        self.log = directory / "rabbitmq.log"
        (directory / "rabbitmq.conf").write_text(f"""
listeners.tcp = none
mqtt.listeners.tcp.1 = 127.0.0.1:{self.port}
mqtt.allow_anonymous = false
default_user = plant
default_pass = secret
""")
        (directory / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")
        environment = os.environ | {
            "HOME": str(directory),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "ERL_EPMD_PORT": str(self.epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([SERVER], stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 2 * PATIENCE
        while b"Starting broker... completed" not in self.log.read_bytes():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stop(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(PATIENCE)
        # The name server of this node alone would stay; it can be ended once the node is gone.
        kill = ["epmd", "-port", str(self.epmd), "-kill"]
        until(self.log.read_text, lambda: b"Killed" in subprocess.run(kill, capture_output=True, timeout=PATIENCE).stdout)

    def client(self, program, *arguments):
        return [program, "-V", "311", "-p", str(self.port), "-u", "plant", "-P", "secret", *arguments]


@pytest.fixture(scope="module")
def rabbit(tmp_path_factory):
    rabbit = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield rabbit
    rabbit.stop()


def upstream(rabbit):
    return f"""
url: mqtt://localhost:{rabbit.port}
username: plant
password: secret
out: [ {{ filter: "devices/#", qos: 2, retain: never, remote_prefix: "{{gateway}}/" }} ]
in: [ {{ filter: "devices/+/+/set", qos: 1, retain: never, remote_prefix: "{{gateway}}/" }} ]
"""


def test_readings_go_up_in_order_and_commands_come_down(rabbit, tmp_path):
    keep = ["-c", "-i", "keeper", "-q", "1", "-t", "plant-7/#"]
    subprocess.run(rabbit.client("mosquitto_sub", *keep, "-E"), check=True, timeout=PATIENCE)
    numbers = [str(number) for number in range(500)]
    with running(Gateway(tmp_path / "gateway", upstream(rabbit))) as gateway:
        gateway.says("upstream connected")
        # It takes QoS 2 for QoS 1: nothing may get stuck over it.
        gateway.publish("devices/m/v", numbers[:250], 2)
        gateway.publish("devices/m/v", numbers[250:], 1)
        collect = rabbit.client("mosquitto_sub", *keep, "-C", "500", "-W", str(PATIENCE))
        arrived = subprocess.run(collect, capture_output=True, text=True, timeout=2 * PATIENCE).stdout.split()
        assert sorted(arrived, key=int) == numbers
        for part in (numbers[:250], numbers[250:]):
            assert [number for number in arrived if number in part] == part
        command = ["mosquitto_sub", "-p", str(gateway.port), "-t", "devices/+/+/set", "-C", "1", "-W", str(PATIENCE)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as device:
            until(gateway.log.read_text, lambda: publish_command(rabbit) or device.poll() is not None)
            assert device.stdout.read().split() == ["on"]


def publish_command(rabbit):
    message = ["-t", "plant-7/devices/m/v/set", "-m", "on", "-q", "1"]
    subprocess.run(rabbit.client("mosquitto_pub", *message), check=True, timeout=PATIENCE)
    time.sleep(0.1)
