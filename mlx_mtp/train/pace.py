"""How far a run is in its schedule, and how many steps the rest of its time allows.

The learning rate depends on the progress, a number from 0 (end of the warm-up) to 1 (last step).
When a run finds that it has time for more or fewer steps than planned, the remaining progress is
spread over them: the learning rate changes its slope but never jumps.

Nothing here imports MLX, and all decisions depend on the given numbers only, so that a resumed run
with the same numbers decides the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Progress of the schedule by step: linear from ``(start, begun)`` to ``(iters, 1)``.

    Attributes:
        iters: training steps of the whole run.
        warmup: steps in which the learning rate rises; the progress is 0 until then.
        start: step of the latest plan, at least ``warmup``.
        begun: progress at ``start``.
    """

    iters: int
    warmup: int
    start: int
    begun: float = 0.0

    @classmethod
    def of(cls, iters: int, *, warmup: int) -> Pace:
        """The pace of a run whose number of steps is known from the beginning."""
        warmup = min(warmup, iters - 1)
        return cls(iters=iters, warmup=warmup, start=warmup)

    def progress(self, step: int) -> float:
        """Progress before the update number ``step``, counted from 0."""
        part = (step - self.start) / max(1, self.iters - self.start)
        return self.begun + (1 - self.begun) * min(max(part, 0.0), 1.0)

    def replanned(self, step: int, iters: int) -> Pace:
        """The same schedule up to ``step``, and its rest over the steps up to ``iters``."""
        start = max(step, self.warmup)
        return replace(self, iters=iters, start=start, begun=self.progress(step))


@dataclass(kw_only=True)
class Timing:
    """What a run has measured so far; saved in its states.

    Attributes:
        total_s: seconds for the whole run.
        spent_s: seconds spent, those before a resume included.
        step_s: seconds per training step.
        eval_s: seconds per evaluation.
        planned_step, planned_s: steps and seconds at the latest plan.
        evaluated_s: seconds of evaluations since then.
    """

    total_s: float
    spent_s: float
    step_s: float
    eval_s: float
    planned_step: int = 0
    planned_s: float = 0.0
    evaluated_s: float = 0.0

    def add_evaluation(self, seconds: float) -> None:
        """Note how long an evaluation took."""
        self.eval_s = seconds
        self.evaluated_s += seconds

    def measure(self, step: int) -> None:
        """Take the seconds per step from the steps since the latest plan.

        The mean with the earlier value dampens intervals in which the machine did something else;
        the first measurement replaces the estimate.
        """
        if step > self.planned_step:
            seconds = self.spent_s - self.planned_s - self.evaluated_s
            found = seconds / (step - self.planned_step)
            self.step_s = (self.step_s + found) / 2 if self.planned_step else found
        self.planned_step, self.planned_s, self.evaluated_s = step, self.spent_s, 0.0

    def steps_left(self, *, steps_per_eval: int, evaluates_now: bool) -> int:
        """Number of steps for which there is time, with their evaluations and the last one."""
        left_s = self.total_s - self.spent_s - (1 + evaluates_now) * self.eval_s
        return max(0, math.floor(left_s / (self.step_s + self.eval_s / steps_per_eval)))

    @property
    def is_over(self) -> bool:
        """Whether only the last evaluation still fits."""
        return self.spent_s + self.eval_s >= self.total_s


@dataclass(kw_only=True)
class Budget:
    """The time of a run; while a run is stopped, no time passes.

    Attributes:
        total_s: seconds for the whole run.
        spent_s: seconds spent before this process.
        step_s, eval_s: estimates, until they are measured.
        max_passes: maximum number of passes over the training sequences.
        clock: current time in seconds.
        began: its value when this process began.
    """

    total_s: float
    step_s: float
    eval_s: float
    max_passes: float
    spent_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    began: float

    def spent(self) -> float:
        """Seconds spent so far."""
        return self.spent_s + self.clock() - self.began

    def timing(self) -> Timing:
        """Nothing measured yet."""
        spent_s = self.spent()
        return Timing(
            total_s=self.total_s,
            spent_s=spent_s,
            step_s=self.step_s,
            eval_s=self.eval_s,
            planned_s=spent_s,
        )
