"""Access control: requests need the token of this launch and must come from the app's own page.

The token is the fragment of the opened address, which browsers never send.  The page exchanges it
for a cookie that scripts cannot read and other sites cannot send.  Browsers send cookies for
127.0.0.1 to every port, so requests must also come from the app's own page.
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
    """ASGI middleware that protects the whole server.

    Args:
        app: the protected application.

    Attributes:
        token: access token in the address of this launch; also valid as a bearer token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.token = secrets.token_urlsafe(32)
        self._session = secrets.token_urlsafe(32)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and add security headers to the response."""
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
        """Return the ``Set-Cookie`` header for a valid token.

        Raises:
            ApiError: 401 if the token is wrong.
        """
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            raise ApiError(
                401, "the token is not valid for this launch of the app", code="invalid_token"
            )
        return f"{cookie_name(host)}={self._session}; Path=/; HttpOnly; SameSite=Strict"

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        if path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDER):
            return
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise ApiError(403, "requests must come from the app's own page", code="foreign_origin")
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            valid = hmac.compare_digest(bearer.strip().encode(), self.token.encode())
        else:
            cookies = cookie_parser(headers.get("cookie", ""))
            session = cookies.get(cookie_name(headers.get("host", "")), "")
            valid = hmac.compare_digest(session.encode(), self._session.encode())
        if not valid:
            raise ApiError(401, "open the address that mlx-mtp app printed", code="no_session")


def cookie_name(host: str) -> str:
    """Return the cookie's name; it contains the port because ports share cookies."""
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
