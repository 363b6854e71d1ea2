"""Finds tool calls in the text of an answer, with the parsers of mlx-lm."""

from __future__ import annotations

import json
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools


class ToolCallReader:
    """Parts text into plain text and tool calls.

    Args:
        tokenizer: one with ``has_tool_calling``.
        tools: the tools in OpenAI's form, which some parsers look at for types.

    Attributes:
        calls: the calls so far, ``{"name": str, "arguments": JSON text}``.
    """

    def __init__(self, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]]) -> None:
        self.calls: list[dict[str, str]] = []
        self._start: str = tokenizer.tool_call_start or ""
        self._end: str = tokenizer.tool_call_end or ""
        self._parser: Any = tokenizer.tool_parser
        self._tools = tools
        self._held = ""
        self._inside = False

    def push(self, text: str) -> str:
        """Take a piece of text; return what of it is certain to be no tool call."""
        self._held += text
        shown = ""
        while True:
            mark = self._end if self._inside else self._start
            at = self._held.find(mark) if mark else -1
            if at < 0:
                break
            body, self._held = self._held[:at], self._held[at + len(mark) :]
            shown += self._parse(body) if self._inside else body
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._held) - _open_suffix(self._held, self._start)
            shown, self._held = shown + self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what was held back and is no tool call after all."""
        rest, self._held = self._held, ""
        if not self._inside:
            return rest
        self._inside = False
        if self._end:  # the call was cut off
            return self._start + rest
        return self._parse(rest)

    def _parse(self, body: str) -> str:
        """Take a call; return it as text where it is not one."""
        try:
            parsed = self._parser(body, self._tools)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [
                {"name": str(call["name"]), "arguments": _as_json(call.get("arguments", {}))}
                for call in found
            ]
        except Exception:  # parsers raise many kinds for what a model may write
            return self._start + body + self._end
        self.calls += calls
        return ""


def calls_are_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether calls are JSON objects between two marks that are written out as text."""
    marks = (tokenizer.tool_call_start, tokenizer.tool_call_end)
    special = set(tokenizer.all_special_tokens)
    return (
        tokenizer.tool_parser is json_tools.parse_tool_call
        and all(marks)
        and not special.intersection(marks)
    )


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _open_suffix(text: str, mark: str) -> int:
    """Length of the longest suffix of the text with which the mark begins."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(mark[:size])), 0)
