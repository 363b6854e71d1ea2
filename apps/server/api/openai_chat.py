"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator
from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice, group_details
from mlx_mtp.apps.engine.protocol import Finished, Group, Job, JobMessage, Started
from mlx_mtp.apps.server.api.formats import ResponseFormat, chat_format
from mlx_mtp.apps.server.api.jobs import FINGERPRINT, ServerContext, choices_of, new_id, now
from mlx_mtp.apps.server.api.reasoning import reasoning_fields
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.schemas import (
    Fields,
    Limit,
    Many,
    OpenAISampled,
    Thinking,
    flat_text,
    thoughts,
    token_limit,
)
from mlx_mtp.apps.server.api.tool_kinds import AnyTool, chat_functions, job_tools
from mlx_mtp.apps.server.api.tools import ToolCall, new_call, template_calls
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.hints import Note
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import DONE, event

MAX_TOP_LOGPROBS = 20
_RESERVED_KWARGS = {
    "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message",
    "chat_template", "return_dict", "conversation", "documents", "return_tensors",
}  # fmt: skip


class ChatMessage(Fields):
    """One message of a conversation; SDKs send the last fields back with an answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: Many[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: Any = None
    reasoning: Any = None
    unsupported = ("audio", "function_call")


class Reasoning(Fields):
    """Options of reasoning in the form of OpenRouter."""

    effort: str | None = None
    max_tokens: int | None = None
    enabled: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_value(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return {"enabled": value}
        return {"effort": value} if isinstance(value, str) else value


class ChatRequest(OpenAISampled):
    """The request body."""

    messages: Many[ChatMessage] = Field(min_length=1)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=-1, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Many[AnyTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    reasoning: Reasoning | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    thinking_budget: int | None = None
    reasoning_format: str | None = None
    unsupported = (
        *OpenAISampled.unsupported,
        "audio",
        "chat_template",
        "documents",
        "function_call",
        "functions",
    )


async def create(request: Request) -> Any:
    """Answer a conversation, streamed or not."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, ChatRequest)
    jobs = choices_of(_job(body, context), body.n or 1)
    reply = _Reply(body, context, len(jobs))
    return await context.respond(request, jobs, reply, stream=body.stream)


def _job(body: ChatRequest, context: ServerContext) -> Job:
    top_logprobs = max(0, body.top_logprobs or 0)  # mlx-lm has -1 for none
    if top_logprobs and not body.logprobs:
        raise refused("top_logprobs needs logprobs to be true", param="top_logprobs")
    limits = {name: getattr(body, name) for name in ("max_tokens", "max_completion_tokens")}
    note = context.hints.note
    tools = job_tools(
        chat_functions(body.tools, note),
        body.tool_choice,
        parallel=body.parallel_tool_calls,
        note=note,
    )
    format = chat_format(body.response_format)
    return replace(
        context.openai_job(body, max_tokens=token_limit(limits)),
        messages=conversation(body, context),
        template_config=_template_config(body.chat_template_kwargs),
        **_reasoning(body, context),
        top_logprobs=top_logprobs if body.logprobs else None,
        **tools,
        **format,
    )


def _reasoning(body: ChatRequest, context: ServerContext) -> dict[str, Any]:
    """The fields of ``Job`` for reasoning, which clients set under several names."""
    options, thinking = body.reasoning or Reasoning(), body.thinking or Thinking()
    enable = options.enabled if body.enable_thinking is None else body.enable_thinking
    enable = thinking.enable if enable is None else enable
    budgets = (body.thinking_budget, thinking.budget_tokens, options.max_tokens)
    return reasoning_fields(
        context,
        enable=enable,
        effort=body.reasoning_effort or options.effort,
        budget=next((budget for budget in budgets if budget is not None), None),
        format=body.reasoning_format,
    )


def _template_config(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for the chat template, except those that the server sets."""
    for name in kwargs or {}:
        if name in _RESERVED_KWARGS or not name.isidentifier():
            where = f"chat_template_kwargs.{name[:40]}"
            raise refused(f"{where} cannot be set", param="chat_template_kwargs")
    return kwargs or {}


def conversation(body: ChatRequest, context: ServerContext) -> list[dict[str, Any]]:
    """Return the messages for the chat template.

    Raises:
        ApiError: 400 for content that is not supported.
    """
    return [
        _template_message(message, f"messages.{index}", context.hints.note)
        for index, message in enumerate(body.messages)
    ]


def _template_message(message: ChatMessage, where: str, note: Note) -> dict[str, Any]:
    """Convert a message to the form that chat templates take."""
    role = "system" if message.role == "developer" else message.role
    content, is_answer = message.content, role == "assistant"
    text = flat_text(
        content,
        where=f"{where}.content",
        note=note,
        is_answer=is_answer,
        is_result=role == "tool",
    )
    converted: dict[str, Any] = {"role": role, "content": text or message.refusal or ""}
    thought = message.reasoning_content or message.reasoning or thoughts(content)
    if thought and isinstance(thought, str):
        converted["reasoning_content"] = thought
    if message.name is not None:
        converted["name"] = message.name
    if message.tool_calls:
        converted["tool_calls"] = template_calls(message.tool_calls)
    elif content is None and not is_answer and role != "tool":
        raise refused(f"{where}.content is missing", param=f"{where}.content")
    if message.tool_call_id is not None:
        converted["tool_call_id"] = message.tool_call_id
    return converted


class _Reply:
    """Formats answers as chat completions."""

    def __init__(self, body: ChatRequest, context: ServerContext, count: int) -> None:
        self._head = {
            "id": new_id("chatcmpl-"),
            "created": now(),
            "model": context.model_id,
            "system_fingerprint": FINGERPRINT,
        }
        self._details = body.speculation.details
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._choices = [Choice() for _ in range(count)]

    async def whole(self, batch: Batch, first: JobMessage) -> Any:
        """Return the whole response."""
        self._choices[first.index].add(first)
        async for message in batch:
            self._choices[message.index].add(message)
        content = self._head | {
            "object": "chat.completion",
            "choices": [self._choice(index, choice) for index, choice in enumerate(self._choices)],
            "usage": usage(self._choices),
            "timings": timings(self._choices[0]),
        }
        return json_response(content)

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        calls = [new_call(call) for call in choice.result.tool_calls]
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if calls:
            message |= {"content": choice.text or None, "tool_calls": calls}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        content = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs_of(choice.logprobs),
            "finish_reason": choice.result.reason,
        }
        if self._details:
            content["mtp"] = mtp_summary(choice) | {"groups": choice.groups}
        return content

    async def events(self, batch: Batch, first: JobMessage) -> AsyncGenerator[bytes, None]:
        """Yield the response as events, one per step."""
        for data in self._events_of(first):
            yield data
        async for message in batch:
            for data in self._events_of(message):
                yield data
        if self._usage:
            yield self._event([], usage=usage(self._choices), timings=timings(self._choices[0]))
        yield DONE

    def _events_of(self, message: JobMessage) -> list[bytes]:
        index = message.index
        self._choices[index].add(message)
        match message:
            case Started():
                return [self._delta(index, {"role": "assistant", "content": "", "refusal": None})]
            case Group():
                return self._group(index, message)
            case Finished():
                return self._end(index, self._choices[index])
        return []

    def _group(self, index: int, message: Group) -> list[bytes]:
        delta = {"reasoning_content": message.reasoning} if message.reasoning else {}
        if message.text or not message.reasoning:
            delta["content"] = message.text
        if not (any(delta.values()) or self._details or self._logprobs):
            return []
        more: dict[str, Any] = {"mtp": group_details(message)} if self._details else {}
        logprobs = self._logprobs_of(message.logprobs or [])
        return [self._delta(index, delta, logprobs=logprobs, **more)]

    def _end(self, index: int, choice: Choice) -> list[bytes]:
        calls = [
            {"index": number} | new_call(call)
            for number, call in enumerate(choice.result.tool_calls)
        ]
        events = [self._delta(index, {"tool_calls": calls})] if calls else []
        more: dict[str, Any] = {"timings": timings(choice)}
        if self._details:
            more["mtp"] = mtp_summary(choice)
        return [*events, self._delta(index, {}, reason=choice.result.reason, **more)]

    def _logprobs_of(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._logprobs else None

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._event([choice], **more)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head | {"object": "chat.completion.chunk", "choices": choices}
        if self._usage:
            head["usage"] = None
        return event(head | more)
