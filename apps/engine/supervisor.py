"""Keeps an engine running in a child process and shares it among requests.

MLX can abort a process, so the model lives in a child.  When that dies, whatever ran or waited gets
a clean error at once, and another child is started, sooner or later as the last ones fared.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import Message, pack, read_async
from mlx_mtp.apps.server.errors import ApiError, engine_down
from mlx_mtp.apps.server.metrics import Metrics

COMMAND = (sys.executable, "-P", "-m", "mlx_mtp.apps.engine.engine_process")
PAUSES_S = (0.0, 0.25, 1.0, 2.0, 4.0)  # before the next start, by failures in a row
STOP_S = 0.5
_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class EngineInfo:
    """What the engine said of itself when it was ready; see ``engine_process``."""

    model: str
    adapter: bool
    num_draft_tokens: int
    vocab_size: int
    max_context: int | None
    has_chat_template: bool
    has_tools: bool
    load_s: float
    holds_tools: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Job:
    """A job that waits or runs."""

    id: int
    index: int
    values: dict[str, Any]
    batch: Batch
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    spoke: float = 0.0
    cancelled: bool = False


class Engine:
    """The engine as the server sees it.

    Args:
        options: what the child is to load and how; see ``engine_process``.
        max_concurrent: answers that are made at once.
        queue_size: jobs that may wait beside them.
        timeout_s: a child that works and says nothing for so long is killed.
        metrics: counts what happens.
        command: how to start the child.

    Attributes:
        state: "loading", "ok", "restarting", "broken" or "stopped".
        info: what the model is, once one was loaded.
        error: why it is broken.
        restarts: children started after the first.
        begun: jobs that were handed to a child.
        pid: process id of the child.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        max_concurrent: int = 4,
        queue_size: int = 64,
        timeout_s: float = 120.0,
        metrics: Metrics | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.state = "loading"
        self.info: EngineInfo | None = None
        self.error = ""
        self.restarts = 0
        self.begun = 0
        self.pid: int | None = None
        self.settled = asyncio.Event()
        self.metrics = metrics or Metrics()
        self._options = dict(options)
        self._max_concurrent = max_concurrent
        self._queue_size = queue_size
        self._timeout_s = timeout_s
        self._command = command
        self._ids = itertools.count(1)
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}
        self._pipe: asyncio.StreamWriter | None = None
        self._heard = 0.0
        self._answer_s = 2.0  # how long answers took of late
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self.metrics.watch_queue(lambda: len(self._waiting), lambda: self.running)

    async def start(self) -> None:
        """Start the child; ``settled`` is set once it is ready or has failed to load."""
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the child and everything that waits for it."""
        self.refuse_all("the server is shutting down")
        self.state = "stopped"
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def change(self, options: Mapping[str, Any]) -> None:
        """Load another model in the place of this one; ``settled`` is set anew once it is there.

        Args:
            options: what changes in what the child is told.
        """
        self.refuse_all("another model is being loaded")
        await self.stop()
        self._options |= options
        self.state, self.error, self.info = "loading", "", None
        self._failures = 0
        self.settled.clear()
        await self.start()

    @property
    def running(self) -> int:
        """How many jobs a child works on."""
        return len(self._running)

    def others(self, batch: Batch) -> int:
        """How many of them are of other batches."""
        return sum(job.batch is not batch for job in self._running.values())

    def submit(self, jobs: Sequence[dict[str, Any]]) -> Batch:
        """Put jobs into the queue, all or none.

        Raises:
            ApiError: 503 while there is no engine, 429 when the queue is full.
        """
        if self.state != "ok":
            raise engine_down(f"the engine is {self.state}")
        free = max(0, self._max_concurrent - len(self._running) - len(self._waiting))
        if len(self._waiting) + len(jobs) - free > self._queue_size:
            raise ApiError(
                429,
                f"too many requests: {len(self._waiting)} wait already",
                code="queue_full",
                retry_after=self._retry_after_s(),
            )
        batch = Batch(len(jobs), cancel=lambda: self._cancel(batch))
        for index, values in enumerate(jobs):
            self._waiting.append(_Job(next(self._ids), index, values, batch))
        self._admit()
        return batch

    def refuse_all(self, reason: str) -> None:
        """Fail whatever waits or runs, and take no more."""
        if self.state == "ok":
            self.state = "restarting"
        self._pipe = None
        jobs = [*self._running.values(), *self._waiting]
        self._running.clear()
        self._waiting.clear()
        for batch in {job.batch for job in jobs if not job.cancelled}:
            batch.put(engine_down(reason))

    def _retry_after_s(self) -> int:
        turns = (len(self._waiting) + 1) / self._max_concurrent
        return max(1, min(60, round(turns * self._answer_s)))

    def _admit(self) -> None:
        """Send the child what it has room for."""
        while self._pipe and self._waiting and len(self._running) < self._max_concurrent:
            job = self._waiting.popleft()
            if not self._running:
                self._heard = time.monotonic()
            job.started = time.monotonic()
            self._running[job.id] = job
            self.begun += 1
            self._send({"type": "submit", "id": job.id, "job": job.values})

    def _cancel(self, batch: Batch) -> None:
        self._waiting = deque(job for job in self._waiting if job.batch is not batch)
        for job in self._running.values():
            if job.batch is batch and not job.cancelled:
                job.cancelled = True
                self._send({"type": "cancel", "id": job.id})

    def _send(self, message: Message) -> None:
        if self._pipe is not None and not self._pipe.is_closing():
            self._pipe.write(pack(message))

    async def _supervise(self) -> None:
        """Start one child after the other."""
        while True:
            try:
                await self._run_child()
            except (OSError, ValueError, TypeError, KeyError) as error:  # no process, or no sense
                print(f"the engine cannot be talked to: {error!r}", file=sys.stderr, flush=True)
            if self.state == "broken":
                self.settled.set()
                return
            pause = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
            self._failures += 1
            self.restarts += 1
            self.metrics.restarts.inc()
            print(f"the engine died; starting another in {pause:g} s", file=sys.stderr, flush=True)
            await asyncio.sleep(pause)

    async def _run_child(self) -> None:
        """Run one child to its end."""
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, limit=_BUFFER_BYTES
        )
        assert child.stdin and child.stdout
        self.pid = child.pid
        watch = asyncio.create_task(self._watch(child))
        try:
            child.stdin.write(pack(self._options))
            while (message := await read_async(child.stdout)) is not None:
                self._heard = time.monotonic()
                self._take(message, child.stdin)
        finally:
            watch.cancel()
            self.pid = None
            self.refuse_all("the engine died; it is being restarted")
            await _end(child, politely=self.state == "stopped")

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Kill a child that has work and shows no sign of life."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            silent_s = time.monotonic() - self._heard
            if self._running and self._pipe and silent_s > self._timeout_s:
                print(f"the engine has hung for {silent_s:.0f} s", file=sys.stderr, flush=True)
                child.kill()
                return

    def _take(self, message: Message, pipe: asyncio.StreamWriter) -> None:
        """Take a message of the child."""
        kind = message.pop("type")
        if kind == "ready":
            self.info = EngineInfo(**message)
            self.state, self._pipe = "ok", pipe
            self.settled.set()
        elif kind == "broken":
            self.error = message["message"]
            self.state = "broken" if self.info is None else "restarting"
        else:
            self._pass_on(kind, message)

    def _pass_on(self, kind: str, message: Message) -> None:
        """Hand a job's message to its request; the last one makes room for another job."""
        job = self._running.get(message.pop("id"))
        if job is None:
            return
        now = time.monotonic()
        if kind == "group":
            self._failures = 0
            since = job.spoke or job.submitted
            self.metrics.group(message, seconds=now - since, first=job.spoke == 0.0)
            job.spoke = now
        if kind in ("finished", "failed", "refused"):
            del self._running[job.id]
            self._answer_s += 0.2 * (now - job.started - self._answer_s)
            self.metrics.ended("cancelled" if job.cancelled else message.get("reason", kind))
            self._admit()
        if not job.cancelled:
            job.batch.put(message | {"type": kind, "index": job.index})


async def _end(child: asyncio.subprocess.Process, *, politely: bool) -> None:
    """End a child: its pipe first, a kill if that is not enough."""
    assert child.stdin
    with contextlib.suppress(OSError):
        child.stdin.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), STOP_S if politely else 0.05)
        return
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()
