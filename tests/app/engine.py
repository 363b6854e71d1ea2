"""An engine without a model for the chat app's tests: it echoes the last message.

It runs as a script, so that it starts quickly.  Special messages: ``fail``, ``die`` after two
steps, ``slow`` forever in steps of 20 ms, ``flood`` the same after a step of half a MiB.  Any other
message is echoed, the first part of ``think X|Y`` as reasoning, with "slowly" in it in steps of
0.2 s.  A plain job emits one token of four
characters per step, others up to ``num_draft_tokens`` + 1; a step takes 4 ms.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.server.fake_engine import finished, listen

K = 4
STEP_S = 0.004
FLOOD_BYTES = 2**19
_LOCK = threading.Lock()


def ready(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "ready",
        "model": options.get("model") or "fake/model",
        "adapter": True,
        "num_draft_tokens": K,
        "drafters": ["mask", "lookup"],
        "max_context": 1000,
        "has_chat_template": True,
        "facts": {
            "device": "test bench",
            "runs_on": "cpu",
            "blas": "openblas",
            "measured": True,
            "costs": {
                "rows": [1, 2, 4, 8],
                "contexts": [64, 1024],
                "forward_ms": [[20.0, 22.0, 26.0, 36.0], [24.0, 26.0, 31.0, 44.0]],
                "draft_ms": [0.0, 3.0, 4.0, 4.5, 5.0],
                "source": "measured 2026-11-22 on test bench",
            },
        },
    }


def send(message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    with _LOCK:
        try:
            sys.stdout.buffer.write(len(body).to_bytes(4, "little") + body)
            sys.stdout.buffer.flush()
        except OSError:  # the app has been killed
            os._exit(0)


def read() -> dict[str, Any]:
    head = sys.stdin.buffer.read(4)
    body = sys.stdin.buffer.read(int.from_bytes(head, "little")) if len(head) == 4 else b""
    if not body:
        os._exit(0)
    return json.loads(body)


def steps(text: str, most: int) -> Iterator[dict[str, Any]]:
    """Cut a text into steps of 1, 2, .. ``most`` tokens, again and again."""
    tokens = [text[at : at + 4] for at in range(0, len(text), 4)]
    at = count = 0
    while at < len(tokens):
        count = count % most + 1
        pieces = tokens[at : at + count]
        at += count
        yield {
            "type": "group",
            "text": "".join(pieces),
            "tokens": len(pieces),
            "pieces": pieces,
            "ids": [sum(piece.encode()) for piece in pieces],
            "accepted": len(pieces) - 1,
            "parts": [["mask", most - 1]] if most > 1 else [],
        }


def answer(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    text = job["messages"][-1]["content"]
    yield {"type": "started", "prompt_tokens": 10, "cached_tokens": 4}
    if text == "fail":
        yield {"type": "failed", "message": "out of luck"}
        return
    k = K if job.get("num_draft_tokens") is None else job["num_draft_tokens"]
    most = 1 if job["layout"] == "plain" else k + 1
    if text == "flood":
        yield next(steps("." * FLOOD_BYTES, 1)) | {"pieces": ["." * FLOOD_BYTES]}
    if text in ("slow", "flood"):
        yield from ({**next(steps("slow " * 8, most)), "pause": 0.02} for _ in range(10**9))
    if text == "die":
        yield from list(steps("last words, and more", most))[:2]
        os._exit(9)
    is_split = text.startswith("think ")
    thought, _, rest = text.removeprefix("think ").partition("|")
    if is_split:
        text = f"{thought}\n</think>\n\n{rest}"
    shown = text[: 4 * job["max_tokens"]]
    pause = 0.2 if "slowly" in text else STEP_S
    done, content = 0, len(text) - len(rest)
    for step in steps(shown, most):
        done += len(step["text"])
        closed = [len(thought), content] if done >= content else []
        span = {"span": [0, 0, *closed]} if is_split else {}
        yield step | span | {"pause": pause}
    yield finished("stop" if shown == text else "length", len(shown) // 4, [])


def main() -> None:
    options = read()
    time.sleep(0.3 if options.get("model") else 0.0)
    if "broken" in str(options.get("model")):
        send({"type": "broken", "message": f"cannot load the model in {options['model']}"})
        return
    jobs: dict[int, Iterator[dict[str, Any]]] = {}
    cancelled: set[int] = set()
    arrived = listen(jobs, cancelled, answer)
    send(ready(options))
    while True:
        if not jobs:
            arrived.wait()
        arrived.clear()
        for job, messages in list(jobs.items()):
            message: dict[str, Any] | None = {"type": "finished", "reason": "cancelled"}
            if job not in cancelled:
                message = next(messages, None)
            if message is not None:
                time.sleep(message.pop("pause", STEP_S))
                send(message | {"id": job})
            if message is None or message["type"] in ("finished", "failed"):
                jobs.pop(job)


if __name__ == "__main__":
    main()
