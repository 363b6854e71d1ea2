"""The ASGI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.apps.engine.supervisor import Engine
from mlx_mtp.apps.server import status
from mlx_mtp.apps.server.api import (
    anthropic_messages,
    openai_chat,
    openai_completions,
    openai_responses,
)
from mlx_mtp.apps.server.api.jobs import Desk
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.metrics import Metrics
from mlx_mtp.apps.server.replies import error_response
from mlx_mtp.apps.server.security import PUBLIC_PATHS, Guard
from mlx_mtp.apps.server.settings import Settings

_CLIENT_LEFT = 499


def create_app(
    engine: Engine,
    settings: Settings,
    *,
    routes: Sequence[BaseRoute] = (),
    public_paths: Sequence[str] = (),
) -> Starlette:
    """Make the application; it starts the engine and stops it.

    Args:
        engine: not started yet.
        settings: how requests are taken.
        routes: more routes, such as the pages of a chat app; they find the engine and the settings
            in ``request.app.state.desk`` and pass the same checks.
        public_paths: paths that need no API key, besides ``/health``.
    """
    app = Starlette(
        routes=[*_routes(), *routes],
        middleware=[
            Middleware(_Counted, metrics=engine.metrics),
            Middleware(Guard, settings=settings, public_paths=(*PUBLIC_PATHS, *public_paths)),
        ],
        exception_handlers={
            ApiError: _told,
            HTTPException: _told_http,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
        lifespan=_lifespan,
    )
    app.state.desk = Desk(engine, settings)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    engine: Engine = app.state.desk.engine
    await engine.start()
    try:
        yield
    finally:
        await engine.stop()


def _routes() -> list[Route]:
    return [
        Route("/health", status.health),
        Route("/metrics", status.metrics),
        Route("/openapi.json", status.openapi),
        Route("/v1/models", status.models),
        Route("/v1/models/{model:path}", status.model),
        Route("/v1/chat/completions", openai_chat.create, methods=["POST"]),
        Route("/v1/completions", openai_completions.create, methods=["POST"]),
        Route("/v1/responses", openai_responses.create, methods=["POST"]),
        Route("/v1/messages", anthropic_messages.create, methods=["POST"]),
    ]


class _Counted:
    """Counts requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = {route.path for route in _routes()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(path, message["status"])
            await send(message)

        await self._app(scope, receive, counting)


async def _told(request: Request, error: Any) -> Response:
    return error_response(request.url.path, error)


async def _told_http(request: Request, error: Any) -> Response:
    """What the router itself refuses: an unknown path, a wrong method."""
    response = error_response(request.url.path, ApiError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Any) -> Response:
    """Nobody reads this; the status is for the log and the counters."""
    del request, error
    return Response(status_code=_CLIENT_LEFT)


async def _failed(request: Request, error: Any) -> Response:
    """A bug: Starlette logs the traceback."""
    kind = type(error).__name__
    return error_response(request.url.path, ApiError(500, f"internal error ({kind})"))
