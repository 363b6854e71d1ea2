"""Which answers share forwards, and what their planners make of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_mtp.decoding.grouping import MAX_ROWS, StepGrouper
from mlx_mtp.decoding.outcome import StepResult
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.lab.tiny_models import tiny_model
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import AutoPlanner, Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts, shared_ms, widened
from mlx_mtp.planning.offer import Offer
from mlx_mtp.planning.plan import MASK
from tests.helpers.requests import finish_alone
from tests.helpers.tiny import tiny_mtp

FLAT = CostCurve(rows=(1, 8), contexts=(0,), forward_ms=((10.0, 11.0),), draft_ms=(0.0, 0.1))
STEEP = replace(FLAT, forward_ms=((10.0, 90.0),))
HOLDS = [0.8, 0.7, 0.6, 0.5]


def known(curve: CostCurve) -> Speculation:
    return Speculation(LiveCosts(curve), Acceptance(HOLDS))


def requests_of(model: Any, count: int, *, size: int = 3, **options: Any) -> list[Request]:
    prompts = [[i + 1] * size for i in range(count)]
    return [make_request(model, ids, max_tokens=9, **options) for ids in prompts]


def turn(grouper: StepGrouper, requests: list[Request]) -> list[StepResult]:
    """Run a step of each request, grouped."""
    steps = [one.plan() for one in requests]
    results: dict[int, StepResult] = {}
    for group in grouper.groups(steps):
        outcomes = run(grouper._model, [steps[i] for i in group])
        results |= {i: requests[i].commit(o) for i, o in zip(group, outcomes, strict=True)}
    return [results[i] for i in range(len(requests))]


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
    grouper = StepGrouper(model, speculation)
    requests = requests_of(model, 4, size=1, layout="plain")
    turn(grouper, requests)
    seen = forwards(model, monkeypatch)
    turn(grouper, requests)
    assert seen == groups
    assert speculation.sharers == max(groups)
    turn(grouper, requests[:1])
    assert seen[-1] == speculation.sharers == 1


def test_wide_steps_run_alone_and_no_forward_has_too_many_rows(monkeypatch):
    model = tiny_mtp("llama", k=4)
    grouper = StepGrouper(model, known(FLAT))
    requests = requests_of(model, 7, size=3, layout="quadratic")
    requests += requests_of(model, 2, size=MAX_ROWS + 1, layout="plain")
    turn(grouper, requests_of(model, 2, size=1))  # checks whether it can be batched
    seen = forwards(model, monkeypatch)
    for _ in range(3):
        del seen[:]
        steps = turn(grouper, requests)
        assert sum(seen) == sum(step.num_rows for step in steps)
        assert all(rows <= MAX_ROWS or rows in {step.num_rows for step in steps} for rows in seen)
    assert 1 < len(seen) < 9


@pytest.mark.parametrize("layout", ["auto", "quadratic", "plain"])
def test_answers_in_shared_forwards_are_those_alone(layout):
    model = tiny_mtp("llama", k=3)
    expected = finish_alone(model, requests_of(model, 5))
    requests, emitted = requests_of(model, 5, layout=layout), [[] for _ in range(5)]
    grouper = StepGrouper(model, known(FLAT))
    while going := [i for i, one in enumerate(requests) if not one.finished]:
        steps = turn(grouper, [requests[i] for i in going])
        for i, step in zip(going, steps, strict=True):
            emitted[i] += step.tokens
    assert emitted == expected


def test_prompt_chunks_run_alone_and_do_not_count_as_sharers(monkeypatch):
    model, speculation = tiny_mtp("llama", k=3), known(FLAT)
    grouper = StepGrouper(model, speculation)
    prompts = [[7] * 9, [1], [2], [3] * 6]
    ways = {"max_tokens": 6, "prefill_step_size": 4, "layout": "plain"}
    requests = [make_request(model, ids, **ways) for ids in prompts]
    groups = [grouper.groups([one.plan() for one in requests])]
    assert groups == [[[0], [3], [1, 2]]] and speculation.sharers == 2
    assert grouper.groups([requests[0].plan()]) == [[0]] and speculation.sharers == 2
    expected = finish_alone(model, [make_request(model, ids, **ways) for ids in prompts])
    emitted = [[] for _ in prompts]
    requests = [make_request(model, ids, **ways) for ids in prompts]
    while going := [i for i, one in enumerate(requests) if not one.finished]:
        for i, step in zip(going, turn(grouper, [requests[i] for i in going]), strict=True):
            emitted[i] += step.tokens
    assert emitted == expected


def test_a_model_that_cannot_be_batched_takes_turns(monkeypatch):
    model, speculation = MTPModel(tiny_model("gpt2")), known(FLAT)  # its attention has no seam
    grouper = StepGrouper(model, speculation)
    requests = requests_of(model, 3, size=1, layout="plain")
    turn(grouper, requests)
    seen = forwards(model, monkeypatch)
    turn(grouper, requests)
    assert seen == [1, 1, 1] and speculation.sharers == 1


def test_what_shared_steps_took_says_nothing_of_costs():
    model = tiny_mtp("llama", k=3)
    speculation = known(FLAT)
    requests = requests_of(model, 2, size=1, speculation=speculation)
    grouper = StepGrouper(model, speculation)
    before = speculation.costs.forward_ms(0).tolist()
    for _ in range(4):
        turn(grouper, requests)
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
        rows[sharers] = planner.plan(
            num_pending=1, offers=[Offer(MASK, 4)], room=99
        ).layout.num_rows
    assert rows[1] > rows[4] > rows[8] == 1
    speculation.sharers = 8
    assert planner.plan(num_pending=1, offers=[Offer(MASK, 4)], room=99).layout.num_rows == 1
    speculation.sharers = 1
    assert planner.plan(num_pending=1, offers=[Offer(MASK, 4)], room=99).layout.num_rows == rows[1]
