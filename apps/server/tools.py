"""Tools in the dialects' shapes."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.jobs import new_id
from mlx_mtp.apps.server.schemas import Strict
from mlx_mtp.apps.server.supervisor import EngineInfo


class Function(Strict):
    """A function that the model may call; ``strict`` would need constrained decoding."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of OpenAI's chat."""

    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    """A call that the model made; the arguments are JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in a conversation."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def chat_tools(
    tools: list[Tool] | None, choice: str | dict[str, Any] | None, info: EngineInfo
) -> list[dict[str, Any]]:
    """The tools to put into the chat template; none where there are none or none may be used.

    Raises:
        ApiError: 400 where the model cannot do what is asked.
    """
    if isinstance(choice, dict) or choice not in (None, "none", "auto"):
        raise refused(
            "tool_choice can be 'auto' or 'none': the model cannot be made to call a tool",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if not tools or choice == "none":
        return []
    if not info.has_tools:
        raise refused(
            "the model's chat template knows no tools", param="tools", code="unsupported_parameter"
        )
    for at, tool in enumerate(tools):
        if tool.function.strict:
            raise refused(
                "strict tools are not supported: arguments cannot be held to a schema",
                param=f"tools.{at}.function.strict",
                code="unsupported_parameter",
            )
    return [tool.model_dump(exclude_none=True) for tool in tools]


def template_calls(calls: list[ToolCall], *, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates want them: the arguments as an object.

    Raises:
        ApiError: 400 for arguments that are no JSON object.
    """
    found = []
    for at, call in enumerate(calls):
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            place = f"{where}.{at}.function.arguments"
            raise refused(f"{place} is not a JSON object", param=place)
        function = {"name": call.function.name, "arguments": arguments}
        found.append({"id": call.id, "type": "function", "function": function})
    return found


def new_call(call: dict[str, str]) -> dict[str, Any]:
    """A call that the model has made, in OpenAI's shape."""
    return {"id": new_id("call_"), "type": "function", "function": call}
