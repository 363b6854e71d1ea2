"""Parses tool calls in the text of an answer with the parsers of mlx-lm."""

from __future__ import annotations

import json
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import json_tools


class ToolCallReader:
    """Splits text into plain text and tool calls.

    Args:
        tokenizer: one with ``has_tool_calling``.
        tools: the tools in OpenAI's form; some parsers read types from them.

    Attributes:
        calls: the calls so far, ``{"name": str, "arguments": JSON text}``.
    """

    def __init__(self, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]]) -> None:
        self.calls: list[dict[str, str]] = []
        self._start: str = tokenizer.tool_call_start or ""
        self._end: str = tokenizer.tool_call_end or ""
        self._parser: Any = tokenizer.tool_parser
        self._tools = tools
        self._pending = ""
        self._inside = False

    def push(self, text: str) -> str:
        """Add a piece of text; return text that cannot be part of a tool call."""
        self._pending += text
        text_out = ""
        while True:
            tag = self._end if self._inside else self._start
            body, separator, rest = self._pending.partition(tag) if tag else ("", "", "")
            if not separator:
                break
            self._pending = rest
            text_out += self._parse(body) if self._inside else body
            self._inside = not self._inside
        if not self._inside:
            cut = len(self._pending) - _open_suffix(self._pending, self._start)
            text_out, self._pending = text_out + self._pending[:cut], self._pending[cut:]
        return text_out

    def finish(self) -> str:
        """Return the pending text if it is not a tool call."""
        rest, self._pending = self._pending, ""
        if not self._inside:
            return rest
        self._inside = False
        if self._end:  # the call was cut off
            return self._start + rest
        return self._parse(rest)

    def _parse(self, body: str) -> str:
        """Parse a call; return it as text if it is not one."""
        try:
            parsed = self._parser(body, self._tools)
            calls = [
                {"name": str(call["name"]), "arguments": _as_json(call.get("arguments", {}))}
                for call in (parsed if isinstance(parsed, list) else [parsed])
            ]
        except Exception:  # parsers raise many kinds of errors for invalid calls
            return self._start + body + self._end
        self.calls += calls
        return ""


def calls_are_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether calls are JSON objects between two tags that are not special tokens."""
    tags = (tokenizer.tool_call_start, tokenizer.tool_call_end)
    special = set(tokenizer.all_special_tokens)
    return (
        tokenizer.tool_parser is json_tools.parse_tool_call
        and all(tags)
        and not special.intersection(tags)
    )


def _as_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _open_suffix(text: str, tag: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the tag."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)
