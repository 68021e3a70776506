"""mosquitto_pub and mosquitto_sub against the gateway: versions, QoS, sessions, wills, access, TLS, Unix socket."""

import os
import signal
import socket
import subprocess
import threading
import time

import pytest

VERSIONS = ["mqttv31", "mqttv311", "mqttv5"]
PATIENCE = 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gateway:
    def __init__(self, directory):
        self.directory = directory
        self.port, self.tls_port, self.closed_port = free_port(), free_port(), free_port()
        self.unix = directory / "mqtt.sock"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
             "-keyout", directory / "key.pem", "-out", directory / "cert.pem"],
            check=True, capture_output=True)
        self.config = directory / "fieldgate.yaml"
        self.config.write_text(f"""
gateway: {{ name: test }}
store: {{ directory: data }}
web: {{ address: "127.0.0.1:{self.closed_port}" }}
listeners:
  - {{ name: plain, address: "127.0.0.1:{self.port}" }}
  - {{ name: tls, address: "127.0.0.1:{self.tls_port}", tls: {{ certificate: cert.pem, key: key.pem }} }}
  - {{ name: unix, unix: mqtt.sock }}
""")
        self.log = directory / "log"
        self.process = None

    def start(self):
        with self.log.open("ab") as log:
            command = [os.environ["FIELDGATE"], "run", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.02)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()

    def publish(self, topic, payload, *options, code=0):
        command = ["mosquitto_pub", "-p", str(self.port), "-t", topic, "-m", payload, *options]
        done = subprocess.run(command, timeout=PATIENCE, capture_output=True, text=True)
        assert done.returncode == code, done
        return done

    def subscribe(self, topic, count, *options):
        """Starts a subscriber and waits until it has subscribed; `Subscriber.lines` has what came."""
        return Subscriber(["mosquitto_sub", "-p", str(self.port), "-t", topic, "-C", str(count), *options])


class Subscriber:
    def __init__(self, command):
        # `-d` tells of the SUBACK, on a standard output that would otherwise be kept in a buffer.
        command = ["stdbuf", "-oL", *command, "-d", "-F", "> %t %p %q %r"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.before = []
        for line in self.process.stdout:
            self.before.append(line)
            if "SUBACK" in line:
                return
        raise AssertionError("".join(self.before))

    def output(self):
        """All it has said, at its end. Not with `communicate`, which forgets what lies in the buffer of the iterator."""
        late = threading.Timer(PATIENCE, self.process.kill)
        late.start()
        output = "".join([*self.before, *self.process.stdout])
        late.cancel()
        self.process.wait()
        return output

    def lines(self):
        return [line[2:] for line in self.output().splitlines() if line.startswith("> ")]


@pytest.fixture
def gateway(tmp_path):
    gateway = Gateway(tmp_path)
    gateway.start()
    yield gateway
    if gateway.process.poll() is None:
        gateway.stop()


@pytest.mark.parametrize("qos", "012")
@pytest.mark.parametrize("subscriber", VERSIONS)
@pytest.mark.parametrize("publisher", VERSIONS)
def test_messages_arrive_in_order(gateway, publisher, subscriber, qos):
    receiving = gateway.subscribe("a/+", 3, "-V", subscriber, "-q", qos)
    for payload in "xyz":
        gateway.publish("a/b", payload, "-V", publisher, "-q", qos)
    assert receiving.lines() == [f"a/b {payload} {qos} 0" for payload in "xyz"]


@pytest.mark.parametrize("version", VERSIONS)
def test_retained_messages_come_at_once(gateway, version):
    gateway.publish("state", "on", "-r", "-q", "1", "-V", version)
    assert gateway.subscribe("state", 1, "-V", version, "-q", "1").lines() == ["state on 1 1"]


@pytest.mark.parametrize("options", [["-V", "mqttv311"], ["-V", "mqttv5", "-x", "3600"]])
def test_a_kept_session_survives_a_killed_gateway(gateway, options):
    session = ["-i", "keeper", "-c", "-q", "2", *options]
    subprocess.run(["mosquitto_sub", "-p", str(gateway.port), "-t", "k", "-E", *session], check=True, timeout=PATIENCE)
    for payload in "abc":
        gateway.publish("k", payload, "-q", "2")
    gateway.kill()
    gateway.start()
    assert [line.split()[1] for line in gateway.subscribe("k", 3, *session).lines()] == list("abc")


def test_a_will_is_published_for_a_killed_client(gateway):
    receiving = gateway.subscribe("will", 1)
    victim = gateway.subscribe("none", 1, "--will-topic", "will", "--will-payload", "gone", "--will-qos", "1")
    # The shell of `stdbuf` has become the client itself.
    victim.process.kill()
    assert receiving.lines() == ["will gone 0 0"]


def test_a_second_connection_takes_over(gateway):
    first = gateway.subscribe("t", 1, "-V", "mqttv5", "-i", "same")
    second = gateway.subscribe("t", 1, "-V", "mqttv5", "-i", "same")
    assert "Received DISCONNECT (142)" in first.output()
    gateway.publish("t", "x")
    assert second.lines() == ["t x 0 0"]


def test_tls_and_unix_socket(gateway):
    ca = str(gateway.directory / "cert.pem")
    receiving = gateway.subscribe("t", 2)
    for options in [["-h", "localhost", "-p", str(gateway.tls_port), "--cafile", ca], ["--unix", str(gateway.unix)]]:
        command = ["mosquitto_pub", "-t", "t", "-m", "x", "-q", "1", *options]
        subprocess.run(command, check=True, timeout=PATIENCE)
    assert receiving.lines() == ["t x 0 0"] * 2


def test_users_and_rules(gateway):
    made = subprocess.run([os.environ["FIELDGATE"], "passwd", "ann"], input="secret\n", capture_output=True, text=True)
    entry = next(line.strip() for line in made.stdout.splitlines() if "password_hash" in line)
    entry = entry.removeprefix("- ").strip()
    with gateway.config.open("a") as config:
        config.write(f"users:\n  - {entry}\nacl:\n  - {{ user: ann, read: [\"home/%u/#\"], write: [\"home/%u/#\"] }}\n")
    gateway.stop()
    gateway.start()
    ann = ["-u", "ann", "-P", "secret", "-V", "mqttv5"]
    receiving = gateway.subscribe("home/#", 1, *ann)
    # Return code 4: bad user name or password.
    gateway.publish("home/ann/x", "0", "-u", "ann", "-P", "wrong", code=4)
    gateway.publish("home/bob/x", "1", "-q", "1", *ann)
    gateway.publish("home/ann/x", "2", "-q", "1", *ann)
    assert receiving.lines() == ["home/ann/x 2 0 0"]


def mosquitto_passwd(path, user, password, *options):
    path.touch()
    subprocess.run(["mosquitto_passwd", "-b", *options, path, user, password], check=True, timeout=PATIENCE)


def test_password_and_acl_files_of_mosquitto(gateway):
    passwords, rules = gateway.directory / "passwords", gateway.directory / "rules"
    mosquitto_passwd(passwords, "ann", "secret")
    mosquitto_passwd(passwords, "bob", "hunter2", "-H", "sha512")
    rules.write_text("topic read open/#\nuser ann\ntopic home/#\ntopic deny home/safe\npattern write own/%u/%c\n")
    with gateway.config.open("a") as config:
        config.write("password_file: passwords\nacl_file: rules\n")
    gateway.stop()
    gateway.start()
    ann, bob = ["-u", "ann", "-P", "secret"], ["-u", "bob", "-P", "hunter2", "-i", "b1"]
    receiving = gateway.subscribe("home/#", 2, *ann)
    gateway.publish("home/x", "0", "-u", "ann", "-P", "hunter2", code=4)
    gateway.publish("home/x", "1", "-q", "1", *bob)
    gateway.publish("own/bob/b1", "2", "-q", "1", *bob)
    gateway.publish("home/safe", "3", "-q", "1", *ann)
    gateway.publish("home/x", "4", "-q", "1", *ann)
    # A changed file holds from the reload on.
    mosquitto_passwd(passwords, "cid", "new")
    rules.write_text(rules.read_text() + "user cid\ntopic write home/+\n")
    gateway.process.send_signal(signal.SIGHUP)
    command = ["mosquitto_pub", "-p", str(gateway.port), "-t", "home/y", "-m", "5", "-q", "1", "-u", "cid", "-P", "new"]
    deadline = time.monotonic() + PATIENCE
    while subprocess.run(command, timeout=PATIENCE, capture_output=True).returncode != 0:
        assert time.monotonic() < deadline, gateway.log.read_text()
        time.sleep(0.05)
    assert receiving.lines() == ["home/x 4 0 0", "home/y 5 0 0"]


def test_the_common_name_of_a_certificate_is_the_user(gateway):
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=gateway.directory)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    # Without an extension it would be a certificate of version 1, which rustls refuses.
    (gateway.directory / "extensions").write_text("basicConstraints=CA:FALSE\n")
    for name, subject in [("ann", "/O=Works/CN=ann"), ("nobody", "/O=Works")]:
        openssl("req", *new_key, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
                "-extfile", "extensions", "-out", f"{name}.pem")
    config = gateway.config.read_text().replace(
        "key: key.pem }", "key: key.pem, client_ca: ca.pem }, use_identity_as_username: true")
    gateway.config.write_text(config + "acl:\n  - { for: everyone, read: [\"#\"], write: [\"home/%u\"] }\n")
    gateway.stop()
    gateway.start()
    receiving = gateway.subscribe("home/+", 1)

    def publish(topic, *options):
        command = ["mosquitto_pub", "-h", "localhost", "-p", str(gateway.tls_port), "--cafile", "cert.pem", "-q", "1",
                   "-t", topic, "-m", "x", *options]
        return subprocess.run(command, timeout=PATIENCE, capture_output=True, cwd=gateway.directory).returncode

    assert publish("home/ann") != 0, "a client without a certificate"
    # Return code 4: bad user name or password.
    assert publish("home/", "--cert", "nobody.pem", "--key", "nobody.key") == 4
    ann = ["--cert", "ann.pem", "--key", "ann.key", "-u", "bob", "-P", "x"]
    assert publish("home/bob", *ann) == 0
    assert publish("home/ann", *ann) == 0
    assert receiving.lines() == ["home/ann x 0 0"]
