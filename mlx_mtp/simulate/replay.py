"""Replays a trace on a machine of which only the step costs are known.

Planners and steps are those of the decoder; the clock adds up the costs.  Planners see only costs
that were measured or published.  A fixed layout may need wider steps; each row beyond the last
known number costs what the known rows cost on average.  As for measured speeds, the clock starts
after the first step, which ends the prompt.  A trace has only drafts of masks, so nothing is looked
up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import MASK
from mlx_mtp.planning.planner import Planner
from mlx_mtp.simulate.trace import Trace, TracedAnswer

CONTEXT_STEP = 128  # contexts within one step cost the same, as for the planner

MakePlanner = Callable[[], Planner]


class StepCosts:
    """Durations of steps of any width.

    Args:
        curve: costs up to the known number of rows.
        max_rows: number of rows that must have a cost.
    """

    def __init__(self, curve: CostCurve, *, max_rows: int = 0) -> None:
        self._curve = curve
        self._max_rows = max_rows
        self._tables: dict[int, list[float]] = {}

    def forward_ms(self, context: int) -> list[float]:
        """Milliseconds of a forward by its rows, ``[rows + 1]``."""
        index = context // CONTEXT_STEP
        if index not in self._tables:
            known = self._curve.forward(index * CONTEXT_STEP)
            last = len(known) - 1
            wider = known[-1] / last * np.arange(last + 1, self._max_rows + 1)
            self._tables[index] = [*known.tolist(), *wider.tolist()]
        return self._tables[index]

    def draft_ms(self, size: int) -> float:
        """Milliseconds of drafting from a mask group."""
        return self._curve.draft_ms[min(size, len(self._curve.draft_ms) - 1)]

    def ms(self, rows: int, largest: int, context: int) -> float:
        """Milliseconds of a step.

        Args:
            rows: rows of the forward.
            largest: masks of its largest group.
            context: number of ids in the cache.
        """
        return self.forward_ms(context)[rows] + self.draft_ms(largest)


@dataclass
class Tally:
    """Counts over answers.

    Attributes:
        tokens: emitted tokens, including the first steps.
        steps: number of steps, including the first steps.
        clocked: tokens emitted after the first steps.
        ms: duration of the steps after the first.
        rows: rows of these steps.
        widest: rows of the widest of these steps.
    """

    tokens: int = 0
    steps: int = 0
    clocked: int = 0
    ms: float = 0.0
    rows: int = 0
    widest: int = 0

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name in ("tokens", "steps", "clocked", "ms", "rows"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.widest = max(self.widest, other.widest)

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per step, as the decoder counts them."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def ms_per_step(self) -> float:
        """Milliseconds per step after the first ones."""
        num_timed = self.steps - (self.tokens - self.clocked)
        return self.ms / num_timed if num_timed else 0.0

    @property
    def tps(self) -> float:
        """Tokens per second after the first steps."""
        return 1e3 * self.clocked / self.ms if self.ms else 0.0


@dataclass
class Replay:
    """Result of replaying a trace.

    Attributes:
        total: counts over all answers.
        kinds: counts by kind of text.
        answers: counts of each answer.
    """

    total: Tally = field(default_factory=Tally)
    kinds: dict[str, Tally] = field(default_factory=dict)
    answers: list[Tally] = field(default_factory=list)

    def add(self, kind: str, tally: Tally) -> None:
        """Add an answer."""
        self.total.add(tally)
        self.answers.append(tally)
        self.kinds.setdefault(kind, Tally()).add(tally)

    def tally(self, kind: str | None) -> Tally:
        """Counts of one kind of text; of all answers for None."""
        return self.total if kind is None else self.kinds[kind]


def replay(trace: Trace, make_planner: MakePlanner, costs: StepCosts) -> Replay:
    """Replay all answers of a trace.

    Args:
        trace: the accepted drafts.
        make_planner: called for each answer; planners may share what they learn.
        costs: durations of steps.
    """
    result = Replay()
    for answer in trace.answers:
        tally = replay_answer(answer, make_planner(), costs, max_tokens=trace.max_tokens)
        result.add(answer.kind, tally)
    return result


def replay_answer(
    answer: TracedAnswer, planner: Planner, costs: StepCosts, *, max_tokens: int
) -> Tally:
    """Replay one answer, step by step as ``decode`` does."""
    counts, tokens, prompt = answer.counts, answer.num_tokens, answer.prompt
    emitted = waiting = 0
    tally = Tally(tokens=tokens)
    while emitted < tokens:
        context = prompt + emitted - 1 if emitted else 0
        plan = planner.plan(
            num_pending=1 if emitted else prompt,
            room=max_tokens - emitted,
            offers=[Offer(MASK, waiting)],
            context=context,
        )
        layout = plan.layout
        accepted = min(layout.num_draft_tokens, counts[emitted - 1]) if emitted else 0
        rows, ms = layout.num_rows, 0.0
        if emitted:
            ms = costs.ms(rows, max(layout.mask_counts), context)
            tally.clocked += min(accepted + 1, tokens - emitted)
            tally.ms += ms
            tally.rows += rows
            tally.widest = max(tally.widest, rows)
        planner.observe(plan, last_node=accepted, context=context, ms=ms)
        emitted += accepted + 1
        waiting = layout.mask_counts[accepted]
        tally.steps += 1
    return tally


def speculation(curve: CostCurve, shares: tuple[float, ...], num_draft_tokens: int) -> Speculation:
    """What a planner knows before the first answer: the curve and the adapter's configuration."""
    prior = Acceptance.from_shares(shares) if shares else Acceptance.unknown(num_draft_tokens)
    return Speculation(LiveCosts(curve), prior)
