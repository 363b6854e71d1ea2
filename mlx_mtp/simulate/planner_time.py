"""What the planner itself takes: processor time of its part of every step of a replay.

Plan, observe and, every few steps, the look for a better rule are all in it, so the mean is what a
step pays.  It is the thread's own processor time, which other programs do not lengthen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_mtp.planning.auto import AutoPlanner
from mlx_mtp.planning.plan import Plan
from mlx_mtp.simulate.chips import Machine
from mlx_mtp.simulate.replay import StepCosts, replay, speculation
from mlx_mtp.simulate.trace import Trace


@dataclass
class TimedPlanner:
    """Another planner, on the clock; every step adds its nanoseconds to ``times``."""

    planner: AutoPlanner
    times: list[int] = field(default_factory=list)
    uses_lookup: bool = False

    def plan(self, **given: Any) -> Plan:
        """Plan a step."""
        began = time.thread_time_ns()
        decision = self.planner.plan(**given)
        self.times.append(time.thread_time_ns() - began)
        return decision

    def observe(self, plan: Plan, **given: Any) -> None:
        """Learn from it."""
        began = time.thread_time_ns()
        self.planner.observe(plan, **given)
        self.times[-1] += time.thread_time_ns() - began


def planner_us(trace: Trace, machine: Machine, *, passes: int = 1) -> np.ndarray:
    """Microseconds of processor time that the planner takes for each step, ``[steps]``.

    Args:
        trace: replayed with layout auto.
        machine: its costs.
        passes: how often; what was learnt stays, as in a long conversation.
    """
    k = trace.num_draft_tokens
    known = speculation(machine.curve, trace.shares, k)
    times: list[int] = []
    for _ in range(passes):
        replay(
            trace,
            lambda: TimedPlanner(AutoPlanner(known, num_draft_tokens=k, use_lookup=False), times),
            StepCosts(machine.curve, most_rows=(k + 1) ** 2),
        )
    return np.array(times) / 1e3
