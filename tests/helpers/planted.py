"""Stand-ins of all drafters whose drafts are written down beforehand, by position in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from mlx_mtp.drafting.suffix_lookup import Match, SuffixLookup
from mlx_mtp.model.caches.layers import LayerCache
from mlx_mtp.model.caches.mtp_cache import MTPCache
from mlx_mtp.model.layout import StepScope
from mlx_mtp.model.mtp_model import MTPModel
from tests.helpers.scripted import CERTAIN


def written_down(
    sequence: Sequence[int], name: str, *, vocab_size: int, seed: int = 0
) -> list[int]:
    """What is drafted at each position: ``"right"``, ``"wrong"`` or ``"mixed"`` ids.

    Args:
        sequence: the text that plain decoding gives.
        name: whether the drafts are those of the text.
        vocab_size: number of ids.
        seed: of mixed drafts, of which two thirds are right.
    """
    text, rng = np.array(sequence), np.random.default_rng(seed)
    wrong = (text + 1 + np.arange(len(text)) % 5) % vocab_size
    share = {"right": 1.0, "wrong": 0.0, "mixed": 0.67}[name]
    ids = np.where(rng.random(len(text)) < share, text, wrong).tolist()
    return [*ids, *[0] * 64]  # drafts beyond the end


class PlantedNative(nn.Module):
    """Native modules that draft what is written down; their caches keep what they read.

    A state has the position of the token that it predicts.  A row in a module's cache has the
    hidden state as key and the id as value.

    Args:
        model: the model that they belong to.
        ids: the draft at each position.
        num_modules: number of modules.
    """

    def __init__(self, model: MTPModel, ids: Sequence[int], num_modules: int = 1) -> None:
        super().__init__()
        self.num_modules = num_modules
        self.table = mx.array(list(ids))
        self._vocab_size, self._dims = model.vocab_size, model.hidden_size

    def make_cache(self) -> MTPCache:
        """A cache for each module."""
        return MTPCache([LayerCache(KVCache(), scope=StepScope()) for _ in range(self.num_modules)])

    def __call__(
        self, hidden: mx.array, ids: mx.array, *, cache: MTPCache, index: int = 0
    ) -> mx.array:
        """Continue from a state and a draft."""
        layer: Any = cache.layers[index % self.num_modules]
        assert ids.shape[1] == hidden.shape[1]
        rows = mx.zeros((1, 1, ids.shape[1], self._dims))
        layer.update_and_fetch(rows, ids[:, None, :, None].astype(mx.float32))
        return hidden + 1

    def read(
        self, hidden: mx.array, ids: mx.array, *, cache: MTPCache, last: Sequence[mx.array] = ()
    ) -> list[mx.array]:
        """Keep rows of the text; module i is i rows behind."""
        states, layers = [], list[Any](cache.layers)
        for index, layer in enumerate(layers):
            if not ids.shape[1]:
                break
            keys = hidden if index == 0 else mx.zeros_like(hidden)  # of the module before
            layer.update_and_fetch(keys[:, None], ids[:, None, :, None].astype(mx.float32))
            states.append(mx.full((1, 1, 1), layer.offset + index + 1))
            if index >= len(last):  # the first rows of a text
                hidden, ids = hidden[:, :-1], ids[:, 1:]
        return states

    def logits(self, hidden: mx.array, index: int = 0) -> mx.array:
        """Of the token that a state predicts, ``[1, L, V]``."""
        del index
        return CERTAIN * mx.eye(self._vocab_size)[self.table[hidden[..., 0]]]


class PlantedDraftModel:
    """A draft model that drafts what is written down by the number of rows in its cache.

    Args:
        model: a real model, whose caches are used.
        ids: the draft at each position.
    """

    def __init__(self, model: MTPModel, ids: Sequence[int]) -> None:
        self.model = model
        self.table = mx.array(list(ids))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids: mx.array, *, cache: MTPCache) -> mx.array:
        """Hidden states with the position of the next token in one more column."""
        first = cache.offset + 1
        hidden = self.model(ids, cache=cache)
        positions = mx.arange(first, first + ids.shape[1])[None, :, None]
        return mx.concatenate([hidden, positions.astype(hidden.dtype)], axis=-1)

    def logits(self, hidden: mx.array) -> mx.array:
        """``[1, L, V]``."""
        planted = self.table[hidden[..., -1].astype(mx.int32)]
        return self.model.logits(hidden[..., :-1]) + CERTAIN * mx.eye(self.vocab_size)[planted]


def plant_lookup(monkeypatch: pytest.MonkeyPatch, ids: Sequence[int]) -> None:
    """Let lookup find what is written down, by the length of the text."""

    def find(text: SuffixLookup, count: int) -> Match:
        return Match(list(ids[len(text) : len(text) + count]), 8)

    def find_after(text: SuffixLookup, more: Sequence[int], count: int) -> Match:
        first = len(text) + len(more)
        return Match(list(ids[first : first + count]), 8)

    monkeypatch.setattr(SuffixLookup, "find", find)
    monkeypatch.setattr(SuffixLookup, "find_after", find_after)
