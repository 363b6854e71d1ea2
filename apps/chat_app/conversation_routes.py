"""Routes for the history: conversations, search, settings, export and import."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app.bodies import ChangedConversation, NewConversation, checked_options
from mlx_mtp.apps.chat_app.bodies import Settings as PageSettings
from mlx_mtp.apps.chat_app.context import chat_context, number_of, server_context, with_http_errors
from mlx_mtp.apps.history import transfer
from mlx_mtp.apps.history.store import History
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.replies import json_response

_MAX_SEARCH = 200


def routes(prefix: str) -> list[BaseRoute]:
    """Return the routes below ``prefix``."""
    one = f"{prefix}/conversations/{{number:int}}"
    table = [
        ("/conversations", "GET", list_all),
        ("/conversations", "POST", create),
        ("/settings", "GET", settings),
        ("/settings", "PUT", remember),
        ("/export", "GET", export_all),
        ("/import", "POST", import_file),
    ]
    routes: list[BaseRoute] = [
        Route(prefix + path, with_http_errors(handler), methods=[method])
        for path, method, handler in table
    ]
    for method, handler in [("GET", show), ("PATCH", change), ("DELETE", delete)]:
        routes.append(Route(one, with_http_errors(handler), methods=[method]))
    return [*routes, Route(f"{one}/export", with_http_errors(export), methods=["GET"])]


async def list_all(request: Request) -> Response:
    """List summaries, the latest first; ``?search=`` searches titles and messages."""
    search = request.query_params.get("search", "")[:_MAX_SEARCH]
    return json_response(await chat_context(request).archive(History.conversations, search))


async def create(request: Request) -> Response:
    """Create a conversation."""
    body = await read_body(request, NewConversation, server_context(request).settings)
    checked_options(body.options)
    archive = chat_context(request).archive
    created = await archive(
        History.create, body.title, system_prompt=body.system_prompt, options=body.options
    )
    return json_response(created, status=201)


async def show(request: Request) -> Response:
    """Return a conversation with all messages."""
    return json_response(
        await chat_context(request).archive(History.conversation, number_of(request))
    )


async def change(request: Request) -> Response:
    """Change the title, system prompt, options or shown branch of a conversation."""
    body = await read_body(request, ChangedConversation, server_context(request).settings)
    values = body.model_dump(exclude_unset=True)
    if "options" in values:
        checked_options(values["options"] or {})
    changes = {name: value for name, value in values.items() if value is not None or name == "leaf"}
    await chat_context(request).archive(History.update, number_of(request), changes)
    return Response(status_code=204)


async def delete(request: Request) -> Response:
    """Delete a conversation and stop its running answers."""
    context, number = chat_context(request), number_of(request)
    for message in (await context.archive(History.conversation, number))["messages"]:
        if answer := context.answers.get(message["id"]):
            answer.stop()
    await context.archive(History.delete, number)
    return Response(status_code=204)


async def export(request: Request) -> Response:
    """Download a conversation as ``?format=json`` or ``markdown``."""
    archive, number = chat_context(request).archive, number_of(request)
    title = (await archive(History.conversation, number))["title"]
    match request.query_params.get("format", "json"):
        case "json":
            text = await archive(transfer.to_json, [number])
            return _download(text, _file_name(title, "json"), "application/json")
        case "markdown":
            text = await archive(transfer.to_markdown, number)
            return _download(text, _file_name(title, "md"), "text/markdown")
    raise ValueError("format must be json or markdown")


async def export_all(request: Request) -> Response:
    """Download all conversations as JSON."""
    archive = chat_context(request).archive
    numbers = [summary["id"] for summary in await archive(History.conversations)]
    text = await archive(transfer.to_json, numbers)
    return _download(text, "conversations.json", "application/json")


async def import_file(request: Request) -> Response:
    """Import conversations from an exported file."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > transfer.MAX_BYTES:
            raise ApiError(413, f"the file exceeds {transfer.MAX_BYTES} bytes")
    numbers = await chat_context(request).archive(transfer.from_json, bytes(data))
    return json_response({"conversations": numbers}, status=201)


async def settings(request: Request) -> Response:
    """Return the settings of the page."""
    return json_response(await chat_context(request).archive(History.settings))


async def remember(request: Request) -> Response:
    """Change some settings of the page."""
    body = await read_body(request, PageSettings, server_context(request).settings)
    await chat_context(request).archive(History.remember, body.values)
    return Response(status_code=204)


def _download(text: str, name: str, media_type: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(text.encode(), headers=headers, media_type=media_type)


def _file_name(title: str, suffix: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9]+", "-", title).strip("-").lower()[:60]
    return f"{plain or 'conversation'}.{suffix}"
