"""Render a conversation with the model's chat template.

Templates differ in what they accept: some want one system message at the beginning, some have no
system role, some want user and assistant to alternate, and some silently leave out what they do not
know.  A conversation that the template refuses, or of which it leaves out a message, is changed as
little as needed for the template to render all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlx_mtp.text.reasoning import reasoning_marks
from mlx_mtp.text.tool_prompt import Message, as_object, calls_as_text, content_text, is_result

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Messages = list[Message]
Change = Callable[[Messages], Messages]
_ID_LENGTH = 9  # of calls in Mistral's templates
_SYSTEM = ("system", "developer")
_MARK = re.compile(r"zq(?:\d+x)?\d+qz")
# Templates that expect text print lists and objects in Python's form, not in JSON's.
_PYTHON_FORM = re.compile(rf"\{{'{_MARK.pattern}|{_MARK.pattern}'\}}\]")


def chat_text(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    *,
    template_config: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with the model's chat template, ready for the model's turn.

    A last message of the assistant is left open, so that the model continues it.  Encode the result
    without special tokens: the template has added them.

    Args:
        tokenizer: from ``load``.
        messages: the conversation in OpenAI's form.  Earlier reasoning, ``reasoning_content``, is
            there for templates that use it.  Contents may be text or lists of text parts,
            arguments of calls objects or JSON text.
        template_config: more variables of the template, such as ``tools``; a model with marks of
            reasoning may use them unless ``enable_thinking`` is false.

    Raises:
        ValueError: the template refuses the conversation in every form.
    """
    config = {"enable_thinking": reasoning_marks(tokenizer) is not None, **(template_config or {})}
    return _Fitting(tokenizer, config, _with_objects(messages)).text()


def lists_tools(tokenizer: TokenizerWrapper) -> bool:
    """Whether the chat template of a tokenizer lists the tools that are passed to it."""
    return _lists_tools(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _lists_tools(tokenizer: TokenizerWrapper, template: str) -> bool:
    del template  # part of the key: a tokenizer's template may be replaced
    function = {"name": "probe_tool", "description": "", "parameters": {"type": "object"}}
    config = {"tools": [{"type": "function", "function": function}]}
    try:
        text = chat_text(tokenizer, [{"role": "user", "content": "hi"}], template_config=config)
    except ValueError:
        return False
    return function["name"] in text


class _Fitting:
    """One conversation and the template that it is made to fit."""

    def __init__(
        self, tokenizer: TokenizerWrapper, config: Mapping[str, Any], messages: Messages
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._messages = messages
        self._tried: list[tuple[Messages, str | None]] = []
        self._refusal: ValueError | None = None
        self._incomplete: tuple[int, str] | None = None  # the fewest messages missing, and the text

    def text(self) -> str:
        """Render the conversation with as few changes as possible, the mildest first."""
        for count in range(len(_CHANGES) + 1):
            for form in _FORMS:
                changes = _CHANGES[:count]
                text = self._try(changes, form)
                if text is None:
                    continue
                for change in reversed(changes):
                    fewer = tuple(each for each in changes if each is not change)
                    fitting = self._try(fewer, form)
                    if fitting is not None:
                        changes, text = fewer, fitting
                return text
        if self._incomplete is None:
            assert self._refusal is not None
            raise self._refusal
        return self._incomplete[1]

    def _try(self, changes: tuple[Change, ...], form: tuple[Change, ...]) -> str | None:
        """Render a changed conversation; None if the template does not render all of it."""
        messages = self._messages
        for change in (*(each for each in _ORDER if each in changes), *form):
            messages = change(messages)
        for tried, text in self._tried:
            if tried == messages:
                return text
        text = None
        try:
            text = self._render(messages)
            if missing := self._num_missing(messages):
                if self._incomplete is None or missing < self._incomplete[0]:
                    self._incomplete = (missing, text)
                text = None
        except ValueError as error:
            self._refusal = self._refusal or error
        self._tried.append((messages, text))
        return text

    def _num_missing(self, messages: Messages) -> int:
        """Number of messages and calls that are left out or misprinted, found by marks in them."""
        marked = [_marked(message, f"{index}qz") for index, message in enumerate(messages)]
        try:
            text = self._render(marked)
        except ValueError:
            return 0
        missing = set(_MARK.findall(json.dumps(marked, default=str))) - set(_MARK.findall(text))
        return len(missing) + len(_PYTHON_FORM.findall(text))

    def _render(self, messages: Messages) -> str:
        last = messages[-1]
        resume = last["role"] == "assistant" and not last.get("tool_calls")
        try:
            text = self._tokenizer.apply_chat_template(
                [_with_reasoning(message) for message in messages],
                tokenize=False,
                continue_final_message=resume,
                add_generation_prompt=not resume,
                **self._config,
            )
        except Exception as error:  # a template is a program and may raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(text, str)
        return text


def _with_reasoning(message: Message) -> Message:
    """Offer earlier reasoning under both of the names that templates have for it."""
    thought = message.get("reasoning_content")
    return message | {"reasoning": thought} if thought else message


def _with_objects(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Copy the conversation, with arguments of calls as objects."""
    return _map_calls([dict(message) for message in messages], as_object)


def _text_arguments(messages: Messages) -> Messages:
    """Write arguments of calls as JSON text."""
    return _map_calls(messages, lambda value: json.dumps(value, ensure_ascii=False))


def _map_calls(messages: Messages, convert: Callable[[Any], Any]) -> Messages:
    def converted(call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        arguments = convert(function.get("arguments"))
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        message | {"tool_calls": [converted(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _text_contents(messages: Messages) -> Messages:
    return [message | {"content": content_text(message.get("content"))} for message in messages]


def _part_contents(messages: Messages) -> Messages:
    return [
        message | {"content": [{"type": "text", "text": content_text(message.get("content"))}]}
        for message in messages
    ]


def _system_first(messages: Messages) -> Messages:
    """Join the system messages and move them to the beginning."""
    text, rest = _split_system(messages)
    return messages if text is None else [{"role": "system", "content": text}, *rest]


def _join_neighbours(messages: Messages) -> Messages:
    """Join neighbouring messages of the user, and of the assistant."""
    joined: Messages = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"] in ("user", "assistant"):
            joined[-1] = _join(joined[-1], message)
        else:
            joined.append(message)
    return joined


def _without_empty_answers(messages: Messages) -> Messages:
    """Leave out messages of the assistant that say and call nothing."""
    kept = [
        each
        for each in messages
        if each["role"] != "assistant"
        or content_text(each.get("content")).strip()
        or each.get("tool_calls")
    ]
    return kept or messages


def _user_first(messages: Messages) -> Messages:
    """Begin with a message of the user, which may be empty, after the system message.

    Results of calls that became text do not count as such a message in Qwen's templates.
    """
    start = 1 if messages[0]["role"] in _SYSTEM else 0
    first = messages[start] if messages[start:] else {"role": None}
    if first["role"] == "user" and not is_result(first):
        return messages
    return [*messages[:start], {"role": "user", "content": ""}, *messages[start:]]


def _short_ids(messages: Messages) -> Messages:
    """Give calls ids of nine letters and digits, and their results the same."""

    def short(call_id: Any) -> str:
        return hashlib.sha256(str(call_id).encode()).hexdigest()[:_ID_LENGTH]

    changed, waiting = [], []
    for index, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            ids = [short(call.get("id") or (index, at)) for at, call in enumerate(calls)]
            calls = [{**call, "id": new} for call, new in zip(calls, ids, strict=True)]
            changed.append(message | {"tool_calls": calls})
            waiting = ids
        elif message["role"] == "tool":
            new = short(message.get("tool_call_id"))
            if new not in waiting and waiting and not message.get("tool_call_id"):
                new = waiting[0]
            waiting = [each for each in waiting if each != new]
            changed.append(message | {"tool_call_id": new})
        else:
            changed.append(message)
    return changed


def _single_calls(messages: Messages) -> Messages:
    """Split messages with several calls into messages with one, each before its result."""
    changed: Messages = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            changed.append(message)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.pop(0))
        for index, call in enumerate(calls):
            more = {} if index == 0 else {"content": ""}
            changed.append(message | more | {"tool_calls": [call]})
            own = [each for each in results if each.get("tool_call_id") in (call.get("id"), None)]
            changed += own[:1]
            results = [each for each in results if not any(each is used for used in own[:1])]
        changed += results
    return changed


def _results_with_users(messages: Messages) -> Messages:
    """Append what the user writes directly after a result to the result."""
    changed: Messages = []
    for message in messages:
        if changed and changed[-1]["role"] == "tool" and message["role"] == "user":
            changed[-1] = changed[-1] | {"content": _joined_text(changed[-1], message)}
        else:
            changed.append(message)
    return changed


def _system_into_user(messages: Messages) -> Messages:
    """Put the text of the system messages before that of the first message of the user."""
    text, rest = _split_system(messages)
    if text is None:
        return messages
    first = next((index for index, each in enumerate(rest) if each["role"] == "user"), None)
    system = {"role": "user", "content": text}
    if first is None:
        return [system, *rest]
    return [*rest[:first], _join(system, rest[first]), *rest[first + 1 :]]


def _calls_as_text(messages: Messages) -> Messages:
    """Write calls and their results as text."""
    has_calls = any(message.get("tool_calls") for message in messages)
    return calls_as_text(messages) if has_calls else messages


def _split_system(messages: Messages) -> tuple[str | None, Messages]:
    """The joined text of the system messages, None if there are none, and the other messages."""
    texts = [content_text(each.get("content")) for each in messages if each["role"] in _SYSTEM]
    rest = [each for each in messages if each["role"] not in _SYSTEM]
    return ("\n\n".join(filter(None, texts)) if texts else None), rest


def _join(first: Message, second: Message) -> Message:
    joined = first | second | {"content": _joined_text(first, second)}
    if calls := [*(first.get("tool_calls") or ()), *(second.get("tool_calls") or ())]:
        joined["tool_calls"] = calls
    if thoughts := _joined_text(first, second, "reasoning_content"):
        joined["reasoning_content"] = thoughts
    return joined


def _joined_text(first: Message, second: Message, key: str = "content") -> str:
    return "\n\n".join(filter(None, (content_text(each.get(key)) for each in (first, second))))


def _marked(message: Message, mark: str) -> Message:
    """Add marks to a message that every template has to render; others are returned unchanged."""
    if calls := message.get("tool_calls"):
        marks = (f"zq{at}x{mark}" for at in range(len(calls)))
        return message | {"tool_calls": list(map(_marked_call, calls, marks))}
    content, mark = message.get("content"), f"zq{mark}"
    if not content:
        return message
    if isinstance(content, str):
        return message | {"content": content + mark}
    return message | {"content": [*content, {"type": "text", "text": mark}]}


def _marked_call(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    marked = {mark: mark} | as_object(arguments)
    value = json.dumps(marked) if isinstance(arguments, str) else marked
    return {**call, "function": {**call["function"], "arguments": value}}


# From the mildest change to the strongest.
_CHANGES: tuple[Change, ...] = (
    _system_first,
    _without_empty_answers,
    _join_neighbours,
    _user_first,
    _short_ids,
    _single_calls,
    _results_with_users,
    _system_into_user,
    _calls_as_text,
)
# The order in which changes are made; each works on the results of those before it.
_ORDER = (
    _calls_as_text,
    _system_first,
    _system_into_user,
    _without_empty_answers,
    _results_with_users,
    _single_calls,
    _join_neighbours,
    _user_first,
    _short_ids,
)
_FORMS: tuple[tuple[Change, ...], ...] = (
    (),
    (_text_arguments,),
    (_text_contents,),
    (_text_arguments, _text_contents),
    (_part_contents,),
    (_text_arguments, _part_contents),
)
