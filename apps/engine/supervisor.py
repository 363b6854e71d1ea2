"""Keeps the engine's child process running and queues jobs for it.

MLX can abort a process, so the model lives in a child.  When the child dies, running and waiting
jobs get an error at once, and another child is started, after a pause if several died in a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_mtp.apps.engine.batch import Batch
from mlx_mtp.apps.engine.protocol import (
    Broken,
    CacheCounts,
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Group,
    Job,
    JobMessage,
    Load,
    Ready,
    Refused,
    Started,
    Submit,
    pack,
    read_event,
)
from mlx_mtp.apps.server.errors import ApiError, engine_down
from mlx_mtp.apps.server.metrics import Metrics

COMMAND = (sys.executable, "-P", "-m", "mlx_mtp.apps.engine.engine_process")
PAUSES_S = (0.0, 0.25, 1.0, 2.0, 4.0)  # before a restart, by number of failures in a row
STOP_S = 0.5
WRITE_S = 5.0  # more to write files of prompts
_BUFFER_BYTES = 2**20


@dataclass(eq=False)
class _QueuedJob:
    """A job that is waiting or running; times are of ``time.monotonic``."""

    id: int
    index: int
    job: Job
    batch: Batch
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0
    last_group: float = 0.0
    cancelled: bool = False


class Engine:
    """The engine as seen by the server.

    Args:
        options: fields of ``Load``.
        max_concurrent: maximum number of running jobs.
        queue_size: maximum number of waiting jobs.
        timeout_s: a child with running jobs that sends nothing for this long is killed.
        metrics: counters to update.
        command: command line of the child.

    Attributes:
        load: the model to load at the next start.
        state: "loading", "ok", "restarting", "broken" or "stopped".
        info: description of the model, once one was loaded.
        error: reason of the state "broken".
        restarts: number of children started after the first.
        begun: number of jobs sent to a child.
        pid: process id of the child.
        max_concurrent: maximum number of jobs that run at the same time.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        max_concurrent: int = 4,
        queue_size: int = 64,
        timeout_s: float = 120.0,
        metrics: Metrics | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.state = "loading"
        self.info: Ready | None = None
        self.error = ""
        self.restarts = 0
        self.begun = 0
        self.pid: int | None = None
        self.settled = asyncio.Event()
        self.metrics = metrics or Metrics()
        self.load = Load(**options or {})
        self.max_concurrent = max_concurrent
        self._queue_size = queue_size
        self._timeout_s = timeout_s
        self._command = command
        self._ids = itertools.count(1)
        self._waiting: deque[_QueuedJob] = deque()
        self._running: dict[int, _QueuedJob] = {}
        self._encoding: dict[int, _QueuedJob] = {}  # jobs that generate nothing, at once
        self._pipe: asyncio.StreamWriter | None = None
        self._last_event = 0.0
        self._answer_s = 2.0  # moving average of the time per answer
        self._failures = 0
        self._task: asyncio.Task[None] | None = None
        self.metrics.watch_queue(lambda: len(self._waiting), lambda: self.running)

    async def start(self) -> None:
        """Start the child; ``settled`` is set when it is ready or has failed to load."""
        self._task = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """Stop the child and refuse all jobs."""
        self.refuse_all("the server is shutting down")
        self.state = "stopped"
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def change(self, *, model: str | None, adapter_path: str | None) -> None:
        """Replace the model; ``settled`` is cleared and set again when the new one is ready."""
        self.refuse_all("another model is being loaded")
        await self.stop()
        self.load = replace(self.load, model=model, adapter_path=adapter_path)
        self.state, self.error, self.info = "loading", "", None
        self._failures = 0
        self.settled.clear()
        await self.start()

    @property
    def running(self) -> int:
        """Number of running jobs."""
        return len(self._running)

    def others(self, batch: Batch) -> int:
        """Number of running jobs of other batches."""
        return sum(job.batch is not batch for job in self._running.values())

    def submit(self, jobs: Sequence[Job]) -> Batch:
        """Queue jobs, all or none.

        Raises:
            ApiError: 503 if the engine is not running, 429 if the queue is full.
        """
        if self.state != "ok":
            raise engine_down(f"the engine is {self.state}")
        if all(job.only for job in jobs) and len(self._encoding) < self._queue_size:
            return self._encode(jobs)
        free = max(0, self.max_concurrent - len(self._running) - len(self._waiting))
        if len(self._waiting) + len(jobs) - free > self._queue_size:
            raise ApiError(
                429,
                f"too many requests: {len(self._waiting)} are waiting",
                code="queue_full",
                retry_after=self._retry_after_s(),
            )
        batch = Batch(len(jobs), cancel=lambda: self._cancel(batch))
        for index, job in enumerate(jobs):
            self._waiting.append(_QueuedJob(next(self._ids), index, job, batch))
        self._admit()
        return batch

    def _encode(self, jobs: Sequence[Job]) -> Batch:
        """Send jobs that generate nothing, which need not wait for others."""
        batch = Batch(len(jobs), cancel=lambda: None)
        for index, job in enumerate(jobs):
            queued = _QueuedJob(next(self._ids), index, job, batch)
            self._encoding[queued.id] = queued
            self._send(Submit(id=queued.id, job=job.to_dict()))
        return batch

    def refuse_all(self, reason: str) -> None:
        """Fail all waiting and running jobs, and accept no more."""
        if self.state == "ok":
            self.state = "restarting"
        self._pipe = None
        jobs = [*self._running.values(), *self._encoding.values(), *self._waiting]
        self._running.clear()
        self._encoding.clear()
        self._waiting.clear()
        for batch in {job.batch for job in jobs if not job.cancelled}:
            batch.put(engine_down(reason))

    def _retry_after_s(self) -> int:
        turns = (len(self._waiting) + 1) / self.max_concurrent
        return max(1, min(60, round(turns * self._answer_s)))

    def _admit(self) -> None:
        """Send waiting jobs to the child while fewer than the maximum are running."""
        while self._pipe and self._waiting and len(self._running) < self.max_concurrent:
            job = self._waiting.popleft()
            if not self._running:
                self._last_event = time.monotonic()
            job.started = time.monotonic()
            self._running[job.id] = job
            self.begun += 1
            self._send(Submit(id=job.id, job=job.job.to_dict()))

    def _cancel(self, batch: Batch) -> None:
        self._waiting = deque(job for job in self._waiting if job.batch is not batch)
        for job in self._running.values():
            if job.batch is batch and not job.cancelled:
                job.cancelled = True
                self._send(Cancel(id=job.id))

    def _send(self, message: Command) -> None:
        if self._pipe is not None and not self._pipe.is_closing():
            self._pipe.write(pack(message))

    async def _supervise(self) -> None:
        """Start a child again whenever one ends."""
        while True:
            try:
                await self._run_child()
            except (OSError, ValueError) as error:  # no process, or an invalid message
                print(f"lost connection to the engine: {error!r}", file=sys.stderr, flush=True)
            if self.state == "broken":
                self.settled.set()
                return
            pause = PAUSES_S[min(self._failures, len(PAUSES_S) - 1)]
            self._failures += 1
            self.restarts += 1
            self.metrics.restarts.inc()
            print(f"the engine died; restarting it in {pause:g} s", file=sys.stderr, flush=True)
            await asyncio.sleep(pause)

    async def _run_child(self) -> None:
        """Run one child until it ends."""
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, limit=_BUFFER_BYTES
        )
        assert child.stdin and child.stdout
        self.pid = child.pid
        watch = asyncio.create_task(self._watch(child))
        try:
            child.stdin.write(pack(self.load))
            while (event := await read_event(child.stdout)) is not None:
                self._last_event = time.monotonic()
                self._handle(event, child.stdin)
        finally:
            watch.cancel()
            self.pid = None
            self.refuse_all("the engine died; it is being restarted")
            wait_s = STOP_S + (WRITE_S if self.load.prefix_files_bytes else 0)
            await _stop_child(child, wait_s=wait_s if self.state == "stopped" else 0.05)

    async def _watch(self, child: asyncio.subprocess.Process) -> None:
        """Kill a child that has running jobs and sends nothing."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            silent_s = time.monotonic() - self._last_event
            if self._running and self._pipe and silent_s > self._timeout_s:
                print(
                    f"the engine has not responded for {silent_s:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
                child.kill()
                return

    def _handle(self, event: Event, pipe: asyncio.StreamWriter) -> None:
        match event:
            case Ready():
                self.info = event
                self.state, self._pipe = "ok", pipe
                self.settled.set()
            case Broken():
                self.error = event.message
                self.state = "broken" if self.info is None else "restarting"
            case CacheCounts():
                self.metrics.cache(event)
            case _:
                self._deliver(event)

    def _deliver(self, message: JobMessage) -> None:
        """Pass a job's message to its batch; the last one makes room for another job."""
        if encoding := self._encoding.get(message.id):
            encoding.batch.put(message)
            if isinstance(message, Finished | Failed | Refused):
                del self._encoding[message.id]
            return
        job = self._running.get(message.id)
        if job is None:
            return
        now = time.monotonic()
        if isinstance(message, Started):
            if not job.job.fresh:
                self.metrics.started(message)
        elif isinstance(message, Group):
            self._failures = 0
            since = job.last_group or job.submitted
            self.metrics.group(message, seconds=now - since, first=job.last_group == 0.0)
            job.last_group = now
        elif isinstance(message, Finished | Failed | Refused):
            del self._running[job.id]
            self._answer_s += 0.2 * (now - job.started - self._answer_s)
            reason = message.reason if isinstance(message, Finished) else message.type
            self.metrics.ended("cancelled" if job.cancelled else reason)
            self._admit()
        if not job.cancelled:
            message.index = job.index
            job.batch.put(message)


async def _stop_child(child: asyncio.subprocess.Process, *, wait_s: float) -> None:
    """Stop a child by closing its pipe, then, after a while, by killing it."""
    assert child.stdin
    with contextlib.suppress(OSError):
        child.stdin.close()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(child.wait(), wait_s)
        return
    with contextlib.suppress(ProcessLookupError):
        child.kill()
    await child.wait()
