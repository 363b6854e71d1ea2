"""Turns of several answers on one model: a step of each, together where that is quicker.

The prompts are prepared by a thread beside, for a long text takes the tokenizer seconds; MLX is
called by this thread alone.
"""

from __future__ import annotations

import contextlib
import queue
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_mtp.apps.engine.grammar import GrammarError
from mlx_mtp.apps.engine.preparing import Prepared, Refusal
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.decoding.step import Step
from mlx_mtp.terminal import one_line

Session = Generator[Message | Step, None, None]


class Scheduler:
    """Runs jobs.

    Args:
        prepare: checks a job and encodes its prompt; raises ``Refusal``.
        begin: starts a session for what ``prepare`` returned: a generator of messages, and of steps
            that are to be run before it goes on.
        run_steps: runs the next steps of several sessions.
        send: hands a message to the server.
        rest: called when the last session has ended.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[dict[str, Any]], Prepared],
        begin: Callable[[Prepared], Session],
        run_steps: Callable[[list[Step]], None],
        send: Callable[[Message], None],
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._prepare = prepare
        self._begin = begin
        self._run_steps = run_steps
        self._send = send
        self._rest = rest
        self._inbox: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._preparing: set[int] = set()
        self._sessions: dict[int, Session] = {}  # the one admitted first stands first

    def receive(self, message: Message) -> None:
        """Take a command; may be called by any thread."""
        if message["type"] == "submit":
            self._inbox.put(("submit", message["id"], None))
            self._preparer.submit(self._prepare_job, message["id"], message["job"])
        else:
            self._inbox.put((message["type"], message["id"], None))

    def run(self) -> None:
        """Go on for ever."""
        while True:
            self.turn()

    def turn(self) -> None:
        """A step of every session, or a chunk of its prompt; waits where there is none."""
        self._obey(wait=not self._sessions)
        planned: dict[int, Step] = {}
        for job in list(self._sessions):
            self._obey(wait=False)
            step = self._advance(job)
            if step is not None:
                planned[job] = step
        self._obey(wait=False)
        planned = {job: step for job, step in planned.items() if job in self._sessions}
        if not planned:
            return
        try:
            self._run_steps(list(planned.values()))
        except Exception as error:
            for job in planned:
                self._fail(job, error)
            return
        for job in planned:
            self._advance(job)

    def _advance(self, job: int) -> Step | None:
        """Let a session go on to its next message, which is sent, or step, which is returned."""
        session = self._sessions.get(job)
        if session is None:  # cancelled meanwhile
            return None
        try:
            item = next(session, None)
        except GrammarError as error:
            self._send_refusal(job, Refusal(str(error), code="grammar"))
            self._end(job)
            return None
        except Exception as error:
            self._fail(job, error)
            return None
        if isinstance(item, dict):
            self._send(item | {"id": job})
        elif item is None:
            self._end(job)
        return None if isinstance(item, dict) else item

    def _fail(self, job: int, error: Exception) -> None:
        """Say that a session has failed, and end it; what it holds may be in pieces."""
        traceback.print_exception(error)
        with contextlib.suppress(Exception):
            self._sessions[job].throw(error)
        self._send({"type": "failed", "id": job, "message": one_line(error)})
        self._end(job)

    def _end(self, job: int) -> None:
        del self._sessions[job]
        if not self._sessions:
            self._rest()

    def _obey(self, *, wait: bool) -> None:
        """Carry out the commands that have come; wait for the first if there is nothing to do."""
        while True:
            try:
                name, job, value = self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False
            if name == "submit":
                self._preparing.add(job)
            elif name == "cancel":
                self._cancel(job)
            elif job in self._preparing:
                self._preparing.discard(job)
                self._admit(job, value)

    def _admit(self, job: int, value: Prepared | Refusal | str) -> None:
        if isinstance(value, Prepared):
            self._sessions[job] = self._begin(value)
        elif isinstance(value, Refusal):
            self._send_refusal(job, value)
        else:
            self._send({"type": "failed", "id": job, "message": value})

    def _send_refusal(self, job: int, refusal: Refusal) -> None:
        why = {"message": str(refusal), "param": refusal.param, "code": refusal.code}
        self._send({"type": "refused", "id": job, **why})

    def _cancel(self, job: int) -> None:
        """Break a job off; one that has ended meanwhile has said so."""
        running = self._sessions.pop(job, None)
        if running is not None:
            running.close()
        elif job not in self._preparing:
            return
        self._preparing.discard(job)
        self._send({"type": "finished", "id": job, "reason": "cancelled"})

    def _prepare_job(self, job: int, values: dict[str, Any]) -> None:
        """In the thread beside: prepare a job and pass on what came of it."""
        try:
            self._inbox.put(("prepared", job, self._prepare(values)))
        except Refusal as refusal:
            self._inbox.put(("prepared", job, refusal))
        except Exception as error:
            traceback.print_exc()
            self._inbox.put(("prepared", job, one_line(error)))
