"""Prompts for verification and benchmarks: a built-in set, or a user's file.

The built-in set is ``prompts.jsonl`` in this folder: user messages in our own words, 12 of each
kind in ``KINDS``, the default, then the further kinds in ``BENCHMARK_KINDS``; always in the same
order.  A prompt is plain text, without a chat template.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_mtp.evaluation.jsonl import check_object, check_text, read_lines

KINDS = ("chat", "code", "maths", "lists", "edit", "languages")
ENGLISH_KINDS = tuple(kind for kind in KINDS if kind != "languages")
BENCHMARK_KINDS = (*KINDS, "summary", "extraction", "rewrite")
USER_KIND = "user"
BUILTIN_FILE = "prompts.jsonl"


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
    """Return the built-in prompts of some kinds in file order; None means the 72 of ``KINDS``.

    The further kinds were added for ``mlx-mtp benchmark``; they are returned only if named, so that
    figures measured on the 72 stay comparable.

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
    """Read a UTF-8 JSONL file of prompts, one JSON object per line; blank lines are skipped.

    Each object has ``"prompt"`` or ``"text"`` (not both), and may have ``"kind"`` (default
    ``user``) and ``"id"`` (default ``line-N``).  Other keys are ignored.

    Raises:
        ValueError: a line is bad, an id occurs twice, or the file has no prompt.
        OSError: the file cannot be read.
    """
    return _parse(Path(path).read_bytes(), name=str(path))


def _parse(data: bytes, *, name: str) -> list[Prompt]:
    lines: dict[str, int] = {}  # of prompts by id

    def parse(values: Any, number: int) -> Prompt:
        prompt = _prompt(values, default_id=f"line-{number}")
        if prompt.id in lines:
            raise ValueError(f"id {prompt.id!r} was used on line {lines[prompt.id]}")
        lines[prompt.id] = number
        return prompt

    prompts = read_lines(data, parse, name=name)
    if not prompts:
        raise ValueError(f"{name}: no prompts in this file")
    return prompts


def _prompt(values: Any, *, default_id: str) -> Prompt:
    values = check_object(values)
    if ("prompt" in values) == ("text" in values):
        count = "both" if "prompt" in values else "neither"
        raise ValueError(f"expected one of the keys 'prompt' and 'text', found {count}")
    key = "prompt" if "prompt" in values else "text"
    return Prompt(
        id=check_text(values.get("id", default_id), "id"),
        kind=check_text(values.get("kind", USER_KIND), "kind"),
        text=check_text(values[key], key),
    )
