"""``POST /v1/completions``."""

from __future__ import annotations

import codecs
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, field_validator
from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice, group_details
from mlx_mtp.apps.engine.protocol import Finished, Group, Job, JobMessage
from mlx_mtp.apps.server.api.jobs import FINGERPRINT, ServerContext, choices_of, new_id, now
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.schemas import (
    MAX_CHOICES,
    MAX_TOKENS,
    Limit,
    Many,
    OpenAISampled,
    token_limit,
)
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import DONE, event

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Ids = Annotated[Many[TokenId], Field(min_length=1)]
Texts = Annotated[Many[str], Field(min_length=1, max_length=MAX_CHOICES)]
IdLists = Annotated[Many[Ids], Field(min_length=1, max_length=MAX_CHOICES)]


class CompletionRequest(OpenAISampled):
    """The request body."""

    prompt: str | Texts | Ids | IdLists
    max_tokens: Limit | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | bool | None = None
    best_of: int | None = None
    unsupported = (*OpenAISampled.unsupported, "echo", "prompt_embeds", "suffix")

    @field_validator("logprobs")
    @classmethod
    def _number_of_logprobs(cls, logprobs: int | bool | None) -> int | None:
        """Take mlx-lm's form too: whether there are any."""
        if isinstance(logprobs, bool):
            return 0 if logprobs else None
        return logprobs


async def create(request: Request) -> Any:
    """Continue a text, streamed or not."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, CompletionRequest)
    prompts = _prompts(body)
    jobs = _jobs(body, context, prompts)
    reply = _Reply(body, context, len(jobs), len(prompts))
    return await context.respond(request, jobs, reply, stream=body.stream)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    """The prompts as a list."""
    prompt: Any = body.prompt
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


def _jobs(
    body: CompletionRequest, context: ServerContext, prompts: list[str | list[int]]
) -> list[Job]:
    n = body.n or 1
    if body.best_of not in (None, n):
        raise refused("best_of is not supported", param="best_of", code="unsupported_parameter")
    if n * len(prompts) > MAX_CHOICES:
        raise refused(f"the number of prompts times n must be at most {MAX_CHOICES}", param="n")
    job = context.openai_job(body, max_tokens=token_limit({"max_tokens": body.max_tokens}))
    choices = choices_of(replace(job, top_logprobs=body.logprobs), n)
    return [replace(choice, prompt=prompt) for prompt in prompts for choice in choices]


class _Reply:
    """Formats answers as completions."""

    def __init__(
        self, body: CompletionRequest, context: ServerContext, count: int, num_prompts: int
    ) -> None:
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": now(),
            "model": context.model_id,
            "system_fingerprint": FINGERPRINT,
        }
        self._details = body.speculation.details
        self._logprobs = body.logprobs is not None
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._num_prompts = num_prompts
        self._choices = [Choice() for _ in range(count)]
        self._offsets = [_Offsets() for _ in range(count)]

    async def whole(self, batch: Batch, first: JobMessage) -> Any:
        """Return the whole response."""
        self._choices[first.index].add(first)
        async for message in batch:
            self._choices[message.index].add(message)
        choices = []
        for index, choice in enumerate(self._choices):
            more = {}
            if self._details:
                more["mtp"] = mtp_summary(choice) | {"groups": choice.groups}
            logprobs = self._logprobs_of(index, choice.logprobs)
            choices.append(_choice(index, choice.text, logprobs, choice.result.reason) | more)
        return json_response(self._head | {"choices": choices} | self._costs())

    async def events(self, batch: Batch, first: JobMessage) -> AsyncGenerator[bytes, None]:
        """Yield the response as events, one per step."""
        self._choices[first.index].add(first)
        async for message in batch:
            for data in self._events_of(message):
                yield data
        if self._usage:
            yield event(self._head | {"choices": []} | self._costs())
        yield DONE

    def _events_of(self, message: JobMessage) -> list[bytes]:
        index = message.index
        choice = self._choices[index]
        choice.add(message)
        more: dict[str, Any] = {"usage": None} if self._usage else {}
        if isinstance(message, Group):
            if not (message.text or self._details or self._logprobs):
                return []
            if self._details:
                more["mtp"] = group_details(message)
            logprobs = self._logprobs_of(index, message.logprobs or [])
            content = _choice(index, message.text, logprobs, None)
        elif isinstance(message, Finished):
            more["timings"] = timings(choice)
            if self._details:
                more["mtp"] = mtp_summary(choice)
            content = _choice(index, "", None, message.reason)
        else:
            return []
        return [event(self._head | {"choices": [content]} | more)]

    def _costs(self) -> dict[str, Any]:
        return {
            "usage": usage(self._choices, prompts=self._num_prompts),
            "timings": timings(self._choices[0]),
        }

    def _logprobs_of(self, index: int, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Convert the next entries of a choice to columns, the form of OpenAI's completions."""
        if not self._logprobs:
            return None
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [_by_token(entry["top_logprobs"]) for entry in entries],
            "text_offset": [self._offsets[index].next(entry["bytes"]) for entry in entries],
        }


class _Offsets:
    """Counts the characters of a text before each token.

    A token that continues a character has the offset of that character.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def next(self, token: list[int]) -> int:
        """Take the bytes of the next token; return its offset."""
        offset = self._offset
        self._offset += len(self._utf8.decode(bytes(token)))
        return offset


def _by_token(top: list[dict[str, Any]]) -> dict[str, float]:
    """Return logprobs by token; of several tokens with one text, the first one has its name."""
    named: dict[str, float] = {}
    for entry in top:
        name = entry["token"]
        named[f"token_id:{entry['id']}" if name in named else name] = entry["logprob"]
    return named


def _choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
