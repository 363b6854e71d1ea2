"""Tools and tool calls in OpenAI's form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mlx_mtp.apps.server.api.jobs import new_id
from mlx_mtp.apps.server.api.schemas import Fields
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.text.tool_prompt import as_object

_ANY = ("required", "any")  # the second is Mistral's and Anthropic's


class Function(Fields):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool of OpenAI's chat."""

    type: Literal["function"]
    function: Function


class CalledFunction(Fields):
    """A called function; the arguments are JSON text, or an object in the form of some clients."""

    name: str
    arguments: Any = None


class ToolCall(Fields):
    """A call in a conversation."""

    id: str = ""
    index: int | None = None  # of streamed calls, in which SDKs leave it
    type: str | None = None
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _from_custom(cls, value: Any) -> Any:
        """Take a call of a tool whose input is text, not JSON."""
        custom = value.get("custom") if isinstance(value, dict) else None
        if not isinstance(custom, dict):
            return value
        arguments = {"input": custom.get("input")}
        return value | {"function": {"name": custom.get("name"), "arguments": arguments}}


def chat_tools(
    tools: list[Tool] | None,
    choice: str | dict[str, Any] | None,
    *,
    parallel: bool | None = None,
) -> dict[str, Any]:
    """Return the fields of ``Job`` for tools: those of the chat template, and required calls.

    Args:
        tools: the request's tools.
        choice: "auto", "none", "required" or the name of a tool in one of OpenAI's two forms.
        parallel: whether several calls are allowed, unless one tool is required.

    Raises:
        ApiError: 400 if a call is required, of no tool or of one that the request does not have.
    """
    if choice == "none":
        return {}
    is_required = choice not in (None, "auto")
    required = _required_tools(tools or [], choice) if is_required else []
    if not tools:
        return {}
    fields: dict[str, Any] = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]}
    fields["parallel_tool_calls"] = parallel is not False and choice in (None, "auto", *_ANY)
    return fields | ({"required_tools": required} if is_required else {})


def _required_tools(tools: list[Tool], choice: str | dict[str, Any] | None) -> list[str]:
    """Names of the tools one of which must be called."""
    names = [tool.function.name for tool in tools]
    if choice in _ANY and names:
        return names
    if choice in names:
        return [choice]
    if isinstance(choice, dict) and choice.get("type") in ("function", "tool"):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        if name in names:
            return [name]
    raise refused(
        "tool_choice must be 'auto', 'none', 'required' or name one of the tools",
        param="tool_choice",
    )


def template_calls(calls: list[ToolCall]) -> list[dict[str, Any]]:
    """Convert calls to the form that chat templates take, with arguments as an object.

    Arguments that are not an object are accepted: models write them, and clients return them.
    """
    return [template_call(call.id, call.function.name, call.function.arguments) for call in calls]


def template_call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """Return a call in the form that chat templates take."""
    function = {"name": name, "arguments": as_object(arguments)}
    return {"id": call_id, "type": "function", "function": function}


def new_call(call: dict[str, str]) -> dict[str, Any]:
    """Return a call of the model in OpenAI's form."""
    return {"id": new_id("call_"), "type": "function", "function": call}
