"""Kill the chat app with SIGKILL while it streams, again and again, and see what is left.

    python tests/app_kill.py --kills 50

After every kill the history must open, be sound, and hold all text that the page was sent up to a
second before.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from mlx_mtp.apps.history.store import History

PROCESS = Path(__file__).with_name("app_process.py")
MOST_LOST_S = 1.0


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
    command = [sys.executable, str(PROCESS), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    url, token = process.stdout.readline().split()
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"{url}/app/api", headers=headers, timeout=60) as client:
        sent = _stream(client, stream_s)
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        process.wait()
    text = _kept_text(path)
    whole = "".join(piece for _, piece in sent)
    assert text.startswith(whole[: len(text)]) and whole.startswith(text[: len(whole)])
    letters, lost_s = 0, 0.0
    for at, piece in sent:
        letters += len(piece)
        if letters > len(text):
            lost_s = killed - at
            break
    return Outcome(len(whole), len(text), lost_s)


def _stream(client: httpx.Client, seconds: float) -> list[tuple[float, str]]:
    """Have an answer made; return what came and when."""
    deadline = time.monotonic() + 60
    while client.get("/state").json()["state"] != "ok":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    number = client.post("/conversations", json={}).json()["id"]
    begun = client.post(f"/conversations/{number}/answer", json={"text": "slow"}).json()
    sent: list[tuple[float, str]] = []
    with client.stream("GET", f"/answers/{begun['messages'][-1]['id']}") as reply:
        for line in reply.iter_lines():
            event: dict[str, Any] = json.loads(line[6:]) if line.startswith("data: ") else {}
            if event.get("type") == "group":
                sent.append((time.monotonic(), "".join(event["tokens"])))
            if sent and time.monotonic() - sent[0][0] > seconds:
                return sent
    raise AssertionError("the answer ended by itself")


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


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    kills = parser.parse_args().kills
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.sqlite3"
        found = [kill_once(path, chance.uniform(0.3, 2.0)) for _ in range(kills)]
        conversations = History(path).conversations()
    worst = max(each.lost_s for each in found)
    print(json.dumps({
        "kills": kills,
        "conversations": len(conversations),
        "letters_sent": sum(each.sent for each in found),
        "letters_kept": sum(min(each.kept, each.sent) for each in found),
        "most_lost_s": round(worst, 3),
    }))  # fmt: skip
    sys.exit(worst > MOST_LOST_S or len(conversations) != kills)


if __name__ == "__main__":
    main()
