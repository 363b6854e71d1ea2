"""Reads a request's body and checks it against its model; whatever is wrong becomes one line."""

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
from mlx_mtp.apps.server.settings import Settings

MOST_LEVELS = 64
MOST_VALUES = 2**18  # more of them would keep every other thread while they are read
MOST_CONTAINERS = 2**14  # likewise
MOST_KEYS = 2**12
_IN_THREAD_BYTES = 2**16  # longer ones would keep the event loop
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_TYPE_LABELS = {"str", "int", "float", "bool", "none"}

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, model: type[Body], settings: Settings) -> Body:
    """Read a JSON body.

    Raises:
        ApiError: 400 with the field to blame, 408 for a client too slow, 413 for too long a body.
        ClientDisconnect: the client has gone.
    """
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            data = await _read(request, settings.max_body_bytes)
    except TimeoutError:
        raise ApiError(
            408, f"the request did not arrive within {settings.body_timeout_s:g} s"
        ) from None
    if len(data) > _IN_THREAD_BYTES:
        return await asyncio.to_thread(parse, data, model)
    return parse(data, model)


def parse(data: bytes, model: type[Body]) -> Body:
    """Turn bytes into a checked body.

    Raises:
        ApiError: 400; the message names the field.
    """
    values = _parse_json(data)
    if not isinstance(values, dict):
        raise refused("the body must be a JSON object")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _told(error) from None
    except RecursionError:
        raise refused("the body is nested too deep") from None


async def _read(request: Request, most: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise ApiError(413, f"the request is longer than {most} bytes", code="too_long")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse_json(data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    _check_count(data)
    try:
        values = json.loads(
            text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_no_twins
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise refused(f"the body is not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise refused("the body is nested too deep") from None
    except ValueError as error:  # ours, or Python's for a number of thousands of digits
        raise refused(f"the body is not JSON: {error}") from None
    _check_levels(values)
    if "\\u" in text:
        _check_unicode(values)
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_KEYS:
        raise ValueError(f"an object has more than {MOST_KEYS} keys")
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twin = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twin[:40]!r} occurs twice")
    return values


def _check_count(data: bytes) -> None:
    """Refuse more values than any request needs, before anything is made of them."""
    if not _too_many([data]):
        return
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = bare.count(b'"') // 2
    fault = f"{MOST_VALUES} strings" if strings > MOST_VALUES else _too_many(bare.split(b'"')[::2])
    if fault:
        raise refused(f"the body has more than {fault}", code="too_many_values")


def _too_many(pieces: list[bytes]) -> str:
    """What there is too much of in JSON without its strings; empty where nothing is."""
    if sum(piece.count(b",") for piece in pieces) >= MOST_VALUES:
        return f"{MOST_VALUES} values"
    if sum(piece.count(b"[") + piece.count(b"{") for piece in pieces) > MOST_CONTAINERS:
        return f"{MOST_CONTAINERS} lists and objects"
    return ""


def _check_levels(values: Any) -> None:
    """Refuse what is nested deeper than any request needs."""
    level = _inner([values])
    for _ in range(MOST_LEVELS):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise refused(f"the body is nested deeper than {MOST_LEVELS} levels")


def _inner(value: Any) -> list[Any]:
    """Lists and objects within a list or an object."""
    each = value.values() if isinstance(value, dict) else value
    return [inner for inner in each if isinstance(inner, dict | list)]


def _check_unicode(values: Any) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise refused("the body holds half of a surrogate pair") from None


def _told(error: ValidationError) -> ApiError:
    """Say of the most specific fault where it is and what."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    fault = max(faults, key=lambda each: len(_place(each["loc"])))
    param = ".".join(_place(fault["loc"])) or None
    match fault["type"]:
        case "extra_forbidden":
            return refused(f"{param} is not supported", param=param, code="unsupported_parameter")
        case "missing":
            return refused(f"{param} is missing", param=param, code="missing_parameter")
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return refused(f"{param}: {message}" if param else message, param=param)


def _place(loc: Iterable[int | str]) -> list[str]:
    """Where a fault is, without pydantic's names for the branches of a union."""
    named = [str(each) for each in loc]
    return [
        each
        for each in named
        if each.isdecimal() or (_FIELD.fullmatch(each) and each not in _TYPE_LABELS)
    ]
