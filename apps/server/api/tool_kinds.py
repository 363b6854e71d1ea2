"""Tools of a request that the model may call: functions, in the form of chat completions.

Kinds that the server would have to run, such as a web search, are left out of the prompt and
noted.  The functions of a namespace (Codex groups those of an MCP server so) have its name in
front, and their calls are handed out with both names.
"""

from __future__ import annotations

from typing import Any

from mlx_mtp.apps.server.api.schemas import Fields
from mlx_mtp.apps.server.api.tools import Function, Tool, chat_tools
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.hints import Note, unnoted

Choice = str | dict[str, Any] | None
SEPARATOR = "__"


class AnyTool(Fields):
    """A tool of OpenAI's chat; only functions are used."""

    type: str = "function"
    function: Function | None = None


def chat_functions(tools: list[AnyTool] | None, note: Note = unnoted) -> list[Tool]:
    """Return the functions among the tools.

    Raises:
        ApiError: 400 for a function without its description.
    """
    functions = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "function":
            left_out(tool.type, note)
        elif tool.function is None:
            name = f"tools.{index}.function"
            raise refused(f"{name} is missing", param=name, code="missing_parameter")
        else:
            functions.append(Tool(type="function", function=tool.function))
    return functions


def left_out(kind: str, note: Note) -> None:
    """Note a tool that the model is not shown."""
    note(f"tools of type {kind[:60]!r} are left out of the prompt: the server cannot run them")


def joined_name(namespace: str, name: str) -> str:
    """Name of a function of a namespace in the prompt."""
    return f"{namespace.removesuffix(SEPARATOR)}{SEPARATOR}{name}"


def job_tools(
    functions: list[Tool],
    choice: Choice,
    *,
    parallel: bool | None = None,
    note: Note = unnoted,
) -> dict[str, Any]:
    """Return the fields of ``Job`` for tools; see ``chat_tools``.

    Raises:
        ApiError: 400 if a call is required, of no tool or of one that the request does not have.
    """
    functions, choice = allowed_functions(functions, choice)
    fields = chat_tools(functions, choice, parallel=parallel)
    if "required_tools" not in fields and any(tool.function.strict for tool in functions):
        note("strict tools are enforced only if a call is required")
    return fields


def allowed_functions(functions: list[Tool], choice: Choice) -> tuple[list[Tool], Choice]:
    """Apply a ``tool_choice`` of type ``allowed_tools``; others are returned unchanged.

    Raises:
        ApiError: 400 if it allows a function that the request does not have.
    """
    if not isinstance(choice, dict):
        return functions, choice
    kind = choice.get("type")
    if kind in ("auto", "none", "required", "any"):
        return functions, kind
    if kind != "allowed_tools":
        return functions, choice
    allowed = choice.get("allowed_tools", choice)
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if not isinstance(tools, list):
        raise refused("tool_choice.tools must be a list", param="tool_choice")
    names = {name for tool in tools if (name := _function_name(tool))}
    kept = [tool for tool in functions if tool.function.name in names]
    if len({tool.function.name for tool in kept}) < len(names):
        raise refused("tool_choice allows a function that is missing in tools", param="tool_choice")
    return kept, allowed.get("mode", "auto")


def _function_name(tool: Any) -> str | None:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return None
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
