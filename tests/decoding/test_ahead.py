"""Plain steps are submitted before the id that they begin with is read, and that shows nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.decoding import ahead
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.outcome import StepResult, Submitted
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.caches import layers
from mlx_mtp.model.layout import StepLayout, linear_layout, plain_layout
from mlx_mtp.planning.plan import Plan
from tests.helpers.hybrid import hybrid_mtp
from tests.helpers.scripted import ScriptedModel, right
from tests.helpers.tiny import tiny_mtp

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
FAST: dict[str, Any] = {"num_hidden_layers": 1, "low_rank": False, "sampler": False}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the loop does in turn: "submit" a step that emits ids, "read" its ids."""
    seen: list[str] = []
    real_submit, real_outcomes = ahead.submit, Submitted.outcomes

    def submit(model: Any, steps: Any) -> Submitted:
        seen.append("chunk" if steps[0].is_prompt_chunk else "submit")
        return real_submit(model, steps)

    def outcomes(submitted: Submitted) -> Any:
        seen.append("read" if submitted.verdicts else "wait")
        return real_outcomes(submitted)

    monkeypatch.setattr(ahead, "submit", submit)
    monkeypatch.setattr(Submitted, "outcomes", outcomes)
    return seen


@pytest.fixture
def never_early(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns off what this file is about."""
    name, never = "_may_submit_next", lambda *_: False
    return lambda: monkeypatch.setattr(ahead.StepQueue, name, never)


def ids_of(steps: Any) -> list[int]:
    return [token for step in steps for token in step.tokens]


def plain(model: Any, **options: Any) -> list[StepResult]:
    return list(decode(model, PROMPT, layout="plain", **options))


def rows_of(cache: Any) -> list[Any]:
    """Everything that a cache has, as NumPy arrays."""
    arrays: list[Any] = []
    for layer in cache.layers:
        state = layer.state
        arrays += [np.array(x) for x in state if isinstance(x, mx.array)]
    return arrays


def test_the_next_step_is_submitted_before_the_last_id_is_read(events: list[str]) -> None:
    model = tiny_mtp("llama", **FAST)
    assert len(ids_of(plain(model, max_tokens=5, prefill_step_size=4))) == 5
    chunks, steps = events[:4], events[4:]
    assert chunks == ["chunk", "wait"] * 2
    assert steps == ["submit", *["submit", "read"] * 4, "read"]


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_the_row_of_a_step_that_is_not_needed_is_dropped(kind: str, events: list[str]) -> None:
    model = tiny_mtp("llama", **FAST) if kind == "attention" else hybrid_mtp("qwen3_5", k=1)
    expected = ids_of(plain(model, max_tokens=6))
    places = [place for place in (0, 2, 5) if expected.index(expected[place]) == place]
    assert len(places) > 1
    for place in places:
        fresh, stopped, closed = (model.make_cache() for _ in range(3))
        list(decode(model, [*PROMPT, *expected[:place]], max_tokens=1, cache=fresh))
        events.clear()
        steps = plain(model, max_tokens=6, stop_ids={expected[place]}, cache=stopped)
        assert ids_of(steps) == expected[: place + 1] and steps[-1].finish_reason == "stop"
        assert events.count("submit") == min(place + 2, 6)
        answer: Any = decode(model, PROMPT, layout="plain", max_tokens=6, cache=closed)
        assert ids_of(islice(answer, place + 1)) == expected[: place + 1]
        answer.close()
        for cache in (stopped, closed):
            assert cache.offset == len(PROMPT) + place
            for found, wanted in zip(rows_of(cache), rows_of(fresh), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
            options: dict[str, Any] = {"max_tokens": 5 - place, "cache": cache}
            if place < 5:
                rest = decode(model, expected[place : place + 1], **options)
                assert ids_of(rest) == expected[place + 1 :]


@pytest.mark.parametrize("sampling", [Sampling(temp=1.0), Sampling(temp=0.7, top_p=0.8, top_k=9)])
def test_a_seed_draws_the_same_ids(sampling: Sampling, never_early: Callable[[], None]) -> None:
    model = tiny_mtp("llama", **FAST)
    options: dict[str, Any] = {"sampling": sampling, "max_tokens": 20}
    early = [ids_of(plain(model, seed=seed, **options)) for seed in range(3)]
    never_early()
    assert early == [ids_of(plain(model, seed=seed, **options)) for seed in range(3)]
    assert len({tuple(ids) for ids in early}) == 3


def test_a_sampler_draws_the_same_ids(never_early: Callable[[], None]) -> None:
    model = tiny_mtp("llama", **FAST)

    def drawn() -> list[int]:
        mx.random.seed(7)
        return ids_of(plain(model, sampler=lambda p: mx.random.categorical(p), max_tokens=20))

    early = drawn()
    never_early()
    assert early == drawn() and len(set(early)) > 5


def test_what_a_sampler_raises_counts_only_where_its_id_is_needed() -> None:
    model = tiny_mtp("llama", **FAST)
    expected = ids_of(plain(model, max_tokens=6))
    calls = 0

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("no fourth id")
        return mx.argmax(logprobs, axis=-1)

    steps, emitted = decode(model, PROMPT, layout="plain", sampler=sampler, max_tokens=6), []
    with pytest.raises(RuntimeError, match="no fourth id"):
        emitted += [step.tokens[0] for step in (next(steps) for _ in range(6))]
    assert calls == 4
    calls, stop = 0, {expected[2]}
    steps = plain(model, sampler=sampler, max_tokens=6, stop_ids=stop)
    assert ids_of(steps) == expected[: expected.index(expected[2]) + 1]


def test_processors_see_every_id_before_the_next_step(events: list[str]) -> None:
    model = tiny_mtp("llama", **FAST)
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append([int(token) for token in np.array(tokens)])
        return logits

    ids = ids_of(plain(model, logits_processors=[spy], max_tokens=4))
    assert seen == [[*PROMPT, *ids[:count]] for count in range(4)]
    assert events == ["submit", "read"] * 4


@pytest.mark.parametrize("kind", ["quantised", "window"])
def test_a_cache_changes_when_it_would_have(
    kind: str, monkeypatch: pytest.MonkeyPatch, never_early: Callable[[], None]
) -> None:
    monkeypatch.setattr(layers, "WINDOW_SLACK", 4)
    model = tiny_mtp("llama", head_dim=32, num_attention_heads=2, num_key_value_heads=1, **FAST)
    quantised = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": len(PROMPT) + 3}
    options: dict[str, Any] = quantised if kind == "quantised" else {"max_kv_size": 8}

    def shapes() -> Iterator[Any]:
        for count in range(2, 8):
            cache = model.make_cache(**options)
            steps: Any = decode(model, PROMPT, layout="plain", cache=cache, max_tokens=20)
            ids = ids_of(islice(steps, count))
            steps.close()
            [layer] = cache.attention_layers
            yield ids, type(layer), cache.offset, layer.inner.offset, cache.drops_rows

    early = list(shapes())
    never_early()
    assert early == list(shapes())
    assert len({entry[1:2] if kind == "quantised" else entry[3] for entry in early}) > 1


class ScriptedPlanner:
    """Plans a layout for each step, and plain ones after them."""

    def __init__(self, layouts: list[StepLayout]) -> None:
        self.layouts = layouts
        self.times: list[float] = []

    def plan(self, *, num_pending: int, offers: Any, **_: Any) -> Plan:
        """The next layout."""
        layout = self.layouts.pop(0) if self.layouts else plain_layout()
        if num_pending > 1:
            layout = plain_layout(num_pending=num_pending)
        return Plan(layout, source="mask" if layout.num_draft_tokens else "")

    def observe(self, plan: Plan, *, ms: float, **_: Any) -> None:
        """Take down the time."""
        self.times.append(ms)


def test_drafts_wait_for_a_step_that_was_submitted_early(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_mtp("llama", k=2, **FAST)
    expected = ids_of(plain(model, max_tokens=16))
    events.clear()
    masks = linear_layout(num_pending=1, num_draft_tokens=0, num_masks=2)
    verify = StepLayout(1, 2, (0, 0, 0))
    quiet = [plain_layout()] * (ahead.STRETCH + 1)
    # The first layout with masks is replaced by the step that runs already; it is planned again.
    planner = ScriptedPlanner([*quiet, plain_layout(), masks, masks, verify, plain_layout()])
    monkeypatch.setattr("mlx_mtp.decoding.setup.make_planner", lambda *_, **__: planner)
    drafted: Any = ScriptedModel(model, right([*PROMPT, *expected]))
    steps = list(decode(drafted, PROMPT, max_tokens=16))
    assert ids_of(steps) == expected
    rows = [step.num_rows for step in steps[1:]]
    assert rows == [1] * (ahead.STRETCH + 2) + [3, 3] + [1] * (len(rows) - ahead.STRETCH - 4)
    assert [step.num_draft_tokens for step in steps if step.num_rows == 3] == [0, 2]
    early = [pair == ("submit", "submit") for pair in zip(events, events[1:], strict=False)]
    assert sum(early) == 2  # one for each stretch
    assert events[: 2 * ahead.STRETCH] == ["submit", "read"] * ahead.STRETCH


@pytest.mark.parametrize(("idle", "expected"), [(0.25, 1.25e3), (3.0, None)])
def test_a_step_lasts_from_read_to_read_unless_the_caller_was_slow(
    idle: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    real = Submitted.outcomes

    def outcomes(submitted: Submitted) -> Any:
        advance(1.0)
        return real(submitted)

    monkeypatch.setattr(Submitted, "outcomes", outcomes)
    monkeypatch.setattr(ahead, "time", SimpleNamespace(perf_counter=lambda: now))
    planner = ScriptedPlanner([])
    monkeypatch.setattr("mlx_mtp.decoding.setup.make_planner", lambda *_, **__: planner)
    for _ in decode(tiny_mtp("llama", **FAST), PROMPT, layout="plain", max_tokens=5):
        advance(idle)
    early = planner.times[1:]
    assert len(early) == 4
    assert early == [expected] * 4 if expected else all(np.isnan(early))
