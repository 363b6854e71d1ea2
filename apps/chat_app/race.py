"""The race: one prompt answered by plain decoding, then by multi-token decoding.

Both answers use greedy decoding, and neither reads nor writes the cache of earlier prompts.  A
short answer, which is not timed, warms up the engine first.  Timing starts after the first step, so
prompt processing is excluded.  Clients of ``/v1`` cannot be blocked; the result reports how many
other answers shared the engine during the timed steps.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app import bodies
from mlx_mtp.apps.chat_app.answering import group_of
from mlx_mtp.apps.chat_app.context import (
    chat_context,
    chat_messages,
    event_stream,
    job_for,
    server_context,
    with_http_errors,
)
from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Finished, Group, Job
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.history.store import History, Row
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.streams import event

WARM_UP_TOKENS = 8


def routes(prefix: str) -> list[BaseRoute]:
    """Return the route below ``prefix``."""
    return [Route(f"{prefix}/race", with_http_errors(race), methods=["POST"])]


async def race(request: Request) -> Any:
    """Run a race and stream the events of ``Lanes``."""
    server = server_context(request)
    body = await read_body(request, bodies.Race, server.settings)
    if not server.info.drafters:
        raise refused("nothing proposes draft tokens, so there is nothing to compare")
    if body.options.layout == "plain":
        raise refused(
            "layout is plain: both sides would use plain decoding", param="options.layout"
        )
    if body.options.num_draft_tokens == 0:
        raise refused(
            "num_draft_tokens is 0: both sides would use plain decoding",
            param="options.num_draft_tokens",
        )
    if chat_context(request).answers.busy:
        raise ApiError(409, "a race cannot start while an answer is being generated")
    options = body.options.model_copy(update={"temp": 0.0, "layout": "plain", "seed": 0})
    messages, maximum = await _messages(request, body), server.info.num_draft_tokens
    job = replace(job_for(messages, options, max_draft_tokens=maximum), fresh=True)
    # The first job is submitted here, so that a full queue is an HTTP error and not an event.
    warm_up = server.engine.submit([replace(job, max_tokens=WARM_UP_TOKENS)])
    lanes = Lanes(server.engine, job, body.options.layout)
    return event_stream(request, lanes.run(warm_up), ended=warm_up.cancel)


async def _messages(request: Request, body: bodies.Race) -> list[dict[str, str]]:
    """Return the messages to answer: a branch that ends with the user, or a new text."""
    archive, prompt, path = chat_context(request).archive, "", []
    if body.conversation is not None:
        prompt = (await archive(History.conversation, body.conversation))["system_prompt"]
    if body.message is not None:
        if (await archive(History.message, body.message))["conversation"] != body.conversation:
            raise refused(
                f"message {body.message} belongs to another conversation", param="message"
            )
        path = await archive(History.path, body.message)
    if body.text is not None:
        path = [*path, {"role": "user", "text": body.text}]
    if not path or path[-1]["role"] != "user":
        raise refused("a race needs a user message to answer", param="text")
    return chat_messages(prompt, path)


class Lanes:
    """Two answers, one after the other.

    Args:
        engine: generates them.
        job: the job with plain decoding.
        layout: layout of the other job.
    """

    def __init__(self, engine: Engine, job: Job, layout: str) -> None:
        self._engine = engine
        self._jobs = {"plain": job, "mtp": replace(job, layout=layout)}

    async def run(self, warm_up: Batch) -> AsyncGenerator[bytes, None]:
        """Yield ``lane``, ``group`` per step and ``lane_end`` for every answer, then ``result``.

        Raises:
            ApiError: the engine is unavailable, or its queue is full.
        """
        results: list[Row] = []
        yield event({"type": "lane", "lane": "warm-up"})
        async for _ in warm_up:
            pass
        for lane, job in self._jobs.items():
            yield event({"type": "lane", "lane": lane})
            batch = self._engine.submit([job])
            try:
                async for message in self._run_lane(lane, batch):
                    if message["type"] == "lane_end":
                        results.append(message)
                    yield event({name: message[name] for name in message if name != "ids"})
            finally:
                batch.cancel()
        yield event({"type": "result"} | verdict(results[0], results[1]))

    async def _run_lane(self, lane: str, batch: Batch) -> AsyncGenerator[Row, None]:
        ids: list[int] = []
        times: list[float] = []
        counts: list[int] = []
        reason, others, begun = "", 0, 0
        async for message in batch:
            now = time.monotonic()
            if isinstance(message, Group):
                ms = (now - times[-1]) * 1e3 if times else 0.0
                if not times:
                    others, begun = self._engine.others(batch), self._engine.begun
                times.append(now)
                counts.append(message.tokens)
                ids += message.ids or []
                yield {"type": "group", "lane": lane} | group_of(message, ms=ms)
            elif isinstance(message, Finished):
                reason = message.reason
                others += self._engine.begun - begun
        yield {
            "type": "lane_end",
            "lane": lane,
            "ids": ids,
            "tokens": len(ids),
            "steps": len(times),
            "seconds": times[-1] - times[0] if times else 0.0,
            "timed_tokens": sum(counts[1:]),
            "sha256": hash_of(ids),
            "reason": reason,
            "others": others,
        }


def hash_of(ids: Sequence[int]) -> str:
    """Return the SHA-256 of token ids as 32-bit little-endian integers."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()


def verdict(plain: Row, mtp: Row) -> Row:
    """Compare the outputs and the speeds of the two answers.

    Returns:
        ``identical``; ``differs_at``, the index of the first different token, or None;
        ``speed_up``, the ratio of tokens per second to plain decoding, or None if an answer was
        too short; ``others``, the number of other answers that shared the engine.
    """
    pairs = zip(plain["ids"], mtp["ids"], strict=False)
    differs = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if differs is None and plain["tokens"] != mtp["tokens"]:
        differs = min(plain["tokens"], mtp["tokens"])
    rates = [
        lane["timed_tokens"] / lane["seconds"] if lane["seconds"] > 0 else 0.0
        for lane in (plain, mtp)
    ]
    return {
        "identical": plain["sha256"] == mtp["sha256"],
        "differs_at": differs,
        "speed_up": rates[1] / rates[0] if rates[0] and rates[1] else None,
        "plain_tps": rates[0],
        "mtp_tps": rates[1],
        "others": plain["others"] + mtp["others"],
    }
