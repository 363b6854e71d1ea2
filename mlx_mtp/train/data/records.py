"""One piece of training text, and the JSONL files that hold many.

Four shapes of a line are read: ``{"messages": [{"role", "content"}]}``, ``{"conversations":
[{"from", "value"}]}``, ``{"prompt", "completion" or "response"}`` and ``{"text"}``.  A file is read
wholly or not at all: the first bad line raises ``ValueError`` with the file's name, the line's
number and the reason.

``RecordWriter`` appends.  A line is written whole or not at all, and what a crash left of a last
line is cut off before the next one is written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mlx_mtp.storage.files import append_line, lock_file

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
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """A conversation or a plain text, one of the two.

    Attributes:
        messages: ``{"role", "content"}`` each, or None.
        text: plain text, or None.
        source: where it is from, for messages to the user.
        meta: what else is known.  ``cut`` is true where the last answer stops for lack of room;
            ``given`` counts the characters of a text that the model did not write itself.
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
        asked = (message["content"] for message in self.messages if message["role"] == "user")
        return next(asked, "")

    @property
    def answers(self) -> list[str]:
        """What the assistant says, or the whole text."""
        if self.messages is None:
            return [self.text or ""]
        return [each["content"] for each in self.messages if each["role"] == "assistant"]

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
        ValueError: it has none of the four shapes, or holds no words.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
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
        return Record(text=_words(values["text"], "text"), **extra)
    raise ValueError(
        "expected one of the keys 'messages', 'conversations', 'prompt' and 'text', found "
        + (", ".join(repr(key) for key in list(values)[:5]) or "none")
    )


def read_jsonl(path: Path) -> list[Record]:
    """Read a file of one JSON object a line; blank lines are skipped.

    Raises:
        ValueError: a line is bad.
        OSError: the file cannot be read.
    """
    return [record for _, record in _numbered_records(path)]


def read_json(path: Path) -> list[Record]:
    """Read a file that holds a JSON list of objects, or else JSONL.

    Raises:
        ValueError: it is neither, or an entry is bad; the message names it.
        OSError: the file cannot be read.
    """
    if not path.read_bytes().removeprefix(_UTF8_BOM).lstrip().startswith(b"["):
        return read_jsonl(path)
    records = []
    for number, entry in enumerate(_json(path.read_bytes(), where=str(path)), start=1):
        try:
            records.append(parse_record(entry, source=path.name))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from None
    return records


def data_hash(records: Iterable[Record]) -> str:
    """The sha256 of what is trained on: words and roles in order, not where they came from."""
    digest = hashlib.sha256()
    for record in records:
        words = record.text if record.messages is None else record.messages
        digest.update(json.dumps(words, ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


class RecordWriter:
    """Appends records to a JSONL file that it holds alone.

    Args:
        path: the file; made with its parents when it is not there.

    Attributes:
        records: what the file holds.

    Raises:
        ValueError: another process writes the file, or a line in it is bad.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            lock_file(self._file, path=path)
            self._drop_torn_line()
            self.records = read_jsonl(path)
        except BaseException:
            os.close(self._file)
            raise

    def append(self, record: Record) -> None:
        """Write one line, to the disk and not only to the system's memory.

        Raises:
            OSError: there is no room; the file is as it was before.
        """
        append_line(self._file, record.to_dict(), path=self.path)
        self.records.append(record)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            os.ftruncate(self._file, data.rfind(b"\n") + 1)


def _numbered_records(path: Path) -> Iterator[tuple[int, Record]]:
    # Bytes are split at newlines alone: text may hold U+2028 and its like inside a string.
    lines = path.read_bytes().removeprefix(_UTF8_BOM).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        values = _json(line, where=where)
        try:
            yield number, parse_record(values, source=path.name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _json(data: bytes, *, where: str) -> Any:
    try:
        return json.loads(data.removeprefix(_UTF8_BOM).decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError):
        raise ValueError(f"{where}: JSON too deep, or with a number too long, to be read") from None


def _known_source(values: Mapping[str, Any], source: str) -> str:
    found = values.get("source")
    return found if isinstance(found, str) and found else source


def _pair(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """A prompt and, where there is one, its answer; either may be a list of messages."""
    asked = values["prompt"]
    messages = (
        list(_messages(asked, key="prompt"))
        if isinstance(asked, list)
        else [{"role": "user", "content": _words(asked, "prompt")}]
    )
    for key in _ANSWERS:
        if isinstance(values.get(key), list):
            messages += _messages(values[key], key=key)
        elif key in values:
            messages.append({"role": "assistant", "content": _words(values[key], key)})
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
    """A message's words; parts of other kinds than text are refused."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        found = [part.get("text") if isinstance(part, dict) else part for part in value]
        parts = [part for part in found if isinstance(part, str)]
        if len(parts) < len(found):
            raise ValueError(f"{where}: only text can be trained on")
        value = "".join(parts)
    return _words(value, where, empty=True)


def _words(value: Any, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where!r} must be a string, got {type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"{where!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where!r} holds half of a surrogate pair") from None
    return value
