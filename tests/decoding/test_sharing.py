"""Which answers share forwards, and what their planners make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sharing import MOST_ROWS, run_together
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts, shared_ms, widened
from tests.helpers.tiny import tiny_mtp

FLAT = CostCurve(rows=(1, 8), contexts=(0,), forward_ms=((10.0, 11.0),), draft_ms=(0.0, 0.1))
STEEP = replace(FLAT, forward_ms=((10.0, 90.0),))
HOLDS = [0.8, 0.7, 0.6, 0.5]


def known(curve: CostCurve) -> Speculation:
    return Speculation(LiveCosts(curve), Acceptance(HOLDS))


def planned(model: Any, count: int, *, size: int = 3, **options: Any) -> list[Any]:
    prompts = [[at + 1] * size for at in range(count)]
    return [decode(model, ids, max_tokens=9, **options) for ids in prompts]


def turn(decodings: list[Any], speculation: Speculation) -> list[Any]:
    run_together([each.planned() for each in decodings], speculation)
    return [next(each) for each in decodings]


def forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the forwards from now on."""
    seen: list[int] = []
    original = type(model).__call__

    def counting(self: Any, ids: Any, **given: Any) -> Any:
        seen.append(ids.shape[1])
        return original(self, ids, **given)

    monkeypatch.setattr(type(model), "__call__", counting)
    return seen


@pytest.mark.parametrize(("curve", "groups"), [(FLAT, [4]), (STEEP, [1, 1, 1, 1])])
def test_steps_share_a_forward_where_that_costs_less(curve, groups, monkeypatch):
    model, speculation = tiny_mtp("llama"), known(curve)
    decodings = planned(model, 4, size=1, layout="plain")
    turn(decodings, speculation)
    seen = forwards(model, monkeypatch)
    turn(decodings, speculation)
    assert seen == groups
    assert speculation.sharers == max(groups)
    turn(decodings[:1], speculation)
    assert seen[-1] == speculation.sharers == 1


def test_wide_steps_run_alone_and_no_forward_has_too_many_rows(monkeypatch):
    model, speculation = tiny_mtp("llama", k=4), known(FLAT)
    decodings = planned(model, 7, size=3, layout="quadratic")
    decodings += planned(model, 2, size=MOST_ROWS + 1, layout="plain")
    turn(planned(model, 2, size=1), speculation)  # whether it can be packed is tried here
    seen = forwards(model, monkeypatch)
    for _ in range(3):
        del seen[:]
        steps = turn(decodings, speculation)
        assert sum(seen) == sum(step.num_rows for step in steps)
        assert all(rows <= MOST_ROWS or rows in {step.num_rows for step in steps} for rows in seen)
    assert 1 < len(seen) < 9


@pytest.mark.parametrize("layout", ["auto", "quadratic", "plain"])
def test_answers_in_shared_forwards_are_those_alone(layout):
    model = tiny_mtp("llama", k=3)
    expected = [[token for step in each for token in step.tokens] for each in planned(model, 5)]
    decodings, found = planned(model, 5, layout=layout), [[] for _ in range(5)]
    speculation = known(FLAT)
    while going := [at for at, each in enumerate(decodings) if each.planned()]:
        for at, step in zip(going, turn([decodings[at] for at in going], speculation), strict=True):
            found[at] += step.tokens
    assert found == expected


def test_a_model_that_cannot_be_packed_takes_turns(monkeypatch):
    model, speculation = tiny_mtp("ministral3"), known(FLAT)
    decodings = planned(model, 3, size=1, layout="plain")
    turn(decodings, speculation)
    seen = forwards(model, monkeypatch)
    turn(decodings, speculation)
    assert seen == [1, 1, 1] and speculation.sharers == 1


def test_what_shared_steps_took_says_nothing_of_costs():
    model = tiny_mtp("llama", k=3)
    speculation = known(FLAT)
    decodings = planned(model, 2, size=1, speculation=speculation)
    before = speculation.costs.forward_ms(0).tolist()
    for _ in range(4):
        turn(decodings, speculation)
    assert speculation.costs.forward_ms(0).tolist() == before
    assert speculation.num_steps == 8


def test_costs_beyond_the_measured_rows_go_on_as_they_ended():
    ms = np.array([0.0, 4.0, 4.0, 5.0, 6.0])
    assert widened(ms, 7).tolist() == [0.0, 4.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert widened(ms, 2).tolist() == [0.0, 4.0, 4.0]
    assert shared_ms(ms, 1).tolist() == ms.tolist()
    assert shared_ms(ms, 2).tolist() == [0.0, 2.0, 3.0, 4.0, 5.0]


def test_those_who_share_draft_less_where_rows_are_dear():
    curve = replace(FLAT, rows=(1, 8, 32), forward_ms=((10.0, 11.0, 60.0),))
    rows = {}
    for sharers in (1, 4, 8, 1):
        speculation = known(curve)
        speculation.sharers = sharers
        planner = AutoPlanner(speculation, num_draft_tokens=4)
        rows[sharers] = planner.plan(num_pending=1, num_waiting=4, room=99).layout.num_rows
    assert rows[1] > rows[4] > rows[8] == 1
    speculation.sharers = 8
    assert planner.plan(num_pending=1, num_waiting=4, room=99).layout.num_rows == 1
    speculation.sharers = 1
    assert planner.plan(num_pending=1, num_waiting=4, room=99).layout.num_rows == rows[1]
