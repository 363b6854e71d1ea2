"""Access checks before any route, as ASGI middleware.

A page of another origin must not use the server through the user's browser, neither directly
(``Origin``) nor through a host name that an attacker resolves to this address (``Host``).
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.replies import error_response
from mlx_mtp.apps.server.settings import Settings

PUBLIC_PATHS = ("/health",)
_CORS_METHODS = "GET, POST, OPTIONS"


class Guard:
    """Rejects requests that are not allowed and passes the others on.

    Args:
        app: the application.
        settings: the operator's settings.
        public_paths: paths that need no API key.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, public_paths: tuple[str, ...] = PUBLIC_PATHS
    ) -> None:
        self._app = app
        self._settings = settings
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        origin = headers.get("origin")
        try:
            self._check_host_and_origin(headers, origin)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                response = _preflight(headers)
            else:
                self._check_key(headers, path)
                self._check_length(headers)
                response = None
        except ApiError as error:
            response = error_response(path, error, headers)
        send = _with_origin(send, origin) if origin in self._settings.allowed_origins else send
        await (response or self._app)(scope, receive, send)

    def _check_host_and_origin(self, headers: Headers, origin: str | None) -> None:
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._settings.knows_host(host):
            raise ApiError(
                403,
                f"host {host[:100]!r} is not allowed (see --allowed-hosts)",
                code="foreign_host",
            )
        if origin is not None and not self._settings.knows_origin(origin, host):
            raise ApiError(
                403,
                f"origin {origin[:100]!r} is not allowed (see --allowed-origins)",
                code="foreign_origin",
            )

    def _check_key(self, headers: Headers, path: str) -> None:
        key = self._settings.api_key
        if key is None or path in self._public_paths:
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        key_sent = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(key_sent.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or invalid", code="invalid_api_key")

    def _check_length(self, headers: Headers) -> None:
        length, limit = headers.get("content-length", "0"), self._settings.max_body_bytes
        if len(length) > 15 or not length.isdecimal() or int(length) > limit:
            raise ApiError(413, f"the request is longer than {limit} bytes", code="too_long")


def _preflight(headers: Headers) -> Response:
    """Answer a CORS preflight request."""
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": _CORS_METHODS,
            "Access-Control-Allow-Headers": headers.get("access-control-request-headers", ""),
            "Access-Control-Max-Age": "600",
        },
    )


def _with_origin(send: Send, origin: str | None) -> Send:
    """Add the headers that allow this origin, and no other, to read the response."""

    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin or ""
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_origin
