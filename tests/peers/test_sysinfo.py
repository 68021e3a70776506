"""The example adapter program, as the gateway would run it: does it keep to plugins/adapters/README.md?"""

import json
import pathlib
import subprocess

PROGRAM = pathlib.Path(__file__).parents[2] / "plugins" / "adapters" / "sysinfo.py"


def start(settings):
    program = subprocess.Popen(
        [PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    hello = {"type": "hello", "version": 1, "name": "s", "devices": ["s"], "settings": settings, "future": 1}
    program.stdin.write(json.dumps(hello) + "\n")
    return program


def read_until(program, wanted):
    for line in program.stdout:
        line = json.loads(line)
        if all(line.get(key) == value for key, value in wanted.items()):
            return line
    raise AssertionError("the program ended without %r; it said: %s" % (wanted, program.stderr.read()))


def test_it_greets_measures_takes_commands_and_ends_with_its_stdin():
    program = start({"interval": 60})
    assert json.loads(program.stdout.readline()) == {"type": "hello", "version": 1}
    assert isinstance(read_until(program, {"type": "reading", "point": "load"})["value"], float)
    assert read_until(program, {"type": "reading", "point": "disk_free"})["unit"] == "B"

    def command(id, point, value):
        line = {"type": "command", "id": id, "device": "s", "point": point, "value": value}
        program.stdin.write('{"type":"future"}\n' + json.dumps(line) + "\n")
        return read_until(program, {"type": "result", "id": id})

    assert command(1, "interval", 1) == {"type": "result", "id": 1, "ok": True, "value": 1}
    # It measures again at once, long before the first interval is over.
    read_until(program, {"type": "reading", "point": "load"})
    assert command(2, "interval", "often")["ok"] is False
    assert command(3, "load", 1)["ok"] is False
    program.stdin.close()
    assert program.wait(timeout=10) == 0
    assert program.stderr.read() == ""


def test_wrong_settings_end_it_with_the_exit_code_for_that():
    for settings in [{"interval": 0}, {"interval": "often"}, {"path": "/no/such/path"}]:
        program = start(settings)
        _, errors = program.communicate(timeout=10)
        assert program.returncode == 78
        assert errors.startswith("sysinfo: ")
