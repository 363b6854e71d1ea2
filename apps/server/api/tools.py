"""Tools in the dialects' shapes."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.engine.supervisor import EngineInfo
from mlx_mtp.apps.server.api.jobs import new_id
from mlx_mtp.apps.server.api.schemas import Strict
from mlx_mtp.apps.server.errors import refused


class Function(Strict):
    """A function that the model may call."""

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
    tools: list[Tool] | None,
    choice: str | dict[str, Any] | None,
    info: EngineInfo,
    *,
    parallel: bool | None = None,
) -> dict[str, Any]:
    """The part of a job that is about tools: the chat template's, and calls that must be made.

    Args:
        tools: as the request has them.
        choice: "auto", "none", "required" or the name of a tool in one of OpenAI's two forms.
        info: what the model is.
        parallel: whether several calls may be made, where some must be.

    Raises:
        ApiError: 400 where the model cannot do what is asked.
    """
    if choice == "none":
        return {}
    must = choice not in (None, "auto")
    called = _must_call(tools or [], choice, info) if must else []
    if not tools:
        return {}
    if not info.has_tools:
        raise refused(
            "the model's chat template knows no tools", param="tools", code="unsupported_parameter"
        )
    for at, tool in enumerate(tools):
        if tool.function.strict and not must:
            raise refused(
                "strict tools need tool_choice 'required' or the name of a tool: where the model "
                "may also write text, arguments cannot be held to a schema",
                param=f"tools.{at}.function.strict",
                code="unsupported_parameter",
            )
    job: dict[str, Any] = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]}
    if must:
        job |= {"must_call": called, "many_calls": choice == "required" and parallel is not False}
    return job


def _must_call(
    tools: list[Tool], choice: str | dict[str, Any] | None, info: EngineInfo
) -> list[str]:
    """Names of the tools of which one must be called."""
    names = [tool.function.name for tool in tools]
    if not info.holds_tools:
        raise refused(
            "tool_choice can be 'auto' or 'none' here: the model does not write calls as JSON "
            "between marks, so it cannot be held to them",
            param="tool_choice",
            code="unsupported_parameter",
        )
    if choice == "required" and names:
        return names
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        if name in names:
            return [name]
    raise refused(
        "tool_choice must be 'auto', 'none', 'required' or name one of the tools",
        param="tool_choice",
    )


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
