"""Times steps on the real model, and repeats those that something else disturbed.

Other work on the machine only adds to a step's time, so the fastest of several rounds counts.  It
is trusted if a second round took nearly the same time, and if the round did not wait for a core:
constant load makes all rounds equally slow, and only the waiting time shows it.  (Measured next to
five busy processes on two cores: rounds of a plain step that used 0.2 s of processor time took
1.47, 1.53, 1.51 and 1.50 s, of which threads waited 1.4 to 1.5 s.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from mlx_mtp.backends.device import waited_ms
from mlx_mtp.decoding.accept import Target
from mlx_mtp.decoding.step import Step
from mlx_mtp.decoding.step import run as run_steps
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel

MAX_SECONDS = 5.0  # for the forwards of one context; later steps are left out
MAX_EXTRA_ROUNDS = 4  # of a disturbed step, while there is time
# A step was disturbed if its second fastest round took more than MAX_SPREAD times the fastest, or
# if the fastest waited for a core for more than MAX_WAITING of its time.
MAX_SPREAD = 1.25
MAX_WAITING = 0.2
_DRAFT_ROWS = 9  # rows of the steps that measure the cost of drafting
_VERIFY_ROWS = 12  # up to here a step without masks is timed
_GROUP = 4  # number of steps that are timed in turn


@dataclass(frozen=True)
class Round:
    """One run of a step.

    Attributes:
        ms: its duration.
        waited_ms: time in which threads of this process waited for a core, if the system reports
            it.
    """

    ms: float
    waited_ms: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """The time of a step.

    Attributes:
        ms: duration of its fastest round.
        disturbed: whether other work may have added to it.
    """

    ms: float
    disturbed: bool

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> StepTime:
        """The time of a step from one or more rounds."""
        best, *others = sorted(rounds, key=lambda one: one.ms)
        is_alone = bool(others) and others[0].ms > MAX_SPREAD * best.ms
        return cls(best.ms, is_alone or best.waited_ms > MAX_WAITING * best.ms)


class StepTimer:
    """Times steps of a model on a cache with ``context`` ids.

    Attributes:
        disturbed: whether a measured time was disturbed.
    """

    def __init__(self, model: MTPModel, context: int) -> None:
        self.disturbed = False
        self._model = model
        self._cache = model.make_cache()
        # All different: in a model of experts, rows of one id would choose the same experts, of
        # which fewer are then read than for the rows of a text.
        self._ids = [(7 * index + 1) % model.vocab_size for index in range(context)]
        self._drafter = MaskTokenDrafter(model, None, self._ids)
        self._cache.begin_step()
        mx.eval(model(mx.array([self._ids]), cache=self._cache))

    def times(
        self, layouts: Sequence[StepLayout], rounds: int, *, deadline: float
    ) -> list[StepTime]:
        """Time steps; every round runs all of them.

        Args:
            layouts: the steps.
            rounds: number of rounds after one to warm up.
            deadline: value of ``time.perf_counter`` after which disturbed steps are not repeated.
        """
        runs = [partial(self._round, layout) for layout in layouts]
        return time_rounds(runs, rounds, deadline)

    def draft_ms(self, rounds: int) -> list[float]:
        """Time that drafting adds to a step by size of the mask group, ``[k + 1]``."""
        k = self._model.num_draft_tokens
        sizes = sorted({size for size in (1, 2, 4, 8, k) if size <= k})
        if not sizes:
            return [0.0]
        rows = max(_DRAFT_ROWS, k + 1)
        layouts = [_verify_only(rows), *(_one_group(rows, size) for size in sizes)]
        times = self.times(layouts, rounds, deadline=time.perf_counter() + MAX_SECONDS / 2)
        self.disturbed |= any(step.disturbed for step in times)
        bare, *drafting = [step.ms for step in times]
        added = [0.0, *(max(ms - bare, 0.0) for ms in drafting)]
        added = np.minimum.accumulate(added[::-1])[::-1].tolist()
        return np.interp(np.arange(k + 1), [0, *sizes], added).tolist()

    def forward_ms(
        self, rows: Sequence[int], draft_ms: Sequence[float], rounds: int
    ) -> list[float]:
        """Time of a forward by number of rows.

        Stops where more rows cannot be worth their time, or when the time is used up.  Disturbed
        steps are repeated if earlier steps left time for it.
        """
        k = len(draft_ms) - 1
        start = time.perf_counter()
        forwards: list[float] = []
        for first in range(0, len(rows), _GROUP):
            layouts = [wide_step(count, k) for count in rows[first : first + _GROUP]]
            deadline = start + MAX_SECONDS * (first + len(layouts)) / len(rows)
            times = self.times(layouts, rounds, deadline=deadline)
            for layout, step in zip(layouts, times, strict=True):
                drafting = draft_ms[max(layout.mask_counts)]
                forwards.append(max(step.ms - drafting, step.ms / 4))
            self.disturbed |= any(step.disturbed for step in times)
            is_too_slow = forwards[-1] > (k + 1) * min(forwards) and not times[-1].disturbed
            if (k and is_too_slow) or time.perf_counter() > start + MAX_SECONDS:
                break
        return forwards

    def _round(self, layout: StepLayout) -> Round:
        drafts = Drafts.certain(mx.array(self._ids[: layout.num_draft_tokens], mx.int32))
        drafts.tokens.tolist()
        self._cache.begin_step()
        step = Step(
            cache=self._cache,
            layout=layout,
            context=self._ids,
            drafts=drafts,
            target=Target(),
            drafter=self._drafter,
            keys=mx.random.split(mx.random.key(0)),
        )
        waited, start = waited_ms(), time.perf_counter()
        run_steps(self._model, [step])
        ms = (time.perf_counter() - start) * 1e3
        waited = waited_ms() - waited
        self._cache.rewind(layout.num_rows)
        return Round(ms, waited)


def time_rounds(
    runs: Sequence[Callable[[], Round]], rounds: int, deadline: float
) -> list[StepTime]:
    """Time several steps in turn, and repeat the disturbed ones.

    Args:
        runs: functions that run a step once.
        rounds: number of rounds after one to warm up.
        deadline: value of ``time.perf_counter`` after which disturbed steps are not repeated.
    """
    for run in runs:
        run()
    done: list[list[Round]] = [[] for _ in runs]
    for turn in range(rounds + MAX_EXTRA_ROUNDS):
        if turn < rounds:
            due = list(range(len(runs)))
        else:
            due = [i for i, step in enumerate(done) if StepTime.of(step).disturbed]
            if not due or time.perf_counter() > deadline:
                break
        for i in due:
            done[i].append(runs[i]())
    return [StepTime.of(step) for step in done]


def _verify_only(rows: int) -> StepLayout:
    return StepLayout(1, rows - 1, (0,) * rows)


def _one_group(rows: int, size: int) -> StepLayout:
    drafts = rows - 1 - size
    return StepLayout(1, drafts, (0,) * drafts + (size,))


def wide_step(rows: int, k: int) -> StepLayout:
    """A step with ``rows`` rows; wide ones have about equally many masks after every draft."""
    if rows <= _VERIFY_ROWS or rows > (k + 1) ** 2:
        return _verify_only(rows)
    drafts = next(n for n in range(1, k + 1) if (n + 1) * min(n + 1, k + 1) >= rows)
    share, more = divmod(rows - 1 - drafts, drafts + 1)
    return StepLayout(1, drafts, (share + 1,) * more + (share,) * (drafts + 1 - more))
