"""The loop, greedy: whatever is drafted, the ids are those of plain decoding and of mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.caches import layers
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import CostCurve, LiveCosts
from tests.helpers.scripted import (
    Script,
    ScriptedModel,
    TableModel,
    UnevenPlanner,
    mixed,
    one_wrong,
    right,
    wrong,
)
from tests.helpers.tiny import KINDS, tiny_base, tiny_mtp

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
LAYOUTS = ("plain", "auto", "linear", "quadratic")
CHUNKS = (1, 3, 7, 64)
FAST: dict[str, Any] = {"num_hidden_layers": 1, "low_rank": False, "sampler": False}
WIDE: dict[str, Any] = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def run(model: Any, prompt: list[int], **options: Any) -> list[StepResult]:
    return list(decode(model, prompt, **options))


def ids_of(steps: list[StepResult]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def stock_ids(base: Any, prompt: list[int], **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.array(prompt), base, **options)]


def plain_ids(model: Any, prompt: list[int], **options: Any) -> list[int]:
    return ids_of(run(model, prompt, layout="plain", **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_greedy_ids_are_those_of_mlx_lm(kind: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stock_ids(tiny_base(kind), PROMPT, max_tokens=24)
    model = tiny_mtp(kind)
    drafted = ScriptedModel(model, mixed([*PROMPT, *expected], seed=3 * k, share=0.75))
    for index, layout in enumerate(LAYOUTS):
        chunk = CHUNKS[(index + k) % len(CHUNKS)]
        options: dict[str, Any] = {"layout": layout, "num_draft_tokens": k, "max_tokens": 24}
        steps = run(drafted, PROMPT, prefill_step_size=chunk, **options)
        assert ids_of(steps) == expected, (layout, chunk)
        assert layout == "plain" or len(steps) < 24
        if index == k - 1:
            assert ids_of(run(model, PROMPT, prefill_step_size=chunk, **options)) == expected
    planner = UnevenPlanner(k, seed=k)
    monkeypatch.setattr("mlx_mtp.decoding.setup.make_planner", lambda *_, **__: planner)
    assert ids_of(run(drafted, PROMPT, max_tokens=24)) == expected
    assert any(len(set(plan.mask_counts)) > 1 for plan in planner.plans)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_quantised_models_too(kind: str) -> None:
    model = tiny_mtp(kind, quantised=True)
    expected = stock_ids(tiny_base(kind, quantised=True), PROMPT, max_tokens=16)
    drafted = ScriptedModel(model, mixed([*PROMPT, *expected], seed=0))
    for layout in LAYOUTS:
        assert ids_of(run(drafted, PROMPT, layout=layout, max_tokens=16)) == expected
        assert ids_of(run(model, PROMPT, layout=layout, max_tokens=16)) == expected


def adversary(name: str, sequence: list[int], seed: int) -> Script:
    scripts = {
        "random": mixed(sequence, seed=seed, share=0.3),
        "right": right(sequence),
        "wrong": wrong(sequence),
    }
    return scripts[name]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["random", "right", "wrong"])
def test_many_sequences_of_adversarial_drafts(name: str, count: int, seed: int) -> None:
    model = tiny_mtp("llama", k=3, **FAST)
    rng = np.random.default_rng([len(name), seed])
    accepted = set()
    for number in range(count):
        prompt = rng.integers(0, 64, rng.integers(1, 9)).tolist()
        k, layout = 1 + number % 3, ("linear", "quadratic", "auto")[number // 3 % 3]
        length = 1 + 2 * (k + 1)
        expected = plain_ids(model, prompt, max_tokens=length)
        drafted = ScriptedModel(model, adversary(name, [*prompt, *expected], seed + number))
        options: dict[str, Any] = {"layout": layout, "num_draft_tokens": k, "lookup": False}
        steps = run(drafted, prompt, max_tokens=length, **options)
        assert ids_of(steps) == expected, (prompt, k, layout)
        assert all(len(step.tokens) == step.num_accepted + 1 for step in steps)
        accepted |= {step.num_accepted for step in steps}
        if name == "wrong":
            assert [len(step.tokens) for step in steps] == [1] * length
        elif name == "right":
            assert all(step.num_accepted == step.num_draft_tokens for step in steps[1:])
            if layout != "auto":
                assert [len(step.tokens) for step in steps] == [1, k + 1, k + 1]
    assert accepted == {"random": {0, 1, 2, 3}, "right": {0, 1, 2, 3}, "wrong": {0}}[name]


@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", ["linear", "quadratic"])
def test_a_match_after_a_mismatch_is_not_counted(layout: str, which: int) -> None:
    model = tiny_mtp("llama", k=4, **FAST)
    expected = plain_ids(model, PROMPT, max_tokens=20)
    drafted = ScriptedModel(model, one_wrong([*PROMPT, *expected], which_is_wrong=which))
    steps = run(drafted, PROMPT, layout=layout, max_tokens=20)
    assert ids_of(steps) == expected
    full = [step for step in steps if step.num_draft_tokens == 4]
    assert full and all(step.num_accepted == which for step in full)


def assert_cache_holds(cache: Any, model: MTPModel, ids: list[int]) -> None:
    fresh = model.make_cache()
    model(mx.array([ids]), cache=fresh)
    assert cache.offset == len(ids)
    for layer, wanted in zip(cache.attention_layers, fresh.attention_layers, strict=True):
        for found, expected in zip(layer.keys_and_values(), wanted.keys_and_values(), strict=True):
            assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stop_id_ends_the_text_wherever_it_falls(layout: str) -> None:
    model = tiny_mtp("llama", k=4, **FAST)
    expected = plain_ids(model, PROMPT, max_tokens=30)
    drafted = ScriptedModel(model, right([*PROMPT, *expected]))
    places = {expected.index(token) for token in expected[:16]}
    assert len(places) > 8
    for place in sorted(places):
        cache = model.make_cache()
        stop = {expected[place], 999}
        steps = run(drafted, PROMPT, layout=layout, cache=cache, stop_ids=stop, max_tokens=30)
        assert ids_of(steps) == expected[: place + 1]
        assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]
        last = steps[-1]
        full = last.num_accepted + 1 == len(last.tokens)
        assert full or last.num_accepted == len(last.tokens)  # the stop id itself was a draft
        assert last.logprobs.shape == (len(last.tokens), 64)
        assert_cache_holds(cache, model, [*PROMPT, *expected[:place]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_token_limit_cuts_exactly(layout: str) -> None:
    model = tiny_mtp("llama", k=4, **FAST)
    expected = plain_ids(model, PROMPT, max_tokens=12)
    drafted = ScriptedModel(model, right([*PROMPT, *expected]))
    for limit in range(1, 12):
        cache = model.make_cache()
        steps = run(drafted, PROMPT, layout=layout, cache=cache, max_tokens=limit)
        assert ids_of(steps) == expected[:limit]
        assert steps[-1].finish_reason == "length"
        assert all(step.num_accepted <= min(step.num_draft_tokens, limit) for step in steps)
        assert cache.offset == len(PROMPT) + limit - 1


def test_a_generator_closed_early_leaves_a_cache_to_go_on_with() -> None:
    model = tiny_mtp("llama", k=4)
    expected = stock_ids(tiny_base("llama"), PROMPT, max_tokens=30)
    drafted = ScriptedModel(model, mixed([*PROMPT, *expected], seed=3))
    for count in range(1, 6):
        cache, emitted = model.make_cache(), []
        steps: Any = decode(drafted, PROMPT, cache=cache, layout="quadratic", max_tokens=30)  # type: ignore[arg-type]
        for _ in range(count):
            emitted += next(steps).tokens
        steps.close()
        assert_cache_holds(cache, model, [*PROMPT, *emitted[:-1]])
        rest = run(drafted, emitted[-1:], cache=cache, max_tokens=30 - len(emitted))
        assert emitted + ids_of(rest) == expected
    cache = model.make_cache()
    never: Any = decode(model, PROMPT, cache=cache)
    never.close()
    assert cache.offset == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversation_reuses_its_cache(layout: str) -> None:
    model, cache, ids = tiny_mtp("qwen3"), tiny_mtp("qwen3").make_cache(), list(PROMPT)
    cache = model.make_cache()
    for turn in ([], [7, 7, 9], [50]):
        ids += turn
        reply = ids_of(run(model, ids[cache.offset :], cache=cache, layout=layout, max_tokens=8))
        assert reply == stock_ids(tiny_base("qwen3"), ids, max_tokens=8)
        ids += reply
    cache.rewind(cache.offset - 5)  # another branch of the conversation
    other = [*ids[:5], 1, 2, 3]
    reply = ids_of(run(model, other[5:], cache=cache, layout=layout, max_tokens=8))
    assert reply == stock_ids(tiny_base("qwen3"), other, max_tokens=8)


@pytest.mark.parametrize("start", [0, 5, len(PROMPT), 14, 17])
@pytest.mark.parametrize("chunk", [4, 64])
def test_a_cache_quantised_on_the_way_gives_the_same_ids(start: int, chunk: int) -> None:
    model = tiny_mtp("llama", **WIDE)
    results = []
    for layout in LAYOUTS:
        cache = model.make_cache(kv_bits=8, kv_group_size=32, quantized_kv_start=start)
        options: dict[str, Any] = {"cache": cache, "layout": layout, "max_tokens": 24}
        script = mixed([*PROMPT, *(results[0] if results else [])], seed=1, share=0.8)
        steps = run(ScriptedModel(model, script), PROMPT, prefill_step_size=chunk, **options)
        results.append(ids_of(steps))
        assert cache.rows_until_change is None
        assert layout == "plain" or len(steps) < 24
    assert results == [results[0]] * len(LAYOUTS)


@pytest.mark.parametrize("kind", ["llama", "ministral3", "gemma3_text"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_windows_that_wrap_give_the_same_ids(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WINDOW_SLACK", 8)
    model = tiny_mtp(kind)
    bound = {"max_kv_size": 14} if kind == "llama" else {}
    options: dict[str, Any] = {"max_tokens": 60, "prefill_step_size": chunk}
    prompt = PROMPT * 2
    expected = plain_ids(model, prompt, cache=model.make_cache(**bound), **options)
    unbound = stock_ids(tiny_base(kind), prompt, max_tokens=60)
    assert (expected == unbound) == (kind != "llama")
    drafted = ScriptedModel(model, mixed([*prompt, *expected], seed=2))
    for layout in LAYOUTS:
        cache = model.make_cache(**bound)
        assert ids_of(run(drafted, prompt, layout=layout, cache=cache, **options)) == expected
        assert cache.offset == len(prompt) + 59


PROCESSED = [
    Sampling(repetition_penalty=1.8),
    Sampling(repetition_penalty=3.0, repetition_context_size=3),
    Sampling(logit_bias={5: 2.0, 17: -3.0, 40: 1.5}),
    Sampling(repetition_penalty=1.5, logit_bias={8: 3.0}),
]


@pytest.mark.parametrize("sampling", PROCESSED)
def test_processors_see_the_drafted_prefix(sampling: Sampling) -> None:
    processors = make_logits_processors(
        logit_bias=sampling.logit_bias,
        repetition_penalty=sampling.repetition_penalty,
        repetition_context_size=sampling.repetition_context_size,
    )
    prompt, base, model = PROMPT * 3, tiny_base("llama"), tiny_mtp("llama")
    expected = stock_ids(base, prompt, max_tokens=24, logits_processors=processors)
    assert expected != stock_ids(base, prompt, max_tokens=24)
    drafted = ScriptedModel(model, mixed([*prompt, *expected], seed=4, share=0.8))
    for layout in LAYOUTS:
        steps = run(drafted, prompt, sampling=sampling, layout=layout, max_tokens=24)
        assert ids_of(steps) == expected
    seen: list[list[int]] = []

    def spy(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(np.array(tokens).tolist())
        return logits

    options: dict[str, Any] = {"max_tokens": 24, "layout": "quadratic", "sampling": sampling}
    found = run(drafted, prompt, logits_processors=[spy], **options)
    assert ids_of(found) == expected
    assert [*prompt, *expected[:-1]] in seen and seen[0] == prompt


def test_every_step_is_one_forward_and_says_what_it_did() -> None:
    model = tiny_mtp("llama", k=2, **FAST)
    expected = plain_ids(model, PROMPT, max_tokens=10)
    drafted = ScriptedModel(model, right([*PROMPT, *expected]))
    calls: list[tuple[int, int]] = []
    steps = run(
        drafted,
        PROMPT,
        layout="quadratic",
        max_tokens=10,
        prefill_step_size=4,
        prompt_progress_callback=lambda done, total: calls.append((done, total)),
    )
    assert drafted.forwards == 2 + len(steps)  # two chunks before the last
    assert calls == [(0, 9), (4, 9), (8, 9), (9, 9)]
    assert [step.num_rows for step in steps[:2]] == [1 + 2, 3 + 3 * 2]
    assert [step.num_draft_tokens for step in steps] == [0, 2, 2, 2]
    plain = run(model, PROMPT, layout="plain", max_tokens=3)
    assert [step.num_rows for step in plain] == [9, 1, 1]


def test_logprobs_are_those_of_mlx_lm() -> None:
    stock = [p for _, p in generate_step(mx.array(PROMPT), tiny_base("phi3"), max_tokens=12)]
    steps = run(tiny_mtp("phi3"), PROMPT, layout="quadratic", max_tokens=12)
    found = mx.concatenate([step.logprobs for step in steps])
    assert mx.allclose(found, mx.stack(stock), rtol=1e-5, atol=1e-5)


def test_without_an_adapter_every_layout_is_plain() -> None:
    model = MTPModel(tiny_base("llama"))
    expected = stock_ids(tiny_base("llama"), PROMPT, max_tokens=8)
    for layout in LAYOUTS:
        steps = run(model, PROMPT, layout=layout, max_tokens=8, num_draft_tokens=3)
        assert ids_of(steps) == expected
        assert all(step.num_draft_tokens == 0 for step in steps)


def test_no_limit_ends_at_the_models_context() -> None:
    model = tiny_mtp("llama", max_position_embeddings=32, **FAST)
    for limit in (-1, 1000):
        cache = model.make_cache()
        steps = run(model, PROMPT, max_tokens=limit, cache=cache)
        assert len(ids_of(steps)) == 32 - len(PROMPT) and steps[-1].finish_reason == "length"
    with pytest.raises(ValueError, match="32 tokens, but tiny-llama takes fewer than 32"):
        decode(model, [1] * 32)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 64], {}, "prompt contains the id 64, but the vocabulary has 64 ids"),
        ([-1], {}, "prompt contains the id -1"),
        ([1], {"sampling": Sampling(logit_bias={99: 1.0})}, "logit_bias contains the id 99"),
        ([1], {"num_draft_tokens": 5}, "num_draft_tokens is 5, .* trained for 4"),
        ([1], {"num_draft_tokens": -1}, "num_draft_tokens must be at least 0, got -1"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1, .* got 0"),
        ([1], {"max_tokens": -2}, "max_tokens must be at least 1, .* got -2"),
        ([1], {"prefill_step_size": 0}, "prefill_step_size must be at least 1, got 0"),
        ([1], {"layout": "cubic"}, "layout must be one of .*, got 'cubic'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    prompt: list[int], options: dict[str, Any], message: str
) -> None:
    model = tiny_mtp("llama", **FAST)
    cache = model.make_cache()
    with pytest.raises(ValueError, match=message):
        decode(model, prompt, cache=cache, **options)
    assert cache.offset == 0


def repeating_model() -> TableModel:
    """Its text goes round in circles, and its masks know nothing."""
    rng = np.random.default_rng(5)
    logits = 4 * rng.normal(size=(1, 8, 8)).astype(np.float32)
    return TableModel(logits, np.zeros((1, 8), np.float32), np.zeros((8, 8), np.float32))


@pytest.mark.parametrize("temp", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 4])
def test_looked_up_drafts_change_nothing_but_the_steps(temp: float, k: int) -> None:
    model = repeating_model()
    options: dict[str, Any] = {"max_tokens": 80, "sampling": Sampling(temp=temp), "seed": 3}
    steps = run(model, [1, 2, 3], num_draft_tokens=k, **options)
    found = [step for step in steps if step.source == "lookup"]
    assert sum(step.num_accepted for step in found) > 10
    assert all(bool(step.source) == bool(step.num_draft_tokens) for step in steps)
    without = run(model, [1, 2, 3], num_draft_tokens=k, lookup=False, **options)
    assert not any(step.source == "lookup" for step in without)
    if temp == 0:
        plain = plain_ids(model, [1, 2, 3], max_tokens=80)
        assert ids_of(steps) == ids_of(without) == plain
        assert len(steps) < len(without)


def test_lookups_are_learnt_from_though_none_is_verified() -> None:
    dear = CostCurve(rows=(1, 8), contexts=(0,), forward_ms=((1.0, 1e4),), draft_ms=(0.0, 1.0))
    known = Speculation(LiveCosts(dear, learns=False), Acceptance([0.5]))
    before = list(known.lookup.logits)
    steps = run(repeating_model(), [1, 2, 3], max_tokens=80, num_draft_tokens=1, speculation=known)
    assert not any(step.source for step in steps)
    assert max(np.array(known.lookup.logits) - before) > 0.05  # its text repeats itself


def test_what_the_planner_knows_goes_on_from_answer_to_answer() -> None:
    model = tiny_mtp("llama", k=2, **FAST)
    known = Speculation.guess(2)
    lines: list[str] = []
    run(model, PROMPT, max_tokens=40, speculation=known, lookup=False, explain=lines.append)
    assert known.acceptance.draft_probs()[0] != 0.5
    assert lines and all(" rows" in line and " accepted, " in line for line in lines)
