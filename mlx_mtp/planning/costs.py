"""What a step costs by its rows: measured once, interpolated, corrected by the steps that run.

A step's time is taken apart into the forward, by rows and by how much the cache holds, and the
drafting (low-rank weights, shortlist, sampler head), by the size of the mask group that is drafted
from.  Only ratios between row numbers decide anything, so a machine that slows down as a whole
changes no plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

_CONTEXT_STEP = 128  # contexts nearer than this share a curve
_FAST, _SLOW = 0.2, 0.05  # how quickly the machine's pace, and one row number's own cost, follow
_MOST_RATIO = 2.0  # a step that took longer than this against its prediction was disturbed
_LEAST_RATIO = 0.01  # no machine's pace or error is beyond this
_SETTLED = 18  # steps from which on the pace is known, and observations that settle a row number
_UNDERCUT, _UNDERCUT_STEPS = 0.75, 16  # so many plain steps below this share disprove a curve


@dataclass(frozen=True, kw_only=True)
class CostCurve:
    """Milliseconds of steps on one machine.

    Attributes:
        rows: numbers of rows measured, ascending from 1.
        contexts: ids in the cache while they were measured, ascending.
        forward_ms: ``[contexts][rows]``, without drafting.
        draft_ms: by the size of the mask group, ``[k + 1]``, 0.0 at 0.
        source: where the numbers are from, for people.
        disturbed: whether the machine was busy meanwhile, so that times may be too long.
        num_measurements: measurements of which these are the least times.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    forward_ms: tuple[tuple[float, ...], ...]
    draft_ms: tuple[float, ...]
    source: str = ""
    disturbed: bool = False
    num_measurements: int = 1

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
        if self.num_measurements < 1:
            raise ValueError(f"num_measurements must be at least 1, got {self.num_measurements}")

    @property
    def num_draft_tokens(self) -> int:
        """k of the adapter that it was measured with."""
        return len(self.draft_ms) - 1

    @property
    def doubt(self) -> str:
        """What is to be said of a disturbed curve; nothing of another."""
        if not self.disturbed:
            return ""
        return "the machine was busy when this was measured, times may be too long (mlx-mtp tune)"

    def least(self, other: CostCurve) -> CostCurve:
        """The smaller times of two measurements; all rows but those an undisturbed one left out.

        Of curves at other contexts or for another k it is this one alone.
        """
        if (self.contexts, self.num_draft_tokens) != (other.contexts, other.num_draft_tokens):
            return self
        rows = sorted(
            each
            for each in {*self.rows, *other.rows}
            if all(curve.disturbed or each in curve.rows for curve in (self, other))
        )
        lines = []
        for mine, theirs in zip(self.forward_ms, other.forward_ms, strict=True):
            known = dict(zip(other.rows, theirs, strict=True))
            for each, ms in zip(self.rows, mine, strict=True):
                known[each] = min(ms, known.get(each, ms))
            lines.append(tuple(known[each] for each in rows))
        return replace(
            self,
            rows=tuple(rows),
            forward_ms=tuple(lines),
            draft_ms=tuple(map(min, self.draft_ms, other.draft_ms)),
            disturbed=self.disturbed and other.disturbed,
        )

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
                disturbed=bool(values.get("disturbed", False)),
                num_measurements=int(values.get("num_measurements", 1)),
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

    One factor follows the machine's pace quickly; one for each row number that ran follows, slowly,
    what that number costs beside the others, and one what drafting costs.  Only the latter two
    change what is best.  Row numbers that never ran are taken to be as far off as those next to
    them that did.  Whatever else the machine does only adds: so a step that took less than it
    should is believed quickly while its row number is new, one that took more is not.

    Args:
        curve: to begin with.
        learns: False stays with the curve.
    """

    def __init__(self, curve: CostCurve, *, learns: bool = True) -> None:
        self.curve = curve
        self._learns = learns
        self._pace = 1.0
        self._num_steps = 0
        self._num_undercut = 0
        # Plain numbers where single ones are looked up, which happens in every step.
        self._factors = {1: 1.0}  # by row numbers that ran; the pace is that of plain steps
        self._seen = {1: _SETTLED}
        self._draft_factor, self._drafted = 1.0, 0
        self._forward: dict[int, tuple[np.ndarray, list[float]]] = {}
        self._draft = list(curve.draft_ms)

    @property
    def is_disproved(self) -> bool:
        """Whether plain steps run so much faster than measured that the measurement was disturbed.

        It took the least of several times, which an undisturbed machine cannot undercut by much.
        """
        return self._num_undercut >= _UNDERCUT_STEPS

    def draft_ms(self, num_draft_tokens: int) -> np.ndarray:
        """Milliseconds to draft by the size of the mask group, ``[k + 1]``."""
        sizes = np.arange(num_draft_tokens + 1)
        return np.array(self._draft)[np.minimum(sizes, len(self._draft) - 1)] * self._draft_factor

    def forward_ms(self, context: int) -> np.ndarray:
        """Milliseconds of a forward by its rows, ``[R + 1]``, at the pace of the measurement."""
        measured = self._measured(context)[0]
        rows = sorted(self._factors)
        factors = np.log([self._factors[each] for each in rows])
        ms = measured * np.exp(np.interp(np.arange(len(measured)), rows, factors))
        ran = np.full(len(ms), np.inf)
        ran[rows] = ms[rows]
        ms[2:] = np.minimum(ms, _rising(ran))[2:]  # no more than a larger number that ran
        return np.maximum.accumulate(ms)

    def observe(self, *, rows: int, largest_group: int, context: int, ms: float) -> float:
        """Learn from a step; one with more rows than were measured says nothing.

        Returns:
            What it took over what it should have taken; 1.0 where nothing was learnt.
        """
        if not self._learns or rows > self.curve.rows[-1] or ms <= 0:
            return 1.0
        measured = self._measured(context)[1][rows]
        if rows == 1 and not largest_group:
            undercut = ms < _UNDERCUT * measured
            self._num_undercut = max(self._num_undercut + (1 if undercut else -1), 0)
        factor = self._factor(rows)
        draft = self._draft[min(largest_group, len(self._draft) - 1)] * self._draft_factor
        expected = measured * factor + draft
        ratio = min(max(ms / (expected * self._pace), _LEAST_RATIO), _MOST_RATIO)
        self._num_steps += 1
        settled = self._num_steps > _SETTLED  # until then all is taken to be the pace
        seen = self._seen.get(rows, 0)
        rate = 1 / (seen + 2) if ratio < 1 and settled and seen < _SETTLED else _SLOW
        self._pace *= max(ratio, 1 / _MOST_RATIO) ** (_FAST * (1 - rate))
        if not settled:
            return 1.0
        self._factors[rows] = factor * ratio ** (rate * (1 - draft / expected))
        self._seen[rows] = seen + 1
        if draft:
            self._learn_draft(ratio, draft / expected)
        return ratio

    def _learn_draft(self, ratio: float, share: float) -> None:
        """Move the factor of drafting, which had that share in a step."""
        rate = 1 / (self._drafted + 2) if ratio < 1 and self._drafted < _SETTLED else _SLOW
        self._draft_factor *= ratio ** (rate * share)
        self._drafted += 1

    def _factor(self, rows: int) -> float:
        """What a row number's time is off by, or that of its neighbours that ran."""
        if (factor := self._factors.get(rows)) is not None:
            return factor
        ran = sorted(self._factors)
        factors = [math.log(self._factors[each]) for each in ran]
        return math.exp(float(np.interp(rows, ran, factors)))

    def _measured(self, context: int) -> tuple[np.ndarray, list[float]]:
        at = context // _CONTEXT_STEP
        if at not in self._forward:
            forward = self.curve.forward(at * _CONTEXT_STEP)
            self._forward[at] = forward, forward.tolist()
        return self._forward[at]


def widened(forward_ms: np.ndarray, most: int) -> np.ndarray:
    """Times of forwards up to so many rows, ``[R + 1]`` to ``[most + 1]``.

    Beyond the rows that were measured, each costs what the last half of them did.
    """
    last = len(forward_ms) - 1
    slope = (forward_ms[last] - forward_ms[last // 2]) / max(last - last // 2, 1)
    beyond = forward_ms[last] + slope * np.arange(1, most - last + 1)
    return np.concatenate([forward_ms, beyond])[: most + 1]


def shared_ms(forward_ms: np.ndarray, sharers: int) -> np.ndarray:
    """One answer's part of forwards that several share, each with as many rows.

    Args:
        forward_ms: of one answer alone, by rows, ``[R + 1]``, 0.0 at 0.
        sharers: how many answers share.

    Returns:
        ``[R + 1]``, by one answer's rows.
    """
    last = len(forward_ms) - 1
    return widened(forward_ms, sharers * last)[::sharers] / sharers


def _rising(times: np.ndarray) -> np.ndarray:
    """The largest times that never fall and are nowhere above those given."""
    return np.minimum.accumulate(times[::-1])[::-1]
