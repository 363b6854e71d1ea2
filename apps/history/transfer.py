"""Conversations out of a history and back in: JSON keeps everything, Markdown is for reading."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from mlx_mtp.apps.history.store import MOST_TEXT, STATES, History, Row

FORMAT = "mlx-mtp conversations"
VERSION = 1
MOST_BYTES = 64 * 2**20
MOST_CONVERSATIONS = 10_000
MOST_MESSAGES = 200_000
_KEPT = ("role", "text", "groups", "state", "stats", "model", "created")
_MOST_DRAFTED = 1024  # in a step; the page makes a row for each
_LATEST = 2**40  # seconds; no clock of ours says more


def to_json(history: History, numbers: Sequence[int]) -> str:
    """Conversations as JSON text, with all branches; messages name their parents by position.

    Raises:
        KeyError: a conversation is not there.
    """
    found = [_exported(history.conversation(number)) for number in numbers]
    everything = {"format": FORMAT, "version": VERSION, "conversations": found}
    return json.dumps(everything, ensure_ascii=False, indent=1)


def to_markdown(history: History, number: int) -> str:
    """The branch that was shown last, to read.

    Raises:
        KeyError: the conversation is not there.
    """
    conversation = history.conversation(number)
    lines = [f"# {conversation['title'] or 'Untitled'}", ""]
    if conversation["system_prompt"]:
        lines += ["## System prompt", "", conversation["system_prompt"], ""]
    if conversation["leaf"] is not None:
        for message in history.path(conversation["leaf"]):
            head = "You" if message["role"] == "user" else "Assistant"
            lines += [f"## {head}", "", message["text"].rstrip(), ""]
    return "\n".join(lines)


def from_json(history: History, data: bytes) -> list[int]:
    """Add exported conversations to a history, all or none of them.

    Returns:
        The numbers they were given.

    Raises:
        ValueError: the file is too large, no such export, or damaged; the message says where.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"the file has {len(data)} bytes, at most {MOST_BYTES} are read")
    try:
        everything = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file is not JSON: {str(error)[:80]}") from None
    if not isinstance(everything, dict) or everything.get("format") != FORMAT:
        raise ValueError("the file is not an export of mlx-mtp conversations")
    if everything.get("version") != VERSION:
        raise ValueError(f"version {str(everything.get('version'))[:20]} of exports is unknown")
    conversations = everything.get("conversations")
    if not isinstance(conversations, list) or len(conversations) > MOST_CONVERSATIONS:
        raise ValueError(f"conversations must be a list of {MOST_CONVERSATIONS} at most")
    with history.transaction():
        return [_add(history, each, f"conversation {at + 1}") for at, each in _each(conversations)]


def _each(conversations: list[Any]) -> list[tuple[int, Any]]:
    messages = [each.get("messages") for each in conversations if isinstance(each, dict)]
    if sum(len(each) for each in messages if isinstance(each, list)) > MOST_MESSAGES:
        raise ValueError(f"the file has more than {MOST_MESSAGES} messages")
    return list(enumerate(conversations))


def _exported(conversation: Row) -> Row:
    places = {message["id"]: at for at, message in enumerate(conversation["messages"])}
    return {
        "title": conversation["title"],
        "system_prompt": conversation["system_prompt"],
        "options": conversation["options"],
        "created": conversation["created"],
        "leaf": places.get(conversation["leaf"]),
        "messages": [
            {"parent": places.get(message["parent"])} | {name: message[name] for name in _KEPT}
            for message in conversation["messages"]
        ],
    }


def _add(history: History, values: Any, where: str) -> int:
    """Add one conversation, message by message."""
    if not isinstance(values, dict) or not isinstance(values.get("messages"), list):
        raise ValueError(f"{where} is not a conversation")
    try:
        number = history.create(
            values.get("title", ""),
            system_prompt=values.get("system_prompt", ""),
            options=_mapping(values.get("options", {}), "options"),
            created=_seconds(values.get("created")),
        )["id"]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    added: list[int] = []
    for at, message in enumerate(values["messages"]):
        try:
            added.append(_add_message(history, number, message, added))
        except ValueError as error:
            raise ValueError(f"{where}, message {at + 1}: {error}") from None
    leaf = values.get("leaf")
    if type(leaf) is int and 0 <= leaf < len(added):
        history.update(number, {"leaf": added[leaf]})
    return number


def _add_message(history: History, number: int, values: Any, added: list[int]) -> int:
    if not isinstance(values, dict):
        raise ValueError("it is not a message")
    parent, state = values.get("parent"), values.get("state", "done")
    if parent is not None and not (type(parent) is int and 0 <= parent < len(added)):
        raise ValueError(f"its parent {str(parent)[:20]!r} does not come before it")
    if state not in STATES:
        raise ValueError(f"state {str(state)[:20]!r} is unknown")
    return history.add(
        number,
        None if parent is None else added[parent],
        values.get("role", ""),
        values.get("text", ""),
        state="interrupted" if state == "streaming" else state,
        groups=_group_lines(values.get("groups", [])),
        stats=_plain(_mapping(values.get("stats", {}), "stats")),
        model=str(values.get("model", "")),
        created=_seconds(values.get("created")),
    )["id"]


def _group_lines(groups: Any) -> str:
    """Steps as the file keeps them; of a foreign shape they are left out, the text is what counts.

    The page reads these values as numbers and text, so nothing else may come in.
    """
    if not isinstance(groups, list):
        return ""
    lines = []
    for each in groups:
        if not _is_group(each):
            return ""
        kept = {name: each[name] for name in ("tokens", "accepted", "drafted", "source", "ms")}
        lines.append(json.dumps(kept, separators=(",", ":"), allow_nan=False) + "\n")
    text = "".join(lines)
    return text if len(text) <= 8 * MOST_TEXT else ""


def _is_group(each: Any) -> bool:
    return (
        isinstance(each, dict)
        and isinstance(each.get("tokens"), list)
        and all(isinstance(token, str) for token in each["tokens"])
        and all(type(each.get(name)) is int for name in ("accepted", "drafted"))
        and 0 <= each["accepted"] <= each["drafted"] <= _MOST_DRAFTED
        and isinstance(each.get("source"), str)
        and type(each.get("ms")) in (int, float)
        and math.isfinite(each["ms"])
    )


def _mapping(value: Any, name: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {str(value)[:40]!r}")
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"{name} holds a number that is not finite") from None
    if len(text) > MOST_TEXT:
        raise ValueError(f"{name} is too long")
    return value


def _plain(values: Row) -> Row:
    """Only numbers and text, which is all that stats hold."""
    return {
        name: value for name, value in values.items() if isinstance(value, str | int | float | None)
    }


def _seconds(value: Any) -> float:
    """A time, or now where it is none."""
    good = type(value) in (int, float) and 0 <= value <= _LATEST
    return float(value) if good else time.time()
