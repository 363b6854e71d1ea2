"""Acceptance: never past a mismatch, and exact in distribution under every filter and penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm import sample_utils

from mlx_mtp.decoding.accept import accept_greedy, accept_sampled, count_accepted
from mlx_mtp.decoding.sampling import (
    Sampling,
    _drop_top,
    _keep_min_p,
    _keep_top_k,
    _keep_top_p,
    process_logits,
    target_probs,
)
from tests.helpers.exact import exact_probs, filtered, holm, p_value

VOCAB = 12
FEW_DRAWS, MANY_DRAWS = 5_000, 20_000
CONTEXT = [3, 7, 1]
SETTINGS = {
    "plain": Sampling(temp=1.0),
    "cold": Sampling(temp=0.5),
    "hot": Sampling(temp=1.7),
    "top-p": Sampling(temp=1.0, top_p=0.8),
    "hot top-p": Sampling(temp=1.4, top_p=0.9),
    "top-k": Sampling(temp=1.0, top_k=4),
    "cold top-k": Sampling(temp=0.7, top_k=6),
    "min-p": Sampling(temp=1.0, min_p=0.1),
    "hot min-p, some kept": Sampling(temp=1.3, min_p=0.4, min_tokens_to_keep=4),
    "top-p, min-p": Sampling(temp=0.9, top_p=0.95, min_p=0.05),
    "all filters": Sampling(temp=1.1, top_p=0.9, min_p=0.03, top_k=5),
    "xtc": Sampling(temp=1.0, xtc_probability=0.5, xtc_threshold=0.08),
    "xtc, all filters": Sampling(
        temp=0.9, top_p=0.95, min_p=0.02, top_k=4, xtc_probability=0.7, xtc_special_tokens=(3,)
    ),
    "xtc, always": Sampling(temp=1.2, xtc_probability=1.0, xtc_threshold=0.2),
    "penalty": Sampling(temp=1.0, repetition_penalty=1.6),
    "short penalty, top-p": Sampling(
        temp=1.0, top_p=0.9, repetition_penalty=1.8, repetition_context_size=2
    ),
    "bias": Sampling(temp=1.0, logit_bias={0: 2.0, 5: -1.5}),
    "bias, penalty, top-k": Sampling(
        temp=0.8, top_k=7, repetition_penalty=1.3, logit_bias={2: 1.0, 11: -100.0}
    ),
}
Accept = Callable[..., tuple[mx.array, mx.array]]


@pytest.fixture(autouse=True, scope="module")
def without_compilation() -> Iterator[None]:
    """mlx-lm's filters are compiled anew for every value of a setting, a second each on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def table(*shape: int, seed: int, scale: float = 1.5) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


FIRST = table(VOCAB, seed=1)  # logits of token 1
SECOND = table(VOCAB, VOCAB, seed=2)  # of token 2, behind token 1
THIRD = table(VOCAB, VOCAB, VOCAB, seed=3)  # of token 3, behind tokens 1 and 2
DRAFTS = table(2, VOCAB, VOCAB, seed=4)  # drafts' logits, behind the token before


def target_table(sampling: Sampling) -> tuple[mx.array, mx.array]:
    """What the library draws tokens from, through its own processors and filters.

    Returns:
        the distribution of token 1 ``[V]``, and of tokens 2, 3, 4 behind token 1 and drafts 2 and 3
        (token 4 is never looked at), ``[V, V, 3, V]``.
    """
    processors = sampling.logits_processors()
    fourth = np.zeros(VOCAB, np.float32)

    def rows(logits: np.ndarray, context: list[int], drafts: list[int]) -> mx.array:
        return process_logits(
            mx.array(logits), context=context, drafts=drafts, processors=processors
        )

    verify = [
        rows(np.stack([SECOND[a], THIRD[a, b], fourth]), [*CONTEXT, a], [b, 0])
        for a in range(VOCAB)
        for b in range(VOCAB)
    ]
    table = mx.stack(verify).reshape(VOCAB, VOCAB, 3, VOCAB)
    first = rows(FIRST[None], CONTEXT, [])[0]
    return target_probs(first, sampling), target_probs(table, sampling)


def draw_triples(sampling: Sampling, accept: Accept, *, draws: int, seed: int = 0) -> np.ndarray:
    """Tokens 1 to 3 of many decodes with two drafts a step, all at once, ``[draws, 3]``.

    Step one emits a token, step two verifies two drafts; where the first was rejected, step three
    verifies one more for token 3.
    """
    first, verify = target_table(sampling)
    drafts = target_probs(mx.array(DRAFTS), sampling)  # [2, V, V]
    everything = mx.arange(VOCAB)[None].astype(mx.int32)

    def draw(probs: mx.array, key: mx.array) -> mx.array:
        return mx.random.categorical(mx.log(probs), key=key).astype(mx.int32)

    def one(key: mx.array) -> mx.array:
        keys = mx.random.split(key, 6)
        none = mx.zeros((0,), mx.int32)
        no_probs = mx.zeros((0, 1))
        a = accept(first[None], none, none[:, None], no_probs, key=keys[0])[0][0]
        d_2 = draw(drafts[0, a], keys[1])
        d_3 = draw(drafts[1, d_2], keys[2])
        draft_probs = mx.stack([drafts[0, a], drafts[1, d_2]])
        candidates = mx.broadcast_to(everything, (2, VOCAB))
        pair = mx.stack([d_2, d_3])
        tokens, held = accept(verify[a, d_2], pair, candidates, draft_probs, key=keys[3])
        b = tokens[0]
        again = draw(drafts[0, b], keys[4])
        third = mx.stack([verify[a, b, 1], verify[a, b, 2]])
        late = accept(third, again[None], everything, drafts[0, b][None], key=keys[5])[0][0]
        return mx.stack([a, b, mx.where(held > 0, tokens[1], late)])

    return np.array(mx.vmap(one)(mx.random.split(mx.random.key(seed), draws)))


def triple_p_values(triples: np.ndarray, sampling: Sampling) -> dict[str, float]:
    """Tokens 1, 2, 3, and tokens 2 and 3 given the one before, against the exact distribution."""
    joint = np.zeros((VOCAB, VOCAB, VOCAB))
    for a, p_a in enumerate(exact_probs(FIRST, CONTEXT, sampling)):
        for b, p_b in enumerate(exact_probs(SECOND[a], [*CONTEXT, a], sampling)):
            if p_a * p_b > 0:
                third = exact_probs(THIRD[a, b], [*CONTEXT, a, b], sampling)
                joint[a, b] = p_a * p_b * third
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(triples.T), 1)
    return {
        "token 1": p_value(counts.sum((1, 2)), joint.sum((1, 2))),
        "token 2": p_value(counts.sum((0, 2)), joint.sum((0, 2))),
        "token 3": p_value(counts.sum((0, 1)), joint.sum((0, 1))),
        "tokens 1, 2": p_value(counts.sum(2).ravel(), joint.sum(2).ravel()),
        "tokens 2, 3": p_value(counts.sum(0).ravel(), joint.sum(0).ravel()),
        "tokens 1, 3": p_value(counts.sum(1).ravel(), joint.sum(1).ravel()),
        "tokens 1, 2, 3": p_value(counts.ravel(), joint.ravel()),
    }


@pytest.mark.parametrize("draws", [FEW_DRAWS, pytest.param(MANY_DRAWS, marks=pytest.mark.soak)])
def test_all_settings_draw_from_the_exact_distribution(draws: int, seed: int) -> None:
    found = {
        (name, what): p
        for name, sampling in SETTINGS.items()
        for what, p in triple_p_values(
            draw_triples(sampling, accept_sampled, draws=draws, seed=seed), sampling
        ).items()
    }
    assert len(SETTINGS) >= 12 and len(found) == 7 * len(SETTINGS)
    assert holm(found.values())[0] > 0.001, min(found.items(), key=lambda item: item[1])


def eager(
    probs: mx.array,
    drafts: mx.array,
    candidates: mx.array,
    draft_probs: mx.array,
    *,
    key: mx.array,
    share: float,
) -> tuple[mx.array, mx.array]:
    """Accepts every draft without looking, with the probability ``share``."""
    coin_key, bonus_key, accept_key = mx.random.split(key, 3)
    tokens, held = accept_sampled(probs, drafts, candidates, draft_probs, key=accept_key)
    bonus = mx.random.categorical(mx.log(probs[-1]), key=bonus_key).astype(mx.int32)
    coin = mx.random.uniform(key=coin_key) < share
    everything = mx.concatenate([drafts.astype(mx.int32), bonus[None]])
    return mx.where(coin, everything, tokens), mx.where(coin, drafts.size, held)


def without_residual(
    probs: mx.array, drafts: mx.array, candidates: mx.array, draft_probs: mx.array, *, key: mx.array
) -> tuple[mx.array, mx.array]:
    """Replaces a rejected draft by a draw from the target itself."""
    accept_key, bonus_key = mx.random.split(key)
    tokens, held = accept_sampled(probs, drafts, candidates, draft_probs, key=accept_key)
    bonus = mx.random.categorical(mx.log(probs[held]), key=bonus_key).astype(mx.int32)
    return mx.where(mx.arange(tokens.size) == held, bonus, tokens), held


@pytest.mark.parametrize("name", ["plain", "cold", "all filters", "penalty", "bias"])
@pytest.mark.parametrize("biased", [eager, without_residual])
@pytest.mark.parametrize(  # a quarter of the draws shows twice the bias equally well
    ("draws", "share"),
    [(FEW_DRAWS, 0.04), pytest.param(MANY_DRAWS, 0.02, marks=pytest.mark.soak)],
)
def test_a_planted_bias_is_caught(
    name: str, biased: Accept, draws: int, share: float, seed: int
) -> None:
    sampling = SETTINGS[name]
    accept = partial(eager, share=share) if biased is eager else biased
    found = triple_p_values(draw_triples(sampling, accept, draws=draws, seed=seed), sampling)
    assert holm([*found.values()] * len(SETTINGS))[0] < 0.001


@pytest.mark.parametrize("name", SETTINGS)
def test_target_probs_are_the_exact_ones(name: str) -> None:
    first, verify = (np.array(probs) for probs in target_table(SETTINGS[name]))
    assert np.abs(first - exact_probs(FIRST, CONTEXT, SETTINGS[name])).max() < 1e-5
    for a, b in [(0, 0), (3, 7), (11, 2), (5, 5)]:
        second = exact_probs(SECOND[a], [*CONTEXT, a], SETTINGS[name])
        third = exact_probs(THIRD[a, b], [*CONTEXT, a, b], SETTINGS[name])
        assert np.abs(verify[a, b, :2] - np.stack([second, third])).max() < 1e-5


@given(
    seed=st.integers(0, 10_000),
    temp=st.floats(0.05, 4),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
    top_k=st.integers(0, 20),
    kept=st.integers(1, 4),
)
def test_filters_and_temperature(
    seed: int, temp: float, top_p: float, min_p: float, top_k: int, kept: int
) -> None:
    sampling = Sampling(temp=temp, top_p=top_p, min_p=min_p, top_k=top_k, min_tokens_to_keep=kept)
    logits = table(3, 16, seed=seed, scale=2.0)
    found = np.array(target_probs(mx.array(logits), sampling))
    expected = np.stack([filtered(row.astype(np.float64), sampling) for row in logits])
    assert np.abs(found - expected).max() < 1e-4


def rounds(
    probs: np.ndarray, drafts: list[int], draft_probs: np.ndarray, *, draws: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Many acceptances of the same drafts over the whole vocabulary: tokens and num_accepted."""
    target, proposal = mx.array(probs.astype(np.float32)), mx.array(draft_probs.astype(np.float32))
    candidates = mx.broadcast_to(mx.arange(probs.shape[-1])[None], proposal.shape)

    def one(key: mx.array) -> Any:
        return accept_sampled(target, mx.array(drafts), candidates, proposal, key=key)

    tokens, held = mx.vmap(one)(mx.random.split(mx.random.key(5), draws))
    return np.asarray(tokens), np.asarray(held)


def test_a_draft_from_the_target_itself_always_holds() -> None:
    probs = np.array([filtered(row, Sampling(temp=1.0)) for row in table(3, 8, seed=0)])
    tokens, held = rounds(probs, [2, 5], probs[:2])
    assert (held == 2).all() and (tokens[:, :2] == [2, 5]).all()


def test_an_impossible_draft_never_holds_and_is_never_emitted() -> None:
    probs = np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    tokens, held = rounds(probs, [2], np.array([[0.1, 0.2, 0.7]]))
    assert (held == 0).all() and not (tokens[:, 0] == 2).any()


def test_a_chosen_draft_holds_as_often_as_the_target_draws_it() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]])
    tokens, held = rounds(probs, [0], np.array([[1.0, 0.0, 0.0]]), draws=20_000)
    assert abs((held == 1).mean() - 0.7) < 0.02
    rejected = tokens[held == 0, 0]
    assert not (rejected == 0).any() and abs((rejected == 1).mean() - 2 / 3) < 0.03


def test_drafts_over_a_shortlist() -> None:
    probs = mx.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]])
    shortlist, proposal = mx.array([[3, 1]]), mx.array([[0.5, 0.5]])

    def one(key: mx.array) -> mx.array:
        draw_key, accept_key = mx.random.split(key)
        pick = mx.random.categorical(mx.log(proposal[0]), key=draw_key)
        draft = shortlist[0, pick][None]
        return accept_sampled(probs, draft, shortlist, proposal, key=accept_key)[0][0]

    first = np.asarray(mx.vmap(one)(mx.random.split(mx.random.key(1), MANY_DRAWS)))
    assert p_value(np.bincount(first, minlength=4), np.array(probs[0])) > 0.001


def test_a_match_after_a_mismatch_never_counts() -> None:
    logits = mx.zeros((4, 5)).at[mx.arange(4), mx.array([1, 2, 3, 4])].add(1.0)
    for drafts, wanted in [([1, 2, 3], 3), ([1, 0, 3], 1), ([0, 2, 3], 0), ([1, 2, 0], 2)]:
        tokens, held = accept_greedy(logits, mx.array(drafts))
        assert held.item() == wanted
        emitted: Any = tokens.tolist()
        assert emitted[: wanted + 1] == [1, 2, 3, 4][: wanted + 1]
    one_hot = np.eye(5)[[1, 2, 3, 4]]
    _, held = rounds(one_hot, [1, 0, 3], np.eye(5)[[1, 0, 3]], draws=50)
    assert (held == 1).all()


@given(st.lists(st.booleans(), max_size=10))
def test_count_accepted_is_the_leading_run(holds: list[bool]) -> None:
    expected = holds.index(False) if False in holds else len(holds)
    assert count_accepted(mx.array(holds, dtype=mx.bool_)).item() == expected


def test_the_same_key_gives_the_same_tokens() -> None:
    probs = np.array([filtered(row, Sampling(temp=1.0)) for row in table(3, 8, seed=0)])
    proposal = np.full((2, 8), 1 / 8)
    drafts = probs[:2].argmin(-1).tolist()
    first, again = (rounds(probs, drafts, proposal, draws=50) for _ in range(2))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert len(set(first[0][:, 0].tolist())) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temp", -1.0),
        ("temp", float("nan")),
        ("temp", float("inf")),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("min_p", 1.01),
        ("min_p", float("nan")),
        ("top_k", -1),
        ("xtc_probability", 1.1),
        ("xtc_threshold", 0.6),
        ("xtc_threshold", -0.1),
        ("min_tokens_to_keep", 0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("nan")),
        ("repetition_context_size", 0),
        ("logit_bias", {-1: 0.5}),
        ("logit_bias", {3: float("nan")}),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        Sampling(**{name: value})
    wanted = value if not isinstance(value, dict) else next(iter(value.values()))
    assert str(wanted) in str(error.value)


def test_greedy_is_temperature_zero() -> None:
    assert Sampling().greedy and not Sampling(temp=0.01).greedy
    assert Sampling().logits_processors() == []


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_filters_keep_what_those_of_mlx_lm_keep(spread):
    logits = spread * mx.random.normal((40, 50), key=mx.random.key(7))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        expected = sample_utils.apply_top_p(logprobs, top_p)
        assert mx.array_equal(_keep_top_p(logprobs, top_p), expected)
    for min_p, at_least in ((0.01, 1), (0.2, 1), (0.9, 5)):
        expected = sample_utils.apply_min_p(logprobs, min_p, at_least)
        assert mx.array_equal(_keep_min_p(logprobs, min_p, at_least), expected)
    for top_k in (1, 7, 49):
        expected = sample_utils.apply_top_k(logprobs, top_k)
        assert mx.array_equal(_keep_top_k(logprobs, top_k), expected)
    for threshold, special in ((0.01, []), (0.05, [3, 7]), (0.5, [])):
        expected = sample_utils.apply_xtc(logprobs, 1.0, threshold, special)
        rows = [sample_utils.apply_xtc(row[None], 1.0, threshold, special) for row in logprobs]
        assert mx.array_equal(mx.concatenate(rows), expected)
        assert mx.array_equal(_drop_top(logprobs, threshold, special), expected)
