"""``POST /v1/messages``: Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request

from mlx_mtp.apps.engine.batch import Batch, Choice, group_details
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.server.api.anthropic_schema import (
    MessagesRequest,
    conversation,
    function_tools,
    openai_choice,
    tool_use,
)
from mlx_mtp.apps.server.api.jobs import Desk, new_id
from mlx_mtp.apps.server.api.reports import mtp_summary, timings, usage
from mlx_mtp.apps.server.api.tools import Tool, chat_tools
from mlx_mtp.apps.server.body import read_body
from mlx_mtp.apps.server.errors import refused
from mlx_mtp.apps.server.replies import json_response
from mlx_mtp.apps.server.streams import answer, event

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create(request: Request) -> Any:
    """Answer a conversation, streamed or not."""
    desk: Desk = request.app.state.desk
    body = await read_body(request, MessagesRequest, desk.settings)
    desk.check_model(body.model)
    batch, first = await desk.begin(request, [_job(body, desk)])
    reply = _Reply(body, desk)
    return await answer(
        request,
        reply,
        batch,
        first,
        stream=bool(body.stream),
        failed=lambda error: event(error.anthropic(), name="error"),
    )


def _job(body: MessagesRequest, desk: Desk) -> dict[str, Any]:
    if body.temperature is not None and body.temperature > 1:
        raise refused("temperature: should be at most 1", param="temperature")
    given = [Tool.model_validate(tool) for tool in function_tools(body.tools)]
    choice, parallel = openai_choice(body.tool_choice)
    tools = chat_tools(given, choice, desk.info, parallel=parallel)
    job = desk.job(body, max_tokens=body.max_tokens) | tools
    return job | {
        "stop": body.stop_sequences,
        "messages": conversation(body, has_tools=desk.info.has_tools),
    }


class _Reply:
    """Writes an answer in the shape of Messages."""

    def __init__(self, body: MessagesRequest, desk: Desk) -> None:
        self._details = body.speculation.details
        self._head = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": desk.model_id,
        }
        self._choice = Choice()

    async def whole(self, batch: Batch, first: Message) -> Any:
        """The answer in one piece."""
        self._choice.add(first)
        async for message in batch:
            self._choice.add(message)
        calls = self._calls()
        text = self._choice.text
        blocks = [{"type": "text", "text": text, "citations": None}] if text or not calls else []
        content = self._head | {"content": [*blocks, *calls]} | self._ending()
        return json_response(content | {"usage": self._usage()} | self._costs())

    async def events(self, batch: Batch, first: Message) -> AsyncGenerator[bytes, None]:
        """The answer as events in the order of Anthropic's."""
        self._choice.add(first)
        message = self._head | {"content": [], "stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=message | {"usage": self._usage()})
        begun = False
        async for message in batch:
            self._choice.add(message)
            if message["type"] == "group" and (message["text"] or self._details):
                if not begun:
                    yield _block_start(0, {"type": "text", "text": "", "citations": None})
                begun = True
                delta = {"type": "text_delta", "text": message["text"]}
                more = {"mtp": group_details(message)} if self._details else {}
                yield _event("content_block_delta", index=0, delta=delta, **more)
        for data in self._end(begun):
            yield data
        yield _event("message_delta", delta=self._ending(), usage=self._usage(), **self._costs())
        yield _event("message_stop")

    def _end(self, begun: bool) -> Iterator[bytes]:
        """Close the text, then hand out the calls."""
        calls = self._calls()
        if not begun and not calls:
            yield _block_start(0, {"type": "text", "text": "", "citations": None})
            begun = True
        if begun:
            yield _event("content_block_stop", index=0)
        for at, call in enumerate(calls, start=int(begun)):
            given = json.dumps(call["input"], ensure_ascii=False)
            yield _block_start(at, call | {"input": {}})
            delta = {"type": "input_json_delta", "partial_json": given}
            yield _event("content_block_delta", index=at, delta=delta)
            yield _event("content_block_stop", index=at)

    def _calls(self) -> list[dict[str, Any]]:
        calls = self._choice.finished["tool_calls"]
        return [tool_use(call, new_id("toolu_")) for call in calls]

    def _ending(self) -> dict[str, Any]:
        string = self._choice.finished["stop_string"]
        reason = "stop_sequence" if string is not None else _REASONS[self._choice.reason]
        return {"stop_reason": reason, "stop_sequence": string}

    def _usage(self) -> dict[str, Any]:
        """Anthropic's counts: ids from the prefix cache are not among the input's."""
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


def _block_start(at: int, block: dict[str, Any]) -> bytes:
    return _event("content_block_start", index=at, content_block=block)
