"""The race: one prompt answered plainly, then with several tokens a step, alone each time.

Both answers are greedy and start from nothing: no cache of earlier prompts is used or left behind.
A short answer before them, which is not timed, warms up what the first one would otherwise pay for.
Timed is what follows the first step, so the prompt counts for neither.  Clients of ``/v1`` cannot
be kept out; how many answers shared the engine while the clock ran is told.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app import bodies
from mlx_mtp.apps.chat_app.answering import group_of
from mlx_mtp.apps.chat_app.desk import (
    chat_desk,
    event_stream,
    job_for,
    politely,
    server_desk,
    spoken,
)
from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.history.store import History, Row
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.streams import event

WARM_UP_TOKENS = 8


def routes(prefix: str) -> list[BaseRoute]:
    """The route below ``prefix``."""
    return [Route(f"{prefix}/race", politely(race), methods=["POST"])]


async def race(request: Request) -> Any:
    """Run a race; the events are those of ``Lanes``."""
    server = server_desk(request)
    body = await read_body(request, bodies.Race, server.settings)
    if server.info.num_draft_tokens == 0:
        raise refused("the model has no adapter: there is nothing to race against")
    if body.options.layout == "plain":
        raise refused("layout is plain on both sides", param="options.layout")
    if body.options.num_draft_tokens == 0:
        raise refused("nothing is drafted on either side", param="options.num_draft_tokens")
    if chat_desk(request).answers.busy:
        raise ApiError(409, "an answer is being made, which a race would have to share with")
    options = body.options.model_copy(update={"temp": 0.0, "layout": "plain", "seed": 0})
    messages, most = await _messages(request, body), server.info.num_draft_tokens
    job = job_for(messages, options, most_drafts=most) | {"fresh": True}
    # The first job is submitted here, so that a full queue is an answer and not an event.
    warm_up = server.engine.submit([job | {"max_tokens": WARM_UP_TOKENS}])
    lanes = Lanes(server.engine, job, body.options.layout)
    return event_stream(request, lanes.run(warm_up), ended=warm_up.cancel)


async def _messages(request: Request, body: bodies.Race) -> list[dict[str, str]]:
    """What is to be answered: a branch that ends with the user, or a text of its own."""
    archive, prompt, path = chat_desk(request).archive, "", []
    if body.conversation is not None:
        prompt = (await archive(History.conversation, body.conversation))["system_prompt"]
    if body.message is not None:
        if (await archive(History.message, body.message))["conversation"] != body.conversation:
            raise refused(f"message {body.message} is in another conversation", param="message")
        path = await archive(History.path, body.message)
    if body.text is not None:
        path = [*path, {"role": "user", "text": body.text}]
    if not path or path[-1]["role"] != "user":
        raise refused("a race needs a message to answer", param="text")
    return spoken(prompt, path)


class Lanes:
    """Two answers one after the other.

    Args:
        engine: makes them.
        job: the plain one.
        layout: of the other.
    """

    def __init__(self, engine: Engine, job: dict[str, Any], layout: str) -> None:
        self._engine = engine
        self._jobs = {"plain": job, "mtp": job | {"layout": layout}}

    async def run(self, warm_up: Batch) -> AsyncGenerator[bytes, None]:
        """Events: ``lane`` as one begins, ``group`` for its steps, ``lane_end``, then ``result``.

        Raises:
            ApiError: the engine is gone, or takes no more.
        """
        results: list[Row] = []
        yield event({"type": "lane", "lane": "warm-up"})
        async for _ in warm_up:
            pass
        for lane, job in self._jobs.items():
            yield event({"type": "lane", "lane": lane})
            batch = self._engine.submit([job])
            try:
                async for each in self._run_lane(lane, batch):
                    if each["type"] == "lane_end":
                        results.append(each)
                    yield event({name: each[name] for name in each if name != "ids"})
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
            if message["type"] == "group":
                ms = (now - times[-1]) * 1e3 if times else 0.0
                if not times:
                    others, begun = self._engine.others(batch), self._engine.begun
                times.append(now)
                counts.append(message["tokens"])
                ids += message["ids"]
                yield {"type": "group", "lane": lane} | group_of(message, ms=ms)
            elif message["type"] == "finished":
                reason = message["reason"]
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
    """SHA-256 over token ids, each as four bytes, the lowest first."""
    return hashlib.sha256(b"".join(each.to_bytes(4, "little") for each in ids)).hexdigest()


def verdict(plain: Row, mtp: Row) -> Row:
    """Who won, and whether they said the same.

    Returns:
        ``identical``; ``differs_at``, the first token that differs, or None; ``speed_up``, tokens a
        second over those of plain decoding, None where an answer was too short to tell; ``others``,
        answers that took turns with them, so that the times say little.
    """
    pairs = zip(plain["ids"], mtp["ids"], strict=False)
    differs = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
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
