"""Several answers in one forward: the hidden states, caches and ids of each are its own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backends.cpu.float32 import to_float32
from mlx_mtp.decoding.batching import can_batch, forward
from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.request import Request
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.decoding.setup import make_request
from mlx_mtp.decoding.step import run
from mlx_mtp.model.attention import AttentionSeam
from mlx_mtp.model.layout import BatchLayout, StepLayout, plain_layout, quadratic_layout
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.requests import finish_alone, step_together
from tests.helpers.scripted import ScriptedModel, UnevenPlanner, mixed
from tests.helpers.tiny import KINDS, random_adapter, tiny_base, tiny_mtp

PROMPTS = ([3, 17, 42], [8, 29, 55, 1, 33, 20, 9, 9, 9], [5], [61, 2, 2, 61, 2, 2, 61])
LAYOUTS = [
    plain_layout(),
    quadratic_layout(num_pending=2, num_draft_tokens=2, num_masks=2),
    StepLayout(1, 3, (0, 0, 0, 0)),
    StepLayout(1, 3, (0, 3, 0, 1), (0, 0, 2)),  # a tree
]


def held(model: MTPModel, prompt: list[int]) -> Any:
    cache = model.make_cache()
    cache.begin_step()
    mx.eval(model(mx.array([prompt]), cache=cache))
    return cache


def rows_of(layout: StepLayout) -> list[int]:
    return [*range(7, 7 + layout.num_ordinary), *layout.mask_offsets.tolist()]


def close(found: Any, expected: Any) -> bool:
    return bool(mx.allclose(found, expected, rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [True, False])
def test_a_forward_is_the_separate_ones(kind: str, adapted: bool) -> None:
    model = tiny_mtp(kind, k=3) if adapted else MTPModel(tiny_base(kind))
    assert can_batch(model)
    layouts = LAYOUTS if adapted else [LAYOUTS[0], LAYOUTS[2], plain_layout(num_pending=3)]
    prompts = PROMPTS[: len(layouts)]
    alone = [held(model, prompt) for prompt in prompts]
    expected = [
        model(mx.array([rows_of(layout)]), cache=cache, layout=layout)[0]
        for cache, layout in zip(alone, layouts, strict=True)
    ]
    caches = [held(model, prompt) for prompt in prompts]
    found = forward(model, [mx.array(rows_of(layout)) for layout in layouts], caches, layouts)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other)
    for cache, wanted in zip(caches, alone, strict=True):
        assert cache.offset == wanted.offset
        for layer, other in zip(cache.layers, wanted.layers, strict=True):
            for one, two in zip(layer.keys_and_values(), other.keys_and_values(), strict=True):
                assert close(one, two)


def test_packing_and_unpacking_are_inverse() -> None:
    layout = BatchLayout(tuple(LAYOUTS), (3, 9, 1, 7))
    parts = [mx.random.normal((1, 2, each.num_rows, 4)) for each in LAYOUTS]
    packed = layout.pack(parts, axis=2)
    assert packed.shape[2] == layout.num_rows == sum(each.num_rows for each in LAYOUTS)
    for one, other in zip(layout.unpack(packed, axis=2), parts, strict=True):
        assert mx.array_equal(one, other)
    positions = layout.unpack(layout.positions, axis=0)
    for one, each, offset in zip(positions, LAYOUTS, layout.offsets, strict=True):
        assert one.tolist() == (each.positions + offset).tolist()
    assert layout.gate_split == sum(each.num_ordinary for each in LAYOUTS)


def answers(model: Any, ways: list[dict[str, Any]]) -> list[Request]:
    assert can_batch(getattr(model, "model", model))
    return [make_request(model, PROMPTS[i], max_tokens=20, **way) for i, way in enumerate(ways)]


def together(model: Any, requests: list[Request], *, seed: int) -> tuple[list[list[int]], set[int]]:
    """Run requests to their ends, some of them in a batch each turn; ids, and sizes of batches."""
    rng = np.random.default_rng(seed)
    ids: list[list[int]] = [[] for _ in requests]
    sizes = set()
    while going := [i for i, one in enumerate(requests) if not one.finished]:
        turn = [i for i in going if rng.random() < 0.7]
        if turn:
            sizes.add(len(turn))
            steps = step_together(model, [requests[i] for i in turn])
            for i, tokens in zip(turn, steps, strict=True):
                ids[i] += tokens
    return ids, sizes


GREEDY: list[dict[str, Any]] = [
    {"layout": "quadratic"},
    {"layout": "plain"},
    {"layout": "auto"},
    {"layout": "linear", "num_draft_tokens": 1},
]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma3_text"])
@pytest.mark.parametrize("quantised", [False, True])
def test_greedy_ids_are_those_of_plain_decoding(kind: str, quantised: bool) -> None:
    model = tiny_mtp(kind, k=3, quantised=quantised)
    expected = finish_alone(model, answers(model, [{"layout": "plain"}] * 4))
    for seed, way in enumerate(expected[:3]):
        drafted = ScriptedModel(model, mixed([0] * 5 + way, seed=seed))
        found, sizes = together(drafted, answers(drafted, GREEDY), seed=seed)
        assert found == expected
        assert max(sizes) == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_blocks_for_linux_cpus_part_the_rows_too(kind: str) -> None:
    base = tiny_base(kind, quantised=True)
    assert to_float32(base)
    assert any(isinstance(module, AttentionSeam) for module in base.modules())
    config, weights = random_adapter(base, k=3)
    model = MTPModel(base, config=config, weights=weights)
    expected = finish_alone(model, answers(model, [{"layout": "plain"}] * 4))
    drafted = ScriptedModel(model, mixed([*PROMPTS[0], *expected[0]], seed=0))
    for seed in range(3):
        assert together(drafted, answers(drafted, GREEDY), seed=seed)[0] == expected


@pytest.mark.slow
def test_adversarial_drafts_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mtp("llama", k=3, num_hidden_layers=1)
    expected = finish_alone(model, answers(model, [{"layout": "plain"}] * 4))
    for seed in range(60):
        drafted = ScriptedModel(model, mixed([*PROMPTS[seed % 4], *expected[seed % 4]], seed=seed))
        with monkeypatch.context() as patch:
            planners = iter([UnevenPlanner(3, seed=4 * seed + at) for at in range(4)])
            patch.setattr(
                "mlx_mtp.decoding.setup.make_planner", lambda *_, them=planners, **__: next(them)
            )
            requests = answers(drafted, [{}] * 4)
        assert together(drafted, requests, seed=seed)[0] == expected, seed


@pytest.mark.parametrize("layout", ["plain", "quadratic", "auto"])
def test_a_seed_gives_the_same_ids_in_any_company(layout: str) -> None:
    model = tiny_mtp("llama", k=3)
    sampling = Sampling(temp=1.1, top_p=0.95)
    ways = [{"layout": layout, "sampling": sampling, "seed": at} for at in range(4)]
    expected = finish_alone(model, answers(model, ways))
    for seed in range(4):
        assert together(model, answers(model, ways), seed=seed)[0] == expected


def test_processors_and_log_probabilities_stay_with_their_answer() -> None:
    model = tiny_mtp("llama", k=3)
    ways: list[dict[str, Any]] = [
        {"sampling": Sampling(logit_bias={7: 1e4})},
        {"sampling": Sampling(repetition_penalty=1.5)},
        {},
    ]
    expected = finish_alone(model, answers(model, ways))
    assert set(expected[0]) == {7}
    assert together(model, answers(model, ways), seed=0)[0] == expected
    pair, plain = (answers(model, [{"layout": layout}] * 2) for layout in ("quadratic", "plain"))
    outcomes = run(model, [one.plan() for one in pair])
    for one, outcome, other in zip(pair, outcomes, plain, strict=True):
        [expected_outcome] = run(model, [other.plan()])
        assert close(one.commit(outcome).logprobs[0], other.commit(expected_outcome).logprobs[0])


def test_a_processor_that_fails_ends_its_own_answer_only() -> None:
    model = tiny_mtp("llama", k=3)

    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > len(PROMPTS[0]) + 4:
            raise ValueError("no way on")
        return logits

    ways: list[dict[str, Any]] = [{"layout": "plain"}] * 3
    expected = finish_alone(model, answers(model, ways))
    bad, *good = answers(model, [{"logits_processors": [fail], "layout": "plain"}, *ways[1:]])
    requests = [bad, *good]
    for count in range(8):
        outcomes = run(model, [one.plan() for one in requests])
        if count == 5:
            with pytest.raises(ValueError, match="no way on"):
                bad.commit(outcomes[0])
            requests, outcomes = good, outcomes[1:]
        results = [one.commit(each) for one, each in zip(requests, outcomes, strict=True)]
        for result, ids in zip(results[-2:], expected[1:], strict=True):
            assert result.tokens == [ids[count]]


def test_an_answer_abandoned_before_its_step_leaves_a_whole_cache() -> None:
    model = tiny_mtp("llama")
    cache = model.make_cache()
    one = make_request(model, PROMPTS[1], cache=cache, max_tokens=20)
    [emitted] = step_together(model, [one])
    one.plan()
    assert cache.offset == len(PROMPTS[1]) + len(emitted) - 1
    rest = decode(model, emitted[-1:], cache=cache, max_tokens=20 - len(emitted))
    expected = finish_alone(model, answers(model, [{}, {}]))[1]
    assert emitted + [token for step in rest for token in step.tokens] == expected
