"""``POST /v1/messages``: Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice
from mlx_mtp.apps.engine.protocol import Group, Job, JobMessage
from mlx_mtp.apps.server.api.anthropic_schema import (
    MessagesRequest,
    PromptRequest,
    conversation,
    function_tools,
    openai_choice,
    tool_use,
)
from mlx_mtp.apps.server.api.formats import schema_format
from mlx_mtp.apps.server.api.jobs import ServerContext, new_id
from mlx_mtp.apps.server.api.reasoning import Delta, Deltas, reasoning_fields, sealed
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.schemas import token_limit
from mlx_mtp.apps.server.api.tool_kinds import job_tools
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import event

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create(request: Request) -> Any:
    """Answer a conversation, streamed or not."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, MessagesRequest)
    return await context.respond(
        request,
        [_job(body, context)],
        _Reply(body, context),
        stream=body.stream,
        failed=lambda error: event(error.anthropic(), name="error"),
    )


async def count_tokens(request: Request) -> Any:
    """Count the tokens of the prompt that a request would have."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, PromptRequest)
    job = Job(max_tokens=1, only="ids", **_prompt(body, context))
    started, _ = await context.encode(request, job)
    return json_response({"input_tokens": started.prompt_tokens})


def _job(body: MessagesRequest, context: ServerContext) -> Job:
    if body.temperature is not None and body.temperature > 1:
        raise refused("temperature: should be at most 1", param="temperature")
    prompt = _prompt(body, context)
    where = "output_config.format" if body.output_config else "output_format"
    format = schema_format(body.format, where)
    job = context.job(body, max_tokens=token_limit({"max_tokens": body.max_tokens}))
    stops = [stop for stop in body.stop_sequences or () if stop]
    return replace(job, stop=stops, **prompt, **format)


def _prompt(body: PromptRequest, context: ServerContext) -> dict[str, Any]:
    """The fields of ``Job`` that make the prompt: messages and tools."""
    note = context.hints.note
    choice, parallel = openai_choice(body.tool_choice)
    functions = function_tools(body.tools, note)
    tools = job_tools(functions, choice, parallel=parallel, note=note)
    thinking, output = body.thinking, body.output_config
    reasoning = reasoning_fields(
        context,
        enable=thinking.enable if thinking else None,
        effort=output.effort if output else None,
        budget=thinking.budget_tokens if thinking else None,
    )
    messages = conversation(body, note)
    return {"messages": messages} | tools | reasoning


class _Reply:
    """Formats an answer as a message."""

    def __init__(self, body: MessagesRequest, context: ServerContext) -> None:
        self._details = body.speculation.details
        self._is_omitted = bool(body.thinking and body.thinking.display == "omitted")
        self._head = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": context.model_id,
        }
        self._choice = Choice()
        self._kind = ""  # of the open block
        self._index = -1

    async def whole(self, batch: Batch, first: JobMessage) -> Any:
        """Return the whole response."""
        self._choice.add(first)
        async for message in batch:
            self._choice.add(message)
        calls = self._calls()
        text, thought = self._choice.text, self._choice.reasoning
        thinking = _block("reasoning", thought) | ({"thinking": ""} if self._is_omitted else {})
        blocks: list[Any] = [thinking] if thought else []
        blocks += [_block("text", text)] if text or not (calls or thought) else []
        content = self._head | {"content": [*blocks, *calls]} | self._ending()
        return json_response(content | {"usage": self._usage()} | self._costs())

    async def events(self, batch: Batch, first: JobMessage) -> AsyncGenerator[bytes, None]:
        """Yield the response as events in Anthropic's order."""
        self._choice.add(first)
        head = self._head | {"content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=head | {"usage": self._usage()})
        deltas = Deltas(details=self._details)
        async for message in batch:
            self._choice.add(message)
            for delta in deltas.of(message) if isinstance(message, Group) else ():
                for data in self._delta(delta):
                    yield data
        for delta in deltas.finish():
            for data in self._delta(delta):
                yield data
        for data in self._end():
            yield data
        yield _event("message_delta", delta=self._ending(), usage=self._usage(), **self._costs())
        yield _event("message_stop")

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        """Add a piece to its block, which is begun where the kind changes."""
        kind, text, more = delta
        if kind != self._kind:
            yield from self._close()
            self._kind = kind
            self._index += 1
            yield _block_start(self._index, _block(kind, ""))
        field = "thinking" if kind == "reasoning" else "text"
        if kind == "reasoning" and self._is_omitted:
            text = ""
        if not (text or more):
            return
        piece = {"type": f"{field}_delta", field: text}
        yield _event("content_block_delta", index=self._index, delta=piece, **more)

    def _close(self) -> Iterator[bytes]:
        """End the open block."""
        if self._kind == "reasoning":
            piece = {"type": "signature_delta", "signature": sealed(self._choice.reasoning)}
            yield _event("content_block_delta", index=self._index, delta=piece)
        if self._kind:
            yield _event("content_block_stop", index=self._index)

    def _end(self) -> Iterator[bytes]:
        """Close the text, then yield the calls."""
        calls = self._calls()
        if not self._kind and not calls:
            self._kind, self._index = "text", 0
            yield _block_start(0, _block("text", ""))
        yield from self._close()
        for index, call in enumerate(calls, start=self._index + 1):
            arguments = json.dumps(call["input"], ensure_ascii=False)
            yield _block_start(index, call | {"input": {}})
            delta = {"type": "input_json_delta", "partial_json": arguments}
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)

    def _calls(self) -> list[dict[str, Any]]:
        return [tool_use(call, new_id("toolu_")) for call in self._choice.result.tool_calls]

    def _ending(self) -> dict[str, Any]:
        result = self._choice.result
        if result.stop_string is not None and result.reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": result.stop_string}
        return {"stop_reason": _REASONS[result.reason], "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Anthropic's counts: ``input_tokens`` excludes tokens from the prefix cache."""
        choice = self._choice
        counts: dict[str, Any] = {
            "input_tokens": choice.prompt_tokens - choice.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.cached_tokens,
            "output_tokens": 0,
        }
        if choice.finished:
            openai = usage([choice])
            counts["output_tokens"] = openai["completion_tokens"]
            counts["completion_tokens_details"] = openai["completion_tokens_details"]
        return counts

    def _costs(self) -> dict[str, Any]:
        costs: dict[str, Any] = {"timings": timings(self._choice)}
        if self._details:
            costs["mtp"] = mtp_summary(self._choice)
        return costs


def _event(kind: str, **more: Any) -> bytes:
    return event({"type": kind} | more, name=kind)


def _block_start(index: int, block: dict[str, Any]) -> bytes:
    return _event("content_block_start", index=index, content_block=block)


def _block(kind: str, text: str) -> dict[str, Any]:
    """A block of text or of reasoning; an empty one has no signature yet."""
    if kind == "text":
        return {"type": "text", "text": text, "citations": None}
    return {"type": "thinking", "thinking": text, "signature": sealed(text) if text else ""}
