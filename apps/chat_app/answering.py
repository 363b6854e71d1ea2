"""Running answers: saved to the history as they stream, and watched by any number of pages.

An answer belongs to the history, not to a page.  It continues when the page is reloaded, and is
stopped when no page has watched it for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from mlx_mtp.apps.chat_app.archive import Archive
from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Finished, Group, JobMessage, Prefill, Started
from mlx_mtp.apps.history.store import History, Row
from mlx_mtp.apps.server.errors import ApiError

SAVE_S = 0.4
UNWATCHED_S = 10.0
_STATES = {"stop": "done", "length": "length", "cancelled": "stopped", "tool_calls": "done"}


class Answer:
    """One running answer.

    Args:
        message: id of the message that stores it.
        batch: the engine's batch that generates it.
        archive: the history that stores it.
        unwatched_s: seconds without a watching page until it is stopped.
    """

    def __init__(
        self, message: int, batch: Batch, archive: Archive, *, unwatched_s: float = UNWATCHED_S
    ) -> None:
        self.message = message
        self._batch = batch
        self._archive = archive
        self._unwatched_s = unwatched_s
        self._events: list[Row] = []
        self._unsaved: list[Row] = []
        self._watchers = 0
        self._ended = False
        self._stopped = ""
        self._changed = asyncio.Event()
        self._group_at = time.monotonic()

    async def run(self) -> None:
        """Process the engine's messages until the answer ends, and save all of it."""
        saving = asyncio.create_task(self._save_regularly())
        state, stats = "failed", {}
        self._schedule_stop()
        try:
            async for message in self._batch:
                state, stats = self._process(message, state, stats)
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
        self._publish({"type": "end", "state": state, "stats": stats})
        self._ended = True
        self._notify()

    def stop(self, state: str = "stopped") -> None:
        """Stop the answer; the text generated so far is kept."""
        if not self._ended and not self._stopped:
            self._stopped = state
            self._batch.cancel()
            # Do not wait for the engine: it sends no message for a cancelled request.
            self._batch.put(ApiError(503, "stopped"))

    async def watch(self) -> AsyncGenerator[Row, None]:
        """Yield all events from the first one, past and future."""
        self._watchers += 1
        sent = 0
        try:
            while True:
                changed = self._changed
                while sent < len(self._events):
                    sent += 1
                    yield self._events[sent - 1]
                if self._ended:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1
            self._schedule_stop()

    def _process(self, message: JobMessage, state: str, stats: Row) -> tuple[str, Row]:
        match message:
            case Started(prompt_tokens=prompt, cached_tokens=cached):
                self._publish({"type": "started", "prompt_tokens": prompt, "cached_tokens": cached})
            case Prefill(done=done):
                self._publish({"type": "prefill", "done": done})
            case Group():
                now = time.monotonic()
                group = group_of(message, ms=(now - self._group_at) * 1e3)
                self._group_at = now
                self._unsaved.append(group)
                self._publish({"type": "group"} | group)
            case Finished():
                return _STATES[message.reason], message.stats
        return state, stats

    def _publish(self, event: Row) -> None:
        self._events.append(event)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_S)
            await asyncio.shield(self._save())

    async def _save(self) -> None:
        groups, self._unsaved = self._unsaved, []
        if groups:
            text = "".join("".join(group["tokens"]) for group in groups)
            await self._archive(History.append, self.message, text, groups)

    def _schedule_stop(self) -> None:
        if not self._watchers and not self._ended:
            asyncio.get_running_loop().call_later(self._unwatched_s, self._stop_if_unwatched)

    def _stop_if_unwatched(self) -> None:
        if not self._watchers:
            self.stop("interrupted")


class Answers:
    """All running answers.

    Args:
        archive: the history that stores them.
        unwatched_s: seconds without a watching page until an answer is stopped.
    """

    def __init__(self, archive: Archive, *, unwatched_s: float = UNWATCHED_S) -> None:
        self._archive = archive
        self._unwatched_s = unwatched_s
        self._running: dict[int, tuple[Answer, asyncio.Task[None]]] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is running."""
        return bool(self._running)

    def start(self, message: int, batch: Batch) -> Answer:
        """Start to fill a message with the answer of a batch of one job."""
        answer = Answer(message, batch, self._archive, unwatched_s=self._unwatched_s)
        task = asyncio.create_task(answer.run())
        self._running[message] = (answer, task)
        task.add_done_callback(lambda done: self._running.pop(message, None))
        return answer

    def get(self, message: int) -> Answer | None:
        """Return the running answer of a message, if there is one."""
        running = self._running.get(message)
        return running and running[0]

    async def close(self) -> None:
        """Stop all answers and wait until they are saved."""
        tasks = []
        for answer, task in list(self._running.values()):
            answer.stop("interrupted")
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=1.5)


def group_of(message: Group, *, ms: float) -> Row:
    """Return a step as the page and the history store it: token texts and draft counts."""
    span = {"span": message.span} if message.span else {}
    return span | {
        "tokens": message.pieces or [],
        "accepted": message.accepted,
        "drafted": message.drafted,
        "source": message.source,
        "ms": round(ms, 2),
    }
