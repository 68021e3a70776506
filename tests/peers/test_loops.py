"""Gateways that are bridged to each other, and around other brokers: what is published anywhere is seen once at each site."""

import subprocess
import urllib.request
from contextlib import ExitStack

import pytest
from test_upstream import PATIENCE, Gateway, free_port, running, until, watching

COUNT = 50


def upstream(port, rules, version="newest", more=""):
    return f"""
url: mqtt://127.0.0.1:{port}
version: "{version}"
backoff: {{ base: 100ms, cap: 500ms }}
{rules}
{more}
"""


OUT = "out: [ { filter: devices/#, qos: 1 } ]"
IN = "in: [ { filter: devices/#, qos: 1 } ]"


class Plain:
    """A mosquitto that knows nothing of gateways."""

    def __init__(self, directory, name):
        self.port = free_port()
        self.log, config = directory / f"{name}.log", directory / f"{name}.conf"
        config.write_text(f"allow_anonymous true\nlistener {self.port} 127.0.0.1\n")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(["/usr/sbin/mosquitto", "-c", config, "-v"], stdout=log, stderr=log)
        until(self.log.read_text, lambda: "running" in self.log.read_text())

    def stop(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


def publish(port, name, count=COUNT):
    lines = "".join(f"{name}-{number}\n" for number in range(count))
    command = ["mosquitto_pub", "-V", "5", "-p", str(port), "-t", "devices/m/v", "-q", "1", "-l"]
    subprocess.run(command, input=lines, text=True, check=True, timeout=PATIENCE)


def watcher(port):
    # The publishers of the test do not wait for this one to be subscribed: what is published first is asked for again.
    return ["mosquitto_sub", "-V", "5", "-p", str(port), "-t", "devices/#", "-q", "1"]


def metrics(gateway, name):
    """The values of a metric, by its labels."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{gateway.web}/metrics", timeout=PATIENCE).read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(name + "{"))
    return {labels[len(name):]: float(value) for labels, value in lines}


def see_each_once(sites, ports):
    """Publishes at each of `ports` and checks what the watchers of all `sites` see; how much was published at each."""
    published = [COUNT + 1 for _ in ports]
    with ExitStack() as stack:
        seen = [stack.enter_context(watching(watcher(port))) for port in sites]
        # Until each site sees what is published at each: then all bridges are up and all watchers subscribed.
        for number, port in enumerate(ports):
            def is_seen():
                publish(port, f"first{number}", 1)
                published[number] += 1
                return all(f"first{number}-0" in lines for lines in seen)
            until(lambda: str(seen), is_seen)
        for number, port in enumerate(ports):
            publish(port, f"then{number}")
        expected = sorted(f"then{number}-{index}" for number in range(len(ports)) for index in range(COUNT))
        then = lambda lines: [line for line in lines if line.startswith("then")]
        until(lambda: str(seen), lambda: all(set(then(lines)) >= set(expected) for lines in seen))
        # What comes after another message on the same way tells that the echo of the other would have come.
        for number, port in enumerate(ports):
            publish(port, f"last{number}", 1)
        last = [f"last{number}-0" for number in range(len(ports))]
        until(lambda: str(seen), lambda: all(set(lines) >= set(last) for lines in seen))
        for lines in seen:
            assert sorted(then(lines)) == expected
            assert [line for line in sorted(lines) if line.startswith("last")] == last
    return published


@pytest.mark.parametrize("versions", [("5", "5"), ("3.1.1", "3.1.1"), ("5", "3.1.1")])
@pytest.mark.parametrize("rules", [OUT, IN], ids=["out", "in"])
def test_two_gateways_that_are_each_others_upstream(tmp_path, versions, rules):
    ports = [free_port(), free_port()]
    gateways = [
        Gateway(tmp_path / name, upstream(other, rules, version), port=own)
        for name, own, other, version in zip(("near", "far"), ports, reversed(ports), versions)
    ]
    with running(gateways[0]), running(gateways[1]):
        for gateway, version in zip(gateways, versions):
            gateway.says("upstream connected" if version == "5" else "is a Fieldgate and is spoken to in MQTT 3.1.1")
        see_each_once(ports, ports)
        # One gateway is gone for a while, and comes back as another start of it.
        gateways[1].stop()
        publish(ports[0], "meanwhile", 10)
        gateways[1].start()
        published = see_each_once(ports, ports)
        # It has sent what was published at it since, and fetched what was published at the other: nothing else crosses.
        counts = [metrics(gateways[1], f"fieldgate_upstream_messages_{what}_total") for what in ("sent", "received")]
        sent, received = (count['{upstream="cloud"}'] for count in counts)
        if rules == OUT:
            assert (sent, received) == (published[1], 0)
        else:
            assert sent == 0 and published[0] <= received <= published[0] + 10
        for gateway in gateways:
            looped = metrics(gateway, "fieldgate_upstream_messages_dropped_total")['{upstream="cloud",reason="looped"}']
            returned = metrics(gateway, "fieldgate_listener_messages_looped_total")['{listener="local"}']
            assert (looped, returned) == (0, 0), "nothing was sent back"


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_two_gateways_at_one_plain_broker(tmp_path, version):
    plain = Plain(tmp_path, "plain")
    try:
        gateways = [Gateway(tmp_path / name, upstream(plain.port, f"{OUT}\n{IN}", version, f"client_id: {name}")) for name in "ab"]
        with running(gateways[0]), running(gateways[1]):
            see_each_once([gateway.port for gateway in gateways] + [plain.port], [gateway.port for gateway in gateways] + [plain.port])
    finally:
        plain.stop()


def test_around_two_gateways_and_two_plain_brokers_a_message_ends_where_it_began(tmp_path):
    one, other = Plain(tmp_path, "one"), Plain(tmp_path, "other")
    try:
        def at(name, fetch, forward):
            gateway = Gateway(tmp_path / name, upstream(fetch, IN, "5", f"client_id: {name}"), start=False)
            text = gateway.config.read_text()
            second = upstream(forward, OUT, "5", f"client_id: {name}").strip().replace("\n", "\n    ")
            gateway.config.write_text(f"{text}  - name: second\n    {second}\n")
            gateway.start()
            return gateway
        first, second = at("a", one.port, other.port), at("b", other.port, one.port)
        with running(first), running(second):
            # A plain broker cannot know that it has had a message: only the gateways can, and they see each once.
            see_each_once([first.port, second.port], [first.port, second.port])
            looped = [metrics(gateway, "fieldgate_upstream_messages_dropped_total")['{upstream="cloud",reason="looped"}'] for gateway in (first, second)]
            assert min(looped) >= COUNT, looped
    finally:
        one.stop()
        other.stop()


def test_an_upstream_that_is_the_gateway_itself(tmp_path):
    port = free_port()
    with running(Gateway(tmp_path / "itself", upstream(port, f"{OUT}\n{IN}"), port=port)) as gateway:
        gateway.says("this upstream is this gateway itself")
        publish(port, "x")
        assert metrics(gateway, "fieldgate_upstream_messages_sent_total") == {'{upstream="cloud"}': 0}
