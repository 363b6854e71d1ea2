"""``POST /v1/responses``: OpenAI's Responses; nothing is stored between requests."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice
from mlx_mtp.apps.engine.protocol import Group, Job, JobMessage
from mlx_mtp.apps.server.api.formats import TextFormat, schema_format
from mlx_mtp.apps.server.api.jobs import ServerContext, new_id, now
from mlx_mtp.apps.server.api.reasoning import Delta, Deltas, Kind, reasoning_fields, sealed
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.responses_schema import ResponsesRequest, conversation, function_tools
from mlx_mtp.apps.server.api.schemas import token_limit
from mlx_mtp.apps.server.api.tool_kinds import job_tools
from mlx_mtp.apps.server.api.tools import Tool
from mlx_mtp.apps.server.errors import ApiError, refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import event

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"
_NAMES: dict[Kind, str] = {"reasoning": "reasoning_text", "text": "output_text"}


async def create(request: Request) -> Any:
    """Answer a conversation, streamed or not."""
    context: ServerContext = request.app.state.context
    body = await context.read(request, ResponsesRequest)
    functions, places = function_tools(body.tools, context.hints.note)
    job, reply = _job(body, context, functions), _Reply(body, context, places)
    return await context.respond(
        request,
        [job],
        reply,
        stream=body.stream,
        failed=reply.failed,
        messages_param="input",
    )


def _job(body: ResponsesRequest, context: ServerContext, functions: list[Tool]) -> Job:
    if LOGPROBS in (body.include or ()):
        raise refused(f"include: {LOGPROBS} is not supported", param="include")
    note = context.hints.note
    max_tokens = token_limit({"max_output_tokens": body.max_output_tokens})
    tools = job_tools(functions, body.tool_choice, parallel=body.parallel_tool_calls, note=note)
    return replace(
        context.openai_job(body, max_tokens=max_tokens),
        messages=conversation(body, note),
        **reasoning_fields(context, effort=body.reasoning.effort if body.reasoning else None),
        **tools,
        **schema_format(_format(body), "text.format"),
    )


def _format(body: ResponsesRequest) -> TextFormat | None:
    return body.text.format if body.text else None


class _Reply:
    """Formats an answer as a response."""

    def __init__(
        self, body: ResponsesRequest, context: ServerContext, places: dict[str, dict[str, str]]
    ) -> None:
        self._body = body
        self._places = places
        self._details = body.speculation.details
        self._model = context.model_id
        self._id = new_id("resp_")
        self._created = now()
        self._is_encrypted = ENCRYPTED in (body.include or ())
        summary = body.reasoning.summary if body.reasoning else None
        self._is_summarized = summary not in (None, "", "none")
        self._open: dict[str, Any] = {}  # the item that pieces are added to
        self._text = ""  # of that item
        self._choice = Choice()
        self._numbers = itertools.count()
        self._output: list[dict[str, Any]] = []

    async def whole(self, batch: Batch, first: JobMessage) -> Any:
        """Return the whole response."""
        self._choice.add(first)
        async for message in batch:
            self._choice.add(message)
        text, thought, calls = self._choice.text, self._choice.reasoning, self._calls()
        self._output += [self._item("reasoning", thought)] if thought else []
        self._output += [self._item("text", text)] if text or not (calls or thought) else []
        self._output += calls
        return json_response(self._response())

    async def events(self, batch: Batch, first: JobMessage) -> AsyncGenerator[bytes, None]:
        """Yield the response as events in OpenAI's order."""
        self._choice.add(first)
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())
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
        done = self._response()
        yield self._event(f"response.{done['status']}", response=done)

    def failed(self, error: ApiError) -> bytes:
        """The last event after an error."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _delta(self, delta: Delta) -> Iterator[bytes]:
        """Add a piece to its item, which is begun where the kind changes."""
        kind, text, more = delta
        if kind != self._kind:
            yield from self._close()
            yield from self._begin(kind)
        self._text += text
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        yield self._part_event(f"{_NAMES[kind]}.delta", delta=text, **logprobs, **more)
        if kind == "reasoning" and self._is_summarized and text:
            yield self._summary_event("text.delta", delta=text)

    @property
    def _kind(self) -> Kind | None:
        """The kind of the open item."""
        if not self._open:
            return None
        return "reasoning" if self._open["type"] == "reasoning" else "text"

    def _begin(self, kind: Kind) -> Iterator[bytes]:
        self._open, self._text = self._item(kind, ""), ""
        empty: dict[str, Any] = {"status": "in_progress", "content": []}
        empty |= {"summary": []} if kind == "reasoning" else {}
        item, index = self._open | empty, len(self._output)
        yield self._event("response.output_item.added", output_index=index, item=item)
        yield self._part_event("content_part.added", part=_part(kind, ""))
        if kind == "reasoning" and self._is_summarized:
            yield self._summary_event("part.added", part=_summary(""))

    def _close(self) -> Iterator[bytes]:
        """End the open item."""
        kind, text = self._kind, self._text
        if kind is None:
            return
        logprobs: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        yield self._part_event(f"{_NAMES[kind]}.done", text=text, **logprobs)
        yield self._part_event("content_part.done", part=_part(kind, text))
        if kind == "reasoning" and self._is_summarized:
            yield self._summary_event("text.done", text=text)
            yield self._summary_event("part.done", part=_summary(text))
        item = self._item(kind, text) | {"id": self._open["id"]}
        if item["status"] == "in_progress":  # another item follows
            item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._open = {}

    def _end(self) -> Iterator[bytes]:
        """Close the open item, then yield the calls."""
        calls = self._calls()
        if not (self._open or self._output or calls):
            yield from self._begin("text")
        yield from self._close()
        for call in calls:
            index = len(self._output)
            place = {"output_index": index, "item_id": call["id"]}
            empty = call | {"arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=empty)
            kind = "response.function_call_arguments"
            yield self._event(f"{kind}.delta", delta=call["arguments"], **place)
            yield self._event(
                f"{kind}.done", arguments=call["arguments"], name=call["name"], **place
            )
            yield self._event("response.output_item.done", output_index=index, item=call)
            self._output.append(call)

    def _event(self, kind: str, **more: Any) -> bytes:
        data = {"type": kind, "sequence_number": next(self._numbers)}
        return event(data | more, name=kind)

    def _part_event(self, what: str, **more: Any) -> bytes:
        place = {"item_id": self._open["id"], "output_index": len(self._output), "content_index": 0}
        return self._event(f"response.{what}", **place, **more)

    def _summary_event(self, what: str, **more: Any) -> bytes:
        place = {"item_id": self._open["id"], "output_index": len(self._output), "summary_index": 0}
        return self._event(f"response.reasoning_summary_{what}", **place, **more)

    def _item(self, kind: Kind, text: str) -> dict[str, Any]:
        """An item of text or of reasoning."""
        is_done = kind == "reasoning" and self._choice.text
        status = "completed" if is_done else self._status()
        item: dict[str, Any] = {"status": status, "content": [_part(kind, text)]}
        if kind == "text":
            return item | {"id": new_id("msg_"), "type": "message", "role": "assistant"}
        summary = [_summary(text)] if self._is_summarized else []
        content = sealed(text) if self._is_encrypted else None
        item |= {"id": new_id("rs_"), "type": "reasoning", "summary": summary}
        return item | {"encrypted_content": content}

    def _calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": new_id("fc_"),
                "type": "function_call",
                "status": "completed",
                "call_id": new_id("call_"),
                **call,
                **self._places.get(call["name"], {}),
            }
            for call in self._choice.result.tool_calls
        ]

    def _status(self) -> str:
        if not self._choice.finished:
            return "in_progress"
        return "incomplete" if self._choice.result.reason == "length" else "completed"

    def _response(self) -> dict[str, Any]:
        """The response object in its current state."""
        body, status = self._body, self._status()
        why = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": why,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}
            | (body.reasoning.model_dump() if body.reasoning else {}),
            "store": False,
            "temperature": body.temperature,
            "text": {"format": _format_echo(body)},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        return response | (self._costs() if self._choice.finished else {})

    def _costs(self) -> dict[str, Any]:
        counts = usage([self._choice])
        costs: dict[str, Any] = {
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
            },
            "timings": timings(self._choice),
        }
        if self._details:
            costs["mtp"] = mtp_summary(self._choice)
        return costs


def _format_echo(body: ResponsesRequest) -> dict[str, Any]:
    format = _format(body)
    return (
        {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
    )


def _part(kind: Kind, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _summary(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}
