"""The bridge against a real mosquitto as the upstream: TLS, client certificates, passwords, outages and crashes."""

import itertools
import os
import shutil
import socket
import subprocess
import textwrap
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

# Far more than anything here takes, for a machine under load.
PATIENCE = 30


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.02)


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(directory, name):
    directory.mkdir()
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "365", "-subj",
            f"/CN={name}", "-keyout", directory / "ca.key", "-out", directory / "ca.pem")
    return directory


def issue(ca, name, san):
    request, certificate, key = ca / f"{name}.csr", ca / f"{name}.pem", ca / f"{name}.key"
    extensions = ca / f"{name}.ext"
    extensions.write_text(f"subjectAltName={san}\nbasicConstraints=CA:FALSE\n")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}", "-keyout", key,
            "-out", request)
    openssl("x509", "-req", "-in", request, "-CA", ca / "ca.pem", "-CAkey", ca / "ca.key", "-CAcreateserial", "-days", "365",
            "-extfile", extensions, "-out", certificate)
    return certificate, key


class Mosquitto:
    """A broker that asks for a client certificate and a password, and keeps its sessions."""

    def __init__(self, directory):
        self.directory = directory
        self.tls, self.plain = free_port(), free_port()
        self.ca = authority(directory / "ca", "Cloud authority")
        certificate, key = issue(self.ca, "localhost", "DNS:localhost,IP:127.0.0.1")
        self.client_certificate, self.client_key = issue(self.ca, "plant-7", "DNS:plant-7")
        passwords = directory / "passwords"
        passwords.touch(mode=0o600)
        subprocess.run(["mosquitto_passwd", "-b", passwords, "plant", "secret"], check=True, capture_output=True)
        subprocess.run(["mosquitto_passwd", "-b", passwords, "watcher", "watcher"], check=True, capture_output=True)
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)
        self.config = directory / "mosquitto.conf"
        self.config.write_text(f"""
user root
per_listener_settings false
allow_anonymous false
password_file {passwords}
persistence true
persistence_location {directory}/
max_queued_messages 0
listener {self.tls} 127.0.0.1
cafile {self.ca}/ca.pem
certfile {certificate}
keyfile {key}
require_certificate true
listener {self.plain} 127.0.0.1
""")
        self.process = None

    def start(self):
        with (self.directory / "mosquitto.log").open("ab") as log:
            command = [shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin"), "-c", self.config, "-v"]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        def listens():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.plain)) == 0
        until(lambda: (self.directory / "mosquitto.log").read_text(), listens)

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(PATIENCE)
            self.process = None

    def subscriber(self, *arguments):
        """The command line of a client whose session the broker keeps."""
        return ["mosquitto_sub", "-p", str(self.plain), "-u", "watcher", "-P", "watcher", *arguments]

    def keep(self, topic):
        """Lets the broker queue from now on what is published on `topic`, for `collect`. At QoS 1: at QoS 2 mosquitto
        2.0.11 sends what it kept in another order after a restart, also without us."""
        command = self.subscriber("-c", "-i", "keeper", "-q", "1", "-t", topic, "-E")
        subprocess.run(command, check=True, timeout=PATIENCE)

    def collect(self, topic, count):
        command = self.subscriber("-c", "-i", "keeper", "-q", "1", "-t", topic, "-C", str(count), "-W", str(PATIENCE))
        return subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE).stdout.split()

    def publish(self, *arguments):
        command = ["mosquitto_pub", "-p", str(self.plain), "-u", "watcher", "-P", "watcher", *arguments]
        subprocess.run(command, check=True, timeout=PATIENCE)


class Gateway:
    """A gateway with one upstream, of which `upstream` are the lines."""

    def __init__(self, directory, upstream, port=None, start=True):
        directory.mkdir()
        self.port, self.web = port or free_port(), free_port()
        self.config, self.log = directory / "fieldgate.yaml", directory / "log"
        self.config.write_text(f"""
gateway: {{ name: plant-7 }}
store: {{ directory: {directory}/data }}
web: {{ address: "127.0.0.1:{self.web}" }}
listeners:
  - {{ name: local, address: "127.0.0.1:{self.port}" }}
upstreams:
  - name: cloud
{textwrap.indent(upstream, "    ")}
""")
        if start:
            self.start()

    def start(self):
        with self.log.open("ab") as log:
            command = [os.environ["FIELDGATE"], "run", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        def listens():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        until(self.log.read_text, listens)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()

    def publish(self, topic, payloads, qos):
        """Returns once all of them are acknowledged."""
        command = ["mosquitto_pub", "-p", str(self.port), "-t", topic, "-q", str(qos), "-l", "-V", "5"]
        subprocess.run(command, input="\n".join(payloads) + "\n", text=True, check=True, timeout=2 * PATIENCE)

    def says(self, text):
        until(self.log.read_text, lambda: text in self.log.read_text())


RULES = """
out: [ { filter: "devices/#", qos: 2, remote_prefix: "{gateway}/" } ]
in: [ { filter: "devices/+/+/set", qos: 2, remote_prefix: "{gateway}/" } ]
"""


def to_mosquitto(cloud, password="secret", ca=None, version="newest", rules=RULES, more=""):
    return f"""
url: mqtts://localhost:{cloud.tls}
version: "{version}"
username: plant
password: {password}
state_topic: "gateways/{{gateway}}/state"
tls: {{ ca: {ca or cloud.ca}/ca.pem, certificate: {cloud.client_certificate}, key: {cloud.client_key} }}
{rules}
{more}
"""


class Tinyproxy:
    """An HTTP proxy that asks for a login and lets tunnels through to one port."""

    def __init__(self, directory, to):
        self.port = free_port()
        self.log, config = directory / "tinyproxy.log", directory / "tinyproxy.conf"
        config.write_text(f"""
Port {self.port}
Listen 127.0.0.1
Allow 127.0.0.1
BasicAuth plant secret
ConnectPort {to}
""")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["tinyproxy", "-d", "-c", config], stdout=log, stderr=log)
        def listens():
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        until(self.log.read_text, listens)

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


@pytest.fixture
def cloud(tmp_path):
    directory = tmp_path / "cloud"
    directory.mkdir()
    mosquitto = Mosquitto(directory)
    yield mosquitto
    mosquitto.stop()


@contextmanager
def running(gateway):
    try:
        yield gateway
        gateway.stop()
    finally:
        gateway.kill()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_readings_go_up_and_commands_come_down_over_mutual_tls(cloud, tmp_path, version):
    cloud.start()
    cloud.keep("plant-7/#")
    with running(Gateway(tmp_path / "gateway", to_mosquitto(cloud, version=version))) as gateway:
        gateway.says("upstream connected")
        gateway.publish("devices/m/v", ["1", "2", "3"], 1)
        assert cloud.collect("plant-7/#", 3) == ["1", "2", "3"]
        command = ["mosquitto_sub", "-p", str(gateway.port), "-t", "devices/+/+/set", "-C", "1", "-W", str(PATIENCE)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as device:
            while device.poll() is None:
                cloud.publish("-t", "plant-7/devices/m/v/set", "-m", "on", "-q", "2")
                time.sleep(0.1)
            assert device.stdout.read().split() == ["on"]
        state = cloud.subscriber("-t", "gateways/plant-7/state", "-C", "1", "-W", str(PATIENCE))
        assert subprocess.run(state, capture_output=True, text=True).stdout.strip() == "1"
    assert subprocess.run(state, capture_output=True, text=True).stdout.strip() == "0"


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_an_outage_and_a_crash_lose_nothing_and_change_no_order(cloud, tmp_path, version):
    count = 200
    cloud.start()
    cloud.keep("plant-7/#")
    gateway = Gateway(tmp_path / "gateway", to_mosquitto(cloud, version=version))
    gateway.says("upstream connected")
    exactly, least = ([f"{kind}{number}" for number in range(2 * count)] for kind in ("exactly", "least"))
    with running(gateway):
        gateway.publish("devices/m/v", exactly[:count], 2)
        cloud.stop()
        gateway.publish("devices/m/v", exactly[count:], 2)
        gateway.publish("devices/m/v", least[:count], 1)
        gateway.kill()
        gateway.start()
        gateway.publish("devices/m/v", least[count:], 1)
        cloud.start()
        arrived = cloud.collect("plant-7/#", 4 * count)
        # Order holds within a QoS: a broker passes QoS 2 on when it is released, QoS 1 when it comes.
        assert [payload for payload in arrived if payload.startswith("exactly")] == exactly
        assert [payload for payload in arrived if payload.startswith("least")] == least


def test_a_refusal_says_what_to_change(cloud, tmp_path):
    cloud.start()
    stranger = authority(tmp_path / "stranger", "Another authority")
    with running(Gateway(tmp_path / "wrong-password", to_mosquitto(cloud, password="wrong"))) as gateway:
        # Mosquitto's word for a wrong password.
        gateway.says("not authorized (0x87); check the password of the user `plant`")
    with running(Gateway(tmp_path / "wrong-ca", to_mosquitto(cloud, ca=stranger))) as gateway:
        gateway.says("signed by an authority that is not in")


def test_a_real_proxy_lets_the_tunnel_through_and_its_refusals_say_what_to_change(cloud, tmp_path):
    cloud.start()
    cloud.keep("plant-7/#")
    proxy = Tinyproxy(tmp_path, cloud.tls)
    try:
        right = f"proxy: http://plant:secret@127.0.0.1:{proxy.port}"
        with running(Gateway(tmp_path / "through", to_mosquitto(cloud, more=right))) as gateway:
            gateway.says("upstream connected")
            gateway.publish("devices/m/v", ["1", "2", "3"], 2)
            assert cloud.collect("plant-7/#", 3) == ["1", "2", "3"]
        assert "CONNECT localhost" in proxy.log.read_text(), proxy.log.read_text()
        wrong = f"proxy: http://plant:wrong@127.0.0.1:{proxy.port}"
        with running(Gateway(tmp_path / "wrong-password", to_mosquitto(cloud, more=wrong))) as gateway:
            gateway.says("check the password of the user `plant` in `proxy`")
        cloud.tls = cloud.plain
        with running(Gateway(tmp_path / "forbidden", to_mosquitto(cloud, more=right))) as gateway:
            gateway.says("it does not let this gateway through to localhost")
    finally:
        proxy.stop()


@contextmanager
def watching(command):
    """The lines that the command writes, as they come."""
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        def read():
            for line in process.stdout:
                lines.append(line.strip())
        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield lines
        finally:
            process.terminate()
            reader.join(PATIENCE)


def up(gateway, cloud, payload):
    gateway.publish("devices/m/v", [payload], 1)


def down(gateway, cloud, payload):
    cloud.publish("-t", "devices/m/v", "-m", payload, "-q", "1")


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_the_same_topics_both_ways_do_not_go_in_circles(cloud, tmp_path, version):
    cloud.start()
    rules = "out: [ { filter: devices/#, qos: 1 } ]\nin: [ { filter: devices/#, qos: 1 } ]"
    with running(Gateway(tmp_path / "gateway", to_mosquitto(cloud, version=version, rules=rules))) as gateway:
        gateway.says("upstream connected")
        near = ["mosquitto_sub", "-p", str(gateway.port), "-t", "devices/#", "-q", "1"]
        far = cloud.subscriber("-t", "devices/#", "-q", "1")
        with watching(near) as near, watching(far) as far:
            # What comes after another message on the same way tells that the other is through, and its echo too.
            serial = itertools.count()
            for number in range(3):
                for side, publish in (("up", up), ("down", down)):
                    def seen():
                        publish(gateway, cloud, f"{side}{number}-{next(serial)}")
                        time.sleep(0.05)
                        return all(any(line.startswith(f"{side}{number}-") for line in lines) for lines in (near, far))
                    until(gateway.log.read_text, seen)
            for lines in (near, far):
                assert len(lines) == len(set(lines)), lines
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{gateway.web}/metrics", timeout=PATIENCE).read().decode()
        assert 'fieldgate_upstream_messages_dropped_total{upstream="cloud",reason="looped"} 0' in metrics


def test_without_a_ca_file_the_system_says_whom_to_trust(cloud, tmp_path, monkeypatch):
    cloud.start()
    monkeypatch.setenv("SSL_CERT_FILE", str(cloud.ca / "ca.pem"))
    lines = to_mosquitto(cloud).replace(f"ca: {cloud.ca}/ca.pem, ", "")
    with running(Gateway(tmp_path / "trusts", lines)) as gateway:
        gateway.says("upstream connected")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority(tmp_path / "stranger", "Another authority") / "ca.pem"))
    with running(Gateway(tmp_path / "distrusts", lines)) as gateway:
        gateway.says("signed by an authority that is not in the system's root certificates")


@pytest.mark.parametrize(("provenance", "version"), [("user_properties", "5"), ("json", "5"), ("json", "3.1.1")])
def test_a_record_of_mosquitto_sub_proves_that_nothing_is_missing(cloud, tmp_path, provenance, version):
    cloud.start()
    numbered = ["-V", "5", "-q", "1", "-t", "plant-7/#", "-F", "%j", "-c", "-i", "keeper", "-x", "3600"]
    subprocess.run(cloud.subscriber(*numbered, "-E"), check=True, timeout=PATIENCE)
    rules = f'out: [ {{ filter: "devices/#", remote_prefix: "{{gateway}}/", provenance: {provenance} }} ]'
    with running(Gateway(tmp_path / "gateway", to_mosquitto(cloud, version=version, rules=rules))) as gateway:
        gateway.says("upstream connected")
        gateway.publish("devices/m/v", ["1", "two", "3"], 1)
        gateway.kill()
        gateway.start()
        gateway.publish("devices/m/v", ['{"value":4}', "5"], 1)
        command = cloud.subscriber(*numbered, "-C", "5", "-W", str(PATIENCE))
        record = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE).stdout
    prove = lambda record: subprocess.run([os.environ["FIELDGATE"], "prove"], input=record, capture_output=True, text=True)
    whole = prove(record)
    assert whole.returncode == 0, (whole, record)
    assert "main stream: complete: 5 messages, 0 missing" in whole.stdout
    lines = record.splitlines(keepends=True)
    cut = prove("".join(lines[:1] + lines[2:]))
    assert cut.returncode == 1 and "missing: number " in cut.stdout, cut


@pytest.mark.parametrize("qos", [1, 2])
def test_what_mosquitto_closes_the_connection_on_is_given_up_and_all_else_arrives_in_order(cloud, tmp_path, qos):
    # It can tell 5 what it takes, not 3.1.1.
    cloud.config.write_text(cloud.config.read_text() + "max_packet_size 1000\n")
    cloud.start()
    cloud.keep("plant-7/#")
    more = "backoff: { base: 50ms, cap: 200ms, stable: 10s }"
    gateway = Gateway(tmp_path / "gateway", to_mosquitto(cloud, version="3.1.1", more=more))
    with running(gateway):
        gateway.says("upstream connected")
        numbers = [str(number) for number in range(60)]
        gateway.publish("devices/m/v", numbers[:20], qos)
        gateway.publish("devices/camera/picture", ["x" * 2000], qos)
        gateway.publish("devices/m/v", numbers[20:40], qos)
        gateway.publish("devices/camera/picture", ["y" * 2000], qos)
        gateway.publish("devices/m/v", numbers[40:], qos)
        with watching(cloud.subscriber("-c", "-i", "keeper", "-q", "1", "-t", "plant-7/#")) as arrived:
            until(gateway.log.read_text, lambda: numbers[-1] in arrived)
        # What was not acknowledged when the connection was closed comes again at QoS 1.
        assert list(dict.fromkeys(arrived)) == numbers
        assert qos == 1 or len(arrived) == len(numbers)
        gateway.says("the upstream closed the connection each time it got the message on `devices/camera/picture`")
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{gateway.web}/metrics").read().decode()
        assert 'fieldgate_upstream_messages_dropped_total{upstream="cloud",reason="refused"} 2' in metrics
