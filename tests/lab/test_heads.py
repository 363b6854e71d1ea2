"""The comparison of heads with mask tokens: steps, rows and costs by their definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlx_mtp.lab.heads import (
    Candidate,
    HeadsCosts,
    HeadsPlanner,
    propose_ms,
    simulated_chips,
    speed_of,
    table,
)
from mlx_mtp.simulate.chips import chip_named
from mlx_mtp.simulate.replay import replay
from mlx_mtp.simulate.trace import Trace, TracedAnswer

K = 3


def candidate(head: str | None, *, count: int, answers: int = 6, **values: Any) -> Candidate:
    """Answers of 13 tokens after which ``count`` drafts are always accepted."""
    counts = tuple(min(count, 12 - place) for place in range(12))
    traced = [TracedAnswer(f"{i}", "chat", 5, counts) for i in range(answers)]
    shares = tuple(1.0 * (j < count) for j in range(K))
    trace = Trace(answers=tuple(traced), num_draft_tokens=K, max_tokens=13, shares=shares)
    return Candidate(head or "masks", head, trace, 10, 20.0, 1000, 2000, 0.25, **values)


@pytest.mark.parametrize(("count", "steps"), [(0, 13), (1, 7), (3, 4)])
def test_heads_take_as_many_steps_as_their_drafts_allow(count: int, steps: int) -> None:
    one = candidate("mlp", count=count)
    assert one.steps("quadratic").tolist() == [[13.0, float(steps)]] * 6
    chip = chip_named("m4-pro")
    done = replay(one.trace, lambda: HeadsPlanner(K), HeadsCosts(chip, one))
    assert done.total.steps == 6 * steps
    assert done.total.widest == K + 1


def test_fewer_heads_have_fewer_rows() -> None:
    one, chip = candidate("mlp", count=3), chip_named("m4-pro")
    costs = HeadsCosts(chip, one)
    done = replay(one.trace, lambda: HeadsPlanner(1), costs)
    assert done.total.widest == 2 and done.total.steps == 6 * 7
    expected = 6 * 6 * (costs.forward_ms(0)[2] + propose_ms(chip, one, 1))
    assert done.total.ms == pytest.approx(expected)


def test_proposing_costs_the_bytes_of_heads_and_unembedding() -> None:
    chip = chip_named("m3-ideal")  # hidden 4096, vocabulary 152k; 100 GB/s at 85%
    assert propose_ms(chip, candidate("mlp", count=1), 0) == 0.0
    for head, matrices, dispatches in (("mlp", 1, 4), ("layer", 12, 16)):
        num_bytes = 2 * matrices * 4096**2 * 2 + 152_000 * 4096 * 4.5 / 8
        expected = num_bytes / 85e9 * 1e3 + (2 * dispatches + 10) * 0.0035
        assert propose_ms(chip, candidate(head, count=1), 2) == pytest.approx(expected)
    cpu = chip_named("linux-cpu")
    assert propose_ms(cpu, candidate("mlp", count=1), K) == pytest.approx(0.25 * 56)


def test_useless_drafts_are_left_out_and_good_ones_pay() -> None:
    for chip in simulated_chips():
        for head in ("mlp", "layer", None):
            useless = speed_of(candidate(head, count=0), chip)
            assert useless.name == "plain" and useless.fixed == pytest.approx(1.0)
    chip = chip_named("m5-ideal")  # rows cost nothing
    heads, layers, masks = (
        speed_of(candidate(head, count=3), chip) for head in ("mlp", "layer", None)
    )
    assert heads.fixed > layers.fixed > 1.5 and masks.fixed > 1.5
    assert heads.name == "3 heads" and masks.auto is not None and heads.auto is None


def test_the_table_has_a_column_for_each_run() -> None:
    lines = table([candidate(None, count=1), candidate("mlp", count=3)])
    assert len({line.count("|") for line in lines}) == 1
    cells = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert cells["tokens per step, all drafts"][1].startswith("3.250 (3.250 to 3.250)")
    assert cells["rows of such a step"] == ["16", "4 |"]
    few = dataclasses.replace(candidate("mlp", count=3, answers=2))
    assert "(" not in next(line for line in table([few]) if line.startswith("| tokens per step"))
