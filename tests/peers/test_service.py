"""The program as a service: systemd's notifications, signals, exit codes, a damaged database, logins and certificates."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest

# Far more than anything here takes, for a machine under load.
PATIENCE = 30
# What the gateway promises for its end.
DRAIN = 2


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(what, condition):
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.001)
    return result


def fieldgate(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": PATIENCE, **options}
    return subprocess.run([os.environ["FIELDGATE"], *map(str, arguments)], **options)


class Gateway:
    """A gateway whose configuration a test completes; listens on `port` and `web`."""

    def __init__(self, directory, more="", listeners="", port=None, store="data"):
        directory.mkdir(exist_ok=True)
        self.directory, self.port, self.web = directory, port or free_port(), free_port()
        self.config, self.log = directory / "fieldgate.yaml", directory / "log"
        self.head = f"""gateway: {{ name: test }}
store: {{ directory: {store} }}
web: {{ address: "127.0.0.1:{self.web}" }}
listeners:
  - {{ name: local, address: "127.0.0.1:{self.port}" }}
"""
        self.configure(more, listeners)
        self.process = None

    def configure(self, more="", listeners=""):
        self.config.write_text(self.head + listeners + more)

    def spawn(self, **environment):
        inherited = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "JOURNAL_STREAM")}
        with self.log.open("ab") as log:
            command = [os.environ["FIELDGATE"], "run", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**inherited, **environment})

    def listens(self):
        assert self.process.poll() is None, self.log.read_text() if self.log.exists() else self.process.returncode
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self):
        """Starts it and waits until it listens; how long that took."""
        began = time.monotonic()
        self.spawn()
        until(self.log.read_text, self.listens)
        return time.monotonic() - began

    def says(self, text):
        until(self.log.read_text, lambda: text in self.log.read_text())

    def end(self, code=0):
        """Waits for the end; how long that took."""
        began = time.monotonic()
        assert self.process.wait(PATIENCE) == code, self.log.read_text()
        return time.monotonic() - began

    def stop(self):
        self.process.terminate()
        return self.end()

    def api(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.web}/api/v1/{path}", timeout=PATIENCE) as answer:
            return json.load(answer)


@contextmanager
def running(gateway, start=True):
    if start:
        gateway.start()
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.process.kill()
            gateway.process.wait()


def publish(port, topic, payload, *options):
    command = ["mosquitto_pub", "-p", str(port), "-t", topic, "-m", payload, "-q", "1", *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


class Subscriber:
    """A `mosquitto_sub` that has subscribed; its lines are read as they come."""

    def __init__(self, port, topic, *options):
        command = ["stdbuf", "-oL", "mosquitto_sub", "-d", "-p", str(port), "-t", topic, "-F", "> %t %p", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.seen = []
        self.line("SUBACK")

    def line(self, part):
        for line in self.process.stdout:
            self.seen.append(line)
            if part in line:
                return line
        raise AssertionError("".join(self.seen))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Systemd:
    """What systemd is to a service: a socket that hears its notifications."""

    def __init__(self, directory):
        self.path = directory / "notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))
        self.socket.settimeout(PATIENCE)

    def next(self, *but):
        """The next notification, as its assignments; what has a key of `but` is passed over."""
        while True:
            message = dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())
            if not message.keys() & set(but):
                return message


def test_systemd_is_told_what_happens(tmp_path):
    systemd = Systemd(tmp_path)
    gateway = Gateway(tmp_path)
    gateway.spawn(NOTIFY_SOCKET=str(systemd.path), WATCHDOG_USEC="200000")
    try:
        assert systemd.next("WATCHDOG")["READY"] == "1"
        # What is ready listens already.
        socket.create_connection(("127.0.0.1", gateway.port)).close()
        times = []
        while len(times) < 4:
            assert systemd.next() == {"WATCHDOG": "1"}
            times.append(time.monotonic())
        assert times[3] - times[1] < 1, "pings are wanted each 0.2 s"
        for config, heard in [("mqttsn: { address: 127.0.0.1:0 }\n", "configuration read again"),
                              ("wrong: 1\n", "nothing was changed")]:
            gateway.configure(config)
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            gateway.process.send_signal(signal.SIGHUP)
            reloading = systemd.next("WATCHDOG")
            # `Type=notify-reload` tells by the time that this is the answer to its signal.
            assert reloading["RELOADING"] == "1" and int(reloading["MONOTONIC_USEC"]) >= before
            assert systemd.next("WATCHDOG") == {"READY": "1"}
            gateway.says(heard)
        gateway.process.terminate()
        assert systemd.next("WATCHDOG") == {"STOPPING": "1"}
        gateway.end()
    finally:
        gateway.process.kill()


def test_a_drain_with_clients_and_queues_is_short_and_keeps_what_was_acknowledged(tmp_path):
    upstream = f"""upstreams:
  - {{ name: cloud, url: "mqtt://127.0.0.1:{free_port()}", out: [ {{ filter: "q/#" }} ] }}
"""
    gateway = Gateway(tmp_path, upstream)
    count = 500
    keeper = ["-c", "-i", "keeper", "-q", "1", "-x", "3600"]
    with running(gateway):
        with Subscriber(gateway.port, "q/#", *keeper):
            pass
        clients = [Subscriber(gateway.port, "idle/#", "-V", version) for version in ["mqttv311", "mqttv5"] * 5]
        lines = "".join(f"{number}\n" for number in range(count))
        command = ["mosquitto_pub", "-p", str(gateway.port), "-t", "q/x", "-q", "1", "-l"]
        subprocess.run(command, input=lines, text=True, check=True, timeout=PATIENCE)
        took = gateway.stop()
        for client in clients:
            client.__exit__()
    print(f"drain with {len(clients)} clients and 2 queues of {count}: {1000 * took:.0f} ms")
    assert took < DRAIN
    with running(gateway):
        assert gateway.api("upstreams")["upstreams"][0]["queue"]["messages"] == count
        command = ["mosquitto_sub", "-p", str(gateway.port), "-t", "q/#", "-C", str(count), "-W", str(PATIENCE), *keeper]
        assert subprocess.run(command, capture_output=True, text=True).stdout == lines
        gateway.stop()


def test_a_second_signal_ends_at_once(tmp_path):
    program = tmp_path / "stubborn"
    program.write_text("#!/bin/sh\ntrap '' TERM\necho '{\"type\":\"hello\",\"version\":1}'\nexec sleep 5\n")
    program.chmod(0o755)
    gateway = Gateway(tmp_path, f"plugins: [ {{ name: stubborn, command: [ {program} ] }} ]\n")
    with running(gateway):
        gateway.says("adapter program started")
        gateway.process.terminate()
        gateway.says("once more to stop at once")
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.end(code=130) < DRAIN
        assert "stopping at once" in gateway.log.read_text()


def test_a_reload_says_where_it_is_wrong_and_leaves_alone_what_did_not_change(tmp_path):
    other = free_port()
    listener = f'  - {{ name: other, address: "127.0.0.1:{other}" }}\n'
    bus = """modbus:
  - name: bus
    tcp: 127.0.0.1:9
    timeout: 1s
    devices: [ { name: m, unit_id: 1, points: [ { name: p, coil: 0 } ] } ]
"""
    gateway = Gateway(tmp_path, bus, listener)
    with running(gateway), Subscriber(gateway.port, "a", "-V", "mqttv5") as stays, Subscriber(other, "a") as goes:
        gateway.configure(bus.replace("timeout: 1s", "timeout: 1"), listener)
        gateway.process.send_signal(signal.SIGHUP)
        gateway.says("nothing was changed")
        assert f"{gateway.config}:10:14" in gateway.log.read_text()
        publish(gateway.port, "a", "1")
        assert [stays.line("> "), goes.line("> ")] == ["> a 1\n"] * 2
        gateway.configure(bus.replace("timeout: 1s", "timeout: 2s"), listener.replace("}", ", max_connections: 5 }"))
        gateway.process.send_signal(signal.SIGHUP)
        gateway.says("configuration read again")
        for change in ["bus `bus`", "listener `other`"]:
            assert re.search(f"{change} .*restarted", gateway.log.read_text()), gateway.log.read_text()
        assert "listener `local`" not in gateway.log.read_text()
        assert publish(other, "a", "2").returncode == 0
        assert stays.line("> ") == "> a 2\n"
        assert "DISCONNECT" not in "".join(stays.seen) and stays.process.poll() is None
        gateway.stop()


def test_what_the_system_refuses_is_exit_code_2_with_a_remedy(tmp_path):
    def refused(gateway, *parts):
        done = fieldgate("run", "--config", gateway.config)
        assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
        assert len(done.stderr.splitlines()) <= 3, done.stderr

    with running(Gateway(tmp_path / "first")) as first:
        taken = Gateway(tmp_path / "taken", port=first.port)
        refused(taken, f"127.0.0.1:{first.port}", "another program has the address", "listener `local`")
        same = Gateway(tmp_path / "same", store=first.directory / "data")
        refused(same, f"in use by the process {first.process.pid}", "stop it first, or give this gateway another directory")
        first.stop()
    # Not even root can make a directory here, or write in this one.
    refused(Gateway(tmp_path / "proc", store="/proc/fieldgate"), "/proc/fieldgate cannot be created", "`store.directory`")
    refused(Gateway(tmp_path / "unwritable", store="/proc"), "/proc/fieldgate.lock cannot be written", "must be allowed to write")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        refused(Gateway(tmp_path / "here", store=closed), "cannot be written", "must be allowed to write")


def test_the_users_error_is_exit_code_1_with_the_whole_report(tmp_path):
    config = tmp_path / "fieldgate.yaml"
    config.write_text("""gateway: { name: plant-7 }
modbus:
  - name: bus1
    tcp: 10.0.0.5:502
    devices:
      - name: meter
        unit_id: 300
        poll_intervall: 5s
        points: [ { name: power, input_register: 0, type: f32 } ]
""")
    expected = """error: `unit_id` is out of range
 --> fieldgate.yaml:7:18
  |
7 |         unit_id: 300
  |                  ^^^ must be from 0 to 255

error: unknown key `poll_intervall` in `modbus[].devices[]`
 --> fieldgate.yaml:8:9
  |
8 |         poll_intervall: 5s
  |         ^^^^^^^^^^^^^^ did you mean `poll_interval`?

fieldgate.yaml: 2 errors
"""
    for command in ["check", "run"]:
        done = fieldgate(command, "--config", "fieldgate.yaml", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_how_long_a_start_takes(tmp_path):
    took = []
    gateway = Gateway(tmp_path)
    for _ in range(5):
        took.append(1000 * gateway.start())
        gateway.stop()
    print("start to listening: " + ", ".join(f"{time:.0f}" for time in took) + " ms")
    assert min(took) < 2000


def test_a_damaged_database_is_moved_aside_and_said(tmp_path):
    gateway = Gateway(tmp_path)
    with running(gateway):
        publish(gateway.port, "a", "1", "-r")
        gateway.stop()
    garbage = os.urandom(50_000)
    (tmp_path / "data" / "fieldgate.db").write_bytes(garbage)
    with running(gateway):
        aside = list((tmp_path / "data").glob("fieldgate.db.corrupt-*Z"))
        assert [path.read_bytes() for path in aside] == [garbage]
        status = gateway.api("status")["status"]
        store = next(component for component in status["components"] if component["kind"] == "store")
        assert status["health"] == store["health"] == "degraded"
        assert f"moved to {aside[0]}" in store["reason"]
        assert re.search(rf"ERROR .*moved aside.*{re.escape(str(aside[0]))}", gateway.log.read_text())
        assert any("moved aside" in line["message"] for line in gateway.api("log?level=error")["lines"])
        assert publish(gateway.port, "a", "2", "-r").returncode == 0
        gateway.stop()
    with running(gateway):
        assert gateway.api("status")["status"]["health"] == "good", "once it is known, it is no alarm any more"
        gateway.stop()


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_who_may_do_what(tmp_path, version):
    made = fieldgate("passwd", "ann", input="correct horse\n")
    rules = 'acl:\n  - { user: ann, read: ["home/%u/#"], write: ["home/%u/#"] }\n'
    gateway = Gateway(tmp_path, made.stdout + rules + "allow_anonymous: never\n")
    ann = ["-u", "ann", "-P", "correct horse", "-V", version]

    with running(gateway):
        with Subscriber(gateway.port, "home/ann/#", *ann) as subscriber:
            denied = publish(gateway.port, "home/bob/x", "1", *ann)
            # 3.1.1 has no word for it: the message is acknowledged and goes nowhere.
            assert ("ot authorized" in denied.stderr) == (version == "mqttv5"), denied
            publish(gateway.port, "home/ann/x", "2", *ann)
            assert subscriber.line("> ") == "> home/ann/x 2\n"
        command = ["mosquitto_sub", "-p", str(gateway.port), "-t", "home/bob/#", "-d", "-W", str(PATIENCE), *ann]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert "All subscription requests were denied." in refused.stderr + refused.stdout
        for wrong in [["-u", "ann", "-P", "wrong"], ["-u", "bob", "-P", "correct horse"], []]:
            assert publish(gateway.port, "home/ann/x", "3", "-V", version, *wrong).returncode in (4, 5, 134, 135)
        log = gateway.log.read_text()
        assert "wrong" not in log.replace("wrong password", "") and "correct horse" not in log, log
        gateway.stop()


def test_a_log_that_nobody_reads_any_more_is_no_reason_to_stop(tmp_path):
    gateway = Gateway(tmp_path)
    ours, theirs = os.pipe()
    gateway.process = subprocess.Popen([os.environ["FIELDGATE"], "run", "--config", gateway.config], stdout=theirs, stderr=theirs)
    os.close(theirs)
    with running(gateway, start=False):
        until(lambda: "not listening", gateway.listens)
        os.close(ours)
        assert publish(gateway.port, "a", "1", "-u", "nobody", "-P", "x").returncode != 0
        assert publish(gateway.port, "a", "1").returncode == 0
        status = gateway.api("status")["status"]
        assert status["health"] == "good", status
        messages = [line["message"] for line in gateway.api("log")["lines"]]
        assert any("login refused" in message for message in messages), messages
        assert not any("fault" in message for message in messages), messages
        gateway.process.terminate()
        assert gateway.process.wait(PATIENCE) == 0


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def authority(directory):
    directory.mkdir()
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj",
            f"/CN={directory.name}", "-keyout", directory / "ca.key", "-out", directory / "ca.pem")
    return directory


def issue(ca, name, san):
    request, certificate, key, extensions = (ca / f"{name}.{end}" for end in ("csr", "pem", "key", "ext"))
    extensions.write_text(f"subjectAltName={san}\nbasicConstraints=CA:FALSE\n")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}", "-keyout", key,
            "-out", request)
    openssl("x509", "-req", "-in", request, "-CA", ca / "ca.pem", "-CAkey", ca / "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", extensions, "-out", certificate)
    return ["--cert", certificate, "--key", key]


@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_a_listener_may_ask_for_a_certificate(tmp_path, version):
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs")
    issue(ours, "server", "DNS:localhost,IP:127.0.0.1")
    port = free_port()
    tls = "{ certificate: ours/server.pem, key: ours/server.key, client_ca: ours/ca.pem, require_certificate: true }"
    gateway = Gateway(tmp_path, listeners=f'  - {{ name: tls, address: "127.0.0.1:{port}", tls: {tls} }}\n')
    base = ["-h", "localhost", "-V", version]
    trusting = [*base, "--cafile", ours / "ca.pem"]
    with running(gateway):
        with Subscriber(port, "a", *trusting, *issue(ours, "watcher", "DNS:watcher")) as subscriber:
            for options in [
                trusting,
                [*trusting, *issue(theirs, "stranger", "DNS:stranger")],
                [*base, "--cafile", theirs / "ca.pem", *issue(ours, "distrustful", "DNS:distrustful")],
                base,
            ]:
                assert publish(port, "a", "refused", *options).returncode != 0, options
            assert publish(port, "a", "taken", *trusting, *issue(ours, "door-1", "DNS:door-1")).returncode == 0
            assert subscriber.line("> ") == "> a taken\n"
        gateway.stop()
