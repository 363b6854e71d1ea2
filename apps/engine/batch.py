"""The jobs of one request, and what comes back for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.server.errors import ApiError, refused

_LAST = ("finished", "failed", "refused")


class Batch:
    """Jobs that belong together: one for every choice of a request.

    Args:
        size: how many jobs.
        cancel: called once to break off what still runs.

    Attributes:
        remaining: jobs that have not ended.
    """

    def __init__(self, size: int, *, cancel: Callable[[], None]) -> None:
        self.remaining = size
        self._cancel = cancel
        self._messages: asyncio.Queue[Message | ApiError] = asyncio.Queue()

    def put(self, message: Message | ApiError) -> None:
        """Take what has come; an error ends the whole batch."""
        self._messages.put_nowait(message)

    async def next(self) -> Message:
        """The next message of any job, with its ``index``.

        Raises:
            ApiError: the request was refused or the engine is gone.
        """
        message = await self._messages.get()
        if isinstance(message, ApiError):
            raise message
        if message["type"] == "refused":
            raise refused(message["message"], param=message["param"], code=message["code"])
        if message["type"] == "failed":
            raise ApiError(500, f"the engine failed: {message['message']}", code="engine_error")
        self.remaining -= message["type"] in _LAST
        return message

    async def __aiter__(self) -> AsyncIterator[Message]:
        while self.remaining:
            yield await self.next()

    def cancel(self) -> None:
        """Break off what still runs; may be called at any time."""
        if self.remaining:
            self._cancel()


class Choice:
    """What one job has answered so far.

    Attributes:
        text: all text.
        logprobs: entries of all ids.
        groups: what each step emitted, for ``mtp`` details.
        prompt_tokens: ids of the prompt.
        cached_tokens: of these, the ones that were not computed again.
        finished: the last message, once it is there.
    """

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.finished: Message = {}

    def add(self, message: Message) -> None:
        """Take a message of the job."""
        match message["type"]:
            case "started":
                self.prompt_tokens = message["prompt_tokens"]
                self.cached_tokens = message["cached_tokens"]
            case "group":
                self.text += message["text"]
                self.logprobs += message.get("logprobs", ())
                self.groups.append(group_details(message))
            case "finished":
                self.finished = message

    @property
    def reason(self) -> str:
        """Why it ended: "stop", "length" or "tool_calls"."""
        return self.finished["reason"]

    @property
    def stats(self) -> dict[str, Any]:
        """Counts and rates; see ``mlx_mtp.stats``."""
        return self.finished["stats"]


def group_details(message: Message) -> dict[str, Any]:
    """What a step did, for those who ask."""
    return {name: message[name] for name in ("tokens", "accepted", "drafted", "source")}
