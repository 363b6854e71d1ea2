"""The pace of a run: continuous progress and learning rates, however often it is planned again."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.train.optimiser import schedule
from mlx_mtp.train.pace import Budget, Pace, Timing
from mlx_mtp.train.settings import TrainSettings

SETTINGS = TrainSettings(iters=200, warmup=20, learning_rate=1.0, min_learning_rate=0.02)
plans = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 400)), max_size=6)


def replanned(plans: list[tuple[int, int]], iters: int = 200) -> list[tuple[int, Pace]]:
    """Paces with the steps at which they begin; each plan is (steps later, steps left then)."""
    pace, step = Pace.of(iters, warmup=20), 0
    found = [(0, pace)]
    for later, left in plans:
        step = min(step + later, pace.iters - 1)
        pace = pace.replanned(step, step + left)
        found.append((step, pace))
    return found


def rate(pace: Pace, step: int) -> float:
    return float(np.array(schedule(SETTINGS, pace)(mx.array(step))))


@given(plans)
def test_a_new_plan_changes_the_slope_and_never_jumps(plans):
    found = replanned(plans)
    for (_, before), (step, after) in itertools.pairwise(found):
        assert after.progress(step) == pytest.approx(before.progress(step), abs=1e-12)
        assert rate(after, step) == pytest.approx(rate(before, step), abs=1e-5)
    last = found[-1][1]
    assert last.progress(max(last.iters, last.warmup + 1)) == 1.0


@given(plans)
def test_the_progress_never_falls_and_the_rate_never_rises_after_the_warmup(plans):
    found = [*replanned(plans), None]
    values, rates = [], []
    for here, following in itertools.pairwise(found):
        assert here is not None
        step, pace = here
        end = pace.iters if following is None else following[0]
        values += [pace.progress(each) for each in range(step, end)]
        rates += [rate(pace, each) for each in range(max(step, 20), end)]
    assert values == sorted(values)
    assert np.all(np.diff(rates) <= 1e-6)


def test_without_a_new_plan_it_is_the_usual_schedule():
    steps = range(0, 205, 5)
    pace = Pace.of(200, warmup=20)
    assert [rate(pace, s) for s in steps] == [
        float(np.array(schedule(SETTINGS)(mx.array(s)))) for s in steps
    ]
    assert rate(pace, 0) == pytest.approx(1 / 21) and rate(pace, 20) == 1.0
    assert rate(pace, 110) == pytest.approx(0.51) and rate(pace, 200) == pytest.approx(0.02)


@given(st.floats(10, 1e5), st.floats(0, 1e5), st.floats(0.01, 100), st.floats(0, 100),
       st.integers(1, 500), st.booleans())  # fmt: skip
def test_the_planned_steps_fit_the_time(total, spent, step_s, eval_s, steps_per_eval, now):
    timing = Timing(total_s=total, spent_s=spent, step_s=step_s, eval_s=eval_s)
    steps = timing.steps_left(steps_per_eval=steps_per_eval, evaluates_now=now)
    seconds = steps * step_s + (steps // steps_per_eval + 1 + now) * eval_s
    assert steps == 0 or spent + seconds <= total * (1 + 1e-9)


def test_the_first_measurement_replaces_the_estimate_and_later_ones_are_damped():
    timing = Timing(total_s=1000, spent_s=10, step_s=99, eval_s=5, planned_s=10)
    timing.measure(0)
    assert timing.step_s == 99
    timing.spent_s = 36
    timing.add_evaluation(6)
    timing.measure(10)
    assert (timing.step_s, timing.eval_s, timing.evaluated_s) == (2.0, 6, 0)
    timing.spent_s = 76
    timing.measure(20)
    assert timing.step_s == 3.0


def test_no_time_passes_while_a_run_is_stopped():
    now = itertools.count(100.0, 10.0)
    budget = Budget(total_s=50, step_s=1, eval_s=1, max_passes=3, spent_s=7, began=next(now),
                    clock=lambda: next(now))  # fmt: skip
    assert budget.spent() == 17
    assert budget.timing().spent_s == 27
