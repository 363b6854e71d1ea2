"""The chat app: the server's application with the page, its routes, and the gate before them."""

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
from mlx_mtp.apps.chat_app.answering import ALONE_S, Answers
from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.chat_app.assets import Assets, dist_folder
from mlx_mtp.apps.chat_app.bodies import Session
from mlx_mtp.apps.chat_app.desk import ChatDesk, politely, server_desk
from mlx_mtp.apps.chat_app.gate import SESSION_PATH, Gate
from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.history.transfer import MOST_BYTES
from mlx_mtp.apps.server.app import create_app
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.settings import Settings

PREFIX = "/app/api"


@dataclass
class ChatApp:
    """What there is to serve.

    Attributes:
        gate: the ASGI application.
        archive: the history; to be closed when the server has ended.
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
    alone_s: float = ALONE_S,
) -> ChatApp:
    """Make the application; it starts the engine and stops it.

    Args:
        engine: not started yet.
        settings: from ``app_settings``.
        history: the file of the history.
        model: what the engine was told to load.
        adapter_path: likewise.
        folder: where the page was built; the package's own by default.
        alone_s: how long an answer goes on while no page watches.

    Raises:
        ValueError: the page was not built, or the file is no history.
    """
    assets = Assets(folder or dist_folder())
    archive = Archive(history)
    desk = ChatDesk(archive, Answers(archive, alone_s=alone_s), model, adapter_path)
    app = create_app(engine, settings, routes=[*assets.routes(), *_routes()])
    app.state.chat = desk
    app.router.lifespan_context = _ending(app.router.lifespan_context, desk)
    app.state.gate = Gate(app)
    return ChatApp(app.state.gate, archive)


def app_settings(port: int = 0) -> Settings:
    """Settings of the server for the app: this machine alone, files of conversations let in."""
    return Settings(host="127.0.0.1", port=port, max_body_bytes=MOST_BYTES)


def _routes() -> list[BaseRoute]:
    return [
        Route(SESSION_PATH, politely(_session), methods=["POST"]),
        *conversation_routes.routes(PREFIX),
        *answer_routes.routes(PREFIX),
        *race.routes(PREFIX),
        *model_routes.routes(PREFIX),
    ]


async def _session(request: Request) -> Response:
    """Exchange the token for a cookie."""
    body = await read_body(request, Session, server_desk(request).settings)
    gate: Gate = request.app.state.gate
    cookie = gate.cookie(body.token, request.headers.get("host", ""))
    return Response(status_code=204, headers={"Set-Cookie": cookie})


def _ending(inner: Any, desk: ChatDesk) -> Any:
    """The application's life, with answers saved before the engine is stopped."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Any]:
        async with inner(app) as state:
            try:
                yield state
            finally:
                await desk.answers.close()

    return lifespan
