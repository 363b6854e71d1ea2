"""Server-sent events, and what happens when a client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.server.errors import ApiError

PING = b": still here\n\n"
DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
Result = TypeVar("Result")


def event(data: Any, *, name: str | None = None) -> bytes:
    """One event."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """A response that sends events as they come and stops when nobody listens any more.

    Args:
        events: the events as bytes; closed when the stream ends, however it ends.
        failed: the last event after an error.
        ping_s: how long it may be silent before a comment is sent.
        ended: called when the stream ends, even if its first event was never asked for.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        failed: Callable[[ApiError], bytes],
        ping_s: float,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._events = events
        self._failed = failed
        self._ping_s = ping_s
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended()
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with contextlib.aclosing(self._pinged(self._told())) as pieces:
            async for data in pieces:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _told(self) -> AsyncGenerator[bytes, None]:
        """The events, and an error as the last of them."""
        async with contextlib.aclosing(self._events) as events:
            try:
                async for data in events:
                    yield data
            except ApiError as error:
                yield self._failed(error)

    async def _pinged(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events, with comments where they are long in coming."""
        coming: asyncio.Future[bytes] | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
                done, _ = await asyncio.wait({coming}, timeout=self._ping_s)
                if not done:
                    yield PING
                    continue
                try:
                    data = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield data
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
            await events.aclose()


class Reply(Protocol):
    """An answer in the shape of an API."""

    def events(self, batch: Batch, first: Any) -> AsyncGenerator[bytes, None]:
        """It as a stream."""
        ...

    def whole(self, batch: Batch, first: Any) -> Coroutine[Any, Any, Any]:
        """It at once."""
        ...


async def answer(
    request: Request,
    reply: Reply,
    batch: Batch,
    first: Any,
    *,
    stream: bool,
    failed: Callable[[ApiError], bytes] = lambda error: event(error.openai()),
) -> Any:
    """The response to a request, streamed or whole; the batch is cancelled when it ends.

    Args:
        request: from a client that may go away; the settings are found through it.
        reply: the answer in the API's shape.
        batch: what the engine works on.
        first: its first message.
        stream: whether the client asked for a stream.
        failed: the last event of a stream after an error.
    """
    if stream:
        events, ping_s = reply.events(batch, first), request.app.state.desk.settings.ping_s
        return EventStream(events, failed=failed, ping_s=ping_s, ended=batch.cancel)
    try:
        return await unless_gone(request, reply.whole(batch, first))
    finally:
        batch.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for something as long as the client does.

    Raises:
        ClientDisconnect: it has gone; the work is cancelled.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
