"""Sampling through the real loop: exact token by token, and repeatable by its seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

from mlx_mtp.decoding.loop import decode
from mlx_mtp.decoding.sampling import Sampling
from tests.decoding.test_accept import eager
from tests.helpers.exact import exact_probs, holm, p_value
from tests.helpers.scripted import ScriptedModel, TableModel, mixed
from tests.helpers.tiny import tiny_base, tiny_mtp

VOCAB = 8
TOKENS, SEEDS = 1_000, 4  # per run, runs
PROMPT = [1, 2, 3]
TABLE_SETTINGS = {
    "auto": Sampling(temp=1.0),
    "linear": Sampling(temp=1.2, top_p=0.9, top_k=6),
    "quadratic": Sampling(
        temp=0.9, repetition_penalty=1.5, repetition_context_size=1, logit_bias={2: 1.0}
    ),
}


def table_model() -> TableModel:
    rng = np.random.default_rng(0)
    logits = 1.5 * rng.standard_normal((3, VOCAB, VOCAB))
    heads = 0.5 * rng.standard_normal((VOCAB, VOCAB))
    return TableModel(logits.astype(np.float32), logits.mean(axis=1), heads.astype(np.float32))


def sampled_ids(model: Any, prompt: list[int], **options: Any) -> list[int]:
    return [token for step in decode(model, prompt, **options) for token in step.tokens]


def chain_p_values(
    layout: str,
    sampling: Sampling,
    *,
    model: TableModel | None = None,
    sample: Callable[..., list[int]] = sampled_ids,
    **more: Any,
) -> dict[str, float]:
    """Each token given the one before, and given the two before, in each of the three phases."""
    model, counts = model or table_model(), np.zeros((3, VOCAB, VOCAB, VOCAB))
    options: dict[str, Any] = {"layout": layout, "num_draft_tokens": 3, "sampling": sampling}
    options |= {"max_tokens": TOKENS} | more
    for seed in range(SEEDS):
        ids = [*PROMPT, *sample(model, PROMPT, seed=seed, **options)]
        for place in range(len(PROMPT), len(ids)):
            counts[(place % 3, *ids[place - 2 : place + 1])] += 1
    probs = np.zeros((3, VOCAB, VOCAB))
    for phase in range(3):
        for before in range(VOCAB):
            probs[phase, before] = exact_probs(
                model.logits_table[phase, before], [before], sampling
            )
    rows = np.broadcast_to(probs[:, None], counts.shape).reshape(-1, VOCAB)
    found = {"two before": p_value(counts.reshape(-1, VOCAB), rows)}
    for phase in range(3):
        found[f"token {phase + 1}"] = p_value(counts[phase].sum(axis=0), probs[phase])
    return found


@pytest.mark.slow
def test_the_loop_draws_from_the_exact_distribution() -> None:
    found = {
        (layout, name): p
        for layout, sampling in TABLE_SETTINGS.items()
        for name, p in chain_p_values(layout, sampling).items()
    }
    assert holm(found.values())[0] > 0.001, found


@pytest.mark.slow
def test_a_bias_of_two_percent_planted_in_the_loop_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_sampled", partial(eager, share=0.02))
    found = chain_p_values("quadratic", Sampling(temp=0.4))
    assert holm([*found.values()] * len(TABLE_SETTINGS))[0] < 0.001, found


MODEL_SETTINGS = [
    ("quadratic", Sampling(temp=1.0)),
    ("linear", Sampling(temp=1.3, min_p=0.05, top_k=6, repetition_penalty=1.3)),
    ("auto", Sampling(temp=0.8, top_p=0.9, logit_bias={0: 1.5, 3: -2.0})),
]


@pytest.mark.slow
def test_a_tiny_model_draws_from_its_own_distribution() -> None:
    """Where a token's place in its exact distribution is uniform, it was drawn from it."""
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 1}
    model, base = tiny_mtp("llama", k=3, scale_of_weights=0.1, **sizes), tiny_base("llama", **sizes)
    rng = np.random.default_rng(0)
    found = {}
    for layout, sampling in MODEL_SETTINGS:
        places: list[float] = []
        for seed in range(3):
            options: dict[str, Any] = {"layout": layout, "sampling": sampling, "seed": seed}
            ids = [*PROMPT, *sampled_ids(model, PROMPT, max_tokens=500, **options)]
            logits = np.array(base(mx.array([ids]))[0])
            for place in range(len(PROMPT), len(ids)):
                probs = exact_probs(logits[place - 1], ids[:place], sampling)
                below = probs[: ids[place]].sum()
                places.append(below + rng.random() * probs[ids[place]])
        cells = np.minimum((np.array(places) * 10).astype(int), 9)
        found[layout, "one"] = p_value(np.bincount(cells, minlength=10), np.full(10, 0.1))
        pairs = np.bincount(cells[1:] * 10 + cells[:-1], minlength=100)
        found[layout, "pairs"] = p_value(pairs, np.full(100, 0.01))
    assert holm(found.values())[0] > 0.001, found


@pytest.mark.parametrize("layout", ["plain", "auto", "linear", "quadratic"])
def test_the_same_seed_gives_the_same_ids(layout: str) -> None:
    model = tiny_mtp("llama", k=2)
    options: dict[str, Any] = {"layout": layout, "sampling": Sampling(temp=1.0), "max_tokens": 16}
    runs = [sampled_ids(model, PROMPT, seed=seed, **options) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    mx.random.seed(11)
    unseeded = [sampled_ids(model, PROMPT, **options) for _ in range(2)]
    mx.random.seed(11)
    assert [sampled_ids(model, PROMPT, **options) for _ in range(2)] == unseeded
    assert unseeded[0] != unseeded[1]


def test_a_seed_does_not_touch_the_global_state() -> None:
    model = tiny_mtp("llama", k=2)
    mx.random.seed(3)
    expected = mx.random.uniform(shape=(4,))
    mx.random.seed(3)
    sampled_ids(model, PROMPT, sampling=Sampling(temp=1.0), seed=1, max_tokens=6)
    assert mx.array_equal(mx.random.uniform(shape=(4,)), expected)


def test_greedy_ids_do_not_depend_on_the_seed() -> None:
    model = tiny_mtp("llama", k=2)
    runs = [sampled_ids(model, PROMPT, seed=seed, max_tokens=12) for seed in (1, 2)]
    assert runs[0] == runs[1]


def coarse(logprobs: mx.array) -> mx.array:
    """A sampler of one row that is neither greedy nor drawn: the second most likely token."""
    return mx.argsort(-logprobs.reshape(-1))[1]


@pytest.mark.parametrize("layout", ["auto", "linear", "quadratic"])
@pytest.mark.parametrize("sampler", [coarse, lambda logprobs: mx.argmax(logprobs, axis=-1)])
def test_a_deterministic_sampler_gives_the_ids_of_plain_decoding(layout: str, sampler: Any) -> None:
    model = tiny_mtp("llama", k=3)
    options: dict[str, Any] = {"sampler": sampler, "max_tokens": 24}
    expected = sampled_ids(model, PROMPT, layout="plain", **options)
    drafted: Any = ScriptedModel(model, mixed([*PROMPT, *expected], seed=3))
    steps = list(decode(drafted, PROMPT, layout=layout, **options))
    assert [token for step in steps for token in step.tokens] == expected
    assert len(steps) < 24 and sum(step.num_accepted for step in steps) > 0
    greedy = sampled_ids(model, PROMPT, layout=layout, max_tokens=24)
    assert (expected == greedy) == (sampler is not coarse)


def test_a_random_sampler_draws_from_its_own_distribution() -> None:
    model, sampler = table_model(), make_sampler(temp=1.0)
    mx.random.seed(5)
    counts = np.zeros((3, VOCAB, VOCAB))
    ids = [*PROMPT, *sampled_ids(model, PROMPT, sampler=sampler, max_tokens=600)]
    for place in range(len(PROMPT), len(ids)):
        counts[(place % 3, *ids[place - 1 : place + 1])] += 1
    probs = [
        exact_probs(model.logits_table[phase, before], [before], Sampling(temp=1.0))
        for phase in range(3)
        for before in range(VOCAB)
    ]
    assert p_value(counts.reshape(-1, VOCAB), np.array(probs)) > 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sampling": Sampling(temp=1.0)}, "exclude each other"), ({"seed": 1}, "mx.random.seed")],
)
def test_a_sampler_excludes_what_it_replaces(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(tiny_mtp("llama", k=2), PROMPT, sampler=coarse, **options)
