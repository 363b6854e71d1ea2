"""Simulation of one machine: a trace in every layout, and the best that is possible."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlx_mtp.planning.auto import AutoPlanner
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.simulate.chips import Machine
from mlx_mtp.simulate.optimum import Optimum, clairvoyant_ms, offline_optimum
from mlx_mtp.simulate.replay import Replay, StepCosts, Tally, replay, speculation
from mlx_mtp.simulate.trace import Trace

MODES = ("plain", "linear", "quadratic", "auto")


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Results of a trace on a machine.

    Attributes:
        machine: the machine.
        replays: results by mode, one of ``MODES``.
        fixed: name and result of the fastest fixed layout whose rows have a known cost.
        optimum: the fastest fixed policy in hindsight.
        clairvoyant_tps: tokens per second of a planner that knows which drafts are accepted.
    """

    machine: Machine
    replays: dict[str, Replay]
    fixed: tuple[str, Replay]
    optimum: Optimum
    clairvoyant_tps: float

    @property
    def of_optimum(self) -> float:
        """Speed of auto divided by that of the offline optimum."""
        return self.replays["auto"].total.tps / self.optimum.replay.total.tps

    @property
    def optimum_error(self) -> float:
        """Standard error of ``of_optimum``."""
        return slowdown_error(self.replays["auto"], self.optimum.replay)

    def is_extrapolated(self, tally: Tally) -> bool:
        """Whether steps were wider than the known costs."""
        return tally.widest > self.machine.max_rows

    def columns(self) -> dict[str, Replay]:
        """All results by the name of their column."""
        return {**self.replays, "best fixed": self.fixed[1], "optimum": self.optimum.replay}

    def speedup(self, tally: Tally, kind: str | None = None) -> float:
        """Speed divided by that of plain decoding on the same kind of text."""
        return self._ratio(tally.tps, kind)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        error = self.optimum_error
        return {
            "machine": self.machine.name,
            "what": self.machine.description,
            "source": self.machine.curve.source,
            "in_ms": self.machine.in_ms,
            "notes": list(self.machine.notes),
            "most_rows": self.machine.max_rows,
            "best_fixed": self.fixed[0],
            "optimum": self.optimum.name,
            "auto_of_optimum": round(self.of_optimum, 4),
            "auto_of_optimum_error": round(error, 4) if math.isfinite(error) else None,
            "clairvoyant_speedup": self._ratio(self.clairvoyant_tps, None),
            "all": self._cells(None),
            "kinds": {kind: self._cells(kind) for kind in self.replays["plain"].kinds},
        }

    def _ratio(self, tps: float, kind: str | None) -> float:
        base = self.replays["plain"].tally(kind).tps
        return round(tps / base, 4) if base else 0.0

    def _cells(self, kind: str | None) -> dict[str, Any]:
        return {name: self._cell(done.tally(kind), kind) for name, done in self.columns().items()}

    def _cell(self, tally: Tally, kind: str | None) -> dict[str, Any]:
        cell: dict[str, Any] = {
            "speedup": self.speedup(tally, kind),
            "tokens_per_step": round(tally.tokens_per_step, 4),
            "rows_beyond_known": self.is_extrapolated(tally),
        }
        if self.machine.in_ms:
            cell |= {"tps": round(tally.tps, 3), "ms_per_step": round(tally.ms_per_step, 3)}
        return cell


def slowdown_error(one: Replay, other: Replay) -> float:
    """Standard error of one replay's time divided by another's, from the spread over answers."""
    excess = np.array([a.ms - b.ms for a, b in zip(one.answers, other.answers, strict=True)])
    if len(excess) < 2:
        return float("inf")
    return float(excess.std(ddof=1) * len(excess) ** 0.5 / other.total.ms)


def simulate(
    trace: Trace,
    machine: Machine,
    *,
    num_draft_tokens: int | None = None,
    on_status: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """Replay a trace on a machine in every layout.

    Args:
        trace: the accepted drafts.
        machine: provides the costs.
        num_draft_tokens: drafts per step, at most the k of the trace, which is the default.
        on_status: called with a line about the work in progress.

    Raises:
        ValueError: ``num_draft_tokens`` is more than the k of the trace, or less than one.
    """
    k = trace.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
    trace = trace.limited(k)
    costs = StepCosts(machine.curve, max_rows=(k + 1) ** 2)
    on_status(f"{machine.name}: fixed layouts ...")
    fixed = {
        f"{layout} {size}": replay(
            trace, partial(FixedPlanner, layout, num_draft_tokens=size), costs
        )
        for layout in ("linear", "quadratic")
        for size in range(1, k + 1)
    }
    plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
    known = {"plain": plain} | {
        name: done for name, done in fixed.items() if done.total.widest <= machine.max_rows
    }
    best = max(known, key=lambda name: known[name].total.tps)
    on_status(f"{machine.name}: auto ...")
    auto = replay_auto(trace, machine, costs)
    on_status(f"{machine.name}: the best policy in hindsight ...")
    middles = [answer.prompt + answer.num_tokens // 2 for answer in trace.answers]
    context = sum(middles) // len(middles)  # of the cache halfway through an average answer
    return Simulation(
        machine=machine,
        replays={
            "plain": plain,
            "linear": fixed[f"linear {k}"],
            "quadratic": fixed[f"quadratic {k}"],
            "auto": auto,
        },
        fixed=(best, known[best]),
        optimum=offline_optimum(trace, costs, max_rows=machine.max_rows, context=context),
        clairvoyant_tps=1e3 * plain.total.clocked / clairvoyant_ms(trace, costs),
    )


def replay_auto(trace: Trace, machine: Machine, costs: StepCosts) -> Replay:
    """Replay with layout auto, which starts from the curve and the adapter's configuration."""
    k = trace.num_draft_tokens
    known = speculation(machine.curve, trace.shares, k)
    return replay(trace, lambda: AutoPlanner(known, num_draft_tokens=k), costs)
