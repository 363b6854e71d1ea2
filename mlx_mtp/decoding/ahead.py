"""The steps of one answer, plain ones submitted before the id that they begin with is read.

A plain step emits one id, and the plain step after it needs only that id, as an array on the
device.  So the host submits the next step and then reads the id of the last one, as in mlx-lm's
``generate_step``: while the device computes, the host commits a step, the caller uses its ids, and
the graph of the next step is built.

A step that was submitted this way is plain, whatever the planner makes of the id that it begins
with: drafts that are looked up, for instance, are verified one step later.  So this is only done in
a stretch of plain steps.  If the answer ends, the row of the step is dropped.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

import mlx.core as mx

from mlx_mtp.decoding.outcome import StepResult, Submitted
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.step import Step, submit
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.model.layout import plain_layout
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.plan import Plan

STRETCH = 4  # plain steps in a row after which the next one is expected to be plain too


class StepQueue:
    """Runs the steps of an answer.

    Until the last step, the cache may also have the row of the last emitted id, that of a step
    which has been submitted; ``close`` drops it.

    Args:
        model: the model.
        request: the answer.
    """

    def __init__(self, model: MTPModel, request: Request) -> None:
        self._model = model
        self._request = request
        self._ahead: Submitted | None = None
        self._num_plain = 0  # plain steps in a row
        self._read_at = 0.0  # when the last id was read

    def run(self) -> StepResult:
        """Run the next step."""
        request, resumed_at = self._request, time.perf_counter()
        current, self._ahead = self._ahead, None
        is_early = current is not None
        if current is None:
            current = submit(self._model, [request.plan()])
        is_plain = request.current.layout.num_rows == 1
        self._num_plain = self._num_plain + 1 if is_plain else 0
        if self._may_submit_next(current):
            self._ahead = submit(self._model, [self._step_after(current.verdicts[0].tokens)])
        [outcome] = current.outcomes()
        if is_early:
            outcome = replace(outcome, ms=self._duration(resumed_at))
        self._read_at = time.perf_counter()
        result = request.commit(outcome)
        if request.finished:
            self.close()
        elif self._ahead is not None:
            self._adopt_plan()
        return result

    def close(self) -> None:
        """Drop the row of a step that was submitted and not read."""
        if self._ahead is not None:
            self._ahead = None
            self._request.cache.rewind(1)

    def _may_submit_next(self, current: Submitted) -> bool:
        """Whether the step after this one may be submitted before its id is known.

        Logits processors need the id, and a cache changes only once it is sure which rows stay.
        """
        request = self._request
        emits_one = len(current.verdicts) == 1 and request.current.layout.is_plain
        if not emits_one or current.verdicts[0].error is not None or request.room < 2:
            return False
        if request.drafters and self._num_plain < STRETCH:
            return False
        cache = request.cache
        return not (request.target.processors or cache.drops_rows or cache.rows_until_change == 1)

    def _step_after(self, token: mx.array) -> Step:
        """A plain step after an id ``[1]`` that is not known yet."""
        request = self._request
        request.key, _, *keys = mx.random.split(request.key, 4)
        parts = ([], Drafts.none(), request.target, request.masks, mx.stack(keys))
        return Step(request.cache, plain_layout(), *parts, token=token)

    def _adopt_plan(self) -> None:
        """Let the planner have its say about the step that was submitted, as before every step."""
        request = self._request
        request.offset = request.cache.offset - 1
        plan = request.choose()
        if not plan.layout.is_plain:  # it will be asked again when nothing is in its way
            plan, self._num_plain = Plan(plain_layout()), 0
        request.current = plan

    def _duration(self, resumed_at: float) -> float:
        """Milliseconds of a step that was submitted early: since the id of the last one was read.

        The device may have waited meanwhile for a caller that took longer than the host; then NaN.
        """
        now = time.perf_counter()
        was_caller_slow = resumed_at - self._read_at > now - resumed_at
        return math.nan if was_caller_slow else (now - self._read_at) * 1e3
