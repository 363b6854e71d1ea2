"""An engine that plays the model of a coding agent: it calls the agent's tools, then answers.

Run as a script, like ``fake_engine.py``.  A user's message has a line ``calls: JSON``, a list of
rounds of ``{"name", "arguments"}``; each round is emitted as the calls of one answer.  After the
last round it answers ``The results: `` and the words between square brackets in the results of the
tools.  Each answer begins with a thought, and with a line ``thoughts`` in the message the last one
says how many of the earlier thoughts came back.  ``wait`` emits a token now and then until the job
is cancelled.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import fake_engine


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def answer(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    messages = job.get("messages") or []
    yield {"type": "started", "prompt_tokens": 10, "cached_tokens": 4}
    script = [re.search(r"^calls: (.*)$", text_of(message), re.MULTILINE) for message in messages]
    rounds: list[list[dict[str, Any]]] = json.loads(([m[1] for m in script if m] or ["[]"])[-1])
    if any(re.search(r"^wait$", text_of(message), re.MULTILINE) for message in messages):
        while True:
            time.sleep(0.02)
            yield fake_engine.group(".", False)
    done = sum(bool(message.get("tool_calls")) for message in messages)
    yield fake_engine.group("", False) | {"reasoning": f"Round {done}."}
    names = {tool["function"]["name"] for tool in job.get("tools") or ()}
    if done < len(rounds) and all(call["name"] in names for call in rounds[done]):
        calls = [call | {"arguments": json.dumps(call["arguments"])} for call in rounds[done]]
        yield fake_engine.group("Let me look.", False)
        yield fake_engine.finished("tool_calls", 9, calls)
        return
    results = [text_of(message) for message in messages if message["role"] == "tool"]
    words = re.findall(r"\[([a-z0-9 ]+)\]", "\n".join(results))
    thoughts = [message.get("reasoning_content") for message in messages]
    if any(re.search(r"^thoughts$", text_of(message), re.MULTILINE) for message in messages):
        words.append(f"{sum(f'Round {at}.' in thoughts for at in range(done))} thoughts")
    for piece in ["The results: ", ", ".join(words)]:
        yield fake_engine.group(piece, False)
    yield fake_engine.finished("stop", 9, [])


if __name__ == "__main__":
    fake_engine.main(answer, max_context=200_000)
