"""The cost of a step by its number of rows: measured or guessed, corrected by the steps that run.

A step's time is split into the forward, by its rows and by the length of the cache, and the
drafting (low-rank weights, shortlist, sampler head), by the size of the mask group that is drafted
from.  Only ratios between row counts decide anything, so a machine that slows down as a whole
changes no plan.

A guess is in plain steps, not milliseconds.  The first steps on it are plain and set the pace;
after that all row counts that run are learned quickly.  Simulated on twelve machines, from chips
with published costs to a CPU without a fast BLAS, ``auto`` started this way reaches 96 to 99% of
plain decoding in the first 10 answers where drafting cannot pay, and 1.2 to 2.4 times where it can.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

_CONTEXT_STEP = 128  # contexts nearer than this share a curve
_FAST, _SLOW = 0.2, 0.05  # how quickly the machine's pace, and one row number's own cost, follow
_MOST_RATIO = 2.0  # a step that took longer than this against its prediction was disturbed
_LEAST_RATIO = 0.01  # no machine's pace or error is beyond this
_SETTLED = 18  # steps after which the pace is known, and observations that settle a row count
_PLAIN_STEPS = 6  # that set the pace of a guess
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
        is_guess: whether nothing was measured; the times are then in plain steps.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    forward_ms: tuple[tuple[float, ...], ...]
    draft_ms: tuple[float, ...]
    source: str = ""
    disturbed: bool = False
    is_guess: bool = False

    def __post_init__(self) -> None:
        times = [ms for line in self.forward_ms for ms in line] + list(self.draft_ms)
        shape = [len(line) for line in self.forward_ms]
        if not self.rows or self.rows[0] != 1 or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows must ascend from 1, got {list(self.rows)}")
        if not self.contexts or list(self.contexts) != sorted(set(self.contexts)):
            raise ValueError(f"contexts must ascend, got {list(self.contexts)}")
        if shape != [len(self.rows)] * len(self.contexts):
            raise ValueError(
                f"{len(self.contexts)} contexts of {len(self.rows)} row numbers need as many times"
            )
        if not all(math.isfinite(ms) and ms >= 0 for ms in times):
            raise ValueError("times must be finite and at least 0")
        if min(min(line) for line in self.forward_ms) <= 0 or self.draft_ms[:1] != (0.0,):
            raise ValueError("forwards take time, and drafting from no masks takes none")

    @property
    def num_draft_tokens(self) -> int:
        """k of the adapter that it was measured with."""
        return len(self.draft_ms) - 1

    @property
    def doubt(self) -> str:
        """Why the times may be wrong, for people; empty if they should be right."""
        if self.is_guess:
            return "estimated, not measured on this machine (mlx-mtp tune)"
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
            count
            for count in {*self.rows, *other.rows}
            if all(curve.disturbed or count in curve.rows for curve in (self, other))
        )
        lines = []
        for mine, theirs in zip(self.forward_ms, other.forward_ms, strict=True):
            known = dict(zip(other.rows, theirs, strict=True))
            for count, ms in zip(self.rows, mine, strict=True):
                known[count] = min(ms, known.get(count, ms))
            lines.append(tuple(known[count] for count in rows))
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
        measured = [np.interp(context, self.contexts, lines[:, i]) for i in range(len(self.rows))]
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
                rows=tuple(int(count) for count in values["rows"]),
                contexts=tuple(int(length) for length in values["contexts"]),
                forward_ms=tuple(tuple(float(ms) for ms in line) for line in values["forward_ms"]),
                draft_ms=tuple(float(ms) for ms in values["draft_ms"]),
                source=str(values.get("source", "")),
                disturbed=bool(values.get("disturbed", False)),
                is_guess=bool(values.get("is_guess", False)),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a cost curve: {error!r}") from None


def _guess(
    device: str, rows: tuple[int, ...], forward: tuple[float, ...], draft: tuple[float, ...]
) -> CostCurve:
    return CostCurve(
        rows=rows, contexts=(0,), forward_ms=(forward,), draft_ms=draft,
        source=f"estimated for {device}, not measured", is_guess=True,
    )  # fmt: skip


# In plain steps; a little above most machines of the kind in ``simulate/chips.json``.
_ROWS = (1, 2, 4, 8, 16, 32)
GPU_GUESS = _guess("a GPU", _ROWS, (1.0, 1.15, 1.4, 2.2, 3.5, 5.0), (0.0, 0.14, 0.16, 0.18, 0.2))
CPU_GUESS = _guess("a CPU", _ROWS, (1.0, 1.15, 1.35, 1.8, 2.7, 4.0), (0.0, 0.3, 0.4, 0.45, 0.5))
SLOW_CPU_GUESS = _guess(
    "a CPU without a fast BLAS", _ROWS, (1.0, 1.85, 3.5, 6.9, 13.7, 27.2), (0.0, 0.15, 0.2)
)


@dataclass
class Corrections:
    """What the steps that ran have shown about a cost curve.

    Attributes:
        pace: the machine's current speed, as a factor on all times.
        factors: by row counts that ran, relative to the pace; the pace is that of plain steps.
        num_seen: observations of each of these row counts.
        draft_factor: of drafting.
        num_drafted: observations of it.
        num_steps: steps observed.
    """

    pace: float = 1.0
    factors: dict[int, float] = field(default_factory=lambda: {1: 1.0})
    num_seen: dict[int, int] = field(default_factory=lambda: {1: _SETTLED})
    draft_factor: float = 1.0
    num_drafted: int = 0
    num_steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Corrections:
        """Build from the result of ``to_dict``, also after JSON has made its keys strings.

        Raises:
            ValueError: a value is missing or out of range.
        """
        try:
            made = cls(
                pace=float(values["pace"]),
                factors={int(rows): float(x) for rows, x in values["factors"].items()},
                num_seen={int(rows): int(n) for rows, n in values["num_seen"].items()},
                draft_factor=float(values["draft_factor"]),
                num_drafted=int(values["num_drafted"]),
                num_steps=int(values["num_steps"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not corrections of a cost curve: {error!r}") from None
        factors = [made.pace, made.draft_factor, *made.factors.values()]
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ValueError(f"factors must be positive, got {factors}")
        if 1 not in made.factors or min(made.factors) < 1:
            raise ValueError(f"factors must be of 1 and more rows, got {sorted(made.factors)}")
        return made


class LiveCosts:
    """A cost curve that follows the steps that run.

    One factor follows the machine's pace quickly; one per row count that ran follows, slowly, the
    cost of that count relative to the others, and one the cost of drafting.  Only the latter two
    change what is best.  Row counts that never ran are taken to be as far off as their neighbours
    that did.  Other work on the machine only adds time, so a step that took less than expected is
    believed quickly while its row count is new; one that took more only if the curve is a guess.

    Attributes:
        curve: the measurement or guess that the corrections apply to.
        corrections: what the steps that ran have shown.

    Args:
        learns: False keeps to the curve as it is.
        corrections: from an earlier run.
    """

    def __init__(
        self, curve: CostCurve, *, learns: bool = True, corrections: Corrections | None = None
    ) -> None:
        self.curve = curve
        self.corrections = corrections or Corrections()
        self._learns = learns
        self._num_steps = 0
        self._num_pace_steps = _PLAIN_STEPS if self.needs_plain_steps else _SETTLED
        self._num_undercut = 0
        self._num_known = 0  # steps all of whose parts were known
        self._forward: dict[int, tuple[np.ndarray, list[float]]] = {}
        self._draft = list(curve.draft_ms)  # plain numbers, for single look-ups in every step

    @property
    def needs_plain_steps(self) -> bool:
        """Whether the next steps should be plain ones, which set the pace of a guess."""
        is_new = self.corrections.num_steps < _PLAIN_STEPS
        return is_new and self.curve.is_guess and self._learns

    @property
    def knows_pace(self) -> bool:
        """Whether enough steps without proposals of unknown cost have run to compare others with.

        Otherwise what proposing takes would be mistaken for the machine's pace, or the reverse.
        """
        return not self._learns or self._num_known >= _PLAIN_STEPS

    @property
    def is_disproved(self) -> bool:
        """Whether plain steps run so much faster than measured that the measurement is wrong.

        It is the fastest of several runs, which an undisturbed machine cannot undercut by much.
        """
        return self._num_undercut >= _UNDERCUT_STEPS

    def draft_ms(self, num_draft_tokens: int) -> np.ndarray:
        """Milliseconds to draft by the size of the mask group, ``[k + 1]``."""
        sizes = np.minimum(np.arange(num_draft_tokens + 1), len(self._draft) - 1)
        return np.array(self._draft)[sizes] * self.corrections.draft_factor

    def forward_ms(self, context: int) -> np.ndarray:
        """Milliseconds of a forward by its rows, ``[R + 1]``, at the pace of the measurement."""
        measured = self._measured(context)[0]
        learned = self.corrections.factors
        rows = sorted(count for count in learned if count < len(measured))
        factors = np.log([learned[count] for count in rows])
        ms = measured * np.exp(np.interp(np.arange(len(measured)), rows, factors))
        ran = np.full(len(ms), np.inf)
        ran[rows] = ms[rows]
        ms[2:] = np.minimum(ms, _rising(ran))[2:]  # no more than a larger count that ran
        return np.maximum.accumulate(ms)

    def observe(
        self,
        *,
        rows: int,
        largest_group: int,
        context: int,
        ms: float,
        proposal_ms: float = 0.0,
        is_proposal_new: bool = False,
    ) -> float:
        """Learn from a step; one with more rows than the curve has teaches nothing.

        Args:
            rows: rows of its forward.
            largest_group: size of its largest mask group.
            context: ids in the cache before it.
            ms: duration.
            proposal_ms: expected part of proposing its drafts, at the pace of the measurement.
            is_proposal_new: whether that is a first guess, so that the step teaches nothing else.

        Returns:
            The time that it took over the time expected; 1.0 where nothing was learned.
        """
        if not self._learns or rows > self.curve.rows[-1] or ms <= 0:
            return 1.0
        measured = self._measured(context)[1][rows]
        if rows == 1 and not largest_group and not self.curve.is_guess:
            undercut = ms < _UNDERCUT * measured
            self._num_undercut = max(self._num_undercut + (1 if undercut else -1), 0)
        known, factor = self.corrections, self._factor(rows)
        draft = self._draft[min(largest_group, len(self._draft) - 1)] * known.draft_factor
        expected = measured * factor + draft + proposal_ms
        if self.needs_plain_steps:
            pace = ms / expected
            known.pace = min(pace, known.pace) if known.num_steps else pace
        ratio = min(max(ms / (expected * known.pace), _LEAST_RATIO), _MOST_RATIO)
        if is_proposal_new:
            return ratio if self.knows_pace else 1.0
        self._num_known += 1
        self._num_steps += 1
        known.num_steps += 1
        is_settled = self._num_steps > self._num_pace_steps  # until then only the pace is learned
        seen = known.num_seen.get(rows, 0)
        rate = self._rate(ratio, seen) if is_settled else _SLOW
        known.pace *= max(ratio, 1 / _MOST_RATIO) ** (_FAST * (1 - rate))
        if not is_settled:
            return 1.0
        known.factors[rows] = factor * ratio ** (rate * measured * factor / expected)
        known.num_seen[rows] = seen + 1
        if draft:
            rate = self._rate(ratio, known.num_drafted)
            known.draft_factor *= ratio ** (rate * draft / expected)
            known.num_drafted += 1
        return ratio

    def _rate(self, ratio: float, num_seen: int) -> float:
        """How far a factor moves towards one more observation."""
        is_believed = ratio < 1 or self.curve.is_guess
        return 1 / (num_seen + 2) if is_believed and num_seen < _SETTLED else _SLOW

    def _factor(self, rows: int) -> float:
        """Correction of a row count, or that of its neighbours that ran."""
        learned = self.corrections.factors
        if (factor := learned.get(rows)) is not None:
            return factor
        ran = sorted(learned)
        factors = [math.log(learned[count]) for count in ran]
        return math.exp(float(np.interp(rows, ran, factors)))

    def _measured(self, context: int) -> tuple[np.ndarray, list[float]]:
        index = context // _CONTEXT_STEP
        if index not in self._forward:
            forward = self.curve.forward(index * _CONTEXT_STEP)
            self._forward[index] = forward, forward.tolist()
        return self._forward[index]


def widened(forward_ms: np.ndarray, most: int) -> np.ndarray:
    """Times of forwards up to so many rows, ``[R + 1]`` to ``[most + 1]``.

    Beyond the rows that were measured, each costs what the last half of them did.
    """
    last = len(forward_ms) - 1
    slope = (forward_ms[last] - forward_ms[last // 2]) / max(last - last // 2, 1)
    beyond = forward_ms[last] + slope * np.arange(1, most - last + 1)
    return np.concatenate([forward_ms, beyond])[: most + 1]


def is_one_pass_cheaper(
    forward_ms: np.ndarray, *, verified: int, drafted: int, num_rows: int, share: float
) -> bool:
    """Whether the head should pass over all rows of a step at once.

    Otherwise it passes over the verify rows first, and over the mask rows of the accepted prefix
    when that is known.  A head takes as much longer for more rows as a forward does.

    Args:
        forward_ms: time of a forward by its rows, ``[R + 1]``, 0.0 at 0.
        verified: verify rows.
        drafted: mask rows of a second pass.
        num_rows: verify rows and all mask rows.
        share: of the vocabulary that the second pass is over.
    """
    ms = widened(forward_ms, max(num_rows, drafted))
    return bool(ms[num_rows] <= ms[verified] + share * ms[drafted])


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
