"""Request models of OpenAI's Responses and their conversion to a conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.formats import TextFormat
from mlx_mtp.apps.server.api.schemas import MAX_TOKENS, Many, Sampled, Strict, flat_text
from mlx_mtp.apps.server.api.tools import template_call
from mlx_mtp.apps.server.errors import refused


class ResponseTool(Strict):
    """A function, the only supported type of tool."""

    type: str
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Strict):
    """Options of the answer's text."""

    format: TextFormat | None = None


class InputItem(Strict):
    """An item of the conversation: a message, a call or the output of a call."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    id: str | None = None
    status: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Many[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None
    output: str | Many[dict[str, Any]] | None = None
    phase: str | None = None


class ResponsesRequest(Sampled):
    """The request body; other fields are rejected."""

    input: str | Many[InputItem]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    stream: bool | None = None
    text: TextOptions | None = None
    tools: Many[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    include: list[Any] | None = Field(None, max_length=0)
    # Accepted without effect.
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


def conversation(body: ResponsesRequest, *, has_tools: bool) -> list[dict[str, Any]]:
    """Return the messages for the chat template.

    Raises:
        ApiError: 400 for an item that is not supported.
    """
    head = [] if body.instructions is None else [_message("system", body.instructions)]
    if isinstance(body.input, str):
        return [*head, _message("user", body.input)]
    messages = head
    for index, item in enumerate(body.input):
        where = f"input.{index}"
        if item.type != "message" and not has_tools:
            raise refused(
                f"{where}: the model's chat template does not support tools",
                param=where,
                code="no_tools",
            )
        if item.type == "message":
            messages.append(_template_message(item, where))
        elif item.type == "function_call":
            _add_call(messages, item, where)
        else:
            text = flat_text(item.output, where=f"{where}.output")
            messages.append(_message("tool", text) | {"tool_call_id": item.call_id})
    if not messages:
        raise refused("input is empty", param="input")
    return messages


def function_tools(tools: list[ResponseTool] | None) -> list[dict[str, Any]]:
    """Return the tools in the form of chat completions.

    Raises:
        ApiError: 400 for a tool that is not a function.
    """
    functions = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function" or not tool.name:
            raise refused(
                f"tools.{index}: type {tool.type[:40]!r} is not supported, only 'function' is",
                param=f"tools.{index}",
                code="unsupported_parameter",
            )
        functions.append({"type": "function", "function": tool.model_dump(exclude={"type"})})
    return functions


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _template_message(item: InputItem, where: str) -> dict[str, Any]:
    if item.role is None or item.content is None:
        missing = "role" if item.role is None else "content"
        raise refused(f"{where}.{missing} is missing", param=f"{where}.{missing}")
    role = "system" if item.role == "developer" else item.role
    return _message(role, flat_text(item.content, where=f"{where}.content"))


def _add_call(messages: list[dict[str, Any]], item: InputItem, where: str) -> None:
    """Add a call to the assistant's turn, which may contain several."""
    if item.call_id is None or item.name is None:
        missing = f"{where}.{'call_id' if item.call_id is None else 'name'}"
        raise refused(f"{missing} is missing", param=missing)
    call = template_call(item.call_id, item.name, item.arguments)
    if not messages or messages[-1]["role"] != "assistant":
        messages.append(_message("assistant", ""))
    messages[-1].setdefault("tool_calls", []).append(call)
