"""The prompts that verification and benchmarks run on: a built-in set, or a user's own file.

The built-in set is ``prompts.jsonl`` beside this module: user messages in our own words, 12 of each
kind in ``KINDS``, which are what is meant where no kind is named, then the further kinds in
``BENCHMARK_KINDS``; always in the same order.  A prompt is plain text; chat templates and
tokenizers are the caller's business.  A file is read wholly or not at all: the first bad line
raises ``ValueError`` with the file's name, the line's number and the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

KINDS = ("chat", "code", "maths", "lists", "edit", "languages")
ENGLISH_KINDS = tuple(kind for kind in KINDS if kind != "languages")
BENCHMARK_KINDS = (*KINDS, "summary", "extraction", "rewrite")
USER_KIND = "user"
BUILTIN_FILE = "prompts.jsonl"
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        id: name of the prompt, unique within its set, such as ``chat-01``.
        kind: one of ``BENCHMARK_KINDS`` in the built-in set; free in a user's file.
        text: the message itself, with no chat template around it.
    """

    id: str
    kind: str
    text: str


def builtin_prompts(kinds: Collection[str] | None = None) -> list[Prompt]:
    """Return the built-in prompts of the given kinds in file order; None means the 72 of ``KINDS``.

    The further kinds were added for ``mlx-mtp benchmark`` and are given where they are named, so
    that figures measured on the 72 stay comparable.

    Raises:
        ValueError: ``kinds`` is empty or names an unknown kind.
    """
    kinds = KINDS if kinds is None else kinds
    unknown = sorted(set(kinds) - set(BENCHMARK_KINDS))
    if unknown or not kinds:
        known = ", ".join(BENCHMARK_KINDS)
        raise ValueError(f"kinds must be among {known}, got {unknown or kinds!r}")
    prompts = _parse((files("mlx_mtp.evaluation") / BUILTIN_FILE).read_bytes(), name=BUILTIN_FILE)
    return [prompt for prompt in prompts if prompt.kind in kinds]


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """sha256 of the prompts with their ids and kinds, in order."""
    values = [dataclasses.asdict(prompt) for prompt in prompts]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a UTF-8 JSONL file of prompts, one JSON object a line; blank lines are skipped.

    Each object has ``"prompt"`` or ``"text"`` (not both), and may have ``"kind"`` (default
    ``user``) and ``"id"`` (default ``line-N``).  Other keys are ignored.

    Raises:
        ValueError: a line is bad, an id occurs twice, or the file holds no prompt.
        OSError: the file cannot be read.
    """
    return _parse(Path(path).read_bytes(), name=str(path))


def _parse(data: bytes, *, name: str) -> list[Prompt]:
    prompts: list[Prompt] = []
    first_seen: dict[str, int] = {}
    for number, line in _numbered_lines(data):
        try:
            prompt = _parse_line(line, default_id=f"line-{number}")
            if prompt.id in first_seen:
                raise ValueError(f"id {prompt.id!r} was used on line {first_seen[prompt.id]}")
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        first_seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{name}: no prompts in this file")
    return prompts


def _numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    # Bytes are split at newlines alone: text may hold U+2028 and its like inside a string.
    for number, line in enumerate(data.removeprefix(_UTF8_BOM).split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _parse_line(line: bytes, *, default_id: str) -> Prompt:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise ValueError("not JSON that can be read (too deep, or a number too long)") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    if ("prompt" in values) == ("text" in values):
        found = "both" if "prompt" in values else "neither"
        raise ValueError(f"expected one of the keys 'prompt' and 'text', found {found}")
    return Prompt(
        id=_string(values, key="id", default=default_id),
        kind=_string(values, key="kind", default=USER_KIND),
        text=_string(values, key="prompt" if "prompt" in values else "text"),
    )


def _string(values: dict[str, Any], *, key: str, default: str | None = None) -> str:
    value = values.get(key, default)
    if not isinstance(value, str):
        shown = type(value).__name__ if isinstance(value, (list, dict)) else json.dumps(value)
        raise ValueError(f"{key!r} must be a string, got {shown}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half of a surrogate pair") from None
    return value
