"""Samples follow the model's distribution whatever native modules or several drafters propose.

Heads, draft models, lookup and mask tokens on their own have such tests in ``tests/decoding``.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_mtp.decoding.sampling import Sampling
from mlx_mtp.drafting.drafter import Drafts
from mlx_mtp.drafting.shortlist import draw
from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.planning.plan import CHAIN, LOOKUP, MASK, NATIVE
from tests.decoding.test_accept import eager
from tests.decoding.test_sampling import VOCAB, chain_p_values, sampled_ids, table_model
from tests.drafting.test_random_steps import AnyPlanner
from tests.helpers.exact import holm
from tests.helpers.scripted import TableModel

K = 3


class TableNative(nn.Module):
    """A module whose drafts follow a table of its own; a state is a place and the id before it."""

    num_modules = 1

    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = mx.array(table.astype(np.float32))  # [P, V, V]

    def make_cache(self) -> MTPCache:
        """Counts rows."""
        return MTPCache([LayerCache(KVCache(), scope=StepScope())])

    def __call__(self, hidden: mx.array, ids: mx.array, *, cache: MTPCache, index: int) -> mx.array:
        del hidden, index
        rows, layer = mx.zeros((1, 1, ids.shape[1], 1)), cast(LayerCache, cache.layers[0])
        layer.update_and_fetch(rows, rows)
        place = mx.full((1, 1), layer.offset + 1)
        return mx.stack([place, ids[:, -1:]], axis=-1)

    def read(
        self, hidden: mx.array, ids: mx.array, *, cache: MTPCache, last: Any = ()
    ) -> list[mx.array]:
        """The state of the last row."""
        del last
        return [self(hidden, ids, cache=cache, index=0)]

    def logits(self, hidden: mx.array, index: int) -> mx.array:
        """``[1, 1, V]``."""
        del index
        return self.table[hidden[..., 0] % len(self.table), hidden[..., 1]]


def with_native(*, noise: float = 0.7) -> TableModel:
    """A Markov chain with a module that knows it nearly."""
    model: Any = table_model()
    rng = np.random.default_rng(4)
    table = model.logits_table + noise * rng.standard_normal(model.logits_table.shape)
    model.native = TableNative(table)
    # What the cost of proposing is estimated from.
    model.base, model.parts = nn.Embedding(VOCAB, VOCAB), SimpleNamespace(head="weight")
    return model


def take_any(patch: pytest.MonkeyPatch, used: set[str]) -> None:
    rng = np.random.default_rng(6)
    patch.setattr("mlx_mtp.decoding.setup.make_planner", lambda *_, **__: AnyPlanner(K, rng, used))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "sampling"),
    [("linear", Sampling(temp=1.0)), ("auto", Sampling(temp=1.2, top_p=0.9, top_k=6))],
)
def test_native_modules(layout: str, sampling: Sampling) -> None:
    found = chain_p_values(layout, sampling, model=with_native(), drafter=NATIVE)
    assert holm(found.values())[0] > 0.001, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [Sampling(temp=1.0), Sampling(temp=0.9, repetition_penalty=1.5,
                                              repetition_context_size=1)], ids=["plain", "penalty"]
)  # fmt: skip
def test_all_drafters_at_once_and_chains(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set[str]()
    take_any(monkeypatch, used)
    found = chain_p_values("auto", sampling, model=with_native())
    assert used == {MASK, NATIVE, LOOKUP, CHAIN}
    assert holm(found.values())[0] > 0.001, found


@pytest.mark.slow
def test_a_bias_of_the_acceptance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mtp.decoding.accept.accept_sampled", partial(eager, share=0.1))
    take_any(monkeypatch, set())
    found = chain_p_values("auto", Sampling(temp=0.6), model=with_native())
    assert holm(found.values())[0] < 0.001, found


@pytest.mark.slow
def test_drafts_drawn_from_another_distribution_than_reported_are_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def biased(logits: mx.array, distribution: Any, *, key: mx.array) -> Drafts:
        drafts = draw(2 * logits, distribution, key=key)
        told = distribution(mx.take_along_axis(logits, drafts.candidates, axis=-1))
        return Drafts(drafts.tokens, drafts.candidates, told)

    monkeypatch.setattr("mlx_mtp.drafting.native.draw", biased)
    found = chain_p_values("linear", Sampling(temp=1.0), model=with_native(), drafter=NATIVE)
    assert holm(found.values())[0] < 1e-6, found


@pytest.mark.parametrize("layout", ["linear", "auto"])
def test_the_same_seed_gives_the_same_ids(layout: str) -> None:
    options: dict[str, Any] = {"layout": layout, "sampling": Sampling(temp=1.0), "max_tokens": 60}
    runs = [sampled_ids(with_native(), [1, 2, 3], seed=seed, **options) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
