"""Tools as plain text, for chat templates that have no place for them.

The prompt, the form of calls and that of results are those of Qwen's and Hermes' templates, which
many models have seen in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
_RESULT_START = "<tool_response>"
MAX_LEVELS = 32  # of arguments; bodies of requests, in which calls come back, may have 64
_PROMPT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

Message = dict[str, Any]


def as_object(arguments: Any) -> dict[str, Any]:
    """Return the arguments of a call as an object that JSON and UTF-8 can represent.

    Args:
        arguments: an object or its JSON text.  None, an empty text and ``null`` are no arguments;
            any other value becomes the object ``{"arguments": value}``.
    """
    value = arguments
    for _ in range(2):  # some models and clients encode twice
        if isinstance(value, str):
            try:
                value = json.loads(value, strict=False) if value.strip() else None
            except (ValueError, RecursionError):
                break
    if not isinstance(value, dict):
        value = {} if value is None else {"arguments": value}
    if _levels(value) > MAX_LEVELS:
        value = {"arguments": arguments if isinstance(arguments, str) else str(arguments)}
    return json.loads(valid_unicode(_json(value)), parse_constant=lambda _: None)


def valid_unicode(text: str) -> str:
    """Replace surrogates without a partner, which UTF-8 cannot represent."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_text(content: Any) -> str:
    """Return the text of a message's content: a string, a list of parts, or None."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def with_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> list[Message]:
    """Return the conversation with tools, calls and results as text.

    Args:
        messages: a conversation in the form that chat templates take.
        tools: tools in OpenAI's form; the system message lists them.
    """
    converted = calls_as_text(messages)
    if not tools:
        return converted
    prompt = _PROMPT.format(tools="\n".join(_json(tool) for tool in tools))
    if not converted or converted[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *converted]
    text = content_text(converted[0]["content"])
    return [converted[0] | {"content": f"{text}\n\n{prompt}" if text else prompt}, *converted[1:]]


def calls_as_text(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return the conversation with calls as text of the assistant, and results as the user's."""
    converted: list[Message] = []
    follows_result = False
    for message in messages:
        text = content_text(message.get("content"))
        if message["role"] == "tool":
            text = f"{_RESULT_START}\n{text}\n</tool_response>"
            if follows_result:
                converted[-1]["content"] += f"\n{text}"
            else:
                converted.append({"role": "user", "content": text})
        elif calls := message.get("tool_calls"):
            texts = [text] if text else []
            texts += [_call_text(call["function"]) for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            converted.append(rest | {"content": "\n".join(texts)})
        else:
            converted.append(dict(message))
        follows_result = message["role"] == "tool"
    return converted


def is_result(message: Mapping[str, Any]) -> bool:
    """Whether a message is a result of a call that became text."""
    return content_text(message.get("content")).startswith(_RESULT_START)


def _call_text(function: Mapping[str, Any]) -> str:
    call = {"name": function["name"], "arguments": as_object(function.get("arguments"))}
    return f"{CALL_START}\n{_json(call)}\n{CALL_END}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _levels(value: Any) -> int:
    """Number of nested objects and lists, counted up to one more than the limit."""
    layer, count = [value], 0
    while layer and count <= MAX_LEVELS:
        layer = [
            child
            for each in layer
            if isinstance(each, dict | list | tuple)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        count += 1
    return count
