"""Answers being made: written to the history while they come, watched by any number of pages.

An answer belongs to the history, not to a page.  It goes on when the page is reloaded, and is
broken off when nobody has watched it for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.apps.history.store import History, Row
from mlx_mtp.apps.server.errors import ApiError

SAVE_S = 0.4
ALONE_S = 10.0
_STATES = {"stop": "done", "length": "length", "cancelled": "stopped", "tool_calls": "done"}


class Answer:
    """One answer, from its first token to its last.

    Args:
        message: number of the message that it fills.
        batch: the engine's side of it.
        archive: where it is written.
        alone_s: how long it goes on while nobody watches.
    """

    def __init__(
        self, message: int, batch: Batch, archive: Archive, *, alone_s: float = ALONE_S
    ) -> None:
        self.message = message
        self._batch = batch
        self._archive = archive
        self._alone_s = alone_s
        self._events: list[Row] = []
        self._unsaved: list[Row] = []
        self._watchers = 0
        self._ended = False
        self._stopped = ""
        self._news = asyncio.Event()
        self._group_at = time.monotonic()

    async def run(self) -> None:
        """Take what the engine sends until it ends; see to it that all of it is saved."""
        saving = asyncio.create_task(self._save_often())
        state, stats = "failed", {}
        self._leave_later()
        try:
            async for message in self._batch:
                state, stats = self._take(message, state, stats)
        except ApiError as error:
            stats = {"error": error.message}
            state = "interrupted" if error.status == 503 and self._events else "failed"
        finally:
            saving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await saving
        if self._stopped:
            state, stats = self._stopped, {}
        await self._save()
        await self._archive(History.finish, self.message, state, stats)
        self._tell({"type": "end", "state": state, "stats": stats})
        self._ended = True
        self._wake()

    def stop(self, state: str = "stopped") -> None:
        """Break it off; what has come stays."""
        if not self._ended and not self._stopped:
            self._stopped = state
            self._batch.cancel()
            # The engine is not waited for: it tells cancelled requests nothing.
            self._batch.put(ApiError(503, "stopped"))

    async def watch(self) -> AsyncGenerator[Row, None]:
        """All events from the first one on, and those to come."""
        self._watchers += 1
        at = 0
        try:
            while True:
                news = self._news
                while at < len(self._events):
                    at += 1
                    yield self._events[at - 1]
                if self._ended:
                    return
                await news.wait()
        finally:
            self._watchers -= 1
            self._leave_later()

    def _take(self, message: Message, state: str, stats: Row) -> tuple[str, Row]:
        match message["type"]:
            case "started":
                names = ("prompt_tokens", "cached_tokens")
                self._tell({"type": "started"} | {name: message[name] for name in names})
            case "prefill":
                self._tell({"type": "prefill", "done": message["done"]})
            case "group":
                now = time.monotonic()
                group = group_of(message, ms=(now - self._group_at) * 1e3)
                self._group_at = now
                self._unsaved.append(group)
                self._tell({"type": "group"} | group)
            case "finished":
                return _STATES[message["reason"]], message.get("stats", {})
        return state, stats

    def _tell(self, event: Row) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.shield(self._save())

    async def _save(self) -> None:
        groups, self._unsaved = self._unsaved, []
        if groups:
            text = "".join("".join(group["tokens"]) for group in groups)
            await self._archive(History.append, self.message, text, groups)

    def _leave_later(self) -> None:
        if not self._watchers and not self._ended:
            asyncio.get_running_loop().call_later(self._alone_s, self._leave)

    def _leave(self) -> None:
        if not self._watchers:
            self.stop("interrupted")


class Answers:
    """All answers being made.

    Args:
        archive: where they are written.
        alone_s: how long one goes on while nobody watches.
    """

    def __init__(self, archive: Archive, *, alone_s: float = ALONE_S) -> None:
        self._archive = archive
        self._alone_s = alone_s
        self._running: dict[int, tuple[Answer, asyncio.Task[None]]] = {}

    @property
    def busy(self) -> bool:
        """Whether one is being made."""
        return bool(self._running)

    def begin(self, message: int, batch: Batch) -> Answer:
        """Fill a message with what a batch of one job answers."""
        answer = Answer(message, batch, self._archive, alone_s=self._alone_s)
        task = asyncio.create_task(answer.run())
        self._running[message] = (answer, task)
        task.add_done_callback(lambda done: self._running.pop(message, None))
        return answer

    def get(self, message: int) -> Answer | None:
        """The answer that fills a message now, if one does."""
        running = self._running.get(message)
        return running and running[0]

    async def close(self) -> None:
        """Break all of them off and wait until they are saved."""
        tasks = []
        for answer, task in list(self._running.values()):
            answer.stop("interrupted")
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=1.5)


def group_of(message: Message, *, ms: float) -> Row:
    """A step as the page and the history take it: the text of each token, and what was drafted."""
    return {
        "tokens": message["pieces"],
        "accepted": message["accepted"],
        "drafted": message["drafted"],
        "source": message["source"],
        "ms": round(ms, 2),
    }
