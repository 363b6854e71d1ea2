"""Reasoning models: where the reasoning is in an answer.

A reasoning model writes its reasoning between two marks, such as ``<think>`` and ``</think>``, and
then the answer.  Some chat templates end the prompt with the opening mark, so that the answer
begins inside the reasoning, or with an empty pair, so that there is none.

``ReasoningParser`` splits the text of an answer.  ``ReasoningTracker`` finds the same places in the
ids, for logits processors.

Only the first reasoning of an answer counts, and it ends with the first closing mark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx

Phase = Literal["before", "inside", "after"]
Span = tuple[int, int] | tuple[int, int, int, int]

# In addition to those that mlx-lm's tokenizer wrapper knows.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
EFFORT_BUDGETS = {"none": 0, "minimal": 128, "low": 1024, "medium": 4096}
"""Budgets of efforts where the chat template has no variable for them; the others have no limit."""
_QUOTES = "`\"'"
_MARGIN = 8  # more ids than a mark has bytes; for white space and the letter before the mark


class Parts(NamedTuple):
    """A piece of an answer: text of the reasoning, and text of the answer proper."""

    reasoning: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """The marks of an answer's reasoning.

    Attributes:
        start: the opening mark.
        end: the closing mark.
        phase: where the answer begins: "before" the reasoning, "inside" it, or "after" it.
        anywhere: whether text may come before the opening mark.
    """

    start: str
    end: str
    phase: Phase = "before"
    anywhere: bool = True

    @property
    def window(self) -> int:
        """Number of ids that are certain to contain a mark that has just been completed."""
        return max(len(self.start.encode()), len(self.end.encode())) + _MARGIN

    @classmethod
    def of(cls, tokenizer: Any, ids: Sequence[int], *, prefill: str = "") -> Reasoning | None:
        """Find the marks of a model, and where the answer to a prompt begins.

        Args:
            tokenizer: from ``load``.
            ids: the whole prompt.
            prefill: text at the end of the prompt that is the beginning of the answer.

        Returns:
            None if the model has no marks.
        """
        marks = reasoning_marks(tokenizer)
        if marks is None:
            return None
        reasoning = cls(start=marks[0], end=marks[1])
        tail = _decoded(tokenizer, list(ids)[-reasoning.window :]).rstrip()
        phase: Phase = "before"
        if tail.endswith(reasoning.start):
            phase = "inside"
        elif tail.endswith(reasoning.end):
            phase = "after"
        elif prefill.strip():
            parser = ReasoningParser(reasoning)
            parser.push(prefill)
            phase = "inside" if parser.phase == "inside" else "after"
        return replace(reasoning, phase=phase)


def reasoning_marks(tokenizer: Any) -> tuple[str, str] | None:
    """Return the opening and the closing mark of a model, or None if it has none.

    They are mlx-lm's or a known pair: one that the chat template names, which may be by one of its
    marks, or one that is in the vocabulary.
    """
    start, end = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
    pairs = [(start, end), *MARKS] if start and end else list(MARKS)
    template = template_text(tokenizer)
    for marks in pairs:
        if any(mark in template for mark in marks):
            return marks
    for marks in pairs:
        if all(_token_of(tokenizer, mark) is not None for mark in marks):
            return marks
    return (start, end) if start and end else None


def mark_ids(tokenizer: Any, mark: str) -> list[int]:
    """Encode a mark."""
    token = _token_of(tokenizer, mark)
    return tokenizer.encode(mark, add_special_tokens=False) if token is None else [token]


def _token_of(tokenizer: Any, mark: str) -> int | None:
    """The id of a mark that is a single token."""
    token = tokenizer.convert_tokens_to_ids(mark)
    return None if token == getattr(tokenizer, "unk_token_id", None) else token


def template_text(tokenizer: Any) -> str:
    """Return the source of the chat template; "" if it is not a Jinja template."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""


def template_settings(
    tokenizer: Any,
    *,
    enable: bool | None = None,
    effort: str | None = None,
    budget: int | None = None,
) -> tuple[dict[str, Any], int | None]:
    """Turn the settings of a request into arguments of the chat template and a budget.

    Args:
        tokenizer: from ``load``.
        enable: whether the model is to reason; None is the template's default.
        effort: one of ``EFFORTS``.
        budget: maximum number of tokens of reasoning.

    Returns:
        Arguments of the template, and the budget: that of the effort if the template has no
        variable for it, and 0 if the model is not to reason.
    """
    template = template_text(tokenizer)
    names = {name for name in _VARIABLES if re.search(rf"\b{name}\b", template)}
    settings: dict[str, Any] = {}
    if effort == "none":
        enable = False
    elif effort is not None and "reasoning_effort" in names:
        settings["reasoning_effort"] = effort
    elif effort is not None and budget is None:
        budget = EFFORT_BUDGETS.get(effort)
    if enable is not None:
        settings["enable_thinking"] = enable
        if "thinking" in names and "enable_thinking" not in names:
            settings["thinking"] = enable
        budget = budget if enable else 0
    if budget is not None and "thinking_budget" in names:
        settings["thinking_budget"] = budget
    return settings, budget


_VARIABLES = ("enable_thinking", "thinking", "reasoning_effort", "thinking_budget")


def split_reasoning(reasoning: Reasoning | None, text: str) -> Parts:
    """Split the whole text of an answer."""
    if reasoning is None:
        return Parts("", text)
    parser = ReasoningParser(reasoning)
    first, last = parser.push(text), parser.finish()
    return Parts(first.reasoning + last.reasoning, first.content + last.content)


class ReasoningParser:
    """Splits the text of an answer while it arrives.

    Line breaks next to the marks are left out, and so are the marks.  How the text is cut into
    pieces makes no difference.  An opening mark after a quotation mark or a backtick is a mention
    of it and not the beginning of the reasoning.

    Args:
        reasoning: the marks.

    Attributes:
        phase: where the text read so far ends.
        span: offsets in the whole text, None without reasoning: where the opening mark begins and
            where the reasoning begins, and once it is closed, where it ends and where the answer
            proper begins.
    """

    def __init__(self, reasoning: Reasoning) -> None:
        self.phase: Phase = reasoning.phase
        self.span: Span | None = (0, 0) if self.phase == "inside" else None
        self._marks = reasoning
        self._pending = ""
        self._offset = 0  # of the pending text
        self._previous = ""  # the letter before the pending text
        self._is_blank = True  # nothing has been released in this phase
        self._pushes: list[int] = []  # offsets of the pieces that may be reasoning

    @property
    def num_tokens(self) -> int:
        """Number of pieces inside the reasoning, if every token is pushed as one piece."""
        return len(self._pushes) if self.span else 0

    def push(self, text: str) -> Parts:
        """Add a piece of text; return what is certain now."""
        if self.phase != "after":
            self._pushes.append(self._offset + len(self._pending))
        self._pending += text
        reasoning = content = ""
        while True:
            phase = self.phase
            if phase == "inside":
                reasoning += self._read_inside()
            else:
                content += self._read_before() if phase == "before" else self._read_after()
            if self.phase == phase:
                return Parts(reasoning, content)

    def finish(self) -> Parts:
        """Return the pending text."""
        if self.span is not None and self._is_blank:
            self._skip_break()
        rest = self._take(len(self._pending))
        return Parts(rest, "") if self.phase == "inside" else Parts("", rest)

    def _read_before(self) -> str:
        """Release text up to the opening mark or what may become one."""
        text, mark = self._pending, self._marks.start
        kept = text.lstrip()
        if self._is_blank and mark.startswith(kept) and kept != mark:
            return ""
        if not self._marks.anywhere and not kept.startswith(mark):
            self._enter("after")
            return ""
        start = find_opening(text, mark, previous=self._previous)
        if start < 0:
            return self._take(len(text) - open_suffix(text, mark))
        is_first = self._is_blank and not text[:start].strip()
        released = self._take(start)
        self.span = (self._offset, self._offset + len(mark))
        self._take(len(mark))
        self._pushes = [self._offset] if self._pending else []
        self._enter("inside")
        return "" if is_first else released

    def _read_inside(self) -> str:
        """Release text up to the closing mark or what may become one."""
        start, end = self._marks.start, self._marks.end
        if self._is_blank:
            kept = self._pending.lstrip()
            if start.startswith(kept) and kept != start:
                return ""
            if kept.startswith(start):  # the prompt ends with one, and the model repeats it
                self._take(len(self._pending) - len(kept) + len(start))
                self._is_blank = True
                return self._read_inside()
            self._skip_break()
        found = self._pending.find(end)
        cut = found if found >= 0 else len(self._pending) - open_suffix(self._pending, end)
        kept = self._pending[:cut].rstrip()
        if found < 0:
            return self._take(len(kept))
        spaces = re.split(r"[\r\n]", self._pending[len(kept) : found], maxsplit=1)[0]
        released = self._take(len(kept + spaces))
        closing = self._offset + self._pending.index(end)
        assert self.span is not None
        self.span = (*self.span[:2], self._offset, closing + len(end))
        self._pushes = [push for push in self._pushes if push < closing]
        self._take(closing + len(end) - self._offset)
        self._enter("after")
        return released

    def _read_after(self) -> str:
        """Release all text, except line breaks directly after the closing mark."""
        if self.span is not None and self._is_blank:
            if not self._pending.strip():
                return ""
            self._skip_break()
        return self._take(len(self._pending))

    def _enter(self, phase: Phase) -> None:
        self.phase, self._is_blank = phase, True

    def _skip_break(self) -> None:
        """Leave out the pending text up to the last line break before the first letter."""
        assert self.span is not None
        kept = self._pending.lstrip()
        blank = self._pending[: len(self._pending) - len(kept)]
        closes = self.phase == "inside" and kept.startswith(self._marks.end)
        self._take(len(blank) if closes or not kept else blank.rfind("\n") + 1)
        self.span = (*self.span[:-1], self._offset)  # type: ignore[assignment]

    def _take(self, count: int) -> str:
        """Remove text from the beginning of the pending text."""
        taken, self._pending = self._pending[:count], self._pending[count:]
        self._offset += count
        self._previous = taken[-1:] or self._previous
        self._is_blank = self._is_blank and not taken.strip()
        return taken


class ReasoningTracker:
    """Finds in the ids of an answer what ``ReasoningParser`` finds in its text.

    It follows the ids forwards and backwards, as drafts are verified and rejected.

    Args:
        tokenizer: from ``load``.
        reasoning: the marks.
        num_prompt: number of ids of the prompt, which every context starts with.
    """

    def __init__(self, tokenizer: Any, reasoning: Reasoning, *, num_prompt: int) -> None:
        self.reasoning = reasoning
        self.num_prompt = num_prompt
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._states: list[tuple[Phase, int]] = [(reasoning.phase, 0)]

    def at(self, tokens: mx.array) -> tuple[Phase, int]:
        """Return the phase after these ids ``[n]``, and at which id of the answer it began."""
        answer: Any = tokens[self.num_prompt :].tolist()
        same = min(len(answer), len(self._ids))
        while answer[:same] != self._ids[:same]:
            same -= 1
        self._ids = answer
        del self._states[same + 1 :]
        for count in range(same + 1, len(answer) + 1):
            self._states.append(self._after(count))
        return self._states[-1]

    def unclosed(self) -> str:
        """Return the part of the closing mark that is missing at the end of the ids, if any."""
        since = self._states[-1][1]
        ids = self._ids[max(since, len(self._ids) - self.reasoning.window) :]
        end = self.reasoning.end
        return end[open_suffix(_decoded(self._tokenizer, ids), end) :]

    def _after(self, count: int) -> tuple[Phase, int]:
        """The state after so many ids, by that before the last of them."""
        phase, since = self._states[-1]
        marks = self.reasoning
        if phase == "after":
            return phase, since
        text = _decoded(self._tokenizer, self._ids[max(since, count - marks.window) : count])
        if phase == "inside":
            return ("after", count) if marks.end in text else (phase, since)
        if not marks.anywhere:
            text = text.lstrip()
            if not (text.startswith(marks.start) or marks.start.startswith(text)):
                return "after", 0
        if find_opening(text, marks.start) >= 0:
            return "inside", count
        return phase, count if marks.start in text else since  # a mention is read once


def find_opening(text: str, mark: str, *, previous: str = "") -> int:
    """Return where an opening mark begins that is not quoted, or -1.

    Args:
        text: to search.
        mark: the mark.
        previous: the letter before the text, if there is one.
    """
    start = text.find(mark)
    while start >= 0 and (previous + text)[: start + len(previous)][-1:] in tuple(_QUOTES):
        start = text.find(mark, start + 1)
    return start


def open_suffix(text: str, mark: str) -> int:
    """Return the length of the longest suffix of a text with which a mark begins."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
