"""The web UI in a real browser: two gateways, one the uplink of the other, and Chromium.

Screenshots of every view stay in target/peers/screenshots for a person to look at.
"""

import os
import pathlib
import re
import subprocess
import time

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIELDGATE = os.environ.get("FIELDGATE", str(ROOT / "target/debug/fieldgate"))
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SCREENSHOTS = ROOT / "target/peers/screenshots"
# Nothing here takes nearly as long; a test that waits for so long has failed.
PATIENCE = 20
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
VIEWS = {"overview": "#/", "devices": "#/devices", "broker": "#/broker", "log": "#/log"}


class Gateway:
    """A gateway on ports that the system chose."""

    def __init__(self, directory, config):
        directory.mkdir()
        path = directory / "fieldgate.yaml"
        path.write_text(config + f"\nstore: {{ directory: {directory}/store }}\n")
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([FIELDGATE, "run", "--config", path], stdout=log, stderr=log)

    def port(self, line):
        """The port in the log line that holds `line`."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text())
            found = re.search(rf"{line}.*\baddress=[\d.]+:(\d+)", text)
            if found:
                return int(found[1])
            assert self.process.poll() is None, text
            time.sleep(0.05)
        raise AssertionError(f"no {line!r} in the log: {text}")

    def publish(self, topic, value):
        command = ["mosquitto_pub", "-p", str(self.port("listening")), "-q", "1", "-r", "-t", topic, "-m", value]
        subprocess.run(command, check=True, timeout=PATIENCE)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log.read_text()


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    """A gateway with an uplink, a device that does not answer, and a device that an MQTT client is."""
    directory = tmp_path_factory.mktemp("web")
    listener = "listeners: [ { name: local, address: '127.0.0.1:0' } ]"
    cloud = Gateway(directory / "cloud", f"gateway: {{ name: cloud }}\n{listener}\nweb: {{ enabled: false }}")
    gateway = Gateway(directory / "plant", f"""
gateway: {{ name: plant-7 }}
{listener}
web: {{ address: '127.0.0.1:0' }}
upstreams:
  - name: cloud
    url: mqtt://127.0.0.1:{cloud.port("listening")}
    out: [ {{ filter: "devices/#", qos: 1, remote_prefix: "{{gateway}}/" }} ]
modbus:
  - name: bus1
    tcp: 127.0.0.1:9
    devices:
      - {{ name: pump, unit_id: 2, points: [ {{ name: speed, holding_register: 0, type: u16, unit: rpm }} ] }}
""")
    gateway.url = f"http://127.0.0.1:{gateway.port('serving the web UI')}/"
    yield gateway
    gateway.stop()
    cloud.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens pages, and fails when one of them has written an error to its console."""
    contexts, errors = [], []

    def open_page(url, size="desktop", scheme="light"):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    open_page.errors = errors
    expect.set_options(timeout=PATIENCE * 1000)
    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def test_a_live_value_changes_without_a_reload(plant, open_page):
    plant.publish("devices/meter/power", '{"value":2.5,"unit":"kW","quality":"good"}')
    page = open_page(plant.url)
    row = page.locator('[data-device="meter"] [data-point="power"]')
    expect(row.locator(".point-reading")).to_have_text("2.5kW")
    plant.publish("devices/meter/power", '{"value":3.25,"unit":"kW","quality":"good"}')
    expect(row.locator(".point-reading")).to_have_text("3.25kW")
    expect(page.locator(".frame-link")).to_have_text("Live")
    pump = page.locator('[data-device="pump"]')
    expect(pump.locator(".badge")).to_have_text("Down")


def test_the_uplink_is_cut_and_restored(plant, open_page):
    page = open_page(plant.url)
    uplink = page.locator('[data-upstream="cloud"]')
    expect(uplink.locator(".badge")).to_have_text("Connected")
    uplink.get_by_role("button", name="Cut uplink cloud").click()
    expect(uplink.locator(".badge")).to_have_text("Cut")
    for number in range(5):
        plant.publish("devices/meter/counter", str(number))
    expect(uplink.locator(".large")).to_have_text("5")
    uplink.get_by_role("button", name="Restore uplink cloud").click()
    expect(uplink.locator(".badge")).to_have_text("Connected")
    expect(uplink.locator(".large")).to_have_text("0")


def test_what_waits_is_discarded_after_a_question(plant, open_page):
    page = open_page(plant.url)
    uplink = page.locator('[data-upstream="cloud"]')
    offer = uplink.get_by_role("button", name="Discard what waits for uplink cloud")
    uplink.get_by_role("button", name="Cut uplink cloud").click()
    expect(uplink.locator(".badge")).to_have_text("Cut")
    expect(uplink.locator(".large")).to_have_text("0")
    expect(offer).to_be_hidden()
    for number in range(5):
        plant.publish("devices/meter/counter", str(number))
    expect(uplink.locator(".large")).to_have_text("5")
    offer.click()
    sure = uplink.get_by_role("button", name="Discard 5 messages for good")
    uplink.get_by_role("button", name="Keep").click()
    expect(sure).to_be_hidden()
    expect(uplink.locator(".large")).to_have_text("5")
    offer.click()
    sure.click()
    expect(uplink.locator(".large")).to_have_text("0")
    expect(offer).to_be_hidden()
    uplink.get_by_role("button", name="Restore uplink cloud").click()
    expect(uplink.locator(".badge")).to_have_text("Connected")


def test_a_full_queue_says_what_it_gives_up_and_paths_stay_as_they_are(tmp_path, open_page):
    gateway = Gateway(tmp_path / "full", """
listeners: [ { name: local, address: '127.0.0.1:0' } ]
web: { address: '127.0.0.1:0' }
upstreams:
  - name: archive
    url: mqtt://127.0.0.1:9
    connection: manual
    queue: { max_messages: 5 }
    out: [ { filter: "numbers", qos: 1 } ]
serial: [ { name: scale, path: /dev/no-such-port, parse: { regex: "(?<weight>[0-9.]+)" } } ]
""")
    for number in range(8):
        gateway.publish("numbers", str(number))
    page = open_page(f"http://127.0.0.1:{gateway.port('serving the web UI')}/")
    archive = page.locator('[data-upstream="archive"]')
    expect(archive.locator(".reason")).to_contain_text("The queue is full: the oldest messages are given up for new ones")
    expect(archive.locator(".outlook")).to_have_text("Full.")
    expect(archive.locator(".facts")).to_contain_text("dropped3 queue full")
    faults = page.get_by_label("Health")
    expect(faults).to_contain_text("/dev/no-such-port: cannot open", use_inner_text=True)
    expect(faults).to_contain_text("Adapter with 1 device, down")
    gateway.stop()


def test_the_broker_view_lists_the_sessions(plant, open_page):
    page = open_page(plant.url + VIEWS["broker"])
    expect(page.locator("tbody tr", has_text="modbus/bus1")).to_contain_text("devices/pump/+/set")
    page.get_by_label("Show only sessions with").fill("uplink")
    expect(page.locator(".cards tbody tr")).to_have_count(1)


def test_the_log_view_filters_by_level(plant, open_page):
    page = open_page(plant.url + VIEWS["log"])
    expect(page.locator(".lines > li", has_text="serving the web UI")).to_have_count(1)
    page.get_by_role("radio", name="Warning").check()
    expect(page.locator(".lines > li", has_text="device down")).not_to_have_count(0)
    expect(page.locator(".lines > li", has_text="serving the web UI")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_view_fits_its_window(plant, open_page, size, scheme):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    plant.publish("devices/meter/voltage", '{"value":230.4,"unit":"V","quality":"good"}')
    page = open_page(plant.url, size, scheme)
    for name, path in VIEWS.items():
        page.goto(plant.url + path)
        expect(page.locator(".frame-link")).to_have_text("Live")
        expect(page.locator("main h1")).to_be_visible()
        page.screenshot(path=SCREENSHOTS / f"{name}-{size}-{scheme}.png", full_page=name != "log")
        sideways = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert sideways <= 0, f"{name} is wider than a {size}"
        unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, a')].filter((element) =>
            !(element.textContent.trim() || element.getAttribute('aria-label') || element.labels?.length)).length""")
        assert unnamed == 0, f"{name} has controls without a name"


def test_the_page_says_when_the_gateway_is_away_and_comes_back_by_itself(tmp_path, open_page):
    def start(name, port):
        listener = "listeners: [ { name: local, address: '127.0.0.1:0' } ]"
        return Gateway(tmp_path / name, f"gateway: {{ name: {name} }}\n{listener}\nweb: {{ address: '127.0.0.1:{port}' }}")

    gateway = start("before", 0)
    port = gateway.port("serving the web UI")
    page = open_page(f"http://127.0.0.1:{port}/")
    expect(page.locator(".frame-link")).to_have_text("Live")
    gateway.stop()
    expect(page.locator(".frame-link")).to_have_text("No connection")
    expect(page.locator(".notice")).to_contain_text("The gateway does not answer")
    gateway = start("after", port)
    expect(page.locator(".frame-link")).to_have_text("Live")
    expect(page.locator("main h1")).to_have_text("after")
    expect(page.locator(".notice")).to_be_hidden()
    # What the browser says of a gateway that is away; nothing else may be wrong.
    assert all("net::ERR" in error for error in open_page.errors), open_page.errors
    open_page.errors.clear()
    gateway.stop()


def test_from_elsewhere_a_login_is_asked_for(tmp_path, open_page):
    hashing = [FIELDGATE, "passwd", "anna", "--file", tmp_path / "anna.hash"]
    subprocess.run(hashing, input=b"tulip field 7\n", check=True, timeout=PATIENCE)
    gateway = Gateway(tmp_path / "gateway", f"""
gateway: {{ name: plant-8 }}
users: [ {{ name: anna, password_hash: "file:{tmp_path}/anna.hash" }} ]
listeners: [ {{ name: local, address: "127.0.0.1:0" }} ]
web: {{ address: "0.0.0.0:0" }}
""")
    page = open_page(f"http://127.0.0.1:{gateway.port('serving the web UI')}/", "phone")
    page.get_by_label("User").fill("anna")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_contain_text("User or password is wrong.")
    page.screenshot(path=tmp_path / "login.png")
    page.get_by_label("Password").fill("tulip field 7")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("main h1")).to_have_text("plant-8")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("User")).to_be_visible()
    # What the API refused before the login is an error to the browser; nothing else may be.
    assert all("401 (Unauthorized)" in error for error in open_page.errors), open_page.errors
    open_page.errors.clear()
    gateway.stop()
