"""An engine without a model: speaks the protocol, echoes what it is asked, and fails on demand.

Run as a script, so that it starts in a moment; it imports nothing but the standard library.  It
does what the last message says: ``die`` or ``hang`` after one group, ``refuse``, ``fail``, ``slow``
takes 20 ms a group for ever, ``flood`` the same after a group of 2 MiB, ``call`` calls the first
tool, ``reply:`` is followed by the JSON of a text and calls, ``history`` answers with the
conversation and ``job`` with the whole job, ``think X|Y`` reasons X and answers Y, or calls a tool
if Y is ``call``; everything else comes back in groups of three letters, cut at ``max_tokens``
letters.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

READY = {
    "type": "ready",
    "model": "fake/model",
    "adapter": True,
    "num_draft_tokens": 4,
    "drafters": ["mask", "lookup"],
    "max_context": 1000,
    "has_chat_template": True,
    "has_reasoning": True,
}
VOCAB_SIZE = 260
FLOOD_BYTES = 2**21
_LOCK = threading.Lock()


def send(message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    with _LOCK:
        sys.stdout.buffer.write(len(body).to_bytes(4, "little") + body)
        sys.stdout.buffer.flush()


def read() -> dict[str, Any]:
    head = sys.stdin.buffer.read(4)
    body = sys.stdin.buffer.read(int.from_bytes(head, "little")) if len(head) == 4 else b""
    if not body:
        os._exit(0)
    return json.loads(body)


def entry(letter: str) -> dict[str, Any]:
    return {"token": letter, "logprob": -0.5, "bytes": list(letter.encode()), "top_logprobs": []}


def group(text: str, logprobs: bool) -> dict[str, Any]:
    values = {"tokens": max(1, len(text)), "accepted": max(0, len(text) - 1)}
    found = {"type": "group", "text": text, "parts": [["mask", 4]], **values}
    return found | ({"logprobs": [entry(letter) for letter in text]} if logprobs else {})


def finished(reason: str, count: int, calls: list[dict[str, str]]) -> dict[str, Any]:
    stats = {
        "prompt_tokens": 6, "prompt_tps": 60.0, "cached_tokens": 4, "generation_tokens": count,
        "generation_tps": 10.0, "num_steps": max(1, count // 3), "num_draft_tokens": 8,
        "num_accepted": 5, "drafters": {"mask": [9, 5]},
        "tokens_per_step": 3.0,
    }  # fmt: skip
    return {
        "type": "finished", "reason": reason, "stop_string": None, "tool_calls": calls,
        "stats": stats,
    }  # fmt: skip


def exceeds_limit(job: dict[str, Any], param: str) -> bool:
    if param == "logit_bias":
        return any(int(token) >= VOCAB_SIZE for token in job.get(param, ()))
    return job.get(param, 0) > READY["num_draft_tokens"]


def answer(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    text = job["messages"][-1]["content"] if "messages" in job else str(job["prompt"])
    if text == "refuse":
        yield {"type": "refused", "message": "no such thing", "param": "messages", "code": "no"}
        return
    for param in ("num_draft_tokens", "logit_bias"):
        if exceeds_limit(job, param):
            yield {"type": "refused", "message": f"{param} is too large", "param": param}
            return
    if job.get("drafter") not in (None, "auto", *READY["drafters"]):
        yield {"type": "refused", "message": "drafter is not available", "param": "drafter"}
        return
    yield {"type": "started", "prompt_tokens": 10, "cached_tokens": 4}
    if "only" in job:
        prompt = job.get("prompt", "")
        is_text = isinstance(prompt, str)
        ids = list(prompt.encode()) if is_text else prompt
        text = "" if is_text else bytes(number % 256 for number in ids).decode(errors="replace")
        yield group(text, False) | {"ids": ids}
        yield {"type": "finished", "reason": "stop"}
        return
    logprobs = job.get("top_logprobs") is not None
    if text == "fail":
        yield {"type": "failed", "message": "out of luck"}
        return
    if text in ("die", "hang", "slow", "flood"):
        yield group("one" if text != "flood" else "." * FLOOD_BYTES, logprobs)
        if text == "die":
            os._exit(9)
        while text == "hang":
            time.sleep(60)
        while True:
            time.sleep(0.02)
            yield group("...", logprobs)
    thought = ""
    if text.startswith("think "):
        thought, _, text = text.removeprefix("think ").partition("|")
        thought = thought[: job["max_tokens"]]
        for at in range(0, len(thought), 3):
            piece = thought[at : at + 3]
            yield group("", False) | {"reasoning": piece, "tokens": len(piece)}
    if text == "job":
        text = json.dumps(job)
    if text == "call":
        tools = job.get("tools") or [{"function": {"name": "add"}}]
        call = {"name": tools[0]["function"]["name"], "arguments": '{"a": 1}'}
        yield group("", logprobs)
        more = {"reasoning_tokens": len(thought), "stop_string": (job.get("stop") or [None])[0]}
        yield finished("tool_calls", 3, [call]) | more
        return
    if text.startswith("reply:"):
        text, calls = json.loads(text.removeprefix("reply:"))
        yield group(text, logprobs)
        yield finished("tool_calls" if calls else "stop", 3, calls)
        return
    if text == "history":
        text = json.dumps(job["messages"])
    shown = text[: job["max_tokens"]]
    for at in range(0, len(shown), 3):
        yield group(shown[at : at + 3], logprobs)
    count, reason = len(thought) + len(shown), "stop" if len(shown) == len(text) else "length"
    yield finished(reason, count, []) | {"reasoning_tokens": len(thought)}


def listen(
    jobs: dict[int, Iterator[dict[str, Any]]],
    cancelled: set[int],
    begin: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
) -> threading.Event:
    """Take commands in a thread; the event tells that one has come."""
    arrived = threading.Event()

    def take() -> None:
        while True:
            command = read()
            if command["type"] == "cancel":
                cancelled.add(command["id"])
            else:
                jobs[command["id"]] = begin(command["job"])
            arrived.set()

    threading.Thread(target=take, daemon=True).start()
    return arrived


def main(
    respond: Callable[[dict[str, Any]], Iterator[dict[str, Any]]] = answer, **ready: Any
) -> None:
    """Serve jobs; ``respond`` plays the model, and ``ready`` changes what the engine reports."""
    kind, _, path = (read().get("model") or "").partition(" ")
    while kind == "gate" and not os.path.exists(path):
        time.sleep(0.01)
    if kind == "broken":
        send({"type": "broken", "message": "no such model"})
        return
    cancelled: set[int] = set()
    jobs: dict[int, Iterator[dict[str, Any]]] = {}
    arrived = listen(jobs, cancelled, respond)
    send(READY | ready)
    while True:
        if not jobs:
            arrived.wait()
        arrived.clear()
        for job, messages in list(jobs.items()):
            message = next(messages, None)
            if job in cancelled:
                message = {"type": "finished", "reason": "cancelled"}
            if message is not None:
                send(message | {"id": job})
            if message is None or message["type"] in ("finished", "failed", "refused"):
                jobs.pop(job)


if __name__ == "__main__":
    main()
