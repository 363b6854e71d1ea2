"""Processor time of the planner per step of a replay: ``python -m mlx_mtp.lab.planner_time``.

The time of a step includes planning, learning from the result and, every few steps, the search for
a better policy.  It is processor time of the thread, which other programs do not lengthen.  The
last line of the output is one JSON line.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_mtp.planning.auto import AutoPlanner
from mlx_mtp.planning.plan import Plan
from mlx_mtp.simulate.chips import Machine, chip_named, chips
from mlx_mtp.simulate.replay import StepCosts, replay, speculation
from mlx_mtp.simulate.trace import Trace, read_trace

_MIN_TOKENS = 6000  # enough that one-time work has little weight


@dataclass
class TimedPlanner:
    """Wraps a planner; every step appends its nanoseconds to ``times``."""

    planner: AutoPlanner
    times: list[int] = field(default_factory=list)

    def plan(self, **arguments: Any) -> Plan:
        """Plan a step."""
        began = time.thread_time_ns()
        plan = self.planner.plan(**arguments)
        self.times.append(time.thread_time_ns() - began)
        return plan

    def observe(self, plan: Plan, **result: Any) -> None:
        """Learn from a step."""
        began = time.thread_time_ns()
        self.planner.observe(plan, **result)
        self.times[-1] += time.thread_time_ns() - began


def planner_us(trace: Trace, machine: Machine, *, passes: int = 1) -> np.ndarray:
    """Microseconds of processor time of the planner per step, ``[steps]``.

    Args:
        trace: replayed with layout auto.
        machine: provides the step costs.
        passes: number of replays; the planner keeps learning, as in a long conversation.
    """
    k = trace.num_draft_tokens
    known = speculation(machine.curve, trace.shares, k)
    costs = StepCosts(machine.curve, max_rows=(k + 1) ** 2)
    times: list[int] = []

    def make_planner() -> TimedPlanner:
        return TimedPlanner(AutoPlanner(known, num_draft_tokens=k), times)

    for _ in range(passes):
        replay(trace, make_planner, costs)
    return np.array(times) / 1e3


@click.command()
@click.option("--chip", "names", multiple=True, help="Chip to simulate; repeatable. [default: all]")
@click.option("--trace", "path", type=click.Path(path_type=Path), help="Trace to replay.")
def main(names: tuple[str, ...], path: Path | None) -> None:
    """Measure the processor time of the planner on a trace."""
    trace = read_trace(path)
    passes = max(2, -(-_MIN_TOKENS // sum(answer.num_tokens for answer in trace.answers)))
    results = {}
    print("planner, microseconds of processor time per step: p50, p99, mean")
    for name in names or chips():
        times = planner_us(trace, chip_named(name).machine(trace.num_draft_tokens), passes=passes)
        p50, p99, mean = *np.percentile(times, [50, 99]), times.mean()
        print(f"{name:<20}{p50:8.1f}{p99:8.1f}{mean:8.1f}  ({len(times)} steps)")
        results[name] = {"p50_us": p50, "p99_us": p99, "mean_us": mean, "steps": len(times)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
