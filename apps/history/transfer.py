"""Export and import of conversations: JSON is complete, Markdown is for reading."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from mlx_mtp.apps.history.store import MAX_TEXT, STATES, History, Row, split_reasoning

FORMAT = "mlx-mtp conversations"
VERSION = 1
MAX_BYTES = 64 * 2**20
MAX_CONVERSATIONS = 10_000
MAX_MESSAGES = 200_000
_FIELDS = ("role", "text", "groups", "state", "stats", "model", "created")
_MAX_DRAFTED = 1024  # per step; the page shows a row per draft position
_MAX_TIME = 2**40  # seconds


def to_json(history: History, numbers: Sequence[int]) -> str:
    """Return conversations as JSON text, with all branches; a parent is an index into the messages.

    Raises:
        KeyError: a conversation does not exist.
    """
    conversations = [_exported(history.conversation(number)) for number in numbers]
    export = {"format": FORMAT, "version": VERSION, "conversations": conversations}
    return json.dumps(export, ensure_ascii=False, indent=1)


def to_markdown(history: History, number: int) -> str:
    """Return the branch that was shown last as Markdown.

    Raises:
        KeyError: the conversation does not exist.
    """
    conversation = history.conversation(number)
    lines = [f"# {conversation['title'] or 'Untitled'}", ""]
    if conversation["system_prompt"]:
        lines += ["## System prompt", "", conversation["system_prompt"], ""]
    if conversation["leaf"] is not None:
        for message in history.path(conversation["leaf"]):
            head = "You" if message["role"] == "user" else "Assistant"
            reasoning, text = split_reasoning(message)
            lines += [f"## {head}", ""]
            if reasoning:
                summary = "<details><summary>Reasoning</summary>"
                lines += [summary, "", reasoning, "", "</details>", ""]
            lines += [text.rstrip(), ""]
    return "\n".join(lines)


def from_json(history: History, data: bytes) -> list[int]:
    """Import exported conversations, all or none of them.

    Returns:
        The ids of the new conversations.

    Raises:
        ValueError: the file is too large, not an export, or damaged; the message names the place.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"the file has {len(data)} bytes; the maximum is {MAX_BYTES}")
    try:
        export = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the file is not valid JSON: {str(error)[:80]}") from None
    if not isinstance(export, dict) or export.get("format") != FORMAT:
        raise ValueError("the file is not an export of mlx-mtp conversations")
    if export.get("version") != VERSION:
        raise ValueError(f"unsupported export version {str(export.get('version'))[:20]}")
    conversations = export.get("conversations")
    if not isinstance(conversations, list) or len(conversations) > MAX_CONVERSATIONS:
        raise ValueError(f"conversations must be a list of at most {MAX_CONVERSATIONS} items")
    _check_message_count(conversations)
    with history.transaction():
        return [
            _add(history, conversation, f"conversation {number}")
            for number, conversation in enumerate(conversations, 1)
        ]


def _check_message_count(conversations: list[Any]) -> None:
    lists = [item.get("messages") for item in conversations if isinstance(item, dict)]
    if sum(len(messages) for messages in lists if isinstance(messages, list)) > MAX_MESSAGES:
        raise ValueError(f"the file has more than {MAX_MESSAGES} messages")


def _exported(conversation: Row) -> Row:
    positions = {message["id"]: index for index, message in enumerate(conversation["messages"])}
    return {
        "title": conversation["title"],
        "system_prompt": conversation["system_prompt"],
        "options": conversation["options"],
        "created": conversation["created"],
        "leaf": positions.get(conversation["leaf"]),
        "messages": [
            {"parent": positions.get(message["parent"])} | {name: message[name] for name in _FIELDS}
            for message in conversation["messages"]
        ],
    }


def _add(history: History, values: Any, where: str) -> int:
    """Import one conversation."""
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
    for position, message in enumerate(values["messages"], 1):
        try:
            added.append(_add_message(history, number, message, added))
        except ValueError as error:
            raise ValueError(f"{where}, message {position}: {error}") from None
    leaf = values.get("leaf")
    if type(leaf) is int and 0 <= leaf < len(added):
        history.update(number, {"leaf": added[leaf]})
    return number


def _add_message(history: History, number: int, values: Any, added: list[int]) -> int:
    if not isinstance(values, dict):
        raise ValueError("not a message")
    parent, state = values.get("parent"), values.get("state", "done")
    if parent is not None and not (type(parent) is int and 0 <= parent < len(added)):
        raise ValueError(f"parent {str(parent)[:20]!r} is not an earlier message")
    if state not in STATES:
        raise ValueError(f"unknown state {str(state)[:20]!r}")
    return history.add(
        number,
        None if parent is None else added[parent],
        values.get("role", ""),
        values.get("text", ""),
        state="interrupted" if state == "streaming" else state,
        groups=_group_lines(values.get("groups", [])),
        stats=_scalars(_mapping(values.get("stats", {}), "stats")),
        model=str(values.get("model", "")),
        created=_seconds(values.get("created")),
    )["id"]


def _group_lines(groups: Any) -> str:
    """Return steps as stored in the history, or "" if any of them is invalid; the text is kept.

    The page uses these values as numbers and text, so nothing else may be imported.
    """
    if not isinstance(groups, list):
        return ""
    lines = []
    for group in groups:
        if not _is_group(group):
            return ""
        names = ("tokens", "accepted", "drafted", "source", "ms", "span")
        fields = {name: group[name] for name in names if name in group}
        lines.append(json.dumps(fields, separators=(",", ":"), allow_nan=False) + "\n")
    text = "".join(lines)
    return text if len(text) <= 8 * MAX_TEXT else ""


def _is_group(group: Any) -> bool:
    return (
        isinstance(group, dict)
        and isinstance(group.get("tokens"), list)
        and all(isinstance(token, str) for token in group["tokens"])
        and all(type(group.get(name)) is int for name in ("accepted", "drafted"))
        and 0 <= group["accepted"] <= group["drafted"] <= _MAX_DRAFTED
        and isinstance(group.get("source"), str)
        and type(group.get("ms")) in (int, float)
        and math.isfinite(group["ms"])
        and _is_span(group.get("span", [0, 0]))
    )


def _is_span(span: Any) -> bool:
    """Whether a value is the place of reasoning in a text: two or four ascending offsets."""
    return (
        isinstance(span, list)
        and len(span) in (2, 4)
        and all(type(offset) is int for offset in span)
        and span[0] >= 0
        and span == sorted(span)
    )


def _mapping(value: Any, name: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {str(value)[:40]!r}")
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(f"{name} contains a number that is not finite") from None
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name} is too long")
    return value


def _scalars(values: Row) -> Row:
    """Keep only numbers and strings."""
    return {
        name: value for name, value in values.items() if isinstance(value, str | int | float | None)
    }


def _seconds(value: Any) -> float:
    """Return a valid time unchanged, and the current time for any other value."""
    valid = type(value) in (int, float) and 0 <= value <= _MAX_TIME
    return float(value) if valid else time.time()
