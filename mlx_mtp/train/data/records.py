"""Records of training text, and the JSONL files that contain them.

Four shapes of a line are read: ``{"messages": [{"role", "content"}]}``, ``{"conversations":
[{"from", "value"}]}``, ``{"prompt", "completion" or "response"}`` and ``{"text"}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mlx_mtp.evaluation.jsonl import UTF8_BOM, check_object, check_text, parse_json, read_lines
from mlx_mtp.train.line_file import LineFile

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_ANSWERS = ("completion", "response")


@dataclass(frozen=True)
class Record:
    """A conversation or a plain text.

    Attributes:
        messages: dicts of ``role`` and ``content``, or None.
        text: plain text, or None.
        source: name of the origin, for messages to the user.
        meta: further values.  ``cut`` is true if the last answer was truncated; ``given`` is the
            number of leading characters of a text that the model did not write; ``kind`` is the
            kind of the text, by which its acceptance is reported.
    """

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert (self.messages is None) != (self.text is None)

    @property
    def prompt(self) -> str:
        """The first user message, or the whole text."""
        if self.messages is None:
            return self.text or ""
        users = (message["content"] for message in self.messages if message["role"] == "user")
        return next(users, "")

    @property
    def answers(self) -> list[str]:
        """The assistant's messages, or the whole text."""
        if self.messages is None:
            return [self.text or ""]
        return [item["content"] for item in self.messages if item["role"] == "assistant"]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that ``parse_record`` reads."""
        values: dict[str, Any] = (
            {"text": self.text} if self.messages is None else {"messages": list(self.messages)}
        )
        if self.source:
            values["source"] = self.source
        return values | ({"meta": dict(self.meta)} if self.meta else {})


def parse_record(values: Any, *, source: str = "") -> Record:
    """Turn a JSON object into a record.

    Raises:
        ValueError: it has none of the four shapes, or contains no text.
    """
    values = check_object(values)
    meta = values.get("meta")
    extra = {
        "source": _known_source(values, source),
        "meta": meta if isinstance(meta, dict) else {},
    }
    if "messages" in values:
        return Record(_messages(values["messages"], key="messages"), **extra)
    if "conversations" in values:
        return Record(_messages(values["conversations"], key="conversations"), **extra)
    if "prompt" in values:
        return Record(_pair(values), **extra)
    if "text" in values:
        return Record(text=check_text(values["text"], "text"), **extra)
    raise ValueError(
        "expected one of the keys 'messages', 'conversations', 'prompt' and 'text', found "
        + (", ".join(repr(key) for key in list(values)[:5]) or "none")
    )


def read_jsonl(path: Path) -> list[Record]:
    """Read a JSONL file; blank lines are skipped.

    Raises:
        ValueError: a line is bad.
        OSError: the file cannot be read.
    """
    return _parse_jsonl(path.read_bytes(), path)


def read_json(path: Path) -> list[Record]:
    """Read a file with a JSON list of objects, or JSONL.

    Raises:
        ValueError: it is neither, or an entry is bad; the message names it.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if not data.removeprefix(UTF8_BOM).lstrip().startswith(b"["):
        return _parse_jsonl(data, path)
    try:
        entries = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    records = []
    for number, entry in enumerate(entries, start=1):
        try:
            records.append(parse_record(entry, source=path.name))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from None
    return records


def data_hash(records: Iterable[Record]) -> str:
    """The sha256 of the text and roles of records in order; sources do not count."""
    digest = hashlib.sha256()
    for record in records:
        words = record.text if record.messages is None else record.messages
        digest.update(json.dumps(words, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class RecordWriter(LineFile[Record]):
    """Appends records to a JSONL file.

    Args:
        path: the file; it and its parents are created if missing.

    Raises:
        ValueError: another process writes to the file, or a line is bad.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, partial(_parse_jsonl, path=path))

    def append(self, record: Record) -> None:
        """Write one record and sync it to the disk.

        Raises:
            OSError: the disk is full; the file is unchanged.
        """
        self._append(record.to_dict(), record)


def _parse_jsonl(data: bytes, path: Path) -> list[Record]:
    return read_lines(
        data, lambda values, _: parse_record(values, source=path.name), name=str(path)
    )


def _known_source(values: Mapping[str, Any], source: str) -> str:
    own = values.get("source")
    return own if isinstance(own, str) and own else source


def _pair(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """A prompt and its answer, if any; either may be a list of messages."""
    prompt = values["prompt"]
    messages = (
        list(_messages(prompt, key="prompt"))
        if isinstance(prompt, list)
        else [{"role": "user", "content": check_text(prompt, "prompt")}]
    )
    for key in _ANSWERS:
        if isinstance(values.get(key), list):
            messages += _messages(values[key], key=key)
        elif key in values:
            messages.append({"role": "assistant", "content": check_text(values[key], key)})
    return tuple(messages)


def _messages(values: Any, *, key: str) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key!r} must be a list of messages, got {type(values).__name__}")
    messages = []
    for index, value in enumerate(values):
        where = f"{key}[{index}]"
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {type(value).__name__}")
        role = value.get("role", value.get("from"))
        role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"{where}: unknown role {role!r}")
        content = _content(value.get("content", value.get("value")), where)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _content(value: Any, where: str) -> str:
    """A message's text; parts of other types are refused."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError(f"{where}: only text can be trained on")
        value = "".join(texts)
    return check_text(value, where, allow_empty=True)
