"""Times steps on the real model, again where something else disturbed them.

Whatever else the machine does only adds to a step's time, so of several rounds the least counts.
It can be trusted where a second round took about as long, and where it did not wait for a core: a
load that lasts makes all rounds equally slow, which only the waiting tells.  (Measured beside five
busy processes on two cores: rounds of a plain step, which used 0.2 s of processor time, took 1.47,
1.53, 1.51 and 1.50 s; threads waited for 1.4 to 1.5 s of each.)
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
from mlx_mtp.decoding.step import HEAD_ROWS, Step
from mlx_mtp.decoding.step import run as run_steps
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.mask_tokens import MaskTokenDrafter
from mlx_mtp.model.layout import StepLayout
from mlx_mtp.model.mtp_model import MTPModel

SECONDS = 5.0  # for the forwards of one context; what would come later is left out
MORE_ROUNDS = 4  # of a disturbed step, while there is time
APART = 1.25  # the second fastest round over the fastest, from which on it was disturbed ...
WAITED = 0.2  # ... as is a round that waited such a share of its time for a core
_DRAFT_ROWS = 9  # rows of the steps that tell what drafting adds
_GROUP = 4  # steps that are run in turn


@dataclass(frozen=True)
class Round:
    """One run of a step.

    Attributes:
        ms: what it took.
        waited_ms: of this, what threads of this process waited for a core, where that is known.
    """

    ms: float
    waited_ms: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """What a step takes.

    Attributes:
        ms: of its fastest round.
        disturbed: whether something else may have made this longer.
    """

    ms: float
    disturbed: bool

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> StepTime:
        """Judge the rounds of a step, one or more."""
        best, *others = sorted(rounds, key=lambda each: each.ms)
        apart = bool(others) and others[0].ms > APART * best.ms
        return cls(best.ms, apart or best.waited_ms > WAITED * best.ms)


class StepBench:
    """Steps of a model over a cache with so many ids, run again and again.

    Attributes:
        disturbed: whether a time that it gave was disturbed.
    """

    def __init__(self, model: MTPModel, context: int) -> None:
        self.disturbed = False
        self._model = model
        self._cache = model.make_cache()
        self._drafter = MaskTokenDrafter(model, None)
        self._ids = [(7 * each + 1) % model.vocab_size for each in range(context)]
        self._cache.begin_step()
        mx.eval(model(mx.array([self._ids]), cache=self._cache))

    def times(
        self, layouts: Sequence[StepLayout], rounds: int, *, deadline: float
    ) -> list[StepTime]:
        """Time each step; the rounds go through all of them in turn.

        Args:
            layouts: the steps.
            rounds: of each, after one to warm up.
            deadline: of ``time.perf_counter``, after which disturbed steps are left as they are.
        """
        runs = [partial(self._round, layout) for layout in layouts]
        return time_rounds(runs, rounds, deadline)

    def draft_ms(self, rounds: int) -> list[float]:
        """What drafting adds to a step by the size of the group, ``[k + 1]``."""
        k = self._model.num_draft_tokens
        sizes = sorted({size for size in (1, 2, 4, 8, k) if size <= k})
        if not sizes:
            return [0.0]
        rows = max(_DRAFT_ROWS, k + 1)
        layouts = [_verify_only(rows), *(_one_group(rows, size) for size in sizes)]
        times = self.times(layouts, rounds, deadline=time.perf_counter() + SECONDS / 2)
        self.disturbed |= any(each.disturbed for each in times)
        bare, *drafting = [each.ms for each in times]
        added = [0.0, *(max(each - bare, 0.0) for each in drafting)]
        added = np.minimum.accumulate(added[::-1])[::-1].tolist()
        return np.interp(np.arange(k + 1), [0, *sizes], added).tolist()

    def forward_ms(
        self, rows: Sequence[int], draft_ms: Sequence[float], rounds: int
    ) -> list[float]:
        """Time of a forward by rows; ends where more rows could never pay, or time is up.

        Disturbed steps are run again while those before them leave time for it.
        """
        k = len(draft_ms) - 1
        began = time.perf_counter()
        found: list[float] = []
        for start in range(0, len(rows), _GROUP):
            layouts = [wide_step(each, k) for each in rows[start : start + _GROUP]]
            deadline = began + SECONDS * (start + len(layouts)) / len(rows)
            times = self.times(layouts, rounds, deadline=deadline)
            for layout, each in zip(layouts, times, strict=True):
                drafting = draft_ms[max(layout.mask_counts)]
                found.append(max(each.ms - drafting, each.ms / 4))
            self.disturbed |= any(each.disturbed for each in times)
            too_dear = k and not times[-1].disturbed and found[-1] > (k + 1) * min(found)
            if too_dear or time.perf_counter() > began + SECONDS:
                break
        return found

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
        waited, began = waited_ms(), time.perf_counter()
        run_steps(self._model, [step])
        ms = (time.perf_counter() - began) * 1e3
        waited = waited_ms() - waited
        self._cache.rewind(layout.num_rows)
        return Round(ms, waited)


def time_rounds(
    runs: Sequence[Callable[[], Round]], rounds: int, deadline: float
) -> list[StepTime]:
    """Run each of several things so often, in turn, and the disturbed ones some more.

    Args:
        runs: each runs its thing once.
        rounds: of each, after one to warm up.
        deadline: of ``time.perf_counter``, after which the disturbed ones are left as they are.
    """
    for run in runs:
        run()
    found: list[list[Round]] = [[] for _ in runs]
    for turn in range(rounds + MORE_ROUNDS):
        more = [at for at, each in enumerate(found) if turn < rounds or StepTime.of(each).disturbed]
        if turn >= rounds and (not more or time.perf_counter() > deadline):
            break
        for at in more:
            found[at].append(runs[at]())
    return [StepTime.of(each) for each in found]


def _verify_only(rows: int) -> StepLayout:
    return StepLayout(1, rows - 1, (0,) * rows)


def _one_group(rows: int, size: int) -> StepLayout:
    drafts = rows - 1 - size
    return StepLayout(1, drafts, (0,) * drafts + (size,))


def wide_step(rows: int, k: int) -> StepLayout:
    """A step with so many rows; the wide ones have masks behind all drafts, about alike."""
    if rows <= HEAD_ROWS or rows > (k + 1) ** 2:
        return _verify_only(rows)
    drafts = next(each for each in range(1, k + 1) if (each + 1) * min(each + 1, k + 1) >= rows)
    share, more = divmod(rows - 1 - drafts, drafts + 1)
    return StepLayout(1, drafts, (share + 1,) * more + (share,) * (drafts + 1 - more))
