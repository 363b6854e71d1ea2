"""Reasoning in requests and replies: what the APIs share."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, Literal

from mlx_mtp.apps.engine.batch import group_details
from mlx_mtp.apps.engine.protocol import Group
from mlx_mtp.apps.server.api.jobs import ServerContext

_SEAL = "mlx-mtp:"

Kind = Literal["reasoning", "text"]
Delta = tuple[Kind, str, dict[str, Any]]


def reasoning_fields(
    context: ServerContext,
    *,
    enable: bool | None = None,
    effort: str | None = None,
    budget: int | None = None,
    format: str | None = None,
) -> dict[str, Any]:
    """Return the fields of ``Job`` for reasoning; absent values have the operator's defaults.

    Args:
        context: of the server; logs once if the model has no reasoning that could be set.
        enable: whether the model is to reason.
        effort: "none", "low", "high", ...
        budget: maximum number of tokens of reasoning; negative for no limit.
        format: "none" leaves the reasoning in the text.
    """
    settings = context.settings
    is_set = any(value is not None for value in (enable, effort, budget))
    if is_set and not context.info.has_reasoning:
        context.hints.note("the model has no marks of reasoning: its settings have no effect")
    if budget is None and effort is None:
        budget = settings.thinking_budget
    return {
        "enable_thinking": enable,
        "reasoning_effort": effort,
        "thinking_budget": None if budget is None or budget < 0 else budget,
        "split_reasoning": (format or settings.reasoning_format) != "none",
    }


def sealed(text: str) -> str:
    """Return reasoning as ``encrypted_content`` or ``signature``: encoded, not encrypted."""
    return _SEAL + base64.b64encode(text.encode()).decode()


def unsealed(content: Any) -> str:
    """Return the text of what ``sealed`` returned, or "" if another server wrote it."""
    if not isinstance(content, str) or not content.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEAL), validate=True).decode()
    except ValueError:
        return ""


class Deltas:
    """Turns the steps of an answer into pieces of reasoning and of text.

    Args:
        details: whether every step is reported, also those without text.
    """

    def __init__(self, *, details: bool) -> None:
        self._details = details
        self._kind: Kind | None = None
        self._waiting: list[dict[str, Any]] = []  # steps before the first text

    def of(self, message: Group) -> Iterator[Delta]:
        """Yield kind, text and further fields of the events of a step."""
        if self._details:
            self._waiting.append({"mtp": group_details(message)})
        texts: list[tuple[Kind, str]] = [("reasoning", message.reasoning), ("text", message.text)]
        for kind, text in texts:
            if text:
                yield from self._events(kind, text)
        if self._kind is not None and self._waiting:
            yield from self._events(self._kind, "")

    def finish(self) -> Iterator[Delta]:
        """Yield the steps of an answer without any text."""
        if self._waiting:
            yield from self._events("text", "")

    def _events(self, kind: Kind, text: str) -> Iterator[Delta]:
        self._kind = kind
        *earlier, last = self._waiting or [{}]
        self._waiting = []
        for step in earlier:
            yield kind, "", step
        yield kind, text, last
