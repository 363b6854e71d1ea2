"""Routes for answers: start, watch, stop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app.answering import Answer
from mlx_mtp.apps.chat_app.bodies import NewAnswer, checked_options
from mlx_mtp.apps.chat_app.context import (
    ChatContext,
    chat_context,
    chat_messages,
    event_stream,
    job_for,
    number_of,
    server_context,
    with_http_errors,
)
from mlx_mtp.apps.history.store import History, Row
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import event

_MAX_TITLE = 60


def routes(prefix: str) -> list[BaseRoute]:
    """Return the routes below ``prefix``."""
    answer = f"{prefix}/answers/{{number:int}}"
    return [
        Route(
            f"{prefix}/conversations/{{number:int}}/answer",
            with_http_errors(start),
            methods=["POST"],
        ),
        Route(answer, with_http_errors(watch), methods=["GET"]),
        Route(f"{answer}/stop", with_http_errors(stop), methods=["POST"]),
    ]


async def start(request: Request) -> Response:
    """Start an answer; the response lists the added messages, the empty answer last."""
    server, context, number = server_context(request), chat_context(request), number_of(request)
    body = await read_body(request, NewAnswer, server.settings)
    conversation = await context.archive(History.conversation, number)
    options = checked_options(conversation["options"])
    parent, path = await _path(context, body, number)
    if body.text is not None:
        path = [*path, {"role": "user", "text": body.text}]
    # Submitted before anything is written, so that a rejected request changes nothing.
    messages = chat_messages(conversation["system_prompt"], path)
    job = job_for(messages, options, max_draft_tokens=server.info.num_draft_tokens)
    batch = server.engine.submit([job])
    try:
        added = await context.archive(_add, conversation, parent, body.text, server.model_id)
    except BaseException:
        batch.cancel()
        raise
    context.answers.start(added[-1]["id"], batch)
    return json_response({"messages": added}, status=201)


async def watch(request: Request) -> Any:
    """Stream the events of an answer from its beginning, whether it is running or finished."""
    context, number = chat_context(request), number_of(request)
    answer = context.answers.get(number)
    if answer is not None:
        return event_stream(request, _live_events(answer))
    message = await context.archive(History.message, number)
    if message["state"] == "streaming":
        raise ApiError(409, "another process is generating this answer", code="elsewhere")
    return event_stream(request, _stored_events(message))


async def stop(request: Request) -> Response:
    """Stop an answer."""
    answer = chat_context(request).answers.get(number_of(request))
    if answer is not None:
        answer.stop()
    return Response(status_code=204)


async def _path(context: ChatContext, body: NewAnswer, number: int) -> tuple[int | None, list[Row]]:
    """Return the parent of the first added message, and the branch that ends with it."""
    if body.parent is None:
        if body.text is None:
            raise refused("text is missing", param="text")
        return None, []
    if (await context.archive(History.message, body.parent))["conversation"] != number:
        raise refused(f"parent {body.parent} belongs to another conversation", param="parent")
    path = await context.archive(History.path, body.parent)
    expected = "assistant" if body.text is not None else "user"
    if path[-1]["role"] != expected:
        raise refused(f"parent {body.parent} must be a message of the {expected}", param="parent")
    if path[-1]["state"] == "streaming":
        raise ApiError(409, "the previous answer is still being generated", code="busy")
    return body.parent, path


def _add(
    history: History, conversation: Row, parent: int | None, text: str | None, model: str
) -> list[Row]:
    """Add the user's message, if there is one, and the empty answer."""
    number, added = conversation["id"], []
    with history.transaction():
        if text is not None:
            added.append(history.add(number, parent, "user", text))
            parent = added[0]["id"]
            if not conversation["title"]:
                history.update(number, {"title": _title(text)})
        added.append(history.add(number, parent, "assistant", state="streaming", model=model))
    return added


def _title(text: str) -> str:
    words = " ".join(text.split())
    words = words.lstrip("#>*-` ") or words  # Markdown syntax is noise in a title
    return words if len(words) <= _MAX_TITLE else words[: _MAX_TITLE - 1].rstrip() + "…"


async def _live_events(answer: Answer) -> AsyncGenerator[bytes, None]:
    async with contextlib.aclosing(answer.watch()) as watching:
        async for message in watching:
            yield event(message)


async def _stored_events(message: Row) -> AsyncGenerator[bytes, None]:
    """Yield the events from the history; a short answer can end before the page watches it."""
    for group in message["groups"]:
        yield event({"type": "group"} | group)
    yield event({"type": "end", "state": message["state"], "stats": message["stats"]})
