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
    tokens,
)
from mlx_mtp.apps.server.api.jobs import ServerContext
from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.metrics import Metrics
from mlx_mtp.apps.server.replies import error_response
from mlx_mtp.apps.server.security import PUBLIC_PATHS, Guard
from mlx_mtp.apps.server.settings import Settings

_CLIENT_DISCONNECTED = 499


def create_app(
    engine: Engine,
    settings: Settings,
    *,
    routes: Sequence[BaseRoute] = (),
    public_paths: Sequence[str] = (),
) -> Starlette:
    """Create the application; it starts and stops the engine.

    Args:
        engine: not started yet.
        settings: the operator's settings.
        routes: more routes, such as those of a chat app, under the same checks; the
            ``ServerContext`` is in ``request.app.state.context``.
        public_paths: paths that need no API key, in addition to ``/health``.
    """
    app = Starlette(
        routes=[*_routes(), *routes, Route("/", status.root), Route("/api/hello", status.root)],
        middleware=[
            Middleware(_CountRequests, metrics=engine.metrics),
            Middleware(Guard, settings=settings, public_paths=(*PUBLIC_PATHS, *public_paths)),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_disconnected,
            Exception: _internal_error,
        },
        lifespan=_lifespan,
    )
    engine.load.num_draft_tokens = settings.num_draft_tokens  # checked when the model is loaded
    app.state.context = ServerContext(engine, settings)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    engine: Engine = app.state.context.engine
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
        Route("/props", status.props),
        Route("/tokenize", tokens.tokenize, methods=["POST"]),
        Route("/detokenize", tokens.detokenize, methods=["POST"]),
        *(route for prefix in ("/v1", "") for route in _api_routes(prefix)),
    ]


def _api_routes(prefix: str) -> list[Route]:
    """The routes of the APIs; some clients leave out ``/v1``."""
    posts = {
        "/chat/completions": openai_chat.create,
        "/completions": openai_completions.create,
        "/responses": openai_responses.create,
        "/messages": anthropic_messages.create,
        "/messages/count_tokens": anthropic_messages.count_tokens,
    }
    return [
        Route(f"{prefix}/models", status.models),
        Route(f"{prefix}/models/{{model:path}}", status.model),
        *(Route(prefix + path, create, methods=["POST"]) for path, create in posts.items()),
    ]


class _CountRequests:
    """Middleware that counts requests by path and status."""

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


async def _api_error(request: Request, error: Any) -> Response:
    return error_response(request.url.path, error, request.headers)


async def _http_error(request: Request, error: Any) -> Response:
    """An error of the router: unknown path or wrong method."""
    api_error = ApiError(error.status_code, error.detail)
    response = error_response(request.url.path, api_error, request.headers)
    response.headers.update(error.headers or {})
    return response


async def _client_disconnected(request: Request, error: Any) -> Response:
    """Nobody reads this response; its status is counted."""
    del request, error
    return Response(status_code=_CLIENT_DISCONNECTED)


async def _internal_error(request: Request, error: Any) -> Response:
    """A bug; Starlette logs the traceback."""
    kind = type(error).__name__
    api_error = ApiError(500, f"internal error ({kind})")
    return error_response(request.url.path, api_error, request.headers)
