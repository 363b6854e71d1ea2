"""Who may use the app: whoever holds the token of this launch, and nobody's web page.

The token comes with the address that is opened, as its fragment, which browsers send nowhere.  The
page exchanges it for a cookie that scripts cannot read and other sites cannot send.  A cookie of
127.0.0.1 goes to every port there, so requests must also come from our own page.
"""

from __future__ import annotations

import hmac
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.apps.server.errors import ApiError
from mlx_mtp.apps.server.replies import error_response

SESSION_PATH = "/app/api/session"
PUBLIC_PATHS = ("/", "/favicon.svg", SESSION_PATH)
PUBLIC_FOLDER = "/assets/"
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-DNS-Prefetch-Control": "off",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Gate:
    """ASGI middleware around the whole server.

    Args:
        app: what lies behind.

    Attributes:
        token: what the address of this launch holds; it also serves as a bearer token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.token = secrets.token_urlsafe(32)
        self._session = secrets.token_urlsafe(32)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and add the headers that bind the page."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sending = _with_headers(send)
        try:
            self._check(scope)
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, sending)
            return
        await self._app(scope, receive, sending)

    def cookie(self, token: str, host: str) -> str:
        """The ``Set-Cookie`` header for whoever shows the token.

        Raises:
            ApiError: 401, it is another token.
        """
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise ApiError(401, "the token is not the one of this launch", code="invalid_token")
        return f"{cookie_name(host)}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER):
            return
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise ApiError(403, "only the app's own page may ask", code="foreign_origin")
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            good = hmac.compare_digest(bearer.strip().encode(), self.token.encode())
        else:
            cookies = cookie_parser(headers.get("cookie", ""))
            given = cookies.get(cookie_name(headers.get("host", "")), "")
            good = hmac.compare_digest(given.encode(), self._session.encode())
        if not good:
            raise ApiError(401, "open the address that mlx-mtp app printed", code="no_session")


def cookie_name(host: str) -> str:
    """Name of the cookie; ports share cookies, so the port is part of it."""
    port = host.rpartition(":")[2]
    return f"mlx_mtp_app_{port if port.isdecimal() else 80}"


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if "cache-control" not in headers:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return sending
