"""Turns of several answers on one model: a step of each, in batches where that is quicker.

Prompts are prepared by another thread, because a long text takes the tokenizer seconds; only this
thread calls MLX.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from mlx_mtp.apps.engine.grammar import GrammarError
from mlx_mtp.apps.engine.preparing import Prepared, Refusal
from mlx_mtp.apps.engine.protocol import Message
from mlx_mtp.decoding.step import Outcome, Step
from mlx_mtp.terminal import one_line


class Answer(Protocol):
    """An answer in progress; see ``session.Session``."""

    finished: bool

    def started(self) -> Message:
        """The first message."""
        ...

    def plan(self) -> Step:
        """The next step."""
        ...

    def commit(self, outcome: Outcome) -> list[Message]:
        """Messages of the step that was planned."""
        ...

    def close(self) -> None:
        """End it between two steps."""
        ...


class Scheduler:
    """Runs jobs.

    Args:
        prepare: checks a job and encodes its prompt; raises ``Refusal``.
        begin: starts the answer to what ``prepare`` returned.
        group: groups the next steps of all answers; returns indices of those to run together.
        run: runs a group of steps.
        send: passes a message to the server.
        rest: called when the last answer has ended.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[dict[str, Any]], Prepared],
        begin: Callable[[Prepared], Answer],
        group: Callable[[Sequence[Step]], list[list[int]]],
        run: Callable[[list[Step]], list[Outcome]],
        send: Callable[[Message], None],
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._prepare = prepare
        self._begin = begin
        self._group = group
        self._run = run
        self._send = send
        self._rest = rest
        self._inbox: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._preparing: set[int] = set()
        self._answers: dict[int, Answer] = {}  # in the order of their admission

    def receive(self, message: Message) -> None:
        """Receive a command; may be called by any thread."""
        if message["type"] == "submit":
            self._inbox.put(("submit", message["id"], None))
            self._preparer.submit(self._prepare_job, message["id"], message["job"])
        else:
            self._inbox.put((message["type"], message["id"], None))

    def run(self) -> None:
        """Run until the process ends."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Run a step of every answer; wait if there is none."""
        self._obey(wait=not self._answers)
        planned = [(job, step) for job in list(self._answers) if (step := self._plan(job))]
        for group in self._group([step for _, step in planned]) if planned else ():
            self._obey(wait=False)
            self._run_group([planned[i] for i in group if planned[i][0] in self._answers])

    def _plan(self, job: int) -> Step | None:
        try:
            return self._answers[job].plan()
        except Exception as error:
            self._fail(job, error)
            return None

    def _run_group(self, planned: list[tuple[int, Step]]) -> None:
        """Run the steps of some answers together."""
        try:
            outcomes = self._run([step for _, step in planned]) if planned else []
        except Exception as error:
            for job, _ in planned:
                self._fail(job, error)
            return
        for (job, _), outcome in zip(planned, outcomes, strict=True):
            self._commit(job, outcome)

    def _commit(self, job: int, outcome: Outcome) -> None:
        """Send what came of a step."""
        answer = self._answers[job]
        try:
            for message in answer.commit(outcome):
                self._send(message | {"id": job})
            if answer.finished:
                answer.close()
                self._end(job)
        except GrammarError as error:
            self._send_refusal(job, Refusal(str(error), code="grammar"))
            self._end(job)
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: int, error: Exception) -> None:
        """Report that an answer has failed, and drop it: its cache may be inconsistent."""
        traceback.print_exception(error)
        self._send({"type": "failed", "id": job, "message": one_line(error)})
        self._end(job)

    def _end(self, job: int) -> None:
        del self._answers[job]
        if not self._answers:
            self._rest()

    def _obey(self, *, wait: bool) -> None:
        """Carry out the commands in the inbox; wait for the first if there is nothing to do."""
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
            try:
                answer = self._begin(value)
            except Exception as error:
                traceback.print_exception(error)
                self._send({"type": "failed", "id": job, "message": one_line(error)})
                return
            self._answers[job] = answer
            self._send(answer.started() | {"id": job})
        elif isinstance(value, Refusal):
            self._send_refusal(job, value)
        else:
            self._send({"type": "failed", "id": job, "message": value})

    def _send_refusal(self, job: int, refusal: Refusal) -> None:
        why = {"message": str(refusal), "param": refusal.param, "code": refusal.code}
        self._send({"type": "refused", "id": job, **why})

    def _cancel(self, job: int) -> None:
        """Cancel a job; one that has ended meanwhile has sent its last message."""
        answer = self._answers.pop(job, None)
        if answer is not None:
            answer.close()
        elif job not in self._preparing:
            return
        self._preparing.discard(job)
        self._send({"type": "finished", "id": job, "reason": "cancelled"})

    def _prepare_job(self, job: int, values: dict[str, Any]) -> None:
        """In the other thread: prepare a job and pass the result on."""
        try:
            self._inbox.put(("prepared", job, self._prepare(values)))
        except Refusal as refusal:
            self._inbox.put(("prepared", job, refusal))
        except Exception as error:
            traceback.print_exc()
            self._inbox.put(("prepared", job, one_line(error)))
