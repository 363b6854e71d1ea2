"""Turns of several answers on one model: a step of each, in batches where that is quicker.

Prompts are prepared by another thread, because a long text takes the tokenizer seconds; only this
thread calls MLX.
"""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from mlx_mtp.apps.engine.grammar import GrammarError
from mlx_mtp.apps.engine.preparing import Prepared, Refusal
from mlx_mtp.apps.engine.protocol import (
    Cancel,
    Failed,
    Finished,
    JobMessage,
    Refused,
    Started,
    Submit,
)
from mlx_mtp.decoding.outcome import Outcome
from mlx_mtp.decoding.step import Step
from mlx_mtp.terminal import one_line


class Answer(Protocol):
    """An answer in progress; see ``session.Session``."""

    finished: bool

    def started(self) -> Started:
        """The first message."""
        ...

    def plan(self) -> Step:
        """The next step."""
        ...

    def commit(self, outcome: Outcome) -> Sequence[JobMessage]:
        """Messages of the step that was planned."""
        ...

    def close(self) -> None:
        """End it between two steps."""
        ...


class Scheduler:
    """Runs jobs.

    Args:
        prepare: validates the fields of a job and encodes its prompt, or returns all messages of a
            job that generates nothing; raises ``Refusal``.
        begin: starts the answer to what ``prepare`` returned.
        group: groups the next steps of all answers; returns indices of those to run together.
        run: runs a group of steps.
        send: passes a message to the server.
        must_wait: whether a prepared job begins later, given the running answers; never without
            any.
        report: called when an answer has ended.
        rest: called when the last answer has ended.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[dict[str, Any]], Prepared | list[JobMessage]],
        begin: Callable[[Prepared], Answer],
        group: Callable[[Sequence[Step]], list[list[int]]],
        run: Callable[[list[Step]], list[Outcome]],
        send: Callable[[JobMessage], None],
        must_wait: Callable[[Prepared, Collection[Any]], bool] = lambda job, running: False,
        report: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._prepare = prepare
        self._begin = begin
        self._group = group
        self._run = run
        self._send = send
        self._must_wait = must_wait
        self._report = report
        self._rest = rest
        self._inbox: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._preparing: set[int] = set()
        self._delayed: dict[int, Prepared] = {}
        self._answers: dict[int, Answer] = {}  # in the order of their admission

    def receive(self, command: Submit | Cancel) -> None:
        """Receive a command; may be called by any thread."""
        self._inbox.put((command.type, command.id, None))
        if isinstance(command, Submit):
            self._preparer.submit(self._prepare_job, command.id, command.job)

    def run(self) -> None:
        """Run until the process ends."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Run a step of every answer; wait if there is none."""
        self._obey(wait=not self._answers and not self._delayed)
        for job in list(self._delayed):
            self._admit(job, self._delayed.pop(job))
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
                self._send_for(job, message)
            if answer.finished:
                answer.close()
                self._end(job)
        except GrammarError as error:
            self._send_for(job, Refused(message=str(error), code="grammar"))
            self._end(job)
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: int, error: Exception) -> None:
        """Report that an answer has failed, and drop it: its cache may be inconsistent."""
        traceback.print_exception(error)
        self._send_for(job, Failed(message=one_line(error)))
        self._end(job)

    def _end(self, job: int) -> None:
        del self._answers[job]
        self._ended()

    def _ended(self) -> None:
        """Report after the end of an answer, and rest after that of the last."""
        self._report()
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

    def _admit(self, job: int, value: Prepared | list[JobMessage] | Refusal | str) -> None:
        if isinstance(value, list):
            for message in value:
                self._send_for(job, message)
        elif isinstance(value, Prepared):
            if self._answers and self._must_wait(value, self._answers.values()):
                self._delayed[job] = value
                return
            try:
                answer = self._begin(value)
            except Exception as error:
                traceback.print_exception(error)
                self._send_for(job, Failed(message=one_line(error)))
                return
            self._answers[job] = answer
            self._send_for(job, answer.started())
        elif isinstance(value, Refusal):
            message = Refused(message=str(value), param=value.param, code=value.code)
            self._send_for(job, message)
        else:
            self._send_for(job, Failed(message=value))

    def _send_for(self, job: int, message: JobMessage) -> None:
        message.id = job
        self._send(message)

    def _cancel(self, job: int) -> None:
        """Cancel a job; one that has ended meanwhile has sent its last message."""
        answer = self._answers.pop(job, None)
        if answer is not None:
            answer.close()
            self._ended()
        elif job not in self._preparing and self._delayed.pop(job, None) is None:
            return
        self._preparing.discard(job)
        self._send_for(job, Finished(reason="cancelled"))

    def _prepare_job(self, job: int, values: dict[str, Any]) -> None:
        """In the other thread: prepare a job and pass the result on."""
        try:
            self._inbox.put(("prepared", job, self._prepare(values)))
        except Refusal as refusal:
            self._inbox.put(("prepared", job, refusal))
        except Exception as error:
            traceback.print_exc()
            self._inbox.put(("prepared", job, one_line(error)))
