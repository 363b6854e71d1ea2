"""Finds tool calls in the text of an answer, and parses them, most of them with mlx-lm's parsers.

A mark that opens a call may also be mentioned in text, and the mark that closes it may be part of
an argument.  So a call is what matches the whole form of a call in the model's format, and all else
is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import gemma4, json_tools

from mlx_mtp.text.chat_template import chat_text, lists_tools
from mlx_mtp.text.reasoning import open_suffix
from mlx_mtp.text.tool_prompt import CALL_END, CALL_START, as_object, valid_unicode

_STRING = r'"(?:[^"\\]++|\\.)*+"'
_OBJECT = rf'(?P<object>\{{(?:[^"{{}}]++|{_STRING}|(?&object))*+\}})'
_JSON_CALL = rf'\s*+(?P<json>(?=\{{\s*+"){_OBJECT}|\[\s*+(?&object)(?:\s*+,\s*+(?&object))*+\s*+\])'
_PYTHON = r"""(?P<list>\[(?:[^"'\[\]]++|"(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+'|(?&list))*+\])"""
_ATTRIBUTE = r"""(?:"[^"]*+"|'[^']*+'|[^\s"'<>]++)\s*+>"""
_SURPLUS = " \t\r\n}]"  # that small models write between a call and the closing mark
_MAX_RETRIED = 1024  # characters; a longer call is only looked at where it may be complete


def _value(closing: str) -> str:
    """An argument's text, which ends with the first closing mark."""
    return rf"(?>(?P<value>.*?){closing})"


def _braces(quote: str) -> str:
    """A call of Gemma's form."""
    inner = rf"{quote}(?>.*?{quote})|(?!{quote})[^{{}}]|(?&braces)"
    return rf"\s*+call:[\w.-]++(?P<braces>\{{(?:{inner})*+\}})"


def _pairs(prefix: str) -> str:
    """A call of GLM's form; keys and values alternate, and only the closing mark ends it."""
    pair = (
        rf"\s*+<{prefix}arg_key>(?>.*?</{prefix}arg_key>)(?:\\n|\s)*+"
        rf"<{prefix}arg_value>{_value(f'</{prefix}arg_value>')}"
    )
    plain = rf"(?:\s++[\w-]++=(?:{_STRING}|'[^']*+'|[^\s<]++))++"
    body = rf"\s*+[\w.-]++(?:(?:{pair})++|\s*+{_OBJECT}|{plain})?+\s*+|\s*+(?&object)\s*+"
    return rf"(?P<body>{body})</{prefix}tool_call>"


# What follows the opening mark, for each parser of mlx-lm.  Where ``name`` and ``json`` are matched
# they are the call; else mlx-lm parses ``body``, or all, in which each ``value`` is masked.
_FORMS = {
    "json_tools": _JSON_CALL,
    "mistral": rf"{_JSON_CALL}|\s*+(?P<name>[\w.-]++)(?:\[CALL_ID\][\w-]*+)?+\s*+\[ARGS\]\s*+"
    r"(?P<json>(?&object))",
    "kimi_k2": r"\s*+(?P<open><\|tool_call_begin\|>)?+\s*+(?:functions\.)?+(?P<name>[\w.-]++):\d++"
    rf"\s*+<\|tool_call_argument_begin\|>\s*+(?P<json>{_OBJECT})?+\s*+"
    r"(?(open)<\|tool_call_end\|>)",
    "qwen3_coder": r"\s*+<function=[^>\n]++>(?:\s*+<parameter=[^>\n]++>"
    rf"{_value('</parameter>')})*+\s*+</function>",
    "glm47": _pairs(""),
    "laguna": _pairs(""),
    "longcat": _pairs("longcat_"),
    "minimax_m2": r"\s*+<invoke name=[^>]++>(?:\s*+<parameter name=[^>]++>"
    rf"{_value('</parameter>')})*+\s*+</invoke>",
    "muse_spark": r"\s*+<atem:invoke\b[^>]*+>(?:\s*+<atem:parameter\b[^>]*+>"
    rf"{_value('</atem:parameter>')})*+\s*+</atem:invoke>",
    "kimi_k3": r"\s*+<\|open\|>call\b(?>.*?<\|sep\|>)(?:\s*+<\|open\|>"
    r"(?:argument\b(?>.*?<\|sep\|>)(?>(?P<value>.*?)<\|close\|>argument<\|sep\|>)"
    r"|json\b(?>.*?<\|sep\|>)(?>(?P<value>.*?)<\|close\|>json<\|sep\|>)))*+"
    r"\s*+<\|close\|>call<\|sep\|>",
    "function_gemma": _braces("<escape>"),
    "gemma4": _braces(r'<\|"\|>'),
    "pythonic": rf"\s*+(?=\[\s*+[A-Za-z_][\w.]*+\s*+\(){_PYTHON}",
    "minicpm5": rf"(?P<body>{_ATTRIBUTE}(?:\s*+<param\s++name\s*+=\s*+{_ATTRIBUTE}"
    rf"(?:\s*+<!\[CDATA\[(?>(?P<value>.*?)\]\]>)\s*+</param>|{_value('</param>')}))*+\s*+)"
    r"</function>",
}  # fmt: skip
_BARE = rf'\s*+(?:<\|python_tag\|>|;)?+\s*+(?P<json>(?=\{{\s*+"(?:name|type)"\s*+:){_OBJECT})'
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_NO_ARGUMENTS = regex.compile(r"\s*([\w.-]+)\s*")


@dataclass(frozen=True)
class GenericCalls:
    """The format of calls where mlx-lm knows none; the attributes are those of a tokenizer.

    A call without marks at the beginning of an answer, as Llama 3 writes it, is read too.
    """

    tool_call_start: str = CALL_START
    tool_call_end: str = CALL_END
    tool_parser: Any = json_tools.parse_tool_call


GENERIC = GenericCalls()


class ToolCallReader:
    """Splits text into plain text and tool calls; the result does not depend on the pieces.

    White space between calls, and around them if there is no other text, is not text.

    Args:
        tokenizer: one with ``has_tool_calling``, or ``GENERIC``.
        tools: the tools in OpenAI's form; some parsers read types from them.

    Attributes:
        calls: the calls so far, ``{"name": str, "arguments": JSON text of an object}``.
    """

    def __init__(
        self, tokenizer: TokenizerWrapper | GenericCalls, tools: list[dict[str, Any]]
    ) -> None:
        self.calls: list[dict[str, str]] = []
        self._start: str = tokenizer.tool_call_start or ""
        self._end: str = tokenizer.tool_call_end or ""
        self._parser: Any = tokenizer.tool_parser
        self._tools = tools
        self._names = {tool["function"]["name"] for tool in tools}
        self._module = getattr(self._parser, "__module__", "").rpartition(".")[2]
        form = _FORMS.get(self._module)
        self._form = regex.compile(form, regex.DOTALL) if form else None
        self._is_bare = bool(tools) and isinstance(tokenizer, GenericCalls)
        self._pending = ""
        self._waiting_at = 0  # length of what may become a call, when it was looked at
        self._space: str | None = ""  # since the beginning or the last call, while it is all

    def push(self, text: str) -> str:
        """Add a piece of text; return text that cannot be part of a tool call."""
        tail = len(self._pending) - len(self._end)
        self._pending += text
        if self._waiting_at > _MAX_RETRIED:  # looking at it each time takes quadratic time
            is_closed = bool(self._end) and self._pending.find(self._end, max(0, tail)) >= 0
            if not is_closed and len(self._pending) < self._waiting_at * 17 // 16:
                return ""
        return self._read(is_all=False)

    def finish(self) -> str:
        """Return the pending text if it is not a tool call."""
        text = self._read(is_all=True)
        space = "" if self.calls else self._space or ""
        self._space = None
        return text + space

    def _read(self, *, is_all: bool) -> str:
        self._waiting_at = 0
        text_out = ""
        if self._is_bare:
            size = self._calls(_BARE_FORM, 0, is_all=is_all)
            if size is None:
                self._waiting_at = len(self._pending)
                return ""
            self._is_bare = False
            self._pending = self._pending[size:]
        while self._pending:
            start = self._pending.find(self._start) if self._start else -1
            if start < 0:
                cut = len(self._pending)
                cut -= 0 if is_all else open_suffix(self._pending, self._start)
                text_out += self._text(cut)
                break
            text_out += self._text(start)
            size = self._marked_calls(is_all=is_all)
            if size is None:
                self._waiting_at = len(self._pending)
                break
            if size:
                self._pending = self._pending[size:]
            else:  # a mention of the mark
                text_out += self._text(len(self._start))
        return text_out

    def _text(self, size: int) -> str:
        """Take text from the beginning of the pending text."""
        text, self._pending = self._pending[:size], self._pending[size:]
        if self._space is not None:
            text = self._space + text
            self._space = None if text.strip() else text
            text = "" if self._space is not None else text
        return text

    def _marked_calls(self, *, is_all: bool) -> int | None:
        """Read calls after the opening mark at the beginning of the pending text.

        Returns:
            Their length with the marks, 0 if they are none, None if that is undecided.
        """
        if self._form is None:
            return self._calls_by_trial(is_all=is_all)
        return self._calls(self._form, len(self._start), is_all=is_all)

    def _calls(self, form: Any, start: int, *, is_all: bool) -> int | None:
        """Read one or more calls of a form, with the closing mark, which models may forget."""
        calls: list[dict[str, str]] = []
        position = start
        while match := form.match(self._pending, position, partial=not is_all):
            if match.partial:
                return None
            more = self._from_match(match)
            if more is None:
                break
            calls += more
            position = match.end()
        if not calls:
            return 0
        rest = self._pending[position:].lstrip(_SURPLUS if "json" in form.groupindex else None)
        end = "" if start == 0 or "body" in form.groupindex else self._end
        if end and rest.startswith(end):
            position = len(self._pending) - len(rest) + len(end)
        elif end and end.startswith(rest):
            if not is_all:
                return None
            position = len(self._pending)
        return self._accept(calls, position)

    def _calls_by_trial(self, *, is_all: bool) -> int | None:
        """Read calls of an unknown form: the shortest text up to a closing mark that is parsed."""
        start = len(self._start)
        for end in self._ends(is_all):
            calls = self._parse(self._pending[start:end])
            if calls is not None:
                return self._accept(calls, end + len(self._end))
        return 0 if is_all else None

    def _ends(self, is_all: bool) -> Iterator[int]:
        if not self._end and is_all:
            yield len(self._pending)
        end = self._pending.find(self._end, len(self._start)) if self._end else -1
        while end >= 0:
            yield end
            end = self._pending.find(self._end, end + 1)

    def _accept(self, calls: list[dict[str, str]], size: int) -> int:
        self.calls += calls
        self._space = ""
        return size

    def _from_match(self, match: Any) -> list[dict[str, str]] | None:
        """The calls of a match; None if they cannot be parsed."""
        groups = match.groupdict()
        if "json" not in groups:
            return self._parse(groups.get("body") or match.group(), match)
        try:
            value = json.loads(groups["json"] or "{}", strict=False)
        except (ValueError, RecursionError):
            return None
        if groups.get("name"):
            return _call_list([{"name": groups["name"], "arguments": value}])
        calls = _call_list(value)
        is_bare = match.re is _BARE_FORM
        return None if is_bare and not self._are_known(calls) else calls

    def _are_known(self, calls: list[dict[str, str]] | None) -> bool:
        return calls is not None and all(call["name"] in self._names for call in calls)

    def _parse(self, body: str, match: Any = None) -> list[dict[str, str]] | None:
        """Parse calls with mlx-lm's parser, at second look without the types of the tools.

        Marks within arguments confuse the parsers, so ``<`` is masked there.
        """
        mask = next(each for each in map(chr, range(0xE000, 0xF900)) if each not in body)
        spans = match.spans("value") if match and "value" in match.re.groupindex else []
        for start, end in reversed(spans):
            start, end = start - match.start(), end - match.start()
            body = body[:start] + body[start:end].replace("<", mask) + body[end:]
        for parser, tools in self._parsers():
            try:
                calls = _call_list(_unmasked(parser(body, tools), mask))
            except Exception:  # parsers raise many kinds of errors for invalid calls
                continue
            if calls is not None:
                return calls
        name = _NO_ARGUMENTS.fullmatch(body) if self._form else None
        return _call_list([{"name": name.group(1)}]) if name else None

    def _parsers(self) -> Iterator[tuple[Any, list[dict[str, Any]] | None]]:
        if self._module == "function_gemma":  # its parser ends objects at the first brace
            yield lambda text, _: gemma4.parse_tool_call(text.replace("<escape>", '<|"|>')), None
        yield self._parser, self._tools
        yield self._parser, None


_BARE_FORM = regex.compile(_BARE, regex.DOTALL)


def reads_tools(tokenizer: TokenizerWrapper) -> bool:
    """Whether tools can be passed to the chat template, because calls in its form can be read.

    Where they cannot, tools and calls are plain text (``mlx_mtp.text.tool_prompt``).
    """
    if not lists_tools(tokenizer):
        return False
    if tokenizer.has_tool_calling:
        return True
    user = {"role": "user", "content": "hi"}
    function = {"name": "probe_tool", "arguments": {"key": "value"}}
    call = {"id": "probe0000", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    before, after = chat_text(tokenizer, [user]), chat_text(tokenizer, [user, answer])
    turn = after.removeprefix(before)
    reader = ToolCallReader(GENERIC, [{"function": function}])
    reader.push(turn)
    return bool(reader.calls) or function["name"] not in turn


def calls_are_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether calls are JSON objects between two tags that are not special tokens."""
    tags = (tokenizer.tool_call_start, tokenizer.tool_call_end)
    special = set(tokenizer.all_special_tokens)
    return (
        tokenizer.tool_parser is json_tools.parse_tool_call
        and all(tags)
        and not special.intersection(tags)
    )


def _call_list(parsed: Any) -> list[dict[str, str]] | None:
    """Calls in the form of ``ToolCallReader.calls``; None unless all values are calls."""
    calls = [_call(value) for value in (parsed if isinstance(parsed, list) else [parsed])]
    return [call for call in calls if call is not None] if calls and all(calls) else None


def _call(value: Any) -> dict[str, str] | None:
    """A call under the names that models use; keys without such a name are its arguments."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    value = inner if isinstance(inner, dict) else value
    name = value.get("name") or value.get("function")
    if not isinstance(name, str) or not name.strip() or "{" in name:
        return None
    rest = {
        key: each for key, each in value.items() if key not in ("name", "type", "id", "function")
    }
    arguments = next((rest[key] for key in _ARGUMENTS if key in rest), rest)
    text = json.dumps(as_object(arguments), ensure_ascii=False)
    return {"name": valid_unicode(name.strip()), "arguments": text}


def _unmasked(value: Any, mask: str) -> Any:
    if isinstance(value, str):
        return value.replace(mask, "<")
    if isinstance(value, dict):
        return {_unmasked(key, mask): _unmasked(each, mask) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_unmasked(each, mask) for each in value]
    return value
