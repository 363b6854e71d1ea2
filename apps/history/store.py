"""Conversations in a file: read, written while an answer streams, searched.

Messages form a tree: an edited question and a second answer stand beside the first.  A conversation
remembers the leaf of the branch that was shown last.  Text that streams in is appended in place, so
a kill loses what was not appended yet and nothing else.  Times are seconds since 1970.
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

MOST_TITLE = 200
MOST_TEXT = 1_000_000
MOST_OPTIONS = 64_000
MOST_FOUND = 200
STATES = ("streaming", "done", "length", "stopped", "interrupted", "failed")
_FIELDS = ("title", "system_prompt", "options", "leaf")
_SUMMARY = "id, title, created, updated"


class History:
    """A history file.  One thread at a time may use it.

    What an earlier process was writing when it died is marked "interrupted", unless another process
    has the file open and may be writing still.

    Args:
        path: the file; it is made where it is missing.

    Raises:
        ValueError: the file is no history, is damaged, or was written by a newer version.
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
        """Close the file; may be called twice."""
        if self._lock >= 0:
            self._db.close()
            os.close(self._lock)
            self._lock = -1

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing of what is done inside."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def conversations(self, search: str = "") -> list[Row]:
        """Summaries, the latest first; those whose title or text holds ``search``, if any.

        Returns:
            ``id``, ``title``, ``created``, ``updated`` and, where text was found, ``snippet``.
        """
        if not search.strip():
            return self._all(f"SELECT {_SUMMARY} FROM conversations ORDER BY updated DESC, id DESC")
        if "\0" in search:  # where SQLite takes a text to end
            return []
        found = self._found(search.strip())
        title = _like(search.strip())
        rows = self._all(
            f"SELECT {_SUMMARY}, title LIKE ? ESCAPE '\\' AS by_title FROM conversations "
            "ORDER BY updated DESC, id DESC",
            title,
        )
        hits = [row for row in rows if row["by_title"] or row["id"] in found]
        return [
            {name: row[name] for name in ("id", "title", "created", "updated")}
            | {"snippet": _snippet(found.get(row["id"], ""), search.strip())}
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
        """Begin a conversation; see ``conversation`` for what is returned."""
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
        """A conversation with all its messages, oldest first.

        Raises:
            KeyError: it is not there.
        """
        row = self._one("SELECT * FROM conversations WHERE id = ?", number)
        row["options"] = json.loads(row["options"])
        messages = self._all("SELECT * FROM messages WHERE conversation = ? ORDER BY id", number)
        return row | {"messages": [_message(each) for each in messages]}

    def update(self, number: int, values: Mapping[str, Any]) -> None:
        """Change ``title``, ``system_prompt``, ``options`` or ``leaf`` of a conversation.

        Raises:
            KeyError: it is not there.
            ValueError: a field is unknown or its value is wrong.
        """
        changed = _checked(values)
        self._one("SELECT id FROM conversations WHERE id = ?", number)
        if changed.get("leaf") is not None and self._home(changed["leaf"]) != number:
            raise ValueError(f"leaf {changed['leaf']} is not a message of conversation {number}")
        for name, value in changed.items():
            self._db.execute(f"UPDATE conversations SET {name} = ? WHERE id = ?", (value, number))

    def delete(self, number: int) -> None:
        """Delete a conversation and its messages.

        Raises:
            KeyError: it is not there.
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
        """Add a message behind ``parent``; it becomes the leaf that is shown.

        Raises:
            KeyError: the conversation is not there.
            ValueError: the parent is in another conversation, or the text is too long.
        """
        self._one("SELECT id FROM conversations WHERE id = ?", conversation)
        if parent is not None and self._home(parent) != conversation:
            raise ValueError(f"parent {parent} is not a message of conversation {conversation}")
        if role not in ("user", "assistant"):
            raise ValueError(f"role is {role!r}, not user or assistant")
        if state not in STATES:
            raise ValueError(f"state {state!r} is unknown")
        now = time.time() if created is None else created
        values = (conversation, parent, role, _text("text", text, MOST_TEXT), groups, state)
        cursor = self._db.execute(
            "INSERT INTO messages (conversation, parent, role, text, groups, state, stats, model, "
            "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, json.dumps(dict(stats or {})), model[:MOST_TITLE], now),
        )
        self._db.execute(
            "UPDATE conversations SET leaf = ?, updated = max(updated, ?) WHERE id = ?",
            (cursor.lastrowid, now, conversation),
        )
        return self.message(cursor.lastrowid or 0)

    def message(self, number: int) -> Row:
        """A message; ``groups`` is a list with one object for each step.

        Raises:
            KeyError: it is not there.
        """
        return _message(self._one("SELECT * FROM messages WHERE id = ?", number))

    def append(self, number: int, text: str, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append to a message that streams."""
        lines = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in groups)
        self._db.execute(
            "UPDATE messages SET text = text || ?, groups = groups || ? "
            "WHERE id = ? AND state = 'streaming'",
            (text, lines, number),
        )

    def finish(self, number: int, state: str, stats: Mapping[str, Any] | None = None) -> None:
        """End a message that streams: "done", "length", "stopped", "interrupted" or "failed"."""
        self._db.execute(
            "UPDATE messages SET state = ?, stats = ? WHERE id = ? AND state = 'streaming'",
            (state, json.dumps(dict(stats or {})), number),
        )

    def path(self, number: int) -> list[Row]:
        """The messages from the first one to this one.

        Raises:
            KeyError: it is not there.
        """
        rows = self._all(
            "WITH RECURSIVE up(id, parent, role, text, state, depth) AS ("
            "SELECT id, parent, role, text, state, 0 FROM messages WHERE id = ? UNION ALL "
            "SELECT m.id, m.parent, m.role, m.text, m.state, depth + 1 FROM messages m "
            "JOIN up ON m.id = up.parent) "
            "SELECT id, parent, role, text, state FROM up ORDER BY depth DESC",
            number,
        )
        if not rows:
            raise KeyError(number)
        return rows

    def settings(self) -> Row:
        """What the page remembers beside conversations."""
        return {
            row["name"]: json.loads(row["value"])
            for row in self._all("SELECT name, value FROM settings")
        }

    def remember(self, values: Mapping[str, Any]) -> None:
        """Set some of the settings.

        Raises:
            ValueError: they are too long.
        """
        for name, value in values.items():
            self._db.execute(
                "INSERT INTO settings VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (_text("name", name, MOST_TITLE), _json(name, value)),
            )

    def _found(self, search: str) -> dict[int, str]:
        """A text with ``search`` in it for each conversation that has one."""
        if self._has_index and len(search) >= 3:
            phrase = '"' + search.replace('"', '""') + '"'
            rows = self._all(
                "SELECT conversation, m.text FROM message_index i JOIN messages m ON m.id = i.rowid"
                f" WHERE message_index MATCH ? ORDER BY m.id DESC LIMIT {20 * MOST_FOUND}",
                phrase,
            )
        else:
            rows = self._all(
                "SELECT conversation, text FROM messages WHERE text LIKE ? ESCAPE '\\' "
                f"ORDER BY id DESC LIMIT {20 * MOST_FOUND}",
                _like(search),
            )
        return {row["conversation"]: row["text"] for row in rows}

    def _home(self, message: Any) -> int | None:
        """The conversation of a message."""
        rows = self._all("SELECT conversation FROM messages WHERE id = ?", message)
        return rows[0]["conversation"] if rows else None

    def _all(self, query: str, *values: Any) -> list[Row]:
        return [dict(row) for row in self._db.execute(query, values)]

    def _one(self, query: str, number: int) -> Row:
        rows = self._all(query, number)
        if not rows:
            raise KeyError(number)
        return rows[0]


def _message(row: Row) -> Row:
    groups = [json.loads(line) for line in row["groups"].splitlines()]
    return row | {"groups": groups, "stats": json.loads(row["stats"])}


def _checked(values: Mapping[str, Any]) -> Row:
    """Values of a conversation as the file takes them."""
    checked: Row = {}
    for name, value in values.items():
        match name:
            case "title":
                checked[name] = " ".join(_text(name, value, MOST_TEXT).split())[:MOST_TITLE]
            case "system_prompt":
                checked[name] = _text(name, value, MOST_TEXT)
            case "options" if isinstance(value, Mapping):
                checked[name] = _json(name, value)
            case "leaf" if value is None or type(value) is int:
                checked[name] = value
            case _ if name in _FIELDS:
                raise ValueError(f"{name} cannot be {str(value)[:40]!r}")
            case _:
                raise ValueError(f"a conversation has no {name[:40]!r}")
    return checked


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {str(value)[:40]!r}")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters, at most {most} are kept")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} is not Unicode")
    return value


def _json(name: str, value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{name} is not JSON") from None
    return _text(name, text, MOST_OPTIONS)


def _like(search: str) -> str:
    escaped = search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
    return f"%{escaped}%"


def _snippet(text: str, search: str, around: int = 40) -> str:
    """The words around what was found, in one line."""
    at = text.casefold().find(search.casefold())
    if at < 0:
        return " ".join(text.split())[: 2 * around]
    start = max(0, at - around)
    piece = " ".join(text[start : at + len(search) + around].split())
    return ("… " if start else "") + piece
