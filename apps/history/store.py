"""Conversations in a file: created, changed, searched, and saved while an answer streams.

Messages form a tree: an edited question or a second answer is a sibling of the first.  A
conversation stores the leaf of the branch that was shown last.  Streamed text is appended in place,
so a kill loses only text that was not appended yet.  Times are seconds since 1970.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mtp.apps.history.schema import connect, has_index
from mlx_mtp.storage.files import lock_file

Row = dict[str, Any]

MAX_TITLE = 200
MAX_TEXT = 1_000_000
MAX_OPTIONS = 64_000
MAX_FOUND = 200
STATES = ("streaming", "done", "length", "stopped", "interrupted", "failed")
_FIELDS = ("title", "system_prompt", "options", "leaf")
_SUMMARY = "id, title, created, updated"


class History:
    """A history file.  Only one thread at a time may use it.

    Messages that an earlier process was streaming when it died are marked "interrupted", unless
    another process has the file open and may still be writing.

    Args:
        path: the history file; it is created if it is missing.

    Raises:
        ValueError: the file is not a history, is damaged, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self._db = connect(path)
        self._has_index = has_index(self._db)
        lock = path.with_name(path.name + ".lock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        with contextlib.suppress(ValueError):
            lock_file(self._lock, path=lock)
            self._db.execute("UPDATE messages SET state='interrupted' WHERE state='streaming'")

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        if self._lock >= 0:
            self._db.close()
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Apply all changes inside the block, or none of them."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def conversations(self, search: str = "") -> list[Row]:
        """Return summaries, the latest first, of conversations with ``search`` in title or text.

        Returns:
            ``id``, ``title``, ``created``, ``updated`` and, for a search, ``snippet``.
        """
        if not search.strip():
            return self._all(f"SELECT {_SUMMARY} FROM conversations ORDER BY updated DESC, id DESC")
        if "\0" in search:  # SQLite ends a text there
            return []
        texts = self._matching_texts(search.strip())
        title = _like(search.strip())
        rows = self._all(
            f"SELECT {_SUMMARY}, title LIKE ? ESCAPE '\\' AS by_title FROM conversations "
            "ORDER BY updated DESC, id DESC",
            title,
        )
        hits = [row for row in rows if row["by_title"] or row["id"] in texts]
        return [
            {name: row[name] for name in ("id", "title", "created", "updated")}
            | {"snippet": _snippet(texts.get(row["id"], ""), search.strip())}
            for row in hits
        ]

    def create(
        self,
        title: str = "",
        *,
        system_prompt: str = "",
        options: Mapping[str, Any] | None = None,
        created: float | None = None,
    ) -> Row:
        """Create a conversation; returns it as ``conversation`` does."""
        now = time.time() if created is None else created
        values = _checked(
            {"title": title, "system_prompt": system_prompt, "options": dict(options or {})}
        )
        cursor = self._db.execute(
            "INSERT INTO conversations (title, system_prompt, options, created, updated) "
            "VALUES (?, ?, ?, ?, ?)",
            (*values.values(), now, now),
        )
        return self.conversation(cursor.lastrowid or 0)

    def conversation(self, number: int) -> Row:
        """Return a conversation with all its messages, oldest first.

        Raises:
            KeyError: there is no such conversation.
        """
        row = self._one("SELECT * FROM conversations WHERE id = ?", number)
        row["options"] = json.loads(row["options"])
        messages = self._all("SELECT * FROM messages WHERE conversation = ? ORDER BY id", number)
        return row | {"messages": [_message(message) for message in messages]}

    def update(self, number: int, values: Mapping[str, Any]) -> None:
        """Change ``title``, ``system_prompt``, ``options`` or ``leaf`` of a conversation.

        Raises:
            KeyError: there is no such conversation.
            ValueError: a field is unknown or its value is invalid.
        """
        changed = _checked(values)
        self._one("SELECT id FROM conversations WHERE id = ?", number)
        if changed.get("leaf") is not None and self._conversation_of(changed["leaf"]) != number:
            raise ValueError(f"leaf {changed['leaf']} is not a message of conversation {number}")
        for name, value in changed.items():
            self._db.execute(f"UPDATE conversations SET {name} = ? WHERE id = ?", (value, number))

    def delete(self, number: int) -> None:
        """Delete a conversation and its messages.

        Raises:
            KeyError: there is no such conversation.
        """
        if not self._db.execute("DELETE FROM conversations WHERE id = ?", (number,)).rowcount:
            raise KeyError(number)

    def add(
        self,
        conversation: int,
        parent: int | None,
        role: str,
        text: str = "",
        *,
        state: str = "done",
        groups: str = "",
        stats: Mapping[str, Any] | None = None,
        model: str = "",
        created: float | None = None,
    ) -> Row:
        """Add a message after ``parent``; it becomes the leaf that is shown.

        Raises:
            KeyError: there is no such conversation.
            ValueError: the parent is in another conversation, or the text is too long.
        """
        self._one("SELECT id FROM conversations WHERE id = ?", conversation)
        if parent is not None and self._conversation_of(parent) != conversation:
            raise ValueError(f"parent {parent} is not a message of conversation {conversation}")
        if role not in ("user", "assistant"):
            raise ValueError(f"role must be 'user' or 'assistant', got {role!r}")
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        now = time.time() if created is None else created
        values = (conversation, parent, role, _text("text", text, MAX_TEXT), groups, state)
        cursor = self._db.execute(
            "INSERT INTO messages (conversation, parent, role, text, groups, state, stats, model, "
            "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, json.dumps(dict(stats or {})), model[:MAX_TITLE], now),
        )
        self._db.execute(
            "UPDATE conversations SET leaf = ?, updated = max(updated, ?) WHERE id = ?",
            (cursor.lastrowid, now, conversation),
        )
        return self.message(cursor.lastrowid or 0)

    def message(self, number: int) -> Row:
        """Return a message; ``groups`` is a list with one object per step.

        Raises:
            KeyError: there is no such message.
        """
        return _message(self._one("SELECT * FROM messages WHERE id = ?", number))

    def append(self, number: int, text: str, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append to a streaming message."""
        lines = "".join(json.dumps(group, separators=(",", ":")) + "\n" for group in groups)
        self._db.execute(
            "UPDATE messages SET text = text || ?, groups = groups || ? "
            "WHERE id = ? AND state = 'streaming'",
            (text, lines, number),
        )

    def finish(self, number: int, state: str, stats: Mapping[str, Any] | None = None) -> None:
        """End a streaming message: "done", "length", "stopped", "interrupted" or "failed"."""
        self._db.execute(
            "UPDATE messages SET state = ?, stats = ? WHERE id = ? AND state = 'streaming'",
            (state, json.dumps(dict(stats or {})), number),
        )

    def path(self, number: int) -> list[Row]:
        """Return the messages from the first one to this one.

        Raises:
            KeyError: there is no such message.
        """
        rows = self._all(
            "WITH RECURSIVE up(id, parent, role, text, state, groups, depth) AS ("
            "SELECT id, parent, role, text, state, groups, 0 FROM messages WHERE id = ? UNION ALL "
            "SELECT m.id, m.parent, m.role, m.text, m.state, m.groups, depth + 1 FROM messages m "
            "JOIN up ON m.id = up.parent) "
            "SELECT id, parent, role, text, state, groups FROM up ORDER BY depth DESC",
            number,
        )
        if not rows:
            raise KeyError(number)
        return [row | {"groups": _groups(row)} for row in rows]

    def settings(self) -> Row:
        """Return the settings of the page."""
        return {
            row["name"]: json.loads(row["value"])
            for row in self._all("SELECT name, value FROM settings")
        }

    def remember(self, values: Mapping[str, Any]) -> None:
        """Save some settings of the page.

        Raises:
            ValueError: a value is too long or not JSON.
        """
        for name, value in values.items():
            self._db.execute(
                "INSERT INTO settings VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (_text("name", name, MAX_TITLE), _json(name, value)),
            )

    def _matching_texts(self, search: str) -> dict[int, str]:
        """Return one message text that contains ``search`` per conversation that has one."""
        if self._has_index and len(search) >= 3:
            phrase = '"' + search.replace('"', '""') + '"'
            rows = self._all(
                "SELECT conversation, m.text FROM message_index i JOIN messages m ON m.id = i.rowid"
                f" WHERE message_index MATCH ? ORDER BY m.id DESC LIMIT {20 * MAX_FOUND}",
                phrase,
            )
        else:
            rows = self._all(
                "SELECT conversation, text FROM messages WHERE text LIKE ? ESCAPE '\\' "
                f"ORDER BY id DESC LIMIT {20 * MAX_FOUND}",
                _like(search),
            )
        return {row["conversation"]: row["text"] for row in rows}

    def _conversation_of(self, message: Any) -> int | None:
        """Return the conversation of a message."""
        rows = self._all("SELECT conversation FROM messages WHERE id = ?", message)
        return rows[0]["conversation"] if rows else None

    def _all(self, query: str, *values: Any) -> list[Row]:
        return [dict(row) for row in self._db.execute(query, values)]

    def _one(self, query: str, number: int) -> Row:
        rows = self._all(query, number)
        if not rows:
            raise KeyError(number)
        return rows[0]


def split_reasoning(message: Row) -> tuple[str, str]:
    """Return the reasoning in a message's text, and the text without it and its marks."""
    text = message["text"]
    spans = [group["span"] for group in message.get("groups", ()) if "span" in group]
    if not spans:
        return "", text
    opening, inner, *closed = spans[-1]
    end, after = closed or (len(text), len(text))
    return text[inner:end], (text[:opening].lstrip() and text[:opening]) + text[after:]


def _message(row: Row) -> Row:
    return row | {"groups": _groups(row), "stats": json.loads(row["stats"])}


def _groups(row: Row) -> list[Row]:
    return [json.loads(line) for line in row["groups"].splitlines()]


def _checked(values: Mapping[str, Any]) -> Row:
    """Validate values of a conversation and convert them to columns."""
    checked: Row = {}
    for name, value in values.items():
        match name:
            case "title":
                checked[name] = " ".join(_text(name, value, MAX_TEXT).split())[:MAX_TITLE]
            case "system_prompt":
                checked[name] = _text(name, value, MAX_TEXT)
            case "options" if isinstance(value, Mapping):
                checked[name] = _json(name, value)
            case "leaf" if value is None or type(value) is int:
                checked[name] = value
            case _ if name in _FIELDS:
                raise ValueError(f"invalid value for {name}: {str(value)[:40]!r}")
            case _:
                raise ValueError(f"unknown field {name[:40]!r}")
    return checked


def _text(name: str, value: Any, max_length: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {str(value)[:40]!r}")
    if len(value) > max_length:
        raise ValueError(f"{name} has {len(value)} characters; the maximum is {max_length}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name} is not valid Unicode")
    return value


def _json(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{name} is not valid JSON") from None
    return _text(name, text, MAX_OPTIONS)


def _like(search: str) -> str:
    escaped = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _snippet(text: str, search: str, around: int = 40) -> str:
    """Return the text around the first match, in one line."""
    index = text.casefold().find(search.casefold())
    if index < 0:
        return " ".join(text.split())[: 2 * around]
    start = max(0, index - around)
    piece = " ".join(text[start : index + len(search) + around].split())
    return ("… " if start else "") + piece
