"""The gateway's MQTT-SN against clients that are not ours: `mqtt-sn-12` from PyPI, and a small one from the specification."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mqttsn_peer as sn

BIN = Path(sys.executable).parent
GATEWAY_ID = 9


def free_port(kind):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gateway:
    def __init__(self, directory):
        self.mqtt, self.mqttsn = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
        self.config = directory / "fieldgate.yaml"
        self.log = directory / "log"
        self.config.write_text(f"""
store: {{ directory: {directory}/data }}
listeners:
  - {{ name: local, address: "127.0.0.1:{self.mqtt}" }}
mqttsn:
  address: "127.0.0.1:{self.mqttsn}"
  gateway_id: {GATEWAY_ID}
  predefined_topics: {{ 7: plant/alarm }}
  publish_without_connect: {{ }}
  retry_interval: 1s
""")
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            command = [os.environ["FIELDGATE"], "run", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            assert sn.search(self.mqttsn, alive=lambda: self.process.poll() is None) == GATEWAY_ID
        except AssertionError as error:
            self.kill()
            raise AssertionError(f"{error}, exit code {self.process.returncode}\n{self.log.read_text()}") from None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(10) == 0, self.log.read_text()

    def client(self, client_id, **options):
        return sn.Client(self.mqttsn, client_id, **options)

    def mqtt_publish(self, topic, payload, qos=1):
        command = ["mosquitto_pub", "-p", str(self.mqtt), "-t", topic, "-m", payload, "-q", str(qos)]
        subprocess.run(command, check=True, timeout=10)

    def mqtt_subscribe(self, topic, count=1):
        # It says on its standard output when it has subscribed, but would keep that in a buffer.
        command = ["stdbuf", "-oL", "mosquitto_sub", "-p", str(self.mqtt), "-t", topic]
        command += ["-q", "1", "-C", str(count), "-W", "15", "-d"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = iter(process.stdout.readline, "")
        assert any("Subscribed" in line for line in lines)
        return process, lines


@pytest.fixture
def gateway(tmp_path):
    gateway = Gateway(tmp_path)
    yield gateway
    gateway.stop()


def payloads(subscriber):
    """What mosquitto_sub printed beside its own report."""
    process, lines = subscriber
    noise = ("Client ", "Subscribed ")
    found = [line.rstrip("\n") for line in lines if not line.startswith(noise)]
    assert process.wait(20) == 0
    return found


def tool(gateway, name, *arguments):
    return [str(BIN / name), "-p", str(gateway.mqttsn), "--timeout", "10", *arguments]


@pytest.mark.parametrize(
    "arguments, topic",
    [
        (["-t", "plant/line/speed", "-q", "0"], "plant/line/speed"),
        (["-t", "plant/line/speed", "-q", "1"], "plant/line/speed"),
        (["-t", "plant/line/speed", "-q", "2"], "plant/line/speed"),
        (["-t", "ab", "-q", "1"], "ab"),
        (["-T", "7", "-q", "1"], "plant/alarm"),
        (["-T", "7", "-q", "-1"], "plant/alarm"),
        (["-t", "will/too", "-q", "1", "--will-topic", "w/1", "--will-payload", "gone"], "will/too"),
    ],
)
def test_what_the_published_client_sends_reaches_mqtt(gateway, arguments, topic):
    subscriber = gateway.mqtt_subscribe(topic)
    command = tool(gateway, "mqtt_sn_pub", "-i", "pub", "-m", "hello", *arguments)
    subprocess.run(command, check=True, timeout=30)
    assert payloads(subscriber) == ["hello"]


@pytest.mark.parametrize("arguments", [["-t", "a/+"], ["-t", "a/b"], ["-t", "a/#", "-q", "1"]])
def test_what_mqtt_sends_reaches_the_published_client(gateway, arguments):
    # A retained message needs no waiting for the subscription.
    retain = ["mosquitto_pub", "-p", str(gateway.mqtt), "-t", "a/b", "-m", "hello", "-r", "-q", "1"]
    subprocess.run(retain, check=True, timeout=10)
    command = tool(gateway, "mqtt_sn_sub", "-i", "sub", "-1", *arguments)
    printed = subprocess.run(command, check=True, timeout=30, capture_output=True, text=True)
    assert printed.stdout == "hello\n"


def test_a_sleeping_client_gets_everything_in_order_and_no_will_fires(gateway):
    client = gateway.client("sleepy")
    assert client.connect(clean=False, will=("wills/sleepy", b"lost", 1, False)) == sn.ACCEPTED
    assert client.subscribe("cmd/#", qos=2) == (2, 0, sn.ACCEPTED)
    client.sleep(60)
    for number, qos in enumerate([0, 1, 2, 1, 2]):
        gateway.mqtt_publish(f"cmd/{number % 2}", str(number), qos)
    client.pump(0.3)
    assert client.inbox == []
    client.move()
    assert [(topic, payload) for topic, payload, _, _ in client.wake()] == [
        ("cmd/0", b"0"), ("cmd/1", b"1"), ("cmd/0", b"2"), ("cmd/1", b"3"), ("cmd/0", b"4"),
    ]
    assert client.wake() == []
    assert client.connect(clean=False) == sn.ACCEPTED
    gateway.mqtt_publish("cmd/0", "live")
    assert client.wait_for(1) == [("cmd/0", b"live", 1, False)]
    client.disconnect()


def test_a_lost_client_leaves_its_will(gateway):
    subscriber = gateway.mqtt_subscribe("wills/#")
    client = gateway.client("fragile")
    assert client.connect(keep_alive=1, will=("wills/fragile", b"gone", 1, False)) == sn.ACCEPTED
    assert payloads(subscriber) == ["gone"]
    client.send(sn.PINGREQ)
    client.expect(sn.DISCONNECT)


def test_a_buffered_message_survives_a_killed_gateway(gateway):
    client = gateway.client("durable")
    assert client.connect(clean=False) == sn.ACCEPTED
    assert client.subscribe("cmd/x", qos=1)[2] == sn.ACCEPTED
    client.sleep(600)
    gateway.mqtt_publish("cmd/x", "kept")
    gateway.kill()
    gateway.start()
    client.send(sn.PINGREQ, client.client_id)
    client.expect(sn.DISCONNECT)
    client.names.clear()
    assert client.connect(clean=False) == sn.ACCEPTED
    assert client.wait_for(1) == [("cmd/x", b"kept", 1, False)]


def test_a_repeated_qos_2_message_is_published_once(gateway):
    subscriber = gateway.mqtt_subscribe("once/#", count=2)
    client = gateway.client("exact")
    assert client.connect() == sn.ACCEPTED
    topic_id, _ = client.register("once/a")
    for dup in (False, True, True):
        head = bytes([sn.flags(qos=2, dup=dup)]) + topic_id.to_bytes(2, "big") + b"\0\x63"
        client.send(sn.PUBLISH, head + b"one")
        assert client.expect(sn.PUBREC) == b"\0\x63"
    for _ in range(2):
        client.send(sn.PUBREL, b"\0\x63")
        assert client.expect(sn.PUBCOMP) == b"\0\x63"
    assert client.publish(topic_id, b"two", qos=2) == sn.ACCEPTED
    assert payloads(subscriber) == ["one", "two"]


def test_clients_behind_a_forwarder_are_served_apart(gateway):
    one, two = gateway.client("one", node=b"\x01"), gateway.client("two", node=b"\x02\x03\x04")
    two.socket = one.socket
    assert one.connect() == sn.ACCEPTED
    assert two.connect() == sn.ACCEPTED
    assert two.subscribe("to/two", qos=1)[2] == sn.ACCEPTED
    topic_id, _ = one.register("to/two")
    assert one.publish(topic_id, b"hi", qos=0) is None
    assert two.wait_for(1) == [("to/two", b"hi", 0, False)]
    big = b"x" * 700
    gateway.mqtt_publish("to/two", big.decode())
    assert two.wait_for(1) == [("to/two", big, 1, False)]
