"""Draft models in the loop: whatever they propose, the ids are those of plain decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mlx_mtp.decoding.limits import LimitError
from mlx_mtp.decoding.loop import StepResult, decode
from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.model.mtp_model import MTPModel
from mlx_mtp.planning.acceptance import Acceptance
from mlx_mtp.planning.auto import Speculation
from mlx_mtp.planning.costs import GPU_GUESS, LiveCosts
from mlx_mtp.planning.plan import DRAFT_MODEL
from tests.helpers.exact import exact_probs, holm, p_value
from tests.helpers.hybrid import HYBRIDS, hybrid_base
from tests.helpers.tiny import tiny_base, tiny_mtp

PROMPT = [3, 17, 42, 8, 29, 55, 1, 33, 20]
PAIRS = [  # the model, then the draft model
    ("llama", "qwen3"),
    ("qwen2", "gemma3_text"),  # a window
    ("gemma3_text", "mamba2"),  # recurrent layers only
    ("ministral3", "qwen3_5"),  # recurrent layers among others
    ("deepseek_v3", "rwkv7"),
    ("qwen3_moe", "ministral3"),
    ("qwen3_5", "llama"),
    ("mamba2", "lfm2"),
    ("lfm2", "deepseek_v3"),
]
VOCAB = 8


def base_of(kind: str, **options: Any) -> Any:
    """A tiny model of mlx-lm."""
    return (hybrid_base if kind in HYBRIDS else tiny_base)(kind, **options)


def tiny(kind: str, **options: Any) -> MTPModel:
    """A tiny model without an adapter."""
    return MTPModel(base_of(kind, **options))


def run(model: MTPModel, draft: MTPModel, **options: Any) -> list[StepResult]:
    """All steps with drafts of the draft model and no others."""
    prompt = [token % model.vocab_size for token in PROMPT]
    options = {"drafter": DRAFT_MODEL, "layout": "linear", "draft_model": draft, **options}
    return list(decode(model, prompt, **options))


def ids_of(steps: list[StepResult]) -> list[int]:
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize(("kind", "draft_kind"), PAIRS)
def test_greedy_ids_are_those_of_mlx_lm(kind: str, draft_kind: str) -> None:
    expected = [
        int(token) for token, _ in generate_step(mx.array(PROMPT), base_of(kind), max_tokens=24)
    ]
    model = tiny(kind)
    useless = tiny(draft_kind, seed=7)
    for chunk, k in ((64, 3), (4, 1)):
        steps = run(model, useless, max_tokens=24, prefill_step_size=chunk, num_draft_tokens=k)
        assert ids_of(steps) == expected
        assert sum(step.num_draft_tokens for step in steps) > 0
    similar = tiny(kind, quantised=True)
    found = {}
    for layout in ("linear", "auto"):
        cache = model.make_cache()
        steps = run(model, similar, max_tokens=24, layout=layout, cache=cache, drafter="auto")
        found[layout] = steps
        assert ids_of(steps) == expected
        assert cache.offset == len(PROMPT) + 23
    assert sum(step.num_accepted for step in found["linear"]) > 0
    assert {step.source for step in found["linear"]} - {""} == {DRAFT_MODEL}


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_5", "mamba2", "lfm2"])
def test_drafts_of_the_model_itself_are_all_accepted(kind: str, k: int) -> None:
    model, draft = tiny(kind), tiny(kind)
    steps = run(model, draft, max_tokens=3 * (k + 1), num_draft_tokens=k)
    assert [len(step.tokens) for step in steps] == [k + 1] * 3
    sampled = run(
        model, draft, max_tokens=3 * (k + 1), num_draft_tokens=k,
        sampling=Sampling(temp=0.8), seed=k,
    )  # fmt: skip
    assert [len(step.tokens) for step in sampled] == [k + 1] * 3


def test_the_planner_takes_good_drafts_and_leaves_useless_ones() -> None:
    sizes: dict[str, Any] = {"head_dim": 16, "num_hidden_layers": 4}
    model, num_drafts = tiny("llama", **sizes), []
    for seed in (0, 3):  # of the draft model's weights: those of the model, or others
        draft = tiny("llama", seed=seed, quantised=True, **sizes)
        costs = LiveCosts(replace(GPU_GUESS, is_guess=False), learns=False)
        steps = run(
            model, draft, max_tokens=60, layout="auto", drafter="auto", lookup=False,
            speculation=Speculation(costs, Acceptance.unknown(0)),
        )  # fmt: skip
        num_drafts.append(sum(step.num_draft_tokens for step in steps))
    assert num_drafts[0] > 35 and num_drafts[1] < 15


@pytest.mark.parametrize("draft_kind", ["llama", "qwen3_5"])
def test_a_conversation_continues_the_draft_models_cache(draft_kind: str) -> None:
    model, draft = tiny("qwen3"), tiny(draft_kind)
    cache, ids = model.make_cache(), []
    for turn in (PROMPT, [7, 7, 9], [50]):
        for limit in (9, 1):
            expected = ids_of(list(decode(model, [*ids, *turn], max_tokens=limit, layout="plain")))
            cached = ids[: cache.offset]
            steps = decode(
                model, [*ids, *turn][cache.offset :], cache=cache, cached_ids=cached,
                draft_model=draft, drafter=DRAFT_MODEL, layout="linear", max_tokens=limit,
            )  # fmt: skip
            assert ids_of(list(steps)) == expected
            ids += [*turn, *expected]
            text = cache.drafter_memory[DRAFT_MODEL]
            assert text.ids == ids and len(ids) - 12 < text.cache.offset <= len(ids)
            turn = [3]
    assert cache.copied().drafter_memory == {}


@pytest.mark.parametrize("stop", range(3))
def test_a_stop_id_among_the_drafts_ends_the_answer(stop: int) -> None:
    model, draft = tiny("llama"), tiny("llama")
    expected = ids_of(list(decode(model, PROMPT, max_tokens=12, layout="plain")))
    token = expected[5 + stop]
    steps = run(model, draft, max_tokens=12, num_draft_tokens=4, stop_ids={token})
    assert ids_of(steps) == expected[: expected.index(token) + 1]
    assert steps[-1].finish_reason == "stop"


SETTINGS = [
    ("linear", "qwen3", Sampling(temp=1.0)),
    ("linear", "llama", Sampling(temp=1.3, min_p=0.05, top_k=6, repetition_penalty=1.3)),
    ("auto", "mamba2", Sampling(temp=0.8, top_p=0.9, logit_bias={0: 1.5, 3: -2.0})),
]


@pytest.mark.slow
def test_ids_are_drawn_from_the_models_own_distribution() -> None:
    """Where a token's place in its exact distribution is uniform, it was drawn from it."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 1}
    base, rng, found = tiny_base("llama", **sizes), np.random.default_rng(0), {}
    model, prompt = MTPModel(tiny_base("llama", **sizes)), [token % VOCAB for token in PROMPT]
    for layout, kind, sampling in SETTINGS:
        draft = tiny(kind, seed=0 if kind == "llama" else 3, quantised=kind == "llama", **sizes)
        places: list[float] = []
        num_accepted = num_drafts = 0
        for seed in range(3):
            steps = run(
                model, draft, max_tokens=400, sampling=sampling, seed=seed, layout=layout,
                num_draft_tokens=3,
            )  # fmt: skip
            num_drafts += sum(step.num_draft_tokens for step in steps)
            num_accepted += sum(step.num_accepted for step in steps)
            ids = [*prompt, *ids_of(steps)]
            logits = np.array(base(mx.array([ids]))[0])
            for place in range(len(prompt), len(ids)):
                probs = exact_probs(logits[place - 1], ids[:place], sampling)
                below = probs[: ids[place]].sum()
                places.append(below + rng.random() * probs[ids[place]])
        assert 0 < num_accepted < num_drafts
        cells = np.minimum((np.array(places) * 10).astype(int), 9)
        found[kind, "one"] = p_value(np.bincount(cells, minlength=10), np.full(10, 0.1))
        pairs = np.bincount(cells[1:] * 10 + cells[:-1], minlength=100)
        found[kind, "pairs"] = p_value(pairs, np.full(100, 0.01))
    assert holm(found.values())[0] > 0.001, found


def test_the_same_seed_gives_the_same_ids() -> None:
    model, draft = tiny("llama"), tiny("qwen3")
    options: dict[str, Any] = {"sampling": Sampling(temp=1.0), "max_tokens": 16, "layout": "auto"}
    runs = [ids_of(run(model, draft, seed=seed, **options)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_more_drafts_than_the_adapter_has_are_the_draft_models() -> None:
    model, draft = tiny_mtp("llama", k=2), tiny("llama")
    steps = run(model, draft, num_draft_tokens=5, max_tokens=12)
    assert [len(step.tokens) for step in steps] == [6, 6]
    both = run(model, draft, drafter="auto", num_draft_tokens=5, max_tokens=12)
    assert ids_of(both) == ids_of(steps)
    with pytest.raises(LimitError, match="the adapter was trained for 2"):
        decode(model, PROMPT, num_draft_tokens=5)


def test_without_a_draft_model_it_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="drafter is draft-model, but .* has no draft model"):
        decode(tiny("llama"), PROMPT, drafter=DRAFT_MODEL)
