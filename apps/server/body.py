"""Reads a request's body and validates it; an error becomes one line that names the field."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.hints import Note, unnoted
from mlx_mtp.apps.server.settings import Settings
from mlx_mtp.text.tool_prompt import valid_unicode

MAX_LEVELS = 64
MAX_VALUES = 2**18  # parsing more would block every other thread
MAX_CONTAINERS = 2**14  # the same
MAX_KEYS = 2**12
_IN_THREAD_BYTES = 2**16  # parsing a longer body would block the event loop
UNSUPPORTED = "unsupported_field"  # type of a validation error whose message is the field
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_TYPE_LABELS = {"str", "int", "float", "bool", "none"}

Body = TypeVar("Body", bound=BaseModel)


async def read_body(
    request: Request, model: type[Body], settings: Settings, *, note: Note = unnoted
) -> Body:
    """Read a JSON body.

    Args:
        request: the request.
        model: the fields of the body.
        settings: limits of size and time.
        note: logs fields that are ignored.

    Raises:
        ApiError: 400 with the invalid field, 408 for a slow client, 413 for a long body.
        ClientDisconnect: the client disconnected.
    """
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the request did not arrive within {settings.body_timeout_s:g} s"
        ) from None
    if len(data) > _IN_THREAD_BYTES:
        return await asyncio.to_thread(parse, data, model, note)
    return parse(data, model, note)


def parse(data: bytes, model: type[Body], note: Note = unnoted) -> Body:
    """Parse and validate a body.

    Raises:
        ApiError: 400; the message names the field.
    """
    values = _parse_json(data)
    if not isinstance(values, dict):
        raise refused("the body must be a JSON object")
    try:
        return model.model_validate(values, context=note)
    except ValidationError as error:
        raise _api_error(error) from None
    except RecursionError:
        raise refused("the body is nested too deep") from None


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise ApiError(413, f"the request is longer than {max_bytes} bytes", code="too_long")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse_json(data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refused(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    _check_count(data)
    try:
        values = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise refused(f"the body is not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise refused("the body is nested too deep") from None
    except ValueError as error:  # ours, or Python's for a number of thousands of digits
        raise refused(f"the body is not JSON: {error}") from None
    _check_levels(values)
    written = json.dumps(values, ensure_ascii=False) if "\\u" in text else ""
    try:
        written.encode()
    except UnicodeEncodeError:  # clients cut texts between the halves of a character
        return json.loads(valid_unicode(written))
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise ValueError(f"an object has more than {MAX_KEYS} keys")
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        duplicate = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {duplicate[:40]!r} occurs twice")
    return values


def _check_count(data: bytes) -> None:
    """Reject more values than any request needs, before they are parsed."""
    if not _too_many([data]):
        return
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    limit = f"{MAX_VALUES} strings" if strings > MAX_VALUES else _too_many(bare.split(b'"')[::2])
    if limit:
        raise refused(f"the body has more than {limit}", code="too_many_values")


def _too_many(pieces: list[bytes]) -> str:
    """The limit that JSON without its strings exceeds; empty if there is none."""
    if sum(piece.count(b",") for piece in pieces) >= MAX_VALUES:
        return f"{MAX_VALUES} values"
    if sum(piece.count(b"[") + piece.count(b"{") for piece in pieces) > MAX_CONTAINERS:
        return f"{MAX_CONTAINERS} lists and objects"
    return ""


def _check_levels(values: Any) -> None:
    """Reject deeper nesting than any request needs."""
    level = _inner([values])
    for _ in range(MAX_LEVELS):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise refused(f"the body is nested deeper than {MAX_LEVELS} levels")


def _inner(value: Any) -> list[Any]:
    """Lists and objects within a list or an object."""
    values = value.values() if isinstance(value, dict) else value
    return [inner for inner in values if isinstance(inner, dict | list)]


def _api_error(error: ValidationError) -> ApiError:
    """Convert the most specific of the errors."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    detail = max(details, key=lambda detail: len(_place(detail["loc"])))
    name = [detail["msg"]] if detail["type"] == UNSUPPORTED else []
    param = ".".join([*_place(detail["loc"]), *name]) or None
    match detail["type"]:
        case "extra_forbidden" | "unsupported_field":
            return refused(f"{param} is not supported", param=param, code="unsupported_parameter")
        case "missing":
            return refused(f"{param} is missing", param=param, code="missing_parameter")
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return refused(f"{param}: {message}" if param else message, param=param)


def _place(loc: Iterable[int | str]) -> list[str]:
    """The path of a field, without pydantic's names for the branches of a union."""
    names = [str(part) for part in loc]
    return [
        name
        for name in names
        if name.isdecimal() or (_FIELD.fullmatch(name) and name not in _TYPE_LABELS)
    ]
