"""What a step costs by its rows: measured once, interpolated, corrected by the steps that run.

A step's time is taken apart into the forward, by rows and by how much the cache holds, and the
drafting (low-rank weights, shortlist, sampler head), by the size of the mask group that is drafted
from.  Only ratios between row numbers decide anything, so a machine that slows down as a whole
changes no plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_CONTEXT_STEP = 128  # contexts nearer than this share a curve
_FAST, _SLOW = 0.2, 0.05  # how quickly the machine's pace, and one row number's own cost, follow
_MOST_RATIO = 2.0  # a step that took longer than this against its prediction was disturbed


@dataclass(frozen=True, kw_only=True)
class CostCurve:
    """Milliseconds of steps on one machine.

    Attributes:
        rows: numbers of rows measured, ascending from 1.
        contexts: ids in the cache while they were measured, ascending.
        forward_ms: ``[contexts][rows]``, without drafting.
        draft_ms: by the size of the mask group, ``[k + 1]``, 0.0 at 0.
        source: where the numbers are from, for people.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    forward_ms: tuple[tuple[float, ...], ...]
    draft_ms: tuple[float, ...]
    source: str = ""

    def __post_init__(self) -> None:
        times = [each for line in self.forward_ms for each in line] + list(self.draft_ms)
        shape = [len(line) for line in self.forward_ms]
        if not self.rows or self.rows[0] != 1 or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows must ascend from 1, got {list(self.rows)}")
        if not self.contexts or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must ascend, got {list(self.contexts)}")
        if shape != [len(self.rows)] * len(self.contexts):
            raise ValueError(
                f"{len(self.contexts)} contexts of {len(self.rows)} row numbers need as many times"
            )
        if not all(math.isfinite(each) and each >= 0 for each in times):
            raise ValueError("times must be finite and at least 0")
        if min(min(line) for line in self.forward_ms) <= 0 or self.draft_ms[:1] != (0.0,):
            raise ValueError("forwards take time, and drafting from no masks takes none")

    @property
    def num_draft_tokens(self) -> int:
        """k of the adapter that it was measured with."""
        return len(self.draft_ms) - 1

    def forward(self, context: int) -> np.ndarray:
        """Milliseconds of a forward by its rows, ``[R + 1]``, 0.0 at 0.

        Between the measured numbers it is a straight line.  More rows cannot cost less, so where
        they seem to, the smaller number's time was disturbed and is lowered.
        """
        lines = np.array(self.forward_ms)
        measured = [np.interp(context, self.contexts, lines[:, at]) for at in range(len(self.rows))]
        every = np.interp(np.arange(self.rows[-1] + 1), self.rows, measured)
        every[0] = 0.0
        return _rising(every)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CostCurve:
        """Build from what ``to_dict`` gave.

        Raises:
            ValueError: something is missing or out of range.
        """
        try:
            return cls(
                rows=tuple(int(each) for each in values["rows"]),
                contexts=tuple(int(each) for each in values["contexts"]),
                forward_ms=tuple(
                    tuple(float(each) for each in line) for line in values["forward_ms"]
                ),
                draft_ms=tuple(float(each) for each in values["draft_ms"]),
                source=str(values.get("source", "")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a cost curve: {error!r}") from None


# Where nothing was measured, a guess, in plain steps.
UNMEASURED = CostCurve(
    rows=(1, 4, 8, 16, 32),
    contexts=(0,),
    forward_ms=((1.0, 1.1, 1.4, 2.2, 4.0),),
    draft_ms=(0.0, 0.05),
    source="a guess, nothing was measured",
)


class LiveCosts:
    """A cost curve that follows the steps that run.

    One factor follows the machine's pace quickly; one for each row number follows, slowly, what
    that number costs beside the others.  Only the latter change what is best.

    Args:
        curve: to begin with.
        learns: False stays with the curve.
    """

    def __init__(self, curve: CostCurve, *, learns: bool = True) -> None:
        self.curve = curve
        self._learns = learns
        self._pace = 1.0
        # Plain lists where single numbers are looked up, which happens in every step.
        self._factors = [1.0] * (curve.rows[-1] + 1)
        self._forward: dict[int, tuple[np.ndarray, list[float]]] = {}
        self._draft = list(curve.draft_ms)

    def draft_ms(self, num_draft_tokens: int) -> np.ndarray:
        """Milliseconds to draft by the size of the mask group, ``[k + 1]``."""
        sizes = np.arange(num_draft_tokens + 1)
        return np.array(self._draft)[np.minimum(sizes, len(self._draft) - 1)]

    def forward_ms(self, context: int) -> np.ndarray:
        """Milliseconds of a forward by its rows, ``[R + 1]``, at the pace of the measurement."""
        return np.maximum.accumulate(self._measured(context)[0] * self._factors)

    def observe(self, *, rows: int, largest_group: int, context: int, ms: float) -> None:
        """Learn from a step; one with more rows than were measured says nothing."""
        if not self._learns or rows >= len(self._factors) or ms <= 0:
            return
        forward = self._measured(context)[1][rows] * self._factors[rows]
        ratio = ms / (forward + self._draft[min(largest_group, len(self._draft) - 1)])
        ratio = min(max(ratio / self._pace, 1 / _MOST_RATIO), _MOST_RATIO)
        self._pace *= ratio**_FAST
        self._factors[rows] *= ratio**_SLOW

    def _measured(self, context: int) -> tuple[np.ndarray, list[float]]:
        at = context // _CONTEXT_STEP
        if at not in self._forward:
            forward = self.curve.forward(at * _CONTEXT_STEP)
            self._forward[at] = forward, forward.tolist()
        return self._forward[at]


def _rising(times: np.ndarray) -> np.ndarray:
    """The largest times that never fall and are nowhere above those given."""
    return np.minimum.accumulate(times[::-1])[::-1]
