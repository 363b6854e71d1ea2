"""A planner whose costs are wrong finds out, at a price that is bounded where they are right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CPU_GUESS, GPU_GUESS, SLOW_CPU_GUESS, CostCurve, LiveCosts
from mlx_mtp.planning.fixed import FixedPlanner
from mlx_mtp.planning.probing import Probing
from mlx_mtp.planning.settings import DEFAULTS, PlannerSettings
from mlx_mtp.simulate.chips import Machine, chips
from mlx_mtp.simulate.optimum import offline_optimum
from mlx_mtp.simulate.replay import StepCosts, Tally, replay, replay_answer, speculation
from mlx_mtp.simulate.simulation import replay_auto
from mlx_mtp.simulate.trace import Trace
from tests.helpers.simulated import ACCEPT_PROBS, CURVE, synthetic

Scale = Callable[[int], float]
LEARNT_BY = 1600  # steps after which a planner with wrong costs does as well as another
ROWS = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 25, 32)


def wrong(curve: CostCurve, scale: Scale, *, draft_ms: float = 0.0) -> CostCurve:
    """A curve as it would be if steps had taken longer by so much, by their rows."""
    rows = tuple(each for each in ROWS if each <= curve.rows[-1])
    lines = tuple(
        tuple(float(curve.forward(context)[each]) * scale(each) for each in rows)
        for context in curve.contexts
    )
    draft = (0.0, *(each + draft_ms for each in curve.draft_ms[1:]))
    return dataclasses.replace(curve, rows=rows, forward_ms=lines, draft_ms=draft)


def of_optimum(
    trace: Trace, costs: StepCosts, known: Speculation, *, max_rows: int, after: int
) -> float:
    """Speed of auto over that of the best rule, in the answers after so many steps."""
    best = offline_optimum(trace, costs, max_rows=max_rows, context=82).replay.answers
    mine, theirs, k = Tally(), Tally(), trace.num_draft_tokens
    for answer, other in zip(trace.answers, best, strict=True):
        counts = known.num_steps >= after
        planner = AutoPlanner(known, num_draft_tokens=k)
        tally = replay_answer(answer, planner, costs, max_tokens=trace.max_tokens)
        if counts:
            mine.add(tally)
            theirs.add(other)
    assert len(trace.answers) > 60 and mine.clocked > 1000
    return mine.tps / theirs.tps


BELIEFS: dict[str, tuple[Scale, float]] = {
    "ten times": (lambda rows: 10.0 if rows > 1 else 1.0, 0.0),
    "three times": (lambda rows: 3.0 if rows > 1 else 1.0, 0.0),
    "three times, plain steps too": (lambda _: 3.0, 0.0),
    "half, beside plain steps": (lambda rows: 2.0 if rows == 1 else 1.0, 0.0),
    "drafting takes eight plain steps": (lambda _: 1.0, 80.0),
}


def beliefs_by_chip() -> Iterator[Any]:
    """Chips, each with one of two beliefs by default and with both in soak tests."""
    for i, name in enumerate(chips()):
        for j, belief in enumerate(("ten times", "drafting takes eight plain steps")):
            yield pytest.param(name, belief, marks=pytest.mark.soak if (i + j) % 2 else ())


class TestWrongCosts:
    @pytest.mark.parametrize("belief", list(BELIEFS))
    @pytest.mark.parametrize("chances", [ACCEPT_PROBS, (0.9,) * 8], ids=["shipped", "good"])
    def test_are_found_out_over_answers(self, belief: str, chances: tuple[float, ...]) -> None:
        scale, draft_ms = BELIEFS[belief]
        trace, costs = synthetic(chances, answers=120), StepCosts(CURVE, max_rows=81)
        curve = wrong(CURVE, scale, draft_ms=draft_ms)
        known = speculation(curve, trace.shares, trace.num_draft_tokens)
        found = of_optimum(trace, costs, known, max_rows=30, after=LEARNT_BY)
        assert found >= 0.9

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "belief"), beliefs_by_chip())
    def test_are_found_out_on_every_chip(self, name: str, belief: str) -> None:
        scale, draft_ms = BELIEFS[belief]
        machine = chips()[name].machine(8)
        if machine.max_rows < 3:
            pytest.skip("too few rows are known to draft with")
        draft_ms *= machine.curve.forward(0)[1] / 10
        trace, costs = synthetic((0.9,) * 8, answers=200), StepCosts(machine.curve, max_rows=81)
        curve = wrong(machine.curve, scale, draft_ms=draft_ms)
        known = speculation(curve, trace.shares, trace.num_draft_tokens)
        found = of_optimum(trace, costs, known, max_rows=machine.max_rows, after=2 * LEARNT_BY)
        assert found >= 0.9

    def test_without_probes_wrong_costs_are_never_corrected(self) -> None:
        trace, costs = synthetic(ACCEPT_PROBS, answers=120), StepCosts(CURVE, max_rows=81)
        known = speculation(wrong(CURVE, lambda rows: 40.0 if rows > 1 else 1.0), trace.shares, 8)
        known.probing = Probing(PlannerSettings(max_probe_wait=10**9))
        assert of_optimum(trace, costs, known, max_rows=30, after=LEARNT_BY) < 0.75


class TestAGuess:
    """The first answers on a machine where nothing was measured."""

    @pytest.mark.parametrize("name", list(chips()))
    @pytest.mark.parametrize(
        ("chances", "least"), [((0.002,) * 8, 0.96), (ACCEPT_PROBS, 0.96), ((0.9,) * 8, 0.95)],
        ids=["random", "shipped", "good"],
    )  # fmt: skip
    def test_never_costs_much(self, name: str, chances: tuple[float, ...], least: float) -> None:
        trace = synthetic(chances, answers=10, shares=np.cumprod(ACCEPT_PROBS).tolist())
        costs = StepCosts(chips()[name].machine(8).curve, max_rows=96)
        guess = {"linux-cpu": CPU_GUESS, "linux-cpu-stock": SLOW_CPU_GUESS}.get(name, GPU_GUESS)
        plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
        known, auto = speculation(guess, trace.shares, 8), Tally()
        for answer in trace.answers:
            planner = AutoPlanner(known, num_draft_tokens=8)
            auto.add(replay_answer(answer, planner, costs, max_tokens=trace.max_tokens))
        assert auto.tps >= least * plain.total.tps
        if chances[0] == 0.9 and name not in ("m2", "m3-ultra-bf16", "linux-cpu-stock"):
            assert auto.tps >= 1.3 * plain.total.tps


class TestThePrice:
    """Drafts that never hold, and drafts that hold where rows are too dear."""

    @pytest.mark.parametrize("name", list(chips()))
    @pytest.mark.parametrize("told", [None, ()], ids=["told well of", "told nothing of"])
    def test_of_a_random_adapter_is_small_on_every_chip(self, name: str, told) -> None:
        shares = np.cumprod(ACCEPT_PROBS).tolist() if told is None else told
        trace = synthetic((0.002,) * 8, answers=40, shares=shares)
        machine = chips()[name].machine(8)
        costs = StepCosts(machine.curve, max_rows=81)
        plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
        auto = replay_auto(trace, machine, costs)
        assert auto.total.tps >= 0.97 * plain.total.tps

    @pytest.mark.parametrize("ratio", [2, 3, 10])
    @pytest.mark.parametrize("chance", [0.002, 0.5, 0.9])
    def test_is_small_however_dear_rows_are(self, ratio: float, chance: float) -> None:
        """Three rows never cost more than three plain steps; even ten are borne."""
        rows = (10.0, 6.7 * ratio, 10.0 * ratio, 320.0 * ratio)
        curve = CostCurve(
            rows=(1, 2, 3, 96), contexts=(0,), forward_ms=(rows,), draft_ms=(0.0, *[10.0] * 8)
        )
        trace, costs = synthetic((chance,) * 8, answers=60), StepCosts(curve, max_rows=96)
        plain = replay(trace, partial(FixedPlanner, "plain", num_draft_tokens=0), costs)
        auto = replay_auto(trace, Machine("dear", "", curve), costs)
        assert 0.97 * plain.total.tps <= auto.total.tps <= plain.total.tps


def play(
    probing: Probing, *, cost: float, steps: int, holds: float, seed: int = 0, less: float = 1.0
) -> tuple[int, int]:
    """Decode plainly but for tries that are due; returns their number and the longest wait."""
    rng, tries, wait, longest = np.random.default_rng(seed), 0, 0, 0
    for _ in range(steps):
        if probing.is_due(cost):
            probing.observe(is_probe=True, masks=2, drafts=0, num_accepted=0, of_expected=1.0)
            held = 2 * int(rng.uniform() < holds)
            assert probing.is_verifying
            probing.observe(is_probe=True, masks=0, drafts=2, num_accepted=held, of_expected=less)
            tries, wait = tries + 1, 0
        else:
            probing.observe(is_probe=False, masks=0, drafts=0, num_accepted=0, of_expected=1.0)
            wait += 1
            longest = max(longest, wait)
    return tries, longest


class TestTries:
    @given(
        cost=st.floats(0, 1e9) | st.just(float("inf")),
        holds=st.floats(0, 1),
        seed=st.integers(0, 99),
        less=st.sampled_from([0.5, 1.0]),
    )
    def test_cost_a_small_share_and_never_end(self, cost, holds, seed, less) -> None:
        steps = 12_000
        tries, longest = play(Probing(), cost=cost, steps=steps, holds=holds, seed=seed, less=less)
        believed = min(cost, DEFAULTS.max_probe_wait * DEFAULTS.probe_share)
        assert tries * believed <= DEFAULTS.probe_share * steps + DEFAULTS.max_surprises * believed
        assert tries >= 2 and longest <= DEFAULTS.max_surprises * DEFAULTS.max_probe_wait

    def test_follow_one_another_only_while_they_surprise(self) -> None:
        assert play(Probing(), cost=100.0, steps=DEFAULTS.max_probe_wait + 100, holds=0.0)[0] == 1
        often = play(Probing(), cost=100.0, steps=DEFAULTS.max_probe_wait + 100, holds=1.0)[0]
        cheap = play(
            Probing(), cost=100.0, steps=DEFAULTS.max_probe_wait + 100, holds=0.0, less=0.3
        )[0]
        assert often == cheap == DEFAULTS.max_surprises

    def test_begin_after_a_pause(self) -> None:
        assert play(Probing(), cost=0.0, steps=DEFAULTS.first_pause, holds=0.0)[0] == 0
        assert play(Probing(), cost=0.0, steps=DEFAULTS.first_pause + 1, holds=0.0)[0] == 1


class TestLiveCosts:
    @given(scale=st.floats(0.2, 10), rows=st.integers(1, 30), seed=st.integers(0, 9))
    def test_of_a_machine_at_another_pace_keep_their_ratios(self, scale, rows, seed) -> None:
        live, rng = LiveCosts(CURVE), np.random.default_rng(seed)
        true = CURVE.forward(0)
        for _ in range(300):
            ran = int(rng.integers(1, rows + 1))
            live.observe(rows=ran, largest_group=0, context=0, ms=scale * true[ran])
        now = live.forward_ms(0)
        assert now / now[1] == pytest.approx(true / true[1], rel=0.1)

    @given(scale=st.floats(0.1, 0.7), rows=st.integers(2, 30))
    def test_believe_a_few_tries_and_their_neighbours_too(self, scale, rows) -> None:
        live, believed = LiveCosts(CURVE), CURVE.forward(0)
        for _ in range(8):
            for _ in range(20):
                live.observe(rows=1, largest_group=0, context=0, ms=believed[1])
            live.observe(rows=rows, largest_group=0, context=0, ms=scale * believed[rows])
        now = live.forward_ms(0) / live.forward_ms(0)[1]
        wanted = np.maximum(scale * believed / believed[1], 1.0)
        assert now[rows:] == pytest.approx(wanted[rows:], rel=0.35)
        assert (now[:rows] <= now[rows] + 1e-9).all() and (np.diff(now) >= -1e-9).all()

    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8), st.floats(0, 1e6)), max_size=60)
    )
    def test_stay_finite_and_rise_whatever_happens(self, steps) -> None:
        live = LiveCosts(CURVE)
        for rows, masks, ms in steps:
            live.observe(rows=rows, largest_group=masks, context=100, ms=ms)
        forward, draft = live.forward_ms(100), live.draft_ms(8)
        assert np.isfinite(forward).all() and (forward[1:] > 0).all()
        assert (np.diff(forward) >= 0).all() and np.isfinite(draft).all() and (draft >= 0).all()

    def test_one_slow_step_changes_little(self) -> None:
        live = LiveCosts(CURVE)
        for _ in range(30):
            live.observe(rows=1, largest_group=0, context=0, ms=10)
        before = live.forward_ms(0)
        live.observe(rows=8, largest_group=0, context=0, ms=9e9)
        assert live.forward_ms(0) == pytest.approx(before, rel=0.05)

    def test_that_do_not_learn_stay(self) -> None:
        live = LiveCosts(CURVE, learns=False)
        for _ in range(50):
            live.observe(rows=3, largest_group=2, context=0, ms=1)
        assert list(live.forward_ms(0)) == list(CURVE.forward(0)) and not live.is_disproved
