"""What the routes of the app share, and small things that all of them do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.chat_app.answering import Answers
from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.chat_app.bodies import AnswerOptions
from mlx_mtp.apps.server.api.jobs import Desk
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.streams import EventStream, event

Handler = Callable[[Request], Awaitable[Any]]


@dataclass
class ChatDesk:
    """What the routes need.

    Attributes:
        archive: the history.
        answers: those being made, by the number of their message.
        model: what ``--model`` or the page chose; None is the embedded one.
        adapter_path: likewise for the adapter; None is the model's own.
        switch_error: why the last chosen model could not be loaded.
        switching: the task that loads a chosen model.
    """

    archive: Archive
    answers: Answers
    model: str | None = None
    adapter_path: str | None = None
    switch_error: str = ""
    switching: asyncio.Task[None] | None = None


def chat_desk(request: Request) -> ChatDesk:
    """The app's desk."""
    return request.app.state.chat


def server_desk(request: Request) -> Desk:
    """The server's desk: engine and settings."""
    return request.app.state.desk


def number_of(request: Request) -> int:
    """The number in the path.

    Raises:
        ApiError: 404, there is nothing of that number.
    """
    number = request.path_params["number"]
    if number >= 2**63:
        raise ApiError(404, "there is nothing of that number", code="not_found")
    return number


def politely(handler: Handler) -> Handler:
    """Turn what a history complains of into answers: 404 for what is missing, 400 for the rest."""

    async def handle(request: Request) -> Any:
        try:
            return await handler(request)
        except KeyError as error:
            raise ApiError(404, f"there is no {error.args[0]}", code="not_found") from None
        except ValueError as error:
            raise refused(" ".join(str(error).split())) from None

    return handle


def event_stream(
    request: Request,
    events: AsyncGenerator[bytes, None],
    *,
    ended: Callable[[], None] = lambda: None,
) -> EventStream:
    """A response of events; an error is the last of them.  ``ended`` as in ``EventStream``."""
    return EventStream(
        events,
        failed=lambda error: event({"type": "error", "message": error.message}),
        ping_s=server_desk(request).settings.ping_s,
        ended=ended,
    )


def job_for(
    messages: list[dict[str, str]], options: AnswerOptions, *, most_drafts: int
) -> dict[str, Any]:
    """A job for the engine.

    Args:
        messages: as ``spoken`` returns them.
        options: of the conversation.
        most_drafts: k of the adapter that is loaded; a conversation may have been begun with more.
    """
    k = options.num_draft_tokens
    return {
        "messages": messages,
        "max_tokens": options.max_tokens,
        "temp": options.temp,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": options.seed,
        "layout": options.layout,
        "num_draft_tokens": None if k is None else min(k, most_drafts),
        "pieces": True,
    }


def spoken(system_prompt: str, path: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A branch as the chat template takes it."""
    head = [{"role": "system", "content": system_prompt}] if system_prompt.strip() else []
    return head + [{"role": each["role"], "content": each["text"]} for each in path]
