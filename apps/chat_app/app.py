"""The chat app: the server's application plus the page, its routes and access control."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_mtp.apps.chat_app import answer_routes, conversation_routes, model_routes, race
from mlx_mtp.apps.chat_app.answering import UNWATCHED_S, Answers
from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.chat_app.assets import Assets, dist_folder
from mlx_mtp.apps.chat_app.bodies import Session
from mlx_mtp.apps.chat_app.context import ChatContext, server_context, with_http_errors
from mlx_mtp.apps.chat_app.gate import SESSION_PATH, Gate
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.history.transfer import MAX_BYTES
from mlx_mtp.apps.server.app import create_app
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.settings import Settings

PREFIX = "/app/api"


@dataclass
class ChatApp:
    """A chat app that is ready to serve.

    Attributes:
        gate: the ASGI application.
        archive: the history; close it after the server has stopped.
    """

    gate: Gate
    archive: Archive


def create_chat_app(
    engine: Engine,
    settings: Settings,
    history: Path,
    *,
    model: str | None = None,
    adapter_path: str | None = None,
    folder: Path | None = None,
    unwatched_s: float = UNWATCHED_S,
) -> ChatApp:
    """Create the application; it starts and stops the engine.

    Args:
        engine: not started yet.
        settings: from ``app_settings``.
        history: path of the history file.
        model: the model that the engine loads; None is the built-in model.
        adapter_path: the adapter that the engine loads; None is the model's default.
        folder: folder of the built page; the package's own by default.
        unwatched_s: seconds without a watching page until an answer is stopped.

    Raises:
        ValueError: the page is not built, or the file is not a history.
    """
    assets = Assets(folder or dist_folder())
    archive = Archive(history)
    context = ChatContext(archive, Answers(archive, unwatched_s=unwatched_s), model, adapter_path)
    app = create_app(engine, settings, routes=[*assets.routes(), *_routes()])
    app.state.chat = context
    app.router.lifespan_context = _closing_answers(app.router.lifespan_context, context)
    app.state.gate = Gate(app)
    return ChatApp(app.state.gate, archive)


def app_settings(port: int = 0) -> Settings:
    """Return the server's settings for the app: local connections only, large imports allowed."""
    return Settings(host="127.0.0.1", port=port, max_body_bytes=MAX_BYTES)


def _routes() -> list[BaseRoute]:
    return [
        Route(SESSION_PATH, with_http_errors(_session), methods=["POST"]),
        *conversation_routes.routes(PREFIX),
        *answer_routes.routes(PREFIX),
        *race.routes(PREFIX),
        *model_routes.routes(PREFIX),
    ]


async def _session(request: Request) -> Response:
    """Exchange the token for a cookie."""
    body = await read_body(request, Session, server_context(request).settings)
    gate: Gate = request.app.state.gate
    cookie = gate.cookie(body.token, request.headers.get("host", ""))
    return Response(status_code=204, headers={"Set-Cookie": cookie})


def _closing_answers(inner: Any, context: ChatContext) -> Any:
    """Wrap the application's lifespan: save running answers before the engine stops."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Any]:
        async with inner(app) as state:
            try:
                yield state
            finally:
                await context.answers.close()

    return lifespan
