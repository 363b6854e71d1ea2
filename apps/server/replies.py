"""Responses other than streams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from starlette.responses import Response

from mlx_mtp.apps.server.errors import ApiError

ANTHROPIC_PATHS = ("/v1/messages", "/messages")
ANTHROPIC_HEADER = "anthropic-version"  # sent with every request to Anthropic's API
_CLOSE = (408, 413)  # the rest of the request has not been read


def json_response(
    content: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a JSON response."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(body.encode(), status, headers, media_type="application/json")


def error_response(
    path: str, error: ApiError, request_headers: Mapping[str, str] = MappingProxyType({})
) -> Response:
    """Return an error in the format of the API that the request is of."""
    anthropic = path.startswith(ANTHROPIC_PATHS) or ANTHROPIC_HEADER in request_headers
    headers = error.headers | ({"Connection": "close"} if error.status in _CLOSE else {})
    content = error.anthropic() if anthropic else error.openai()
    return json_response(content, status=error.status, headers=headers)
