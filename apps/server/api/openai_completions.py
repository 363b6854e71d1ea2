"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice, group_details
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.server.api.jobs import Desk, choices_of, new_id, now
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.schemas import MOST_CHOICES, MOST_TOKENS, Many, OpenAISampled
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import DONE, answer, event

TokenId = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Ids = Annotated[Many[TokenId], Field(min_length=1)]
Texts = Annotated[Many[str], Field(min_length=1, max_length=MOST_CHOICES)]
IdLists = Annotated[Many[Ids], Field(min_length=1, max_length=MOST_CHOICES)]


class CompletionRequest(OpenAISampled):
    """The body; what is not here is refused."""

    prompt: str | Texts | Ids | IdLists
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


async def create(request: Request) -> Any:
    """Continue a text, streamed or not."""
    desk: Desk = request.app.state.desk
    body = await read_body(request, CompletionRequest, desk.settings)
    desk.check_model(body.model)
    prompts = _prompts(body)
    jobs = _jobs(body, desk, prompts)
    batch, first = await desk.begin(request, jobs)
    reply = _Reply(body, desk, len(jobs), len(prompts))
    return await answer(request, reply, batch, first, stream=bool(body.stream))


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts, however they were written down."""
    given: Any = body.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


def _jobs(
    body: CompletionRequest, desk: Desk, prompts: list[str | list[int]]
) -> list[dict[str, Any]]:
    n = body.n or 1
    for name, harmless in (("echo", (False,)), ("best_of", (n,)), ("suffix", ("",))):
        if getattr(body, name) not in (None, *harmless):
            raise refused(f"{name} is not supported", param=name, code="unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options needs stream to be true", param="stream_options")
    if n * len(prompts) > MOST_CHOICES:
        raise refused(f"prompts times n can be {MOST_CHOICES} at most", param="n")
    job = desk.openai_job(body, max_tokens=body.max_tokens)
    job["top_logprobs"] = body.logprobs
    return [each | {"prompt": prompt} for prompt in prompts for each in choices_of(job, n)]


class _Reply:
    """Writes answers in the shape of completions."""

    def __init__(self, body: CompletionRequest, desk: Desk, count: int, num_prompts: int) -> None:
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": desk.model_id,
        }
        self._details = body.speculation.details
        self._logprobs = body.logprobs is not None
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._num_prompts = num_prompts
        self._choices = [Choice() for _ in range(count)]

    async def whole(self, batch: Batch, first: Message) -> Any:
        """The answer in one piece."""
        self._choices[first["index"]].add(first)
        async for message in batch:
            self._choices[message["index"]].add(message)
        found = []
        for at, choice in enumerate(self._choices):
            more = {}
            if self._details:
                more["mtp"] = mtp_summary(choice) | {"groups": choice.groups}
            logprobs = self._logprobs_of(choice.logprobs, 0)
            found.append(_choice(at, choice.text, logprobs, choice.reason) | more)
        return json_response(self._head | {"choices": found} | self._costs())

    async def events(self, batch: Batch, first: Message) -> AsyncGenerator[bytes, None]:
        """The answer as events, one for every step."""
        self._choices[first["index"]].add(first)
        async for message in batch:
            for data in self._events_of(message):
                yield data
        if self._usage:
            yield event(self._head | {"choices": []} | self._costs())
        yield DONE

    def _events_of(self, message: Message) -> list[bytes]:
        at = message["index"]
        choice = self._choices[at]
        offset = len(choice.text)
        choice.add(message)
        more: dict[str, Any] = {"usage": None} if self._usage else {}
        if message["type"] == "group":
            if not (message["text"] or self._details or self._logprobs):
                return []
            if self._details:
                more["mtp"] = group_details(message)
            logprobs = self._logprobs_of(message.get("logprobs", []), offset)
            found = _choice(at, message["text"], logprobs, None)
        elif message["type"] == "finished":
            more["timings"] = timings(choice)
            if self._details:
                more["mtp"] = mtp_summary(choice)
            found = _choice(at, "", None, choice.reason)
        else:
            return []
        return [event(self._head | {"choices": [found]} | more)]

    def _costs(self) -> dict[str, Any]:
        return {
            "usage": usage(self._choices, prompts=self._num_prompts),
            "timings": timings(self._choices[0]),
        }

    def _logprobs_of(self, entries: list[dict[str, Any]], offset: int) -> dict[str, Any] | None:
        """OpenAI's older shape: columns."""
        if not self._logprobs:
            return None
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in entry["top_logprobs"]}
                for entry in entries
            ],
            "text_offset": offsets,
        }


def _choice(
    at: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": at, "text": text, "logprobs": logprobs, "finish_reason": reason}
