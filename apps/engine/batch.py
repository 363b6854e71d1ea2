"""The jobs of one request and their messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from mlx_mtp.apps.engine.protocol import Failed, Finished, Group, JobMessage, Refused, Started
from mlx_mtp.apps.server.errors import ApiError, refused


class Batch:
    """The jobs of one request, one per choice.

    Args:
        size: number of jobs.
        cancel: called to cancel the jobs that have not ended.

    Attributes:
        remaining: number of jobs that have not ended.
    """

    def __init__(self, size: int, *, cancel: Callable[[], None]) -> None:
        self.remaining = size
        self._cancel = cancel
        self._messages: asyncio.Queue[JobMessage | ApiError] = asyncio.Queue()

    def put(self, message: JobMessage | ApiError) -> None:
        """Add a message; an error ends the whole batch."""
        self._messages.put_nowait(message)

    async def next(self) -> JobMessage:
        """Wait for the next message of any job; its ``index`` is the job's.

        Raises:
            ApiError: the request was refused, or the engine died.
        """
        message = await self._messages.get()
        match message:
            case ApiError():
                raise message
            case Refused():
                raise refused(message.message, param=message.param, code=message.code)
            case Failed():
                raise ApiError(500, f"the engine failed: {message.message}", code="engine_error")
            case Finished():
                self.remaining -= 1
        return message

    async def __aiter__(self) -> AsyncIterator[JobMessage]:
        while self.remaining:
            yield await self.next()

    def cancel(self) -> None:
        """Cancel the jobs that have not ended; may be called at any time."""
        if self.remaining:
            self._cancel()


class Choice:
    """The answer of one job so far.

    Attributes:
        text: all text, without reasoning.
        reasoning: all text of the reasoning.
        logprobs: logprobs of all tokens.
        groups: counts of each step, for ``mtp`` details.
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: number of them that were in the prefix cache.
        finished: the last message, once it has arrived.
    """

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.logprobs: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.finished: Finished | None = None

    def add(self, message: JobMessage) -> None:
        """Add a message of the job."""
        match message:
            case Started():
                self.prompt_tokens = message.prompt_tokens
                self.cached_tokens = message.cached_tokens
            case Group():
                self.text += message.text
                self.reasoning += message.reasoning
                self.logprobs += message.logprobs or ()
                self.groups.append(group_details(message))
            case Finished():
                self.finished = message

    @property
    def result(self) -> Finished:
        """The last message of an answer that has ended."""
        assert self.finished is not None
        return self.finished


def group_details(message: Group) -> dict[str, Any]:
    """Return the counts of a step."""
    return {
        "tokens": message.tokens,
        "accepted": message.accepted,
        "drafted": message.drafted,
        "source": message.source,
    }
