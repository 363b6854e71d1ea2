"""The recipe of a run that has a time: properties that hold for all rates, times and models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_mtp.train.recipe import (
    ANCHORS,
    BATCH_SIZES,
    MAX_PASSES,
    MIN_RECORDS,
    MIN_STEPS,
    Rates,
    Recipe,
    Task,
    TooShort,
    choose,
    masks_per_block,
    parse_time,
)
from mlx_mtp.train.settings import TrainSettings

TASK = Task(
    hidden_size=576, vocab_size=49152, answer_tokens=280, sequence_tokens=330, generated_tokens=380
)
RATES = Rates(text_tps=150.0, rows_per_s=400.0, eval_text_s=0.4)

rates = st.builds(
    Rates,
    text_tps=st.floats(0.5, 1e5),
    rows_per_s=st.floats(0.5, 1e6),
    eval_text_s=st.floats(1e-4, 60.0),
)
tasks = st.builds(
    Task,
    hidden_size=st.integers(64, 16384),
    vocab_size=st.integers(256, 300_000),
    answer_tokens=st.floats(8, 2000),
    sequence_tokens=st.floats(16, 4000),
    generated_tokens=st.floats(16, 4000) | st.just(0.0),
    max_records=st.integers(2, 60_000),
    held_out=st.floats(0.01, 0.5),
    starts_trained=st.booleans(),
    versions=st.integers(1, 2),
    on_cpu=st.booleans(),
)
records = st.none() | st.integers(2, 20_000)
times = st.floats(60, 5e5)
users = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.integers(1, 32),
        "num_anchors": st.integers(1, 200),
        "num_draft_tokens": st.integers(1, 16),
        "learning_rate": st.just(1e-3),
        "drop_late": st.sampled_from([0.0, 0.3]),
    },
)


def possible(left_s: float, rates: Rates, task: Task, user: dict[str, Any]) -> Recipe:
    """The recipe; the example is skipped if the time is too short."""
    try:
        return choose(left_s, rates, task, user)
    except TooShort:
        assume(False)
        raise


def rows(recipe: Recipe, task: Task, user: dict[str, Any]) -> float:
    """Mask rows of all steps."""
    settings = recipe.settings | user
    anchors = min(settings["num_anchors"], max(1.0, task.answer_tokens - 2))
    return settings["iters"] * settings["batch_size"] * anchors


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("30m", 1800), ("1h30m", 5400), ("90m", 5400), ("overnight", 36000),
     ("1.5h", 5400), ("45s", 45), (" 2 H ", 7200), ("1h 5m", 3900)],
)  # fmt: skip
def test_times_are_read(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "0h", "h", "2d", "30m2h", "two hours", "-1h", "1e3h"])
def test_what_is_no_time_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time such as 30m, 2h, 1h30m or overnight"):
        parse_time(text)


@given(times, rates, tasks, records, users)
def test_the_time_and_the_passes_are_kept(left_s, rates, task, num_records, user):
    task = dataclasses.replace(task, num_records=num_records)
    recipe = possible(left_s, rates, task, user)
    assert recipe.seconds <= left_s * (1 + 1e-9)
    trained = max(1, math.floor((1 - task.held_out) * recipe.num_records))
    batch = (recipe.settings | user)["batch_size"]
    assert recipe.passes * trained <= max(MAX_PASSES * (trained + 1), batch) + 1e-6
    assert recipe.num_records == num_records or recipe.num_records <= task.max_records
    assert not set(user) & set(recipe.settings)
    settings = TrainSettings(**(recipe.settings | user))  # all values are in range
    assert settings.steps_per_eval <= settings.iters and settings.save_every <= settings.iters
    assert settings.warmup <= settings.iters / 10


@given(times, rates, tasks, users)
def test_a_run_that_writes_its_text_is_never_tiny(left_s, rates, task, user):
    task = dataclasses.replace(task, max_records=10**9)
    recipe = possible(left_s, rates, task, user)
    assert recipe.num_records >= MIN_RECORDS
    assert recipe.settings["iters"] >= MIN_STEPS


@given(times, st.floats(1, 20), rates, tasks, records, users)
def test_more_time_never_gives_less(left_s, factor, rates, task, num_records, user):
    task = dataclasses.replace(task, num_records=num_records)
    less, more = (possible(s, rates, task, user) for s in (left_s, left_s * factor))
    assert more.num_records >= less.num_records
    assert rows(more, task, user) >= rows(less, task, user)


@given(times, rates, tasks, records, users)
def test_the_time_that_an_error_names_is_enough(left_s, rates, task, num_records, user):
    task = dataclasses.replace(task, num_records=num_records)
    try:
        choose(left_s, rates, task, user)
    except TooShort as error:
        assert error.needed_s > left_s * (1 - 1e-9)
        choose(error.needed_s * 1.001, rates, task, user)


@given(st.floats(2000, 5e5), st.floats(1, 10))
def test_a_faster_machine_does_more(left_s, factor):
    faster = Rates(
        text_tps=factor * RATES.text_tps,
        rows_per_s=factor * RATES.rows_per_s,
        eval_text_s=RATES.eval_text_s / factor,
    )
    slow, fast = possible(left_s, RATES, TASK, {}), possible(left_s, faster, TASK, {})
    assert fast.num_records >= slow.num_records
    assert rows(fast, TASK, {}) >= rows(slow, TASK, {})


def test_two_hours_on_two_cores():
    recipe = choose(7140, RATES, TASK, {})
    assert 1500 < recipe.num_records < 3000
    assert recipe.settings["iters"] >= 400 and recipe.settings["num_anchors"] == ANCHORS
    assert recipe.settings["batch_size"] in BATCH_SIZES
    assert 0.9 * 7140 < recipe.seconds < 7140
    night = choose(36000, RATES, TASK, {})
    assert night.settings["batch_size"] > recipe.settings["batch_size"]
    assert night.settings["candidates"] == 8192 and night.settings["learning_rate"] == 8e-4


def test_given_texts_fill_the_time_with_more_anchors():
    task = dataclasses.replace(TASK, num_records=300, generated_tokens=0.0)
    short, long = (choose(s, RATES, task, {}) for s in (250, 36000))
    assert short.settings["num_anchors"] == ANCHORS < long.settings["num_anchors"]
    assert long.passes <= MAX_PASSES and long.generate_s == 0
    fixed = choose(36000, RATES, task, {"num_anchors": 12})
    assert "num_anchors" not in fixed.settings


@pytest.mark.parametrize(("k", "drop_late", "mean"), [(8, 0.0, 8.0), (1, 0.5, 1.0), (2, 0.5, 1.5)])
def test_masks_of_a_block(k: int, drop_late: float, mean: float) -> None:
    assert masks_per_block(k, drop_late) == pytest.approx(mean)
