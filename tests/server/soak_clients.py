"""Many clients of a server at once: do all get answers, and each its own?"""

from __future__ import annotations

import json
import os
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from mlx_mtp.backends.device import waited_ms
from tests.server.soak_watch import summary, told, watching

if TYPE_CHECKING:
    from tests.server.command import Served
    from tests.server.host import Host

    Server = Served | Host

LOOK_S = 0.5  # how often the memory is looked at
WINDOW = 0.05  # of the time, from a tenth on and at the end: the growth is from one to the other


def soak(server: Server, *, clients: int, seconds: float) -> dict[str, Any]:
    """Let clients ask again and again, each its own; compare every reply with the first.

    Returns:
        How many replies came, were lost, or were somebody else's; how slow they and /health were;
        how the memory of both processes grew from a tenth of the time to the end, and how long
        their threads waited for a core in a second.
    """
    crowd = _Crowd(server.url, time.monotonic() + seconds)
    pids = {"server": server.server_pid, "engine": server.engine_pid}
    waited = _waited_ms(pids)
    host, port = server.url.removeprefix("http://").split(":")
    watcher = watching(host, int(port), seconds)
    with ThreadPoolExecutor(clients + 1) as pool:
        memory = pool.submit(_growth, pids, seconds)
        for each in [pool.submit(crowd.ask, number) for number in range(clients)]:
            each.result()
    health = told(watcher)
    return {
        "clients": clients,
        "seconds": seconds,
        **crowd.counts,
        "why": sorted(crowd.reasons),
        "replies_per_s": round(crowd.counts["replies"] / seconds, 1),
        "reply_ms": summary(crowd.times_ms),
        "health_asked": health.pop("asked"),
        "health_bad": sum(health["bad"].values()),
        "health_ms_most": health["total_ms"]["most"],
        "health": health,
        **memory.result(),
        "waited_ms_per_s": {
            name: round((after - waited[name]) / seconds, 1)
            for name, after in _waited_ms(pids).items()
        },
    }


class _Crowd:
    """What all clients saw.

    Attributes:
        counts: replies that came, were lost, were somebody else's.
        reasons: why they were lost.
        times_ms: how long each took.
    """

    def __init__(self, url: str, ends: float) -> None:
        self.counts = {"replies": 0, "lost": 0, "crossed": 0}
        self.reasons: set[str] = set()
        self.times_ms: list[float] = []
        self._url = url
        self._ends = ends
        self._lock = threading.Lock()

    def ask(self, number: int) -> None:
        """Be one client to the end of the time, at least once."""
        rng, expected, asked = random.Random(number), None, 0
        with httpx.Client(base_url=self._url, timeout=300, verify=False) as client:
            while asked == 0 or time.monotonic() < self._ends:
                asked += 1
                began = time.monotonic()
                text, fault = _asked(client, number, streamed=rng.random() < 0.5)
                took_ms = 1e3 * (time.monotonic() - began)
                expected = text if expected is None and not fault else expected
                with self._lock:
                    self.counts["replies"] += 1
                    self.counts["lost"] += bool(fault)
                    self.counts["crossed"] += not fault and text != expected
                    self.reasons.update([fault] if fault else [])
                    self.times_ms.append(took_ms)


def _asked(client: httpx.Client, number: int, *, streamed: bool) -> tuple[str, str]:
    """Ask one question; return the answer, and why there is none."""
    messages = [{"role": "user", "content": f"I am client {number}, who are you?"}]
    body = {"messages": messages, "max_tokens": 8 + number % 9, "stream": streamed}
    try:
        reply = client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        return "", repr(error)
    if reply.status_code != 200:
        return "", reply.text[:200]
    if not streamed:
        return reply.json()["choices"][0]["message"]["content"], ""
    *chunks, done = stream_data(reply.text) or ["an empty stream"]
    if done != "[DONE]":
        return "", done[:200]
    found = [json.loads(chunk)["choices"][0] for chunk in chunks]
    return "".join(choice["delta"].get("content") or "" for choice in found), ""


def stream_data(stream: str) -> list[str]:
    """The data of a stream's events; comments, which say that it still lives, are left out."""
    lines = stream.split("\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def _growth(pids: dict[str, int | None], seconds: float) -> dict[str, Any]:
    """Look at the memory all the while; say how it was at the end and how it grew."""
    began, looks = time.monotonic(), []
    while (since := time.monotonic() - began) < seconds:
        looks.append((since / seconds, _memory(pids)))
        time.sleep(min(LOOK_S, seconds * WINDOW / 4))
    found: dict[str, Any] = {}
    for name in pids:
        early = [rss[name] for at, rss in looks if 0.1 <= at < 0.1 + WINDOW]
        late = [rss[name] for at, rss in looks if at >= 1 - WINDOW]
        if early and late and all(early + late):
            after = statistics.median(late)
            found[f"{name}_mb"] = round(after / 1e6, 1)
            found[f"{name}_growth"] = round(after / statistics.median(early) - 1, 4)
    return found


def _memory(pids: dict[str, int | None]) -> dict[str, int]:
    """Resident bytes; 0 of a process that is gone."""
    page, found = os.sysconf("SC_PAGE_SIZE"), {}
    for name, pid in pids.items():
        file = Path(f"/proc/{pid}/statm")
        found[name] = int(file.read_text().split()[1]) * page if file.exists() else 0
    return found


def _waited_ms(pids: dict[str, int | None]) -> dict[str, float]:
    """How long the threads of each waited for a core so far."""
    return {name: waited_ms(Path(f"/proc/{pid}/task")) for name, pid in pids.items()}
