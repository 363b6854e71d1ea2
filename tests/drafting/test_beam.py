"""The beam: at every depth the pairs of a node and a candidate that are likeliest together."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.drafting.beam import Beam, draft_beam
from mlx_mtp.model.mtp_model import MTPModel
from tests.drafting.test_mask_tokens import NaiveHead, attentive, draft, group
from tests.helpers.tiny import tiny_mtp


def beam_of(model: MTPModel, hidden: mx.array, previous: int, width: int) -> Beam:
    """A beam whose candidates are all tokens."""
    logits = model.logits(hidden[None])[0]
    candidates = mx.broadcast_to(mx.arange(logits.shape[-1]), logits.shape)
    beam = draft_beam(model, hidden, logits, candidates, mx.array(previous), width=width)
    mx.eval(beam)
    return beam


def paths(beam: Beam) -> list[tuple[list[int], float]]:
    """Tokens from the root to each node, and the probability of all of them."""
    found: list[tuple[list[int], float]] = [([], 1.0)]
    columns = (np.array(column).tolist() for column in (beam.tokens, beam.parents, beam.probs))
    for token, parent, prob in zip(*columns, strict=True):
        tokens, before = found[parent]
        found.append(([*tokens, token], before * prob))
    return found[1:]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_beam_is_the_best_of_all_pairs_at_each_depth(width: int) -> None:
    model, weights = attentive("llama")
    naive, branched = NaiveHead("llama", weights), False
    for seed in range(4):
        hidden = group(model, seed=seed)
        found = paths(beam_of(model, hidden, seed, width))
        assert len(found) == 3 * width
        nodes: list[tuple[list[int], float]] = [([], 1.0)]
        for depth, row in enumerate(np.array(hidden).astype(np.float64)):
            pairs = []
            for tokens, prob in nodes:
                probs = softmax(naive.logits(tokens[-1] if tokens else seed, row))
                pairs += [([*tokens, token], prob * p) for token, p in enumerate(probs)]
            nodes = sorted(pairs, key=lambda pair: -pair[1])[:width]
            level = found[depth * width : (depth + 1) * width]
            assert [tokens for tokens, _ in level] == [tokens for tokens, _ in nodes]
            np.testing.assert_allclose([p for _, p in level], [p for _, p in nodes], rtol=1e-4)
            branched |= len({tuple(tokens[:-1]) for tokens, _ in nodes}) > 1
    assert branched == (width > 1)


def test_a_beam_of_one_is_the_greedy_chain() -> None:
    model, _ = attentive("llama")
    for seed in range(4):
        hidden = group(model, seed=seed)
        beam = beam_of(model, hidden, seed, width=1)
        assert beam.tokens.tolist() == draft(model, hidden, previous=seed).tokens.tolist()
        assert beam.parents.tolist() == [0, 1, 2]


def test_without_a_head_the_base_models_own_scores_count() -> None:
    model = tiny_mtp("llama", sampler=False)
    hidden = group(model)
    logits = np.array(model.logits(hidden[None])[0])
    beam = beam_of(model, hidden, previous=7, width=2)
    best = np.argsort(-logits, axis=-1)
    assert beam.tokens[:2].tolist() == best[0, :2].tolist()
    np.testing.assert_allclose(np.array(beam.probs[:2]), softmax(logits[0])[best[0, :2]], rtol=1e-4)


def test_there_are_no_more_nodes_than_candidates() -> None:
    model, _ = attentive("llama")
    hidden, previous = group(model, rows=2), mx.array(3)
    logits = model.logits(hidden[None])[0]
    candidates = mx.array([[4, 9], [5, 6]])
    beam = draft_beam(model, hidden, logits, candidates, previous, width=3)
    assert beam.tokens.size == 2 + 3
    assert beam.parents[:2].tolist() == [0, 0]
    assert set(np.array(beam.parents[2:]).tolist()) == {1, 2}
