"""Drafting: a shortlist of the base model's head, re-ranked draft after draft."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_mtp.decoding.sampling import Sampling, target_probs
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.mask_tokens import draft_tokens
from mlx_mtp.drafting.shortlist import shortlisted
from mlx_mtp.drafting.vocabulary import RowLogits
from mlx_mtp.model.config import SamplerKind
from mlx_mtp.model.mtp_model import SAMPLER_PREFIX, MTPModel
from mlx_mtp.model.sampler_head import SamplerHead
from tests.helpers.exact import filtered, p_value
from tests.helpers.tiny import random_adapter, tiny_base, tiny_mtp


def group(model: MTPModel, rows: int = 3, seed: int = 0) -> mx.array:
    """Hidden states of a mask group, ``[rows, D]``."""
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((rows, model.hidden_size)).astype(np.float32))


def draft(model: MTPModel, hidden: mx.array, previous: int, **options: Any) -> Drafts:
    """Draft behind a token, by default greedily and with the key 0."""
    options = {"key": mx.random.key(0), **options}
    logits = model.logits(hidden[None])[0]
    drafts = draft_tokens(model, hidden, RowLogits(logits), mx.array(previous), **options)
    mx.eval(drafts.tokens, drafts.candidates, drafts.probs)
    return drafts


def attentive(kind: str, **overrides: Any) -> tuple[MTPModel, dict[str, mx.array]]:
    """A model whose sampler head heeds the draft before, and its adapter's tensors."""
    base = tiny_base(kind, **overrides)
    config, weights = random_adapter(base)
    weight = weights[f"{SAMPLER_PREFIX}linear_1.weight"]
    weight[:, :32] = 10 * weight[:, :32]  # embeddings are ten times smaller than hidden states
    return MTPModel(base, config=config, weights=weights), weights


class NaiveHead:
    """The sampler head in NumPy float64, over the whole vocabulary."""

    def __init__(self, kind: str, weights: dict[str, mx.array]) -> None:
        base = tiny_base(kind)
        self.weights = {
            name.removeprefix(SAMPLER_PREFIX): np.array(value).astype(np.float64)
            for name, value in weights.items()
            if name.startswith(SAMPLER_PREFIX)
        }
        self.embedding = np.array(base.model.embed_tokens.weight).astype(np.float64)
        head = base.lm_head.weight if "lm_head" in base else base.model.embed_tokens.weight
        self.unembedding = np.array(head).astype(np.float64)

    def logits(self, previous: int, hidden: np.ndarray) -> np.ndarray:
        x = np.concatenate([self.embedding[previous], hidden])
        for block in ("1", "2"):
            x = self.weights[f"linear_{block}.weight"] @ x + self.weights[f"linear_{block}.bias"]
            x = x / (1 + np.exp(-x))
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            x = x * self.weights[f"norm_{block}.weight"] + self.weights[f"norm_{block}.bias"]
        return self.unembedding @ (hidden + x)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_drafts_follow_each_other_through_the_head(kind: str) -> None:
    model, weights = attentive(kind)
    naive, changed = NaiveHead(kind, weights), 0
    for seed in range(8):
        hidden = group(model, seed=seed)
        drafts = draft(model, hidden, previous=seed)
        expected, token = [], seed
        for row in np.array(hidden).astype(np.float64):
            token = int(naive.logits(token, row).argmax())
            expected.append(token)
        assert drafts.tokens.tolist() == expected
        assert drafts.candidates.tolist() == [[token] for token in expected]
        assert drafts.probs.tolist() == [[1.0]] * 3
        changed += (
            drafts.tokens.tolist() != draft(model, hidden, previous=63 - seed).tokens.tolist()
        )
    assert changed > 0  # the token before matters


def test_without_a_head_drafts_are_the_base_models_own() -> None:
    model = tiny_mtp("llama", sampler=False)
    hidden = group(model, rows=5)
    logits = model.logits(hidden[None])[0]
    assert mx.array_equal(draft(model, hidden, 3).tokens, mx.argmax(logits, axis=-1))
    sampling = Sampling(temp=0.8)
    drafts = draft(model, hidden, 3, distribution=sampling.distribution)
    for row, candidates, probs in zip(
        np.array(logits), np.array(drafts.candidates), np.array(drafts.probs), strict=True
    ):
        expected = filtered(row.astype(np.float64), sampling)
        assert np.abs(probs - expected[candidates]).max() < 1e-5


def test_ids_that_xtc_never_drops_are_no_places_in_a_shortlist() -> None:
    logits = mx.array([[3.0, 2.9, 2.8, 0.0]])
    options: dict[str, Any] = {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.1}
    plain, special = Sampling(**options), Sampling(**options, xtc_special_tokens=(0, 1))
    assert plain.distribution and special.distribution
    assert mx.array_equal(special.distribution(logits), plain.distribution(logits))
    foreign = Sampling(**options, xtc_special_tokens=(4, 10**6, -1))
    assert mx.array_equal(target_probs(logits, foreign), target_probs(logits, plain))
    assert not mx.array_equal(target_probs(logits, special), target_probs(logits, plain))


@pytest.mark.parametrize("size", [1, 5, 64, 256])
def test_a_shortlist_holds_the_heads_best(size: int) -> None:
    model = tiny_mtp("llama")
    hidden = group(model)
    drafts = draft(model, hidden, 3, distribution=Sampling(temp=1.0).distribution, shortlist=size)
    logits = np.array(model.logits(hidden[None])[0])
    best = np.argsort(-logits, axis=-1)[:, : min(size, 64)]
    assert np.array_equal(np.sort(np.array(drafts.candidates)), np.sort(best))
    assert np.abs(np.array(drafts.probs).sum(-1) - 1).max() < 1e-5
    for token, candidates in zip(drafts.tokens.tolist(), drafts.candidates.tolist(), strict=True):  # type: ignore[arg-type]
        assert candidates.count(token) == 1


@pytest.mark.parametrize("vocab", [2048, 3001, 8256, 49152])
def test_a_large_vocabulary_is_shortlisted_by_blocks(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((4, vocab)).astype(np.float32)
    found = np.array(shortlisted(mx.array(logits), 64))
    blocks = -(-vocab // (vocab // 1024))
    for row, ids in zip(logits, found, strict=True):
        best_of_block: dict[int, int] = {}
        for token in np.argsort(-row):
            best_of_block.setdefault(int(token) % blocks, int(token))
        wanted = sorted(best_of_block.values(), key=lambda token: -row[token])[:64]
        assert sorted(ids) == sorted(wanted)
        assert row.argmax() in ids and len(set(ids)) == 64


def test_sampled_drafts_follow_the_distribution_that_they_report() -> None:
    model, _ = attentive("llama", vocab_size=8)
    hidden = group(model, rows=2)
    logits, sampling = RowLogits(model.logits(hidden[None])[0]), Sampling(temp=1.0)

    def one(key: mx.array) -> Any:
        drafts = draft_tokens(
            model, hidden, logits, mx.array(3), distribution=sampling.distribution, key=key
        )
        dense = mx.zeros((2, 8))
        dense = mx.put_along_axis(dense, drafts.candidates, drafts.probs, axis=-1)
        return drafts.tokens, dense

    tokens, probs = (np.asarray(x) for x in mx.vmap(one)(mx.random.split(mx.random.key(0), 8000)))
    counts, rows = np.zeros((8, 8)), np.zeros((8, 8))
    np.add.at(counts, tuple(tokens.T), 1)
    for first in range(8):
        chosen = tokens[:, 0] == first
        if chosen.any():
            rows[first] = probs[chosen, 1][0]
            assert np.abs(probs[chosen, 1] - rows[first]).max() < 1e-5
    assert np.abs(probs[:, 0] - probs[0, 0]).max() < 1e-5
    assert p_value(counts.sum(axis=1), probs[0, 0]) > 0.001
    assert p_value(counts, rows) > 0.001
    assert np.ptp(rows[counts.sum(axis=1) > 0], axis=0).max() > 0.01  # it does matter


def test_the_first_drafts() -> None:
    assert len(Drafts.none()) == 0 and Drafts.none().probs.shape == (0, 1)
    drafts = Drafts.certain(mx.array([4, 7, 9]))
    assert len(drafts) == 3 and drafts.probs.tolist() == [[1.0]] * 3
    first = drafts.first(2)
    assert first.tokens.tolist() == [4, 7] and first.candidates.tolist() == [[4], [7]]
    assert len(drafts.first(0)) == 0


def test_a_quantised_head_is_re_ranked_by_its_own_rows() -> None:
    model = tiny_mtp("qwen2", quantised=True)
    hidden = group(model)
    drafts = draft(model, hidden, 3)
    assert model.sampler_head is not None
    token = mx.array(3)
    for row, found in zip(hidden, drafts.tokens.tolist(), strict=True):  # type: ignore[arg-type]
        token = mx.argmax(model.logits(model.sampler_head(model.embed(token), row)[None, None]))
        assert token.item() == found


def test_the_head_adds_to_the_hidden_state() -> None:
    head = SamplerHead(8)
    head.norm_2.weight = mx.zeros((8,))
    head.norm_2.bias = mx.zeros((8,))
    hidden = mx.arange(8).astype(mx.float32)
    assert mx.array_equal(head(mx.ones((8,)), hidden), hidden)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", ["hidden", "inner", "none"])
def test_every_kind_of_head_computes_its_formula(norm: str, bias: bool, residual: str) -> None:
    kind = SamplerKind(norm=norm, norm_eps=0.01, bias=bias, residual=residual)
    head = SamplerHead(8, kind)
    rng = np.random.default_rng(0)
    flat: Any = tree_flatten(head.parameters())
    values = {name: rng.standard_normal(value.shape) for name, value in flat}
    head.load_weights([(name, mx.array(value, mx.float32)) for name, value in values.items()])
    previous, hidden = rng.standard_normal((2, 8))

    def block(x: np.ndarray, index: int) -> np.ndarray:
        y = values[f"linear_{index}.weight"] @ x + values.get(f"linear_{index}.bias", 0)
        y = y / (1 + np.exp(-y))
        y = y - y.mean() if norm == "layer" else y
        y = y / np.sqrt((y**2).mean() + 0.01) * values[f"norm_{index}.weight"]
        return y + values.get(f"norm_{index}.bias", 0)

    inner = block(np.concatenate([previous, hidden]), 1)
    expected = block(inner, 2) + {"hidden": hidden, "inner": inner, "none": 0}[residual]
    found = head(mx.array(previous, mx.float32), mx.array(hidden, mx.float32))
    assert np.allclose(np.array(found), expected, atol=1e-5)
    rows = [mx.broadcast_to(mx.array(x, mx.float32), (3, 8)) for x in (previous, hidden)]
    assert np.allclose(np.array(head(*rows)), np.stack([expected] * 3), atol=1e-5)
    assert ("linear_1.bias" in values) == bias and ("norm_1.bias" in values) == (norm == "layer")
