"""Kill the chat app, or its engine, while it streams, and check what is left.

After every SIGKILL of the app the history must open, be sound, and hold all text that the page was
sent up to a second before.  When the engine is killed, by turns with SIGKILL and SIGSEGV, the
stream must end with an error within a second, the history must hold all that was sent, and another
engine must be there within five.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from mlx_mtp.apps.history.store import History

PROCESS = Path(__file__).with_name("process.py")
MAX_LOST_S = 1.0
MAX_ERROR_S = 1.0
MAX_RETURN_S = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a kill left.

    Attributes:
        sent: letters that the page was sent.
        kept: letters in the history.
        lost_s: how long before the kill the first lost letter was sent; 0.0 where none is lost.
    """

    sent: int
    kept: int
    lost_s: float


def kill_once(path: Path, stream_s: float) -> Outcome:
    """Run the app, stream for so long, kill it, and look.

    Raises:
        AssertionError: the history is not sound, or holds another text.
    """
    killed: list[float] = []

    def kill() -> None:
        process.send_signal(signal.SIGKILL)
        killed.append(time.monotonic())

    with _running(path) as (process, client):
        sent, _ = _stream(client, stream_s, kill)
        process.wait()
    text = _kept_text(path)
    whole = "".join(piece for _, piece in sent)
    assert text.startswith(whole[: len(text)]) and whole.startswith(text[: len(whole)])
    letters, lost_s = 0, 0.0
    for at, piece in sent:
        letters += len(piece)
        if letters > len(text):
            lost_s = max(0.0, killed[0] - at)
            break
    return Outcome(len(whole), len(text), lost_s)


@dataclass(frozen=True)
class EngineOutcome:
    """What many kills of the engine left.

    Attributes:
        letters: that the page was sent; the history holds each of them.
        error_s: the longest from a kill to the end of the stream.
        return_s: the longest from a kill to another engine.
    """

    letters: int
    error_s: float
    return_s: float


def kill_engine_often(path: Path, kills: int, *, seed: int) -> EngineOutcome:
    """Run the app, and kill its engine in the middle of so many answers.

    Raises:
        AssertionError: a stream had no clean end, or the history holds another text.
    """
    chance, error_s, return_s = random.Random(seed), 0.0, 0.0
    texts: list[str] = []
    with _running(path) as (process, client):
        for at in range(kills):
            number, began = (signal.SIGKILL, signal.SIGSEGV)[at % 2], 0.0

            def kill(number: signal.Signals = number) -> None:
                nonlocal began
                began = time.monotonic()
                os.kill(_child_of(process.pid), number)

            sent, end = _stream(client, chance.uniform(0.1, 0.6), kill)
            error_s = max(error_s, time.monotonic() - began)
            assert end["state"] == "interrupted" and "died" in end["stats"]["error"], end
            _wait_for_engine(client)
            return_s = max(return_s, time.monotonic() - began)
            texts.append("".join(piece for _, piece in sent))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert _kept_text(path) == texts[-1]
    assert sorted(all_texts(path)) == sorted(texts)
    return EngineOutcome(sum(len(text) for text in texts), error_s, return_s)


@contextlib.contextmanager
def _running(path: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Run the app; a client that may ask it."""
    command = [sys.executable, str(PROCESS), str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout
        url, token = process.stdout.readline().split()
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=f"{url}/app/api", headers=headers, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def _child_of(pid: int) -> int:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    (child,) = (int(each) for task in tasks for each in task.read_text().split())
    return child


def _wait_for_engine(client: httpx.Client) -> None:
    deadline = time.monotonic() + 60
    while client.get("/state").json()["state"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _stream(
    client: httpx.Client, seconds: float, kill: Callable[[], None]
) -> tuple[list[tuple[float, str]], dict[str, Any]]:
    """Have an answer made, and kill something; what came and when, and the last event."""
    _wait_for_engine(client)
    number = client.post("/conversations", json={}).json()["id"]
    begun = client.post(f"/conversations/{number}/answer", json={"text": "slow"}).json()
    sent: list[tuple[float, str]] = []
    event: dict[str, Any] = {}
    killed = False
    address = f"/answers/{begun['messages'][-1]['id']}"
    with contextlib.suppress(httpx.TransportError), client.stream("GET", address) as reply:
        for line in reply.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: ") else {}
            if event.get("type") == "group":
                sent.append((time.monotonic(), "".join(event["tokens"])))
            if not killed and sent and time.monotonic() - sent[0][0] > seconds:
                kill()
                killed = True
            if event.get("type") == "end":
                break
    assert killed, "the answer ended by itself"
    return sent, event


def _kept_text(path: Path) -> str:
    history = History(path)
    latest = history.conversations()[0]["id"]
    message = history.conversation(latest)["messages"][1]
    history.close()
    assert message["state"] == "interrupted", message["state"]
    assert message["text"] == "".join(t for group in message["groups"] for t in group["tokens"])
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()
    return message["text"]


def all_texts(path: Path) -> list[str]:
    """The answers of all conversations."""
    with contextlib.closing(History(path)) as history:
        numbers = [each["id"] for each in history.conversations()]
        return [history.conversation(number)["messages"][1]["text"] for number in numbers]
