#!/usr/bin/env python3
"""Tells how the gateway itself is doing: load, CPU temperature, free disk and memory.

An adapter program for Fieldgate, and an example of one: Python's standard library and JSON lines, see README.md.

Settings (all optional):
    interval: seconds between readings, 1 to 3600, default 10; the point `interval` can be set while it runs
    path:     where free disk space is measured, default "/"
"""

import json
import os
import select
import shutil
import sys
import time

VERSION = 1
SETTINGS_ARE_WRONG = 78  # EX_CONFIG: tells the gateway not to start us again


def send(**line):
    # Flushed, or the line would wait in Python's buffer.
    print(json.dumps(line), flush=True)


def reading(point, value, unit=None):
    send(type="reading", point=point, value=value, unit=unit)


def give_up(message):
    print(message, file=sys.stderr)
    sys.exit(SETTINGS_ARE_WRONG)


def check_interval(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= 3600:
        raise ValueError("interval must be 1 to 3600 seconds, not %r" % (value,))
    return value


def cpu_temperature():
    """In degrees Celsius, or None where the kernel knows none."""
    try:
        with open("/sys/class/thermal/thermal_zone0/temp") as file:
            return int(file.read()) / 1000
    except (OSError, ValueError):
        return None


def available_memory():
    """In bytes, or None on another system than Linux."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def measure(path):
    reading("load", round(os.getloadavg()[0], 2))
    reading("disk_free", shutil.disk_usage(path).free, "B")
    temperature = cpu_temperature()
    if temperature is not None:
        reading("cpu_temperature", round(temperature, 1), "°C")
    memory = available_memory()
    if memory is not None:
        reading("memory_available", memory, "B")


def lines(buffer):
    """Takes the whole lines out of `buffer` and leaves the rest."""
    while b"\n" in buffer:
        line, _, rest = bytes(buffer).partition(b"\n")
        buffer[:] = rest
        yield line


def main():
    greeting = json.loads(sys.stdin.buffer.raw.readline())
    settings = greeting.get("settings") or {}
    path = settings.get("path", "/")
    try:
        interval = check_interval(settings.get("interval", 10))
        shutil.disk_usage(path)
    except (ValueError, OSError, TypeError) as error:
        give_up("sysinfo: %s" % error)
    send(type="hello", version=VERSION)
    send(type="log", level="info", message="measuring every %s s" % interval)

    buffer = bytearray()
    due = time.monotonic()
    while True:
        now = time.monotonic()
        if now >= due:
            measure(path)
            due = now + interval
        ready, _, _ = select.select([sys.stdin], [], [], max(0, due - now))
        if not ready:
            continue
        data = os.read(sys.stdin.fileno(), 65536)
        if not data:
            return  # the gateway asks us to stop
        buffer += data
        for line in lines(buffer):
            command = json.loads(line)
            if command.get("type") != "command":
                continue  # from a newer gateway
            if command["point"] != "interval":
                send(type="result", id=command["id"], ok=False, error="only the point `interval` can be set")
                continue
            try:
                interval = check_interval(command["value"])
            except ValueError as error:
                send(type="result", id=command["id"], ok=False, error=str(error))
                continue
            due = time.monotonic()
            send(type="result", id=command["id"], ok=True, value=interval)
            reading("interval", interval, "s")


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        pass
