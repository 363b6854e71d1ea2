"""Request models of OpenAI's Responses and their conversion to a conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.formats import TextFormat
from mlx_mtp.apps.server.api.reasoning import unsealed
from mlx_mtp.apps.server.api.schemas import (
    Fields,
    Limit,
    Many,
    OpenAISampled,
    flat_text,
    thoughts,
)
from mlx_mtp.apps.server.api.tool_kinds import joined_name, left_out
from mlx_mtp.apps.server.api.tools import Function, Tool, template_call
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.hints import Note, unnoted

ANSWERS = ("_call_output", "_search_output")  # what types of items that answer a call end with
STATE_TYPES = ("item_reference", "compaction", "compaction_summary", "context_compaction")


class ResponseTool(Fields, extra="allow"):
    """A tool; only functions, also those of namespaces, can be called."""

    type: str
    name: str | None = Field(None, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    tools: Many[ResponseTool] | None = None


class TextOptions(Fields):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Fields):
    """Options of reasoning."""

    effort: str | None = None
    summary: str | None = None


class InputItem(Fields, extra="allow"):
    """An item of the conversation: a message, a thought, a call or the output of a call."""

    type: str = "message"
    id: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Many[Any] | None = None
    summary: Many[Any] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    namespace: str | None = None
    name: str | None = None
    arguments: Any = None
    output: Any = None


class ResponsesRequest(OpenAISampled):
    """The request body."""

    input: str | Many[InputItem]
    instructions: str | None = None
    max_output_tokens: Limit | None = None
    text: TextOptions | None = None
    tools: Many[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include: list[Any] | None = None
    metadata: Any = None
    n: int | None = Field(None, ge=1, le=1)
    unsupported = (
        *OpenAISampled.unsupported,
        "background",
        "conversation",
        "previous_response_id",
        "prompt",
        "top_logprobs",
    )


def conversation(body: ResponsesRequest, note: Note = unnoted) -> list[dict[str, Any]]:
    """Return the messages for the chat template.

    Args:
        body: the request.
        note: logs what is left out.

    Raises:
        ApiError: 400 for an item that is not supported.
    """
    head = [] if body.instructions is None else [_message("system", body.instructions)]
    if isinstance(body.input, str):
        return [*head, _message("user", body.input)]
    items = _Items(head, note)
    answered = {item.call_id for item in body.input if item.type.endswith(ANSWERS)}
    for index, item in enumerate(body.input):
        items.add(item, f"input.{index}", is_answered=item.call_id in answered)
    if not items.messages:
        raise refused("input is empty", param="input")
    return items.messages


class _Items:
    """Turns items into messages: thoughts and calls are parts of the assistant's message."""

    def __init__(self, messages: list[dict[str, Any]], note: Note) -> None:
        self.messages = messages
        self._note = note
        self._thought = ""

    def add(self, item: InputItem, where: str, *, is_answered: bool) -> None:
        """Add the next item; calls other than of functions are kept if they are answered."""
        is_output = item.type.endswith(ANSWERS)
        is_call = item.type == "function_call" or (item.type.endswith("_call") and is_answered)
        if item.type == "message":
            self._add_message(item, where)
        elif item.type == "reasoning":
            self._thought += (
                thoughts(item.content) or unsealed(item.encrypted_content) or thoughts(item.summary)
            )
        elif is_call:
            self._add_call(item, where)
        elif is_output:
            output, place = item.output, f"{where}.output"
            text = flat_text(output, where=place, note=self._note, is_result=True)
            self.messages.append(_message("tool", text) | {"tool_call_id": item.call_id})
        elif item.type in STATE_TYPES:
            raise refused(
                f"{where}: items of type {item.type!r} refer to what this server does not store",
                param=where,
            )
        else:
            self._note(f"items of type {item.type[:60]!r} are left out of the prompt")

    def _add_message(self, item: InputItem, where: str) -> None:
        if item.role is None or (item.content is None and item.role != "assistant"):
            missing = "role" if item.role is None else "content"
            raise refused(f"{where}.{missing} is missing", param=f"{where}.{missing}")
        role = "system" if item.role == "developer" else item.role
        text = flat_text(
            item.content,
            where=f"{where}.content",
            note=self._note,
            is_answer=role == "assistant",
        )
        self.messages.append(_message(role, text))
        self._add_thought(thoughts(item.content))

    def _add_call(self, item: InputItem, where: str) -> None:
        """Add a call to the assistant's turn, which may contain several."""
        if item.type == "function_call" and item.name is None:
            raise refused(f"{where}.name is missing", param=f"{where}.name")
        name = item.name or item.type.removesuffix("_call")
        if item.namespace:
            name = joined_name(item.namespace, name)
        arguments = item.arguments if item.type == "function_call" else _other_arguments(item)
        call = template_call(item.call_id or item.id or "", name, arguments)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append(_message("assistant", ""))
        self._add_thought()
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _add_thought(self, more: str = "") -> None:
        """Add what was thought since the last message to an assistant's message."""
        if self.messages[-1]["role"] == "assistant" and (text := self._thought + more):
            self.messages[-1]["reasoning_content"] = text
        self._thought = ""


def _other_arguments(item: InputItem) -> Any:
    """The arguments of a call of another kind, such as a custom tool's text."""
    values: dict[str, Any] = item.model_extra or {}
    action = values.get("action") or item.arguments
    return action if isinstance(action, dict) else {"input": values.get("input", action)}


def function_tools(
    tools: list[ResponseTool] | None, note: Note = unnoted
) -> tuple[list[Tool], dict[str, dict[str, str]]]:
    """Return the functions in the form of chat completions.

    Returns:
        The functions, and for those in a namespace, by name, the fields that their calls have.

    Raises:
        ApiError: 400 for a function without a name.
    """
    functions: list[Tool] = []
    places: dict[str, dict[str, str]] = {}
    for index, tool in enumerate(tools or ()):
        where = f"tools.{index}"
        if tool.type == "namespace":
            for number, inner in enumerate(tool.tools or ()):
                if inner.type != "function":
                    left_out(inner.type, note)
                    continue
                function = _function(inner, f"{where}.tools.{number}")
                place = {"name": function.name, "namespace": tool.name or ""}
                function.name = joined_name(tool.name or "", function.name)
                places[function.name] = place
                functions.append(Tool(type="function", function=function))
        elif tool.type == "function":
            functions.append(Tool(type="function", function=_function(tool, where)))
        else:
            left_out(tool.type, note)
    return functions, places


def _function(tool: ResponseTool, where: str) -> Function:
    values: dict[str, Any] = tool.model_extra or {}
    if isinstance(inner := values.get("function"), dict):  # the form of chat completions
        tool = ResponseTool.model_validate({"type": tool.type} | inner)
    if not tool.name:
        raise refused(f"{where}.name is missing", param=f"{where}.name", code="missing_parameter")
    return Function(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}
