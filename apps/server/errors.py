"""Errors of requests in the formats of OpenAI and Anthropic."""

from __future__ import annotations

from typing import Any

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}


class ApiError(Exception):
    """An HTTP error response.

    Args:
        status: HTTP status.
        message: one line for users.
        param: the invalid field.
        code: machine-readable error code.
        retry_after: seconds after which to retry.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def openai(self) -> dict[str, Any]:
        """Return the body in OpenAI's format."""
        return {
            "error": {
                "message": self.message,
                "type": OPENAI_TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """Return the body in Anthropic's format."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error")
        where = f"{self.param}: " if self.param and not self.message.startswith(self.param) else ""
        return {"type": "error", "error": {"type": kind, "message": where + self.message}}


def refused(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400: the request is invalid or asks for something that is not supported."""
    return ApiError(400, message, param=param, code=code)


def engine_down(message: str) -> ApiError:
    """Return a 503: the engine is not running yet, or is being restarted."""
    return ApiError(503, message, code="engine_unavailable", retry_after=1)
