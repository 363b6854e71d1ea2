"""Request models of Anthropic's Messages and their conversion to a conversation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mlx_mtp.apps.server.api.formats import TextFormat
from mlx_mtp.apps.server.api.reasoning import unsealed
from mlx_mtp.apps.server.api.schemas import (
    MAX_STOPS,
    Fields,
    Limit,
    Many,
    Sampled,
    StopString,
    Thinking,
    flat_text,
    thoughts,
)
from mlx_mtp.apps.server.api.tool_kinds import left_out
from mlx_mtp.apps.server.api.tools import Function, Tool, template_call
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.hints import Note, unnoted
from mlx_mtp.text.tool_prompt import as_object

BILLING = "x-anthropic-billing-header:"  # a block of Claude Code that is new in every request


class Turn(Fields):
    """One message: text, or blocks of text, calls and results of calls."""

    role: Literal["user", "assistant", "system"]
    content: str | Many[Any] | None = None


class AnthropicTool(Fields):
    """A tool; only those of no type or of type ``custom`` can be called."""

    name: str | None = Field(None, min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str = "custom"


class OutputConfig(Fields):
    """Options of the answer."""

    effort: str | None = None
    format: TextFormat | None = None


class PromptRequest(Sampled):
    """What the prompt is made of: the body of ``count_tokens``."""

    messages: Many[Turn] = Field(min_length=1)
    system: str | Many[dict[str, Any]] | None = None
    tools: Many[AnthropicTool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: TextFormat | None = None
    unsupported = ("container",)


class MessagesRequest(PromptRequest):
    """The request body."""

    max_tokens: Limit
    stop_sequences: Many[StopString] | None = Field(None, max_length=MAX_STOPS)

    @property
    def format(self) -> TextFormat | None:
        """The format of the answer under either of its two names."""
        inner = self.output_config.format if self.output_config else None
        return inner or self.output_format


def conversation(body: PromptRequest, note: Note = unnoted) -> list[dict[str, Any]]:
    """Return the messages for the chat template.

    Args:
        body: the request.
        note: logs what is left out.

    Raises:
        ApiError: 400 for a block that is not supported.
    """
    messages: list[dict[str, Any]] = []
    system = body.system if isinstance(body.system, str) else _system_blocks(body.system)
    if system:
        text = flat_text(system, where="system", note=note)
        messages.append({"role": "system", "content": text})
    for index, turn in enumerate(body.messages):
        where = f"messages.{index}.content"
        if turn.content is None and turn.role != "assistant":
            raise refused(f"{where} is missing", param=where, code="missing_parameter")
        if not isinstance(turn.content, list):
            messages.append({"role": turn.role, "content": turn.content or ""})
        else:
            messages += _from_blocks(turn.role, turn.content, where, note)
    return messages


def _system_blocks(blocks: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The blocks without the one for billing, with which no prefix would be the same again."""
    return [block for block in blocks or () if not str(block.get("text", "")).startswith(BILLING)]


def function_tools(tools: list[AnthropicTool] | None, note: Note = unnoted) -> list[Tool]:
    """Return the tools that the client runs, in the form of chat completions.

    Raises:
        ApiError: 400 for a tool without name or schema.
    """
    functions = []
    for index, tool in enumerate(tools or ()):
        if tool.type != "custom":
            left_out(tool.type, note)
            continue
        for name in ("name", "input_schema"):
            if getattr(tool, name) is None:
                where = f"tools.{index}.{name}"
                raise refused(f"{where} is missing", param=where, code="missing_parameter")
        function = Function(
            name=tool.name or "", description=tool.description, parameters=tool.input_schema
        )
        functions.append(Tool(type="function", function=function))
    return functions


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
    role: str, blocks: list[dict[str, Any]], where: str, note: Note
) -> list[dict[str, Any]]:
    """The messages of one turn; each result of a call is a message of its own."""
    messages, texts, calls = [], [], []
    is_answer = role == "assistant"
    for index, block in enumerate(blocks):
        block = {"type": "text", "text": block} if isinstance(block, str) else block
        place, kind = f"{where}.{index}", block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "tool_result":
            content = _text(block.get("content") or None, f"{place}.content", note, is_result=True)
            call_id = block.get("tool_use_id")
            messages.append({"role": "tool", "content": content, "tool_call_id": call_id})
        else:
            texts.append(_text([block], where, note, start=index, is_answer=is_answer))
    thought = thoughts([_with_thinking(block) for block in blocks if isinstance(block, dict)])
    if texts or calls:
        message: dict[str, Any] = {"role": role, "content": "".join(texts)}
        message |= {"reasoning_content": thought} if thought else {}
        messages.append(message | ({"tool_calls": calls} if calls else {}))
    return messages or [{"role": role, "content": ""}]


def _with_thinking(block: dict[str, Any]) -> dict[str, Any]:
    """A block with the text that was omitted from it, which its signature contains."""
    return block | {"thinking": block.get("thinking") or unsealed(block.get("signature"))}


def _text(content: Any, where: str, note: Note, **more: Any) -> str:
    """The text of blocks, including documents and search results that are given as text."""
    if isinstance(content, list):
        content = [_as_text(block) for block in content]
    return flat_text(content, where=where, note=note, **more)


def _as_text(block: Any) -> Any:
    """A block of text for a document or a search result that has its text in the request."""
    if not isinstance(block, dict):
        return block
    source = block.get("source") if block.get("type") == "document" else None
    inner = block.get("content") if block.get("type") == "search_result" else None
    if isinstance(source, dict) and source.get("type") in ("text", "content"):
        inner = source.get("data") if source["type"] == "text" else source.get("content")
    if isinstance(inner, list) and all(isinstance(part, dict) for part in inner):
        texts = [part.get("text") for part in inner]
        inner = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(inner, str):
        return block
    titles = [block[name] for name in ("title", "source") if isinstance(block.get(name), str)]
    return {"type": "text", "text": "\n".join([*titles, inner, ""])}


def _call(block: dict[str, Any], place: str) -> dict[str, Any]:
    name = block.get("name")
    if not isinstance(name, str):
        raise refused(f"{place}.name is missing", param=f"{place}.name")
    return template_call(str(block.get("id")), name, block.get("input"))


def tool_use(call: dict[str, str], block_id: str) -> dict[str, Any]:
    """Return a call of the model as a block."""
    arguments = as_object(call["arguments"])
    return {"type": "tool_use", "id": block_id, "name": call["name"], "input": arguments}
