"""State and helpers that the routes of the app share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.chat_app.answering import Answers
from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.chat_app.bodies import AnswerOptions
from mlx_mtp.apps.engine.protocol import Job
from mlx_mtp.apps.history.store import Row, split_reasoning
from mlx_mtp.apps.server.api.jobs import ServerContext
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.streams import EventStream, event
from mlx_mtp.terminal import one_line

Handler = Callable[[Request], Awaitable[Any]]


@dataclass
class ChatContext:
    """State of the app.

    Attributes:
        archive: the history.
        answers: the running answers.
        model: the selected model; None is the built-in model.
        adapter_path: the selected adapter; None is the model's default.
        switch_error: error of the last selected model, if it failed to load.
        switching: the task that restores the previous model if the selected one fails to load.
    """

    archive: Archive
    answers: Answers
    model: str | None = None
    adapter_path: str | None = None
    switch_error: str = ""
    switching: asyncio.Task[None] | None = None


def chat_context(request: Request) -> ChatContext:
    """Return the app's state."""
    return request.app.state.chat


def server_context(request: Request) -> ServerContext:
    """Return the server's state: engine and settings."""
    return request.app.state.context


def number_of(request: Request) -> int:
    """Return the id in the path.

    Raises:
        ApiError: 404 if the id is out of range.
    """
    number = request.path_params["number"]
    if number >= 2**63:
        raise ApiError(404, f"no item with id {number}", code="not_found")
    return number


def with_http_errors(handler: Handler) -> Handler:
    """Convert errors of the history to HTTP errors: KeyError to 404, ValueError to 400."""

    async def handle(request: Request) -> Any:
        try:
            return await handler(request)
        except KeyError as error:
            raise ApiError(404, f"no item with id {error.args[0]}", code="not_found") from None
        except ValueError as error:
            raise refused(one_line(error)) from None

    return handle


def event_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    *,
    ended: Callable[[], None] = lambda: None,
) -> EventStream:
    """Return a stream of events, ended by an error if there is one; see ``EventStream``."""
    return EventStream(
        events,
        failed=lambda error: event({"type": "error", "message": error.message}),
        ping_s=server_context(request).settings.ping_s,
        ended=ended,
    )


def job_for(
    messages: list[dict[str, str]], options: AnswerOptions, *, max_draft_tokens: int
) -> Job:
    """Return a job for the engine.

    Args:
        messages: from ``chat_messages``.
        options: of the conversation.
        max_draft_tokens: k of the loaded adapter, which limits the conversation's own k; 0 without
            an adapter.
    """
    job = Job(messages=messages, pieces=True, **options.model_dump())
    if job.num_draft_tokens is not None and max_draft_tokens:
        job.num_draft_tokens = min(job.num_draft_tokens, max_draft_tokens)
    return job


def chat_messages(system_prompt: str, path: list[Row]) -> list[dict[str, str]]:
    """Return a branch as messages for the chat template, which decides about earlier reasoning."""
    head = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    for message in path:
        reasoning, text = split_reasoning(message)
        more = {"reasoning_content": reasoning} if reasoning else {}
        head.append({"role": message["role"], "content": text} | more)
    return head
