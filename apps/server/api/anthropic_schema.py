"""Request models of Anthropic's Messages, and what they mean as a conversation."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.schemas import (
    MOST_STOPS,
    MOST_TOKENS,
    Many,
    Sampled,
    StopString,
    Strict,
)
from mlx_mtp.apps.server.errors import refused


class Turn(Strict):
    """One message: text, or blocks of text, calls and what calls gave."""

    role: Literal["user", "assistant", "system"]
    content: str | Many[dict[str, Any]]


class AnthropicTool(Strict):
    """A tool of the client's own."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class Thinking(Strict):
    """Whether the model thinks aloud; it cannot be told to."""

    type: Literal["disabled"]


class MessagesRequest(Sampled):
    """The body; what is not here is refused."""

    model: str | None = None
    messages: Many[Turn] = Field(min_length=1)
    max_tokens: int = Field(ge=1, le=MOST_TOKENS)
    system: str | Many[dict[str, Any]] | None = None
    stop_sequences: Many[StopString] | None = Field(None, max_length=MOST_STOPS)
    stream: bool | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    # Accepted and without effect: the prefix cache works by itself.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None


def conversation(body: MessagesRequest, *, has_tools: bool) -> list[dict[str, Any]]:
    """The messages that a chat template takes.

    Raises:
        ApiError: 400 for a block that cannot be used.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for at, turn in enumerate(body.messages):
        where = f"messages.{at}.content"
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _from_blocks(turn.role, turn.content, where, has_tools)
    return messages


def function_tools(tools: list[AnthropicTool] | None) -> list[dict[str, Any]]:
    """The tools in the shape of chat completions."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
            },
        }
        for tool in tools or ()
    ]


def openai_choice(
    choice: dict[str, Any] | None,
) -> tuple[str | dict[str, Any] | None, bool]:
    """Anthropic's ``tool_choice`` in OpenAI's words, and whether there may be several calls.

    What only looks alike is turned into what OpenAI's refuses.
    """
    if choice is None:
        return None, True
    parallel = choice.get("disable_parallel_tool_use") is not True
    match choice.get("type"):
        case "auto" | "none" as kind:
            return kind, parallel
        case "any":
            return "required", parallel
        case "tool":
            return {"type": "function", "name": choice.get("name")}, parallel
    return {}, parallel


def _from_blocks(
    role: str, blocks: list[dict[str, Any]], where: str, has_tools: bool
) -> list[dict[str, Any]]:
    """The messages of one turn: results of calls stand apart."""
    messages, texts, calls = [], [], []
    for at, block in enumerate(blocks):
        place, kind = f"{where}.{at}", block.get("type")
        if kind in ("tool_use", "tool_result") and not has_tools:
            raise refused(f"{place}: the model's chat template knows no tools", param=place)
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "tool_result":
            content = _text(block.get("content") or "", f"{place}.content")
            call_id = block.get("tool_use_id")
            messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        else:
            texts.append(_text([block], where, start=at))
    if texts or calls:
        said: dict[str, Any] = {"role": role, "content": "".join(texts)}
        messages.append(said | ({"tool_calls": calls} if calls else {}))
    if not messages:
        raise refused(f"{where} is empty", param=where)
    return messages


def _text(content: Any, where: str, *, start: int = 0) -> str:
    """The text of blocks.  What other kinds point to is never fetched."""
    if isinstance(content, str):
        return content
    texts = []
    for at, block in enumerate(content if isinstance(content, list) else [None], start=start):
        is_block = isinstance(block, dict)
        if not is_block or block.get("type") != "text" or not isinstance(block.get("text"), str):
            kind = str(block.get("type"))[:40] if is_block else type(block).__name__
            raise refused(
                f"{where}.{at}: blocks of type {kind!r} are not supported, only text is",
                param=f"{where}.{at}",
                code="unsupported_content",
            )
        texts.append(block["text"])
    return "".join(texts)


def _call(block: dict[str, Any], place: str) -> dict[str, Any]:
    arguments, name = block.get("input"), block.get("name")
    if not isinstance(arguments, dict) or not isinstance(name, str):
        raise refused(f"{place} needs a name and an input object", param=place)
    function = {"name": name, "arguments": arguments}
    return {"id": str(block.get("id")), "type": "function", "function": function}


def tool_use(call: dict[str, str], name: str) -> dict[str, Any]:
    """A call that the model has made, as a block; ``name`` is the block's id."""
    try:
        given = json.loads(call["arguments"])
    except (ValueError, RecursionError):
        given = {}
    return {"type": "tool_use", "id": name, "name": call["name"], "input": given}
