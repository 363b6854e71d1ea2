"""One machine's simulation: every way to decode a trace there, beside the best that is possible."""

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
    """A trace on a machine.

    Attributes:
        machine: which.
        replays: by mode, one of ``MODES``.
        fixed: the fastest fixed layout with known rows, and its name.
        optimum: the fastest rule in hindsight.
        clairvoyant_tps: tokens a second for one who knows which drafts will hold.
    """

    machine: Machine
    replays: dict[str, Replay]
    fixed: tuple[str, Replay]
    optimum: Optimum
    clairvoyant_tps: float

    @property
    def of_optimum(self) -> float:
        """Speed of auto over that of the offline optimum."""
        return self.replays["auto"].total.tps / self.optimum.replay.total.tps

    @property
    def optimum_error(self) -> float:
        """Standard error of ``of_optimum``."""
        return slowdown_error(self.replays["auto"], self.optimum.replay)

    def is_reckoned(self, tally: Tally) -> bool:
        """Whether steps were wider than what is known."""
        return tally.widest > self.machine.most_rows

    def columns(self) -> dict[str, Replay]:
        """All replays by the name of their column."""
        return {**self.replays, "best fixed": self.fixed[1], "optimum": self.optimum.replay}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "machine": self.machine.name,
            "what": self.machine.what,
            "source": self.machine.curve.source,
            "in_ms": self.machine.in_ms,
            "notes": list(self.machine.notes),
            "most_rows": self.machine.most_rows,
            "best_fixed": self.fixed[0],
            "optimum": self.optimum.name,
            "auto_of_optimum": round(self.of_optimum, 4),
            "auto_of_optimum_error": (
                round(self.optimum_error, 4) if math.isfinite(self.optimum_error) else None
            ),
            "clairvoyant_speedup": self._ratio(self.clairvoyant_tps, None),
            "all": {name: self._cell(each.total, None) for name, each in self.columns().items()},
            "kinds": {
                kind: {
                    name: self._cell(each.kinds[kind], kind)
                    for name, each in self.columns().items()
                }
                for kind in self.replays["plain"].kinds
            },
        }

    def speedup(self, tally: Tally, kind: str | None = None) -> float:
        """Over plain decoding."""
        return self._ratio(tally.tps, kind)

    def _ratio(self, tps: float, kind: str | None) -> float:
        plain = self.replays["plain"]
        base = (plain.total if kind is None else plain.kinds[kind]).tps
        return round(tps / base, 4) if base else 0.0

    def _cell(self, tally: Tally, kind: str | None) -> dict[str, Any]:
        cell: dict[str, Any] = {
            "speedup": self._ratio(tally.tps, kind),
            "tokens_per_step": round(tally.tokens_per_step, 4),
            "rows_beyond_known": self.is_reckoned(tally),
        }
        if self.machine.in_ms:
            cell |= {"tps": round(tally.tps, 3), "ms_per_step": round(tally.ms_per_step, 3)}
        return cell


def slowdown_error(one: Replay, other: Replay) -> float:
    """Standard error of one replay's time over another's, of the same answers, which differ."""
    more = np.array([a.ms - b.ms for a, b in zip(one.answers, other.answers, strict=True)])
    if len(more) < 2:
        return float("inf")
    return float(more.std(ddof=1) * len(more) ** 0.5 / other.total.ms)


def simulate(
    trace: Trace,
    machine: Machine,
    *,
    num_draft_tokens: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Simulation:
    """Decode a trace on a machine in every way.

    Args:
        trace: the drafts that hold.
        machine: its costs, for a curve with as many drafts or fewer.
        num_draft_tokens: drafts per step, at most the trace's k, which is the default.
        progress: called with what is going on.

    Raises:
        ValueError: there are more drafts than in the trace, or fewer than one.
    """
    k = trace.num_draft_tokens if num_draft_tokens is None else num_draft_tokens
    trace = trace.limited(k)
    costs = StepCosts(machine.curve, most_rows=(k + 1) ** 2)
    progress(f"{machine.name}: fixed layouts ...")
    fixed = {
        f"{layout} {size}": replay(
            trace, partial(FixedPlanner, layout, num_draft_tokens=size), costs
        )
        for layout in ("linear", "quadratic")
        for size in range(1, k + 1)
    }
    plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
    known = {"plain": plain} | {
        name: each for name, each in fixed.items() if each.total.widest <= machine.most_rows
    }
    best = max(known, key=lambda name: known[name].total.tps)
    progress(f"{machine.name}: auto ...")
    auto = replay_auto(trace, machine, costs)
    progress(f"{machine.name}: the best rule in hindsight ...")
    optimum = offline_optimum(trace, costs, most_rows=machine.most_rows, context=_middle(trace))
    return Simulation(
        machine=machine,
        replays={
            "plain": plain,
            "linear": fixed[f"linear {k}"],
            "quadratic": fixed[f"quadratic {k}"],
            "auto": auto,
        },
        fixed=(best, known[best]),
        optimum=optimum,
        clairvoyant_tps=1e3 * plain.total.clocked / clairvoyant_ms(trace, costs),
    )


def replay_auto(trace: Trace, machine: Machine, costs: StepCosts) -> Replay:
    """What ``auto`` does: it begins with the curve and the adapter's word, and learns on."""
    k = trace.num_draft_tokens
    known = speculation(machine.curve, trace.shares, k)
    return replay(trace, lambda: AutoPlanner(known, num_draft_tokens=k, use_lookup=False), costs)


def _middle(trace: Trace) -> int:
    """Ids in the cache halfway through the answers, on average."""
    places = [each.prompt + each.num_tokens // 2 for each in trace.answers]
    return sum(places) // len(places)
