"""The benchmark's statistics: figures from answers, intervals that contain the truth, drift."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mlx_mtp.bench import summary
from mlx_mtp.bench.interval import (
    MIN_PROMPTS,
    expanded_tail,
    ratio_interval,
    student_quantile,
)
from tests.helpers.benchmark_answers import WEIGHTS, answer, pairs

MODES = ["plain", "auto"]
SOME = st.lists(st.floats(0.2, 5.0), min_size=1, max_size=12)


def figures(answers, modes=MODES):
    rows = summary.figures(answers, modes, weights=WEIGHTS, seed=0)
    return {(row["context"], row["kind"], row["mode"]): row for row in rows}


def test_speeds_are_all_tokens_over_all_seconds():
    rows = figures(
        [
            answer(prompt="a", seconds=10.0),
            answer(prompt="a", mode="auto", seconds=5.0),
            answer(prompt="b", tokens=21, seconds=20.0),
            answer(prompt="b", mode="auto", tokens=21, seconds=20.0),
        ]
    )
    plain, auto = rows[0, None, "plain"], rows[0, None, "auto"]
    assert plain["tps"] == 1.0 and auto["tps"] == pytest.approx(30 / 25)
    assert auto["speedup"] == pytest.approx(1.2) and auto["median_speedup"] == 1.5
    assert "speedup" not in plain and auto["speedup_low"] is None  # two prompts are too few
    assert plain["prompt_tps"] == 40 and plain["tps_sd"] is None
    assert rows[0, "chat", "auto"] == auto | {"kind": "chat"}


@given(speedups=SOME, repeats=st.integers(1, 3))
def test_figures_fit_together(speedups, repeats):
    answers = pairs(speedups, repeats=repeats)
    rows = figures(answers)
    whole = rows[0, None, "auto"]
    kinds = [row for (_, kind, mode), row in rows.items() if kind and mode == "auto"]
    for name in ("prompts", "answers", "tokens"):
        assert sum(row[name] for row in kinds) == whole[name]
    assert whole["answers"] == repeats * len(speedups)
    assert min(speedups) * 0.999 <= whole["speedup"] <= max(speedups) * 1.001
    assert whole["speedup"] == pytest.approx(
        len(speedups) / sum(1 / speedup for speedup in speedups)
    )
    if len(speedups) >= MIN_PROMPTS:
        assert whole["speedup_low"] <= whole["speedup"] * 1.001
        assert whole["speedup_high"] >= whole["speedup"] * 0.999
    assert (whole["tps_sd"] is None) == (repeats == 1)
    assert summary.acceptance_rates(whole) == pytest.approx([0.8, 0.25])
    assert whole["tokens_per_step"] == pytest.approx(11 / 6)


def test_passes_give_the_deviation_and_ttft_its_percentiles():
    seconds = [8.0, 10.0, 12.5]
    answers = [answer(repeat=i, seconds=duration, ttft_s=i) for i, duration in enumerate(seconds)]
    row = figures(answers, ["plain"])[0, None, "plain"]
    assert row["tps_sd"] == pytest.approx(np.std([10 / duration for duration in seconds], ddof=1))
    assert row["ttft_p50_ms"] == 1000 and row["ttft_p99_ms"] == pytest.approx(1980)


def test_contexts_are_never_mixed():
    answers = [answer(context=context, mode=mode) for context in (0, 64) for mode in MODES]
    rows = figures(answers)
    assert {key[0] for key in rows} == {0, 64}
    assert all(row["answers"] == 1 for row in rows.values())


def test_answers_of_one_token_have_no_speed():
    answers = [answer(mode=mode, tokens=1, seconds=0.0) for mode in MODES]
    row = figures(answers)[0, None, "auto"]
    assert row["tps"] is None and row["speedup"] is None and row["median_tps"] is None
    assert summary.drift(answers * 9, "plain") is None


def test_joules_count_only_where_every_answer_has_them():
    some = [answer(mode=mode) for mode in MODES]
    assert figures(some)[0, None, "auto"]["joules_per_token"] is None


@pytest.mark.parametrize("freedom", [4, 5, 11, 40, 163])
def test_the_quantile_is_students(freedom):
    for share in (0.9, 0.975, 0.995):
        expected = stats.t.ppf(share, freedom)
        assert student_quantile(share, freedom) == pytest.approx(expected, rel=5e-3)


def test_few_prompts_widen_the_interval():
    tails = [expanded_tail(n) for n in (5, 12, 40, 1000)]
    assert tails == sorted(tails) and tails[-1] == pytest.approx(0.025, rel=0.02)
    assert tails[0] < 0.0015


@pytest.mark.parametrize(("n", "spread"), [(8, 0.2), (12, 0.5), (60, 0.3)])
def test_the_interval_contains_the_true_speedup_as_often_as_it_claims(n, spread):
    """Prompts differ in their speed-up, and both modes are disturbed."""
    rng = np.random.default_rng(n)
    runs, num_inside = 600, 0
    for run in range(runs):
        tokens = rng.integers(40, 97, n).astype(float)
        base = tokens * np.exp(0.1 * rng.standard_normal(n))
        mode = tokens / 1.4 * np.exp(spread * rng.standard_normal(n))
        interval = ratio_interval(
            np.stack([tokens, mode], axis=1),
            np.stack([tokens, base], axis=1),
            seed=run,
            resamples=500,
        )
        assert interval is not None
        truth = 1.4 * math.exp(0.1**2 / 2 - spread**2 / 2)  # of means of seconds
        num_inside += interval[0] <= truth <= interval[1]
    assert 0.915 <= num_inside / runs <= 0.985  # three deviations of the count are 0.027


def test_an_interval_is_repeatable_and_needs_enough_prompts():
    rows = np.array([[10.0, 5.0 + at] for at in range(8)])
    base = np.full((8, 2), 10.0)
    assert ratio_interval(rows, base, seed=3) == ratio_interval(rows, base, seed=3)
    assert ratio_interval(rows, base, seed=3) != ratio_interval(rows, base, seed=4)
    assert ratio_interval(rows[:4], base[:4], seed=0) is None
    assert ratio_interval(rows, np.zeros((8, 2)), seed=0) is None


def test_repeats_of_a_prompt_are_not_new_prompts():
    """Ten times the same answers is no more evidence."""
    speedups = [1.1, 1.5, 2.0, 0.9, 1.3, 1.7]
    once, often = (
        figures(pairs(speedups, repeats=repeats))[0, None, "auto"] for repeats in (1, 10)
    )
    assert once["speedup_low"] == pytest.approx(often["speedup_low"])
    assert once["speedup_high"] == pytest.approx(often["speedup_high"])


def test_a_planted_difference_is_detected():
    answers = pairs([1.0] * 6)
    assert summary.outputs(answers, MODES)["different"] == 0
    answers[3].timing.ids[7] += 1  # p1, auto
    outputs = summary.outputs(answers, MODES)
    assert (outputs["compared"], outputs["different"]) == (6, 1)
    assert outputs["where"] == ["p1 (auto)"] and outputs["reference"] == "plain"


def test_a_shorter_answer_differs_too():
    answers = pairs([1.0] * 2)
    answers[1].timing.ids.pop()
    assert summary.outputs(answers, MODES)["different"] == 1


def test_differences_of_stock_are_counted_separately():
    answers = [answer(), answer(mode="auto"), answer(mode="stock", ids=[1, 2, 3])]
    outputs = summary.outputs(answers, MODES)
    assert outputs["different"] == 0
    assert outputs["others"] == {"stock": {"compared": 1, "different": 1}}
    assert summary.outputs(answers, [])["reference"] is None


def test_drift_is_the_last_quarter_over_the_first():
    speeds = [1.0] * 4 + [0.9] * 8 + [0.8] * 4
    answers = [
        answer(prompt=f"p{i}", number=i, seconds=10 / speed) for i, speed in enumerate(speeds)
    ]
    assert summary.drift(answers, "plain") == pytest.approx(0.8)
    assert summary.drift(answers[:7], "plain") is None
    assert summary.drift(answers, "auto") is None


def test_prompts_of_unlike_speed_are_no_drift():
    """Two passes over prompts that get slower, and a context that is slower as a whole."""
    answers = [
        answer(prompt=f"p{i}", context=context, repeat=repeat, seconds=(10 + i) * (1 + context))
        for repeat in range(2)
        for context in (0, 1)
        for i in range(6)
    ]
    assert summary.drift(answers, "plain") == pytest.approx(1.0)


def test_steps_are_counted_by_layout():
    rows = summary.layouts(pairs([1.0, 2.0]))
    assert rows == [
        {"mode": "auto", "context": 0, "drafts": 2, "masks": 2, "steps": 10, "ms": 1200.0},
        {"mode": "plain", "context": 0, "drafts": 0, "masks": 0, "steps": 20, "ms": 1000.0},
    ]


@given(st.recursive(st.floats() | st.integers(), lambda each: st.lists(each) | st.tuples(each)))
def test_reports_are_finite(values):
    def numbers(tree):
        return [n for each in tree for n in numbers(each)] if isinstance(tree, list) else [tree]

    for before, after in zip(
        numbers(summary.finite([values])), numbers(_listed([values])), strict=True
    ):
        assert before is None or math.isfinite(before)
        assert (before is None) == (not math.isfinite(after))


def _listed(tree):
    return [_listed(each) for each in tree] if isinstance(tree, list | tuple) else tree
