"""Request models of Anthropic's Messages and their conversion to a conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.schemas import (
    MAX_STOPS,
    MAX_TOKENS,
    Many,
    Sampled,
    StopString,
    Strict,
    flat_text,
)
from mlx_mtp.apps.server.api.tools import template_call
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.tool_prompt import as_object


class Turn(Strict):
    """One message: text, or blocks of text, calls and results of calls."""

    role: Literal["user", "assistant", "system"]
    content: str | Many[dict[str, Any]]


class AnthropicTool(Strict):
    """A tool that the client runs."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    cache_control: dict[str, Any] | None = None


class Thinking(Strict):
    """Extended thinking, which is not supported."""

    type: Literal["disabled"]


class MessagesRequest(Sampled):
    """The request body; other fields are rejected."""

    model: str | None = None
    messages: Many[Turn] = Field(min_length=1)
    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    system: str | Many[dict[str, Any]] | None = None
    stop_sequences: Many[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    # Accepted without effect: the prefix cache is automatic.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    cache_control: dict[str, Any] | None = None


def conversation(body: MessagesRequest, *, has_tools: bool) -> list[dict[str, Any]]:
    """Return the messages for the chat template.

    Raises:
        ApiError: 400 for a block that is not supported.
    """
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, turn in enumerate(body.messages):
        where = f"messages.{index}.content"
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _from_blocks(turn.role, turn.content, where, has_tools)
    return messages


def function_tools(tools: list[AnthropicTool] | None) -> list[dict[str, Any]]:
    """Return the tools in the form of chat completions."""
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
    """Convert ``tool_choice`` to OpenAI's form; the bool allows several calls.

    An invalid choice becomes one that ``chat_tools`` rejects.
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
    """The messages of one turn; each result of a call is a message of its own."""
    messages, texts, calls = [], [], []
    for index, block in enumerate(blocks):
        place, kind = f"{where}.{index}", block.get("type")
        if kind in ("tool_use", "tool_result") and not has_tools:
            raise refused(f"{place}: the model's chat template does not support tools", param=place)
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "tool_result":
            content = _text(block.get("content") or None, f"{place}.content")
            call_id = block.get("tool_use_id")
            messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        else:
            texts.append(_text([block], where, start=index))
    if texts or calls:
        message: dict[str, Any] = {"role": role, "content": "".join(texts)}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    if not messages:
        raise refused(f"{where} is empty", param=where)
    return messages


def _text(content: Any, where: str, *, start: int = 0) -> str:
    return flat_text(content, where=where, types=("text",), start=start)


def _call(block: dict[str, Any], place: str) -> dict[str, Any]:
    name = block.get("name")
    if not isinstance(name, str):
        raise refused(f"{place}.name is missing", param=f"{place}.name")
    return template_call(str(block.get("id")), name, block.get("input"))


def tool_use(call: dict[str, str], block_id: str) -> dict[str, Any]:
    """Return a call of the model as a block."""
    arguments = as_object(call["arguments"])
    return {"type": "tool_use", "id": block_id, "name": call["name"], "input": arguments}
