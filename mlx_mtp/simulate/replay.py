"""Decode a trace on a machine known by its costs: the same planners and steps, a reckoned clock.

The planners are the decoder's own, one for each answer as there.  A planner sees the rows that were
measured or published; a fixed layout may want more, and beyond the last known number of rows each
row is taken to cost what the rows up to there cost on average.  As with measured speeds the clock
starts behind the first step, which ends the prompt.  Drafts are masks' alone: what a text repeats
of itself is not in a trace, so nothing is looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.planning.planner import Planner
from mlx_mtp.simulate.trace import Trace, TracedAnswer

CONTEXT_STEP = 128  # contexts nearer than this cost the same, as for the planner


MakePlanner = Callable[[], Planner]


class StepCosts:
    """What steps take, however wide.

    Args:
        curve: up to the rows that are known.
        most_rows: rows that must have a time.
    """

    def __init__(self, curve: CostCurve, *, most_rows: int = 0) -> None:
        self._curve = curve
        self._draft = list(curve.draft_ms)
        self._known = curve.rows[-1]
        self._most = max(most_rows, self._known)
        self._tables: dict[int, list[float]] = {}

    def forward_ms(self, context: int) -> list[float]:
        """Time of a forward by its rows, ``[rows + 1]``."""
        at = context // CONTEXT_STEP
        if at not in self._tables:
            known = self._curve.forward(at * CONTEXT_STEP)
            wider = known[-1] / self._known * np.arange(self._known + 1, self._most + 1)
            self._tables[at] = [*known.tolist(), *wider.tolist()]
        return self._tables[at]

    def draft_ms(self, size: int) -> float:
        """Time to draft from a mask group."""
        return self._draft[min(size, len(self._draft) - 1)]

    def ms(self, rows: int, largest: int, context: int) -> float:
        """Time of a step.

        Args:
            rows: of the forward.
            largest: masks of its largest group.
            context: ids in the cache.
        """
        return self.forward_ms(context)[rows] + self.draft_ms(largest)


@dataclass
class Tally:
    """What was counted over answers.

    Attributes:
        tokens: emitted, those of the first steps among them.
        steps: the first steps among them.
        clocked: tokens emitted behind the first steps.
        ms: time of the steps behind the first.
        rows: rows of these steps.
        widest: rows of the widest step, first steps left out.
    """

    tokens: int = 0
    steps: int = 0
    clocked: int = 0
    ms: float = 0.0
    rows: int = 0
    widest: int = 0

    def add(self, other: Tally) -> None:
        """Count another tally's too."""
        for name in ("tokens", "steps", "clocked", "ms", "rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.widest = max(self.widest, other.widest)

    @property
    def tokens_per_step(self) -> float:
        """Tokens emitted over steps, as the decoder counts them."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def ms_per_step(self) -> float:
        """Time of a step behind the first ones."""
        timed = self.steps - (self.tokens - self.clocked)
        return self.ms / timed if timed else 0.0

    @property
    def tps(self) -> float:
        """Tokens a second behind the first steps."""
        return 1e3 * self.clocked / self.ms if self.ms else 0.0


@dataclass
class Replay:
    """A trace that was decoded.

    Attributes:
        total: over all answers.
        kinds: by kind of text.
        answers: each answer's.
    """

    total: Tally = field(default_factory=Tally)
    kinds: dict[str, Tally] = field(default_factory=dict)
    answers: list[Tally] = field(default_factory=list)

    def add(self, kind: str, tally: Tally) -> None:
        """Count an answer."""
        self.total.add(tally)
        self.answers.append(tally)
        self.kinds.setdefault(kind, Tally()).add(tally)


def replay(trace: Trace, make_planner: MakePlanner, costs: StepCosts) -> Replay:
    """Decode all answers of a trace.

    Args:
        trace: the drafts that hold.
        make_planner: called for each answer; what is to be remembered between them is its affair.
        costs: what steps take.
    """
    found = Replay()
    for answer in trace.answers:
        tally = replay_answer(answer, make_planner(), costs, max_tokens=trace.max_tokens)
        found.add(answer.kind, tally)
    return found


def replay_answer(
    answer: TracedAnswer, planner: Planner, costs: StepCosts, *, max_tokens: int
) -> Tally:
    """Decode one answer, step by step as ``decode`` does."""
    counts, tokens, prompt = answer.counts, answer.num_tokens, answer.prompt
    emitted = waiting = 0
    tally = Tally(tokens=tokens)
    while emitted < tokens:
        context = prompt + emitted - 1 if emitted else 0
        decision = planner.plan(
            num_pending=1 if emitted else prompt,
            num_waiting=waiting,
            room=max_tokens - emitted,
            context=context,
        )
        layout = decision.layout
        held = min(layout.num_draft_tokens, counts[emitted - 1]) if emitted else 0
        rows, ms = layout.num_rows, 0.0
        if emitted:
            ms = costs.ms(rows, max(layout.mask_counts), context)
            tally.clocked += min(held + 1, tokens - emitted)
            tally.ms += ms
            tally.rows += rows
            tally.widest = max(tally.widest, rows)
        planner.observe(decision, num_accepted=held, context=context, ms=ms)
        emitted += held + 1
        waiting = layout.mask_counts[held]
        tally.steps += 1
    return tally


def speculation(curve: CostCurve, shares: tuple[float, ...], num_draft_tokens: int) -> Speculation:
    """What a planner knows before the first answer: the curve, and the adapter's configuration."""
    prior = Acceptance.from_shares(shares) if shares else Acceptance.unknown(num_draft_tokens)
    return Speculation(LiveCosts(curve), prior)
