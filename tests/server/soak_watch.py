"""Asks a server for /health again and again, and notes how long each part of it took.

``soak_watch.py HOST PORT SECONDS`` is a process of its own, so that the clients that
load the server do not hold it up; it ends with one line of JSON.
"""

from __future__ import annotations

import gc
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PAUSE_S = 0.05
PATIENCE_S = 60.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def watching(host: str, port: int, seconds: float) -> subprocess.Popen[str]:
    """Start the watcher; ``told`` waits for what it has to say."""
    command = [sys.executable, "-S", __file__, host, str(port), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def told(watcher: subprocess.Popen[str]) -> dict[str, Any]:
    """What a watcher has seen: ``median``, ``p99`` and ``most`` of each part, in milliseconds."""
    said, _ = watcher.communicate()
    assert watcher.returncode == 0, "nobody watched /health to the end"
    return json.loads(said)


def watch(host: str, port: int, seconds: float) -> dict[str, Any]:
    """Ask on a new connection each time.

    Returns:
        How often, how often it failed, and how long it took: ``total_ms``, of which ``connect_ms``
        until there was a connection, ``answer_ms`` until the last byte; ``core_ms`` is how long
        this process itself waited for a core meanwhile (0 where Linux does not count it).
    """
    parts: dict[str, list[float]] = {"total": [], "connect": [], "answer": [], "core": []}
    bad: dict[str, int] = {}
    ends = time.monotonic() + seconds
    while (began := time.monotonic()) < ends:
        waited = _waited_ms()
        try:
            connected, status = _ask(host, port)
        except OSError as error:
            connected, status = began, repr(error)
        done = time.monotonic()
        if status != "200":
            bad[status] = bad.get(status, 0) + 1
        parts["total"].append(1e3 * (done - began))
        parts["connect"].append(1e3 * (connected - began))
        parts["answer"].append(1e3 * (done - connected))
        parts["core"].append(_waited_ms() - waited)
        time.sleep(PAUSE_S)
    found: dict[str, Any] = {f"{name}_ms": summary(values) for name, values in parts.items()}
    return {"asked": len(parts["total"]), "bad": bad} | found


def _ask(host: str, port: int) -> tuple[float, str]:
    """Ask once; return when there was a connection, and the status."""
    with socket.create_connection((host, port), PATIENCE_S) as connection:
        connected = time.monotonic()
        connection.sendall(_REQUEST)
        answer = b""
        while piece := connection.recv(2**16):
            answer += piece
    return connected, answer[9:12].decode("ascii", "replace")


def summary(values: list[float]) -> dict[str, float]:
    """Median, 99th of a hundred and the most; empty where there are no values."""
    if not values:
        return {}
    ranked = sorted(values)
    places = {"median": 0.5, "p99": 0.99, "most": 1.0}
    return {
        name: round(ranked[math.ceil(place * len(ranked)) - 1], 1) for name, place in places.items()
    }


def _waited_ms() -> float:
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0


if __name__ == "__main__":
    gc.disable()  # a pause of ours would look like one of the server's
    print(json.dumps(watch(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))), flush=True)
