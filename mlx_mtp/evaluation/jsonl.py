"""JSON that users write: one reader, whose errors name the file, the line and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

Item = TypeVar("Item")

UTF8_BOM = b"\xef\xbb\xbf"


def read_lines(data: bytes, parse: Callable[[Any, int], Item], *, name: str) -> list[Item]:
    """Parse the lines of a JSONL file; blank lines are skipped.

    Args:
        data: content of the file, UTF-8.
        parse: makes an item of a JSON value and the number of its line.
        name: of the file, for errors.

    Raises:
        ValueError: a line is not JSON, or ``parse`` raised; the message has the line's number.
    """
    items = []
    # Bytes are split at newlines only: a string may contain U+2028 and similar characters.
    for number, line in enumerate(data.removeprefix(UTF8_BOM).split(b"\n"), start=1):
        if line.strip():
            try:
                items.append(parse(parse_json(line), number))
            except ValueError as error:
                raise ValueError(f"{name}, line {number}: {error}") from None
    return items


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        ValueError: it cannot be read; one line.
    """
    try:
        return json.loads(data.removeprefix(UTF8_BOM).decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise ValueError("not JSON that can be read (too deep, or a number too long)") from None


def check_object(value: Any) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ValueError: the value is something else.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def check_text(value: Any, name: str, *, allow_empty: bool = False) -> str:
    """Return a string that is not blank and can be written as UTF-8.

    Args:
        value: from JSON.
        name: what the error calls it.
        allow_empty: whether blank strings are allowed.

    Raises:
        ValueError: it is not such a string.
    """
    if not isinstance(value, str):
        shown = type(value).__name__ if isinstance(value, list | dict) else json.dumps(value)
        raise ValueError(f"{name!r} must be a string, got {shown}")
    if not allow_empty and not value.strip():
        raise ValueError(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} contains half of a surrogate pair") from None
    return value
