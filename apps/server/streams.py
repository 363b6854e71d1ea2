"""Server-sent events, and cancellation when a client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
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
    """Encode one event."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream:
    """A response that streams events and stops when the client disconnects.

    Args:
        events: the encoded events; closed when the stream ends for any reason.
        failed: returns the last event after an error.
        ping_s: time after which a silent stream sends a comment.
        ended: called when the stream ends, even if no event was sent.
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
        try:
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, self._send(send))
        finally:
            self._ended()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with contextlib.aclosing(self._with_pings(self._with_error())) as pieces:
            async for data in pieces:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _with_error(self) -> AsyncGenerator[bytes, None]:
        """The events; an error becomes the last one."""
        async with contextlib.aclosing(self._events) as events:
            try:
                async for data in events:
                    yield data
            except ApiError as error:
                yield self._failed(error)

    async def _with_pings(self, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events, with comments while there is none for a while."""
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
                done, _ = await asyncio.wait({pending}, timeout=self._ping_s)
                if not done:
                    yield PING
                    continue
                try:
                    data = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                yield data
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await events.aclose()


class Reply(Protocol):
    """Formats an answer for an API."""

    def events(self, batch: Batch, first: Any) -> AsyncGenerator[bytes, None]:
        """Yield the response as events."""
        ...

    def whole(self, batch: Batch, first: Any) -> Coroutine[Any, Any, Any]:
        """Return the whole response."""
        ...


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for a coroutine until the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected; the coroutine is cancelled.
    """
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, disconnect):
            task.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
